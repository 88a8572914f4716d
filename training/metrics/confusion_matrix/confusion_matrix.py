"""How often each class was taken for each other one.

Not scikit-learn's `confusion_matrix`: by default it leaves out classes that do not occur.

Tests: tests/training/metrics/test_metrics.py.
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Counts of (right class, predicted class): row i, column j is how often class i was taken for class j."
INPUTS = "predictions: class numbers (N,). references: class numbers (N,). num_classes: K; the largest number + 1."


def confusion_matrix(predictions: np.ndarray, references: np.ndarray, num_classes: int | None = None) -> np.ndarray:
    """int64 (K, K) of class numbers (N,) and (N,).

    Raises:
        ValueError: a class number outside 0..K-1.
    """
    predictions, references = np.asarray(predictions, dtype=np.int64), np.asarray(references, dtype=np.int64)
    both = np.concatenate([predictions, references])
    classes = int(both.max(initial=-1)) + 1 if num_classes is None else num_classes
    if both.min(initial=0) < 0 or both.max(initial=-1) >= classes:
        wrong = both.min() if both.min() < 0 else both.max()
        raise ValueError(f"class number {wrong} is outside 0..{classes - 1}")
    return np.bincount(references * classes + predictions, minlength=classes * classes).reshape(classes, classes)


class ConfusionMatrix(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features, format="numpy"
        )

    def _compute(self, predictions, references, num_classes: int | None = None) -> dict:
        matrix = confusion_matrix(predictions, references, num_classes)
        return {"confusion_matrix": matrix.tolist(), "n": len(references)}
