"""Fraction of images whose predicted class is the right one, with its 95 % interval (Wilson 1927).

Not the `accuracy` of evaluate: it has no interval, and is downloaded when it is loaded.

Tests: tests/training/metrics/test_metrics.py.
"""

import math

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Fraction of images whose predicted class number equals the reference, and Wilson's 95 % interval of it."
CITATION = "Wilson: Probable inference, the law of succession, and statistical inference. doi:10.2307/2276774"
INPUTS = "predictions: class numbers (N,). references: class numbers (N,)."
Z95 = 1.959964  # standard normal quantile of 97.5 %


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Fraction of equal entries of two arrays (N,).

    Raises:
        ValueError: nothing to score.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if not len(references):
        raise ValueError("accuracy of no images: predictions and references are empty")
    return float(np.mean(predictions == references))


def wilson_interval(correct: float, count: int) -> tuple[float, float]:
    """95 % interval (low, high) of a fraction `correct / count`; within [0, 1], never of width zero."""
    if count < 1:
        raise ValueError("interval of no images")
    fraction, spread = correct / count, Z95**2 / count
    center = fraction + spread / 2
    half_width = math.sqrt(spread * (fraction * (1 - fraction) + spread / 4))
    low, high = ((center + sign * half_width) / (1 + spread) for sign in (-1, 1))
    # The formula gives 0 and 1 where none or all are right, but for rounding.
    return (0.0 if correct == 0 else max(low, 0.0)), (1.0 if correct == count else min(high, 1.0))


class Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features, format="numpy"
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        fraction, count = accuracy(predictions, references), len(references)
        low, high = wilson_interval(round(fraction * count), count)
        return {"accuracy": fraction, "low": low, "high": high, "n": count}
