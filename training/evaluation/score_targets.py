"""Score a multi-label classifier or a regression on a data set: every image once, on any number of processes.

For score_model.py. evaluate_classifier.py is for classes; the metrics are in training/metrics/target_scores.py.

Tests: tests/training/test_problem_types.py.
"""

import argparse
import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from hf_vit.atomic_file import atomic_write
from hf_vit.errors import HFViTError
from hf_vit.problem_type import MULTI_LABEL, problem_type_of, thresholds_of

from ..data.dataset import ImageDataset
from ..engine.evaluation_loop import gather_outputs
from ..metrics.outcomes import OutcomeState
from ..metrics.target_scores import sigmoid, target_scores
from .classifier import Classifier
from .evaluate_classifier import EvalContext, batches


PER_LABEL_NAME = "per_label.csv"
CLASS_OPTIONS = ("few_shot", "knn", "label_map", "label_subset", "real_labels")


@dataclass
class TargetPredictions:
    """Outputs on all images, on every process.

    Attributes:
        logits, labels: float32 (N, K), in the data's order. names: of the outputs.
        thresholds: (K,) scores from which each label counts as predicted; None: the model has none.
    """

    problem_type: str
    logits: np.ndarray
    labels: np.ndarray
    names: list[str]
    thresholds: list[float] | None
    unreadable: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """One row per score: {"metric", "value", "n"}."""
        scores = target_scores(self.problem_type, self.logits, self.labels, self.names, self.thresholds)
        return [{"metric": name, "value": value, "n": len(self.labels)} for name, value in scores.items()]


def refuse_options_of_classes(args: argparse.Namespace, problem_type: str) -> None:
    """Raise HFViTError for options that need one class per image."""
    for name in CLASS_OPTIONS:
        if getattr(args, name) is not None:
            raise HFViTError(f"--{name} is for one class per image, this model is for {problem_type}: leave it out")


@torch.no_grad()
def score_targets(
    classifier: Classifier,
    dataset: ImageDataset,
    context: EvalContext,
    tta: str,
    outcomes: OutcomeState | None,
) -> TargetPredictions:
    """Score every image once; the scores or numbers of several views are averaged.

    Args:
        dataset: its labels are in the order of the model's outputs. outcomes: collects the result of each image.

    Raises:
        HFViTError: labels of another problem type or for other outputs; no image can be read.
    """
    config, accelerator = classifier.model.config, context.accelerator
    problem, names = problem_type_of(config), classifier.label_names
    if dataset.problem_type != problem or list(dataset.label_names) != names:
        raise HFViTError(
            f"the labels of '{dataset.name}' are {dataset.problem_type} for {', '.join(dataset.label_names[:5])}; "
            f"{classifier.name} is {problem} for {', '.join(names[:5])}: choose others with --label_column"
        )
    classifier.model.to(accelerator.device)
    outputs, unreadable = [], []
    for pixels, labels, indices, unread in batches(classifier, dataset, context, tta):
        unreadable += unread
        if len(indices):
            with context.precision():
                logits = classifier.logits(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])  # (B, V, K)
            if problem == MULTI_LABEL and pixels.shape[1] > 1:
                logits = logits.sigmoid().mean(1).logit(eps=1e-7)
            logits, labels = logits if logits.ndim == 2 else logits.mean(1), labels.to(logits.device)
            outputs.append((logits, labels, indices.to(logits.device)))
            if outcomes is not None:
                loss = binary_cross_entropy_with_logits if problem == MULTI_LABEL else mse_loss
                outcomes.update(logits, labels, indices, loss(logits, labels, reduction="none").mean(1))
    logits, labels, _ = gather_outputs(outputs, accelerator, len(names), classes=False)
    unreadable = unreadable if accelerator.num_processes == 1 else gather_object(unreadable)
    if not len(labels):
        raise HFViTError(f"no image of '{dataset.name}' ({dataset.split}) can be read: {', '.join(unreadable[:3])}")
    thresholds = getattr(config, "label_thresholds", None)
    return TargetPredictions(
        problem, logits, labels, names, None if thresholds is None else thresholds_of(config), sorted(set(unreadable))
    )


def write_per_label(path: Path, predictions: TargetPredictions) -> None:
    """CSV with one line per label: images, average precision, threshold; precision, recall and F1 at the threshold.

    A value that is not defined is empty.
    """
    from sklearn.metrics import average_precision_score

    scores, truth = sigmoid(predictions.logits), predictions.labels.astype(bool)
    thresholds = predictions.thresholds or [0.5] * len(predictions.names)
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow(["label", "n", "average_precision", "threshold", "precision", "recall", "f1"])
    for index, (name, threshold) in enumerate(zip(predictions.names, thresholds)):
        labeled, predicted = truth[:, index], scores[:, index] >= threshold
        hits = int((labeled & predicted).sum())
        totals = (predicted.sum(), labeled.sum(), (predicted.sum() + labeled.sum()) / 2)  # of precision, recall, F1
        fractions = [f"{hits / total:.6f}" if total else "" for total in totals]
        area = f"{average_precision_score(labeled, scores[:, index]):.6f}" if labeled.any() else ""
        lines.writerow([name, int(labeled.sum()), area, f"{threshold:.6f}", *fractions])
    atomic_write(path, text.getvalue().encode("utf-8", errors="backslashreplace"))
