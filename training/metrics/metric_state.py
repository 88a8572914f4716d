"""What is counted while pictures stream by: hits, confusions and calibration, on the device, read once at the end.

For score.py. Counts are integers, so that neither batches nor processes can change them; sums are in double precision.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator


BINS = 15
LARGEST_CONFUSION = 4096  # classes; a matrix of more would not fit beside the model


class Counts:
    """Streaming counts of a classifier with `outputs` competing outputs.

    Args:
        outputs: K. device: where the logits are.
    """

    def __init__(self, outputs: int, device: torch.device):
        self.outputs, self.device = outputs, device
        self.wide = torch.float32 if device.type == "mps" else torch.float64

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.seen = zeros(4)  # pictures, with ReaL labels, of these right, with logits that are not finite
        self.pictures, self.hits, self.top5 = zeros(outputs), zeros(outputs), zeros(outputs)  # by right class
        self.confusion = zeros(outputs, outputs) if outputs <= LARGEST_CONFUSION else None
        self.binned = zeros(2, BINS)  # pictures and hits by confidence
        self.confidence = zeros(BINS, dtype=self.wide)
        self.sums = zeros(2, dtype=self.wide)  # NLL, Brier score

    @torch.no_grad()
    def add(self, logits: torch.Tensor, labels: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Count a batch.

        Args:
            logits: float (B, K). labels: int64 (B,). real: int64 (B, any), valid labels filled up with -1.
        """
        finite = torch.isfinite(logits).all(-1)
        logits = torch.where(finite[:, None], logits, torch.zeros_like(logits)).to(self.wide)
        guess = logits.argmax(-1)
        hit, own = guess == labels, logits.gather(1, labels[:, None])  # (B,), (B, 1)
        earlier = torch.arange(self.outputs, device=self.device) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & earlier)).sum(-1)  # of equal scores the first counts
        self.pictures += torch.bincount(labels, minlength=self.outputs)
        self.hits += torch.bincount(labels[hit], minlength=self.outputs)
        self.top5 += torch.bincount(labels[rank < 5], minlength=self.outputs)
        if self.confusion is not None:
            pairs = torch.bincount(labels * self.outputs + guess, minlength=self.outputs**2)
            self.confusion += pairs.view(self.outputs, self.outputs)
        self._add_calibration(logits, labels, hit)
        valid = real_hit = torch.zeros_like(hit)
        if real is not None:
            valid = (real >= 0).any(-1)
            real_hit = (real == guess[:, None]).any(-1)  # a guess is never -1, which fills the lists up
        marks = (torch.ones_like(hit), valid, real_hit, ~finite)
        self.seen += torch.stack([mark.sum() for mark in marks])

    def _add_calibration(self, logits: torch.Tensor, labels: torch.Tensor, hit: torch.Tensor) -> None:
        log_probabilities = logits.log_softmax(-1)
        probabilities = log_probabilities.exp()
        confidence = probabilities.amax(-1)
        place = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        self.binned[0] += torch.bincount(place, minlength=BINS)
        self.binned[1] += torch.bincount(place[hit], minlength=BINS)
        self.confidence.index_add_(0, place, confidence)
        nll = -log_probabilities.gather(1, labels[:, None]).sum()
        brier = probabilities.square().sum() - 2 * probabilities.gather(1, labels[:, None]).sum() + len(labels)
        self.sums += torch.stack([nll, brier])

    def total(self, accelerator: Accelerator) -> "Totals":
        """The counts of all processes together."""
        parts = [self.seen, self.pictures, self.hits, self.top5, self.binned, self.confidence, self.sums]
        parts += [] if self.confusion is None else [self.confusion]
        summed = [accelerator.reduce(part, "sum").cpu().numpy() for part in parts]
        confusion = None if self.confusion is None else summed.pop()
        return Totals(*summed, confusion)


@dataclass(frozen=True)
class Totals:
    """Counts as numpy arrays; attributes as in `Counts`."""

    seen: np.ndarray
    pictures: np.ndarray
    hits: np.ndarray
    top5: np.ndarray
    binned: np.ndarray
    confidence: np.ndarray
    sums: np.ndarray
    confusion: np.ndarray | None

    @property
    def count(self) -> int:
        return int(self.seen[0])

    @property
    def not_finite(self) -> int:
        return int(self.seen[3])

    def per_class(self) -> np.ndarray:
        """Accuracy (K,) of each class, NaN where it has no picture."""
        return np.where(self.pictures > 0, self.hits / np.maximum(self.pictures, 1), np.nan)

    def scores(self) -> dict[str, tuple[float, int]]:
        """Every score with the number of pictures behind it."""
        n = self.count
        gap = np.abs(self.binned[1] - self.confidence).sum()
        found: dict[str, Any] = {
            "accuracy": (int(self.hits.sum()) / n, n),
            "top5_accuracy": (int(self.top5.sum()) / n, n) if len(self.hits) > 5 else None,
            "mean_per_class": (float(np.nanmean(self.per_class())), n),
            "real_accuracy": (int(self.seen[2]) / int(self.seen[1]), int(self.seen[1])) if self.seen[1] else None,
            "nll": (float(self.sums[0]) / n, n),
            "ece": (float(gap) / n, n),
            "brier": (float(self.sums[1]) / n, n),
        }
        return {name: value for name, value in found.items() if value is not None}
