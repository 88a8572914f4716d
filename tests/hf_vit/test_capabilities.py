"""capabilities.py: what the environment limits is hidden, what PyTorch lacks is found missing.

python -m pytest tests/hf_vit/test_capabilities.py
"""

import platform

import pytest
import torch

from hf_vit import capabilities


ZEN5 = "fpu sse4_1 avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512dq avx512cd avx512_vnni avx512_bf16"


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """A processor as /proc/cpuinfo describes it, under environment limits."""

    def become(flags: str, **limits: str) -> frozenset[str]:
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: {flags}\n")
        monkeypatch.setattr(capabilities, "CPUINFO", file)
        for variable in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
            monkeypatch.delenv(variable, raising=False)
        for variable, limit in limits.items():
            monkeypatch.setenv(variable, limit)
        monkeypatch.setattr(capabilities, "_onednn_says_bfloat16", lambda: True)  # as it does where it emulates
        monkeypatch.setattr(capabilities, "is_x86", lambda: True)
        clear()
        return capabilities.features()

    def clear() -> None:
        for function in (capabilities.features, capabilities.hardware_features, capabilities.processor_name):
            function.cache_clear()

    yield become
    clear()


def test_features_within_the_limits_of_the_environment(processor):
    assert processor(ZEN5) == frozenset(ZEN5.split())
    assert capabilities.processor_name() == "Some CPU @ 2 GHz"
    assert processor(ZEN5, ONEDNN_MAX_CPU_ISA="SSE41") == {"fpu", "sse4_1"}
    assert processor(ZEN5, ONEDNN_MAX_CPU_ISA="avx2") == {"fpu", "sse4_1", "avx", "avx2", "fma", "f16c"}
    assert "avx512_vnni" not in processor(ZEN5, ONEDNN_MAX_CPU_ISA="AVX512_CORE")
    assert "avx512f" in processor(ZEN5, ONEDNN_MAX_CPU_ISA="AVX512_CORE")
    assert processor(ZEN5, ATEN_CPU_CAPABILITY="default") == {"fpu", "sse4_1"}
    assert "avx512f" not in processor(ZEN5, ONEDNN_MAX_CPU_ISA="AVX512_CORE", ATEN_CPU_CAPABILITY="avx2")
    assert processor(ZEN5, ONEDNN_MAX_CPU_ISA="no such limit") == frozenset(ZEN5.split())


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\n", "AMD EPYC (family 25, model 17)"),
        ("model name\t: AMD EPYC 9654\ncpu family\t: 25\nmodel\t\t: 17\n", "AMD EPYC 9654"),
        ("model name\t: Some CPU\n", "Some CPU"),
        ("Features\t: asimd\n", platform.processor() or platform.machine()),
    ],
)
def test_a_name_that_several_processors_share_gets_their_model(processor, tmp_path, lines, name):
    processor("")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{lines}\nprocessor\t: 1\nmodel name\t: another\n")
    capabilities.processor_name.cache_clear()
    assert capabilities.processor_name() == name


def test_the_widest_instructions_in_one_word(processor):
    for flags, limits, word in [
        (ZEN5 + " amx_tile", {}, "AMX"),
        (ZEN5, {}, "AVX-512"),
        (ZEN5 + " amx_tile", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX2"),
        ("sse4_1", {}, platform.machine()),
    ]:
        processor(flags, **limits)
        assert capabilities.widest_instructions() == word


def test_emulated_bfloat16_is_not_native_and_int8_saturates_without_vnni(processor):
    processor(ZEN5)
    assert capabilities.native_bfloat16() and not capabilities.int8_saturates()
    assert capabilities.int8_zero() == 128
    processor(ZEN5 + " amx_int8 amx_bf16")
    assert capabilities.int8_zero() == 0
    processor(ZEN5, ONEDNN_MAX_CPU_ISA="AVX512_CORE")
    assert not capabilities.native_bfloat16() and capabilities.int8_saturates()
    processor("sse4_1 avx avx2 fma f16c")
    assert not capabilities.native_bfloat16() and capabilities.int8_saturates()
    processor("sse4_1 avx avx2 fma f16c avx_vnni")
    assert not capabilities.int8_saturates()


def test_private_operations_that_are_missing_or_fail_are_not_capabilities():
    def fails():
        raise RuntimeError("could not create a primitive descriptor")

    assert not capabilities._works(lambda: torch.ops.mkldnn.no_such_operation())
    assert not capabilities._works(fails)
    assert capabilities._works(lambda: True)
    assert not capabilities.packs_linear(torch.float64)


def test_the_key_tells_machines_and_threads_apart(processor):
    processor(ZEN5)
    first = capabilities.machine_key()
    processor(ZEN5, ONEDNN_MAX_CPU_ISA="AVX2")
    assert capabilities.machine_key() != first
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert capabilities.machine_key()[-1] == threads + 1
    finally:
        torch.set_num_threads(threads)
