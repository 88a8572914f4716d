"""Whether a classifier's confidence is its accuracy: ECE, NLL and Brier score, before and after one temperature.

ECE: Guo et al. 2017 (arXiv:1706.04599), bins of equal width (lower, upper] on the largest probability. After: the
temperature is the one with the least NLL. Each half of the images is scored with the temperature fitted on the other
half, so that it is not fitted on the images that it is measured on; halves, because ten parts cost five times as much.
If nearly all or nearly no images are right, the others are too few to fit a temperature: it stays 1. Not torchmetrics'
`CalibrationError`: it fits no temperature.

Tests: tests/training/metrics/test_metrics.py.
"""

import datasets
import evaluate
import numpy as np
from scipy.optimize import minimize_scalar


DESCRIPTION = "Expected calibration error, negative log-likelihood and Brier score, before and after temperature."
CITATION = "Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks. arXiv:1706.04599"
INPUTS = "predictions: logits, or log-probabilities (N, K). references: class numbers (N,). bins: 15 unless given."
METHOD = "one temperature with the least NLL, fitted on the other half of the images; 1 below ten right or wrong ones"
BOUNDS = (0.05, 20.0)  # of the temperature
MIN_EACH = 10  # right and wrong images; with fewer of either the temperature stays 1
LOGITS_PER_BLOCK = 2**16  # so that they stay in the processor's cache


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Of confidences in (0, 1] (N,) and hits (N,): the gap between them, averaged over bins by images."""
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    return ece_of_bins(np.bincount(index, confidence, bins), np.bincount(index, right, bins), len(confidence))


def ece_of_bins(confidence: np.ndarray, hits: np.ndarray, count: int) -> float:
    """Expected calibration error from each bin's sum of confidences and hits, both (bins,), of `count` images."""
    return float(np.abs(confidence - hits).sum() / count)


def blocks(logits: np.ndarray, references: np.ndarray, chosen: np.ndarray):
    """The chosen rows in blocks: logits less their largest (b, K), those of the references (b,), row numbers (b,)."""
    step = max(1, LOGITS_PER_BLOCK // logits.shape[1])
    for start in range(0, len(chosen), step):
        where = chosen[start : start + step]
        rows = logits[where]  # a copy, of this block alone
        rows -= rows.max(axis=1, keepdims=True)
        yield rows, rows[np.arange(len(rows)), references[where]], where


def mean_nll(logits: np.ndarray, references: np.ndarray, temperature: float, chosen: np.ndarray) -> float:
    """Negative log-likelihood of softmax(logits / temperature), the mean of the chosen rows."""
    total = 0.0
    for rows, answers, _ in blocks(logits, references, chosen):
        rows *= 1 / temperature
        np.exp(rows, out=rows)
        total += float(np.log(rows.sum(1)).sum(dtype=np.float64) - answers.sum(dtype=np.float64) / temperature)
    return total / len(chosen)


def fit_temperature(logits: np.ndarray, references: np.ndarray, chosen: np.ndarray | None = None) -> float:
    """The temperature within BOUNDS with the least NLL on the chosen rows (None: all).

    It is 1 if too few images are right, or wrong.
    """
    chosen = np.arange(len(references)) if chosen is None else chosen
    right = sum(
        int((rows.argmax(1) == references[where]).sum()) for rows, _, where in blocks(logits, references, chosen)
    )
    if min(right, len(chosen) - right) < MIN_EACH:
        return 1.0
    fit = minimize_scalar(
        lambda log_temperature: mean_nll(logits, references, float(np.exp(log_temperature)), chosen),
        bounds=np.log(BOUNDS),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.exp(fit.x))


def temperatures(logits: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, float]:
    """For each image the temperature fitted on the half that it is not in (N,), and the one fitted on all."""
    each = np.ones(len(references))
    order = np.argsort(logits.argmax(1) == references, kind="stable")  # both halves get the same number of mistakes
    halves = np.sort(order[::2]), np.sort(order[1::2])
    for half, other in (halves, halves[::-1]):
        each[half] = fit_temperature(logits, references, other)
    return each, fit_temperature(logits, references)


def scores(logits: np.ndarray, references: np.ndarray, temperature: np.ndarray, bins: int) -> dict[str, float]:
    """ECE, NLL and Brier score of softmax(logits / temperature) with a temperature for each image (N,)."""
    count, nll, brier = len(logits), 0.0, 0.0
    confidence, right = np.empty(count), np.empty(count, dtype=bool)
    for rows, answers, where in blocks(logits, references, np.arange(count)):
        right[where] = rows.argmax(1) == references[where]
        answers = answers / temperature[where]
        rows /= temperature[where, None].astype(rows.dtype)
        np.exp(rows, out=rows)
        total = rows.sum(1).astype(np.float64)
        confidence[where] = 1 / total
        nll += float((np.log(total) - answers).sum())
        squares = np.einsum("nk,nk->n", rows, rows) / total**2
        brier += float((squares - 2 * np.exp(answers) / total + 1).sum())
    return {"ece": expected_calibration_error(confidence, right, bins), "nll": nll / count, "brier": brier / count}


def calibration(logits: np.ndarray, references: np.ndarray, bins: int = 15) -> dict[str, float]:
    """ece, nll, brier; the same `_after_temperature`; and `temperature`, fitted on all images.

    Computes in the precision of the logits, block by block.

    Raises:
        ValueError: fewer than two images, logits that are not finite, a reference outside 0..K-1.
    """
    logits, references = np.asarray(logits), np.asarray(references, dtype=np.int64)
    logits = logits if logits.dtype in (np.float32, np.float64) else logits.astype(np.float64)
    if logits.ndim != 2 or len(logits) != len(references) or len(references) < 2:
        raise ValueError(f"calibration needs logits (N, K) of two or more images, got shape {logits.shape}")
    if references.min() < 0 or references.max() >= logits.shape[1]:
        wrong = references.min() if references.min() < 0 else references.max()
        raise ValueError(f"reference {wrong} is outside the {logits.shape[1]} classes of the logits")
    if not_finite := int(sum(not np.isfinite(row).all() for row in logits)):
        raise ValueError(f"{not_finite} rows of logits are not finite")
    each, temperature = temperatures(logits, references)
    unscaled = scores(logits, references, np.ones(len(logits)), bins)
    after = scores(logits, references, each, bins)
    return {**unscaled, **{f"{name}_after_temperature": after[name] for name in after}, "temperature": temperature}


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
