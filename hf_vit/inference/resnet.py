"""A hybrid's ResNet: packed convolutions, and one kernel for a GroupNorm, the shortcut's addition and the ReLU.

Tests: tests/hf_vit/inference/test_optimize.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import capabilities
from ..kernel_table import choose
from ..modeling.resnet_stem import same_amounts, same_padding
from . import kernels
from .wrapper import OptimizedModule


MAX_MEASURED_IMAGES = 8  # a larger batch is measured on this many


class OptimizedStem(OptimizedModule):
    """The ResNet, in channels-first or channels-last memory, whichever is faster."""

    def is_supported(self) -> bool:
        """Whether convolutions and norms are the model's own, by name: code from a Hub folder has its own classes."""
        layers = [module for module in self.plain.modules() if not list(module.children())]
        ours = all(type(layer).__name__ == "StdConv2d" or type(layer) is nn.GroupNorm for layer in layers)
        return super().is_supported() and ours

    def build(self) -> None:
        stem = self.plain
        units = [FastUnit(unit) for stage in stem.stages for unit in stage.units]
        self.__dict__.update(root=FastConvolution(stem.conv_root), root_norm=FastNorm(stem.gn_root), units=units)

    def run(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        """`(B, C, H, W)` -> `(B, C', H', W')`."""
        images = x[:MAX_MEASURED_IMAGES]
        key = ("resnet", *self.plain.conv_root.weight.shape, len(self.units), *x.shape[2:], x.dtype)
        key += (len(images).bit_length(), kernels.maps_library() is not None)
        implementations = {"plain": self.run_plain, "channels first": self.stem, "channels last": self.channels_last}
        return choose(key, implementations, images, min_speedup=1.02)(x)

    def channels_last(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        x = self.root_norm(self.root(x))  # (B, width, H/2, W/2)
        if kernels.takes_map(x):
            x = kernels.max_pool(x, same_amounts(x, 3, 2))  # (B, width, H/4, W/4)
        else:
            x = F.max_pool2d(same_padding(x, 3, 2, value=float("-inf")), 3, stride=2)
        for unit in self.units:  # (B, 4 * features, H', W')
            x = unit(x)
        return x


class FastUnit:
    """A residual unit: `relu(norm3(conv3(...)) + shortcut)`, the last three steps fused."""

    def __init__(self, unit: Any):
        self.convs = [FastConvolution(conv) for conv in (unit.conv1, unit.conv2, unit.conv3)]
        self.norms = [FastNorm(norm) for norm in (unit.gn1, unit.gn2, unit.gn3)]
        self.conv_proj = FastConvolution(unit.conv_proj) if unit.has_projection else None
        self.gn_proj = FastNorm(unit.gn_proj) if unit.has_projection else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](self.convs[0](x))
        y = self.norms[1](self.convs[1](y))
        y = self.convs[2](y)
        shortcut = x if self.conv_proj is None else self.conv_proj(x)
        return self.norms[2](y, shortcut, self.gn_proj)


class FastNorm:
    """`relu(norm(x) + shortcut)`, by one kernel where x is in channels-last memory."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.as_float32 = norm.weight.float(), norm.bias.float(), norm.eps, norm.num_groups

    def __call__(
        self, x: torch.Tensor, shortcut: torch.Tensor | None = None, shortcut_norm: "FastNorm | None" = None
    ) -> torch.Tensor:
        """x, `(B, C, H, W)`, is overwritten; `shortcut_norm` is applied to the shortcut."""
        if kernels.takes_map(x):
            if shortcut is not None:
                shortcut = shortcut.contiguous(memory_format=torch.channels_last)
            norms = [self.as_float32] + ([shortcut_norm.as_float32] if shortcut_norm is not None else [])
            return kernels.group_norm_(x, *norms, shortcut=shortcut)
        y = self.norm(x)
        if shortcut is not None:
            y = y + (shortcut if shortcut_norm is None else shortcut_norm.norm(shortcut))
        return F.relu_(y)


class FastConvolution:
    """A standardized convolution, by the fastest implementation for the input's shape."""

    def __init__(self, conv: Any):
        self.conv = conv
        self.packed: tuple | None = None  # for one size of input: oneDNN's layout depends on it
        self.packed_pixel: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` -> a new `(B, C', H', W')` in the input's memory format."""
        conv = self.conv
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        implementations: dict[str, Callable] = {"eager": self.eager}
        if x.device.type == "cpu" and capabilities.packs_convolution(x.dtype):
            implementations["packed"] = self.by_onednn
            if channels_last and conv.kernel_size == conv.stride == (1, 1):
                implementations["matmul"] = self.by_matmul
        key = ("convolution", *conv.weight.shape, *conv.stride, *x.shape[2:], channels_last, x.dtype, len(x) > 1)
        result = choose(key, implementations, x, min_speedup=1.02)(x)
        return result.contiguous(memory_format=torch.channels_last) if channels_last else result

    def eager(self, x: torch.Tensor) -> torch.Tensor:
        return type(self.conv).forward(self.conv, x)

    def by_onednn(self, x: torch.Tensor) -> torch.Tensor:
        conv, size = self.conv, x.shape[2:]
        if self.packed is None or self.packed[0] != size:
            left, right, top, bottom = amounts = conv.padding_of(x)
            uneven = left != right or top != bottom  # oneDNN pads both sides equally
            padding = (0, 0) if uneven else (top, left)
            shape = (F.pad(x, amounts) if uneven else x).shape
            weight = kernels.pack_convolution(conv.kernel(), padding, conv.stride, shape)
            self.packed = size, amounts if uneven else None, padding, weight
        _, amounts, padding, weight = self.packed
        x = F.pad(x, amounts) if amounts else x
        return kernels.packed_convolution(x, weight, padding, conv.stride)

    def by_matmul(self, x: torch.Tensor) -> torch.Tensor:
        """A 1 x 1 kernel: a matmul of the pixels and packed weights."""
        if self.packed_pixel is None:
            self.packed_pixel = kernels.pack_linear(self.conv.kernel().flatten(1))
        pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C), a view of channels-last memory
        result = kernels.packed_linear(pixels.flatten(0, 2), self.packed_pixel, None)
        return result.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)  # (B, C', H, W)
