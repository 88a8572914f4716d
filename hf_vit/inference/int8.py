"""Blocks with int8 linear layers: weights have one quantization step per row, activations one per layer.

Steps of activations are measured on calibration images. oneDNN serves processors with VNNI or AMX. On other x86
processors u8 x s8 products are summed in 16 bits, which full-range weights overflow: FBGEMM serves there, with 7-bit
weights. int8 that is not clearly faster than the float layers is refused. Not torchao's PT2E: it quantizes a captured
graph, which runs fast on x86 only under torch.compile.

Tests: tests/hf_vit/inference/test_optimize.py.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import capabilities
from ..errors import HFViTError
from ..kernel_table import speedup
from . import kernels
from .layers import BlockLinears, OptimizedLayer, gelu_form
from .wrapper import plain_module, wrap


MAX_INT8 = 127  # of an activation, on either side of zero, and of a weight for oneDNN
MAX_INT7 = 63  # of a weight for FBGEMM: 255 * 63 * 2 stays below 2^15
MIN_SPEEDUP = {"onednn": 1.0, "fbgemm": 1.4}  # over the float layer; 7 bits cost accuracy, so they must gain more
MAX_MEASURED_IMAGES = 8
MIN_STEP = 1e-12  # for layers whose inputs or weights are all zero


class Int8Layer(OptimizedLayer):
    """An encoder block in int8. The residual stream inside it is float32.

    Settings:
        steps: quantization step of the inputs of "qkv", "out", "fc1" and "fc2".
    """

    steps: dict[str, float]

    def is_supported(self) -> bool:
        return super().is_supported() and capabilities.int8_backend() is not None

    def build(self) -> None:
        super().build()
        layer = self.plain
        norms = {"qkv": layer.layernorm_before, "fc1": layer.layernorm_after}
        weights = {name: linear.join() for name, linear in self.linears._asdict().items()}
        by_onednn = capabilities.int8_backend() == "onednn"
        linears: dict[str, Any] = {}
        for name, (weight, bias) in weights.items():
            norm = copy.deepcopy(norms[name]).float() if name in norms else None  # reads the float32 residual stream
            parts, gelu = 3 if name == "qkv" else 1, name == "fc1"
            if by_onednn:
                # fc1 writes fc2's int8 input, q, k and v are bfloat16 for attention, out and fc2 are added in float32
                hidden = torch.uint8 if capabilities.int8_zero() else torch.int8
                dtype = {"qkv": torch.bfloat16, "fc1": hidden}.get(name, torch.float32)
                linears[name] = OneDNNLinear(
                    weight, bias, self.steps[name], norm, parts, gelu, dtype, self.steps["fc2"] if gelu else 1.0
                )
            else:
                linears[name] = FBGEMMLinear(weight, bias, self.steps[name], norm, parts, gelu)
        self.__dict__.update(linears=BlockLinears(**linears), mlp_parts=[])

    def run(self, x: torch.Tensor, tokens: int | None = None, **kwargs) -> torch.Tensor:
        return self.groups(tokens, x)

    def block(self, x: torch.Tensor, tokens: int | None, linears: BlockLinears) -> torch.Tensor:
        if linears is not self.__dict__.get("linears"):  # the block's own modules, under hooks or LoRA
            return super().block(x, tokens, linears)
        # a copy, also of float32: int8_linear_add_ writes into the residual
        result = super().block(x.to(torch.float32, copy=True), tokens, linears).to(x.dtype)
        # int8 has no NaN: an image with one gets them back, in all tokens, which attend to each other
        finite = x.sum(dim=(1, 2)).isfinite()
        return result if finite.all() else result.masked_fill(~finite[:, None, None], float("nan"))

    def normalize(self, norm: nn.Module, heads: torch.Tensor) -> torch.Tensor:
        if isinstance(norm, nn.Identity):
            return heads
        return norm(heads.to(self.plain.attention.q_proj.weight.dtype)).to(heads.dtype)


class OneDNNLinear:
    """A linear layer of int8 (AMX) or uint8 rows (VNNI) by oneDNN.

    Args:
        weight, bias: `(out, in)` and `(out,)` or None.
        step: quantization step of the input.
        norm: in float32, applied to the input.
        parts: number of results of equal width, of concatenated weights.
        gelu: whether a GELU is applied to the result.
        dtype, step_out: of the result; `step_out` is the quantization step of int8 and uint8.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        step: float,
        norm: nn.LayerNorm | None,
        parts: int,
        gelu: bool,
        dtype: torch.dtype,
        step_out: float,
    ):
        steps, self.weight_steps = int8_weight(weight, MAX_INT8)
        self.packed = kernels.pack_int8(steps)
        self.bias = None if bias is None else bias.float()
        self.step, self.layer_norm, self.parts, self.gelu = step, norm, parts, gelu
        self.dtype, self.step_out, self.zero = dtype, step_out, capabilities.int8_zero()

    def __call__(self, x: torch.Tensor, *residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(B, N, in)` -> results `(B, N, out)`; a contiguous float32 residual is added to in place."""
        if self.layer_norm is not None:
            x = kernels.norm_to_int8(x, self.layer_norm, self.step, self.zero)
        elif x.is_floating_point():
            x = kernels.round_to_int8(x, self.step, self.zero)
        rows = x.flatten(0, 1)
        weight = self.packed, self.weight_steps, self.bias
        if residual:
            total = residual[0].float().contiguous()
            kernels.int8_linear_add_(total.flatten(0, 1), rows, self.step, self.zero, *weight)
            return (total,)
        result = kernels.int8_linear(rows, self.step, self.zero, *weight, self.dtype, self.gelu, self.step_out)
        return tuple(part.unflatten(0, x.shape[:2]) for part in result.chunk(self.parts, dim=1))


class FBGEMMLinear:
    """A linear layer of uint8 rows and 7-bit weights by FBGEMM, with float32 results; arguments as above."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        step: float,
        norm: nn.LayerNorm | None,
        parts: int,
        gelu: bool,
    ):
        steps, weight_steps = int8_weight(weight, MAX_INT7)
        self.packed = kernels.pack_int8_fbgemm(steps, weight_steps, None if bias is None else bias.float())
        self.step, self.layer_norm, self.parts, self.gelu = step, norm, parts, gelu

    def __call__(self, x: torch.Tensor, *residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(B, N, in)` -> results `(B, N, out)` with the residual added."""
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        rows = x.float().reshape(-1, x.shape[-1])
        result = kernels.int8_linear_fbgemm(rows, self.step, MAX_INT8 + 1, self.packed)  # uint8 with zero point 128
        if self.gelu:
            kernels.gelu_(result, "none")
        parts = tuple(part.unflatten(0, x.shape[:2]) for part in result.chunk(self.parts, dim=1))
        return tuple(part.add_(residual[0]) for part in parts) if residual else parts


def int8_weight(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `(out, in)` as int8 of at most `largest`, and the quantization step of each row."""
    steps = weight.float().abs().amax(dim=1).clamp(min=MIN_STEP) / largest
    return (weight.float() / steps[:, None]).round().to(torch.int8), steps


# -- calibration


@torch.no_grad()
def calibrate(encoder: Any, pixel_values: torch.Tensor) -> list[dict[str, float]]:
    """The `steps` of each block's `Int8Layer`: the largest absolute inputs of its layers on these images, / 127.

    Raises:
        HFViTError: not images; blocks, devices, dtypes or processors that int8 does not support.
    """
    check_int8(encoder, pixel_values)
    largest: list[dict[str, float]] = []
    hooks = []

    def record(maxima: dict[str, float], name: str) -> Callable:
        def hook(module, args) -> None:
            maxima[name] = max(maxima[name], args[0].abs().max().item())

        return hook

    for layer in encoder.layers:
        attention, mlp = layer.attention, layer.mlp
        linears = {"qkv": attention.q_proj, "out": attention.o_proj, "fc1": mlp.fc1, "fc2": mlp.fc2}
        largest.append(dict.fromkeys(linears, 0.0))
        hooks += [linear.register_forward_pre_hook(record(largest[-1], name)) for name, linear in linears.items()]
    try:
        encoder(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    peak = max(value for maxima in largest for value in maxima.values())
    if not peak < float("inf"):  # NaN, too
        raise HFViTError("int8_calibration causes activations that are not finite: give normalized images")
    return [{name: max(value / MAX_INT8, MIN_STEP) for name, value in maxima.items()} for maxima in largest]


def check_int8(encoder: Any, pixel_values: Any) -> None:
    """Raise HFViTError for inputs, layers, devices or processors that int8 does not support, before any work."""
    if not torch.is_tensor(pixel_values) or pixel_values.ndim != 4 or not len(pixel_values):
        shape = tuple(pixel_values.shape) if torch.is_tensor(pixel_values) else type(pixel_values).__name__
        raise HFViTError(
            f"int8_calibration is {shape}: give some dozens of normalized images as one tensor "
            "(images, channels, height, width)"
        )
    for layer in encoder.layers:
        plain = wrap(OptimizedLayer, plain_module(layer))
        if not plain.is_supported() or gelu_form(plain.mlp.activation_fn, torch.bfloat16) is None:
            raise HFViTError("int8 needs the layers of this package with a GELU between fc1 and fc2")
        weight = layer.mlp.fc1.weight
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            raise HFViTError(
                f"int8 runs on CPUs, with a model in float32 or bfloat16; this is {weight.dtype} on {weight.device}"
            )
    if capabilities.int8_backend() is None:
        raise HFViTError(
            f"int8 is refused: neither oneDNN nor FBGEMM has fast int8 on this processor "
            f"({capabilities.processor_name()}); use float32 or bfloat16"
        )


@torch.no_grad()
def check_int8_speed(encoder: Any, pixel_values: torch.Tensor, steps: dict[str, float]) -> None:
    """Raise HFViTError if the first block is not clearly faster in int8; measured once on a machine."""
    backend = capabilities.int8_backend()
    assert backend is not None
    plain: Any = plain_module(encoder.layers[0])
    dtype = plain.mlp.fc1.weight.dtype
    if dtype == torch.bfloat16 and not capabilities.native_bfloat16():
        dtype = torch.float32  # what int8 competes with where bfloat16 is emulated
    x = encoder.embeddings(pixel_values[:MAX_MEASURED_IMAGES]).to(dtype)
    block = copy.deepcopy(plain).to(dtype)
    # optimized float against int8, since int8 would replace that
    floating, int8 = wrap(OptimizedLayer, block), wrap(Int8Layer, block, steps=steps)
    key = ("int8", backend, *x.shape, plain.attention.head_dim, plain.mlp.fc1.out_features, x.dtype)
    factor = speedup(key, floating, int8, x)
    if factor < MIN_SPEEDUP[backend]:
        raise HFViTError(
            f"int8 is refused: on this processor ({capabilities.processor_name()}) a block of this model is "
            f"{factor:.2f} times as fast in int8 as in {str(dtype).removeprefix('torch.')}, and "
            f"{MIN_SPEEDUP[backend]:g} times is the least that is worth its accuracy; leave int8_calibration out"
        )
