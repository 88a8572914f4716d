"""The running state of an evaluation: sums on the device, batch by batch, on any number of processes; read at the end.

The Trainer, `training.score` and the training log count by it. Not torchmetrics: its confusion matrix is K x K, and
its states are not exact over Accelerate's uneven last batches. Hits are integers, so neither batches nor processes
change them; other sums are in double precision. Per class, only the (reference, prediction) pairs that occur are kept.

    state = MetricState(device)
    state.update(logits, labels)            # each batch, on each process
    state.reduce(accelerator).scores()      # {"accuracy": (0.93, 360), ...}

The metric functions are imported where they are called: `evaluate`, which their files need, takes seconds to import.
"""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from scipy.sparse import csr_array


BINS = 15
TOP_K = 5
WAITING = 64  # batches that are added at once
MAX_BOOTSTRAP_IMAGES = 10_000  # a larger set's intervals are narrower than what a table shows, and take longer
COUNTS = ("images", "answers", "hits", "top5_hits", "not_finite", "real_images", "real_hits")
SUMS = ("loss", "nll", "brier")
FRACTIONS = {  # scores that are shown in percent
    "accuracy", "top5_accuracy", "mean_per_class", "macro_f1", "real_accuracy", "ece", "ece_after_temperature",
    "mean_average_precision", "micro_f1", "macro_f1_at_thresholds", "micro_f1_at_thresholds",
}  # fmt: skip


def predicted_classes(logits: torch.Tensor) -> torch.Tensor:
    """Class of the largest of logits (..., K), of equal ones the first; int64 (...)."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.asarray(logits.detach().numpy().argmax(-1)))  # torch's takes 20 times as long
    return logits.argmax(-1)


def top1_hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the largest of logits (..., K), of equal ones the first, is that of the label (...); bool (...)."""
    return predicted_classes(logits) == labels


def topk_hits(logits: torch.Tensor, labels: torch.Tensor, predicted: torch.Tensor, k: int = TOP_K) -> torch.Tensor:
    """Whether the label (B,) is among the k largest of logits (B, K); of equal ones the first counts; bool (B,).

    Args:
        predicted: int64 (B,), as `predicted_classes` finds them: these images need no further look.
    """
    own, hit = logits.gather(1, labels[:, None]), predicted == labels
    # Compared into floats, whose sum is exact and several times as fast as that of bools
    rank = torch.gt(logits, own, out=torch.empty_like(logits)).sum(-1)
    if logits.device.type != "cpu":  # other devices do not wait to learn which rows may have ties that decide
        before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
        return hit | (rank + ((logits == own) & before).sum(-1) < k)
    rows, numbers, equal, ranks = logits.detach().numpy(), labels.numpy(), own.detach().numpy(), rank.detach().numpy()
    for row in np.flatnonzero((ranks < k) & ~hit.numpy()):
        ranks[row] += np.count_nonzero(rows[row, : numbers[row]] == equal[row])  # ranks is the memory of rank
    return hit | (rank < k)


class MetricState:
    """Counts of a classifier while images stream by.

    Args:
        device: where the logits are.
        calibration: also NLL, Brier score and calibration error.

    Which class is taken for which costs eight bytes an image until `reduce`.
    """

    def __init__(self, device: torch.device, *, calibration: bool = True):
        self.device, self.calibration = device, calibration
        self.wide = torch.float32 if device.type == "mps" else torch.float64
        self.num_classes = 0  # as the logits say
        self.counts = torch.zeros(len(COUNTS), dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(SUMS), dtype=self.wide, device=device)
        self.bins = torch.zeros(3, BINS, dtype=self.wide, device=device)  # by confidence: images, hits, confidence
        self.pairs: list[torch.Tensor] = []  # int32 (2, any) each: reference and prediction
        self.images, self.one_question = 0, True
        self._waiting: list[tuple[torch.Tensor, ...]] = []  # of each batch, what its images give

    @torch.no_grad()
    def update(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        losses: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> None:
        """Count a batch.

        Args:
            logits: (B, K), or (B, n, K) for n questions to each image. labels: int64 (B,) or (B, n).
            losses: (B,), for the mean loss. real: int64 (B, any), valid ReaL labels filled up with -1.
        """
        self.images += len(labels)
        self.num_classes, self.one_question = logits.shape[-1], logits.ndim == 2
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        prediction = predicted_classes(logits)
        classes = torch.stack([labels, prediction], dim=1)
        own, largest = logits.gather(1, classes).T
        finite = torch.isfinite(largest) & torch.isfinite(logits.amin(-1))  # NaN is both
        flags = torch.stack([topk_hits(logits, labels, prediction), finite])
        parts = own.new_empty(3, 0)
        if self.calibration:
            probabilities = logits.softmax(-1)
            confidence = probabilities.gather(1, classes[:, 1:])[:, 0]  # exp(0) over the sum of all: exact as it is
            parts = torch.stack([confidence, own - largest, torch.linalg.vector_norm(probabilities, dim=-1)])
        valid = real_hit = finite[:0]
        if real is not None:
            valid = (real >= 0).any(-1)
            real_hit = (real == prediction[:, None]).any(-1)  # a prediction is never -1, which fills the lists up
        losses = own[:0] if losses is None else losses
        real_flags = torch.stack([valid, real_hit])
        self._waiting.append(
            (classes.T.int(), flags, parts.to(self.wide), real_flags, losses.to(self.wide, copy=True))
        )
        if len(self._waiting) == WAITING:
            self._add()

    @torch.no_grad()
    def _add(self) -> None:
        """Add what waits: many batches at once, whose small operations take as long as those of one."""
        if not self._waiting:
            return
        pairs, flags, parts, real_flags, losses = (torch.cat(part, dim=-1) for part in zip(*self._waiting))
        self._waiting = []
        if self.one_question:  # answers to several have no class of the image
            self.pairs.append(pairs)
        top5, finite = flags
        hit = (pairs[0] == pairs[1]) & finite
        counted = [part.sum() for part in (hit, top5 & finite, ~finite, *real_flags)]
        answers = torch.full_like(counted[0], len(hit))
        self.counts[1:] += torch.stack([answers, *counted])
        self.sums[0] += losses.sum()
        if self.calibration:
            confidence, own, norm = parts
            confidence = torch.where(finite, confidence, 1.0)
            nll, brier = -confidence.log() - own, norm.square() - 2 * own.exp() * confidence + 1
            self.sums[1:] += torch.stack([torch.where(finite, part, 0.0).sum() for part in (nll, brier)])
            index = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
            self.bins.index_add_(1, index, torch.stack([torch.ones_like(confidence), hit.to(self.wide), confidence]))

    def reduce(self, accelerator: Accelerator) -> "Metrics":
        """The counts of all processes together; every process has to call it."""
        self._add()
        self.counts[0] = self.images
        counts, sums, bins = (accelerator.reduce(part, "sum") for part in (self.counts, self.sums, self.bins))
        num_classes = int(accelerator.gather(torch.tensor([self.num_classes], device=self.device)).max())
        named = dict(zip(COUNTS, map(int, counts.tolist())))
        pairs = self._gather_pairs(accelerator, num_classes)
        return Metrics(
            num_classes,
            named,
            dict(zip(SUMS, sums.tolist())),
            bins.cpu().numpy() if self.calibration else None,
            *(pairs if named["answers"] == named["images"] else (None, None, None)),
        )

    def _gather_pairs(self, accelerator: Accelerator, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distinct (reference, prediction) pairs of all processes, and how often each occurs; int64 (U,) each."""
        pairs = (
            torch.cat(self.pairs, dim=1) if self.pairs else torch.zeros(2, 0, dtype=torch.int32, device=self.device)
        )
        codes, counts = (pairs[0].long() * num_classes + pairs[1]).unique(return_counts=True)
        if accelerator.num_processes > 1:
            both = accelerator.pad_across_processes(torch.stack([codes, counts], dim=1), dim=0)  # zeros: no image
            codes, counts = accelerator.gather(both).T
        codes, index = np.unique(codes.cpu().numpy(), return_inverse=True)
        counts = np.bincount(index, weights=counts.cpu().numpy(), minlength=len(codes)).astype(np.int64)
        codes, counts = codes[counts > 0], counts[counts > 0]
        return codes // max(num_classes, 1), codes % max(num_classes, 1), counts


class LossState:
    """Sum of the losses alone, with the interface of `MetricState`: for labels that are no classes.

    Their scores need all outputs, which are kept beside it; target_scores.py has them.
    """

    def __init__(self, device: torch.device):
        self.wide = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros(2, dtype=self.wide, device=device)  # images, loss

    @torch.no_grad()
    def update(self, logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor) -> None:
        """Count a batch: its losses (B,)."""
        self.total += torch.stack([torch.full_like(self.total[0], len(losses)), losses.sum().to(self.wide)])

    def reduce(self, accelerator: Accelerator) -> "Losses":
        """The sums of all processes together; every process has to call it."""
        images, loss = accelerator.reduce(self.total, "sum").tolist()
        return Losses(round(images), {"loss": loss})


@dataclass(frozen=True)
class Losses:
    """What `LossState` counted: images, and the sum of their losses."""

    images: int
    sums: dict[str, float]

    def scores(self) -> dict[str, tuple[float, int]]:
        return {}


@dataclass(frozen=True)
class Metrics:
    """What was counted, over all processes.

    Attributes:
        num_classes: K. counts: by the names in COUNTS; `answers` is images times questions to each.
        sums: by the names in SUMS. bins: (3, BINS) images, hits, confidence by confidence; None without calibration.
        references, predictions, pair_counts: the distinct pairs of classes (U,), in rising order; None
            where each image was asked several questions.
    """

    num_classes: int
    counts: dict[str, int]
    sums: dict[str, float]
    bins: np.ndarray | None
    references: np.ndarray | None
    predictions: np.ndarray | None
    pair_counts: np.ndarray | None

    @property
    def images(self) -> int:
        return self.counts["images"]

    def _by_class(self, classes: np.ndarray | None, weights: np.ndarray) -> np.ndarray:
        return np.bincount(classes, weights=weights, minlength=self.num_classes).astype(np.int64)

    @property
    def support(self) -> np.ndarray:
        """Images (K,) of each class."""
        return self._by_class(self.references, self.pair_counts)

    @property
    def predicted(self) -> np.ndarray:
        """Images (K,) predicted as each class."""
        return self._by_class(self.predictions, self.pair_counts)

    @property
    def hits(self) -> np.ndarray:
        """Images (K,) of each class that were predicted as it."""
        return self._by_class(self.references, self.pair_counts * (self.references == self.predictions))

    def precision_recall_f1(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1 (K,) of each class; NaN where there is nothing to divide by."""
        from .precision_recall_f1.precision_recall_f1 import precision_recall_f1

        support, predicted = self.support, self.predicted
        parts = precision_recall_f1(self.hits, predicted, support)
        defined = (predicted > 0, support > 0, predicted + support > 0)
        return tuple(np.where(there, part, np.nan) for there, part in zip(defined, parts))

    def confusion(self) -> csr_array:
        """Sparse int64 (K, K) of the pairs that occur: row i, column j is how often class i was taken for class j."""
        shape = (self.num_classes, self.num_classes)
        return csr_array((self.pair_counts, (self.references, self.predictions)), shape=shape)

    def most_confused(self) -> dict[int, tuple[int, int]]:
        """For each class that was ever taken for another: the one it was most often taken for, and how often."""
        wrong = self.references != self.predictions
        rows, columns, counts = (part[wrong] for part in (self.references, self.predictions, self.pair_counts))
        order = np.lexsort((columns, -counts, rows))  # of equally frequent ones the first
        first = np.unique(rows[order], return_index=True)[1]
        return {int(rows[i]): (int(columns[i]), int(counts[i])) for i in order[first]}

    def scores(self) -> dict[str, tuple[float, int]]:
        """Every score with the number of images behind it."""
        from .calibration.calibration import ece_of_bins
        from .mean_per_class.mean_per_class import mean_recall
        from .precision_recall_f1.precision_recall_f1 import macro_f1

        n, answers = self.images, self.counts["answers"]
        scores = {"accuracy": (self.counts["hits"] / answers, n)}
        if self.num_classes > TOP_K:
            scores["top5_accuracy"] = (self.counts["top5_hits"] / answers, n)
        if self.references is not None:
            hits, predicted, support = self.hits, self.predicted, self.support
            scores["mean_per_class"] = (mean_recall(hits, support), n)
            scores["macro_f1"] = (float(macro_f1(hits, predicted, support)), n)
        if self.counts["real_images"]:
            scores["real_accuracy"] = (
                self.counts["real_hits"] / self.counts["real_images"],
                self.counts["real_images"],
            )
        if self.bins is not None:
            scores["nll"] = (self.sums["nll"] / answers, n)
            scores["ece"] = (ece_of_bins(self.bins[2], self.bins[1], answers), n)
            scores["brier"] = (self.sums["brier"] / answers, n)
        return scores

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals: Wilson's of accuracies; up to MAX_BOOTSTRAP_IMAGES the bootstrap's of the classes' means."""
        from .accuracy.accuracy import wilson_interval
        from .precision_recall_f1.precision_recall_f1 import bootstrap_intervals

        intervals = {
            name: wilson_interval(value * n, n) for name, (value, n) in self.scores().items() if "accuracy" in name
        }
        if self.references is not None and self.images <= MAX_BOOTSTRAP_IMAGES:
            both = bootstrap_intervals(self.references, self.predictions, self.pair_counts)
            intervals |= dict(zip(("mean_per_class", "macro_f1"), both))
        return intervals
