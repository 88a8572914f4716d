"""Write the results of scoring: facts, tables, the confusion matrix as a figure, entries for a model card.

For score_model.py. Metadata are written by huggingface_hub's own classes: `model-index` (EvalResult) and
`.eval_results/*.yaml` (EvalResultEntry), which the Hub shows for data sets that it hosts.

Tests: tests/training/test_score.py.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.sparse import csr_array

from hf_vit.atomic_file import atomic_path, atomic_write
from hf_vit.errors import HFViTError, listed
from hf_vit.hub.model_card import eval_result, is_hub_id, write_card
from hf_vit.image_processing import read_settings
from hf_vit.plot_text import plain_text
from hf_vit.problem_type import SINGLE_LABEL, problem_type_of

from ..data.dataset import ImageDataset
from ..metrics.metric_state import FRACTIONS, Metrics
from ..reporting import progress
from ..reporting.facts import FACTS_NAME, architecture_of, environment_facts, public_name, write_facts
from ..reporting.per_class import PER_CLASS_NAME, taken_for, write_per_class
from ..reporting.report_page import count_images
from .classifier import Classifier
from .evaluate_classifier import EvalContext, Predictions
from .label_mapping import LabelMatch


CONFUSION_NAME, MODEL_INDEX_NAME = "confusion_matrix.png", "model_index.yaml"
EVAL_RESULTS_FOLDER = ".eval_results"
MAX_WEAKEST = 5  # classes named on the screen
MAX_NAMED_TICKS = 40  # classes up to which the figure names them
MAX_NUMBERED_CLASSES = 30  # up to which each cell shows its number
NUMBER_POINTS, NUMBER_DIGITS = 8.0, 3  # size of such a number, and digits that fit at that size
DARK = 0.5  # fraction from which a cell is too dark for black numbers
MAX_PLOTTED_ROWS = 1024  # about the pixels of the figure; of more classes several share a row
METRIC_LABELS = {"mean_per_class": "balanced accuracy (mean per class)", "macro_f1": "macro F1"}


def facts_of(
    args: argparse.Namespace,
    context: EvalContext,
    classifier: Classifier,
    dataset: ImageDataset,
    rows: list[dict[str, Any]],
    speed: dict[str, Any],
) -> dict[str, Any]:
    """The facts of one scoring, from which cards are rendered."""
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
            **({} if problem_type_of(config) == SINGLE_LABEL else {"problem_type": config.problem_type}),
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
        "environment": environment_facts(context.accelerator, "bf16" if context.bf16 else "fp32"),
    }


def training_seed(model: str) -> int:
    """The seed that a model was trained with, by which its card lists results; 0 if unknown."""
    path = Path(model) / FACTS_NAME
    if not path.is_file():
        return 0
    training = read_settings(path).get("training")
    seed = training.get("seed") if isinstance(training, dict) else None
    return seed if isinstance(seed, int) else 0


def is_fraction(metric: str) -> bool:
    """Whether a metric is shown in percent."""
    return metric in FRACTIONS or metric.endswith("_accuracy")


def format_score(row: dict[str, Any]) -> str:
    """A score as text, with its number of images and, if it has one, its 95 % interval."""
    metric, value = row["metric"], row["value"]
    text = f"{value:.2%}" if is_fraction(metric) else f"{value:.4f}"
    low, high = row.get("interval") or (None, None)
    interval = "" if low is None else f", 95 %: {low:.2%} to {high:.2%}"
    seed = f", seed {row['seed']}" if "_shot_" in metric else ""
    return f"{text} (n = {row['n']:,}{interval}{seed})"


def score_summary(facts: dict[str, Any]) -> str:
    """The table on the screen."""
    model, scoring, speed = facts["model"], facts["scoring"], facts.get("speed", {})
    height, width = model["image_size"]
    rows = [
        ("model", f"{model['name']} ({model['model_type']}), {model['parameters']:,} parameters"),
        ("images", f"{facts['data']['name']}, {facts['data']['eval_split']}"),
        ("view", f"{height} x {width} px, {describe_view(scoring['preprocessing'])}"),
    ]
    if "labels" in scoring:
        rows.append(("classes", f"matched {scoring['labels']}"))
    for row in facts["results"]:
        rows.append((METRIC_LABELS.get(row["metric"], row["metric"].replace("_", " ")), format_score(row)))
    if unreadable := facts["data"].get("unreadable_images"):
        rows.append(("unreadable", f"{count_images(unreadable)} left out"))
    if "gmacs" in speed:
        rows.append(("forward pass", f"{speed['gmacs']:.4g} GMACs"))
    if "latency_p50_ms" in speed:
        rows += [
            ("throughput", f"{speed['images_per_second']:,.1f} images/s, batches of {speed['throughput_batch_size']}"),
            ("latency", f"p50 {speed['latency_p50_ms']:.2f} ms, p99 {speed['latency_p99_ms']:.2f} ms, one image, "
             f"{speed['latency_runs']} runs"),
            ("memory peak", f"{speed['memory_peak_bytes'] / 2**30:.2f} GiB"),
        ]  # fmt: skip
    return progress.two_columns(rows)


def weakest(metrics: Metrics, names: list[str]) -> str:
    """The classes with the lowest recall, and what they are taken for."""
    recall, support = metrics.precision_recall_f1()[1], metrics.support
    confused = metrics.most_confused()
    order = [int(i) for i in np.argsort(recall, kind="stable") if support[i] and recall[i] < 1][:MAX_WEAKEST]
    if not order:
        return "every image is classified correctly"
    rows = []
    for number in order:
        taken = taken_for(confused, names, number)
        rows.append((names[number], f"{recall[number]:.2%} (n = {support[number]:,}){taken and ', ' + taken}"))
    return "weakest classes\n" + progress.two_columns(rows)


def check_output(folder: Path, model: str) -> None:
    """Raise HFViTError if the folder holds another trained model than the scored one."""
    if trained(folder) is not None and Path(model).resolve() != folder.resolve():
        raise HFViTError(f"{folder} holds a trained model that is not --model {model}: give another --output_dir")


def trained(folder: Path) -> dict[str, Any] | None:
    """The facts of the training run that wrote a folder, if one did."""
    path = folder / FACTS_NAME
    if not path.is_file():
        return None
    facts = read_settings(path)
    return facts if "training" in facts else None


def joined(scored: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of a training run with these scores added; they replace scores of the same name."""

    def key(row: dict[str, Any]) -> tuple:
        return row["dataset"], row["split"], row["metric"], row["seed"]

    replaced = {key(row) for row in facts["results"]}
    results = [row for row in scored["results"] if key(row) not in replaced] + facts["results"]
    figures = list(dict.fromkeys([*scored.get("figures", []), *facts.get("figures", [])]))
    added = {name: facts[name] for name in ("scoring", "speed") if name in facts}
    return {**scored, **added, "results": results, "figures": figures}


def write_report_files(
    folder: Path, facts: dict[str, Any], predictions: Predictions | None, match: LabelMatch | None
) -> None:
    """Write every file of one scoring; the scores are added to the facts and card of a model's own folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if predictions is not None and match is not None:
        metrics = predictions.metrics
        write_per_class(folder / PER_CLASS_NAME, metrics, match.names)
        plot_confusion_matrix(folder / CONFUSION_NAME, metrics.confusion(), match.names)
        facts["figures"] = [CONFUSION_NAME]
    trained_facts = trained(folder)
    write_facts(folder, facts if trained_facts is None else joined(trained_facts, facts))
    if trained_facts is not None:
        write_card(folder)
    index = eval_results_to_model_index(
        facts["model"]["name"],
        [
            eval_result(row, facts["data"], problem_type=facts["model"].get("problem_type", SINGLE_LABEL))
            for row in facts["results"]
        ],
    )
    text = yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)
    atomic_write(folder / MODEL_INDEX_NAME, text)
    write_eval_results(folder / EVAL_RESULTS_FOLDER, facts)


def write_eval_results(folder: Path, facts: dict[str, Any]) -> None:
    """Write entries for the leaderboards of data sets on the Hub; other data sets have none."""
    by_dataset: dict[str, list[EvalResultEntry]] = {}
    for row in facts["results"]:
        if is_hub_id(row["dataset"]) and is_fraction(row["metric"]):
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
        atomic_write(folder / f"{name.replace('/', '--')}.yaml", text)


def view_in_words(facts: dict[str, Any]) -> str:
    view = facts["scoring"]["preprocessing"]
    height, width = view["image_size"]
    return f"{height} x {width} px, {describe_view(view)}"


def describe_view(view: dict[str, Any]) -> str:
    """How images were resized and cropped, on one line."""
    crop = f" crop_pct {view['crop_pct']:g}" if view["crop_pct"] is not None else ""
    steps = [view.get("transform"), f"{view['resize']}{crop}", view.get("resample"), f"tta {view['tta']}"]
    return ", ".join(step for step in steps if step)


def plot_confusion_matrix(path: Path, confusion: csr_array, names: list[str]) -> None:
    """Draw the confusion matrix (K, K): one row per true class, colored by fractions of its images.

    With at most MAX_NUMBERED_CLASSES classes, each cell shows its number of images; with more they would be illegible.
    With more than MAX_PLOTTED_ROWS classes, several neighbors share a row, and a column.
    """
    classes = confusion.shape[0]
    each = -(-classes // MAX_PLOTTED_ROWS)
    rows, pairs = -(-classes // each), confusion.tocoo()
    fractions = np.zeros((rows, rows))
    np.add.at(fractions, (pairs.row // each, pairs.col // each), pairs.data)
    fractions /= np.maximum(fractions.sum(1, keepdims=True), 1)
    inches = min(12.0, 3.0 + 0.28 * min(len(names), MAX_NAMED_TICKS))
    figure = Figure(figsize=(inches, inches), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ScalarMappable(Normalize(0, 1), "Blues")
    axes.imshow(colors.to_rgba(fractions, bytes=True), interpolation="nearest")  # half the memory of drawing numbers
    if classes <= MAX_NUMBERED_CLASSES:
        for row, column, count in zip(pairs.row, pairs.col, pairs.data):
            color, digits = "white" if fractions[row, column] > DARK else "black", len(str(count))
            size = NUMBER_POINTS * NUMBER_DIGITS / max(NUMBER_DIGITS, digits)
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=size)
    axes.set_xlabel("predicted" if each == 1 else f"predicted, {each} classes a column")
    axes.set_ylabel("right class" if each == 1 else f"right class, {each} classes a row")
    if len(names) <= MAX_NAMED_TICKS:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    figure.colorbar(colors, ax=axes, label="fraction of the row's images", shrink=0.8)
    with plain_text(figure) as missing, atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    if missing:
        undrawn = [name for name in names if missing & set(name)]
        print(
            f"note: no installed font draws {listed(undrawn)} in {path.name}; install one that does, such as Noto "
            "Sans CJK (the other files have the names)",
            file=sys.stderr,
        )
