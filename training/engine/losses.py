"""What is minimised: network and cross-entropy in one module, so that torch.compile sees them as one graph.

For the Trainer. Classes of unequal size: weights (`balanced_weights`), or logits adjusted by the classes' frequencies
(`log_priors`). The loss is computed here from logits, and not by the model, because transformers' classification loss
turns soft labels into independent binary problems. Sources: big_vision `utils.py` softmax_xent and sigmoid_xent; Menon
et al. 2020, arXiv:2007.07314.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hf_vit import HFViTForMaskedPatchPrediction
from hf_vit.errors import HFViTError
from hf_vit.problem_type import SINGLE_LABEL, problem_type_of

from ..config.arguments import TrainArguments
from ..data.normalize import Normalize
from ..data.samplers import known_labels
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


class LossModule(nn.Module):
    """A network whose loss is computed beside it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # what FSDP wraps one by one

    def train(self, mode: bool = True) -> "LossModule":
        """As everywhere, but a frozen part stays in evaluation: a probe reads what the network computes for users."""
        super().train(mode)
        for part in self.model.children():
            parameters = list(part.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                part.eval()
        return self


class ClassificationLoss(LossModule):
    """Network and loss; in evaluation mode the plain cross-entropy, without smoothing, weights or adjustment.

    Args:
        class_weights: (K,), of the classes. logit_adjustment: (K,), added to the logits in the loss of training.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "softmax",
        smoothing: float = 0.0,
        class_weights: torch.Tensor | None = None,
        logit_adjustment: torch.Tensor | None = None,
    ):
        super().__init__(model)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.register_buffer("logit_adjustment", logit_adjustment, persistent=False)
        self.kind, self.smoothing = kind, smoothing

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, C, H, W) and labels to loss of each image (B,), logits (B, K), and the labels."""
        logits = self.model(pixel_values).logits
        smoothing = self.smoothing if self.training else 0.0
        weights = self.class_weights if self.training else None
        adjusted = logits
        if self.training and self.logit_adjustment is not None:
            adjusted = logits.float() + self.logit_adjustment
        return cross_entropy(adjusted, labels, self.kind, smoothing, weights), logits, labels


class TargetLoss(LossModule):
    """Network and loss of several labels (binary cross-entropy), or of numbers (squared error, or Huber's).

    The mean over labels or numbers, as transformers' own losses. Numbers count in standard deviations of the training
    targets (`config.target_std`), so that those of a large unit do not outweigh the others.
    """

    def __init__(self, model: nn.Module, kind: str):
        super().__init__(model)
        self.kind = kind
        scale = getattr(model.config, "target_std", None)
        self.register_buffer("scale", None if scale is None else torch.tensor(scale).float(), persistent=False)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, C, H, W) and labels (B, K) to loss of each image (B,), logits (B, K), and the labels.

        Raises:
            HFViTError: labels of another shape.
        """
        logits = self.model(pixel_values).logits.float()
        if labels.ndim == 1 and logits.shape[1] == 1:
            labels = labels[:, None]
        if labels.shape != logits.shape:
            raise HFViTError(
                f"labels of shape {tuple(labels.shape)} for outputs of shape {tuple(logits.shape)}: "
                f"{self.model.config.problem_type} needs one number for each output"
            )
        labels = labels.float()
        if self.kind == "sigmoid":
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1), logits, labels
        error = logits - labels if self.scale is None else (logits - labels) / self.scale
        loss = F.huber_loss if self.kind == "huber" else F.mse_loss
        return loss(error, torch.zeros_like(error), reduction="none").mean(-1), logits, labels


def class_counts(dataset, num_labels: int, option: str) -> torch.Tensor:
    """Training images (K,) of each class, float32.

    Raises:
        HFViTError: data whose labels are not known before they are read, which `option` needs.
    """
    return torch.bincount(torch.as_tensor(known_labels(dataset, option)), minlength=num_labels).float()


def log_priors(dataset, num_labels: int) -> torch.Tensor:
    """(K,) logarithm of each class's fraction of the training images; a class without any counts as one image."""
    counts = class_counts(dataset, num_labels, "--logit_adjustment").clamp(min=1)
    return (counts / counts.sum()).log()


def balanced_weights(dataset, num_labels: int) -> torch.Tensor:
    """(K,) images / (classes * images of the class): their mean over the training images is 1, so rates stay.

    A class without images gets 0: nothing of it is trained.

    Raises:
        HFViTError: data whose labels are not known before they are read.
    """
    counts = class_counts(dataset, num_labels, "--class_weights balanced")
    present = (counts > 0).sum()
    return torch.where(counts > 0, counts.sum() / (present * counts.clamp(min=1)), 0.0)


def create_loss_module(model: nn.Module, args: TrainArguments, normalize: Normalize, train_dataset=None) -> nn.Module:
    """What `args.loss` names, around the model.

    Args:
        train_dataset: whose labels `args.class_weights` and `args.logit_adjustment` count.

    Returns:
        A module `(pixel_values, labels) -> losses (B,), logits, labels`: answers, and what they should have been.

    Raises:
        HFViTError: a network or pixels that this loss cannot be had from.
    """
    if args.loss != MASKED_PATCHES and problem_type_of(model.config) != SINGLE_LABEL:
        assert args.loss is not None
        return TargetLoss(model, args.loss)
    if args.loss != MASKED_PATCHES:
        weights = adjustment = None
        if train_dataset is not None:  # without, the module only evaluates
            num_labels = model.config.num_labels
            weights = balanced_weights(train_dataset, num_labels) if args.class_weights == "balanced" else None
            adjustment = (
                args.logit_adjustment * log_priors(train_dataset, num_labels) if args.logit_adjustment else None
            )
        return ClassificationLoss(model, args.loss or "softmax", args.label_smoothing_factor, weights, adjustment)
    if not isinstance(model, HFViTForMaskedPatchPrediction):
        raise HFViTError(f"--loss {MASKED_PATCHES} trains HFViTForMaskedPatchPrediction, not {type(model).__name__}")
    check_normalization(normalize.mean, normalize.std)
    return MaskedPatchLoss(model)
