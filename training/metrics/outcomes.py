"""The result of an evaluation for each image: label, most probable classes, loss; for the report of a run.

Collected batch by batch next to `MetricState`. With one class per image, the TOP_CLASSES most probable ones are kept,
so that memory does not grow with the number of classes; with several labels or numbers, all outputs.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hf_vit.atomic_file import atomic_path
from hf_vit.problem_type import SINGLE_LABEL


TOP_CLASSES = 16  # kept for each image
OUTCOMES_NAME = "outcomes.npz"  # in the folder of a run; never uploaded


@dataclass(frozen=True)
class Outcomes:
    """One entry per readable image, in the order of the data.

    Attributes:
        problem_type: transformers' name for the kind of labels.
        index: int64 (N,), of the image in the data set. losses: float32 (N,), without label smoothing.
        labels: int64 (N,); of several labels, or numbers, float32 (N, K).
        classes, probabilities: int32 and float32 (N, k), the most probable first. own: float32 (N,), the label's
            probability. outputs: float32 (N, K), the logits of several labels, or numbers in their unit. Each is None
            for other problem types.
    """

    problem_type: str
    index: np.ndarray
    losses: np.ndarray
    labels: np.ndarray
    classes: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    own: np.ndarray | None = None
    outputs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)

    def save(self, path: Path) -> None:
        """Write the arrays as one file of NumPy's."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        with atomic_path(path) as temporary:
            np.savez(temporary, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Outcomes":
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(
                str(arrays["problem_type"]), **{name: arrays[name] for name in arrays if name != "problem_type"}
            )


def joined_outcomes(parts: list[Outcomes], sizes: list[int]) -> Outcomes:
    """The outcomes of several data sets, concatenated; `sizes` are their numbers of images."""
    starts = np.cumsum([0, *sizes[:-1]])
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name, value in vars(parts[0]).items()
        if isinstance(value, np.ndarray) and name != "index"
    }
    index = np.concatenate([part.index + start for part, start in zip(parts, starts)])
    return Outcomes(parts[0].problem_type, index, **arrays)


class OutcomeState:
    """Collects outcomes batch by batch; one per process."""

    def __init__(self, problem_type: str):
        self.problem_type = problem_type
        self.kept: list[tuple[torch.Tensor, ...]] = []

    @torch.no_grad()
    def update(
        self, logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, losses: torch.Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            logits: (B, K). labels: int64 (B,), or (B, K) of several labels or numbers. index: (B,), in the data.
            losses: (B,); None for classes: the cross-entropy.
        """
        logits = logits.float()
        if self.problem_type == SINGLE_LABEL:
            log_probabilities = logits.log_softmax(-1)
            own = log_probabilities.gather(1, labels[:, None])[:, 0]
            top = log_probabilities.topk(min(TOP_CLASSES, logits.shape[1]))
            losses = -own if losses is None else losses
            parts = (top.indices.int(), top.values.exp().nan_to_num(0.0), own.exp().nan_to_num(0.0))
        else:
            assert losses is not None
            parts = (logits,)
        self.kept.append((index.to(logits.device), losses.float(), labels, *parts))

    def gather(self, accelerator: Accelerator) -> Outcomes | None:
        """The outcomes of all processes in the order of the data; None without images. All processes call it."""
        arrays = [torch.cat(part).cpu().numpy() for part in zip(*self.kept)]
        if accelerator.num_processes > 1:
            gathered = [part for part in gather_object([arrays]) if part]
            arrays = [np.concatenate(part) for part in zip(*gathered)]
        if not arrays:
            return None
        order = np.argsort(arrays[0], kind="stable")
        index, losses, labels, *parts = (part[order] for part in arrays)
        names = ("classes", "probabilities", "own") if self.problem_type == SINGLE_LABEL else ("outputs",)
        return Outcomes(self.problem_type, index, losses, labels, **dict(zip(names, parts)))
