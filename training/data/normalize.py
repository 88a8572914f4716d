"""Rescale and normalize image batches on the training device.

Workers return uint8, a quarter of the bytes of float32. Mean, std and scale are those of the image processor, so that
the saved model sees the same values in use as in training.
"""

import torch

from hf_vit.errors import HFViTError
from hf_vit.image_processing import ImageProcessing


class Normalize:
    """uint8 images (B, C, H, W) to normalized float32; float images pass unchanged.

    Bit for bit the `pixel_values` of transformers' `ViTImageProcessorPil` if 1 / scale is a multiple of 0.5 (255,
    127.5): a float32 quotient is rounded once, like its product in float64. Other scales differ by a rounding.
    """

    def __init__(self, mean: list[float], std: list[float], scale: float = 1 / 255):
        self.mean, self.std, self.scale = mean, std, scale
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def of(cls, image_processor, channels: int) -> "Normalize":
        """With the numbers of an image processor; without one, mean and std 0.5 as in all of Google's ViTs."""
        if image_processor is None:
            return cls([0.5] * channels, [0.5] * channels)
        settings = ImageProcessing.from_transformers(image_processor.to_dict())
        scale = 1.0 if settings.rescale_factor is None else settings.rescale_factor
        if settings.image_mean is None or settings.image_std is None:
            return cls([0.0] * channels, [1.0] * channels, scale)
        mean, std = (list(numbers) * (channels if len(numbers) == 1 else 1)
                     for numbers in (settings.image_mean, settings.image_std))  # fmt: skip
        if not len(mean) == len(std) == channels:
            raise HFViTError(
                f"the image processor's image_mean and image_std have {len(mean)} and {len(std)} numbers, and the "
                f"model reads {channels} channels: write {channels} of each into preprocessor_config.json"
            )
        return cls(mean, std, scale)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.is_floating_point():
            return pixel_values
        device = pixel_values.device
        if device not in self._on:
            self._on[device] = tuple(torch.tensor(v, device=device).view(-1, 1, 1) for v in (self.mean, self.std))
        mean, std = self._on[device]
        return (pixel_values.float() / (1 / self.scale) - mean) / std
