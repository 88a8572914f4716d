"""native.py: kernels in C++ compute what PyTorch computes, are built once, and are missed by nobody.

python -m pytest tests/hf_vit/inference/test_native.py
"""

import shutil
import subprocess
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vit.modeling import native
from hf_vit.modeling.resnet_stem import same_amounts, same_padding


pytestmark = pytest.mark.numerics


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No kernel is built yet: the folder that they go to."""
    monkeypatch.setattr(native, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native.library.cache_clear()
    yield tmp_path / "hf_vit"
    native.library.cache_clear()


tiles = pytest.mark.skipif(native.attention() is None, reason="needs a processor with AMX, Linux and a C++ compiler")

wide = pytest.mark.skipif(native.int8() is None, reason="needs a processor with AVX-512, Linux and a C++ compiler")


def heads(images, count, tokens, depth, joined=False):
    """`(B, k, N, d)` in bfloat16, as a view of `(B, N, 3 k d)` or of memory of its own."""
    rows = torch.randn(images, tokens, (3 if joined else 1) * count * depth).bfloat16()
    return rows[..., : count * depth].unflatten(2, (count, depth)).transpose(1, 2)


@tiles
@settings(deadline=None)
@given(
    images=st.integers(1, 3),
    count=st.integers(1, 5),
    queries=st.integers(1, 80),
    keys=st.integers(1, 230),
    depth=st.integers(1, 130),
    joined=st.booleans(),
    scale=st.sampled_from([0.01, 0.125, 1.0]),
    biased=st.booleans(),
    threads=st.integers(1, 3),
)
def test_tiles_attend_to_the_rounding_of_weights_and_results(
    images, count, queries, keys, depth, joined, scale, biased, threads
):
    torch.manual_seed(queries * keys + depth)
    q, k, v = (heads(images, count, n, depth, joined) for n in (queries, keys, keys))
    bias = torch.randint(1, 9, (images, 1, 1, keys)).log() if biased else None
    wide = {"attn_mask": None if bias is None else bias.double(), "scale": scale}
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **wide)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert native.tiles_take(q, k, v)
        ours = native.attend_by_tiles(q, k, v, scale, bias)
    finally:
        torch.set_num_threads(before)
    assert ours.shape == exact.shape and ours.dtype == torch.bfloat16
    sizes = F.scaled_dot_product_attention(q.double(), k.double(), v.double().abs(), **wide)
    assert ((ours - exact).abs() <= 1.01 * 2**-7 * sizes).all()  # weights and results are rounded, each by 2^-8


@tiles
def test_large_scores_and_broken_pictures_stay_what_they_are():
    q, k, v = (heads(3, 2, 40, 64) for _ in range(3))
    q = 300 * q  # one weight is 1, the others vanish
    k[1, 0, 5, 7] = float("nan")
    ours, theirs = native.attend_by_tiles(q, k, v, 1.0), F.scaled_dot_product_attention(q, k, v, scale=1.0)
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours[1, 0].isnan().all() and ours.isnan().sum() == 40 * 64
    torch.testing.assert_close(ours[0], theirs[0], atol=0.02, rtol=0.01)
    again = native.attend_by_tiles(q[2:], k[2:], v[2:], 1.0)  # what a broken picture left behind touches nobody
    assert torch.equal(again[0], ours[2])


@tiles
def test_onednn_and_the_kernel_take_turns_at_the_tiles():
    x, weight = torch.randn(512, 256).bfloat16(), torch.randn(320, 256).bfloat16()
    expected = F.linear(x, weight)
    q, k, v = (heads(2, 2, 50, 64) for _ in range(3))
    for _ in range(3):
        native.attend_by_tiles(q, k, v, 0.1)
        assert torch.equal(F.linear(x, weight), expected)


@pytest.mark.parametrize("built", [False, pytest.param(True, marks=wide)])
@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 200),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    step=st.sampled_from([0.01, 0.05, 2.0]),
    strided=st.booleans(),
)
def test_int8_steps_are_those_of_pytorch(built, rows, width, dtype, step, strided):
    torch.manual_seed(rows * width)
    norm = torch.nn.LayerNorm(width, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(rows, 2 * width, dtype=dtype)[:, :width] if strided else torch.randn(rows, width, dtype=dtype)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if not built:
            patch.setattr(native, "int8", lambda: None)
        rounded, normed = native.round_to_int8(x, step), native.norm_to_int8(x, norm, step)
        exact = norm.double()(x.double()) / step
    torch.testing.assert_close(
        rounded, (x.float() * (1 / step)).round().clamp(-127, 127).to(torch.int8), atol=0, rtol=0
    )
    assert normed.dtype == torch.int8 and normed.shape == x.shape
    assert (normed - exact.clamp(-127, 127)).abs().max() <= 0.5 + 1e-3


maps = pytest.mark.skipif(native.maps() is None, reason="needs Linux on x86-64 and a C++ compiler")


def channels_last(*size, dtype=torch.float32):
    return torch.randn(*size).to(dtype, memory_format=torch.channels_last)


@maps
@settings(deadline=None)
@given(
    images=st.integers(1, 5),
    groups=st.sampled_from([1, 2, 32]),
    width=st.integers(1, 9),
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    offset=st.sampled_from([0.0, 3.0, -300.0]),
    rest=st.sampled_from(["none", "added", "normalized"]),
    relu=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.integers(1, 3),
)
def test_group_norm_rest_and_relu_are_exact_to_one_rounding(
    images, groups, width, size, offset, rest, relu, dtype, threads
):
    torch.manual_seed(images * width + size[0])
    channels = groups * width
    x, other = (channels_last(images, channels, *size, dtype=dtype) for _ in range(2))
    x += offset
    norms = [(torch.randn(channels), torch.randn(channels), 1e-6, groups) for _ in range(2)]
    by_torch = [
        torch.group_norm(y.double(), g, w.double(), b.double(), eps) for y, (w, b, eps, g) in zip((x, other), norms)
    ]
    exact = by_torch[0] + {"none": 0, "added": other, "normalized": by_torch[1]}[rest]
    exact = exact.relu() if relu else exact
    kept = other.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        used = norms if rest == "normalized" else norms[:1]
        ours = native.group_norm_(x, *used, rest=None if rest == "none" else other, relu=relu)
    finally:
        torch.set_num_threads(before)
    assert ours is x and torch.equal(other, kept)
    if dtype == torch.bfloat16:
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1.01 * 2**-8)
    else:
        torch.testing.assert_close(ours.double(), exact, atol=5e-6, rtol=5e-6)


@maps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_constant_and_broken_maps(dtype, threads):
    weight, bias = torch.randn(64), torch.randn(64)
    x = channels_last(3, 64, 5, 7, dtype=dtype)
    x[0] = 1000.0
    x[1, 6, 2, 3] = float("nan")
    last = x[2:].clone(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = native.group_norm_(x, (weight, bias, 1e-6, 32))
        alone = native.group_norm_(last, (weight, bias, 1e-6, 32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ours[0], bias.relu().to(dtype)[:, None, None].expand(64, 5, 7))  # no deviation: the bias
    assert ours[1, 6:8].isnan().all() and ours.isnan().sum() == 2 * 5 * 7  # two channels are a group
    torch.testing.assert_close(ours[2:], alone, atol=1e-6, rtol=2**-8)  # sums of a half each round otherwise


@maps
@settings(deadline=None)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 70),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    broken=st.booleans(),
)
def test_max_pool_is_torchs(images, channels, size, dtype, broken):
    x = channels_last(images, channels, *size, dtype=dtype)
    if broken:
        x[0, 0, 0, 0] = float("nan")
    padded = same_padding(x, 3, 2, value=float("-inf"))
    ours, theirs = native.max_pool(x, same_amounts(x, 3, 2)), F.max_pool2d(padded, 3, stride=2)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_other_tensors_are_not_taken():
    q = heads(1, 2, 4, 8)
    assert not native.tiles_take(q.float(), q, q)
    assert not native.tiles_take(q, q.transpose(2, 3).contiguous().transpose(2, 3), q)
    assert not native.tiles_take(q, q, q.to("meta"))
    x = channels_last(2, 3, 4, 5)
    assert native.takes_map(x) == (native.maps() is not None)
    for other in (x.contiguous(), x.double(), x.half(), x.to("meta")):
        assert not native.takes_map(other)


@maps
def test_a_kernel_is_built_once_and_kept(fresh, monkeypatch):
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: (calls.append(args), run(*args, **kwargs))[1])
    monkeypatch.setattr(native, "FLAGS", ("-shared", "-fPIC", "-O0", "-march=native", "-fopenmp", "-std=c++17"))
    built = [thread_result(native.library, "group_norm") for _ in range(2)]
    native.library.cache_clear()
    assert all(built) and native.library("group_norm") is not None
    assert len(calls) == 1 and len(list(fresh.iterdir())) == 1


def thread_result(function, *args):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


def test_without_a_compiler_there_is_none(fresh, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert native.library("attention") is None and not fresh.exists()


@pytest.mark.parametrize("broken", ["fails", "missing"])
def test_a_compiler_that_fails_is_said_once(fresh, monkeypatch, caplog, broken):
    monkeypatch.setattr(native.sys, "platform", "linux")
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CXX", "false" if broken == "fails" else "/nowhere/c++")
    monkeypatch.setattr(native.logger, "propagate", True)
    for _ in range(2):
        assert native.library("attention") is None
    assert caplog.text.count("attention.cpp was not compiled, PyTorch's own operations serve instead") == 1
    assert not list(fresh.iterdir())
