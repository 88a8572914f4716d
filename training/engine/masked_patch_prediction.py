"""The paper's self-supervision: the mean colors of patches that the network does not see (arXiv:2010.11929, B.1.2).

For the Trainer, as `--loss masked_patches`: labels are not read. Half of the patches are corrupted, and each of these
is asked for its color, 3 bits a channel; the network and its corruption are
`hf_vit.HFViTForMaskedPatchPrediction`. In evaluation the corrupted patches are all masked, at the same places in every
image, so that the score depends neither on batches nor on processes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForMaskedPatchPrediction
from hf_vit.errors import HFViTError


MASKED_PATCHES = "masked_patches"
MASKED = 1  # what `corruption` calls a patch that is replaced by the mask embedding


class MaskedPatchLoss(nn.Module):
    """Network and loss, as `loss_module.ClassificationLoss` for classes."""

    def __init__(self, model: HFViTForMaskedPatchPrediction):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what FSDP wraps one by one

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ask for colors.

        Args:
            pixel_values: (B, C, H, W) in [-1, 1]. labels: not read.

        Returns:
            Loss of each image (B,), the mean over its n corrupted patches; their logits (B, n, 8^C), their colors
            (B, n).
        """
        rows, columns = self.model.config.grid_for(tuple(pixel_values.shape[-2:]))
        batch, patches, device = len(pixel_values), rows * columns, pixel_values.device
        count = round(patches * self.model.corrupted)
        if self.training:
            corruption = self.model.draw_corruption(batch, patches, device)
        else:
            corruption = same_places(patches, count).to(device).expand(batch, -1)
        asked = corruption.argsort(dim=1, descending=True)[:, :count]  # (B, n)
        logits = self.model(pixel_values, corruption=corruption).logits.float()  # (B, N, 8^C)
        logits = logits.gather(1, asked[:, :, None].expand(-1, -1, logits.shape[-1]))  # (B, n, 8^C)
        colors = self.model.patch_colors(pixel_values).gather(1, asked)  # (B, n)
        losses = F.cross_entropy(logits.flatten(0, 1), colors.flatten(), reduction="none")  # (B * n,)
        return losses.view(batch, count).mean(dim=1), logits, colors


@torch.compiler.disable
def same_places(patches: int, count: int) -> torch.Tensor:
    """(N,) with MASKED at `count` places: the same ones each time."""
    corruption = torch.zeros(patches, dtype=torch.long)
    corruption[torch.randperm(patches, generator=torch.Generator().manual_seed(0))[:count]] = MASKED
    return corruption


def masked_model(source: HFViTForImageClassification | HFViTConfig) -> HFViTForMaskedPatchPrediction:
    """The network of this task, from scratch or around the encoder of another one.

    Raises:
        HFViTError: a part that this task would leave untrained.
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
    """Raise HFViTError unless images lie in [-1, 1], whose eighths the colors are."""
    if {*mean, *std} != {0.5}:
        raise HFViTError(
            f"--loss masked_patches reads colors from images in [-1, 1], this model's processor has mean {mean} "
            f"and deviation {std}: start from a model with 0.5, or from scratch"
        )
