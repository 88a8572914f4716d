"""What this processor and this PyTorch support: every fast path asks here before it is used.

Private operations of PyTorch are tried once on a small input, which covers their absence and changed signatures; the
code that uses them is in `inference/kernels.py` and `training/engine/cpu_kernels.py`.

Features have Linux's names (`avx2`, `avx512_vnni`, `amx_bf16`, on Arm `i8mm`). The limits of oneDNN and PyTorch,
`ONEDNN_MAX_CPU_ISA` and `ATEN_CPU_CAPABILITY`, hide features here too, so that one machine can stand in for an older
one. Not `torch.backends.cpu.get_cpu_capability`: it names AVX2 or AVX512, but neither VNNI nor AMX.
"""

import functools
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import torch


CPUINFO = Path("/proc/cpuinfo")

# Vector features that remain under each limit; other limits hide nothing.
_AVX2 = ("avx", "avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd")
ONEDNN_LIMITS: dict[str, tuple[str, ...]] = {
    "SSE41": (),
    "AVX": ("avx",),
    "AVX2": _AVX2,
    "AVX2_VNNI": (*_AVX2, "avx_vnni"),
    "AVX2_VNNI_2": (*_AVX2, "avx_vnni", "avx_vnni_int8", "avx_ne_convert"),
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": (*_AVX512, "avx512_vnni"),
    "AVX512_CORE_BF16": (*_AVX512, "avx512_vnni", "avx512_bf16"),
    "AVX512_CORE_FP16": (*_AVX512, "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
}
ATEN_LIMITS: dict[str, tuple[str, ...]] = {"default": (), "avx2": (*_AVX2, "avx_vnni")}


# -- the processor


@functools.cache
def processor_name() -> str:
    """The CPU's model name, or its architecture if the system does not give one.

    A virtual machine may call processors of several generations by one name: a name without a number gets family and
    model, as in "AMD EPYC (family 25, model 17)".
    """
    facts = _cpuinfo()
    name = facts.get("model name", "")
    if name and "cpu family" in facts and not any(map(str.isdigit, name)):
        return f"{name} (family {facts['cpu family']}, model {facts.get('model')})"
    return name or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    if not CPUINFO.is_file():
        return {}
    first = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


@functools.cache
def hardware_features() -> frozenset[str]:
    """Every instruction set feature of the processor, regardless of limits in the environment."""
    facts = _cpuinfo()
    if (flags := facts.get("flags", facts.get("Features"))) is not None:  # x86, Arm
        return frozenset(flags.split())
    ask = getattr(torch.cpu, "get_capabilities", None)  # macOS and Windows, from PyTorch 2.10
    spelling = {"fma3": "fma", "avx512_f": "avx512f", "avx512_bw": "avx512bw", "avx512_vl": "avx512vl"}
    return frozenset(spelling.get(name, name) for name, value in (ask() if ask else {}).items() if value is True)


@functools.cache
def features() -> frozenset[str]:
    """The usable features: the processor's, within `ONEDNN_MAX_CPU_ISA` and `ATEN_CPU_CAPABILITY`."""
    hardware = hardware_features()
    for variable, limits in (("ONEDNN_MAX_CPU_ISA", ONEDNN_LIMITS), ("ATEN_CPU_CAPABILITY", ATEN_LIMITS)):
        limit = {name.lower(): allowed for name, allowed in limits.items()}.get(os.environ.get(variable, "").lower())
        if limit is not None:
            hardware = frozenset(name for name in hardware if name in limit or not _is_vector_feature(name))
    return hardware


def widest_instructions() -> str:
    """The widest usable vectors, in one word for tables: processors of the same name may differ in it."""
    words = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON"}
    return next((word for feature, word in words.items() if feature in features()), platform.machine())


def _is_vector_feature(name: str) -> bool:
    return name.startswith(("avx", "amx")) or name in ("fma", "f16c")


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")


def native_bfloat16() -> bool:
    """Whether the processor has bfloat16 matmul instructions; emulated, they are slower than float32."""
    return bool(features() & {"avx512_bf16", "amx_bf16", "bf16"}) and _onednn_says_bfloat16()


def int8_saturates() -> bool:
    """Whether u8 x s8 products are summed in 16 bits, which full-range int8 weights overflow (x86 without VNNI)."""
    return is_x86() and not features() & {"avx512_vnni", "avx_vnni"}


# -- PyTorch


@functools.cache
def _onednn_says_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and _works(lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def packs_linear(dtype: torch.dtype) -> bool:
    """Whether this PyTorch can pack weights of a linear layer for oneDNN, in this dtype."""

    def attempt() -> bool:
        x, weight = torch.ones(2, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        result = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return bool((result == 16).all())

    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not _onednn_says_bfloat16():
        return False
    return _works(attempt)


@functools.cache
def packs_convolution(dtype: torch.dtype) -> bool:
    """The same for a convolution's weights."""

    def attempt() -> bool:
        x, weight, unit = torch.ones(1, 16, 2, 2, dtype=dtype), torch.ones(16, 16, 1, 1, dtype=dtype), [1, 1]
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [0, 0], unit, unit, 1, list(x.shape))
        result = torch.ops.mkldnn._convolution_pointwise(x, packed, None, [0, 0], unit, unit, 1, "none", [], "")
        return bool((result == 16).all())

    return packs_linear(dtype) and _works(attempt)


@functools.cache
def packs_linear_by_mkl() -> bool:
    """Whether this PyTorch can pack float32 weights of a linear layer for MKL."""

    def attempt() -> bool:
        x, weight = torch.ones(2, 16), torch.ones(16, 16)
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 2)
        return bool((torch.ops.mkl._mkl_linear(x, packed, weight, None, 2) == 16).all())

    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _works(attempt)


def int8_zero() -> int:
    """Zero point of oneDNN's activations: 0 (int8) with AMX, else 128 (uint8).

    VNNI multiplies uint8 by int8; for int8 by int8 oneDNN takes a reference loop, a thousand times slower.
    """
    return 0 if "amx_int8" in features() else 128


@functools.cache
def int8_backend() -> str | None:
    """Library whose int8 matmul is correct and fast here: "onednn" with VNNI or AMX, "fbgemm" on other x86, or None.

    Without VNNI, oneDNN also falls back to the reference loop.
    """

    def by_onednn() -> bool:
        steps, zeros = torch.full((16, 16), 2, dtype=torch.int8), torch.zeros(16, dtype=torch.int32)
        packed, zero = torch.ops.onednn.qlinear_prepack(steps, None), int8_zero()
        rows = (steps[:2].int() + zero).to(torch.uint8 if zero else torch.int8)
        result = torch.ops.onednn.qlinear_pointwise(
            rows, 0.5, zero, packed, torch.ones(16), zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return bool((result == 32).all())

    def by_fbgemm() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # quantized tensors are deprecated
            steps, zeros = torch.full((16, 16), 2, dtype=torch.int8), torch.zeros(16, dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(steps, torch.ones(16).double(), zeros, 0)
            packed = torch.ops.quantized.linear_prepack(weight, None)
        rows = torch.ones(2, 16)
        result = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rows, 0.5, 0, packed)
        return bool((result == 32).all())

    if not is_x86():
        return None
    if not int8_saturates() and _works(by_onednn):
        return "onednn"
    engine = torch.backends.quantized.engine in ("x86", "fbgemm")
    return "fbgemm" if engine and _works(by_fbgemm) else None


def _works(attempt: Callable[[], bool]) -> bool:
    """The result of an attempt with a private operation; False if the operation is missing or fails."""
    try:
        with torch.no_grad():
            return attempt()
    except (AttributeError, RuntimeError, TypeError):
        return False


# -- the machine as a key


def usable_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_key() -> tuple[str, str, str, int]:
    """Processor, usable features, PyTorch's version and threads, on which a measured time depends."""
    return processor_name(), " ".join(sorted(features())), torch.__version__, torch.get_num_threads()
