"""What is minimised: network and cross-entropy in one module, so that torch.compile sees them as one graph.

For the Trainer. The loss is computed here from logits, and not by the model, because transformers' classification loss
turns soft labels into independent binary problems. Sources: big_vision `utils.py` softmax_xent and sigmoid_xent.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hf_vit import HFViTForMaskedPatchPrediction
from hf_vit.errors import HFViTError
from hf_vit.image_processing import ImageProcessing

from ..config.arguments import TrainArguments
from .masked_patch_prediction import MASKED_PATCHES, MaskedPatchObjective, check_normalisation


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, kind: str = "softmax", smoothing: float = 0.0):
    """Loss of each picture, (B,), in float32.

    Args:
        logits: (B, K).
        labels: (B,) class numbers, or (B, K) shares that sum to 1.
        kind: "softmax", or "sigmoid": one binary problem per class, summed over classes.
        smoothing: share of each target spread evenly over the classes.
    """
    logits = logits.float()
    if kind == "softmax":
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if labels.ndim == 1:
        labels = F.one_hot(labels, logits.shape[-1])  # (B, K)
    targets = labels.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[-1]
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)


class Objective(nn.Module):
    """Network and loss; in evaluation mode the plain cross-entropy, without smoothing."""

    def __init__(self, model: nn.Module, kind: str = "softmax", smoothing: float = 0.0):
        super().__init__()
        self.model, self.kind, self.smoothing = model, kind, smoothing
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # what FSDP wraps one by one

    def train(self, mode: bool = True) -> "Objective":
        """As everywhere, but a frozen part stays in evaluation: a probe reads what the network computes for users."""
        super().train(mode)
        for part in self.model.children():
            parameters = list(part.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                part.eval()
        return self

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, C, H, W) and labels to loss of each picture (B,), logits (B, K), and the labels."""
        logits = self.model(pixel_values).logits
        smoothing = self.smoothing if self.training else 0.0
        return cross_entropy(logits, labels, self.kind, smoothing), logits, labels


class Normalise:
    """uint8 pictures to floats on the device, with the image processor's numbers; floats pass as they are."""

    def __init__(self, mean: list[float], std: list[float], scale: float = 1 / 255):
        self.mean, self.std, self.scale = mean, std, scale
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def of(cls, image_processor, channels: int) -> "Normalise":
        """An image processor's numbers; mean and std 0.5, as all of Google's ViTs, without one."""
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
        return (pixel_values.float() * self.scale - mean) / std


def create_objective(model: nn.Module, args: TrainArguments, normalise: Normalise) -> nn.Module:
    """What `args.loss` names, around the model.

    Returns:
        A module `(pixel_values, labels) -> losses (B,), logits, labels`: answers, and what they should have been.

    Raises:
        HFViTError: a network or pixels that this loss cannot be had from.
    """
    if args.loss != MASKED_PATCHES:
        return Objective(model, args.loss, args.label_smoothing_factor)
    if not isinstance(model, HFViTForMaskedPatchPrediction):
        raise HFViTError(f"--loss {MASKED_PATCHES} trains HFViTForMaskedPatchPrediction, not {type(model).__name__}")
    check_normalisation(normalise.mean, normalise.std)
    return MaskedPatchObjective(model)
