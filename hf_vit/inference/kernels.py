"""Operations without a public PyTorch function: kernels in C++ (`cpp/`), and those of oneDNN, MKL and FBGEMM.

Callers check that the processor and this PyTorch support an operation (`packs_linear`, `int8_backend`, ... in
`capabilities.py`, and the `*_library` functions below), and use the public operation otherwise.
"""

import ctypes
import functools
import warnings

import torch
import torch.nn.functional as F

from ..capabilities import features
from . import build


POINTER, COUNT, NUMBER, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int  # of C++ signatures
ATTEND_ARGUMENTS = [POINTER] * 6 + [COUNT] * 5 + [NUMBER, FLAG]


# -- linear layers and convolutions with weights in the library's own layout -----------------------------------------


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """A weight `(out, in)` in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def packed_linear(
    rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None
) -> torch.Tensor:
    """`(rows, in)` -> `(rows, out)`; a GELU ("none" or "tanh") is applied while the result is in the cache."""
    if gelu is not None:
        return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "gelu", [], gelu)
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


def packed_linear_add(
    rows: torch.Tensor, residual: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`packed_linear(rows) + residual`, added while the result is in the cache."""
    return torch.ops.mkldnn._linear_pointwise.binary(rows, residual, packed, bias, "add")


def pack_linear_by_mkl(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A float32 weight `(out, in)` in MKL's layout, for one number of rows."""
    return torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)


def packed_linear_by_mkl(
    rows: torch.Tensor, packed: torch.Tensor, shape: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`(rows, in)` -> `(rows, out)`; of the tensor `shape`, `(out, in)`, only the sizes are read."""
    return torch.ops.mkl._mkl_linear(rows, packed, shape, bias, len(rows))


def pack_convolution(
    weight: torch.Tensor, padding: tuple[int, int], stride: tuple[int, int], shape: torch.Size
) -> torch.Tensor:
    """A kernel `(out, in, height, width)` in oneDNN's layout for inputs of one shape."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, list(padding), list(stride), [1, 1], 1, list(shape))


def packed_convolution(
    x: torch.Tensor, packed: torch.Tensor, padding: tuple[int, int], stride: tuple[int, int]
) -> torch.Tensor:
    """`(B, C, H, W)` -> `(B, C', H', W')` with the same zeros on both sides of an axis."""
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, None, list(padding), list(stride), [1, 1], 1, "none", [], ""
    )


def gelu_(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """GELU in place, "none" (erf) or "tanh": `F.gelu` has no in-place form."""
    return torch.ops.aten.gelu_(x, approximate=approximate)


# -- int8 by oneDNN, for processors with VNNI or AMX -----------------------------------------------------------------


def pack_int8(steps: torch.Tensor) -> torch.Tensor:
    """An int8 weight `(out, in)` in oneDNN's layout."""
    return torch.ops.onednn.qlinear_prepack(steps, None)


def int8_linear(
    rows: torch.Tensor,
    step: float,
    zero: int,
    packed: torch.Tensor,
    weight_steps: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    gelu: bool = False,
    step_out: float = 1.0,
) -> torch.Tensor:
    """`step * weight_steps * ((rows - zero) W^T) + b` of int8 or uint8 rows `(rows, in)`, in this dtype.

    Args:
        step, weight_steps: quantization steps, of the rows and of each row of the weight.
        zero: zero point of the rows, and of a uint8 result.
        gelu: whether GELU, in its erf form, is applied.
        step_out: quantization step of an int8 or uint8 result.
    """
    zeros = _zeros(len(weight_steps))
    activation, form = ("gelu", "none") if gelu else ("none", "")
    zero_out = zero if dtype == torch.uint8 else 0
    return torch.ops.onednn.qlinear_pointwise(
        rows, step, zero, packed, weight_steps, zeros, bias, step_out, zero_out, dtype, activation, [], form
    )


def int8_linear_add_(
    total: torch.Tensor,
    rows: torch.Tensor,
    step: float,
    zero: int,
    packed: torch.Tensor,
    weight_steps: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Add `int8_linear(rows)` to a contiguous float32 `total` `(rows, out)` in place."""
    zeros = _zeros(len(weight_steps))
    torch.ops.onednn.qlinear_pointwise.binary(
        rows, step, zero, packed, weight_steps, zeros, total, bias,
        1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "",
    )  # fmt: skip
    return total


@functools.cache
def _zeros(count: int) -> torch.Tensor:
    """Zero points of a symmetric weight's rows."""
    with torch.inference_mode(False):  # cached for calls in and out of inference mode
        return torch.zeros(count, dtype=torch.int32)


# -- int8 by FBGEMM, for processors without VNNI ---------------------------------------------------------------------


def pack_int8_fbgemm(steps: torch.Tensor, weight_steps: torch.Tensor, bias: torch.Tensor | None):
    """An int8 weight `(out, in)`, its steps `(out,)` and the bias in FBGEMM's layout."""
    zeros = torch.zeros(len(steps), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantized tensors are deprecated, but FBGEMM takes no others
        weight = torch._make_per_channel_quantized_tensor(steps, weight_steps.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, bias)


def int8_linear_fbgemm(rows: torch.Tensor, step: float, zero: int, packed) -> torch.Tensor:
    """Float32 `(rows, in)` -> float32 `(rows, out)`; the rows are quantized to uint8 with this step and zero point."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rows, step, zero, packed)


# -- attention and GELU in float32 -----------------------------------------------------------------------------------


@functools.cache
def float32_library() -> ctypes.CDLL | None:
    """`cpp/float32.cpp`, for any processor with a compiler."""
    functions: build.Functions = {
        "attend": ATTEND_ARGUMENTS,
        "gelu_tanh": [POINTER] * 3 + [COUNT, FLAG],
    }
    return build.library(build.SOURCES / "float32.cpp", functions)


def vectors_take(*heads: torch.Tensor) -> bool:
    """Whether `attend_by_vectors` supports this query, key and value."""
    return _are_heads(torch.float32, heads) and float32_library() is not None


def attend_by_vectors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`attend_by_tiles` in float32."""
    return _attend(float32_library(), query, key, value, scale, bias)


def gelu_tanh(x: torch.Tensor, out: torch.Tensor | None = None, gradient: torch.Tensor | None = None) -> torch.Tensor:
    """The tanh form of GELU of float32, or given the `gradient` of the result that of x.

    Args:
        out: contiguous; may be x itself. Else a new tensor.
    """
    library = float32_library()
    assert library is not None
    x = x.contiguous()
    gradient = None if gradient is None else gradient.contiguous()
    out = torch.empty_like(x) if out is None else out
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, gradient, out))
    library.gelu_tanh(*pointers, x.numel(), torch.get_num_threads())
    return out


# -- attention in AMX tiles ------------------------------------------------------------------------------------------


@functools.cache
def attention_library() -> ctypes.CDLL | None:
    """`cpp/attention.cpp`, if the processor multiplies bfloat16 in tiles (AMX) and the Linux kernel permits it."""
    if "amx_bf16" not in features():
        return None
    functions: build.Functions = {"attend": ATTEND_ARGUMENTS, "ready": []}
    compiled = build.library(build.SOURCES / "attention.cpp", functions)
    return compiled if compiled is not None and compiled.ready() else None


def tiles_take(*heads: torch.Tensor) -> bool:
    """Whether `attend_by_tiles` supports this query, key and value."""
    return _are_heads(torch.bfloat16, heads) and attention_library() is not None


def attend_by_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Eqs. 6 and 7, bfloat16 `(B, k, N, d)` each -> `(B, k, N, d)`, in memory `(B, N, k, d)`.

    `bias`, `(B, 1, 1, N)`, is added to the scores of each key.
    """
    return _attend(attention_library(), query, key, value, scale, bias)


def _are_heads(dtype: torch.dtype, heads: tuple[torch.Tensor, ...]) -> bool:
    return all(x.dtype == dtype and x.device.type == "cpu" and x.stride(3) == 1 for x in heads)


def _attend(
    library: ctypes.CDLL | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    assert library is not None
    images, heads, queries, depth = query.shape
    out = query.new_empty(images, queries, heads, depth)  # heads side by side: the output projection reads rows of D
    bias = None if bias is None else bias.float().contiguous()
    strides = (ctypes.c_int64 * 9)(*(stride for x in (query, key, value) for stride in x.stride()[:3]))
    tensors = (query, key, value, bias, out)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = (images, heads, queries, key.shape[2], depth)
    library.attend(*pointers, strides, *sizes, scale, torch.get_num_threads())
    return out.transpose(1, 2)


# -- rounding to int8 ------------------------------------------------------------------------------------------------


@functools.cache
def int8_library() -> ctypes.CDLL | None:
    """`cpp/int8.cpp`, if the processor has AVX-512."""
    if not {"avx512f", "avx512bw", "avx512vl"} <= features():
        return None
    functions: build.Functions = {
        "round_values": [POINTER, FLAG, POINTER, COUNT, NUMBER, FLAG, FLAG],
        "norm_rows": [POINTER] * 4 + [COUNT] * 2 + [NUMBER] * 2 + [FLAG] * 2,
    }
    return build.library(build.SOURCES / "int8.cpp", functions)


def round_to_int8(x: torch.Tensor, step: float, zero: int = 0) -> torch.Tensor:
    """x / step, of bfloat16 or float32, rounded to the nearest and clipped to -127..127; uint8 if `zero` is 128."""
    kernels, x = int8_library(), x.contiguous()
    dtype = torch.uint8 if zero else torch.int8
    if kernels is None:
        return (x.float() * (1 / step)).round_().clamp_(-127, 127).add_(zero).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    bfloat16, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    kernels.round_values(x.data_ptr(), bfloat16, out.data_ptr(), x.numel(), 1 / step, zero, threads)
    return out


def norm_to_int8(x: torch.Tensor, norm: torch.nn.LayerNorm, step: float, zero: int = 0) -> torch.Tensor:
    """`round_to_int8(norm(x), step, zero)` for a norm in float32."""
    kernels, x = int8_library(), x.float().contiguous()
    if kernels is None:
        return round_to_int8(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps), step, zero)
    out = torch.empty_like(x, dtype=torch.uint8 if zero else torch.int8)
    pointers = (tensor.data_ptr() for tensor in (x, norm.weight, norm.bias, out))
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    kernels.norm_rows(*pointers, rows, width, norm.eps, 1 / step, zero, torch.get_num_threads())
    return out


# -- GroupNorm and max pooling of channels-last maps ------------------------------------------------------------------


class Norm(ctypes.Structure):
    """The struct of a GroupNorm in `cpp/group_norm.cpp`; weight and bias are float32."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("groups", ctypes.c_int64),
    ]


@functools.cache
def maps_library() -> ctypes.CDLL | None:
    """`cpp/group_norm.cpp`, for any processor with a compiler."""
    functions: build.Functions = {
        "group_norm": [POINTER, POINTER, POINTER, FLAG, COUNT, COUNT, COUNT, FLAG, FLAG],
        "max_pool": [POINTER, POINTER, COUNT, POINTER, POINTER, POINTER, COUNT, FLAG, FLAG],
    }
    return build.library(build.SOURCES / "group_norm.cpp", functions)


def takes_map(x: torch.Tensor) -> bool:
    """Whether `group_norm_` and `max_pool` support this `(B, C, H, W)`."""
    supported = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)
    return supported and x.is_contiguous(memory_format=torch.channels_last) and maps_library() is not None


def group_norm_(
    x: torch.Tensor,
    *norms: tuple[torch.Tensor, torch.Tensor, float, int],
    shortcut: torch.Tensor | None = None,
) -> torch.Tensor:
    """`relu(norm(x) + shortcut)` in place of x, `(B, C, H, W)` in channels-last memory.

    Args:
        norms: weight and bias `(C,)` in float32, eps and number of groups: of x, and of the shortcut if it has a norm.
        shortcut: of x's shape and memory format.
    """
    kernels = maps_library()
    assert kernels is not None
    images, channels, height, width = x.shape
    structs = (Norm * len(norms))(*(Norm(weight.data_ptr(), bias.data_ptr(), *more) for weight, bias, *more in norms))
    kind = 0 if shortcut is None else len(norms)  # none, added, or normalized and added
    kernels.group_norm(
        x.data_ptr(), None if shortcut is None else shortcut.data_ptr(), structs, kind, images, height * width,
        channels, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return x


def max_pool(x: torch.Tensor, padding: tuple[int, int, int, int]) -> torch.Tensor:
    """3 x 3 max pooling with stride 2 of `(B, C, H, W)` in channels-last memory.

    Args:
        padding: left, right, top and bottom, in the order of `F.pad`.
    """
    kernels = maps_library()
    assert kernels is not None
    images, channels, *size = x.shape
    left, right, top, bottom = padding
    new_size = [(size[0] + top + bottom - 3) // 2 + 1, (size[1] + left + right - 3) // 2 + 1]
    out = x.new_empty(images, *new_size, channels).permute(0, 3, 1, 2)
    pair = ctypes.c_int64 * 2
    kernels.max_pool(
        x.data_ptr(), out.data_ptr(), images, pair(*size), pair(*new_size), pair(top, left), channels,
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out
