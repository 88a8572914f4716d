"""A batch as the network takes it: on the device, normalized, and mixed where the step is one that mixes.

For the Trainer, in training, evaluation and the trial before a run.

Tests: tests/training/engine/test_trainer.py.
"""

from collections.abc import Callable

import torch

from ..data.mixup import MixupCutmix
from ..data.normalize import Normalize
from .planning.schedule import TrainingSchedule


class DeviceInputs:
    """Brings batches to the device.

    Args:
        normalize: of the model's image processor. mixup: None where nothing is mixed.
        schedule: says in which steps mixing is over (`mixup_off_steps`).
        image_shape: (C, H, W) of the model. targets: numbers in the labels of one image; None for a class.
        on_unreadable: called with the name of each image that could not be read.
    """

    def __init__(
        self,
        normalize: Normalize,
        mixup: MixupCutmix | None,
        schedule: TrainingSchedule,
        image_shape: tuple[int, int, int],
        targets: int | None,
        device: torch.device,
        on_unreadable: Callable[[str], None],
    ):
        self.normalize, self.mixup, self.schedule = normalize, mixup, schedule
        self.image_shape, self.targets, self.device = image_shape, targets, device
        self.on_unreadable = on_unreadable
        self.mixup_ends = schedule.length - schedule.steps_of("mixup_off_steps")

    def __call__(self, batch: dict, step: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and labels: (B,), or (B, K) of several labels, of numbers, and where mixed.

        Args:
            step: that the batch is trained on in; None for evaluation. All images of a step are mixed with one weight.
        """
        for name in batch["unreadable"]:
            self.on_unreadable(name)
        pixel_values = batch["pixel_values"].to(self.device, non_blocking=True)
        labels = batch["labels"].to(self.device, non_blocking=True)
        if not len(labels):  # all processes take part in every pass: a blank image, which nobody counts
            pixel_values = pixel_values.new_zeros((1, *self.image_shape))
            classes = self.targets is None
            labels = labels.new_zeros(1) if classes else pixel_values.new_zeros(1, self.targets).float()
        pixel_values = self.normalize(pixel_values)
        if step is not None and self.mixup is not None and self.schedule.scheduled(step) < self.mixup_ends:
            pixel_values, labels = self.mixup(pixel_values, labels, step)
        return pixel_values, labels
