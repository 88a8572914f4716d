"""The hybrid's ResNet (paper section 3.1), whose feature map takes the place of the image.

Post-activation bottlenecks (ResNet v1.5) with GroupNorm and weight-standardized convolutions, padded as XLA's SAME.
This file travels to the Hub beside the weights: it imports only torch.

Not transformers' `models/bit`: its weight standardization adds eps to the variance, Google's to the std.

Source: google-research/vision_transformer `vit_jax/models_resnet.py` and `models_vit.py` lines 230-259 at c6de1e5.
Parameter names are Google's, stages and units counted from 0.
"""

import torch
import torch.nn.functional as F
from torch import nn


GROUPS = 32  # of every GroupNorm, whatever its width


def same_amounts(x: torch.Tensor, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """XLA's SAME padding of `(B, C, H, W)` as (left, right, top, bottom): an odd pixel goes to the bottom and right.

    A VALID convolution of the padded input has ceil(H / stride) rows.
    """
    height, width = x.shape[-2:]
    down = max((-(-height // stride) - 1) * stride + kernel - height, 0)
    right = max((-(-width // stride) - 1) * stride + kernel - width, 0)
    return right // 2, right - right // 2, down // 2, down - down // 2


def same_padding(x: torch.Tensor, kernel: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """Pad `(B, C, H, W)` as XLA's SAME does."""
    return F.pad(x, same_amounts(x, kernel, stride), value=value)


def with_role(module: nn.Module, role: str):
    """Mark a module with its part in the network, on which its initialization depends; returns the module."""
    module.role = role  # type: ignore[assignment]
    return module


class StdConv2d(nn.Conv2d):
    """Convolution without bias whose kernel is standardized per output channel (arXiv:1903.10520), SAME padding."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, eps: float, variant: str):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, bias=False)
        self.eps = eps
        self.variant = variant

    def standardized_weight(self) -> torch.Tensor:
        """Zero mean and unit population std over (in, height, width); eps outside or inside the root."""
        return standardize(self.weight, self.eps, self.variant)[0]

    def kernel(self) -> torch.Tensor:
        """The standardized weight; without gradients it is computed once and cached until the weight changes.

        A change shows in the weight's version (`load_state_dict`, averages) or address, by a new parameter (FSDP), or
        is assumed after `train()`, `eval()` and forward passes with gradients: fused optimizers change a weight
        without raising its version. `weight.data` must not be written to. Compiled and traced code does not cache.
        """
        weight = self.weight
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
        # a sharded or quantized weight is another class, and a tensor of inference mode has no version
        if traced or type(weight) is not nn.Parameter or weight.is_inference():
            return self.standardized_weight()
        if torch.is_grad_enabled() and weight.requires_grad:
            self._clear_cache()
            with torch.no_grad():
                # by its closed-form gradient: autograd would keep the intermediate tensors of every convolution
                standardized, *factors = standardize(weight, self.eps, self.variant)
            return StandardizationGradient.apply(weight, standardized, *factors)
        fingerprint = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
        if self._cached is None or self._cached[0] != fingerprint:
            # outside inference mode: a tensor made there could not be used with gradients later
            with torch.inference_mode(False), torch.no_grad():
                self._cached = fingerprint, standardize(weight, self.eps, self.variant)[0]
        return self._cached[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right, top, bottom = amounts = self.padding_of(x)
        if left == right and top == bottom:  # the convolution pads by itself: no padded copy
            return F.conv2d(x, self.kernel(), stride=self.stride, padding=(top, left))
        return F.conv2d(F.pad(x, amounts), self.kernel(), stride=self.stride)

    def padding_of(self, x: torch.Tensor) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) of SAME padding for an input `(B, C, H, W)`."""
        return same_amounts(x, self.kernel_size[0], self.stride[0])

    _cached: tuple | None = None  # (fingerprint of the weight, its standardized value)

    def __setattr__(self, name: str, value) -> None:
        if name == "weight":  # also when FSDP puts the gathered weight in its place, at an unchanged version
            self._clear_cache()
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> "StdConv2d":
        self._clear_cache()
        return super().train(mode)

    def _clear_cache(self) -> None:
        self.__dict__.pop("_cached", None)

    def __getstate__(self) -> dict:  # copies and pickles make their own
        return {name: value for name, value in self.__dict__.items() if name != "_cached"}


def standardize(weight: torch.Tensor, eps: float, variant: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standardize a kernel `(out, in, height, width)` per output channel, by `config.weight_standardization`.

    Returns:
        the standardized kernel w^, and the factors r and t of its gradient, `(out, 1, 1, 1)` each.
    """
    centered = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    variance = centered.square().mean(dim=(1, 2, 3), keepdim=True)
    if variant == "std_plus_eps":
        std = variance.sqrt()
        return centered / (std + eps), 1 / (std + eps), 1 / std
    scale = torch.rsqrt(variance + eps)
    return centered * scale, scale, scale


class StandardizationGradient(torch.autograd.Function):
    """The gradient of w^ = r (w - mean w), for w^ that is already computed: r (g - mean g) - t mean(g w^) w^."""

    @staticmethod
    def forward(ctx, weight, standardized, r, t):
        ctx.save_for_backward(standardized, r, t)
        return standardized.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        standardized, r, t = ctx.saved_tensors
        per_output = {"dim": (1, 2, 3), "keepdim": True}
        centered = gradient - gradient.mean(**per_output)
        return r * centered - t * (gradient * standardized).mean(**per_output) * standardized, None, None, None


class ResidualUnit(nn.Module):
    """Bottleneck of width f: 1x1, 3x3 with the stride (v1.5), 1x1 to 4 f; the ReLU comes after the sum."""

    def __init__(self, config, in_channels: int, features: int, stride: int):
        super().__init__()

        def conv(inputs: int, outputs: int, kernel: int, step: int = 1) -> StdConv2d:
            return StdConv2d(
                inputs, outputs, kernel, step, config.weight_standardization_eps, config.weight_standardization
            )

        def norm(channels: int) -> nn.GroupNorm:
            return nn.GroupNorm(GROUPS, channels, eps=config.group_norm_eps)

        self.conv1, self.gn1 = conv(in_channels, features, 1), norm(features)
        self.conv2, self.gn2 = conv(features, features, 3, stride), norm(features)
        self.conv3, self.gn3 = conv(features, 4 * features, 1), with_role(norm(4 * features), "end_of_branch")
        self.has_projection = in_channels != 4 * features or stride != 1
        if self.has_projection:
            self.conv_proj, self.gn_proj = conv(in_channels, 4 * features, 1, stride), norm(4 * features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.gn_proj(self.conv_proj(x)) if self.has_projection else x
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        y = self.gn3(self.conv3(y))
        return F.relu(residual + y)


class ResNetStage(nn.Module):
    """Residual units of one width; the first of them has the stride."""

    def __init__(self, config, in_channels: int, features: int, depth: int, stride: int):
        super().__init__()
        self.units = nn.ModuleList(
            ResidualUnit(config, in_channels if unit == 0 else 4 * features, features, stride if unit == 0 else 1)
            for unit in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for unit in self.units:
            x = unit(x)
        return x


class ResNetStem(nn.Module):
    """Root (stride 4) and the stages of `config.resnet_depths`, each but the first of stride 2.

    `(B, C, H, W)` -> `(B, config.stem_channels, H', W')`, H' = H / 4 / 2^(stages - 1), rounded up at each halving.
    """

    def __init__(self, config):
        super().__init__()
        width = int(64 * config.resnet_width_factor)
        self.conv_root = StdConv2d(
            config.num_channels, width, 7, 2, config.weight_standardization_eps, config.weight_standardization
        )
        self.gn_root = nn.GroupNorm(GROUPS, width, eps=config.group_norm_eps)
        in_channels, stages = width, []
        for index, depth in enumerate(config.resnet_depths):
            stages.append(ResNetStage(config, in_channels, width * 2**index, depth, stride=1 if index == 0 else 2))
            in_channels = 4 * width * 2**index
        self.stages = nn.ModuleList(stages)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.gn_root(self.conv_root(pixel_values)))  # (B, width, H/2, W/2)
        # -inf, not zero: padding must never be the largest
        x = F.max_pool2d(same_padding(x, 3, 2, value=float("-inf")), 3, stride=2)  # (B, width, H/4, W/4)
        for stage in self.stages:
            x = stage(x)  # (B, 4 * width * 2^stage, H', W')
        return x  # without a norm: Google's has none after the last stage
