"""Fraction of images whose right class is among the k with the highest scores.

Tests: tests/training/metrics/test_metrics.py.
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Fraction of images whose right class is among the k with the highest scores; of equal scores the first."
INPUTS = "predictions: scores (N, K). references: class numbers (N,). k: how many count, 5 unless given."


def topk_accuracy(scores: np.ndarray, references: np.ndarray, k: int = 5) -> float:
    """Of scores (N, K) and class numbers (N,); of classes with equal scores the one with the lower number comes first.

    Raises:
        ValueError: nothing to score, scores that are not finite, a reference outside 0..K-1, or k outside 1..K.
    """
    scores, references = np.asarray(scores), np.asarray(references, dtype=np.int64)
    if scores.ndim != 2 or not len(references):
        raise ValueError(f"top-k accuracy needs scores (N, K) of at least one image, got shape {scores.shape}")
    classes = scores.shape[1]
    if references.min() < 0 or references.max() >= classes:
        wrong = references.min() if references.min() < 0 else references.max()
        raise ValueError(f"reference {wrong} is outside the {classes} classes of the scores")
    if not 1 <= k <= classes:
        raise ValueError(f"k = {k} is outside 1..{classes}, the number of classes")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).any(1).sum())} rows of scores are not finite")
    answers = scores[np.arange(len(references)), references][:, None]
    earlier = np.arange(classes) < references[:, None]
    rank = ((scores > answers) | ((scores == answers) & earlier)).sum(1)
    return float(np.mean(rank < k))


class TopKAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references, k: int = 5) -> dict[str, float]:
        return {"topk_accuracy": topk_accuracy(predictions, references, k), "k": k, "n": len(references)}
