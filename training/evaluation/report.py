"""What scoring leaves behind: facts, tables, the confusion matrix as a picture, entries for a model card.

For score.py and suites.py. Metadata go through huggingface_hub's own classes: `model-index` (EvalResult) and
`.eval_results/*.yaml` (EvalResultEntry), which the Hub shows for data sets that it holds.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_vit.errors import HFViTError
from hf_vit.hub.model_card import eval_result, is_hub_id, write_card

from ..data.dataset import ImageDataset
from ..metrics.metric_state import Totals
from ..reporting import progress
from ..reporting.facts import FACTS_NAME, architecture_of, environment_facts, public_name, write_facts
from .classifier import Classifier
from .evaluate_classifier import Machine, Scored
from .label_mapping import LabelMatch


PER_CLASS_NAME, CONFUSION_NAME, MODEL_INDEX_NAME = "per_class.csv", "confusion_matrix.png", "model_index.yaml"
EVAL_RESULTS_FOLDER = ".eval_results"
SHARES = ("accuracy", "top5_accuracy", "mean_per_class", "real_accuracy", "ece", "ece_after_temperature")
WEAKEST = 5  # classes named on the screen
NAMED_TICKS = 40  # classes up to which the picture names them


def facts_of(
    args: argparse.Namespace,
    machine: Machine,
    classifier: Classifier,
    dataset: ImageDataset,
    rows: list[dict[str, Any]],
    speed: dict[str, Any],
) -> dict[str, Any]:
    """The facts of one scoring, in the form that cards are rendered from."""
    config, name = classifier.model.config, public_name(dataset.name)
    seed = training_seed(args.model)
    return {
        "model": {
            "name": public_name(args.model),
            "model_type": config.model_type,
            "architecture": architecture_of(config),
            "parameters": classifier.parameters,
            "image_size": list(classifier.transform.image_size_hw),
            "num_labels": config.num_labels,
        },
        "task": "image-classification",
        "data": {
            "name": name,
            "config_name": args.dataset_config_name,
            "eval_split": dataset.split,
            "eval_images": len(dataset),
            "label_names": dataset.label_names,
            "fingerprint": dataset.fingerprint,
        },
        "results": [{"dataset": name, "split": dataset.split, "seed": seed, **row} for row in rows],
        **({"speed": speed} if speed else {}),
        "environment": environment_facts(machine.accelerator, "bf16" if machine.bf16 else "fp32"),
    }


def training_seed(model: str) -> int:
    """The seed that a model of ours was trained with, under which its card files results; 0 where nobody says."""
    path = Path(model) / FACTS_NAME
    if not path.is_file():
        return 0
    return int((json.loads(path.read_text(encoding="utf-8")).get("training") or {}).get("seed") or 0)


def shown(metric: str, value: float) -> str:
    """A score as people read it."""
    return f"{value:.2%}" if metric in SHARES or metric.endswith("_accuracy") else f"{value:.4f}"


def summary(facts: dict[str, Any]) -> str:
    """The table on the screen."""
    model, scoring, speed = facts["model"], facts["scoring"], facts.get("speed", {})
    view = scoring["preprocessing"]
    height, width = model["image_size"]
    crop = f", crop_pct {view['crop_pct']:g}" if view["crop_pct"] is not None else ""
    rows = [
        ("model", f"{model['name']} ({model['model_type']}), {model['parameters']:,} parameters"),
        ("pictures", f"{facts['data']['name']}, {facts['data']['eval_split']}"),
        ("view", f"{height} x {width} px, {view['resize']}{crop}, {view['resample']}, tta {view['tta']}"),
    ]
    if "labels" in scoring:
        rows.append(("classes", f"matched {scoring['labels']}"))
    for row in facts["results"]:
        seed = f", seed {row['seed']}" if "_shot_" in row["metric"] else ""
        rows.append(
            (row["metric"].replace("_", " "), f"{shown(row['metric'], row['value'])} (n = {row['n']:,}{seed})")
        )
    if unreadable := facts["data"].get("unreadable_images"):
        rows.append(("unreadable", f"{unreadable:,} pictures are left out"))
    if "gmacs" in speed:
        rows.append(("forward pass", f"{speed['gmacs']:.4g} GMACs"))
    if "latency_p50_ms" in speed:
        rows += [
            ("throughput", f"{speed['images_per_second']:,.1f} images/s, batches of {speed['throughput_batch_size']}"),
            ("latency", f"p50 {speed['latency_p50_ms']:.2f} ms, p99 {speed['latency_p99_ms']:.2f} ms, one image, "
             f"{speed['latency_runs']} runs"),
            ("memory peak", f"{speed['memory_peak_bytes'] / 2**30:.2f} GiB"),
        ]  # fmt: skip
    return progress.table(rows)


def weakest(totals: Totals, names: list[str]) -> str:
    """The classes with the lowest accuracy and what they are taken for."""
    share = totals.per_class()
    order = [int(i) for i in np.argsort(share, kind="stable") if totals.pictures[i]][:WEAKEST]
    rows = []
    for number in order:
        taken = taken_for(totals, names, number)
        rows.append((names[number], f"{share[number]:.2%} (n = {totals.pictures[number]:,}){taken and ', ' + taken}"))
    return "weakest classes\n" + progress.table(rows)


def taken_for(totals: Totals, names: list[str], number: int) -> str:
    """The class that one is most often taken for, with the count."""
    if totals.confusion is None:
        return ""
    row = totals.confusion[number].copy()
    row[number] = 0
    other = int(row.argmax())
    return f"taken for {names[other]} {row[other]} times" if row[other] else ""


def check_output(folder: Path, model: str) -> None:
    """Raise HFViTError if the folder holds the facts of a training run, unless it is that of the scored model."""
    if trained(folder) is not None and Path(model).resolve() != folder.resolve():
        raise HFViTError(f"{folder} holds a trained model that is not --model {model}: give another --output_dir")


def trained(folder: Path) -> dict[str, Any] | None:
    """The facts of the training run that a folder came from, if it did."""
    path = folder / FACTS_NAME
    if not path.is_file():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    return facts if "training" in facts else None


def joined(own: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of a training run with the scores of this one added, in place of those of the same name."""

    def key(row: dict[str, Any]) -> tuple:
        return row["dataset"], row["split"], row["metric"], row["seed"]

    new = {key(row) for row in facts["results"]}
    results = [row for row in own["results"] if key(row) not in new] + facts["results"]
    figures = list(dict.fromkeys([*own.get("figures", []), *facts.get("figures", [])]))
    added = {name: facts[name] for name in ("scoring", "speed") if name in facts}
    return {**own, **added, "results": results, "figures": figures}


def write(folder: Path, facts: dict[str, Any], scored: Scored | None, match: LabelMatch | None) -> None:
    """Write every file of one scoring; in the model's own folder, its facts and its card gain the scores."""
    folder.mkdir(parents=True, exist_ok=True)
    if scored is not None and match is not None:
        write_per_class(folder / PER_CLASS_NAME, scored.totals, match.names)
        if scored.totals.confusion is not None:
            draw_confusion(folder / CONFUSION_NAME, scored.totals.confusion, match.names)
            facts["figures"] = [CONFUSION_NAME]
    own = trained(folder)
    write_facts(folder, facts if own is None else joined(own, facts))
    if own is not None:
        write_card(folder)
    index = eval_results_to_model_index(
        facts["model"]["name"], [eval_result(row, facts["data"]) for row in facts["results"]]
    )
    (folder / MODEL_INDEX_NAME).write_text(
        yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    write_eval_results(folder / EVAL_RESULTS_FOLDER, facts)


def write_eval_results(folder: Path, facts: dict[str, Any]) -> None:
    """Entries for the leaderboard of a data set on the Hub; other data sets have none."""
    by_dataset: dict[str, list[EvalResultEntry]] = {}
    for row in facts["results"]:
        if is_hub_id(row["dataset"]) and (row["metric"] in SHARES or row["metric"].endswith("_accuracy")):
            entry = EvalResultEntry(
                dataset_id=row["dataset"],
                task_id=row["metric"],
                value=round(100 * row["value"], 4),
                date=facts["environment"]["date"],
                notes=f"percent; split {row['split']}, n = {row['n']}, {view_in_words(facts)}",
            )
            by_dataset.setdefault(row["dataset"], []).append(entry)
    for name, entries in by_dataset.items():
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        (folder / f"{name.replace('/', '--')}.yaml").write_text(text, encoding="utf-8")


def view_in_words(facts: dict[str, Any]) -> str:
    view = facts["scoring"]["preprocessing"]
    height, width = view["image_size"]
    crop = f" {view['crop_pct']:g}" if view["crop_pct"] is not None else ""
    return f"{height} x {width} px, {view['resize']}{crop}, tta {view['tta']}"


def write_per_class(path: Path, totals: Totals, names: list[str]) -> None:
    """CSV: class, pictures, hits, accuracy, the class it is most often taken for and how often."""
    share = totals.per_class()
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "n", "correct", "accuracy", "taken_for"])
        for number, name in enumerate(names):
            value = "" if not totals.pictures[number] else f"{share[number]:.6f}"
            counts = [int(totals.pictures[number]), int(totals.hits[number])]
            table.writerow([name, *counts, value, taken_for(totals, names, number)])


def draw_confusion(path: Path, confusion: np.ndarray, names: list[str]) -> None:
    """The confusion matrix as a picture: a row for each right class, shares of its pictures."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(12.0, 3.0 + 0.28 * min(len(names), NAMED_TICKS))
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("predicted")
    axes.set_ylabel("right class")
    if len(names) <= NAMED_TICKS:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, label="share of the right class", shrink=0.8)
    figure.savefig(path, dpi=120)
