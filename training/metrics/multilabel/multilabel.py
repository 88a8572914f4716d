"""Multi-label classification: mean average precision, macro and micro F1 at a threshold.

Average precision is scikit-learn's `average_precision_score`: the area under the step-wise precision-recall curve. A
label without a positive image has none, and does not count in the mean.

Tests: tests/training/metrics/test_metrics.py.
"""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score, f1_score


DESCRIPTION = "Mean average precision (macro) over the labels that occur; macro and micro F1 of scores >= a threshold."
INPUTS = (
    "predictions: scores (N, K), such as probabilities. references: 0 or 1 (N, K). threshold: of the scores, 0.5 "
    "unless given (logits: 0)."
)


def mean_average_precision(scores: np.ndarray, references: np.ndarray) -> float:
    """Of scores (N, K) and 0 or 1 (N, K): mean over the labels with at least one positive image.

    Raises:
        ValueError: shapes that differ, scores that are not finite, values that are neither 0 nor 1, no positive.
    """
    scores, references = checked_scores(scores, references)
    occurs = references.any(0)
    if not occurs.any():
        raise ValueError("no image has any label: average precision is not defined")
    return float(average_precision_score(references[:, occurs], scores[:, occurs], average="macro"))


def multilabel_f1(scores: np.ndarray, references: np.ndarray, threshold: float = 0.5) -> tuple[float, float]:
    """(macro, micro) F1 of scores >= threshold; a label that is neither predicted nor there counts 0 in the macro."""
    scores, references = checked_scores(scores, references)
    predictions = scores >= threshold
    return tuple(float(f1_score(references, predictions, average=a, zero_division=0)) for a in ("macro", "micro"))


def best_thresholds(scores: np.ndarray, references: np.ndarray, default: float = 0.5) -> np.ndarray:
    """The threshold (K,) of each label with the highest F1, half-way between two scores; of equals nearest `default`.

    A label that no image has, or every image, keeps `default`: nothing tells where it begins.
    """
    scores, references = checked_scores(scores, references)
    thresholds = np.full(scores.shape[1], default, dtype=np.float64)
    for label in range(scores.shape[1]):
        positives = int(references[:, label].sum())
        if not 0 < positives < len(references):
            continue
        order = np.argsort(-scores[:, label], kind="stable")
        values = scores[order, label].astype(np.float64)
        hits = np.cumsum(references[order, label])
        f1 = 2 * hits / (np.arange(1, len(values) + 1) + positives)
        ends = np.append(values[:-1] > values[1:], True)  # equal scores fall on the same side
        below = np.append(values[1:], min(values[-1], default))
        middle = (values + below) / 2
        candidates = np.flatnonzero(ends & (f1 == f1[ends].max()))
        thresholds[label] = middle[candidates[np.abs(middle[candidates] - default).argmin()]]
    return thresholds


def checked_scores(scores: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, K) as they are, references as bool (N, K); ValueError for what cannot be scored."""
    scores, references = np.asarray(scores), np.asarray(references)
    if scores.ndim != 2 or scores.shape != references.shape or not scores.size:
        raise ValueError(f"scores and references are both (N, K), got {scores.shape} and {references.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).any(1).sum())} rows of scores are not finite")
    if not np.isin(references, (0, 1)).all():
        raise ValueError("references of a multi-label metric are 0 or 1")
    return scores, references.astype(bool)


class Multilabel(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float64")),
                "references": datasets.Sequence(datasets.Value("int64")),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references, threshold: float = 0.5) -> dict[str, float]:
        macro, micro = multilabel_f1(predictions, references, threshold)
        value = mean_average_precision(predictions, references)
        return {"mean_average_precision": value, "macro_f1": macro, "micro_f1": micro, "n": len(references)}
