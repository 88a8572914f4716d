"""Share of pictures whose predicted class is the right one."""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Share of pictures whose predicted class number equals the reference."
INPUTS = "predictions: class numbers (N,). references: class numbers (N,)."


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Share of equal entries of two int arrays (N,)."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    if not len(references):
        raise ValueError("accuracy of no pictures: predictions and references are empty")
    return float(np.mean(predictions == references))


class Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features, format="numpy"
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references), "n": len(references)}
