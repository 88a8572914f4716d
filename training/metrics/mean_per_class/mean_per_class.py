"""Mean of the classes' accuracies: what Pets, Flowers-102 and Caltech-101 are reported in."""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Accuracy within each class that occurs among the references, averaged over these classes."
INPUTS = "predictions: class numbers (N,). references: class numbers (N,)."


def mean_per_class(predictions: np.ndarray, references: np.ndarray) -> float:
    """Of class numbers (N,) and (N,); a class without a reference does not count."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    if not len(references):
        raise ValueError("accuracy of no pictures: predictions and references are empty")
    _, place = np.unique(references, return_inverse=True)
    hits = np.bincount(place, weights=predictions == references)
    return float(np.mean(hits / np.bincount(place)))


class MeanPerClass(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features, format="numpy"
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"mean_per_class": mean_per_class(predictions, references), "n": len(references)}
