"""resnet_stem.py: the formula of weight standardization, XLA's padding, and a unit by hand.

pytest tests/hf_vit/modeling/test_resnet_stem.py
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vit import HFViTConfig
from hf_vit.modeling import resnet_stem
from hf_vit.modeling.resnet_stem import ResidualUnit, ResNetStem, StdConv2d, same_padding, standardize


pytestmark = pytest.mark.numerics


def tiny(**fields) -> HFViTConfig:
    return HFViTConfig(
        **({"image_size": 64, "patch_size": 1, "resnet_depths": (1, 2), "resnet_width_factor": 0.5} | fields)
    )


@pytest.mark.parametrize("variant", ["std_plus_eps", "sqrt_var_plus_eps"])
def test_standardized_weight_by_the_formula(variant):
    conv = StdConv2d(3, 8, 5, 1, eps=1e-2, variant=variant)  # a large eps tells the two formulas apart
    weight = conv.weight.double()
    mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True, correction=0)
    expected = (weight - mean) / ((var.sqrt() + 1e-2) if variant == "std_plus_eps" else (var + 1e-2).sqrt())
    torch.testing.assert_close(conv.standardized_weight().double(), expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 40), kernel=st.sampled_from([1, 3, 7]), stride=st.sampled_from([1, 2]))
def test_same_padding_follows_xla(size, kernel, stride):
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    padded = same_padding(torch.ones(1, 1, size, size), kernel, stride)
    rows = padded[0, 0].sum(1)
    assert padded.shape[-1] == size + total
    assert int((rows == 0).int().argmin()) == total // 2  # low = total // 2
    assert F.conv2d(padded, torch.ones(1, 1, kernel, kernel), stride=stride).shape[-1] == math.ceil(size / stride)


def test_even_input_pads_bottom_and_right():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(same_padding(x, 3, 2), F.pad(x, (0, 1, 0, 1)))
    assert torch.equal(same_padding(x, 7, 2), F.pad(x, (2, 3, 2, 3)))


@pytest.fixture
def computed(monkeypatch) -> list:
    """A list that grows by one with every standardization."""
    calls, formula = [], resnet_stem.standardize
    monkeypatch.setattr(resnet_stem, "standardize", lambda *args: (calls.append(1), formula(*args))[1])
    return calls


@pytest.mark.parametrize("variant", ["std_plus_eps", "sqrt_var_plus_eps"])
def test_gradient_of_the_kernel_is_that_of_the_formula(variant):
    conv = StdConv2d(3, 8, 3, 1, eps=1e-2, variant=variant).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for _ in range(2):
        ours = torch.autograd.grad(conv(x).square().sum(), conv.weight)[0]
        kernel = standardize(conv.weight, conv.eps, variant)[0]
        formula = torch.autograd.grad(F.conv2d(x, kernel, padding=1).square().sum(), conv.weight)[0]
        torch.testing.assert_close(ours, formula)


def test_standardized_once_for_each_value_of_the_weight(computed):
    conv = StdConv2d(3, 8, 3, 1, eps=1e-5, variant="std_plus_eps")
    x = torch.randn(2, 3, 6, 6)

    @torch.no_grad()
    def computes(expected: int, run) -> None:
        computed.clear()
        run()
        assert len(computed) == expected
        assert torch.equal(conv._cached[1], standardize(conv.weight, conv.eps, conv.variant)[0])

    with torch.inference_mode():
        computes(1, lambda: conv(x))
        computes(0, lambda: conv(x))
    computes(1, lambda: (conv.load_state_dict({"weight": torch.randn(8, 3, 3, 3)}), conv(x)))
    computes(1, lambda: (conv.weight.copy_(torch.randn(8, 3, 3, 3)), conv(x)))  # how averages are put in place
    computes(1, lambda: conv.double()(x.double()))
    gathered = torch.nn.Parameter(conv.weight.detach())
    conv.weight = gathered  # FSDP: same version, same address, perhaps other contents
    computes(1, lambda: conv(x.double()))


@pytest.mark.parametrize("fused", [True, False])
def test_every_step_of_an_optimizer_is_seen(fused):
    """A fused optimizer changes a weight without another version."""
    conv = StdConv2d(3, 8, 3, 1, eps=1e-5, variant="std_plus_eps")
    x = torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=fused)

    def right() -> bool:
        return torch.equal(conv.kernel(), standardize(conv.weight, conv.eps, conv.variant)[0])

    for _ in range(2):
        for _ in range(2):  # micro-batches
            conv(x).square().sum().backward()
        optimizer.step()
        assert right()  # in training
        with torch.no_grad():
            assert right() and right()  # in evaluation, also where nobody called eval()
    with torch.no_grad():
        conv(x)  # kept
    optimizer.step()  # no forward pass of its own since
    with torch.no_grad():
        conv.eval()
        assert right()


def test_copies_and_pickles_leave_the_kept_kernel_behind():
    conv = StdConv2d(3, 8, 3, 1, eps=1e-5, variant="std_plus_eps")
    x = torch.randn(2, 3, 6, 6)
    expected = conv(x)
    twin = copy.deepcopy(conv)
    assert twin._cached is None
    torch.testing.assert_close(twin(x), expected)
    with torch.no_grad():
        twin.weight.mul_(-1)
    torch.testing.assert_close(twin(x), -expected)
    torch.testing.assert_close(conv(x), expected)


def test_compiled_and_under_function_transforms():
    conv = StdConv2d(3, 8, 3, 2, eps=1e-5, variant="std_plus_eps").double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(conv, fullgraph=True, backend="aot_eager")(x), conv(x))

    def loss(weights, one):
        return torch.func.functional_call(conv, weights, (one[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(conv.named_parameters()), x)["weight"]
    whole = torch.autograd.grad(conv(x).square().sum(), conv.weight)[0]
    torch.testing.assert_close(each.sum(0), whole)


def test_unit_is_post_activation_with_the_stride_on_the_3x3():
    torch.manual_seed(0)
    unit = ResidualUnit(tiny(), in_channels=64, features=32, stride=2)
    x = torch.randn(2, 64, 9, 9)

    def conv(layer, x, stride=1):
        x = same_padding(x, layer.kernel_size[0], stride) if layer.kernel_size[0] > 1 else x
        return F.conv2d(x, layer.standardized_weight(), stride=stride)

    y = F.relu(unit.gn1(conv(unit.conv1, x)))
    y = F.relu(unit.gn2(conv(unit.conv2, y, 2)))
    y = unit.gn3(conv(unit.conv3, y))
    torch.testing.assert_close(unit(x), F.relu(unit.gn_proj(conv(unit.conv_proj, x, 2)) + y))


def test_projections_stand_where_the_shape_changes():
    stem = ResNetStem(tiny(resnet_depths=(2, 2)))
    assert [[unit.has_projection for unit in stage.units] for stage in stem.stages] == [[True, False], [True, False]]


def test_root_only_and_stages_have_the_declared_shape():
    for depths in ((), (1,), (1, 1, 1)):
        config = tiny(resnet_depths=depths)
        with torch.device("meta"):
            out = ResNetStem(config)(torch.empty(2, 3, 72, 50))
        assert out.shape[1] == config.stem_channels
        assert tuple(out.shape[-2:]) == config.grid_for((72, 50))
