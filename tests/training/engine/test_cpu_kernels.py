"""The CPU's training kernels compute what PyTorch's functions compute, and step aside where they should.

python -m pytest tests/training/engine/test_cpu_kernels.py
"""

import pytest
import torch
import torch.nn.functional as F

from hf_vit import HFViTConfig, HFViTForImageClassification
from training.config.arguments import TrainArguments
from training.engine import cpu_kernels
from training.engine.cpu_kernels import BFloat16Linear, CPUKernels, OneDNNLinear, kernels_for
from training.engine.trainer import Trainer


pytestmark = pytest.mark.numerics


@pytest.fixture(autouse=True)
def small_counts_as_large(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "KEYS", 1)
    monkeypatch.setattr(cpu_kernels, "ELEMENTS", 1)
    monkeypatch.setattr(cpu_kernels, "OPERATIONS", 1)
    monkeypatch.setattr(cpu_kernels, "ROWS", 3)


def gradients(function, tensors):
    """The function's value and its gradients, for a fixed gradient of the value."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    result = function(*leaves)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    return [result.detach(), *torch.autograd.grad(result, leaves, weights)]


def used(monkeypatch, name):
    """A list that grows with each use of an autograd function."""
    calls, function = [], getattr(cpu_kernels, name)
    apply = function.apply
    monkeypatch.setattr(function, "apply", lambda *args: calls.append(name) or apply(*args))
    return calls


FUNCTIONS = {
    "Attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), [(2, 3, 7, 4)] * 3, "bfloat16"),
    "Attention of one query": (F.scaled_dot_product_attention, [(2, 3, 1, 4), *[(2, 3, 7, 4)] * 2], "bfloat16"),
    "BFloat16Linear to fewer": (F.linear, [(2, 5, 8), (6, 8), (6,)], "bfloat16"),
    "BFloat16Linear to more": (F.linear, [(2, 5, 8), (11, 8), (11,)], "bfloat16"),
    "BFloat16Linear without bias": (F.linear, [(2, 5, 8), (11, 8)], "bfloat16"),
    "OneDNNLinear": (F.linear, [(2, 5, 8), (6, 8), (6,)], "float32"),
    "OneDNNLinear without bias": (F.linear, [(2, 5, 8), (6, 8)], "float32"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradients_are_those_of_pytorch_in_float64(name, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "onednn_is_faster", lambda: True)
    calls = used(monkeypatch, name.split()[0])
    function, shapes, precision = FUNCTIONS[name]
    tensors = [torch.randn(shape) for shape in shapes]
    expected = gradients(function, [x.double() for x in tensors])
    with CPUKernels(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        found = gradients(function, tensors)
    assert calls
    tolerance = 1e-5 if precision == "float32" else 0.03
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32 or (one is found[0] and one.dtype == torch.bfloat16)
        torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [(12, 20), (15, 21)])
def test_patches_are_the_convolution(size):
    tensors = [torch.randn(2, 3, *size), torch.randn(5, 3, 3, 4), torch.randn(5)]

    def embed(x, weight, bias):
        return F.conv2d(x, weight, bias, stride=(3, 4))

    expected = gradients(embed, [x.double() for x in tensors])
    with CPUKernels():
        found = gradients(embed, tensors)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)


def test_gelu_of_bfloat16_is_within_its_rounding():
    x = torch.linspace(-8, 8, 2001).bfloat16().requires_grad_()
    exact = F.gelu(x.double(), approximate="tanh")
    with CPUKernels():
        y = F.gelu(x, approximate="tanh")
    assert y.dtype == torch.bfloat16 and torch.equal(y, F.gelu(x))
    assert ((y - exact).abs() <= 5e-4 + 2**-8 * exact.abs()).all()
    plain = F.gelu(x.float(), approximate="tanh")
    with CPUKernels():
        assert torch.equal(F.gelu(x.float(), approximate="tanh"), plain)


def test_a_norm_is_rounded_once_for_all_who_read_it():
    x, weight, bias = torch.randn(3, 8, requires_grad=True), torch.rand(8), torch.randn(8)
    exact = F.layer_norm(x, (8,), weight, bias, 1e-6)
    with CPUKernels():
        assert torch.equal(F.layer_norm(x, (8,), weight, bias, 1e-6), exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(F.layer_norm(x, (8,), weight, bias, 1e-6), exact.bfloat16())


@pytest.mark.parametrize(
    "call",
    [
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5),
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(7, 7, dtype=torch.bool).tril()),
        lambda q: F.gelu(q),
        lambda q: F.conv2d(q, torch.ones(2, 3, 3, 3, requires_grad=True), stride=2),
        lambda q: F.linear(q, torch.ones(5, 8)),
    ],
)
def test_others_are_pytorchs_own(call):
    q = torch.randn(2, 3, 7, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        expected = call(q)
        torch.manual_seed(1)
        with CPUKernels():
            assert torch.equal(call(q), expected)


def test_without_gradients_nothing_changes(monkeypatch):
    calls = used(monkeypatch, "Attention")
    q = torch.randn(2, 3, 7, 4, requires_grad=True, dtype=torch.bfloat16)
    with CPUKernels(), torch.no_grad():
        F.scaled_dot_product_attention(q, q, q)
    assert not calls


def test_few_tokens_count_by_what_there_is_to_do(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "KEYS", 64)
    calls = used(monkeypatch, "Attention")
    for batch, count in ((1, 0), (8, 1)):  # 2 heads, 2 tokens of width 4
        q = torch.randn(batch, 2, 2, 4, requires_grad=True, dtype=torch.bfloat16)
        with CPUKernels():
            F.scaled_dot_product_attention(q, q, q)
        assert len(calls) == count


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_alike(precision, checkpointing, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "onednn_is_faster", lambda: True)
    config = HFViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=5,
        drop_path_rate=0.2,
    )  # fmt: skip
    model = HFViTForImageClassification(config).train()
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    pixels, labels = torch.randn(4, 3, 32, 32), torch.arange(4)

    def step():
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(pixels, labels=labels).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = step()
    low = used(monkeypatch, "Attention"), used(monkeypatch, "BFloat16Linear")
    onednn = used(monkeypatch, "OneDNNLinear")
    with CPUKernels():
        found = step()
    assert all(low) if precision == "bfloat16" else onednn and not any(low)
    scale = max(x.abs().max() for x in expected)
    tolerance = 1e-5 if precision == "float32" else 0.02
    for one, other in zip(found, expected):
        assert (one - other).abs().max() <= tolerance * scale


def test_a_first_layer_computes_no_gradient_of_its_input(monkeypatch):
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    for function, given in ((OneDNNLinear, x), (BFloat16Linear, x.bfloat16())):
        weight.grad = None
        function.apply(given, weight, None).sum().backward()
        torch.testing.assert_close(weight.grad, x.sum(0).expand(6, 8), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("name", "expected"), [("AMD EPYC 9755", True), ("Intel(R) Xeon(R) Processor", False)])
def test_the_library_depends_on_the_processor_alone(name, expected, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "processor_name", lambda: name)
    assert cpu_kernels.onednn_is_faster.__wrapped__() is expected


def test_the_switch_is_honoured():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert isinstance(kernels_for(cpu, True, False), CPUKernels)
    for off in ((cpu, False, False), (cpu, True, True), (gpu, True, False)):
        assert not isinstance(kernels_for(*off), CPUKernels)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_trainer_uses_them_unless_told_not_to(wanted, tmp_path, monkeypatch):
    calls = used(monkeypatch, "Attention")
    config = HFViTConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=3,
    )  # fmt: skip
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": number % 3} for number in range(4)]
    arguments = TrainArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, bf16=True, use_cpu=True,
        cpu_kernels=wanted, save_strategy="no",
    )  # fmt: skip
    Trainer(HFViTForImageClassification(config), arguments, data).train()
    assert bool(calls) == wanted
