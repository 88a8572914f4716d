"""kernels.py: kernels in C++ and private operations compute what PyTorch computes.

python -m pytest tests/hf_vit/inference/test_kernels.py
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vit import capabilities
from hf_vit.inference import kernels
from hf_vit.modeling.resnet_stem import same_amounts, same_padding


pytestmark = pytest.mark.numerics


tiles = pytest.mark.skipif(
    kernels.attention_library() is None, reason="needs a processor with AMX, Linux and a C++ compiler with OpenMP"
)

wide = pytest.mark.skipif(
    kernels.int8_library() is None, reason="needs a processor with AVX-512, Linux and a C++ compiler with OpenMP"
)


compiled = pytest.mark.skipif(
    kernels.float32_library() is None, reason="needs x86-64, Linux and a C++ compiler with OpenMP"
)


def heads(images, count, tokens, depth, joined=False, dtype=torch.bfloat16):
    """`(B, k, N, d)`, as a view of `(B, N, 3 k d)` or of memory of its own."""
    rows = torch.randn(images, tokens, (3 if joined else 1) * count * depth).to(dtype)
    return rows[..., : count * depth].unflatten(2, (count, depth)).transpose(1, 2)


@contextlib.contextmanager
def torch_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attention_cases(test):
    """Run a test with drawn shapes, layouts, scales, biases and numbers of threads."""
    drawn = given(
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
    return settings(deadline=None)(drawn(test))


@tiles
@attention_cases
def test_tiles_attend_to_the_rounding_of_weights_and_results(
    images, count, queries, keys, depth, joined, scale, biased, threads
):
    torch.manual_seed(queries * keys + depth)
    q, k, v = (heads(images, count, n, depth, joined) for n in (queries, keys, keys))
    bias = torch.randint(1, 9, (images, 1, 1, keys)).log() if biased else None
    wide = {"attn_mask": None if bias is None else bias.double(), "scale": scale}
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **wide)
    assert kernels.tiles_take(q, k, v)
    with torch_threads(threads):
        ours = kernels.attend_by_tiles(q, k, v, scale, bias)
    assert ours.shape == exact.shape and ours.dtype == torch.bfloat16
    sizes = F.scaled_dot_product_attention(q.double(), k.double(), v.double().abs(), **wide)
    assert ((ours - exact).abs() <= 1.01 * 2**-7 * sizes).all()  # weights and results are rounded, each by 2^-8


@tiles
def test_large_scores_and_broken_images_stay_what_they_are():
    q, k, v = (heads(3, 2, 40, 64) for _ in range(3))
    q = 300 * q  # one weight is 1, the others vanish
    k[1, 0, 5, 7] = float("nan")
    ours, theirs = kernels.attend_by_tiles(q, k, v, 1.0), F.scaled_dot_product_attention(q, k, v, scale=1.0)
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours[1, 0].isnan().all() and ours.isnan().sum() == 40 * 64
    torch.testing.assert_close(ours[0], theirs[0], atol=0.02, rtol=0.01)
    again = kernels.attend_by_tiles(q[2:], k[2:], v[2:], 1.0)  # what a broken image left behind touches nobody
    assert torch.equal(again[0], ours[2])


@tiles
def test_onednn_and_the_kernel_take_turns_at_the_tiles():
    x, weight = torch.randn(512, 256).bfloat16(), torch.randn(320, 256).bfloat16()
    expected = F.linear(x, weight)
    q, k, v = (heads(2, 2, 50, 64) for _ in range(3))
    for _ in range(3):
        kernels.attend_by_tiles(q, k, v, 0.1)
        assert torch.equal(F.linear(x, weight), expected)


@compiled
@attention_cases
def test_attention_in_float32_is_as_exact_as_pytorchs(
    images, count, queries, keys, depth, joined, scale, biased, threads
):
    torch.manual_seed(queries * keys + depth)
    q, k, v = (heads(images, count, n, depth, joined, torch.float32) for n in (queries, keys, keys))
    bias = torch.randint(1, 9, (images, 1, 1, keys)).log() if biased else None
    wide = None if bias is None else bias.double()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=wide, scale=scale)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    assert kernels.vectors_take(q, k, v)
    with torch_threads(threads):
        ours = kernels.attend_by_vectors(q, k, v, scale, bias)
    assert ours.shape == exact.shape and ours.dtype == torch.float32
    # sums of as many terms, in another order, and an exponential of 1.2e-7: a few times PyTorch's own error
    assert (ours - exact).abs().max() <= 6 * (theirs - exact).abs().max() + 2e-6


@compiled
def test_large_scores_and_broken_images_of_float32_stay_what_they_are():
    q, k, v = (heads(3, 2, 40, 64, dtype=torch.float32) for _ in range(3))
    q = 300 * q  # one weight is 1, the others vanish
    k[1, 0, 5, 7] = float("nan")
    bias = torch.zeros(3, 1, 1, 40)
    bias[2, ..., 20:] = -torch.inf  # these keys are hidden
    ours = kernels.attend_by_vectors(q, k, v, 1.0, bias)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours[1, 0].isnan().all() and ours.isnan().sum() == 40 * 64
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0, equal_nan=True)  # scores of 10,000 are rounded to 1e-3
    again = kernels.attend_by_vectors(q[2:], k[2:], v[2:], 1.0, bias[2:])
    assert torch.equal(again[0], ours[2])


@compiled
@settings(deadline=None)
@given(count=st.integers(1, 70), times=st.sampled_from([1, 1000]), spread=st.sampled_from([0.1, 3.0, 30.0]))
def test_gelu_and_its_gradient_are_as_exact_as_pytorchs(count, times, spread):
    torch.manual_seed(count)
    x, gradient = spread * torch.randn(2, count, times)[..., : times - times // 3], torch.randn(2, count, times)
    gradient = gradient[..., : x.shape[-1]]  # not contiguous
    wide = x.double().requires_grad_()
    exact = F.gelu(wide, approximate="tanh")
    (exact_gradient,) = torch.autograd.grad(exact, wide, gradient.double())
    ours = kernels.gelu_tanh(x)
    assert ((ours - exact).abs() <= 2**-21 * x.abs().clamp(min=1e-3)).all()
    of_x = kernels.gelu_tanh(x, gradient=gradient)
    assert ((of_x - exact_gradient).abs() <= 2**-20 * gradient.abs()).all()
    copy = x.clone(memory_format=torch.contiguous_format)
    assert kernels.gelu_tanh(copy, out=copy) is copy and torch.equal(copy, ours)


@compiled
def test_gelu_far_from_zero():
    x = torch.tensor([torch.inf, 3e38, 20.0, 0.0, -0.0, -20.0, -1e20, -3e38, torch.nan])
    expected = torch.tensor([torch.inf, 3e38, 20.0, 0.0, 0.0, 0.0, 0.0, 0.0, torch.nan])
    torch.testing.assert_close(kernels.gelu_tanh(x), expected, equal_nan=True)
    slopes = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0, torch.nan])
    torch.testing.assert_close(kernels.gelu_tanh(x, gradient=torch.ones(9)), slopes, equal_nan=True)


@pytest.mark.parametrize("built", [False, pytest.param(True, marks=wide)])
@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 200),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    step=st.sampled_from([1e-12, 0.01, 0.05, 2.0]),
    strided=st.booleans(),
    zero=st.sampled_from([0, 128]),
)
def test_int8_steps_are_those_of_pytorch(built, rows, width, dtype, step, strided, zero):
    torch.manual_seed(rows * width)
    norm = torch.nn.LayerNorm(width, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(rows, 2 * width, dtype=dtype)[:, :width] if strided else torch.randn(rows, width, dtype=dtype)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if not built:
            patch.setattr(kernels, "int8_library", lambda: None)
        rounded, normed = kernels.round_to_int8(x, step, zero), kernels.norm_to_int8(x, norm, step, zero)
        exact = norm.double()(x.double()) / step
    dtype = torch.uint8 if zero else torch.int8
    expected = (x.float() * (1 / step)).round().clamp(-127, 127) + zero
    torch.testing.assert_close(rounded, expected.to(dtype), atol=0, rtol=0)
    assert normed.dtype == dtype and normed.shape == x.shape
    assert (normed.int() - zero - exact.clamp(-127, 127)).abs().max() <= 0.5 + 1e-3


maps = pytest.mark.skipif(
    kernels.maps_library() is None, reason="needs Linux on x86-64 and a C++ compiler with OpenMP"
)


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
    kind=st.sampled_from(["none", "added", "normalized"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.integers(1, 3),
)
def test_group_norm_shortcut_and_relu_are_exact_to_one_rounding(
    images, groups, width, size, offset, kind, dtype, threads
):
    torch.manual_seed(images * width + size[0])
    channels = groups * width
    x, other = (channels_last(images, channels, *size, dtype=dtype) for _ in range(2))
    x += offset
    norms = [(torch.randn(channels), torch.randn(channels), 1e-6, groups) for _ in range(2)]
    by_torch = [
        torch.group_norm(y.double(), g, w.double(), b.double(), eps) for y, (w, b, eps, g) in zip((x, other), norms)
    ]
    exact = (by_torch[0] + {"none": 0, "added": other, "normalized": by_torch[1]}[kind]).relu()
    kept = other.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        used = norms if kind == "normalized" else norms[:1]
        ours = kernels.group_norm_(x, *used, shortcut=None if kind == "none" else other)
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
        ours = kernels.group_norm_(x, (weight, bias, 1e-6, 32))
        alone = kernels.group_norm_(last, (weight, bias, 1e-6, 32))
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
    ours, theirs = kernels.max_pool(x, same_amounts(x, 3, 2)), F.max_pool2d(padded, 3, stride=2)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_other_tensors_are_not_taken():
    q = heads(1, 2, 4, 8)
    assert not kernels.tiles_take(q.float(), q, q)
    assert not kernels.tiles_take(q, q.transpose(2, 3).contiguous().transpose(2, 3), q)
    assert not kernels.tiles_take(q, q, q.to("meta"))
    assert not kernels.vectors_take(q, q, q)
    assert not kernels.vectors_take(q.float(), q.float(), q.float().to("meta"))
    x = channels_last(2, 3, 4, 5)
    assert kernels.takes_map(x) == (kernels.maps_library() is not None)
    for other in (x.contiguous(), x.double(), x.half(), x.to("meta")):
        assert not kernels.takes_map(other)


@pytest.mark.skipif(not capabilities.packs_linear(torch.float32), reason="needs oneDNN")
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
def test_packed_linear_layers_are_pytorchs(gelu):
    x, rest, weight, bias = torch.randn(7, 24), torch.randn(7, 40), torch.randn(40, 24), torch.randn(40)
    packed, expected = kernels.pack_linear(weight), F.linear(x, weight, bias)
    if gelu:
        expected = F.gelu(expected, approximate=gelu)
    torch.testing.assert_close(kernels.packed_linear(x, packed, bias, gelu), expected, atol=1e-5, rtol=1e-5)
    added = kernels.packed_linear_add(x, rest, packed, None)
    torch.testing.assert_close(added, F.linear(x, weight) + rest, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(capabilities.int8_backend() != "onednn", reason="needs VNNI or AMX")
def test_int8_linear_layers_of_onednn_are_exact_to_rounding():
    rows, steps = (
        torch.randint(-127, 128, (9, 64), dtype=torch.int8),
        torch.randint(-127, 128, (32, 64)).to(torch.int8),
    )
    worth, bias = torch.rand(32) + 0.1, torch.randn(32)
    exact = 0.01 * worth * (rows.double() @ steps.double().t()) + bias
    packed, zero = kernels.pack_int8(steps), capabilities.int8_zero()
    rows = kernels.round_to_int8(rows.float(), 1.0, zero)
    result = kernels.int8_linear(rows, 0.01, zero, packed, worth, bias, torch.float32)
    torch.testing.assert_close(result.double(), exact, atol=1e-3, rtol=1e-5)
    total = torch.randn(9, 32)
    expected = total + exact
    kernels.int8_linear_add_(total, rows, 0.01, zero, packed, worth, bias)
    torch.testing.assert_close(total.double(), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.skipif(not capabilities.is_x86(), reason="FBGEMM is for x86")
def test_int8_linear_layers_of_fbgemm_do_not_saturate():
    """The largest activations and the largest weights of 7 bits, where 8 bits overflow without VNNI."""
    rows, steps = torch.full((4, 512), 127.0), torch.full((16, 512), 63, dtype=torch.int8)
    steps[1::2] = -63
    packed = kernels.pack_int8_fbgemm(steps, torch.ones(16), torch.zeros(16))
    result = kernels.int8_linear_fbgemm(rows, 1.0, 128, packed)
    assert torch.equal(result, rows @ steps.float().t())
