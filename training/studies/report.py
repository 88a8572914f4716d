"""From the runs' facts to scores, table, figure and verdict. For study.py.

Tests: tests/training/test_study.py.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from hf_vit.atomic_file import atomic_write

from ..engine.checkpoints.checkpoint_io import read_json
from ..reporting.facts import FACTS_NAME, public_name
from .baselines import baseline_train_flops
from .design import Score, Scores, Study, StudyRun


RESULTS_NAME, REPORT_NAME, FIGURE_NAME = "results.json", "report.md", "figure.png"
PANELS = 3  # side by side in a figure
SERIES_COLORS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#9c6b4e", "#6cc5b0", "#efb118", "#97bbf5")
ANSWERS = {True: "shows at this scale", False: "does not show at this scale", None: "not asked"}
MIN_SEEDS = 3  # for a verdict


def read_scores(runs: list[StudyRun], folder: Path) -> list[Score]:
    """The scores of the finished runs; the cost of each includes the runs that it starts from."""
    facts = {run.name: read_json(folder / run.name / FACTS_NAME) for run in runs}
    costs = {name: exaflops_of(record) for name, record in facts.items()}
    lineage: dict[str, set[str]] = {}
    rows = []
    for run in runs:  # each comes after those it starts from
        texts = [value for value in run.options.values() if isinstance(value, str)]
        before = [lineage[text.removeprefix("run:")] for text in texts if text.startswith("run:")]
        lineage[run.name] = {run.name}.union(*before)
        if run.series is not None:
            row = next(row for row in facts[run.name]["results"] if row["metric"] == run.metric)
            cost = math.fsum(costs[name] for name in lineage[run.name])
            rows.append(Score(run.panel, run.series, run.x, run.seed, row["value"], row["n"], cost))
    return rows


def exaflops_of(facts: dict[str, Any]) -> float:
    """The cost of a run's training; 0 for runs that train nothing."""
    if "training" not in facts:
        return 0.0
    if "train_exaflops" in facts["compute"]:
        return facts["compute"]["train_exaflops"]
    return baseline_train_flops(facts) / 1e18


def study_plan(study: Study, settings: dict[str, Any], runs: int) -> str:
    """The question, and when each claim counts as shown: written before anything runs."""
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
    lines += [f"{number}. {rule.claim}: {rule.accept}." for number, rule in enumerate(study.rules, 1)]
    lines += ["", *(f"{note}" for note in study.notes), ""] if study.notes else [""]
    lines += [f"{runs} runs; n = {len(seeds)} seeds ({', '.join(map(str, seeds))}); scores are of the test "
              "split, looked at once, after training.", ""]  # fmt: skip
    lines += [f"Fewer than {MIN_SEEDS} seeds: no claim is judged.", ""] if len(seeds) < MIN_SEEDS else []
    shown = {k: v for k, v in settings.items() if k not in ("scale", "data", "seeds")}
    data = ", ".join(f"{name} = {public_name(where)}" for name, where in settings["data"].items())
    lines += [f"Data: {data}.", "", "Settings:", "", *(f"- {k}: `{json.dumps(v)}`" for k, v in shown.items()), ""]
    return "\n".join(lines)


def results(study: Study, settings: dict[str, Any], scores: list[Score], runs: list[StudyRun], folder: Path) -> dict:
    """All measurements, with their conditions and the verdicts."""
    facts = [read_json(folder / run.name / FACTS_NAME) for run in runs]
    trained = [record for record in facts if "environment" in record]
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
        "runs": len(runs),
        "environment": trained[-1]["environment"],
        "commits": sorted({str(record["environment"]["commit"]) for record in trained}),
    }


def answer(shows: bool | None, seeds: int) -> str:
    """A verdict in words; fewer than three seeds give none."""
    if shows is not None and seeds < MIN_SEEDS:
        return f"not judged, n = {seeds} of at least {MIN_SEEDS} seeds"
    return ANSWERS[shows]


def spread_of_seeds(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    if len(values) == 1:
        return f"{values[0]:.2%}"
    return f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f} %"


def study_table(study: Study, scores: Scores) -> list[str]:
    """One line per series and x, with every seed."""
    lines = []
    for panel in scores.panels():
        lines += ["", f"**{panel}**"] if panel else []
        lines += ["", f"| | {study.x_label} | accuracy, mean ± sd | each seed | n | exaFLOPs |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for series in scores.series(panel):
            for x in scores.places(panel):
                rows = [row for row in scores.rows if (row.panel, row.series, row.x) == (panel, series, x)]
                if rows:
                    values, label = [row.value for row in rows], f"{x:g}" if isinstance(x, int | float) else x
                    cost = statistics.fmean(row.exaflops for row in rows)
                    mean, each = spread_of_seeds(values), ", ".join(f"{100 * v:.2f}" for v in values)
                    lines.append(f"| {series} | {label} | {mean} | {each} | {rows[0].n:,} | {cost:.3g} |")
    return lines


def scores_of(results: dict[str, Any]) -> Scores:
    """The scores of a results.json."""
    return Scores(Score(**{"panel": "", "x": "", **row}) for row in results["scores"])


def write_report(study: Study, results: dict[str, Any], folder: Path) -> str:
    """Report and figure of these results into a folder; the report is returned."""
    text = report(study, results)
    draw_figure(study, scores_of(results), folder / FIGURE_NAME)
    atomic_write(folder / REPORT_NAME, text)
    return text


def report(study: Study, results: dict[str, Any]) -> str:
    """Plan, verdict, table and conditions."""
    lines = [study_plan(study, results["settings"], results["runs"]), "## Verdict", ""]
    for verdict in results["verdicts"]:
        shows = answer(verdict["shows"], len(results["settings"]["seeds"]))
        lines.append(f"- {verdict['claim']}: **{shows}**. {verdict['numbers']}.")
    lines += ["", "(± after a difference: standard error; below: standard deviation over seeds.)", "", "## Scores"]
    machine = results["environment"]
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}" if "threads" in machine else ""
    lines += [
        *study_table(study, scores_of(results)),
        "",
        "exaFLOPs are of training on images, with that of the models started from.",
        "",
    ]
    lines += [
        f"Measured on {machine['hardware']}{threads}, {machine['precision']}, torch {machine['torch']}, "
        f"{machine['date'][:10]}, commit {', '.join(results['commits'])}.",
        "",
        f"![{study.question}]({FIGURE_NAME})",
        "",
    ]
    return "\n".join(lines)


def draw_figure(study: Study, scores: Scores, path: Path) -> None:
    """One plot per panel: mean over seeds with every seed as a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not above: --help need not wait for matplotlib
    from matplotlib.figure import Figure

    panels = scores.panels()
    columns, rows = min(PANELS, len(panels)), math.ceil(len(panels) / PANELS)
    figure = Figure(figsize=(2.6 + 3.9 * columns, 3.6 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    colors = dict(zip(dict.fromkeys(row.series for row in scores.rows), SERIES_COLORS * 2))
    lines: dict[str, Any] = {}
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for panel, axis in zip(panels, axes):
        if study.x_is_compute or is_curve(scores, panel):
            lines |= draw_series(axis, study, scores, panel, colors)
        else:
            draw_rows(axis, scores, panel, colors)
        axis.set_title(panel or study.name, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes:  # the rest of the last row
        axis.set_axis_off()
    if lines:
        figure.legend(lines.values(), lines, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, facecolor="white", metadata={"Software": None})


def is_curve(scores: Scores, panel: str) -> bool:
    """Whether all x are numbers, and some series has several."""
    positions = scores.places(panel)
    several = (sum(bool(scores.at(series, x, panel)) for x in positions) > 1 for series in scores.series(panel))
    return all(isinstance(x, int | float) for x in positions) and any(several)


def draw_series(axis, study: Study, scores: Scores, panel: str, colors: dict[str, str]) -> dict[str, Any]:
    """Draw accuracy over x or cost; returns the line of each series."""
    lines = {}
    for series in scores.series(panel):
        at: dict[Any, list[Score]] = {}
        for row in scores.rows:
            if (row.panel, row.series) == (panel, series):
                at.setdefault(row.x, []).append(row)
        points = [
            (statistics.fmean(r.exaflops for r in group) if study.x_is_compute else x, group)
            for x, group in at.items()
        ]
        points.sort(key=lambda point: point[0])
        means = [100 * statistics.fmean(r.value for r in group) for _, group in points]
        color = colors[series]
        (lines[series],) = axis.plot([x for x, _ in points], means, "o-", color=color, markersize=4, linewidth=1.6)
        for x, group in points:
            axis.plot([x] * len(group), [100 * r.value for r in group], ".", color=color, alpha=0.4, markersize=5)
    if study.log_x or study.x_is_compute:
        axis.set_xscale("log")
    if not study.x_is_compute:
        positions = scores.places(panel)
        axis.set_xticks(positions, [f"{x:g}" for x in positions])
        axis.set_xticks([], minor=True)
    axis.set_xlabel("exaFLOPs of training" if study.x_is_compute else study.x_label)
    axis.set_ylabel("test accuracy (%)")
    return lines


def draw_rows(axis, scores: Scores, panel: str, colors: dict[str, str]) -> None:
    """Draw named variants, one line each."""
    labels = [
        (series, x) for series in scores.series(panel) for x in scores.places(panel) if scores.at(series, x, panel)
    ]
    for height, (series, x) in enumerate(labels):
        values = [100 * value for value in scores.at(series, x, panel).values()]
        axis.plot(values, [height] * len(values), ".", color=colors[series], alpha=0.5)
        axis.plot(statistics.fmean(values), height, "o", color=colors[series])
    axis.set_yticks(range(len(labels)), [", ".join(filter(None, (series, str(x)))) for series, x in labels])
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel("test accuracy (%)")
