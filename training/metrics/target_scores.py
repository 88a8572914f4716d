"""Scores for several labels per image, or numbers. For the Trainer and training.score.

The metric functions are imported where they are called, because `evaluate` takes seconds to import.

Tests: tests/training/metrics/test_target_scores.py.
"""

import math
from collections.abc import Sequence

import numpy as np

from hf_vit.errors import HFViTError
from hf_vit.problem_type import MULTI_LABEL


def target_scores(
    problem_type: str,
    logits: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    thresholds: Sequence[float] | None = None,
) -> dict[str, float]:
    """Every score of logits (n, K) and labels (n, K): 0 or 1 of several labels, or numbers in the logits' unit.

    Args:
        names: of the outputs. thresholds: (K,) of a multi-label model; F1 is then given at these and at 0.5.

    Raises:
        HFViTError: outputs are not finite; no image has any label.
    """
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise HFViTError(f"the outputs are not finite for {int((~finite).sum()):,} of {len(finite):,} images")
    if problem_type == MULTI_LABEL:
        return multilabel_scores(sigmoid(logits), labels, thresholds)
    return regression_scores(logits, labels, names)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Float64 scores; for logits below 0 in the form whose exponent does not overflow."""
    exponents = np.exp(-np.abs(logits.astype(np.float64)))
    return np.where(logits >= 0, 1.0, exponents) / (1.0 + exponents)


def multilabel_scores(
    scores: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] | None = None
) -> dict[str, float]:
    """mAP, macro and micro F1 at 0.5, and at the thresholds if given."""
    from .multilabel.multilabel import mean_average_precision, multilabel_f1

    try:
        result = {"mean_average_precision": mean_average_precision(scores, labels)}
    except ValueError as error:
        raise HFViTError(f"the evaluation images cannot be scored: {error}") from error
    result |= dict(zip(("macro_f1", "micro_f1"), multilabel_f1(scores, labels)))
    if thresholds is not None:
        shifted = scores - np.asarray(thresholds)
        f1 = multilabel_f1(shifted, labels, threshold=0.0)
        result |= dict(zip(("macro_f1_at_thresholds", "micro_f1_at_thresholds"), f1))
    return result


def regression_scores(values: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """MAE, RMSE and R2; for several numbers their means, and those of each as `mae_NAME`.

    R2 is left out if all labels are equal, where it is not defined.
    """
    from .regression.regression import regression

    rows = [regression(values[:, column], labels[:, column]) for column in range(labels.shape[1])]
    result = {}
    for metric in ("mae", "rmse", "r2"):
        defined = [row[metric] for row in rows if math.isfinite(row[metric])]
        if defined:
            result[metric] = float(np.mean(defined))
    if len(rows) > 1:
        for name, row in zip(names, rows):
            result |= {f"{metric}_{name}": row[metric] for metric in ("mae", "r2") if math.isfinite(row[metric])}
    return result
