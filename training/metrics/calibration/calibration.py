"""Whether a classifier's confidence is its accuracy: ECE, NLL and Brier score, before and after one temperature.

ECE: Guo et al. 2017 (arXiv:1706.04599), bins of equal width (lower, upper] on the largest probability. After: every
picture is scored with a temperature that was fitted (least NLL) on the half of the pictures it is not in, so that the
gain is not one of fitting what is measured.
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Expected calibration error, negative log-likelihood and Brier score, before and after temperature."
CITATION = "Guo, Pleiss, Sun, Weinberger: On calibration of modern neural networks. arXiv:1706.04599"
INPUTS = "predictions: logits, or log-probabilities (N, K). references: class numbers (N,). bins: 15 unless given."


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, K) of logits (N, K)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Of confidences in (0, 1] (N,) and hits (N,): the gap between them, averaged over bins by pictures."""
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=confidence, minlength=bins) - np.bincount(place, weights=right, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def fit_temperature(logits: np.ndarray, references: np.ndarray) -> float:
    """The temperature in [0.01, 100] with the least NLL: Newton's method in 1 / T, in which NLL is convex."""
    own = logits[np.arange(len(references)), references]
    low, high, sharpness = 0.01, 100.0, 1.0
    for _ in range(50):
        probabilities = np.exp(log_softmax(sharpness * logits))
        mean = (probabilities * logits).sum(1)
        slope, curvature = (mean - own).mean(), ((probabilities * logits**2).sum(1) - mean**2).mean()
        low, high = (low, sharpness) if slope > 0 else (sharpness, high)
        step = sharpness - slope / curvature if curvature > 0 else low
        following = step if low < step < high else np.sqrt(low * high)
        if abs(following - sharpness) <= 1e-9 * sharpness:
            break
        sharpness = following
    return float(1 / sharpness)


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
    scaled = np.empty_like(logits)
    for half in (0, 1):
        scaled[half::2] = logits[half::2] / fit_temperature(logits[1 - half :: 2], references[1 - half :: 2])
    after = scores(log_softmax(scaled), references, bins)
    return {
        **scores(log_softmax(logits), references, bins),
        **{f"{name}_after_temperature": value for name, value in after.items()},
        "temperature": fit_temperature(logits, references),
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
