"""Whether a classifier's confidence is its accuracy: ECE, NLL and Brier score, before and after one temperature.

ECE: Guo et al. 2017 (arXiv:1706.04599), bins of equal width (lower, upper] on the largest probability. After: the
pictures are cut into tenths, with equal shares of mistakes, and each is scored with the temperature that fits the
other nine, so that the gain is not one of fitting what is measured. The fit is the least NLL with Firth's penalty
(1993, doi:10.1093/biomet/80.1.27), without which the temperature of pictures that are all classified right is zero;
and it stays 1 where the NLL of the nine tenths falls by no more than chance lets it (likelihood ratio test, 5 %).
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Expected calibration error, negative log-likelihood and Brier score, before and after temperature."
CITATION = "Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks. arXiv:1706.04599"
INPUTS = "predictions: logits, or log-probabilities (N, K). references: class numbers (N,). bins: 15 unless given."
METHOD = "one temperature, Firth's penalty, fitted on the other nine tenths; 1 where it gains less than chance (5 %)"
FOLDS = 10
CHANCE = 3.841  # twice the log-likelihood that one useless parameter gains in one of twenty cases (chi-squared)
PLACES = np.geomspace(0.01, 100, 15)  # of 1 / T, among which the best is looked for first; PLACES[7] is 1
BLOCK = 2**17  # logits at a time


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, K) of logits (N, K)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Of confidences in (0, 1] (N,) and hits (N,): the gap between them, averaged over bins by pictures."""
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=confidence, minlength=bins) - np.bincount(place, weights=right, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def moments(logits: np.ndarray, references: np.ndarray, sharpness: float) -> np.ndarray:
    """Of softmax(sharpness * logits): NLL, its slope, its curvature, the slope of that; (4, N)."""
    found, step = np.empty((4, len(logits))), max(1, BLOCK // logits.shape[1])
    for first in range(0, len(logits), step):
        rows, own = logits[first : first + step], references[first : first + step]
        each = np.arange(len(rows))
        apart = rows - rows.max(axis=1, keepdims=True)
        probabilities = np.exp(sharpness * apart)
        whole = probabilities.sum(1)
        probabilities /= whole[:, None]
        mean = np.einsum("nk,nk->n", probabilities, apart)
        nll, slope = np.log(whole) - sharpness * apart[each, own], mean - apart[each, own]
        apart -= mean[:, None]
        probabilities *= apart
        curvature = np.einsum("nk,nk->n", probabilities, apart)
        skew = np.einsum("nk,nk,nk->n", probabilities, apart, apart)
        found[:, first : first + step] = nll, slope, curvature, skew
    return found


def scan(logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    """The moments of every picture at every one of PLACES (P, 4, N)."""
    return np.stack([moments(logits, references, sharpness) for sharpness in PLACES])


def fit(logits: np.ndarray, references: np.ndarray, places: np.ndarray, there: np.ndarray) -> tuple[float, float]:
    """The 1 / T with the least penalised NLL, and the NLL there; Newton's method about the best of some places.

    The penalised NLL of few pictures, all classified right, has several minima: hence places a factor of two apart.

    Args:
        places: rising (P,). there: the sums of the moments at each of them (P, 4).
    """
    first = int(np.argmin(there[:, 0] - np.log(np.maximum(there[:, 2], 1e-300)) / 2))
    low, high = places[max(first - 1, 0)], places[min(first + 1, len(places) - 1)]
    sharpness = following = places[first]
    nll, slope, curvature, skew = there[first]
    if not np.ptp(logits, axis=1).any():  # any temperature is right
        return 1.0, float(nll)
    for _ in range(100):
        slope = slope - skew / (2 * curvature) if curvature > 0 else np.inf  # so sharp that all is certain
        low, high = (low, sharpness) if slope > 0 else (sharpness, high)
        step = sharpness - slope / curvature if np.isfinite(slope) else low
        following = step if low < step < high else float(np.sqrt(low * high))
        if abs(following - sharpness) <= 1e-6 * sharpness:
            break
        sharpness = following
        nll, slope, curvature, skew = moments(logits, references, sharpness).sum(1)
    return float(following), float(nll)


def fit_temperature(logits: np.ndarray, references: np.ndarray) -> float:
    """The temperature in [0.01, 100] with the least NLL less half the log of its curvature in 1 / T."""
    return 1 / fit(logits, references, PLACES, scan(logits, references).sum(2))[0]


def scores(log_probabilities: np.ndarray, references: np.ndarray, bins: int) -> dict[str, float]:
    """ECE, NLL and Brier score of log-probabilities (N, K)."""
    rows, probabilities = np.arange(len(references)), np.exp(log_probabilities)
    right = log_probabilities.argmax(1) == references
    own = probabilities[rows, references]
    return {
        "ece": expected_calibration_error(probabilities.max(1), right, bins),
        "nll": float(-log_probabilities[rows, references].mean()),
        "brier": float(((probabilities**2).sum(1) - 2 * own + 1).mean()),
    }


def temperatures(logits: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, float]:
    """For each picture the temperature that fits the tenths it is not in (N,), and the one that fits all."""
    right = logits.argmax(1) == references
    fold = np.empty(len(references), dtype=np.int64)
    fold[np.argsort(right, kind="stable")] = np.arange(len(references)) % FOLDS
    found = scan(logits, references)
    plain = found[7, 0]
    best, nll = fit(logits, references, PLACES, found.sum(2))
    where = int(np.searchsorted(PLACES, best))  # what fits nine tenths is a step or two away from it
    places = np.insert(PLACES, where, best)
    found = np.insert(found, where, moments(logits, references, best), axis=0)
    each = np.empty(len(references))
    for number in range(min(FOLDS, len(references))):
        rest = fold != number
        sharpness, least = fit(logits[rest], references[rest], places, found[:, :, rest].sum(2))
        each[fold == number] = 1 / sharpness if 2 * (plain[rest].sum() - least) > CHANCE else 1.0
    return each, 1 / best if 2 * (plain.sum() - nll) > CHANCE else 1.0


def calibration(logits: np.ndarray, references: np.ndarray, bins: int = 15) -> dict[str, float]:
    """ece, nll, brier; the same `_after_temperature`; and `temperature`, fitted on all pictures.

    Raises:
        ValueError: fewer than two pictures, logits that are not finite, a reference outside 0..K-1.
    """
    logits, references = np.asarray(logits, dtype=np.float64), np.asarray(references, dtype=np.int64)
    if logits.ndim != 2 or len(logits) != len(references) or len(references) < 2:
        raise ValueError(f"calibration needs logits (N, K) of two or more pictures, got shape {logits.shape}")
    if references.min() < 0 or references.max() >= logits.shape[1]:
        wrong = references.min() if references.min() < 0 else references.max()
        raise ValueError(f"reference {wrong} is outside the {logits.shape[1]} classes of the logits")
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).any(1).sum())} rows of logits are not finite")
    each, temperature = temperatures(logits, references)
    after = scores(log_softmax(logits / each[:, None]), references, bins)
    return {
        **scores(log_softmax(logits), references, bins),
        **{f"{name}_after_temperature": value for name, value in after.items()},
        "temperature": temperature,
    }


class Calibration(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
        )
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions, references, bins: int = 15) -> dict[str, float]:
        return {**calibration(predictions, references, bins), "n": len(references)}
