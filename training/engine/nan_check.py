"""Stop the run at a loss that is not finite, with an error that names the step, its files and the last checkpoint.

For the Trainer. The check stays on the device, and is read only before something is logged or saved: a read in every
step would make the CPU wait for the GPU.

Tests: tests/training/engine/test_trainer.py.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hf_vit.errors import HFViTError

from .checkpoints.checkpoint_io import checkpoints
from .dataloaders import Batches
from .distributed import raise_on_all_ranks


NEVER = 1 << 62  # a step that no run reaches


class FiniteCheck:
    """The first step whose loss or gradient was not finite."""

    def __init__(self, accelerator: Accelerator, batches: Batches):
        self.accelerator, self.batches = accelerator, batches
        self.bad_step = torch.full((), NEVER, dtype=torch.int64, device=accelerator.device)
        self._places: dict[int, int] = {}  # step -> position, since the last check

    def begin(self, step: int, position: int) -> None:
        """Note that the first image of `step` is at `position`."""
        self._places[step] = position

    @torch.no_grad()
    def see(self, value: torch.Tensor, step: int) -> None:
        """Remember `step` if `value`, a scalar on the device, is the first that is not finite."""
        self.bad_step = torch.where(torch.isfinite(value), self.bad_step, self.bad_step.clamp(max=step))

    def check(self, output_dir: Path) -> None:
        """Raise HFViTError naming the step and its files; every process has to call it."""
        bad_here = int(self.bad_step)
        step = int(self.accelerator.gather(self.bad_step[None]).min())
        if step == NEVER:
            self._places.clear()
            return
        raise_on_all_ranks(self.batches.error)
        # A rank without an error of its own read other files: only those that were bad name theirs.
        names, unreadable = self.batches.names(step, self._places[step]) if bad_here == step else ([], [])
        if self.accelerator.num_processes > 1:
            names, unreadable = gather_object(names), gather_object(unreadable)
        if not names:
            raise HFViTError(nothing_readable(step, unreadable))
        saved = checkpoints(output_dir)
        good = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise HFViTError(
            f"the loss is not finite at step {step + 1} (batch: {', '.join(names[:8])}"
            f"{', ...' if len(names) > 8 else ''}); {good}. "
            "Lower --learning_rate, raise --warmup_steps, or set --max_grad_norm 1"
        )


def nothing_readable(step: int, names: list[str]) -> str:
    """Message for a step (from 0) without a readable image."""
    return f"no image of step {step + 1} can be read: {', '.join(names[:3])}"
