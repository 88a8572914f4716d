"""From the cells' facts to scores, table, figure and verdict. For study.py."""

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..checkpointing import read_json
from ..facts import FACTS_NAME, public_name
from .design import Cell, Score, Scores, Study
from .peers import train_flops


COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#9c6b4e", "#6cc5b0", "#efb118", "#97bbf5")
ANSWERS = {True: "shows at this scale", False: "does not show at this scale", None: "not asked"}


def read_scores(cells: list[Cell], folder: Path) -> list[Score]:
    """The scores of the finished cells; the cost of each is its own and that of the models it starts from."""
    by_name, costs = {cell.name: cell for cell in cells}, {}

    def cost(cell: Cell) -> float:
        if cell.name not in costs:
            before = [value for value in cell.options.values() if isinstance(value, str) and value.startswith("cell:")]
            own = exaflops_of(read_json(folder / cell.name / FACTS_NAME))
            costs[cell.name] = own + sum(cost(by_name[name.removeprefix("cell:")]) for name in before)
        return costs[cell.name]

    found = []
    for cell in cells:
        if cell.series is not None:
            rows = read_json(folder / cell.name / FACTS_NAME)["results"]
            row = next(row for row in rows if row["metric"] == cell.metric)
            found.append(Score(cell.panel, cell.series, cell.x, cell.seed, row["value"], row["n"], cost(cell)))
    return found


def exaflops_of(facts: dict[str, Any]) -> float:
    """What a cell's training took; 0 for cells that train nothing."""
    if "training" not in facts:
        return 0.0
    if "train_exaflops" in facts["compute"]:
        return facts["compute"]["train_exaflops"]
    return train_flops(facts) / 1e18


def plan(study: Study, settings: dict[str, Any], cells: list[Cell]) -> str:
    """What is asked, and when it counts as shown: written before anything runs."""
    seeds = settings["seeds"]
    lines = [
        f"# Study {study.name}, scale {settings['scale']}",
        "",
        study.question,
        "",
        f"Source: {study.source}.",
        "",
    ]
    lines += [
        "Claims, and when each counts as shown, stated before the first run (differences are paired by seed):",
        "",
    ]
    lines += [f"{place}. {rule.claim}: {rule.accept}." for place, rule in enumerate(study.rules, 1)]
    lines += ["", *(f"{note}" for note in study.notes), ""] if study.notes else [""]
    lines += [f"{len(cells)} cells; n = {len(seeds)} seeds ({', '.join(map(str, seeds))}); scores are of the test "
              "split, looked at once, after training.", ""]  # fmt: skip
    shown = {k: v for k, v in settings.items() if k not in ("scale", "data", "seeds")}
    data = ", ".join(f"{name} = {public_name(where)}" for name, where in settings["data"].items())
    lines += [f"Data: {data}.", "", "Settings:", "", *(f"- {k}: `{json.dumps(v)}`" for k, v in shown.items()), ""]
    return "\n".join(lines)


def results(study: Study, settings: dict[str, Any], scores: list[Score], cells: list[Cell], folder: Path) -> dict:
    """Everything measured, with its conditions and the verdicts."""
    facts = [read_json(folder / cell.name / FACTS_NAME) for cell in cells]
    trained = [one for one in facts if "environment" in one]
    judged = [(rule, *rule.judge(Scores(scores), settings)) for rule in study.rules]
    return {
        "study": study.name,
        "question": study.question,
        "settings": settings | {"data": {name: public_name(where) for name, where in settings["data"].items()}},
        "verdicts": [
            {"claim": rule.claim, "accept": rule.accept, "shows": shows, "numbers": numbers}
            for rule, shows, numbers in judged
        ],
        "scores": [
            {name: value for name, value in vars(score).items() if value not in ("", None)} for score in scores
        ],
        "cells": len(cells),
        "environment": trained[-1]["environment"],
        "commits": sorted({str(one["environment"]["commit"]) for one in trained}),
    }


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    if len(values) == 1:
        return f"{values[0]:.2%}"
    return f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f} %"


def table(study: Study, scores: Scores) -> list[str]:
    """A line for each place, with every seed."""
    lines = []
    for panel in scores.panels():
        lines += ["", f"**{panel}**"] if panel else []
        lines += ["", f"| | {study.x_label} | accuracy, mean ± sd | each seed | n | exaFLOPs |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for series in scores.series(panel):
            for x in scores.places(panel):
                rows = [row for row in scores.rows if (row.panel, row.series, row.x) == (panel, series, x)]
                if rows:
                    values, place = [row.value for row in rows], f"{x:g}" if isinstance(x, int | float) else x
                    cost = statistics.fmean(row.exaflops for row in rows)
                    lines.append(
                        f"| {series} | {place} | {spread(values)} | {', '.join(f'{100 * v:.2f}' for v in values)} | "
                        f"{rows[0].n:,} | {cost:.3g} |"
                    )
    return lines


def report(study: Study, settings: dict[str, Any], scores: Scores, found: dict[str, Any], cells: list[Cell]) -> str:
    """Plan, verdict, table and conditions."""
    lines = [plan(study, settings, cells), "## Verdict", ""]
    for verdict in found["verdicts"]:
        shows = ANSWERS[verdict["shows"]]
        lines.append(f"- {verdict['claim']}: **{shows}**. {verdict['numbers']}.")
    lines += ["", "(± after a difference: standard error; below: standard deviation over seeds.)", "", "## Scores"]
    machine = found["environment"]
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    lines += [
        *table(study, scores),
        "",
        "exaFLOPs are of training, with that of the models started from.",
        "",
    ]
    lines += [
        f"Measured on {machine['hardware']}{threads}, {machine['precision']}, torch {machine['torch']}, "
        f"{machine['date'][:10]}, commit {', '.join(found['commits'])}.",
        "",
        f"![{study.question}](figure.png)",
        "",
    ]
    return "\n".join(lines)


def draw(study: Study, scores: Scores, path: Path) -> None:
    """One plot a panel: mean over seeds with every seed as a point."""
    panels = scores.panels()
    figure = Figure(figsize=(1.2 + 4.2 * len(panels), 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        if study.x_is_compute or all(isinstance(x, int | float) for x in scores.places(panel)):
            draw_lines(axis, study, scores, panel)
        else:
            draw_rows(axis, scores, panel)
        axis.set_title(panel or study.name, fontsize=10)
        axis.grid(alpha=0.3)
    figure.savefig(path, facecolor="white", metadata={"Software": None})


def draw_lines(axis, study: Study, scores: Scores, panel: str) -> None:
    for series, colour in zip(scores.series(panel), COLOURS):
        rows = [row for row in scores.rows if (row.panel, row.series) == (panel, series)]
        at: dict[Any, list[Score]] = {}
        for row in rows:
            at.setdefault(row.x, []).append(row)
        points = [
            (statistics.fmean(r.exaflops for r in group) if study.x_is_compute else x, group)
            for x, group in at.items()
        ]
        points.sort(key=lambda point: point[0])
        means = [100 * statistics.fmean(r.value for r in group) for _, group in points]
        axis.plot([x for x, _ in points], means, "o-", color=colour, label=series, markersize=4, linewidth=1.6)
        for x, group in points:
            axis.plot([x] * len(group), [100 * r.value for r in group], ".", color=colour, alpha=0.4, markersize=5)
    if study.log_x or study.x_is_compute:
        axis.set_xscale("log")
    axis.set_xlabel("exaFLOPs of training" if study.x_is_compute else study.x_label)
    axis.set_ylabel("test accuracy (%)")
    axis.legend(frameon=False, fontsize=8)


def draw_rows(axis, scores: Scores, panel: str) -> None:
    """Named variants: one line each."""
    labels = [
        (series, x) for series in scores.series(panel) for x in scores.places(panel) if scores.at(series, x, panel)
    ]
    for height, (series, x) in enumerate(labels):
        values = [100 * value for value in scores.at(series, x, panel).values()]
        colour = COLOURS[scores.series(panel).index(series) % len(COLOURS)]
        axis.plot(values, [height] * len(values), ".", color=colour, alpha=0.5)
        axis.plot(statistics.fmean(values), height, "o", color=colour)
    axis.set_yticks(range(len(labels)), [f"{series} {x}".strip() for series, x in labels], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy (%)")
