"""Adapters for the explanation libraries `pytorch-grad-cam` and `captum`. Neither is imported here.

    from pytorch_grad_cam import GradCAM    # pip install "hf-vit[grad-cam]"; it needs a torchvision that matches torch
    with GradCAM(Logits(model), grad_cam_layers(model), reshape_transform=token_grid(model)) as cam:
        heat = cam(input_tensor=pixel_values, targets=None)    # (B, H, W) in [0, 1]

    from captum.attr import FeatureAblation, IntegratedGradients, LayerGradCam    # pip install captum
    IntegratedGradients(Logits(model)).attribute(pixel_values, blurred(pixel_values), target=3)    # (B, C, H, W)
    FeatureAblation(Logits(model)).attribute(pixel_values, target=3, feature_mask=patch_mask(model, pixel_values))
    LayerGradCam(Logits(model), patch_maps(model)).attribute(pixel_values, target=3)    # (B, 1, rows, columns)

pytorch-grad-cam reads layers of tokens `(B, N, D)` and takes a function that reshapes them to `(B, D, rows, columns)`.
captum has no such function and expects channels in dimension 1: its layer methods need a layer whose output is a
feature map, such as `patch_maps`. Its integrated gradients start at zero by default, where a hybrid's normalizations
are discontinuous and the attributions do not add up; `perturbation.blurred` is a start that works.
"""

from collections.abc import Callable

import torch
from torch import nn

from .attention import uncompiled
from .perturbation import patch_numbers


class Logits(nn.Module):
    """A module from pixels `(B, C, H, W)` to logits `(B, K)`, which both libraries expect."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = uncompiled(model)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def grad_cam_layers(model: nn.Module) -> list[nn.Module]:
    """The target layers of Grad-CAM: the last block's first LayerNorm.

    After the last block only the class token has a gradient, not the patches.
    """
    return [uncompiled(model).base_model.layers[-1].layernorm_before]


def token_grid(
    model: nn.Module, image_size: int | tuple[int, int] | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """pytorch-grad-cam's `reshape_transform`: `(B, N, D)` -> `(B, D, rows, columns)`, of the patches.

    `image_size` in pixels, one number or (height, width); default: the model's own size.
    """
    config = uncompiled(model).config
    grid = config.grid_for(config.image_size if image_size is None else image_size)

    def transform(tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, config.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)

    return transform


def patch_maps(model: nn.Module) -> nn.Module:
    """The patch projection, whose output is `(B, D, rows, columns)`: a layer for captum's layer methods."""
    return uncompiled(model).base_model.embeddings.patch_embeddings.projection


def patch_mask(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """captum's `feature_mask` of whole patches, `(1, 1, H, W)`: the patch number of every pixel."""
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    inside = uncompiled(model)
    return patch_numbers(inside, size, inside.config.grid_for(size)).to(pixel_values.device)[None, None]
