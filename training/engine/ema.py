"""Exponential moving average of the weights (Polyak; Table 2 of arXiv:2010.11929 evaluates with decay 0.9999).

For the Trainer: updated after every optimizer step, evaluated and saved in place of the raw weights. Not torch's
`AveragedModel` or timm's `ModelEmaV3`: both keep a second module, while a checkpoint needs tensors by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Average of a model's trainable parameters, on their device, in float32.

    As in timm, BatchNorm's running statistics are averaged too, since they belong to the weights that they were
    measured with.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        stored = model.state_dict().keys()
        averaged = {name: p for name, p in model.named_parameters() if p.requires_grad}
        averaged |= {name: b for name, b in model.named_buffers() if name in stored and b.is_floating_point()}
        self.names, self.weights = list(averaged), list(averaged.values())
        # float32 also for bfloat16 weights, in which a step of 1 - decay = 1e-4 would round to nothing
        self.average = [p.detach().clone().float() for p in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights, by more in the first steps, so that the initialization is soon forgotten.

        Args:
            step: steps done, from 1; the decay used is min(decay, (1 + step) / (10 + step)), as in TensorFlow.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        # one call for all tensors in place of a loop in Python
        torch._foreach_lerp_(self.average, [p.detach().float() for p in self.weights], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model hold the average; the weights are restored at exit."""
        # Copied, not swapped: the optimizer and Accelerate hold on to these very tensors.
        weights = [p.detach().clone() for p in self.weights]
        self._write(self.average)
        try:
            yield
        finally:
            self._write(weights)

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.weights, values):
            parameter.copy_(value)
