"""One optimizer step, equal to a step on a single large batch whatever the micro-batches and processes.

For the Trainer.

Tests: tests/training/engine/test_trainer.py.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import nn

from hf_vit.errors import HFViTError

from ..config.arguments import TrainArguments
from ..data.samplers import seed_draw
from .checkpoints.full_tensors import gathered
from .checkpoints.trainer_state import TrainingState
from .dataloaders import Batches
from .device_inputs import DeviceInputs
from .nan_check import FiniteCheck, nothing_readable
from .optimizers import GradualUnfreezing
from .planning.schedule import TrainingSchedule
from .preemption import StopRequest


class TrainStep:
    """Forward, backward, clip, update.

    Args:
        loss_module, optimizer: prepared by Accelerate.
        state: of the run, which supplies step, position, scheduler, EMA and meter.
        inputs: brings a batch to the device. kernels: context of the forward and backward pass.
        batches, stop_request: told of, and asked to end the run for, images that this process cannot read.
        finite: sees every loss and gradient norm.
        event: calls the method of that name of every callback.

    Attributes:
        learning_rate: of the last step, the largest over the parameter groups.
        grad_norm: of the last step, before clipping; None if it is not computed.
    """

    def __init__(
        self,
        args: TrainArguments,
        accelerator: Accelerator,
        loss_module: nn.Module,
        optimizer,
        state: TrainingState,
        schedule: TrainingSchedule,
        inputs: DeviceInputs,
        kernels: AbstractContextManager,
        batches: Batches,
        finite: FiniteCheck,
        stop_request: StopRequest,
        event: Callable[[str], None],
    ):
        self.seed, self.max_grad_norm = args.seed, args.max_grad_norm
        self.accelerator, self.loss_module, self.optimizer = accelerator, loss_module, optimizer
        self.state, self.schedule, self.inputs, self.kernels = state, schedule, inputs, kernels
        self.batches, self.finite, self.stop_request, self.event = batches, finite, stop_request, event
        self.parameters = list(loss_module.parameters())
        every = schedule.steps_of("unfreeze_every")
        self.unfreezing = GradualUnfreezing(loss_module, every) if every else None
        self.learning_rate = 0.0
        self.grad_norm: torch.Tensor | None = None

    def __call__(self, micro_batches: list[dict]) -> None:
        accelerator, rank = self.accelerator, self.accelerator.process_index
        step, passes = self.state.trainer_state.global_step, len(micro_batches)
        most = max(stage.accumulation_steps for stage in self.schedule.stages)
        self.finite.begin(step, self.state.position)
        count = self._count_images(micro_batches, step)
        accelerator.gradient_accumulation_steps, accelerator.step = passes, 0
        if not self.loss_module.training:  # the evaluation before has switched it; walking all modules takes time
            self.loss_module.train()
        for number, batch in enumerate(micro_batches):
            # Dropout and drop path depend on (seed, step, micro-batch, rank) alone: nothing to save for a resume.
            seed_draw(self.seed, step * most + number, rank, accelerator.device)
            with accelerator.accumulate(self.loss_module):
                pixel_values, labels = self.inputs(batch, step)
                with self.kernels:
                    outputs = self.loss_module(pixel_values, labels)
                    # A batch without a readable image was given a blank one, which must not count.
                    losses, logits, labels = (part[: len(batch["labels"])] for part in outputs)
                    # Accelerate divides by the micro-batches, DDP averages over processes: the mean over all remains.
                    accelerator.backward(losses.sum() * (passes * accelerator.num_processes) / count)
                self.finite.see(self.state.meter.add(losses.detach(), logits.detach(), labels), step)
                if accelerator.sync_gradients:
                    if self.unfreezing is not None:
                        self.unfreezing.drop_gradients(self.schedule.scheduled(step))
                    self._clip(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not accelerator.sync_gradients:
                self.event("on_substep_end")
        self.event("on_optimizer_step")
        self.learning_rate = max(self.state.scheduler.get_last_lr())
        self.state.scheduler.step()
        if self.state.ema is not None:
            self.state.ema.update(step + 1)

    def _clip(self, step: int) -> None:
        if self.max_grad_norm > 0:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
            self.grad_norm = gathered(norm)
            if self.accelerator.scaler is None:  # a scaled loss overflows now and then, and its step is left out
                self.finite.see(self.grad_norm, step)
        self.event("on_pre_optimizer_step")

    def _count_images(self, batches: list[dict], step: int) -> int | torch.Tensor:
        """Images of this step over all processes: what the sum of the losses is divided by."""
        count = sum(len(batch["labels"]) for batch in batches)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(torch.tensor(float(count), device=self.accelerator.device), "sum")
            self.finite.see(1 / total, step)
            if self.batches.error is not None:
                # The others must not wait for this process: the next check, which they all reach, raises the error.
                self.finite.see(torch.full_like(total, math.nan), step)
                self.stop_request.request()
            return total.clamp(min=1)
        if not count:
            raise HFViTError(nothing_readable(step, [name for batch in batches for name in batch["unreadable"]]))
        return count
