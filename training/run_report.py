"""The tables that a run prints: model and data before the first step, scores and costs at the end.

Tests: tests/training/test_train.py, tests/training/test_finetune.py.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hf_vit.errors import listed
from hf_vit.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL

from .data.dataset import ImageDataset, holds_classes
from .data.deduplication import sampled_duplicates
from .data.shards.streaming import ImageStream
from .data.sources import SyntheticSource
from .data.statistics import labels_in_words, sample_of_sizes
from .engine.trainer import Trainer
from .reporting import progress


LABELS_IN_WORDS = {SINGLE_LABEL: "classes", MULTI_LABEL: "labels", REGRESSION: "numbers"}
UNEQUAL = 10  # ratio of the largest class to the smallest from which class weights are suggested


def run_description(trainer: Trainer, train: ImageDataset | ImageStream, evaluation: ImageDataset) -> str:
    """A table of model, data and steps, before the training."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    height, width = trainer.image_size
    count, word = len(train.label_names), LABELS_IN_WORDS[trainer.problem_type]
    labels = f"{count} {word if count > 1 else word.removesuffix('s')}"
    rows = [
        (
            "model",
            f"{parameters:,} parameters"
            + (f" ({trainable:,} trained)" if trainable < parameters else "")
            + f", {height} x {width} px",
        ),
        ("training", f"{len(train):,} images, {labels} ({train.name}, {train.split})"),
        ("evaluation", f"{len(evaluation):,} images ({evaluation.split})"),
        *data_facts(train, evaluation),
        (
            "steps",
            f"{trainer.max_steps:,} of {trainer.global_batch_size} images, {trainer.precision}, "
            f"{trainer.world_size} x {trainer.accelerator.device}",
        ),
    ]
    if len(trainer.schedule.stages) > 1:
        rows.append(("stages", "; ".join(map(str, trainer.schedule.stages))))
    return progress.two_columns(rows)


def data_facts(train: ImageDataset | ImageStream, evaluation: ImageDataset) -> list[tuple[str, str]]:
    """Rows about classes, sizes and duplicates of the images; for a stream, which is not read yet, about classes."""
    if not isinstance(train, ImageDataset):
        return [("classes", listed(train.label_names))]
    rows = [(LABELS_IN_WORDS[train.problem_type], labels_in_words(train)), *class_balance(train)]
    generated = isinstance(train.source, SyntheticSource)
    return rows if generated else [*rows, ("images", sample_of_sizes(train)), *duplicate_facts(train, evaluation)]


def class_balance(train: ImageDataset) -> list[tuple[str, str]]:
    """A row about the smallest and the largest class, if they differ; with advice if they differ much."""
    if not holds_classes(train):
        return []
    counts = np.bincount(train.labels, minlength=len(train.label_names))
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[least] == counts[most]:
        return []
    smallest, largest = (f"{train.label_names[label]} ({counts[label]:,})" for label in (least, most))
    text = f"smallest {smallest}, largest {largest}"
    if counts[most] >= UNEQUAL * counts[least]:
        text += "; see mean_per_class and macro_f1 beside accuracy, and --class_weights balanced"
    return [("class sizes", text)]


def duplicate_facts(train: ImageDataset, evaluation: ImageDataset) -> list[tuple[str, str]]:
    """A row about evaluation images that are also in training, by perceptual hash; of large sets a sample."""
    duplicates, among = sampled_duplicates(evaluation, train)
    if not duplicates:
        return [("duplicates", f"none between {among}")]
    names = listed([f"{match.name} = {match.other_name}" for match in duplicates[:3]])
    text = f"{len(duplicates):,} between {among}: {names}{', ...' if len(duplicates) > 3 else ''}"
    return [("duplicates", f"{text}; --deduplicate_against eval trains without them")]


def gain_of_training(trainer: Trainer) -> str | None:
    """A line that compares the scores before and after training; None without an evaluation before the first step."""
    name = f"eval_{trainer.args.metric_for_best_model.removeprefix('eval_')}"
    scores = {line["step"]: line[name] for line in trainer.state.log_history if name in line}
    if 0 not in scores or len(scores) < 2:
        return None
    last = max(scores)
    step = trainer.state.best_global_step if trainer.args.load_best_model_at_end else last
    higher = trainer.args.greater_is_better
    best = (max if higher else min)((step for step in scores if step), key=scores.__getitem__)
    accuracies = {line["step"]: line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line}

    def score(step: int) -> str:
        text = progress.format_number(name, scores[step])
        if name == "eval_loss" and step in accuracies:  # easier to judge than a loss
            text += f" with accuracy {progress.format_number('eval_accuracy', accuracies[step])}"
        return text

    words = [f"before training {score(0)}", f"best of training {score(best)} (step {best})"]
    weights = "those before training" if step == 0 else f"those of step {step}"
    return f"{name.removeprefix('eval_')} on {trainer.eval_dataset.split}: {', '.join(words)}; kept: {weights}"


def run_summary(facts: dict[str, Any], folder: Path) -> str:
    """A table of scores, time, memory and compute, after the training."""
    training, compute = facts["training"], facts["compute"]
    rows = []
    for row in facts["results"]:
        value = progress.format_number(row["metric"], row["value"])
        if "interval" in row:
            low, high = (progress.format_number(row["metric"], end) for end in row["interval"])
            value += f" (95 %: {low} to {high})"
        rows.append(
            (row["metric"].replace("_", " "), f"{value} on {row['n']:,} images ({row['dataset']}, {row['split']})")
        )
    if "final_loss" in training:
        steps = f"after {training['steps']:,} steps ({training['epochs']:.1f} epochs)"
        rows.append(("training loss", f"{training['final_loss']:.4f} {steps}"))
    speed = f", {training['images_per_second']:,.0f} images/s, waiting for data {training['data_wait']:.0%}"
    rows += [
        ("time", progress.hours_minutes_seconds(training["seconds"]) + speed * (training["steps"] > 0)),
        ("memory peak", f"{compute['memory_peak_bytes'] / 2**30:.2f} GiB"),
    ]
    if "train_exaflops" in compute:
        rows.append(
            (
                "compute",
                f"{compute['train_exaflops']:.3g} exaFLOPs"
                + (f", {compute['mfu']:.0%} of the peak" if "mfu" in compute else ""),
            )
        )
    rows.append(("folder", str(folder)))
    return "\n" + progress.two_columns(rows)
