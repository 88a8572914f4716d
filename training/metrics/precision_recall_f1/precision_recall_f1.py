"""Precision, recall and F1 of each class, and macro F1 with its 95 % interval from the bootstrap.

As scikit-learn's `precision_recall_fscore_support(zero_division=0)` and `f1_score(average="macro")`. Not scikit-learn
itself: its functions need all predictions in one place and take seconds for 21,841 classes; these take the counts that
a running evaluation has.

Tests: tests/training/metrics/test_metrics.py.
"""

import datasets
import evaluate
import numpy as np
from scipy.stats import binomtest


DESCRIPTION = "Precision, recall and F1 of each class; macro F1 over the classes that occur, with a 95 % interval."
CITATION = "Efron, Tibshirani: An introduction to the bootstrap. doi:10.1201/9780429246593"
INPUTS = "predictions: class numbers (N,). references: class numbers (N,). num_classes: K; the largest number + 1."
RESAMPLES, RESAMPLES_AT_ONCE = 1000, 100  # of the bootstrap
FEW = 5  # wrong answers, or right ones, below which resampling shows too little of what is possible


def precision_recall_f1(hits: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> tuple[np.ndarray, ...]:
    """Precision, recall and F1 (..., K); 0 where a class is never predicted or has no image.

    Args:
        hits: images of the class that were predicted as it (..., K). predicted: images predicted as the class.
        support: images of the class.
    """
    hits, predicted, support = (np.asarray(part, dtype=np.float64) for part in (hits, predicted, support))
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(support, 1)
    return precision, recall, 2 * hits / np.maximum(predicted + support, 1)


def macro_f1(hits: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Mean F1 (...) over the classes that occur among references or predictions; arguments as above."""
    occurs = (np.asarray(predicted) + np.asarray(support)) > 0
    return precision_recall_f1(hits, predicted, support)[2].sum(-1) / np.maximum(occurs.sum(-1), 1)


def count_pairs(predictions: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The (reference, prediction) pairs that occur, (U,) each in rising order, and how often each does (U,)."""
    pairs, counts = np.unique(np.stack([references, predictions]), axis=1, return_counts=True)
    return pairs[0], pairs[1], counts


def bootstrap_intervals(references: np.ndarray, predictions: np.ndarray, counts: np.ndarray, seed: int = 0):
    """95 % intervals ((low, high) of balanced accuracy, (low, high) of macro F1) by the percentile bootstrap.

    Where fewer than FEW answers are wrong, or right, resamples hardly differ: of right answers alone all of them score
    100 %, which is no interval; nor has balanced accuracy one where a single class is predicted. It is then made as
    wide as Wilson's for an accuracy, at the number of images that would leave the mean over the classes as uncertain
    if all classes had as many (as Korn and Graubard 1998, Survey Methodology 24(2), have it for strata).

    Args:
        references, predictions, counts: distinct pairs (U,), as `count_pairs` returns them.
        seed: of the draws; the same counts give the same interval.
    """
    classes, index = np.unique(np.concatenate([references, predictions]), return_inverse=True)
    sides = index.reshape(2, -1)  # of each pair the class that is right, the class that is predicted

    def by_class(drawn: np.ndarray, side: int) -> np.ndarray:
        """Images (RESAMPLES_AT_ONCE, classes) of drawn pairs (RESAMPLES_AT_ONCE, U)."""
        order = np.argsort(sides[side], kind="stable")
        there, first = np.unique(sides[side][order], return_index=True)
        summed = np.zeros((len(drawn), len(classes)))
        summed[:, there] = np.add.reduceat(drawn[:, order], first, axis=1)
        return summed

    rng, total, samples = np.random.default_rng(seed), int(counts.sum()), []
    for _ in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        drawn = rng.multinomial(total, counts / total, size=RESAMPLES_AT_ONCE)  # (RESAMPLES_AT_ONCE, U)
        support, predicted = by_class(drawn, 0), by_class(drawn, 1)
        hits = by_class(drawn * (sides[0] == sides[1]), 0)
        recall = (hits / np.maximum(support, 1)).sum(-1) / (support > 0).sum(-1)
        samples.append(np.stack([recall, macro_f1(hits, predicted, support)]))
    low, high = np.percentile(np.concatenate(samples, axis=1), [2.5, 97.5], axis=1)  # (2,) each
    support, predicted = by_class(counts[None], 0)[0], by_class(counts[None], 1)[0]
    hits = by_class((counts * (sides[0] == sides[1]))[None], 0)[0]
    if min(hits.sum(), total - hits.sum()) < FEW or (high == low).any():
        there = support > 0
        values = (hits[there] / support[there]).mean(), float(macro_f1(hits, predicted, support))
        images = round(there.sum() ** 2 / (1 / support[there]).sum())
        wilson = [binomtest(round(value * images), images).proportion_ci(method="wilson") for value in values]
        low = np.minimum(low, [interval.low for interval in wilson])
        high = np.maximum(high, [interval.high for interval in wilson])
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


class PrecisionRecallF1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features, format="numpy"
        )

    def _compute(self, predictions, references, num_classes: int | None = None) -> dict:
        predictions, references = np.asarray(predictions), np.asarray(references)
        if not len(references):
            raise ValueError("F1 of no images: predictions and references are empty")
        lowest = int(min(predictions.min(), references.min()))
        largest = int(max(predictions.max(), references.max()))
        classes = largest + 1 if num_classes is None else num_classes
        if lowest < 0 or largest >= classes:
            raise ValueError(f"class number {lowest if lowest < 0 else largest} is outside 0..{classes - 1}")
        support, predicted = (np.bincount(part, minlength=classes) for part in (references, predictions))
        hits = np.bincount(references[references == predictions], minlength=classes)
        names = ("precision", "recall", "f1")
        each = dict(zip(names, (part.tolist() for part in precision_recall_f1(hits, predicted, support))))
        low, high = bootstrap_intervals(*count_pairs(predictions, references))[1]
        value = float(macro_f1(hits, predicted, support))
        return {"macro_f1": value, "low": low, "high": high, **each, "n": len(references)}
