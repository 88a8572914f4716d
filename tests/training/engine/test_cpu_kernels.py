"""The CPU's training kernels compute what PyTorch's functions compute, and serve only where they were measured faster.

python -m pytest tests/training/engine/test_cpu_kernels.py
"""

import pytest
import torch
import torch.nn.functional as F

from hf_vit import HFViTConfig, HFViTForImageClassification, kernel_table
from hf_vit.capabilities import packs_linear
from hf_vit.inference import kernels
from training.config.arguments import TrainArguments
from training.engine import cpu_kernels, kernel_choice
from training.engine.cpu_kernels import CPUKernels, kernels_for
from training.engine.trainer import Trainer


pytestmark = pytest.mark.numerics


@pytest.fixture(autouse=True)
def _small_sizes_count(monkeypatch, tmp_path):
    """Tiny tensors are not left to PyTorch, and each test starts with an empty table."""
    for name in ("MIN_OPERATIONS", "MIN_KEYS", "MIN_ELEMENTS"):
        monkeypatch.setattr(cpu_kernels, name, 1)
    monkeypatch.setattr(kernel_table, "cache_folder", lambda: tmp_path)
    cpu_kernels.forget_measurements()
    yield
    cpu_kernels.forget_measurements()


class Table:
    """Stands in for `kernel_table.seconds`: runs every implementation once and pretends that some are the faster.

    Attributes:
        used: names of the implementations that were favored and did not fail, so will serve.
        measured: all keys.
    """

    def __init__(self, *favorites: str):
        self.favorites, self.used, self.measured = favorites, [], []

    def __call__(self, key, implementations, *inputs, cold):
        times = {}
        for name, implementation in implementations.items():
            try:
                implementation(*inputs)
                times[name] = 1.0 if name not in self.favorites else 0.5
            except RuntimeError:
                times[name] = None
        self.used += [name for name, time in times.items() if time == 0.5]
        self.measured.append(key)
        return times


@pytest.fixture
def favor(monkeypatch):
    def install(*favorites: str) -> Table:
        table = Table(*favorites)
        monkeypatch.setattr(kernel_table, "seconds", table)
        cpu_kernels.forget_measurements()
        return table

    return install


@pytest.fixture
def emulated(monkeypatch):
    """A processor without bfloat16 instructions."""
    monkeypatch.setattr(cpu_kernels, "native_bfloat16", lambda: False)
    monkeypatch.setattr(cpu_kernels, "packs_linear", lambda dtype: dtype == torch.float32 and packs_linear(dtype))


def values_and_gradients(function, tensors):
    """The function's value and its gradients, for a fixed gradient of the value."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    result = function(*leaves)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    return [result.detach(), *torch.autograd.grad(result, leaves, weights)]


def patches(x, weight, bias):
    return F.conv2d(x, weight, bias, stride=(3, 4))


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


FUNCTIONS = {  # which candidate is favored, what it computes, of what
    "attention": ("matmuls", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), [(2, 3, 7, 4)] * 3),
    "attention of one query": ("matmuls", F.scaled_dot_product_attention, [(2, 3, 1, 4), *[(2, 3, 7, 4)] * 2]),
    "linear to fewer": ("matmuls", F.linear, [(2, 5, 8), (6, 8), (6,)]),
    "linear to more": ("matmuls", F.linear, [(2, 5, 8), (11, 8), (11,)]),
    "linear without bias": ("matmuls", F.linear, [(2, 5, 8), (11, 8)]),
    "patches": ("matmul", patches, [(2, 3, 12, 20), (5, 3, 3, 4), (5,)]),
    "patches and a rest": ("matmul", patches, [(2, 3, 14, 21), (5, 3, 3, 4), (5,)]),
    "linear in float32": ("float32", F.linear, [(2, 5, 8), (6, 8), (6,)]),
    "attention in float32": ("float32", F.scaled_dot_product_attention, [(2, 3, 7, 4)] * 3),
    "convolution in float32": ("float32", lambda x, w: F.conv2d(x, w, padding=1), [(2, 3, 7, 7), (4, 3, 3, 3)]),
}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradients_are_those_of_pytorch_in_float64(name, precision, favor, request):
    candidate, function, shapes = FUNCTIONS[name]
    if candidate == "float32":
        if precision == torch.float32:
            return  # nothing to emulate
        request.getfixturevalue("emulated")
    elif candidate == "matmuls" and "linear" in name and not packs_linear(precision):
        return  # there is no candidate then, and the fixture would find none used
    table = favor(candidate, "onednn")
    tensors = [torch.randn(shape) for shape in shapes]
    expected = values_and_gradients(function, [x.double() for x in tensors])
    with CPUKernels(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        results = values_and_gradients(function, tensors)
    assert candidate in table.used
    tolerance = 1e-5 if precision == torch.float32 else 0.03
    assert results[0].dtype == precision
    for result, reference in zip(results, expected):
        assert result is results[0] or result.dtype == torch.float32
        assert (result - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "width", "out"), [(70, 8, 6), (5, 16, 130)])
def test_every_matmul_of_a_linear_layer_is_exact_to_rounding(dtype, rows, width, out):
    if not packs_linear(dtype):
        return  # PyTorch's own function is the only one then
    x, weight, bias, gradient = (
        torch.randn(shape).to(dtype) for shape in ((rows, width), (out, width), out, (rows, out))
    )
    inputs = {
        "output": ((x, weight, bias), x.double() @ weight.double().t() + bias.double()),
        "input gradient": ((gradient, weight), gradient.double() @ weight.double()),
        "weight gradient": ((gradient, x), gradient.double().t() @ x.double()),
    }
    for matmul, candidates in cpu_kernels.matmul_candidates(dtype).items():
        arguments, expected = inputs[matmul]
        for function in candidates.values():
            with torch.no_grad():
                result = function(*arguments)
            assert result.is_contiguous()
            assert (result - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.01) * expected.abs().max()


def test_gelu_of_bfloat16_is_within_its_rounding(favor):
    favor("erf")
    x = torch.linspace(-8, 8, 2001).bfloat16().requires_grad_()
    exact = F.gelu(x.double(), approximate="tanh")
    with CPUKernels():
        y = tanh_gelu(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, F.gelu(x))
    assert ((y - exact).abs() <= 5e-4 + 2**-8 * exact.abs()).all()


@pytest.mark.skipif(kernels.float32_library() is None, reason="needs x86-64, Linux and a C++ compiler with OpenMP")
def test_gelu_of_float32_and_its_gradient(favor):
    table = favor("C++")
    x = torch.linspace(-8, 8, 2001)
    expected = values_and_gradients(tanh_gelu, [x.double()])
    with CPUKernels():
        results = values_and_gradients(tanh_gelu, [x])
        torch.testing.assert_close(tanh_gelu(x.double().requires_grad_()), expected[0])  # PyTorch's own
    assert "C++" in table.used
    for result, reference in zip(results, expected):
        assert result.dtype == torch.float32 and (result - reference).abs().max() <= 2e-6 * reference.abs().max()


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3,), {}),
        ((1,), {"gradient": torch.zeros(1)}),
        ((3,), {"gradient": torch.ones(3)}),
        ((1,), {"inputs": []}),
        ((1,), {"gradient": None, "retain_graph": False}),
    ],
)
def test_a_backward_pass_is_pytorchs(shape, options):
    def outcome():
        x = torch.ones(shape, requires_grad=True)
        try:
            (3 * x).backward(**options)
        except RuntimeError as error:
            return str(error)
        return x.grad.tolist()

    expected = outcome()
    with CPUKernels():
        assert outcome() == expected


@pytest.mark.parametrize("name", ["linear to more", "attention", "patches"])
def test_autocast_leaves_float64_as_it_is(name, favor):
    favored, function, shapes = FUNCTIONS[name]
    table = favor(favored)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        expected = values_and_gradients(function, tensors)
        with CPUKernels():
            results = values_and_gradients(function, tensors)
    assert all(map(torch.equal, results, expected)) and not table.measured


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.linear(x.bfloat16(), w),
        lambda x, w: F.linear(x[:, :-1], w),
        lambda x, w: F.linear(x, w, torch.zeros(1, len(w))),
        lambda x, w: torch.func.vmap(lambda row: F.linear(row, w))(x),
        lambda x, w: torch.func.grad(lambda x: F.linear(x, w).square().sum())(x),
        lambda x, w: torch.func.jvp(lambda x: F.linear(x, w), (x,), (x,))[1],
    ],
)
def test_what_the_kernels_do_not_know_is_pytorchs_to_compute_or_to_refuse(call, favor):
    favor("matmuls")
    x, weight = torch.randn(6, 8), torch.randn(11, 8, requires_grad=True)

    def outcome():
        try:
            return call(x, weight).tolist()
        except RuntimeError as error:
            return str(error)

    expected = outcome()
    with CPUKernels():
        assert outcome() == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5),
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(7, 7, dtype=torch.bool).tril()),
        lambda q: F.gelu(q),
        lambda q: F.conv2d(q, torch.ones(2, 3, 3, 3, requires_grad=True), stride=2),
        lambda q: F.linear(q.detach(), torch.ones(5, 8)),
    ],
)
def test_other_functions_are_pytorchs_own(call, favor, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "native_bfloat16", lambda: True)  # else convolutions may be computed in float32
    table = favor("matmuls", "matmul", "erf")
    q = torch.randn(2, 3, 7, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        expected = call(q)
        torch.manual_seed(1)
        with CPUKernels():
            assert torch.equal(call(q), expected)
    assert not table.measured


def test_without_gradients_nothing_is_measured(favor):
    table = favor("matmuls")
    q = torch.randn(2, 3, 7, 4, requires_grad=True)
    with CPUKernels(), torch.no_grad():
        F.scaled_dot_product_attention(q, q, q)
    assert not table.measured


def test_what_is_not_faster_is_pytorchs_own_bit_for_bit(favor):
    table = favor()
    tensors = [torch.randn(2, 3, 7, 4) for _ in range(3)]
    expected = values_and_gradients(F.scaled_dot_product_attention, tensors)
    with CPUKernels():
        results = values_and_gradients(F.scaled_dot_product_attention, tensors)
    assert table.measured and all(map(torch.equal, results, expected))


def test_a_candidate_that_fails_or_is_wrong_is_left_out(monkeypatch, favor):
    table = favor("wrong", "failing", "right")

    def failing(x):
        raise RuntimeError("could not create a primitive descriptor")

    def name(**functions) -> str:
        return kernel_choice.fastest(("test", *functions), {"torch": torch.sin, **functions}, torch.randn(5))

    assert name(failing=failing) == "torch"
    assert name(wrong=lambda x: 1.01 * x.sin()) == "torch"
    assert name(wrong=lambda x: x.sin().detach() + 0 * x) == "torch"  # the gradient is wrong
    assert name(right=lambda x: x.sin()) == "right"
    assert table.used == ["right"]


def test_a_shape_is_measured_once_on_a_machine_whatever_the_clock_says(monkeypatch):
    """The choice comes from the table on the disk, so a second process and a resumed run compute the same bits."""
    clock = iter(range(10**9))
    monkeypatch.setattr(kernel_table, "timer", lambda: next(clock) ** 1.01)

    def choice() -> str:
        functions = {"torch": torch.sin, "other": lambda x: x.sin()}
        return kernel_choice.fastest(("test",), functions, torch.randn(5), min_speedup=0.9)

    first = choice()
    monkeypatch.setattr(kernel_table, "measure_times", lambda *_, **__: pytest.fail("measured again"))
    cpu_kernels.forget_measurements()
    assert choice() == first


def test_sizes_are_measured_at_powers_of_four(favor):
    """Drop path leaves a different number of rows in every step: these are few measurements."""
    assert [cpu_kernels._round_down(size, 4096) for size in (0, 1, 3, 4, 15, 16, 1576, 10**6)] == [
        1, 1, 1, 4, 4, 16, 1024, 4096,
    ]  # fmt: skip
    table = favor("matmuls")
    for batch in range(1, 9):
        q = torch.randn(batch, 2, 7, 4, requires_grad=True)
        with CPUKernels():
            F.scaled_dot_product_attention(q, q, q)
    assert len(table.measured) == 3  # 2 to 16 heads: 1, 4, 16


def test_without_a_cache_folder_everything_is_pytorchs_own(monkeypatch):
    monkeypatch.setattr(kernel_table, "cache_folder", lambda: None)
    tensors = [torch.randn(2, 3, 7, 4) for _ in range(3)]
    expected = values_and_gradients(F.scaled_dot_product_attention, tensors)
    with CPUKernels():
        assert all(map(torch.equal, values_and_gradients(F.scaled_dot_product_attention, tensors), expected))


# -- in training ------------------------------------------------------------------------------------------------------


def tiny_model(**changes) -> HFViTForImageClassification:
    config = HFViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_labels=5, **changes,
    )  # fmt: skip
    model = HFViTForImageClassification(config).train()
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    return model


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "emulated"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_alike(precision, checkpointing, favor, request):
    if precision == "emulated":
        request.getfixturevalue("emulated")
    table = favor("matmuls", "matmul", "onednn", "float32", "erf")
    model = tiny_model(drop_path_rate=0.2)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    pixels, labels = torch.randn(4, 3, 32, 32), torch.arange(4)

    def step():
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
            loss = model(pixels, labels=labels).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = step()
    with CPUKernels():
        results = step()
    assert {"matmuls", "matmul"} & set(table.used)
    assert precision != "emulated" or "float32" in table.used
    scale = max(x.abs().max() for x in expected)
    emulated_by_old = precision == "emulated" and torch.__version__.startswith("2.9.")  # 0.028 apart
    tolerance = 1e-5 if precision == "float32" else 0.04 if emulated_by_old else 0.02
    for result, reference in zip(results, expected):
        assert (result - reference).abs().max() <= tolerance * scale


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "emulated"])
def test_measuring_leaves_no_trace_in_a_step(precision, request):
    """Within autocast and activation checkpointing: gradients and random numbers are as when measured before."""
    if precision == "emulated":
        request.getfixturevalue("emulated")
    model = tiny_model(hidden_dropout_prob=0.1)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    pixels, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    parameters = list(model.parameters())

    def step():
        model.zero_grad()
        torch.manual_seed(3)
        with CPUKernels(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
            model(pixels, labels=labels).loss.backward()
        return [*(p.grad.clone() for p in parameters), torch.get_rng_state()]

    measuring = step()
    assert cpu_kernels._linear_for.cache_info().misses
    misses = cpu_kernels._linear_for.cache_info().misses
    measured = step()
    assert cpu_kernels._linear_for.cache_info().misses == misses
    assert all(map(torch.equal, measuring, measured))


def test_a_first_layer_and_a_frozen_one_compute_no_gradient_that_nobody_needs(favor):
    favor("matmuls", "onednn")
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    for needs_input, needs_weight in ((False, True), (True, False)):
        leaves = [x.clone().requires_grad_(needs_input), weight.clone().requires_grad_(needs_weight)]
        with CPUKernels():
            F.linear(*leaves).sum().backward()
        expected = [weight.sum(0).expand(4, 8), x.sum(0).expand(6, 8)]
        for leaf, gradient, needed in zip(leaves, expected, (needs_input, needs_weight)):
            assert (leaf.grad is not None) == needed
            if needed:
                torch.testing.assert_close(leaf.grad, gradient)


def test_the_option_is_honored():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert isinstance(kernels_for(cpu, True, False), CPUKernels)
    for off in ((cpu, False, False), (cpu, True, True), (gpu, True, False)):
        assert not isinstance(kernels_for(*off), CPUKernels)


def train(folder, **changes):
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": number % 3} for number in range(4)]
    arguments = TrainArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, bf16=True, use_cpu=True,
        save_strategy="no", **changes,
    )  # fmt: skip
    trainer = Trainer(tiny_model(), arguments, data)
    trainer.train()
    return trainer


@pytest.mark.parametrize("faster", ["plain", "kernels"])
def test_a_small_pass_does_without_kernels_that_make_it_slower(faster, favor):
    favor("matmuls", "onednn", faster)
    x, weight = torch.randn(64, 256, requires_grad=True), torch.randn(256, 256, requires_grad=True)
    kernels, plain, passes = CPUKernels(), F.linear(x, weight), []
    kernels.disable_if_slower(("test",), lambda: passes.append("plain"), lambda: passes.append("kernels"))
    assert passes[0] == "kernels"  # chooses the kernels of its parts first, which is not timed
    for _ in range(2):
        with kernels:
            result = F.linear(x, weight)
        replaced = type(result.grad_fn) is not type(plain.grad_fn)
        assert replaced == (faster == "kernels" and packs_linear(x.dtype))


@pytest.mark.parametrize("faster", ["plain", "kernels"])
def test_a_run_of_small_passes_measures_them_as_a_whole(faster, tmp_path, favor):
    """Without kernels that make the pass slower, a run computes what it computes without the option, bit for bit."""
    logs = {}
    for requested in (True, False):
        table = favor("matmuls", faster)
        torch.manual_seed(0)
        logs[requested] = train(tmp_path / str(requested), cpu_kernels=requested).state.log_history[0]
        assert any(key[0] == "training, pass" for key in table.measured) == requested
    assert (logs[True]["grad_norm"] == logs[False]["grad_norm"]) == (faster == "plain")


@pytest.mark.parametrize("requested", [True, False])
def test_the_trainer_uses_them_unless_told_not_to(requested, tmp_path, favor):
    table = favor("matmuls")
    train(tmp_path / "run", cpu_kernels=requested)
    assert any("attention" in key[0] for key in table.measured) == requested


@pytest.mark.parametrize("requested", [True, False])
def test_a_run_in_emulated_bfloat16_works_and_says_once_what_it_costs(requested, tmp_path, emulated, capfd):
    train(tmp_path / "run", cpu_kernels=requested)
    output = "".join(capfd.readouterr())
    assert output.count("this processor emulates bfloat16: training takes ") == 1
    factor = cpu_kernels.bfloat16_slowdown(requested)
    assert f"takes {factor:.2f} times the time of float32" in output


def test_the_note_on_emulated_bfloat16_is_for_such_processors_and_needs_no_cache(monkeypatch, emulated):
    monkeypatch.setattr(kernel_table, "cache_folder", lambda: None)
    assert "takes more time than float32" in (cpu_kernels.bfloat16_note(True) or "")
    monkeypatch.setattr(cpu_kernels, "native_bfloat16", lambda: True)
    cpu_kernels.forget_measurements()
    assert cpu_kernels.bfloat16_note(True) is None
