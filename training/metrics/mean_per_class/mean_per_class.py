"""Balanced accuracy: the mean of the classes' accuracies, as reported for Pets, Flowers-102 and Caltech-101.

Tests: tests/training/metrics/test_metrics.py.
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Accuracy within each class that occurs among the references, averaged over these classes."
INPUTS = "predictions: class numbers (N,). references: class numbers (N,)."


def mean_per_class(predictions: np.ndarray, references: np.ndarray) -> float:
    """Of class numbers (N,) and (N,); a class without a reference does not count.

    Raises:
        ValueError: nothing to score.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if not len(references):
        raise ValueError("accuracy of no images: predictions and references are empty")
    _, index = np.unique(references, return_inverse=True)
    return mean_recall(np.bincount(index, weights=predictions == references), np.bincount(index))


def mean_recall(hits: np.ndarray, support: np.ndarray) -> float:
    """Mean over the classes with images of hits / support, both (K,)."""
    hits, support = np.asarray(hits), np.asarray(support)
    return float(np.mean(hits[support > 0] / support[support > 0]))


class MeanPerClass(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features, format="numpy"
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"mean_per_class": mean_per_class(predictions, references), "n": len(references)}
