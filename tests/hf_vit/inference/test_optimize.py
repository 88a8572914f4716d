"""Optimized models answer as plain ones do, by every implementation, and go to the plain one where they must.

pytest tests/hf_vit/inference/test_optimize.py
"""

import copy
import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTModel, capabilities, kernel_table
from hf_vit.errors import HFViTError
from hf_vit.inference import int8, kernels, layers, optimize, resnet
from hf_vit.inference.token_merging import merge_tokens
from hf_vit.inference.wrapper import SAMPLES, OptimizedModule, plain_module, sample_of, wrap
from tests.conftest import ROOT
from tests.hf_vit.modeling.test_goldens import CASES, HYBRID, PLAIN, _load


pytestmark = pytest.mark.numerics


def tiny(**fields) -> HFViTForImageClassification:
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 256, "num_labels": 5}
    model = HFViTForImageClassification(HFViTConfig(**(sizes | fields))).eval()
    for parameter in model.parameters():  # zero heads and unit scales would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(autouse=True)
def optimized(monkeypatch):
    """Let the optimized block serve, whatever was measured: tiny ones may be slower than the plain block."""
    monkeypatch.setattr(layers.OptimizedLayer, "run", lambda self, x, tokens=None, **kwargs: self.groups(tokens, x))


@pytest.fixture
def force(monkeypatch):
    """Have the implementation of this name serve wherever there is one; returns the keys of those choices."""

    def force(name: str) -> list[tuple]:
        keys: list[tuple] = []

        def choose(key, implementations, *inputs, min_speedup=1.0):
            if name in implementations:
                keys.append(key)
                return implementations[name]
            return next(iter(implementations.values()))

        monkeypatch.setattr(layers, "choose", choose)
        monkeypatch.setattr(resnet, "choose", choose)
        if name == "joined":  # for devices without oneDNN
            monkeypatch.setattr(capabilities, "packs_linear", lambda dtype: False)
        return keys

    return force


def implementations(dtype: torch.dtype) -> list[str]:
    """Those of linear layers and attention that this machine has."""
    names = ["eager", "joined", "matmul"]
    names += ["packed"] * capabilities.packs_linear(dtype)
    names += ["packed, GELU apart"] * capabilities.packs_linear(dtype)
    names += ["vectors"] * (dtype == torch.float32 and kernels.float32_library() is not None)
    names += ["packed by MKL"] * (dtype == torch.float32 and capabilities.packs_linear_by_mkl())
    return names


KINDS = {
    "token": {},
    "gap": {"pooling": "gap", "use_class_token": False},
    "map": {"pooling": "map", "use_class_token": False, "position_embedding_type": "sincos2d"},
    "first": {"pooling": "first", "use_class_token": False},
    "everything": {"layer_scale_init": 0.1, "qk_norm": True, "num_register_tokens": 3, "representation_size": 16},
    "no bias, erf": {"qkv_bias": False, "hidden_act": "gelu"},
    "relu": {"hidden_act": "relu"},
    "hybrid": {"resnet_depths": (2, 1), "resnet_width_factor": 0.5, "patch_size": 1},
}


# -- the same answers


@pytest.mark.parametrize("name", implementations(torch.float32))
@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation_answers_as_the_plain_model(force, kind, name, monkeypatch):
    keys = force(name)
    monkeypatch.setattr(layers, "MAX_TOKENS_AT_ONCE", 40)  # two images of 32 x 32 pixels, less than one of 40 x 72
    plain = tiny(**KINDS[kind])
    fast = copy.deepcopy(plain).optimize_for_inference()
    with torch.inference_mode():
        for size, batch in (((32, 32), 1), ((32, 32), 5), ((40, 72), 3)):
            pixels = torch.randn(batch, 3, *size)
            expected, answer = plain(pixels), fast(pixels)
            torch.testing.assert_close(answer.logits, expected.logits, atol=2e-5, rtol=2e-5)
    assert keys or (kind, name) == ("relu", "packed, GELU apart")


@pytest.mark.parametrize("kind", ["token", "everything", "no bias, erf"])
def test_the_optimized_block_and_the_models_block_compute_the_same(kind):
    """The arithmetic stands in two places: here they are held together, with and without fewer tokens."""
    block = tiny(**KINDS[kind]).vit.layers[0]
    fast, x = wrap(layers.OptimizedLayer, block), torch.randn(3, 17, 64)
    with torch.no_grad():
        for tokens in (None, 1, 5):
            expected = block(x, tokens=tokens)
            torch.testing.assert_close(fast(x, tokens=tokens), expected, atol=2e-5, rtol=2e-5)
            by_modules = fast.block(x, tokens, fast.module_linears())
            torch.testing.assert_close(by_modules, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [name for name, path in CASES.items() if "fullload" not in name])
def test_goldens(name):
    facts, recorded, model = _load(name)
    model.optimize_for_inference()
    with torch.no_grad():
        out = model(recorded["pixel_values"].permute(0, 3, 1, 2).contiguous())
        pooled = model.vit(recorded["pixel_values"].permute(0, 3, 1, 2).contiguous()).pooler_output
    for name, answer in (("logits", out.logits), ("pre_logits", pooled)):
        if name in recorded:
            worst = (answer - recorded[name]).abs().max()
            tolerance = PLAIN if facts["config"]["resnet"] is None else HYBRID
            assert worst <= tolerance * recorded[name].abs().max()


@pytest.mark.parametrize(
    "name",
    [
        *implementations(torch.bfloat16),
        *["in parts"] * capabilities.packs_linear(torch.bfloat16),
        *["tiles"] * (kernels.attention_library() is not None),
    ],
)
def test_bfloat16_is_as_near_to_float32_as_the_plain_model(force, name, monkeypatch):
    keys = force(name)
    monkeypatch.setattr(layers, "MLP_PART", 64 if name == "in parts" else 1024)
    monkeypatch.setattr(optimize, "speedup", lambda *args: 2.0)
    model = tiny()
    pixels = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        exact = model(pixels).logits
        plain = model.bfloat16()(pixels).logits
        fast = model.optimize_for_inference(torch.bfloat16)(pixels).logits
    assert fast.dtype == torch.bfloat16
    assert (fast - exact).abs().mean() <= 1.5 * (plain - exact).abs().mean()
    assert keys


@pytest.mark.skipif(
    not capabilities.packs_linear_by_mkl(),
    reason="MKL is what is tested, and PyTorch is built without it for this processor or system",
)
def test_mkl_packs_again_only_for_a_batch_that_stays(force):
    force("packed by MKL")
    plain = tiny()
    fast = copy.deepcopy(plain).optimize_for_inference()
    with torch.inference_mode():
        for batch, packed_for in ((2, 2), (3, 2), (2, 2), (3, 2), (3, 3), (2, 3)):
            pixels = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(fast(pixels).logits, plain(pixels).logits, atol=2e-5, rtol=2e-5)
            assert fast.vit.layers[0].linears.fc2._mkl_rows == packed_for * 17


def test_outputs_have_the_same_names_and_hidden_states():
    plain = tiny()
    fast = copy.deepcopy(plain).optimize_for_inference()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for asked in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
            expected, answer = plain(pixels, **asked), fast(pixels, **asked)
            assert list(answer) == list(expected)
            for name in answer:
                torch.testing.assert_close(answer[name], expected[name], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(fast.attention_maps(pixels)[-1], plain.attention_maps(pixels)[-1])


# -- which of the two computes


@pytest.fixture
def plain_calls(monkeypatch) -> list:
    """A list that grows by one at every plain block."""
    calls: list[int] = []
    run_plain = OptimizedModule.run_plain

    def counted(self, x, **kwargs):
        calls.extend([1] * isinstance(self, layers.OptimizedLayer))
        return run_plain(self, x, **kwargs)

    monkeypatch.setattr(OptimizedModule, "run_plain", counted)
    return calls


def test_goes_to_the_plain_block_and_comes_back(plain_calls):
    model = tiny().optimize_for_inference()
    pixels = torch.randn(2, 3, 32, 32)

    def count(run) -> int:
        plain_calls.clear()
        run()
        return len(plain_calls)

    with torch.no_grad():
        assert count(lambda: model(pixels)) == 0
        assert count(lambda: model(pixels, output_attentions=True)) == 2
        assert count(lambda: model(pixels)) == 0  # although transformers' recorders now hang in the blocks
        with torch.autocast("cpu", torch.bfloat16):
            assert count(lambda: model(pixels)) == 2
        seen = []
        hook = model.vit.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
        assert count(lambda: model(pixels)) == 1
        assert seen == [1]
        hook.remove()
        assert count(lambda: model(pixels)) == 0
        hook = model.vit.layers[1].register_forward_hook(lambda *args: seen.append(2))
        assert count(lambda: model(pixels)) == 0 and seen == [1, 2]  # a hook of the whole block sees the fast one
        assert count(lambda: model(pixels, output_attentions=True)) == 2 and seen == [1, 2, 2]
        hook.remove()
        assert count(lambda: model.train()(pixels)) == 2
        assert count(lambda: model.eval()(pixels)) == 0
    assert count(lambda: model(pixels, labels=torch.tensor([0, 1])).loss.backward()) == 2
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_hook_before_the_first_call_is_seen(plain_calls):
    model = tiny().optimize_for_inference()
    hook = model.vit.layers[0].attention.register_forward_hook(lambda *args: None)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
        assert len(plain_calls) == 1
    hook.remove()


def test_the_wrapper_is_the_plain_block_to_everybody_else():
    plain = tiny()
    names, block = list(plain.state_dict()), plain.vit.layers[0]
    model = plain.optimize_for_inference()
    fast = model.vit.layers[0]
    assert list(model.state_dict()) == names == [name for name, _ in model.named_parameters()]
    assert isinstance(fast, layers.OptimizedLayer) and isinstance(fast, type(block)) and plain_module(fast) is block
    assert fast.mlp is block.mlp and fast.train().training and block.training and not fast.eval().training
    fast.gradient_checkpointing = True
    assert block.gradient_checkpointing
    fast.mlp = replaced = torch.nn.Identity()
    assert block.mlp is replaced and dict(model.named_modules())["vit.layers.0.mlp"] is replaced
    del fast.mlp
    assert not hasattr(block, "mlp")


def test_gradient_checkpointing_after_optimizing(plain_calls):
    model = tiny()
    model.optimize_for_inference().train()
    pixels, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        plain_calls.clear()
        model(pixels, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_lora_trains_on_an_optimized_model(plain_calls):
    peft = pytest.importorskip("peft")
    model, pixels = tiny().optimize_for_inference(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).logits
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    with torch.no_grad():
        assert (lora.eval()(pixels).logits - expected).abs().max() > 1e-3
        assert len(plain_calls) == 2
    lora.train()(pixels, labels=torch.tensor([0, 1])).loss.backward()
    adapters = [parameter.grad for name, parameter in lora.named_parameters() if "lora" in name]
    assert len(adapters) == 4 and all(gradient is not None for gradient in adapters)
    merged = lora.merge_and_unload().eval()
    plain_calls.clear()
    with torch.no_grad():
        merged(pixels)
    assert not plain_calls


@pytest.mark.parametrize("kind", ["token", "first", "gap", "everything"])
def test_the_last_block_computes_the_token_that_is_read(kind, monkeypatch):
    plain = tiny(**KINDS[kind], output_hidden_states=False)
    model = copy.deepcopy(plain).optimize_for_inference()
    last, pixels, rows = model.vit.layers[-1], torch.randn(3, 3, 32, 32), []
    linear = layers.FusedLinear.__call__

    def counted(self, x, *rest):
        if "linears" in vars(last) and self is last.linears.fc1:
            rows.append(x.shape[0] * x.shape[1])
        return linear(self, x, *rest)

    monkeypatch.setattr(layers.FusedLinear, "__call__", counted)

    def rows_of(call) -> int:
        rows.clear()
        call()
        return max(rows)

    whole = 3 * plain.vit(pixels).last_hidden_state.shape[1]
    with torch.no_grad():
        model(pixels)
        assert rows_of(lambda: model(pixels)) == (3 if kind != "gap" else whole)
        torch.testing.assert_close(model(pixels).logits, plain(pixels).logits, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(model(pixels, torch.tensor([0, 1, 2])).loss, plain(pixels, torch.arange(3)).loss)
        assert rows_of(lambda: model.vit(pixels)) == whole  # its caller reads last_hidden_state
        assert rows_of(lambda: model(pixels, output_hidden_states=True)) == whole
        model.config.output_hidden_states = True
        assert rows_of(lambda: model(pixels)) == whole
        model.config.output_hidden_states = False
        model.vit.layers.append(copy.deepcopy(last))
        plain.vit.layers.append(copy.deepcopy(plain.vit.layers[-1]))
        assert rows_of(lambda: model(pixels)) == whole
        torch.testing.assert_close(model(pixels).logits, plain(pixels).logits, atol=2e-5, rtol=2e-5)


def test_a_forward_of_somebody_else_gets_all_tokens():
    class Mean(HFViTForImageClassification):
        def forward(self, pixel_values, **kwargs):
            return self.classifier(self.vit(pixel_values, **kwargs).last_hidden_state.mean(1))

    plain = Mean(tiny().config).eval()
    plain.load_state_dict(tiny().state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = plain(pixels)
        torch.testing.assert_close(plain.optimize_for_inference()(pixels), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", implementations(torch.float32))
def test_weights_written_without_a_trace_are_seen(force, name):
    peft = pytest.importorskip("peft")
    force(name)
    plain, pixels = tiny(), torch.randn(2, 3, 32, 32)
    fast = copy.deepcopy(plain).optimize_for_inference()
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj", "fc1"], r=2, init_lora_weights=False)

    def answers():
        with torch.no_grad():
            return [model(pixels).logits for model in (plain, fast)]

    before = answers()[0]
    for model in (plain, fast):
        torch.manual_seed(0)
        peft.get_peft_model(model, adapter).eval().merge_and_unload()  # adds to weight.data
    expected, answer = answers()
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(answer, expected, atol=2e-5, rtol=2e-5)
    for model in (plain, fast):
        model.vit.layers[1].mlp.fc2.weight.data.mul_(0.5)
    expected, answer = answers()
    torch.testing.assert_close(answer, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "weight",
    [
        torch.rand(3),
        torch.rand(0),
        torch.rand(70, 50).t(),
        torch.rand(1).expand(500),
        torch.rand(900)[100:],
        torch.rand(8, 4, 3, 3).contiguous(memory_format=torch.channels_last),
    ],
    ids=["few", "none", "transposed", "expanded", "a part", "channels last"],
)
def test_samples_of_a_weight_change_with_it(weight):
    samples = sample_of(weight)
    assert len(samples) == min(weight.untyped_storage().nbytes() // 4 - weight.storage_offset(), SAMPLES)
    assert samples.numel() == 0 or samples.data_ptr() == weight.data_ptr()
    before = samples.clone()
    weight.data.add_(1) if weight.numel() != 500 else weight[:1].add_(1)  # PyTorch refuses to add to an expanded one
    assert torch.equal(samples, before + 1)


def test_changed_weights_are_seen():
    model = tiny()
    pixels = torch.randn(2, 3, 32, 32)
    fast = copy.deepcopy(model).optimize_for_inference()
    other = tiny()

    def same():
        with torch.no_grad():
            torch.testing.assert_close(fast(pixels).logits, model(pixels).logits, atol=2e-5, rtol=2e-5)

    same()
    for one in (model, fast):
        one.load_state_dict(other.state_dict())
    same()
    for one in (model, fast):
        torch.optim.SGD(one.parameters(), lr=0.1).zero_grad()
        one.train()(pixels, labels=torch.tensor([0, 1])).loss.backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
        one.eval()
    same()
    for one in (model, fast):  # leaves no trace in a version: eval() after train() prepares again
        one.train()
        one.vit.layers[0].mlp.fc2.weight.data.mul_(0.5)
        one.eval()
    same()
    for one in (model, fast):
        one.vit.layers[0].mlp.fc1 = copy.deepcopy(other.vit.layers[1].mlp.fc1)
    same()
    for one in (model, fast):
        one.vit.layers[0].mlp.fc1 = torch.nn.Sequential(one.vit.layers[0].mlp.fc1, torch.nn.Tanh())
    same()
    model.double(), fast.double()
    pixels = pixels.double()
    same()


@pytest.mark.skipif(kernels.maps_library() is None, reason="needs Linux on x86-64 and a C++ compiler with OpenMP")
def test_the_resnets_kernels_go_to_the_plain_stem_come_back_and_see_changes(force, monkeypatch):
    force("channels last")
    plain = tiny(**KINDS["hybrid"])
    fast = copy.deepcopy(plain).optimize_for_inference()
    pixels = torch.randn(2, 3, 40, 56)
    norms, calls = kernels.group_norm_, []
    monkeypatch.setattr(kernels, "group_norm_", lambda *args, **kwargs: (calls.append(1), norms(*args, **kwargs))[1])

    def fused() -> int:
        """Calls of the kernel in a pass that answers as the plain model."""
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(fast(pixels).logits, plain(pixels).logits, atol=2e-5, rtol=2e-5)
        return len(calls)

    whole = 1 + 3 * 3  # the root, three units
    assert fused() == whole
    stem, other = (model.vit.embeddings.patch_embeddings.backbone for model in (fast, plain))
    seen: list = []
    for module in (stem.stages[1].units[0].gn2, stem.stages[1].units[0].conv2):
        hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
        assert fused() == 0 and len(seen) == 1
        seen.clear()
        hook.remove()
    assert fused() == whole
    for one in (stem, other):
        with torch.no_grad():
            one.gn_root.weight.mul_(2)
            one.stages[0].units[0].gn_proj.bias.add_(1)
            one.stages[0].units[0].conv1.weight.add_(torch.linspace(0, 1, 32)[:, None, None])
    assert fused() == whole
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fast(pixels)
    fast.train()(pixels, labels=torch.tensor([0, 1])).loss.backward()
    assert not calls and stem.gn_root.weight.grad is not None
    fast.eval()
    for one in (stem, other):
        one.stages[0].units[0].gn1 = torch.nn.Identity()
    assert fused() == 0


@pytest.mark.parametrize("name", ["channels first", "channels last", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_resnet_without_a_compiler(force, name, dtype, monkeypatch):
    force(name)
    monkeypatch.setattr(kernels, "maps_library", lambda: None)
    stem = tiny(**KINDS["hybrid"]).vit.embeddings.patch_embeddings.backbone.to(dtype)
    fast, x = wrap(resnet.OptimizedStem, stem), torch.randn(2, 3, 40, 56).to(dtype)
    with torch.no_grad():
        tolerance = 2e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(fast(x), stem(x), atol=tolerance, rtol=tolerance)


# -- copies and processes


def test_copies_pickles_and_folders(tmp_path):
    model = tiny().optimize_for_inference()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).logits
        twin = copy.deepcopy(model)
        twin.classifier.weight.zero_()
        twin.vit.layers[0].mlp.fc1.weight.zero_()
        torch.testing.assert_close(model(pixels).logits, expected)
        assert not torch.equal(twin.vit(pixels).pooler_output, model.vit(pixels).pooler_output)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        torch.testing.assert_close(torch.load(file, weights_only=False)(pixels).logits, expected, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path)
        again = HFViTForImageClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(again(pixels).logits, expected, atol=1e-5, rtol=1e-5)
        model.optimize_for_inference()
        torch.testing.assert_close(model(pixels).logits, expected, atol=1e-5, rtol=1e-5)
        moved = pickle.loads(pickle.dumps(model))
        assert isinstance(moved.vit.layers[0], layers.OptimizedLayer) and "linears" not in vars(moved.vit.layers[0])


SCRIPT = """
import hashlib, itertools, random, sys, torch
from hf_vit import HFViTConfig, HFViTForImageClassification, kernel_table
random.seed(int(sys.argv[1]))
# it lies, differently in each process
kernel_table.timer, kernel_table.COLD_BYTES = itertools.accumulate(iter(random.random, None)).__next__, 0
torch.manual_seed(0)
torch.set_num_threads(1)
sizes = dict(image_size=32, patch_size=2, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=5)
config = HFViTConfig(**sizes, resnet_depths=(1,), resnet_width_factor=0.5)
model, pixels = HFViTForImageClassification(config), torch.randn(3, 3, 32, 32)
torch.nn.init.normal_(model.classifier.weight)
model.optimize_for_inference()
with torch.inference_mode():
    logits = model(pixels).logits
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""


def test_two_processes_whose_timers_lie_compute_the_same_bits(tmp_path):
    """Started together: one measures, the other waits for it and reads."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "CXX": "/bin/false"}
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, seed], env=environment, stdout=subprocess.PIPE, text=True)
        for seed in "12"
    ]
    answers = {process.communicate(timeout=600)[0] for process in processes}
    assert len(answers) == 1 and len(answers.pop().strip()) == 64
    (table,) = (tmp_path / "hf_vit").glob("kernels-*.json")
    assert len(json.loads(table.read_text())["seconds"]) > 5


def test_a_table_from_another_machine_cannot_break_a_model(monkeypatch):
    """Times of implementations that this machine does not have belong to other keys."""
    model, pixels = tiny().optimize_for_inference(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).logits
        monkeypatch.setattr(capabilities, "packs_linear", lambda dtype: False)
        moved = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(moved(pixels).logits, expected, atol=1e-5, rtol=1e-5)
    assert list(moved.vit.layers[0].linears.out.implementations) == ["eager"]


def test_the_plain_block_serves_where_the_optimized_one_is_slower(monkeypatch):
    monkeypatch.undo()  # of `optimized`
    block, x = tiny().vit.layers[0], torch.randn(2, 17, 64)
    served = []
    for slower in ("plain", "optimized"):

        def choose(key, implementations, *inputs, min_speedup=1.1, slower=slower):
            if key[0] == "block":
                served.append(min_speedup)
                times = {name: 1.0 + (name == slower) for name in implementations}
                return implementations[kernel_table._fastest(tuple(implementations), times, min_speedup)]
            return next(iter(implementations.values()))

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(layers, "choose", choose)
            fast = wrap(layers.OptimizedLayer, block)
            patch.setattr(OptimizedModule, "run_plain", lambda *args, **kwargs: served.append("plain") or x)
            fast(x)
    assert served == [1.0, 1.0, "plain"]


def test_compiles_whole():
    plain = tiny()
    fast = copy.deepcopy(plain).optimize_for_inference()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels).logits, plain(pixels).logits, atol=2e-5, rtol=2e-5)
        for layer in fast.vit.layers:
            layer.compile(backend="eager")
        torch.testing.assert_close(fast(pixels).logits, plain(pixels).logits, atol=2e-5, rtol=2e-5)


def test_the_encoder_alone_and_what_cannot_be():
    model = HFViTModel(tiny().config).eval()
    assert model.train().optimize_for_inference() is model and not model.training
    for wrong in (torch.int32, "bfloat16"):
        with pytest.raises(ValueError, match="not a dtype to compute in"):
            model.optimize_for_inference(wrong)


@pytest.mark.parametrize("kind", ["everything", "hybrid"])
def test_a_model_loaded_with_the_code_of_its_folder_is_optimized(tmp_path, kind):
    plain, pixels = tiny(**KINDS[kind]), torch.randn(2, 3, 32, 32)
    plain.save_pretrained(tmp_path)
    name = "modeling_hf_vit.HFViTForImageClassification"
    remote = get_class_from_dynamic_module(name, str(tmp_path)).from_pretrained(tmp_path).eval()
    assert type(remote) is not type(plain)
    with torch.no_grad():
        expected = remote(pixels).logits
        torch.testing.assert_close(remote.optimize_for_inference()(pixels).logits, expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(expected, plain(pixels).logits, atol=2e-5, rtol=2e-5)
    wrappers = [module for module in remote.modules() if isinstance(module, OptimizedModule)]
    assert len(wrappers) == 2 + 1 + (kind == "hybrid") and all(module.is_current() for module in wrappers)


def test_accelerates_hooks_stay_in_effect():
    accelerate_hooks = pytest.importorskip("accelerate.hooks")
    model, pixels, seen = tiny().optimize_for_inference(), torch.randn(2, 3, 32, 32), []

    class Count(accelerate_hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(1)
            return args, kwargs

    with torch.no_grad():
        expected = model(pixels).logits
        for layer in model.vit.layers:
            accelerate_hooks.add_hook_to_module(layer, Count())
        torch.testing.assert_close(model(pixels).logits, expected)
        assert seen == [1, 1]
        for layer in model.vit.layers:
            accelerate_hooks.remove_hook_from_module(layer)
        torch.testing.assert_close(model(pixels).logits, expected)
        assert seen == [1, 1]


def test_without_the_package_the_travelling_code_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_vit.inference.optimize", None)
    with pytest.raises(ImportError, match="pip install hf-vit"):
        tiny().optimize_for_inference()


def test_emulated_bfloat16_works_and_says_once_how_slow_it_is(monkeypatch, caplog):
    monkeypatch.setattr(capabilities, "native_bfloat16", lambda: False)
    monkeypatch.setattr(optimize.logger, "propagate", True)
    optimize.logger.warning_once.cache_clear()
    measured = []
    monkeypatch.setattr(optimize, "speedup", lambda *args: measured.append(args[0]) or 3.24)
    with torch.no_grad():
        for _ in range(2):
            model = tiny().optimize_for_inference(torch.bfloat16)
            assert model(torch.randn(1, 3, 32, 32)).logits.isfinite().all()
    assert caplog.text.count("takes 3.2 times as long as in float32") == 1
    assert measured[0] == ("bfloat16 against float32", 256, 64, 16)
    tiny().optimize_for_inference()
    assert len(measured) == 2  # float32 is not measured


# -- int8


@pytest.fixture
def int8_pays(monkeypatch):
    """int8 is refused where it is slower, which it may be for tiny layers."""
    monkeypatch.setattr(int8, "speedup", lambda *args: 2.0)


def backends() -> list[str]:
    return [*["onednn"] * (capabilities.int8_backend() == "onednn"), *["fbgemm"] * has_fbgemm()]


def has_fbgemm() -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capabilities, "int8_saturates", lambda: True)
        return capabilities.int8_backend.__wrapped__() == "fbgemm"


@pytest.fixture(params=backends())
def backend(request, monkeypatch, int8_pays):
    monkeypatch.setattr(capabilities, "int8_backend", lambda: request.param)
    return request.param


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_near_and_follows_the_weights(kind, dtype, backend):
    plain, other = tiny(**KINDS[kind]), tiny(**KINDS[kind])
    pixels = torch.randn(8, 3, 32, 32)
    fast = copy.deepcopy(plain).optimize_for_inference(dtype, int8_calibration=pixels)
    with torch.no_grad():
        for _ in range(2):
            expected, answer = plain(pixels).logits, fast(pixels).logits
            assert answer.dtype == dtype
            assert 0 < (answer - expected).abs().max() <= 0.25 * expected.abs().max()
            torch.testing.assert_close(copy.deepcopy(fast)(pixels).logits, answer)
            for model in (plain, fast):
                model.load_state_dict(other.state_dict())
            fast.optimize_for_inference(int8_calibration=pixels)


def test_int8_steps_are_the_largest_activations_of_the_calibration_images(int8_pays):
    model, largest = tiny(), {}
    layer = model.vit.layers[1]
    linears = {
        "qkv": layer.attention.k_proj,
        "out": layer.attention.o_proj,
        "fc1": layer.mlp.fc1,
        "fc2": layer.mlp.fc2,
    }
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: largest.update({name: args[0].abs().max().item()}))
    with torch.no_grad():
        found = int8.calibrate(model.vit, torch.randn(3, 3, 32, 32))
    assert len(found) == 2 and found[1] == pytest.approx({name: value / 127 for name, value in largest.items()})


def test_int8_branches_are_near_those_of_the_plain_block(backend):
    model, pixels = tiny(layer_scale_init=0.1, qk_norm=True), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        layer, x = model.vit.layers[0], model.vit.embeddings(pixels)
        fast = wrap(int8.Int8Layer, layer, steps=int8.calibrate(model.vit, pixels)[0])
        assert fast.prepare()
        attention = layer.layer_scale1(layer.attention(layer.layernorm_before(x))[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers.OptimizedLayer, "add_mlp", lambda self, x, linears: x)
            by_int8 = fast(x) - x
        assert 0 < (by_int8 - attention).norm() <= 0.05 * attention.norm()
        mlp = layer.layer_scale2(layer.mlp(layer.layernorm_after(x)))
        by_int8 = fast.add_mlp(x.clone(), fast.linears) - x
        assert 0 < (by_int8 - mlp).norm() <= 0.05 * mlp.norm()


def test_weights_of_7_bits_do_not_saturate_16_bits():
    weight = torch.randn(8, 32)
    steps, worth = int8.int8_weight(weight, int8.MAX_INT7)
    assert steps.abs().max() == 63 and 255 * 2 * 63 < 2**15
    torch.testing.assert_close(steps * worth[:, None], weight, atol=float(worth.max()) / 2 + 1e-6, rtol=0)


@pytest.mark.parametrize("merged", [0, 3])
def test_int8_blocks_leave_their_input_alone(merged, backend):
    pixels = torch.randn(4, 3, 32, 32)
    model = merge_tokens(tiny().optimize_for_inference(int8_calibration=pixels), merged)
    x = torch.randn(2, 17, 64)
    given = x.clone()
    with torch.inference_mode():
        changed = model.vit.layers[0](x)
    assert torch.equal(x, given) and not torch.equal(changed[:, 0], x[:, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_keeps_what_is_not_finite(value, backend):
    pixels = torch.randn(3, 3, 32, 32)
    model = tiny().optimize_for_inference(int8_calibration=pixels)
    with torch.no_grad():
        expected = model(pixels).logits
        pixels[1, 0, 0, 0] = value
        answer = model(pixels).logits
    assert answer[1].isnan().all()
    torch.testing.assert_close(answer[[0, 2]], expected[[0, 2]])


def test_int8_says_what_it_cannot(monkeypatch):
    pixels = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="int8_calibration=images"):
        tiny().optimize_for_inference(torch.int8)
    with pytest.raises(ValueError, match=r"use torch\.float32 or torch\.bfloat16"):
        tiny().optimize_for_inference(torch.float8_e4m3fn)
    with pytest.raises(HFViTError, match="GELU"):
        tiny(hidden_act="relu").optimize_for_inference(int8_calibration=pixels)
    with pytest.raises(HFViTError, match="CPU"):
        tiny().optimize_for_inference(torch.float64, int8_calibration=pixels.double())
    for wrong in (True, "photos", pixels[0], pixels[:0]):
        with pytest.raises(HFViTError, match="some dozens of normalized images"):
            tiny().optimize_for_inference(int8_calibration=wrong)
    monkeypatch.setattr(capabilities, "int8_backend", lambda: None)
    with pytest.raises(HFViTError, match=r"neither oneDNN nor FBGEMM .* use float32"):
        tiny().optimize_for_inference(int8_calibration=pixels)


@pytest.mark.parametrize(("name", "factor", "refused"), [("fbgemm", 1.3, True), ("fbgemm", 1.5, False)])
@pytest.mark.skipif(not has_fbgemm(), reason="needs FBGEMM, which is for x86")
def test_int8_that_does_not_pay_is_refused_with_the_factor_and_leaves_the_model_as_it_was(
    name, factor, refused, monkeypatch
):
    monkeypatch.setattr(capabilities, "int8_backend", lambda: name)
    monkeypatch.setattr(int8, "speedup", lambda *args: factor)
    model, pixels = tiny(), torch.randn(2, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if not refused:
        model.optimize_for_inference(int8_calibration=pixels)
        assert isinstance(model.vit.layers[0], int8.Int8Layer)
        return
    with pytest.raises(HFViTError, match=r"1\.30 times as fast in int8 as in float32, and 1\.4 times"):
        model.optimize_for_inference(int8_calibration=pixels)
    with pytest.raises(HFViTError, match="times is the least"):
        model.optimize_for_inference(torch.bfloat16, int8_calibration=pixels)
    assert not any(isinstance(module, OptimizedModule) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_int8_is_measured_against_the_float_block():
    """The measurement itself, on this machine: it runs both blocks, and says a positive factor or refuses."""
    if capabilities.int8_backend() is None:
        pytest.skip("this processor has no int8")
    model, pixels = tiny(), torch.randn(2, 3, 32, 32)
    try:
        int8.check_int8_speed(model.vit, pixels, int8.calibrate(model.vit, pixels)[0])
    except HFViTError as error:
        assert "times as fast in int8" in str(error)
    times = [times for key, times in kernel_table._measured.items() if key[0][0] == "int8"]
    assert times and all(value > 0 for entry in times for value in entry.values())


@pytest.mark.parametrize("whole", [False, True], ids=["each block", "the model alone"])
@pytest.mark.parametrize("optimized_first", [True, False])
def test_sharded_models_are_left_plain(tmp_path, optimized_first, whole):
    """FSDP fills the same memory with other weights and leaves no trace: copies of them would be stale."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = tiny()
        reference = copy.deepcopy(model)
        if optimized_first:
            model.optimize_for_inference()
        for layer in () if whole else model.base_model.layers:
            fully_shard(layer)
        fully_shard(model)
        if not optimized_first:
            model.optimize_for_inference()
            with pytest.raises(HFViTError, match=r"sharded \(FSDP\)"):
                model.optimize_for_inference(int8_calibration=torch.randn(2, 3, 32, 32))
        x = torch.randn(2, 3, 32, 32)
        for _ in range(3):
            with torch.no_grad():
                torch.testing.assert_close(model(x).logits, reference(x).logits, rtol=1e-4, atol=1e-4)
            for one in (model, reference):
                loss = one.train()(x).logits.square().mean()
                loss.backward()
                with torch.no_grad():
                    for weight in one.parameters():
                        weight -= 1e-3 * weight.grad
                        weight.grad = None
                one.eval()
    finally:
        dist.destroy_process_group()
