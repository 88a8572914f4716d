"""Kernels in C++ (`cpp/`), which the compiler of the machine builds at their first use and keeps.

Where there is no compiler, or no processor that they are for, there is no kernel: `library` is None and PyTorch's own
operations serve.

This file travels to the Hub beside the weights, without the kernels: it imports only torch and transformers.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers.utils import logging


logger = logging.get_logger(__name__)

FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, in Linux's words; empty elsewhere."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """`cpp/{name}.cpp`, compiled for this processor and kept under `HF_HOME/hf_vit`; None where that cannot be."""
    source = Path(__file__).parent / "cpp" / f"{name}.cpp"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not (sys.platform == "linux" and platform.machine() == "x86_64" and compiler and source.exists()):
        return None
    command = [compiler, *FLAGS, str(source)]
    key = hashlib.sha256(
        source.read_bytes() + repr((compiler, FLAGS, sorted(processor_flags()))).encode()
    ).hexdigest()[:16]
    built = Path(HF_HOME, "hf_vit", f"{name}-{key}.so")
    try:
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=built.parent) as folder:
                new = Path(folder, built.name)
                subprocess.run([*command, "-o", str(new)], check=True, capture_output=True, text=True)
                os.replace(new, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        logger.warning(f"{source.name} was not compiled, PyTorch's own operations serve instead: {reason}")
        return None


@functools.cache
def attention() -> Callable | None:
    """`attend` of `cpp/attention.cpp`, where the processor multiplies bfloat16 in tiles (AMX)."""
    if "amx_bf16" not in processor_flags():
        return None
    found = library("attention")
    if found is None or not found.ready():
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    found.attend.argtypes = [pointer] * 6 + [count] * 5 + [ctypes.c_float, ctypes.c_int]
    return found.attend


def tiles_take(*heads: torch.Tensor) -> bool:
    """Whether `attend_by_tiles` takes this query, key and value."""
    ours = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(3) == 1 for x in heads)
    return ours and attention() is not None


def attend_by_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Eqs. 6 and 7, bfloat16 `(B, k, N, d)` each -> `(B, k, N, d)`, in memory `(B, N, k, d)`.

    `bias`, `(B, 1, 1, N)`, is added to the scores of each key.
    """
    kernel = attention()
    assert kernel is not None
    images, heads, queries, depth = query.shape
    out = query.new_empty(images, queries, heads, depth)
    added = None if bias is None else bias.float().contiguous()
    strides = (ctypes.c_int64 * 9)(*(stride for x in (query, key, value) for stride in x.stride()[:3]))
    tensors = (query, key, value, added, out)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = (images, heads, queries, key.shape[2], depth)
    kernel(*pointers, strides, *sizes, scale, torch.get_num_threads())
    return out.transpose(1, 2)


@functools.cache
def int8() -> ctypes.CDLL | None:
    """`cpp/int8.cpp`, where the processor has AVX-512."""
    found = library("int8") if {"avx512f", "avx512bw", "avx512vl"} <= processor_flags() else None
    if found is not None:
        pointer, count, number, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
        found.round_values.argtypes = [pointer, whole, pointer, count, number, whole]
        found.norm_rows.argtypes = [pointer] * 4 + [count] * 2 + [number] * 2 + [whole]
    return found


def round_to_int8(x: torch.Tensor, step: float) -> torch.Tensor:
    """x / step, bfloat16 or float32, rounded to the nearest and cut to -127..127."""
    kernels, x = int8(), x.contiguous()
    if kernels is None:
        return (x.float() * (1 / step)).round_().clamp_(-127, 127).to(torch.int8)
    out = torch.empty_like(x, dtype=torch.int8)
    bfloat16, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    kernels.round_values(x.data_ptr(), bfloat16, out.data_ptr(), x.numel(), 1 / step, threads)
    return out


def norm_to_int8(x: torch.Tensor, norm: torch.nn.LayerNorm, step: float) -> torch.Tensor:
    """`round_to_int8(norm(x), step)` for a norm in float32."""
    kernels, x = int8(), x.float().contiguous()
    if kernels is None:
        return round_to_int8(norm(x), step)
    out = torch.empty_like(x, dtype=torch.int8)
    pointers = (tensor.data_ptr() for tensor in (x, norm.weight, norm.bias, out))
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    kernels.norm_rows(*pointers, rows, width, norm.eps, 1 / step, torch.get_num_threads())
    return out


class Norm(ctypes.Structure):
    """A GroupNorm as `cpp/group_norm.cpp` reads it; its weight and bias are float32."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("groups", ctypes.c_int64),
    ]


@functools.cache
def maps() -> ctypes.CDLL | None:
    """`cpp/group_norm.cpp`, for any processor that a compiler is on."""
    found = library("group_norm")
    if found is not None:
        pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        found.group_norm.argtypes = [pointer, pointer, pointer, flag, count, count, count, flag, flag, flag]
        found.max_pool.argtypes = [pointer, pointer, count, pointer, pointer, pointer, count, flag, flag]
    return found


def takes_map(x: torch.Tensor) -> bool:
    """Whether `group_norm_` and `max_pool` take this `(B, C, H, W)`."""
    ours = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)
    return ours and x.is_contiguous(memory_format=torch.channels_last) and maps() is not None


def group_norm_(
    x: torch.Tensor,
    *norms: tuple[torch.Tensor, torch.Tensor, float, int],
    rest: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """`relu(norm(x) + rest)` in the place of x, `(B, C, H, W)` in channels-last memory.

    Args:
        norms: weight and bias `(C,)` in float32, eps and number of groups: of x, and of the rest where it has one.
        rest: of x's shape and memory.
        relu: whether the result is activated.
    """
    kernels = maps()
    assert kernels is not None
    images, channels, height, width = x.shape
    read = (Norm * len(norms))(*(Norm(weight.data_ptr(), bias.data_ptr(), *more) for weight, bias, *more in norms))
    kind = 0 if rest is None else len(norms)
    kernels.group_norm(
        x.data_ptr(), None if rest is None else rest.data_ptr(), read, kind, images, height * width, channels,
        x.dtype == torch.bfloat16, relu, torch.get_num_threads(),
    )  # fmt: skip
    return x


def max_pool(x: torch.Tensor, padding: tuple[int, int, int, int]) -> torch.Tensor:
    """The largest of each 3 x 3 at every second place of `(B, C, H, W)` in channels-last memory.

    Args:
        padding: left, right, top and bottom, as `F.pad` takes it.
    """
    kernels = maps()
    assert kernels is not None
    images, channels, *size = x.shape
    left, right, top, bottom = padding
    after = [(size[0] + top + bottom - 3) // 2 + 1, (size[1] + left + right - 3) // 2 + 1]
    out = x.new_empty(images, *after, channels).permute(0, 3, 1, 2)
    pair = ctypes.c_int64 * 2
    kernels.max_pool(
        x.data_ptr(), out.data_ptr(), images, pair(*size), pair(*after), pair(top, left), channels,
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out
