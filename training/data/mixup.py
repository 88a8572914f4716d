"""Mixup and CutMix of a batch, on its device (arXiv:1710.09412, arXiv:1905.04899).

Not timm's `Mixup`: it draws from a global generator; here draws are a function of (seed, step), for an exact resume.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch

from hf_vit.errors import HFViTError

from ..rng import MIXING, generator


@dataclass(frozen=True)
class MixupCutmix:
    """Mixup and CutMix of a batch on its device, a pure function of (seed, step).

    Args:
        mixup_alpha: parameter of the Beta distribution of mixup's weight; 0 switches mixup off.
        cutmix_alpha: the same for CutMix. With both, each step uses one of them at random.
        num_labels: K, the width of the soft labels.
        seed: of the run. All processes draw the same weight in the same step, as in big_vision.
    """

    mixup_alpha: float
    cutmix_alpha: float
    num_labels: int
    seed: int = 0

    def __post_init__(self):
        if self.mixup_alpha < 0 or self.cutmix_alpha < 0:
            raise HFViTError(f"mixup and cutmix must be >= 0, got {self.mixup_alpha} and {self.cutmix_alpha}")

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix each image with its neighbor in the batch.

        Args:
            pixel_values: float (B, C, H, W). labels: int (B,) or soft (B, K). step: number of the step.

        Returns:
            pixel_values (B, C, H, W) and soft labels (B, K).
        """
        if labels.dim() == 1:
            labels = torch.nn.functional.one_hot(labels, self.num_labels)
        soft = labels.to(torch.float32)
        if not (self.mixup_alpha or self.cutmix_alpha):
            return pixel_values, soft
        rng = generator(MIXING, self.seed, step)
        cut = bool(self.cutmix_alpha) and (not self.mixup_alpha or rng.random() < 0.5)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        weight = float(rng.beta(alpha, alpha))
        partners = pixel_values.roll(1, dims=0)
        if cut:
            height, width = pixel_values.shape[-2:]
            top, bottom, left, right = cut_rectangle(height, width, 1.0 - weight, rng)
            pixel_values = pixel_values.clone()
            pixel_values[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
            weight = 1.0 - (bottom - top) * (right - left) / (height * width)  # the rectangle was cut at the border
        else:
            weight = max(weight, 1.0 - weight)  # as in big_vision: the labels' order stays that of the images
            pixel_values = weight * pixel_values + (1.0 - weight) * partners
        return pixel_values, weight * soft + (1.0 - weight) * soft.roll(1, dims=0)


def cut_rectangle(height: int, width: int, fraction: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A rectangle of `fraction` of the area around a uniform center, cut at the border: top, bottom, left, right."""
    tall, wide = sqrt(fraction) * height, sqrt(fraction) * width
    y, x = rng.random() * height, rng.random() * width
    top, bottom = max(0, round(y - tall / 2)), min(height, round(y + tall / 2))
    left, right = max(0, round(x - wide / 2)), min(width, round(x + wide / 2))
    return top, bottom, left, right
