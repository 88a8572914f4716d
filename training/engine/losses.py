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


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    kind: str = "softmax",
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
):
    """Loss of each image, (B,), in float32.

    Args:
        logits: (B, K).
        labels: (B,) class numbers, or (B, K) probabilities that sum to 1.
        kind: "softmax", or "sigmoid": one binary problem per class, summed over classes.
        smoothing: fraction of each target spread evenly over the classes.
        weights: (K,), of the classes, for softmax.
    """
    logits = logits.float()
    if kind == "softmax":
        return F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=smoothing)
    if labels.ndim == 1:
        labels = F.one_hot(labels, logits.shape[-1])  # (B, K)
    targets = labels.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[-1]
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)


class ClassificationLoss(nn.Module):
    """Network and loss; in evaluation mode the plain cross-entropy, without smoothing."""

    def __init__(
        self,
        model: nn.Module,
        kind: str = "softmax",
        smoothing: float = 0.0,
        class_weights: torch.Tensor | None = None,
    ):
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)
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
        weights = self.class_weights if self.training else None
        return cross_entropy(logits, labels, self.kind, smoothing, weights), logits, labels


def balanced_weights(dataset, num_labels: int) -> torch.Tensor:
    """(K,) images / (classes * images of the class): their mean over the training images is 1, so rates stay.

    A class without images gets 0: nothing of it is trained.

    Raises:
        HFViTError: data whose labels are not known before they are read.
    """
    labels = getattr(dataset, "labels", None)
    if labels is None:
        raise HFViTError("--class_weights balanced counts the labels first: leave out --streaming")
    counts = torch.bincount(torch.as_tensor(labels), minlength=num_labels).float()
    present = (counts > 0).sum()
    return torch.where(counts > 0, counts.sum() / (present * counts.clamp(min=1)), 0.0)


def create_loss_module(model: nn.Module, args: TrainArguments, normalize: Normalize, train_dataset=None) -> nn.Module:
    """What `args.loss` names, around the model.

    Args:
        train_dataset: whose labels `args.class_weights` counts.

    Returns:
        A module `(pixel_values, labels) -> losses (B,), logits, labels`: answers, and what they should have been.

    Raises:
        HFViTError: a network or pixels that this loss cannot be had from.
    """
    if args.loss != MASKED_PATCHES:
        balanced = args.class_weights == "balanced" and train_dataset is not None
        weights = balanced_weights(train_dataset, model.config.num_labels) if balanced else None
        return ClassificationLoss(model, args.loss, args.label_smoothing_factor, weights)
    if not isinstance(model, HFViTForMaskedPatchPrediction):
        raise HFViTError(f"--loss {MASKED_PATCHES} trains HFViTForMaskedPatchPrediction, not {type(model).__name__}")
    check_normalization(normalize.mean, normalize.std)
    return MaskedPatchLoss(model)
