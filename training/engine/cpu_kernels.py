"""Faster forward and backward passes on CPUs, in the place of some of PyTorch's functions while a model trains.

For the Trainer, with any model: `with CPUKernels(): loss = ...; loss.backward()`. The model's code stays as it is.

    scaled_dot_product_attention   in bfloat16 written out as products and a softmax: the backward pass of PyTorch's
                                   CPU kernel takes four times longer, with few tokens eight times
    linear                         in bfloat16 with the bias inside oneDNN's product; in float32 by oneDNN on AMD,
                                   where it is the faster library
    layer_norm                     under autocast rounded once, where each layer that reads it would round it again
    gelu (tanh)                    in bfloat16 the erf form, 4.8e-4 apart at most and two to five times faster
    conv2d of patches              a matrix product; the convolution's weight gradient takes ten times longer

Each is used where it is the faster: large tensors that need a gradient. Everything else is PyTorch's own. Numbers
agree to rounding: in bfloat16 the scores of attention are rounded once more than PyTorch does, as under transformers'
eager attention, and gradients that meet at a norm are added in bfloat16. What was tried is in benchmarks/LOG.md.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..reporting.facts import processor_name


TOKENS = 1024  # more need the memory that flash attention saves
KEYS = 1 << 13  # elements of the keys of attention; fewer are too little work for Python
ELEMENTS = 1 << 20  # of other tensors
OPERATIONS = 1 << 28  # multiply-adds of a linear layer
ROWS = 64  # of a matrix that are transposed at a time


class CPUKernels(TorchFunctionMode):
    """Within it, the functions above are the faster ones for CPU tensors. May be entered any number of times.

    Forward and backward belong into the same one: activation checkpointing computes again what it computed.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.backward and not any((kwargs or {}).values()):
            with self:  # PyTorch leaves a mode while it runs what the mode may replace: here, the whole backward pass
                return torch.autograd.Variable._execution_engine.run_backward(
                    args, (torch.ones_like(args[0]),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        replacement = REPLACEMENTS.get(func)
        if replacement is not None and args and args[0].device.type == "cpu" and torch.is_grad_enabled():
            result = replacement(*args, **(kwargs or {}))
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


def kernels_for(device: torch.device, wanted: bool, compiled: bool) -> AbstractContextManager:
    """What updates on a device run in; torch.compile makes kernels of its own."""
    return CPUKernels() if wanted and device.type == "cpu" and not compiled else nullcontext()


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensor.dtype


# -- attention --------------------------------------------------------------------------------------------------------


class Attention(torch.autograd.Function):
    """softmax(scale q k^T) v with its gradients, `(B * k, M, d)` and twice `(B * k, N, d)`; the weights are kept."""

    @staticmethod
    def forward(ctx, query, key, value, scale):
        scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0, alpha=scale)  # (B * k, M, N)
        weights = torch._softmax(scores, -1, False)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return torch.bmm(weights, value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value, weights = ctx.saved_tensors
        nothing = query.new_empty(1)
        of_value = torch.bmm(weights.transpose(1, 2), gradient)
        of_weights = torch.bmm(gradient, value.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = torch.baddbmm(nothing, of_scores, key, beta=0, alpha=ctx.scale)
        of_key = torch.baddbmm(nothing, of_scores.transpose(1, 2), query, beta=0, alpha=ctx.scale)
        return of_query, of_key, of_value, None


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor | None:
    """As `F.scaled_dot_product_attention`; None where that is the better one."""
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if not plain or query.ndim != 4 or query.shape[:2] != key.shape[:2] or key.shape != value.shape:
        return None
    if key.shape[2] > TOKENS or key.numel() < KEYS:
        return None
    if _compute_dtype(query) != torch.bfloat16 or not query.requires_grad:
        return None
    with torch.autocast("cpu", enabled=False):
        flat = [x.bfloat16().flatten(0, 1) for x in (query, key, value)]  # (B * k, M, d), twice (B * k, N, d)
        return Attention.apply(*flat, query.shape[-1] ** -0.5 if scale is None else scale).view(query.shape)


# -- patches ----------------------------------------------------------------------------------------------------------


def patches(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> torch.Tensor | None:
    """As `F.conv2d` where the windows lie side by side, as in a patch embedding; None otherwise."""
    kernel = tuple(weight.shape[2:])
    plain = padding in (0, (0, 0)) and dilation in (1, (1, 1)) and groups == 1 and x.ndim == 4
    if not plain or kernel == (1, 1) or stride != kernel or x.numel() < ELEMENTS or not weight.requires_grad:
        return None
    (batch, channels, *size), (down, across) = x.shape, kernel
    rows, columns = size[0] // down, size[1] // across
    x = x[..., : rows * down, : columns * across].reshape(batch, channels, rows, down, columns, across)
    x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, -1)
    return F.linear(x, weight.flatten(1), bias).permute(0, 3, 1, 2)


# -- linear layers ----------------------------------------------------------------------------------------------------


def linear(x, weight, bias=None) -> torch.Tensor | None:
    """As `F.linear`; None where that is the better one."""
    if x.numel() * weight.shape[0] < OPERATIONS or not weight.requires_grad:
        return None
    dtype = _compute_dtype(x)
    if dtype == torch.bfloat16:
        function: type[torch.autograd.Function] = BFloat16Linear
    elif dtype == x.dtype == weight.dtype == torch.float32 and onednn_is_faster():
        function = OneDNNLinear
    else:
        return None
    with torch.autocast("cpu", enabled=False):
        return function.apply(x.to(dtype).reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


class BFloat16Linear(torch.autograd.Function):
    """x W^T + b in bfloat16, `(T, in)` and `(out, in)` -> `(T, out)`; gradients in the parameters' own precision."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        low = weight.bfloat16()
        ctx.save_for_backward(x, low)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return torch.ops.mkldnn._linear_pointwise(x, low, None if bias is None else bias.bfloat16(), "none", [], "")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        # oneDNN takes twice the time for a product with a transposed factor: the narrow one is turned before
        turned = _transposed(gradient) if gradient.shape[1] < x.shape[1] else gradient.t()
        return of_x, (turned @ x).to(of_weight), None if of_bias is None else gradient.sum(0).to(of_bias)


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """A contiguous transpose, by blocks that stay in the cache."""
    result = matrix.new_empty(matrix.shape[::-1])
    for part, rows in zip(result.split(ROWS, dim=1), matrix.split(ROWS)):
        part.copy_(rows.t())
    return result


class OneDNNLinear(torch.autograd.Function):
    """x W^T + b and its gradients by oneDNN, in float32; `(T, in)` and `(out, in)` -> `(T, out)`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), x.shape[0])
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous().to_mkldnn()
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.aten.mkldnn_linear_backward_input(x.shape, gradient, weight.detach()).to_dense()
        of_weight, of_bias = torch.ops.aten.mkldnn_linear_backward_weights(
            gradient, x.to_mkldnn(), weight.detach(), ctx.has_bias
        )
        return of_x, of_weight.to_dense(), of_bias.to_dense() if ctx.has_bias else None


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products are oneDNN's: on AMD, where MKL keeps to slower instructions (Zen 5: 178 against 425
    GFLOP/s). A rule and no measurement, whose noise would change what a seed computes.
    """
    return torch.backends.mkldnn.is_available() and "AMD" in processor_name()


# -- GELU and norms ---------------------------------------------------------------------------------------------------


def gelu(x, approximate="none") -> torch.Tensor | None:
    """As `F.gelu`, by the erf form in bfloat16; None for other precisions and small tensors."""
    if approximate != "tanh" or x.dtype != torch.bfloat16 or x.numel() < ELEMENTS or not x.requires_grad:
        return None
    return F.gelu(x)


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5) -> torch.Tensor | None:
    """As `F.layer_norm`, rounded to autocast's precision; None without autocast."""
    if x.dtype != torch.float32 or _compute_dtype(x) == x.dtype or x.numel() < ELEMENTS or not x.requires_grad:
        return None
    return F.layer_norm(x, normalized_shape, weight, bias, eps).to(_compute_dtype(x))


REPLACEMENTS: dict[Callable, Callable[..., torch.Tensor | None]] = {
    F.scaled_dot_product_attention: attention,
    F.conv2d: patches,
    F.linear: linear,
    F.gelu: gelu,
    F.layer_norm: layer_norm,
}
