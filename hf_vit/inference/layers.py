"""The patch projection and the encoder blocks, computed by the fastest implementations of this machine.

The only copy of a block's arithmetic outside the model; `int8.py` replaces its linear layers and `token_merging.py`
adds a step between its two halves. `kernel_table.py` chooses the implementation.

Tests: tests/hf_vit/inference/test_optimize.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, GELUTanh

from .. import capabilities
from ..kernel_table import choose
from . import kernels
from .wrapper import OptimizedModule


MAX_TOKENS_AT_ONCE = 1600  # of a group of whole images: activations between the layers then stay in the caches
MAX_MEASURED_TOKENS = 1024  # attention of a larger batch is measured on a part of it
MLP_PART = 1024  # hidden features that are computed at a time, for at least as many tokens

Linear = Callable[..., tuple[torch.Tensor, ...]]  # x `(B, N, in)` and a residual -> for each weight `(B, N, out)`


class BlockLinears(NamedTuple):
    """The linear layers of a block, fused with the LayerNorm before and the GELU or residual after them."""

    qkv: Linear
    out: Linear
    fc1: Linear
    fc2: Linear


# -- linear layers


class FusedLinear:
    """`activation(norm(x) W^T + b)`, or `x W^T + b + residual`; of several W (q, k and v) side by side.

    Args:
        parts: weights `(out, in)` and biases `(out,)` or None.
        norm: applied to x.
        activation: applied to the result.
    """

    def __init__(
        self,
        parts: list[tuple[torch.Tensor, torch.Tensor | None]],
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ):
        self.parts, self.norm, self.activation = parts, norm, activation
        self.widths = [len(weight) for weight, _ in parts]
        weight = parts[0][0]
        self.gelu = gelu_form(activation, weight.dtype)
        self.implementations: dict[str, Linear] = {"eager": self.eager}
        if weight.device.type == "cpu" and capabilities.packs_linear(weight.dtype):
            self.implementations["packed"] = self.packed
            if self.gelu is not None:
                self.implementations["packed, GELU apart"] = self.packed_then_gelu
            if weight.dtype == torch.float32 and activation is None and capabilities.packs_linear_by_mkl():
                self.implementations["packed by MKL"] = self.packed_by_mkl
        elif len(parts) > 1:  # packing joins q, k and v already
            self.implementations["joined"] = self.joined
        # packed at the first call of an implementation that needs it: memory only for the one that is chosen
        self._mkl_packed: torch.Tensor | None = None
        self._mkl_rows = self._last_rows = 0

    def __call__(self, x: torch.Tensor, *residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(B, N, in)` -> for each W `(B, N, out)`; a `residual` of that shape is added."""
        if self.norm is not None:
            x = self.norm(x)
        rows = x.reshape(-1, x.shape[-1])
        flat = [y.reshape(-1, y.shape[-1]) for y in residual]
        activation = type(self.activation).__name__
        key = ("linear", *self.widths, rows.shape[1], activation, len(residual), rows.dtype, len(rows).bit_length())
        # 2 % is enough: cold weights are measured as a model finds them, and the whole block is measured again
        linear = choose(key, self.implementations, rows, *flat, min_speedup=1.02)
        return tuple(result.view(*x.shape[:-1], -1) for result in linear(rows, *flat))

    def eager(self, rows: torch.Tensor, *residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self._finish(F.linear(rows, weight, bias), *residual) for weight, bias in self.parts)

    def joined(self, rows: torch.Tensor, *residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._finish(F.linear(rows, *self.joined_weights), *residual).split(self.widths, dim=1)

    def packed(self, rows: torch.Tensor, *residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """By oneDNN, which applies the GELU and adds the residual while the result is in the cache."""
        if residual:
            return (kernels.packed_linear_add(rows, residual[0], *self.packed_weights),)
        result = kernels.packed_linear(rows, *self.packed_weights, self.gelu)
        if self.gelu is None and self.activation is not None:
            result = self.activation(result)
        return result.split(self.widths, dim=1)

    def packed_then_gelu(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """By oneDNN, whose own GELU is slow on processors without AVX-512."""
        x = kernels.packed_linear(rows, *self.packed_weights)
        if self.gelu == "tanh" and x.dtype == torch.float32 and kernels.float32_library() is not None:
            return (kernels.gelu_tanh(x, out=x),)
        assert self.gelu is not None
        return (kernels.gelu_(x, self.gelu),)

    def packed_by_mkl(self, rows: torch.Tensor, *residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """By MKL, which packs for one number of rows: the first, or another that comes twice in succession."""
        count, self._last_rows, last = len(rows), len(rows), self._last_rows
        if self._mkl_packed is None or count == last != self._mkl_rows:
            weight, self._mkl_bias = self.join()
            self._mkl_packed, self._mkl_rows = kernels.pack_linear_by_mkl(weight, count), count
        if count != self._mkl_rows:
            return self.eager(rows, *residual)
        shape = self.parts[0][0][:1].expand(sum(self.widths), -1)  # only its sizes are read
        result = kernels.packed_linear_by_mkl(rows, self._mkl_packed, shape, self._mkl_bias)
        return self._finish(result, *residual).split(self.widths, dim=1)

    def join(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All weights concatenated, and all biases."""
        if len(self.parts) == 1:
            return self.parts[0]
        weights = torch.cat([weight for weight, _ in self.parts])
        biases = [bias for _, bias in self.parts if bias is not None]
        return weights, torch.cat(biases) if biases else None

    @functools.cached_property
    def packed_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.join()
        return kernels.pack_linear(weight), bias

    @functools.cached_property
    def joined_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.join()

    def _finish(self, x: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
        """Add and activate in place: x is a fresh result."""
        for y in residual:
            x.add_(y)
        if self.activation is None:
            return x
        return kernels.gelu_(x, self.gelu) if self.gelu else self.activation(x)


class ModuleLinear:
    """The same interface over a block's own modules, which may have gradients, hooks and LoRA."""

    def __init__(
        self,
        modules: list[nn.Module],
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
        scale: nn.Module | None = None,
    ):
        self.modules, self.norm = modules, norm
        self.after = [module for module in (activation, scale) if module is not None]

    def __call__(self, x: torch.Tensor, *residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.norm is not None:
            x = self.norm(x)
        results = []
        for module in self.modules:
            y = module(x)
            for function in self.after:
                y = function(y)
            results.append(residual[0] + y if residual else y)
        return tuple(results)


def gelu_form(activation: nn.Module | None, dtype: torch.dtype) -> str | None:
    """The `approximate` argument of a GELU, "none" (erf) or "tanh"; None for other activations.

    In bfloat16 the erf form serves for both: they differ by at most 4.8e-4, less than bfloat16 rounds, and it is three
    times as fast.
    """
    forms: dict[type, str] = {GELUActivation: "none", GELUTanh: "tanh"}
    form = forms.get(type(activation))
    return "none" if form and dtype == torch.bfloat16 else form


def with_scale(linear: nn.Linear, layer_scale: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a linear layer, multiplied by the LayerScale (or identity) that follows it."""
    if isinstance(layer_scale, nn.Identity):
        return linear.weight, linear.bias
    factor = layer_scale.get_parameter("lambda1")
    return linear.weight * factor[:, None], linear.bias * factor


# -- attention


def attend_by_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Eqs. 6 and 7, `(B, k, N, d)` each -> `(B, k, N, d)`, by torch's fused kernel; `bias` is added to the scores."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def attend_by_matmul(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same as two matmuls and a softmax, which is faster in bfloat16 on some processors."""
    scores = torch.matmul(query * scale, key.transpose(2, 3))  # (B, k, N, N)
    if bias is not None:
        scores += bias
    return torch.matmul(scores.softmax(dim=-1), value)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Eqs. 6 and 7 by the fastest implementation for these shapes."""
    implementations: dict[str, Callable] = {"sdpa": attend_by_sdpa, "matmul": attend_by_matmul}
    if kernels.tiles_take(query, key, value):
        implementations["tiles"] = kernels.attend_by_tiles
    if kernels.vectors_take(query, key, value):
        implementations["vectors"] = kernels.attend_by_vectors
    images = max(1, min(len(query), MAX_MEASURED_TOKENS // query.shape[2]))
    table_key = ("attention", *query.shape[1:], key.shape[2], bias is not None, query.dtype, images)
    inputs = query[:images], key[:images], value[:images], scale, None if bias is None else bias[:images]
    return choose(table_key, implementations, *inputs)(query, key, value, scale, bias)


# -- the wrappers


class OptimizedPatches(OptimizedModule):
    """x_p E of Eq. 1: a convolution without overlap is one matmul of all patches."""

    def is_supported(self) -> bool:
        return super().is_supported() and type(self.plain) is nn.Conv2d

    def build(self) -> None:
        self.__dict__["linear"] = FusedLinear([(self.plain.weight.flatten(1), self.plain.bias)])

    def run(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        """`(B, C, H, W)` -> `(B, D, rows, columns)`, in memory `(B, rows, columns, D)`."""
        implementations = {"convolution": self.run_plain, "matmul": self.by_matmul}
        key = ("patches", *self.plain.weight.shape, *x.shape[1:], x.dtype, len(x).bit_length())
        return choose(key, implementations, x)(x)

    def by_matmul(self, x: torch.Tensor) -> torch.Tensor:
        down, across = self.plain.stride
        rows, columns = x.shape[2] // down, x.shape[3] // across
        x = x[:, :, : rows * down, : columns * across].unflatten(3, (columns, across)).unflatten(2, (rows, down))
        patches = x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), rows * columns, -1)  # (B, N, C * P * P)
        return self.linear(patches)[0].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


class OptimizedLayer(OptimizedModule):
    """A block of the encoder, Eqs. 2 and 3.

    Settings:
        merging: merges tokens between the two halves (`token_merging.py`), or None.
        fast: False: tokens are merged, and the block's own modules compute.
    """

    merging: Any = None
    fast = True

    def forward(self, x: torch.Tensor, tokens: int | None = None, **kwargs) -> torch.Tensor:
        """`(B, N, D)` -> `(B, N, D)`, or `(B, tokens, D)`: only the first tokens, which attend to all N."""
        if self.merging is None or self.plain.training:
            return self.run(x, tokens) if self.serves(x, kwargs) else self.run_plain(x, tokens=tokens, **kwargs)
        self.merging.begin(self, kwargs)
        if self.fast and self.serves(x, kwargs):
            return self.block(x, None, self.linears)
        return self.block(x, None, self.module_linears())

    def serves(self, x: torch.Tensor, kwargs: dict) -> bool:
        if kwargs.get("output_attentions") or self.plain.attention.config.output_attentions:
            return False
        return super().serves(x, kwargs)

    def is_supported(self) -> bool:
        return super().is_supported() and all(type(linear) is nn.Linear for linear in self.plain_linears())

    def plain_linears(self) -> tuple:
        """q, k, v, o, fc1 and fc2 of the plain block."""
        attention, mlp = self.plain.attention, self.plain.mlp
        return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.fc1, mlp.fc2

    # -- linear layers

    def build(self) -> None:
        layer = self.plain
        query, key, value, out, fc1, fc2 = self.plain_linears()
        weight, bias = with_scale(fc2, layer.layer_scale2)
        activation = layer.mlp.activation_fn
        self.__dict__["linears"] = BlockLinears(
            qkv=FusedLinear([(part.weight, part.bias) for part in (query, key, value)], norm=layer.layernorm_before),
            out=FusedLinear([with_scale(out, layer.layer_scale1)]),
            fc1=FusedLinear([(fc1.weight, fc1.bias)], layer.layernorm_after, activation),
            fc2=FusedLinear([(weight, bias)]),
        )
        parts = []
        width = fc1.out_features
        packs = weight.device.type == "cpu" and capabilities.packs_linear(torch.bfloat16)
        if weight.dtype == torch.bfloat16 and packs and width > MLP_PART and width % MLP_PART == 0:
            for start in range(0, width, MLP_PART):
                part = slice(start, start + MLP_PART)
                hidden = FusedLinear([(fc1.weight[part], fc1.bias[part])], activation=activation)
                parts.append((hidden, FusedLinear([(weight[:, part], None if start else bias)])))
        self.__dict__["mlp_parts"] = parts

    def module_linears(self) -> BlockLinears:
        layer = self.plain
        query, key, value, out, fc1, fc2 = self.plain_linears()
        return BlockLinears(
            qkv=ModuleLinear([query, key, value], norm=layer.layernorm_before),
            out=ModuleLinear([out], scale=layer.layer_scale1),
            fc1=ModuleLinear([fc1], layer.layernorm_after, layer.mlp.activation_fn),
            fc2=ModuleLinear([fc2], scale=layer.layer_scale2),
        )

    # -- the block

    def run(self, x: torch.Tensor, tokens: int | None = None, **kwargs) -> torch.Tensor:
        msa = self.plain.attention
        key = ("block", *x.shape[1:], msa.head_dim, self.plain.mlp.fc1.out_features, tokens)
        key += (x.dtype, len(x).bit_length(), kernels.tiles_take(x[None]))
        plain, optimized = functools.partial(self.run_plain, tokens=tokens), functools.partial(self.groups, tokens)
        # whatever single operations gain, the whole must not be slower than the plain block
        return choose(key, {"plain": plain, "optimized": optimized}, x, min_speedup=1.0)(x)

    def groups(self, tokens: int | None, x: torch.Tensor) -> torch.Tensor:
        """The block, a group of images at a time."""
        images = max(1, MAX_TOKENS_AT_ONCE // x.shape[1])
        results = [self.block(group, tokens, self.linears) for group in x.split(images)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def block(self, x: torch.Tensor, tokens: int | None, linears: BlockLinears) -> torch.Tensor:
        """`(B, N, D)` -> `(B, N, D)`, or `(B, tokens, D)`."""
        msa = self.plain.attention
        query, key, value = (self.split_heads(part) for part in linears.qkv(x))  # Eq. 5: (B, k, N, d) each
        query, key = self.normalize(msa.q_norm, query[:, :, :tokens]), self.normalize(msa.k_norm, key)
        bias = None if self.merging is None else self.merging.bias(query)
        # the tiles have no gradient, and the table on disk cannot be read while compiling
        attention = attend_by_sdpa if torch.is_grad_enabled() or torch.compiler.is_compiling() else attend
        heads = attention(query, key, value, msa.scaling, bias)  # Eqs. 6 and 7: (B, k, N, d)
        (x,) = linears.out(heads.transpose(1, 2).flatten(2), x[:, :tokens])  # Eqs. 8 and 2: (B, N, D)
        if self.merging is not None:
            x = self.merging(x, key)  # (B, N - r, D)
        return self.add_mlp(x, linears)  # Eq. 3

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` -> `(B, k, N, d)`."""
        return x.unflatten(2, (-1, self.plain.attention.head_dim)).transpose(1, 2)

    def normalize(self, norm: nn.Module, heads: torch.Tensor) -> torch.Tensor:
        """LayerNorm of queries or keys, or the identity; int8 changes the dtype."""
        return norm(heads)

    def add_mlp(self, x: torch.Tensor, linears: BlockLinears) -> torch.Tensor:
        """Eq. 3: `(B, N, D)` -> `(B, N, D)`."""

        def whole(x: torch.Tensor) -> torch.Tensor:
            return linears.fc2(*linears.fc1(x), x)[0]

        tokens = x.shape[0] * x.shape[1]
        if linears is not self.__dict__.get("linears") or not self.mlp_parts or tokens < MLP_PART:
            return whole(x)
        key = ("mlp", x.shape[2], self.plain.mlp.fc1.out_features, x.dtype, tokens.bit_length())
        return choose(key, {"whole": whole, "in parts": self.add_mlp_in_parts}, x)(x)

    def add_mlp_in_parts(self, x: torch.Tensor) -> torch.Tensor:
        """A part of the hidden features at a time, which fits the caches; the sum is rounded after each part."""
        normed = self.plain.layernorm_after(x)
        for fc1, fc2 in self.mlp_parts:
            (x,) = fc2(*fc1(normed), x)
        return x
