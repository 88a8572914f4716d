"""ImageNet-ReaL accuracy: a prediction is right if it is one of the image's labels (Beyer et al., arXiv:2006.07159).

As big_vision `evaluators/classification.py`: images without any label are left out.

Tests: tests/training/metrics/test_metrics.py.
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Fraction of images whose prediction is one of their labels; images without labels do not count."
CITATION = "Beyer, Hénaff, Kolesnikov, Zhai, van den Oord: Are we done with ImageNet? arXiv:2006.07159"
INPUTS = "predictions: class numbers (N,). references: for each image the list of its labels, which may be empty."


def real_hits(predictions, references) -> tuple[int, int]:
    """Right predictions, and images that count; of class numbers (N,) and N lists of class numbers.

    Raises:
        ValueError: of different length.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but ReaL labels of {len(references)} images")
    pairs = [(int(guess), labels) for guess, labels in zip(predictions, references) if len(labels)]
    return sum(bool(np.any(np.asarray(labels) == guess)) for guess, labels in pairs), len(pairs)


class RealAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("int64"), "references": datasets.Sequence(datasets.Value("int64"))}
        )
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        hits, count = real_hits(predictions, references)
        if not count:
            raise ValueError("no image has a ReaL label: nothing to score")
        return {"real_accuracy": hits / count, "n": count}
