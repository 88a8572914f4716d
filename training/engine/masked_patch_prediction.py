"""Masked patch prediction, the paper's self-supervision: mean colors of masked patches (arXiv:2010.11929, B.1.2).

For the Trainer, as `--loss masked_patches`; labels are not read. Half of the patches are corrupted, and the network
predicts the mean color of each, 3 bits per channel; corruption and network are `hf_vit.HFViTForMaskedPatchPrediction`.
In evaluation the corrupted patches are all masked, at the same places in every image, so that the score depends
neither on batches nor on processes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForMaskedPatchPrediction
from hf_vit.errors import HFViTError


MASKED = 1  # value in `corruption` of a patch that is replaced by the mask embedding


class MaskedPatchLoss(nn.Module):
    """Network and loss, as `losses.ClassificationLoss` for classes."""

    def __init__(self, model: HFViTForMaskedPatchPrediction):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what FSDP wraps one by one

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict the colors of corrupted patches.

        Args:
            pixel_values: (B, C, H, W) in [-1, 1]. labels: not read.

        Returns:
            Losses (B,), each the mean over an image's n corrupted patches; logits (B, n, 8^C) and colors (B, n) of
            these patches.
        """
        rows, columns = self.model.config.grid_for(tuple(pixel_values.shape[-2:]))
        batch, patches, device = len(pixel_values), rows * columns, pixel_values.device
        count = round(patches * self.model.corrupted)
        if self.training:
            corruption = self.model.draw_corruption(batch, patches, device)
        else:
            corruption = same_places(patches, count).to(device).expand(batch, -1)
        # corrupted patches have values above 0, so that they sort first
        targets = corruption.argsort(dim=1, descending=True)[:, :count]  # (B, n)
        logits = self.model(pixel_values, corruption=corruption).logits.float()  # (B, N, 8^C)
        logits = logits.gather(1, targets[:, :, None].expand(-1, -1, logits.shape[-1]))  # (B, n, 8^C)
        colors = self.model.patch_colors(pixel_values).gather(1, targets)  # (B, n)
        losses = F.cross_entropy(logits.flatten(0, 1), colors.flatten(), reduction="none")  # (B * n,)
        return losses.view(batch, count).mean(dim=1), logits, colors


@torch.compiler.disable
def same_places(patches: int, count: int) -> torch.Tensor:
    """(N,) with MASKED at `count` random places, the same ones each time."""
    corruption = torch.zeros(patches, dtype=torch.long)
    corruption[torch.randperm(patches, generator=torch.Generator().manual_seed(0))[:count]] = MASKED
    return corruption


def masked_model(source: HFViTForImageClassification | HFViTConfig) -> HFViTForMaskedPatchPrediction:
    """The network for masked patch prediction, from scratch or around the encoder of a classifier.

    Raises:
        HFViTError: a network with parts that this task would leave untrained.
    """
    config = source if isinstance(source, HFViTConfig) else source.config
    if config.pooling == "map" or config.representation_size is not None:
        raise HFViTError(
            "--loss masked_patches asks every patch and would leave the map head and the representation layer "
            "untrained: set pooling=token or gap, and no representation_size"
        )
    if config.grid_size[0] * config.grid_size[1] < 2:
        raise HFViTError("--loss masked_patches needs two patches or more: raise --image_size, or lower patch_size")
    model = HFViTForMaskedPatchPrediction(config)
    if not isinstance(source, HFViTConfig):
        model.vit = source.vit
    return model


def check_normalization(mean: list[float], std: list[float]) -> None:
    """Raise HFViTError unless images lie in [-1, 1]: the colors are eighths of that range."""
    if {*mean, *std} != {0.5}:
        raise HFViTError(
            f"--loss masked_patches reads colors from images in [-1, 1], this model's processor has mean {mean} "
            f"and deviation {std}: start from a model with 0.5, or from scratch"
        )
