"""inference.py and its rooms: prepared blocks answer as plain ones do, by any way, and step aside where they must.

pytest tests/hf_vit/inference/test_inference.py
"""

import copy
import io
import pickle

import pytest
import torch

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTModel
from hf_vit.modeling import inference, native, prepared, resnet_inference
from hf_vit.token_merging import merge_tokens
from tests.hf_vit.modeling.test_goldens import CASES, HYBRID, PLAIN, _load


pytestmark = pytest.mark.numerics


def tiny(**fields) -> HFViTForImageClassification:
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = HFViTForImageClassification(HFViTConfig(**(sizes | {"num_labels": 5} | fields))).eval()
    for parameter in model.parameters():  # zero heads and unit scales would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def force(monkeypatch):
    """Take the way of this name wherever there is one."""

    def choose(name):
        monkeypatch.setattr(prepared, "fastest", lambda ways, *inputs: name if name in ways else next(iter(ways)))
        if name == "joined":  # for devices without oneDNN
            monkeypatch.setattr(inference, "onednn_packs", lambda weight: False)

    return choose


WAYS = ["eager", "joined", "packed", "products"] + ["packed by MKL"] * torch.backends.mkl.is_available()
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_answers_as_the_plain_model(force, kind, way, monkeypatch):
    force(way)
    monkeypatch.setattr(inference, "ROWS_AT_ONCE", 40)  # two pictures of 32 x 32 pixels, less than one of 40 x 72
    plain = tiny(**KINDS[kind])
    fast = copy.deepcopy(plain).optimize_for_inference()
    with torch.inference_mode():
        for size, batch in (((32, 32), 1), ((32, 32), 5), ((40, 72), 3)):
            pixels = torch.randn(batch, 3, *size)
            expected, answer = plain(pixels), fast(pixels)
            torch.testing.assert_close(answer.logits, expected.logits, atol=2e-5, rtol=2e-5)
    assert way in fast.vit.layers[0].forward.choices.values()


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


@pytest.mark.parametrize("way", [*WAYS, "in parts", *["tiles"] * (native.attention() is not None)])
def test_bfloat16_is_as_near_to_float32_as_the_plain_model(force, way, monkeypatch):
    force(way)
    monkeypatch.setattr(inference, "MLP_PART", 128 if way == "in parts" else 1024)
    model = tiny()
    pixels = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        exact = model(pixels).logits
        plain = model.bfloat16()(pixels).logits
        fast = model.optimize_for_inference(torch.bfloat16)(pixels).logits
        chosen = model.vit.layers[0].forward.choices.values()
    assert fast.dtype == torch.bfloat16
    assert (fast - exact).abs().mean() <= 1.5 * (plain - exact).abs().mean()
    assert way in chosen or way == "packed by MKL"  # which is for float32


@pytest.mark.skipif(
    not torch.backends.mkl.is_available(),
    reason="MKL is what is tested, and PyTorch is built without it for this processor or system",
)
def test_mkl_packs_again_only_for_a_batch_that_stays(force):
    force("packed by MKL")
    plain = tiny()
    fast = copy.deepcopy(plain).optimize_for_inference()
    fc2 = None
    with torch.inference_mode():
        for batch, packed_for in ((2, 2), (3, 2), (2, 2), (3, 2), (3, 3), (2, 3)):
            pixels = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(fast(pixels).logits, plain(pixels).logits, atol=2e-5, rtol=2e-5)
            fc2 = fc2 or fast.vit.layers[0].forward.fc2
            assert fc2._mkl_rows == packed_for * 17


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


def plain_calls(model, monkeypatch) -> list:
    """A list that grows by one at every plain block."""
    calls, forward = [], type(model.vit.layers[0]).forward
    monkeypatch.setattr(
        type(model.vit.layers[0]), "forward", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1]
    )
    return calls


def test_steps_aside_and_comes_back(monkeypatch):
    model = tiny().optimize_for_inference()
    pixels = torch.randn(2, 3, 32, 32)
    calls = plain_calls(model, monkeypatch)

    def count(run) -> int:
        calls.clear()
        run()
        return len(calls)

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
        assert count(lambda: model.train()(pixels)) == 2
        assert count(lambda: model.eval()(pixels)) == 0
    assert count(lambda: model(pixels, labels=torch.tensor([0, 1])).loss.backward()) == 2
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["token", "first", "gap", "everything"])
def test_the_last_block_computes_the_token_that_is_read(kind, monkeypatch):
    plain = tiny(**KINDS[kind], output_hidden_states=False)
    model = copy.deepcopy(plain).optimize_for_inference()
    last, pixels, rows = model.vit.layers[-1], torch.randn(3, 3, 32, 32), []
    dense = inference.Dense.__call__

    def counted(self, x, *rest):
        if self is vars(last.forward).get("fc1"):
            rows.append(len(x))
        return dense(self, x, *rest)

    monkeypatch.setattr(inference.Dense, "__call__", counted)

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


def test_changed_weights_are_seen(monkeypatch):
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
    for one in (model, fast):
        one.vit.layers[0].mlp.fc1 = copy.deepcopy(other.vit.layers[1].mlp.fc1)
    same()
    for one in (model, fast):
        one.vit.layers[0].mlp.fc1 = torch.nn.Sequential(one.vit.layers[0].mlp.fc1, torch.nn.Tanh())
    same()
    model.double(), fast.double()
    pixels = pixels.double()
    same()


@pytest.mark.skipif(native.maps() is None, reason="needs Linux on x86-64 and a C++ compiler")
def test_the_resnets_kernels_step_aside_come_back_and_see_changes(force, monkeypatch):
    force("fused")
    plain = tiny(**KINDS["hybrid"])
    fast = copy.deepcopy(plain).optimize_for_inference()
    pixels = torch.randn(2, 3, 40, 56)
    norms, calls = native.group_norm_, []
    monkeypatch.setattr(
        resnet_inference, "group_norm_", lambda *args, **kwargs: (calls.append(1), norms(*args, **kwargs))[1]
    )

    def fused() -> int:
        """Calls of the kernel in a pass that answers as the plain model."""
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(fast(pixels).logits, plain(pixels).logits, atol=2e-5, rtol=2e-5)
        return len(calls)

    whole, unit = 1 + 3 * 3, 3  # the root, three units
    assert fused() == whole
    stem, other = (model.vit.embeddings.patch_embeddings.backbone for model in (fast, plain))
    seen: list = []
    for module in (stem.stages[1].units[0].gn2, stem.stages[1].units[0].conv2):
        hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
        assert fused() == whole - unit and len(seen) == 1
        seen.clear()
        hook.remove()
    assert fused() == whole
    for one in (stem, other):
        with torch.no_grad():
            one.gn_root.weight.mul_(2)
            one.stages[0].units[0].gn_proj.bias.add_(1)
            one.stages[0].units[0].conv1.weight.add_(torch.linspace(0, 1, 32)[:, None, None])
    assert fused() == whole
    for one in (stem, other):
        one.stages[0].units[0].gn1 = torch.nn.Identity()
    assert fused() == whole - unit
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fast(pixels)
    fast.train()(pixels, labels=torch.tensor([0, 1])).loss.backward()
    assert not calls and stem.gn_root.weight.grad is not None


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


def test_ways_of_another_machine_are_chosen_again():
    model, pixels = tiny().optimize_for_inference(torch.bfloat16), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).logits
        moved = pickle.loads(pickle.dumps(model))
        choices = moved.vit.layers[0].forward.choices
        choices.update(dict.fromkeys(choices, "a way that is not here"))
        torch.testing.assert_close(moved(pixels).logits, expected, atol=0.05, rtol=0.05)
    assert "a way that is not here" not in choices.values()


def test_compiles_whole():
    plain = tiny()
    fast = copy.deepcopy(plain).optimize_for_inference()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels).logits, plain(pixels).logits, atol=2e-5, rtol=2e-5)


def test_the_encoder_alone_and_what_cannot_be():
    model = HFViTModel(tiny().config).eval()
    assert model.train().optimize_for_inference() is model and not model.training
    with pytest.raises(ValueError, match="floating dtype"):
        model.optimize_for_inference(torch.int8)


def test_the_fastest_is_kept_only_where_it_is_clearly_faster(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(prepared.time, "perf_counter", lambda: now[0])

    def taking(seconds):
        def way(x):
            now[0] += seconds

        return way

    x = torch.zeros(1)
    assert prepared.fastest({"eager": taking(1.0), "a": taking(0.96), "b": taking(1.2)}, x) == "eager"
    assert prepared.fastest({"eager": taking(1.0), "a": taking(0.9), "b": taking(0.8)}, x) == "b"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_near_and_follows_the_weights(kind, dtype):
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


def test_int8_scales_are_the_largest_activations_of_the_calibration_pictures():
    model, largest = tiny(), {}
    layer = model.vit.layers[1]
    products = {
        "qkv": layer.attention.k_proj,
        "out": layer.attention.o_proj,
        "fc1": layer.mlp.fc1,
        "fc2": layer.mlp.fc2,
    }
    for name, product in products.items():
        product.register_forward_pre_hook(
            lambda _, args, name=name: largest.update({name: args[0].abs().max().item()})
        )
    with torch.no_grad():
        found = inference.measure_scales(model.vit, torch.randn(3, 3, 32, 32))
    assert len(found) == 2 and found[1] == pytest.approx({name: value / 127 for name, value in largest.items()})


def test_int8_branches_are_near_those_of_the_plain_block():
    model, pixels = tiny(layer_scale_init=0.1, qk_norm=True), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        layer, x = model.vit.layers[0], model.vit.embeddings(pixels)
        int8 = inference.Int8Layer(layer, {}, inference.measure_scales(model.vit, pixels)[0])
        int8.prepare()
        for answer, expected in (
            (int8.attention(x.clone()) - x, layer.layer_scale1(layer.attention(layer.layernorm_before(x))[0])),
            (int8.mlp(x.clone()) - x, layer.layer_scale2(layer.mlp(layer.layernorm_after(x)))),
        ):
            assert 0 < (answer - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("merged", [0, 3])
def test_int8_blocks_leave_their_input_alone(merged):
    pixels = torch.randn(4, 3, 32, 32)
    model = merge_tokens(tiny().optimize_for_inference(int8_calibration=pixels), merged)
    x = torch.randn(2, 17, 64)
    given = x.clone()
    with torch.inference_mode():
        changed = model.vit.layers[0](x)
    assert torch.equal(x, given) and not torch.equal(changed[:, 0], x[:, 0])


def test_int8_says_what_it_cannot():
    pixels = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="GELU"):
        tiny(hidden_act="relu").optimize_for_inference(int8_calibration=pixels)
    with pytest.raises(ValueError, match="CPU"):
        tiny().optimize_for_inference(torch.float64, int8_calibration=pixels.double())
