"""Losses: network and loss in one module, so that torch.compile sees them as one graph.

For the Trainer. Classes of unequal size can be weighted (`balanced_weights`), or their logits adjusted by their
frequencies (`log_priors`). The loss is not the model's own, because transformers' classification loss turns soft
labels into independent binary problems. Sources: big_vision `utils.py` softmax_xent and sigmoid_xent; Menon et al.
2020, arXiv:2007.07314.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hf_vit import HFViTForMaskedPatchPrediction
from hf_vit.errors import HFViTError
from hf_vit.problem_type import SINGLE_LABEL, problem_type_of

from ..config.arguments import MASKED_PATCHES, TrainArguments
from ..data.normalize import Normalize
from ..data.samplers import known_labels
from .masked_patch_prediction import MaskedPatchLoss, check_normalization


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
    logits = logits.float()  # autocast leaves them in half precision, in which the exponentials lose digits
    if kind == "softmax":
        return F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=smoothing)
    if labels.ndim == 1:
        labels = F.one_hot(labels, logits.shape[-1])  # (B, K)
    # Summed over classes, as in big_vision: a mean would make the gradients K times smaller.
    targets = labels.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[-1]
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)


class LossModule(nn.Module):
    """A network with a loss outside of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # what FSDP wraps one by one

    def train(self, mode: bool = True) -> "LossModule":
        """As `nn.Module.train`, but frozen parts stay in evaluation mode."""
        super().train(mode)
        # A probe is trained on the features that the network will compute in use: without dropout or drop path.
        for part in self.model.children():
            parameters = list(part.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                part.eval()
        return self


class ClassificationLoss(LossModule):
    """Network and cross-entropy. Smoothing, weights and adjustment apply in training mode only.

    Args:
        kind, smoothing: see `cross_entropy`. class_weights: (K,). logit_adjustment: (K,), added to the logits.
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
        # buffers, so that they move to the device with the model; not persistent: they belong to the run
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.register_buffer("logit_adjustment", logit_adjustment, persistent=False)
        self.kind, self.smoothing = kind, smoothing

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and labels (B,) or (B, K) to losses (B,), logits (B, K), and the labels."""
        logits = self.model(pixel_values).logits
        smoothing = self.smoothing if self.training else 0.0
        weights = self.class_weights if self.training else None
        adjusted = logits
        if self.training and self.logit_adjustment is not None:
            adjusted = logits.float() + self.logit_adjustment
        return cross_entropy(adjusted, labels, self.kind, smoothing, weights), logits, labels


class TargetLoss(LossModule):
    """Network and loss for several labels (binary cross-entropy), or for numbers (squared error, or Huber's).

    The mean over labels or numbers, as in transformers. Errors of numbers are measured in standard deviations of the
    training targets (`config.target_std`), so that a number of a large unit does not outweigh the others.

    Args:
        kind: "sigmoid", "mse" or "huber".
    """

    def __init__(self, model: nn.Module, kind: str):
        super().__init__(model)
        self.kind = kind
        scale = getattr(model.config, "target_std", None)
        self.register_buffer("scale", None if scale is None else torch.tensor(scale).float(), persistent=False)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) and labels (B, K) to losses (B,), logits (B, K), and the labels.

        Raises:
            HFViTError: labels of another shape.
        """
        logits = self.model(pixel_values).logits.float()
        if labels.ndim == 1 and logits.shape[1] == 1:  # a single number per image, without a dimension of its own
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
    """Number of training images of each class, float32 (K,).

    Raises:
        HFViTError: the labels are not known before the images are read, as `option` needs.
    """
    return torch.bincount(torch.as_tensor(known_labels(dataset, option)), minlength=num_labels).float()


def log_priors(dataset, num_labels: int) -> torch.Tensor:
    """Logarithm of each class's fraction of the training images, (K,); a class without any counts as one image."""
    counts = class_counts(dataset, num_labels, "--logit_adjustment").clamp(min=1)
    return (counts / counts.sum()).log()


def balanced_weights(dataset, num_labels: int) -> torch.Tensor:
    """images / (classes * images of the class), (K,); 0 for a class without images.

    Their mean over the training images is 1, so the learning rate need not change.

    Raises:
        HFViTError: the labels are not known before the images are read.
    """
    counts = class_counts(dataset, num_labels, "--class_weights balanced")
    present = (counts > 0).sum()
    return torch.where(counts > 0, counts.sum() / (present * counts.clamp(min=1)), 0.0)


def create_loss_module(model: nn.Module, args: TrainArguments, normalize: Normalize, train_dataset=None) -> nn.Module:
    """The loss module `args.loss` around a model.

    Args:
        train_dataset: its labels are counted for `args.class_weights` and `args.logit_adjustment`.

    Returns:
        A module `(pixel_values, labels) -> losses (B,), logits, labels`.

    Raises:
        HFViTError: a network or a normalization that does not fit the loss.
    """
    if args.loss != MASKED_PATCHES and problem_type_of(model.config) != SINGLE_LABEL:
        assert args.loss is not None  # TrainArguments.for_problem has chosen it
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
