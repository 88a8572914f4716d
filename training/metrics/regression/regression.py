"""Regression: mean absolute error and R2, the fraction of the variance that is explained.

Not scikit-learn's `r2_score`: it gives 0 or 1 where all references are equal and nothing is to be explained.

Tests: tests/training/metrics/test_metrics.py.
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Mean absolute error, root mean squared error, and R2 (the coefficient of determination)."
INPUTS = "predictions: numbers (N,). references: numbers (N,), of the same unit."


def regression(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """{"mae", "rmse", "r2"} of numbers (N,) and (N,); R2 is NaN where all references are equal.

    Raises:
        ValueError: lengths that differ, nothing to score, numbers that are not finite.
    """
    predictions, references = (np.asarray(part, dtype=np.float64) for part in (predictions, references))
    if predictions.shape != references.shape or predictions.ndim != 1 or not len(references):
        raise ValueError(f"predictions and references are both (N,), got {predictions.shape} and {references.shape}")
    if not (np.isfinite(predictions).all() and np.isfinite(references).all()):
        raise ValueError("predictions or references are not finite")
    error = predictions - references
    variance = float(np.mean((references - references.mean()) ** 2))
    squared = float(np.mean(error**2))
    r2 = 1 - squared / variance if variance > 0 else float("nan")
    return {"mae": float(np.abs(error).mean()), "rmse": squared**0.5, "r2": r2}


class Regression(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        )
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features, format="numpy"
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {**regression(predictions, references), "n": len(references)}
