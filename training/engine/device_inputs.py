"""A batch as the network takes it: on the device, normalized, and with mixup or CutMix while they last.

For the Trainer: in training, in evaluation, and in the trial before a run.

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
        normalize: with mean and std of the model's image processor. mixup: None for no mixing.
        schedule: gives the step at which mixing ends (`mixup_off_steps`).
        image_shape: (C, H, W) of the model.
        targets: length of an image's label vector; None for class numbers.
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
        """Move a batch to the device, normalize and mix it.

        Args:
            batch: from `collate`: "pixel_values" (B, C, H, W), "labels", and the names of "unreadable" images.
            step: of the training, which decides about mixing; None for evaluation.

        Returns:
            Images (B, C, H, W), and labels (B,) or, for several labels, numbers or mixed classes, (B, K).
        """
        for name in batch["unreadable"]:
            self.on_unreadable(name)
        pixel_values = batch["pixel_values"].to(self.device, non_blocking=True)
        labels = batch["labels"].to(self.device, non_blocking=True)
        if not len(labels):
            # Collective operations need every process in every pass: a blank image, which is not counted.
            pixel_values = pixel_values.new_zeros((1, *self.image_shape))
            labels = self._blank_label()
        pixel_values = self.normalize(pixel_values)
        # Mixed after normalizing, in floats; in bytes each mix would be rounded.
        if step is not None and self.mixup is not None and self.schedule.scheduled(step) < self.mixup_ends:
            pixel_values, labels = self.mixup(pixel_values, labels, step)
        return pixel_values, labels

    def blank(self, image_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One normalized image (1, C, H, W) of zeros and a label for it, on the device."""
        return torch.zeros((1, self.image_shape[0], *image_size), device=self.device), self._blank_label()

    def _blank_label(self) -> torch.Tensor:
        if self.targets is None:
            return torch.zeros(1, dtype=torch.int64, device=self.device)
        return torch.zeros((1, self.targets), device=self.device)
