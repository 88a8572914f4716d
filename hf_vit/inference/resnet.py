"""A hybrid's ResNet: packed convolutions, and one kernel for a GroupNorm and the addition and ReLU after it.

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


MAX_MEASURED_IMAGES = 8  # a larger batch is measured on as many


class OptimizedStem(OptimizedModule):
    """The ResNet, in the order of memory that is the faster."""

    def is_supported(self) -> bool:
        """Whether convolutions and norms are the model's own; so named also in code from a Hub folder."""
        layers = [module for module in self.plain.modules() if not list(module.children())]
        ours = all(type(layer).__name__ == "StdConv2d" or type(layer) is nn.GroupNorm for layer in layers)
        return super().is_supported() and ours

    def build(self) -> None:
        stem = self.plain
        units = [FastUnit(unit) for stage in stem.stages for unit in stage.units]
        self.__dict__.update(root=FastConvolution(stem.conv_root), root_norm=FastNorm(stem.gn_root), units=units)

    def run(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        """`(B, C, H, W)` -> `(B, C', H', W')`."""
        some = x[:MAX_MEASURED_IMAGES]
        case = ("resnet", *self.plain.conv_root.weight.shape, len(self.units), *x.shape[2:], x.dtype)
        case += (len(some).bit_length(), kernels.maps_library() is not None)
        implementations = {"plain": self.run_plain, "channels first": self.stem, "channels last": self.channels_last}
        return choose(case, implementations, some, min_speedup=1.02)(x)

    def channels_last(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        x = self.root_norm(self.root(x))  # (B, width, H/2, W/2)
        if kernels.takes_map(x):
            x = kernels.max_pool(x, same_amounts(x, 3, 2))
        else:
            x = F.max_pool2d(same_padding(x, 3, 2, value=float("-inf")), 3, stride=2)
        for unit in self.units:  # (B, 4 * features, H', W')
            x = unit(x)
        return x


class FastUnit:
    """A residual unit."""

    def __init__(self, unit: Any):
        self.convs = [FastConvolution(conv) for conv in (unit.conv1, unit.conv2, unit.conv3)]
        self.norms = [FastNorm(norm) for norm in (unit.gn1, unit.gn2, unit.gn3)]
        self.conv_proj = FastConvolution(unit.conv_proj) if unit.has_projection else None
        self.gn_proj = FastNorm(unit.gn_proj) if unit.has_projection else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](self.convs[0](x))
        y = self.norms[1](self.convs[1](y))
        y = self.convs[2](y)
        rest = x if self.conv_proj is None else self.conv_proj(x)
        return self.norms[2](y, rest, self.gn_proj)


class FastNorm:
    """`relu(norm(x) + rest)`, by one kernel where x is in channels-last memory."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.as_float32 = norm.weight.float(), norm.bias.float(), norm.eps, norm.num_groups

    def __call__(
        self, x: torch.Tensor, rest: torch.Tensor | None = None, rest_norm: "FastNorm | None" = None
    ) -> torch.Tensor:
        """x, `(B, C, H, W)`, is overwritten; the rest is normalized by a norm of its own where it has one."""
        if kernels.takes_map(x):
            if rest is not None:
                rest = rest.contiguous(memory_format=torch.channels_last)
            norms = [self.as_float32] + ([rest_norm.as_float32] if rest_norm is not None else [])
            return kernels.group_norm_(x, *norms, rest=rest)
        y = self.norm(x)
        if rest is not None:
            y = y + (rest if rest_norm is None else rest_norm.norm(rest))
        return F.relu_(y)


class FastConvolution:
    """A standardized convolution, by the implementation that serves for the input's shape."""

    def __init__(self, conv: Any):
        self.conv = conv
        self.packed: tuple | None = None  # for one size of input
        self.packed_pixel: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` -> `(B, C', H', W')`, in memory of its own and the input's order."""
        conv = self.conv
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        implementations: dict[str, Callable] = {"eager": self.eager}
        if x.device.type == "cpu" and capabilities.packs_convolution(x.dtype):
            implementations["packed"] = self.by_onednn
            if channels_last and conv.kernel_size == conv.stride == (1, 1):
                implementations["matmul"] = self.by_matmul
        case = ("convolution", *conv.weight.shape, *conv.stride, *x.shape[2:], channels_last, x.dtype, len(x) > 1)
        result = choose(case, implementations, x, min_speedup=1.02)(x)
        return result.contiguous(memory_format=torch.channels_last) if channels_last else result

    def eager(self, x: torch.Tensor) -> torch.Tensor:
        return type(self.conv).forward(self.conv, x)

    def by_onednn(self, x: torch.Tensor) -> torch.Tensor:
        conv, size = self.conv, x.shape[2:]
        if self.packed is None or self.packed[0] != size:
            left, right, top, bottom = amounts = conv.padding_of(x)
            apart = left != right or top != bottom  # oneDNN pads both sides alike
            padding = (0, 0) if apart else (top, left)
            shape = (F.pad(x, amounts) if apart else x).shape
            weight = kernels.pack_convolution(conv.kernel(), padding, conv.stride, shape)
            self.packed = size, amounts if apart else None, padding, weight
        _, amounts, padding, weight = self.packed
        x = F.pad(x, amounts) if amounts else x
        return kernels.packed_convolution(x, weight, padding, conv.stride)

    def by_matmul(self, x: torch.Tensor) -> torch.Tensor:
        """A kernel of one pixel: a matmul of the pixels and packed weights."""
        if self.packed_pixel is None:
            self.packed_pixel = kernels.pack_linear(self.conv.kernel().flatten(1))
        pixels = x.permute(0, 2, 3, 1)
        result = kernels.packed_linear(pixels.flatten(0, 2), self.packed_pixel, None)
        return result.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)
