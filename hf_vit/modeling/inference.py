"""The network prepared for inference: the same products, the fastest way this machine has, found by measuring.

`model.optimize_for_inference()` puts a `Prepared` before the `forward` of every block and of what makes its tokens.
Weights stay where they are; what is prepared from them (joined, packed for oneDNN, LayerScale folded in) is a copy and
made again when they change. A call that needs the plain block gets it: training, gradients, autocast,
`torch.compile`, `output_attentions`, hooks inside the block, other layers in place of ours (LoRA). So a prepared model
trains, saves, loads, copies and compiles as before, at the speed of before.

This file travels to the Hub beside the weights: it imports only torch, transformers and its siblings.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, GELUTanh

from .native import attend_by_tiles, norm_to_int8, round_to_int8, tiles_take
from .prepared import Prepared, Ways, choose, is_watched, onednn_packs
from .resnet_inference import prepare_resnet


ROWS_AT_ONCE = 1600  # tokens of as many images go through a block together: what is between stays in the caches
MEASURED_TOKENS = 1024  # attention of more is measured on as many
MLP_PART = 1024  # so much of the hidden layer may be computed at a time, of as many tokens or more


def gelu_form(activation: nn.Module | None, dtype: torch.dtype) -> str | None:
    """The `approximate` of a GELU, "none" (erf) or "tanh"; None for other activations.

    In bfloat16 the erf form stands for both: they differ by 4.8e-4 at most, less than bfloat16 rounds, and it is
    computed three times as fast.
    """
    forms: dict[type, str] = {GELUActivation: "none", GELUTanh: "tanh"}
    form = forms.get(type(activation))
    return "none" if form and dtype == torch.bfloat16 else form


class Dense:
    """`activation(x W^T + b)` for the rows of x, or `x W^T + b + rest`; of several W (q, k and v) side by side.

    Args:
        parts: weights `(out, in)` and biases `(out,)` or None.
        choices: which way was the fastest for what shape, shared by all blocks.
        activation: applied to the result.
    """

    def __init__(
        self,
        parts: list[tuple[torch.Tensor, torch.Tensor | None]],
        choices: dict[tuple, str],
        activation: nn.Module | None = None,
    ):
        self.parts, self.choices, self.activation = parts, choices, activation
        self.widths = [len(weight) for weight, _ in parts]
        weight = parts[0][0]
        self.gelu = gelu_form(activation, weight.dtype)
        self.ways: Ways = {"eager": self.eager}
        if onednn_packs(weight):
            self.ways = {"packed": self.packed} | self.ways
            if weight.dtype == torch.float32 and activation is None and torch.backends.mkl.is_available():
                self.ways = {"packed by MKL": self.packed_by_mkl} | self.ways
        elif len(parts) > 1:
            self.ways["joined"] = self.joined
        self._joined: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._packed: torch.Tensor | None = None
        self._mkl: torch.Tensor | None = None
        self._mkl_rows = self._last_rows = 0

    def __call__(self, rows: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(rows, in)` -> for each W `(rows, out)`; `rest`, of that shape, is added."""
        key = (*self.widths, rows.shape[1], type(self.activation), rows.dtype, len(rows).bit_length())
        return choose(self.choices, key, self.ways, rows, *rest)(rows, *rest)

    def eager(self, rows: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self._finished(F.linear(rows, weight, bias), *rest) for weight, bias in self.parts)

    def joined(self, rows: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._joined = self._joined or self._join()
        return self._finished(F.linear(rows, *self._joined), *rest).split(self.widths, dim=1)

    def packed(self, rows: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """By oneDNN, which applies a GELU and adds the rest before a result leaves the cache."""
        if self._packed is None:
            weight, self._bias = self._join()
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        product = torch.ops.mkldnn._linear_pointwise
        if rest:
            return (product.binary(rows, *rest, self._packed, self._bias, "add"),)
        if self.gelu:
            return product(rows, self._packed, self._bias, "gelu", [], self.gelu).split(self.widths, dim=1)
        return self._finished(product(rows, self._packed, self._bias, "none", [], "")).split(self.widths, dim=1)

    def packed_by_mkl(self, rows: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """MKL packs for one number of rows: for the first, and for another one when it comes twice in a row."""
        count, self._last_rows, last = len(rows), len(rows), self._last_rows
        if self._mkl is None or count == last != self._mkl_rows:
            weight, self._mkl_bias = self._join()
            self._mkl, self._mkl_rows = torch.ops.mkl._mkl_reorder_linear_weight(weight, count), count
        if count != self._mkl_rows:
            return self.eager(rows, *rest)
        shape = self.parts[0][0][:1].expand(sum(self.widths), -1)  # of the weight; the values are not read
        result = torch.ops.mkl._mkl_linear(rows, self._mkl, shape, self._mkl_bias, count)
        return self._finished(result, *rest).split(self.widths, dim=1)

    def _join(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights = torch.cat([weight for weight, _ in self.parts])
        biases = [bias for _, bias in self.parts if bias is not None]
        return weights, torch.cat(biases) if biases else None

    def _finished(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        for one in rest:
            x.add_(one)
        if self.activation is None:
            return x
        return torch.ops.aten.gelu_(x, approximate=self.gelu) if self.gelu else self.activation(x)


def attend_by_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Eqs. 6 and 7, `(B, k, N, d)` each -> `(B, k, N, d)`, by torch's fused kernel; `bias` is added to the scores."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same as two products and a softmax: some processors are faster at it in bfloat16."""
    scores = torch.matmul(query * scale, key.transpose(2, 3))  # (B, k, N, N)
    if bias is not None:
        scores += bias
    return torch.matmul(scores.softmax(dim=-1), value)


class PreparedPatches(Prepared):
    """x_p E of Eq. 1, a convolution whose windows lie side by side: one product of all patches."""

    def ordinary(self) -> bool:
        return super().ordinary() and type(self.module) is nn.Conv2d

    def build(self) -> None:
        self.project = Dense([(self.module.weight.flatten(1), self.module.bias)], self.choices)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` -> `(B, D, rows, columns)`, in memory `(B, rows, columns, D)`."""
        ways: Ways = {"product": self.by_product, "convolution": self.plain}
        return self.choose(("patches", *x.shape[1:], x.dtype, len(x).bit_length()), ways, x)(x)

    def by_product(self, x: torch.Tensor) -> torch.Tensor:
        down, across = self.module.stride
        rows, columns = x.shape[2] // down, x.shape[3] // across
        x = x[:, :, : rows * down, : columns * across].unflatten(3, (columns, across)).unflatten(2, (rows, down))
        patches = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.module.weight[0].numel())  # (B * N, C * P * P)
        return self.project(patches)[0].view(len(x), rows, columns, -1).permute(0, 3, 1, 2)


class PreparedLayer(Prepared):
    """A block of the encoder."""

    def serves(self, x: torch.Tensor, kwargs: dict) -> bool:
        if kwargs.get("output_attentions") or self.module.attention.config.output_attentions:
            return False
        if not super().serves(x, kwargs):
            return False
        hooked = [module for module in self.inside if module._forward_hooks or module._forward_pre_hooks]
        return not any(map(is_watched, hooked))

    def ordinary(self) -> bool:
        return super().ordinary() and all(type(product) is nn.Linear for product in self.products())

    def products(self) -> tuple:
        attention, mlp = self.module.attention, self.module.mlp
        return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.fc1, mlp.fc2

    def build(self) -> None:
        layer = self.module
        self.inside = [module for module in layer.modules() if module is not layer]
        query, key, value, out, fc1, fc2 = self.products()
        self.qkv = Dense([(part.weight, part.bias) for part in (query, key, value)], self.choices)
        self.out = Dense([scaled(out, layer.layer_scale1)], self.choices)
        self.fc1 = Dense([(fc1.weight, fc1.bias)], self.choices, layer.mlp.activation_fn)
        weight, bias = scaled(fc2, layer.layer_scale2)
        self.fc2 = Dense([(weight, bias)], self.choices)
        self.parts: list[tuple[Dense, Dense]] = []
        width = fc1.out_features
        if weight.dtype == torch.bfloat16 and onednn_packs(weight) and width > MLP_PART and width % MLP_PART == 0:
            for at in range(0, width, MLP_PART):
                part = slice(at, at + MLP_PART)
                hidden = Dense([(fc1.weight[part], fc1.bias[part])], self.choices, layer.mlp.activation_fn)
                self.parts.append((hidden, Dense([(weight[:, part], None if at else bias)], self.choices)))

    def __call__(self, x: torch.Tensor, tokens: int | None = None, **kwargs) -> torch.Tensor:
        return self.run(x, tokens) if self.serves(x, kwargs) else self.plain(x, tokens=tokens, **kwargs)

    def run(self, x: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """`(B, N, D)` -> `(B, N, D)`, or only so many first `tokens`, to which the others give keys and values."""
        done = [self.block(part, tokens) for part in x.split(max(1, ROWS_AT_ONCE // x.shape[1]))]
        return done[0] if len(done) == 1 else torch.cat(done)

    def block(self, x: torch.Tensor, tokens: int | None) -> torch.Tensor:
        return self.mlp(self.attention(x, tokens))

    def attention(self, x: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """Eq. 2: LayerScale(MSA(LN(x))) + x of the first so many tokens, `(B, N, D)` -> `(B, tokens, D)`."""
        query, key, value = self.heads(x)
        mixed = self.attend(query[:, :, :tokens], key, value, self.module.attention.scaling)
        return self.project(mixed, x[:, :tokens].contiguous())

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of LN(x), Eq. 5: `(B, N, D)` -> `(B, k, N, d)` each."""
        msa = self.module.attention
        parts = self.qkv(self.module.layernorm_before(x).flatten(0, 1))  # (B * N, D) each
        query, key, value = (part.view(*x.shape[:2], -1, msa.head_dim).transpose(1, 2) for part in parts)
        return msa.q_norm(query), msa.k_norm(key), value

    def project(self, mixed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """LayerScale and Eq. 8, and the addition of Eq. 2: `(B, k, N, d)` and x `(B, N, D)` -> `(B, N, D)`."""
        rows = mixed.transpose(1, 2).reshape(-1, x.shape[2])
        return self.out(rows, x.flatten(0, 1))[0].view(x.shape)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ways: Ways = {"tiles": attend_by_tiles} if tiles_take(query, key, value) else {}
        ways |= {"sdpa": attend_by_sdpa, "products": attend_by_products}
        some = max(1, min(len(query), MEASURED_TOKENS // query.shape[2]))
        case = ("attention", *query.shape[1:], query.dtype, some)
        few = None if bias is None else bias[:some]
        return self.choose(case, ways, query[:some], key[:some], value[:some], scale, few)(
            query, key, value, scale, bias
        )

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Eq. 3: LayerScale(MLP(LN(x))) + x, `(B, N, D)` -> `(B, N, D)`."""
        rows = self.module.layernorm_after(x).flatten(0, 1)
        ways: Ways = {"in parts": self.in_parts} if self.parts and len(rows) >= MLP_PART else {}
        ways["whole"] = self.whole
        case = ("mlp", rows.shape[1], rows.dtype, len(rows).bit_length())
        return self.choose(case, ways, rows, x.flatten(0, 1))(rows, x.flatten(0, 1)).view(x.shape)

    def whole(self, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(*self.fc1(rows), x)[0]

    def in_parts(self, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A part of the hidden layer at a time, which the caches hold; each part's sum is rounded once."""
        for fc1, fc2 in self.parts:
            (x,) = fc2(*fc1(rows), x)
        return x


class Int8Layer(PreparedLayer):
    """A block of the encoder whose products are of int8 weights (one scale a row) and int8 activations.

    Within it tokens are float32, to which oneDNN adds its int32 sums in place: `project` and `mlp` overwrite them.

    Args:
        scales: what one step of an activation is worth, for the inputs of "qkv", "out", "fc1" and "fc2".
    """

    def __init__(self, module: nn.Module, choices: dict[tuple, str], scales: dict[str, float]):
        super().__init__(module, choices)
        self.scales = scales

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"scales": self.scales}

    def build(self) -> None:
        super().build()
        parts = {"qkv": self.qkv, "out": self.out, "fc1": self.fc1, "fc2": self.fc2}
        self.int8 = {name: int8_weight(*dense._join()) for name, dense in parts.items()}
        before, after = self.module.layernorm_before, self.module.layernorm_after
        self.norms = {"qkv": copy.deepcopy(before).float(), "fc1": copy.deepcopy(after).float()}

    def block(self, x: torch.Tensor, tokens: int | None) -> torch.Tensor:
        return super().block(x.to(torch.float32, copy=True), tokens).to(x.dtype)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        msa = self.module.attention
        joined = self.product("qkv", self.normed("qkv", x), torch.bfloat16)
        query, key, value = (
            part.view(*x.shape[:2], -1, msa.head_dim).transpose(1, 2) for part in joined.chunk(3, dim=1)
        )
        if isinstance(msa.q_norm, nn.Identity):
            return query, key, value
        dtype = msa.q_proj.weight.dtype
        return msa.q_norm(query.to(dtype)).bfloat16(), msa.k_norm(key.to(dtype)).bfloat16(), value

    def project(self, mixed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = mixed.transpose(1, 2).reshape(-1, x.shape[2])
        return self.added("out", round_to_int8(rows, self.scales["out"]), x)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.product("fc1", self.normed("fc1", x), torch.int8, "gelu", self.scales["fc2"])
        return self.added("fc2", hidden, x)

    def normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """LN(x) before this product, `(B, N, D)`, as int8 steps `(B * N, D)`; more than calibration saw is cut."""
        return norm_to_int8(x, self.norms[name], self.scales[name]).flatten(0, 1)

    def product(
        self, name: str, rows: torch.Tensor, dtype: torch.dtype, activation: str = "none", step: float = 1.0
    ) -> torch.Tensor:
        """`activation(x W^T + b)` in this dtype; int8 results count in steps of `step`."""
        packed, weight_scales, zeros, bias = self.int8[name]
        form = "none" if activation == "gelu" else ""
        return torch.ops.onednn.qlinear_pointwise(
            rows, self.scales[name], 0, packed, weight_scales, zeros, bias, step, 0, dtype, activation, [], form
        )

    def added(self, name: str, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x + rows W^T + b, `(B, N, D)`; a contiguous float32 x becomes it."""
        packed, weight_scales, zeros, bias = self.int8[name]
        total = x.float().contiguous()
        torch.ops.onednn.qlinear_pointwise.binary(
            rows, self.scales[name], 0, packed, weight_scales, zeros, total.flatten(0, 1), bias,
            1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "",
        )  # fmt: skip
        return total.to(x.dtype)


def int8_weight(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    """A weight in oneDNN's int8 layout, its scales and zero points for each row, and the bias in float32."""
    scales = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    steps = (weight.float() / scales[:, None]).round().to(torch.int8)
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    return torch.ops.onednn.qlinear_prepack(steps, None), scales, zeros, None if bias is None else bias.float()


@torch.no_grad()
def measure_scales(encoder: Any, pixel_values: torch.Tensor) -> list[dict[str, float]]:
    """For each block the scales that an `Int8Layer` takes: the largest activations that these pictures cause, by 127.

    Raises:
        ValueError: blocks that have no int8 form: another activation than GELU, other layers than ours, not on a CPU.
    """
    wanted = []
    for layer in encoder.layers:
        plain = PreparedLayer(layer, {})
        if not plain.ordinary() or gelu_form(layer.mlp.activation_fn, torch.bfloat16) is None:
            raise ValueError("int8 needs the layers of this package with a GELU between fc1 and fc2")
        if not onednn_packs(layer.mlp.fc1.weight):
            raise ValueError("int8 products are oneDNN's: the model has to be on a CPU, in float32 or bfloat16")
        query, _, _, out, fc1, fc2 = plain.products()
        wanted.append({"qkv": query, "out": out, "fc1": fc1, "fc2": fc2})
    largest = [dict.fromkeys(products, 0.0) for products in wanted]

    def keep(found: dict[str, float], name: str) -> Callable:
        def hook(module, args) -> None:
            found[name] = max(found[name], args[0].abs().max().item())

        return hook

    hooks = [
        product.register_forward_pre_hook(keep(found, name))
        for found, products in zip(largest, wanted)
        for name, product in products.items()
    ]
    try:
        encoder(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return [{name: max(value, 1e-12) / 127 for name, value in found.items()} for found in largest]


def scaled(product: nn.Linear, layer_scale: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a product followed by LayerScale (or nothing) as one product."""
    if isinstance(layer_scale, nn.Identity):
        return product.weight, product.bias
    factor = layer_scale.get_parameter("lambda1")
    return product.weight * factor[:, None], product.bias * factor


def prepare_encoder(encoder: Any, int8_calibration: torch.Tensor | None = None) -> None:
    """Prepare an encoder's patches and blocks and, of a hybrid, the ResNet; again where they are already."""
    choices: dict[tuple, str] = {}
    patches = encoder.embeddings.patch_embeddings
    stem = patches.backbone
    prepared: list[Prepared] = [PreparedLayer(layer, choices) for layer in encoder.layers]
    if int8_calibration is not None:
        scales = measure_scales(encoder, int8_calibration)
        prepared = [Int8Layer(layer, choices, found) for layer, found in zip(encoder.layers, scales)]
    prepared.append(PreparedPatches(patches.projection, choices))
    if stem is not None:
        prepared += prepare_resnet(stem, choices)
    for one in prepared:
        current = one.module.__dict__.get("forward")
        if current is None or isinstance(current, Prepared):
            one.module.__dict__["forward"] = one
        else:
            current.before = one  # merging of tokens, which calls what stood there before it
