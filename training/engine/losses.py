"""What is minimised: network and cross-entropy in one module, so that torch.compile sees them as one graph.

For the Trainer. The loss is computed here from logits, and not by the model, because transformers' classification loss
turns soft labels into independent binary problems. Sources: big_vision `utils.py` softmax_xent and sigmoid_xent.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hf_vit import HFViTForMaskedPatchPrediction
from hf_vit.errors import HFViTError

from ..config.arguments import TrainArguments
from ..data.normalize import Normalize
from .masked_patch_prediction import MASKED_PATCHES, MaskedPatchLoss, check_normalization


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, kind: str = "softmax", smoothing: float = 0.0):
    """Loss of each image, (B,), in float32.

    Args:
        logits: (B, K).
        labels: (B,) class numbers, or (B, K) probabilities that sum to 1.
        kind: "softmax", or "sigmoid": one binary problem per class, summed over classes.
        smoothing: fraction of each target spread evenly over the classes.
    """
    logits = logits.float()
    if kind == "softmax":
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if labels.ndim == 1:
        labels = F.one_hot(labels, logits.shape[-1])  # (B, K)
    targets = labels.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[-1]
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)


class ClassificationLoss(nn.Module):
    """Network and loss; in evaluation mode the plain cross-entropy, without smoothing."""

    def __init__(self, model: nn.Module, kind: str = "softmax", smoothing: float = 0.0):
        super().__init__()
        self.model, self.kind, self.smoothing = model, kind, smoothing
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # what FSDP wraps one by one

    def train(self, mode: bool = True) -> "ClassificationLoss":
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
        """(B, C, H, W) and labels to loss of each image (B,), logits (B, K), and the labels."""
        logits = self.model(pixel_values).logits
        smoothing = self.smoothing if self.training else 0.0
        return cross_entropy(logits, labels, self.kind, smoothing), logits, labels


def create_loss_module(model: nn.Module, args: TrainArguments, normalize: Normalize) -> nn.Module:
    """What `args.loss` names, around the model.

    Returns:
        A module `(pixel_values, labels) -> losses (B,), logits, labels`: answers, and what they should have been.

    Raises:
        HFViTError: a network or pixels that this loss cannot be had from.
    """
    if args.loss != MASKED_PATCHES:
        return ClassificationLoss(model, args.loss, args.label_smoothing_factor)
    if not isinstance(model, HFViTForMaskedPatchPrediction):
        raise HFViTError(f"--loss {MASKED_PATCHES} trains HFViTForMaskedPatchPrediction, not {type(model).__name__}")
    check_normalization(normalize.mean, normalize.std)
    return MaskedPatchLoss(model)
