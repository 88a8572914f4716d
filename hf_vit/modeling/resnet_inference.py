"""A hybrid's ResNet prepared for inference: packed convolutions, and by one kernel what stands between them.

This file travels to the Hub beside the weights: it imports only torch and its siblings.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .native import group_norm_, max_pool, takes_map
from .prepared import Prepared, Ways, is_watched, onednn_packs
from .resnet_stem import ResidualUnit, StdConv2d, same_amounts


class PreparedNorms(Prepared):
    """What is alike in the ResNet's root and its units: their GroupNorms by a kernel, with what follows them."""

    def ordinary(self) -> bool:
        ours = (type(one) is nn.GroupNorm for name, one in self.module.named_children() if name.startswith("gn"))
        return (
            super().ordinary()
            and all(ours)
            and all(type(one) is PreparedConvolution for one in self.prepared().values())
        )

    def prepared(self) -> dict[str, Any]:
        """What stands before the convolutions' `forward`."""
        convs = ((name, one) for name, one in self.module.named_children() if name.startswith("conv"))
        return {name: conv.__dict__.get("forward") for name, conv in convs}

    def build(self) -> None:
        self.inside = [one for one in self.module.children() if isinstance(one, nn.Conv2d | nn.GroupNorm)]
        self.norms = {
            name: (one.weight.float(), one.bias.float(), one.eps, one.num_groups)
            for name, one in self.module.named_children()
            if isinstance(one, nn.GroupNorm)
        }
        self.convs = self.prepared()
        for conv in self.convs.values():
            conv.prepare()

    def takes(self, x: torch.Tensor) -> bool:
        return takes_map(x) and not any(map(is_watched, self.inside))

    def convolved(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A map of its own in channels-last memory."""
        return self.convs[name].run(x).contiguous(memory_format=torch.channels_last)


class PreparedStem(PreparedNorms):
    """A hybrid's ResNet, in the order of memory that is the faster."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        ways: Ways = {"fused": self.fused} if self.takes(x.to(memory_format=torch.channels_last)) else {}
        ways |= {
            "channels first": self.plain,
            "channels last": lambda x: self.plain(x.contiguous(memory_format=torch.channels_last)),
        }
        return self.choose(("stem", *x.shape[2:], x.dtype, len(ways)), ways, x[:1])(x)

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolved("conv_root", x.contiguous(memory_format=torch.channels_last))
        x = group_norm_(x, self.norms["gn_root"])
        x = max_pool(x, same_amounts(x, 3, 2))
        for stage in self.module.stages:
            x = stage(x)
        return x


class PreparedUnit(PreparedNorms):
    """A residual unit."""

    def serves(self, x: torch.Tensor, kwargs: dict) -> bool:
        return super().serves(x, kwargs) and self.takes(x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        norms = self.norms
        y = group_norm_(self.convolved("conv1", x), norms["gn1"])
        y = group_norm_(self.convolved("conv2", y), norms["gn2"])
        y = self.convolved("conv3", y)
        if self.module.has_projection:
            return group_norm_(y, norms["gn3"], norms["gn_proj"], rest=self.convolved("conv_proj", x))
        return group_norm_(y, norms["gn3"], rest=x)


class PreparedConvolution(Prepared):
    """A standardised convolution of the ResNet."""

    def build(self) -> None:
        self.chosen: dict[tuple, Callable] = {}
        self.forget()

    def forget(self) -> None:
        """What is packed; the way that is taken packs again."""
        self.packed: tuple | None = None
        self.rows: torch.Tensor | None = None

    def run(self, x: torch.Tensor) -> torch.Tensor:
        key = x.shape, x.stride(), x.dtype
        if key not in self.chosen:
            self.chosen[key] = self.fastest_for(x)
            self.forget()
        return self.chosen[key](x)

    def fastest_for(self, x: torch.Tensor) -> Callable:
        conv = self.module
        last = x.is_contiguous(memory_format=torch.channels_last)
        ways: Ways = {"eager": self.plain}
        if onednn_packs(x):
            ways = {"eager": self.plain, "packed": self.by_onednn}
            if last and conv.kernel_size == conv.stride == (1, 1):
                ways = {"product": self.by_product} | ways
        case = ("convolution", *conv.weight.shape, *conv.stride, *x.shape[2:], last, x.dtype, len(x) > 1)
        return self.choose(case, ways, x)

    def by_onednn(self, x: torch.Tensor) -> torch.Tensor:
        conv, one = self.module, [1, 1]
        stride, size = list(conv.stride), x.shape[2:]
        if self.packed is None or self.packed[0] != size:
            left, right, top, bottom = amounts = conv.padding_of(x)
            apart = left != right or top != bottom
            padding = [0, 0] if apart else [top, left]
            shape = list((F.pad(x, amounts) if apart else x).shape)
            weight = torch.ops.mkldnn._reorder_convolution_weight(conv.kernel(), padding, stride, one, 1, shape)
            self.packed = size, amounts if apart else None, padding, weight
        _, amounts, padding, weight = self.packed
        x = F.pad(x, amounts) if amounts else x
        return torch.ops.mkldnn._convolution_pointwise(x, weight, None, padding, stride, one, 1, "none", [], "")

    def by_product(self, x: torch.Tensor) -> torch.Tensor:
        """A kernel of one pixel: a product of the pixels and packed weights."""
        if self.rows is None:
            self.rows = torch.ops.mkldnn._reorder_linear_weight(self.module.kernel().flatten(1))
        pixels = x.permute(0, 2, 3, 1)
        result = torch.ops.mkldnn._linear_pointwise(pixels.flatten(0, 2), self.rows, None, "none", [], "")
        return result.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)


def prepare_resnet(stem: nn.Module, choices: dict[tuple, str]) -> list[Prepared]:
    """For the ResNet, its units and their convolutions what stands before their `forward`."""
    prepared: list[Prepared] = [PreparedStem(stem, choices)]
    prepared += [PreparedUnit(unit, choices) for unit in stem.modules() if isinstance(unit, ResidualUnit)]
    prepared += [PreparedConvolution(conv, choices) for conv in stem.modules() if isinstance(conv, StdConv2d)]
    return prepared
