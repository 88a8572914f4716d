"""modeling_hf_vit.py: the equations against numpy, attention by every backend, losses, regularization and heads.

pytest tests/hf_vit/modeling/test_modeling_hf_vit.py
"""

import math

import numpy as np
import pytest
import torch
import torch.distributed.fsdp

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.modeling import modeling_hf_vit
from hf_vit.modeling.modeling_hf_vit import HFViTDropPath
from hf_vit.modeling.position_embedding import resize_position_sequence
from tests.helpers.compare import same_outputs


pytestmark = pytest.mark.numerics
TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 5,
}
VARIANTS = {
    "token": {},
    "gap": {"pooling": "gap"},
    "gap_with_class_token": {"pooling": "gap", "use_class_token": True},
    "map": {"pooling": "map"},
    "first": {"pooling": "first"},
    "representation": {"representation_size": 24},
    "registers": {"num_register_tokens": 3},
    "class_without_position": {"class_token_has_position": False},
    "sincos2d": {"position_embedding_type": "sincos2d"},
    "no_positions": {"position_embedding_type": "none"},
    "learned1d": {"position_embedding_type": "learned1d"},
    "layer_scale": {"layer_scale_init": 1e-2},
    "qk_norm": {"qk_norm": True},
    "rectangles": {"image_size": (32, 48), "patch_size": (8, 16)},
    "gray": {"num_channels": 1},
    "root_only": {"resnet_depths": (), "resnet_width_factor": 0.5, "patch_size": 2},
    "hybrid": {"resnet_depths": (1, 1), "resnet_width_factor": 0.5, "patch_size": 1},
}


def build(cls=HFViTForImageClassification, **fields):
    """A small model in which every parameter matters."""
    torch.manual_seed(0)
    model = cls(HFViTConfig(**(TINY | fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_images(model, batch=2):
    return torch.randn(batch, model.config.num_channels, *model.config.image_size_hw)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_saves_and_loads_exactly(name, tmp_path):
    model = build(**VARIANTS[name])
    x = random_images(model)
    out = model(x, labels=torch.tensor([1, 4]))
    assert out.logits.shape == (2, 5) and out.loss.isfinite()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = HFViTForImageClassification.from_pretrained(tmp_path).eval()
    assert same_outputs(again(x).logits, model(x).logits)


def test_equations_in_numpy():
    """Eqs. 1-8 written out again, without torch."""
    model = build(representation_size=24)
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    x = random_images(model, 1)

    def layer_norm(z, name):
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(z, name):
        return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = x[0].double().numpy().reshape(3, 4, 8, 4, 8).transpose(1, 3, 0, 2, 4).reshape(16, 192)
    kernel = w["vit.embeddings.patch_embeddings.projection.weight"].reshape(32, 192)
    tokens = patches @ kernel.T + w["vit.embeddings.patch_embeddings.projection.bias"]
    z = np.concatenate([w["vit.embeddings.cls_token"][0], tokens]) + w["vit.embeddings.position_embeddings"][0]
    for block in range(3):
        name = f"vit.layers.{block}"
        y = layer_norm(z, f"{name}.layernorm_before")
        q, k, v = (
            dense(y, f"{name}.attention.{p}_proj").reshape(17, 4, 8).transpose(1, 0, 2) for p in ("q", "k", "v")
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        z = z + dense((weights @ v).transpose(1, 0, 2).reshape(17, 32), f"{name}.attention.o_proj")
        y = dense(layer_norm(z, f"{name}.layernorm_after"), f"{name}.mlp.fc1")
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        z = z + dense(y, f"{name}.mlp.fc2")
    y = np.tanh(dense(layer_norm(z, "vit.layernorm")[0], "vit.pooler.dense"))
    np.testing.assert_allclose(model(x).logits[0].detach().numpy(), dense(y, "classifier"), rtol=2e-5, atol=2e-5)


# -- positions -------------------------------------------------------------------------------------


def test_kept_table_follows_the_weights():
    model = build()
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        before = model(x).logits
        model.vit.embeddings.position_embeddings.mul_(3.0)
        after = model(x).logits
    assert not torch.allclose(before, after)
    assert same_outputs(after, build_like(model)(x).logits)


def test_kept_table_follows_a_fused_optimizer():
    """It changes a table without another version."""
    model = build()
    x = torch.randn(1, 3, 48, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).logits.square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert same_outputs(model.eval()(x).logits, build_like(model)(x).logits)


def build_like(model):
    fresh = HFViTForImageClassification(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_positions_along_the_sequence_are_refitted_along_it():
    model = build(position_embedding_type="learned1d")
    embeddings = model.vit.embeddings
    expected = resize_position_sequence(embeddings.position_embeddings[:, 1:], 6 * 5)
    assert torch.equal(embeddings.patch_positions((6, 5)), expected)


# -- attention, outputs, backends ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token", "map", "qk_norm", "hybrid"])
def test_eager_equals_sdpa(name):
    model = build(**VARIANTS[name])
    x = random_images(model)
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(x, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("eager")
    eager = model(x, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(sdpa.logits, eager.logits, atol=1e-5, rtol=1e-5)
    assert len(sdpa.attentions) == len(eager.attentions) == 3 and len(sdpa.hidden_states) == 4
    for ours, theirs in zip(sdpa.attentions, eager.attentions):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours.sum(-1)))


@pytest.mark.parametrize("training", [False, True])
def test_compile_in_one_graph(training):
    model = build().train(training)
    x = random_images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).logits, model(x).logits)
    torch.testing.assert_close(compiled(x[..., :24]).logits, model(x[..., :24]).logits)


def test_activation_checkpointing_gives_the_same_gradients():
    model, x = build().train(), torch.randn(2, 3, 32, 32)
    labels = torch.tensor([0, 3])
    model(x, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )()  # before transformers 5.23
    model(x, labels=labels).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


# -- losses and regularization ---------------------------------------------------------------------


def rows_of_the_last_mlp(model, call):
    """How many tokens the last block's MLP reads in a call; no hook shows it, since hooks are given all."""
    seen, last = [], model.vit.layers[-1].mlp
    last.forward = lambda x: seen.append(x.shape[1]) or type(last).forward(last, x)
    call()
    del last.forward
    return seen


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_last_block_trains_on_the_token_that_is_read_as_if_on_all(name, rate):
    model = build(**VARIANTS[name], drop_path_rate=rate).double().train()
    pixels, labels = random_images(model, 4).double(), torch.tensor([0, 1, 2, 3])

    def gradients(**asked):
        torch.manual_seed(1)
        model.zero_grad()
        outputs = model(pixels, labels=labels, **asked)
        outputs.loss.backward()
        return [outputs.logits, *(parameter.grad for parameter in model.parameters())]

    tokens = model.vit(pixels).last_hidden_state.shape[1]
    found, expected = gradients(), gradients(output_hidden_states=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    read = 1 if model.config.pooling in ("token", "first") else tokens
    assert rows_of_the_last_mlp(model, lambda: model(pixels)) == [read]
    assert rows_of_the_last_mlp(model.eval(), lambda: model(pixels)) == [tokens]  # bit for bit as transformers' ViT


def test_whoever_asks_for_all_tokens_gets_them():
    model = build().train()
    pixels, rows = random_images(model), lambda **asked: rows_of_the_last_mlp(model, lambda: model(pixels, **asked))
    assert rows() == [1]
    assert rows(output_hidden_states=True) == rows(output_attentions=True) == [17]
    assert rows_of_the_last_mlp(model, lambda: model.vit(pixels)) == [17]
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert rows() == [17]


def test_a_sharded_model_computes_the_token_that_is_read(tmp_path):
    model = build().train()
    pixels = random_images(model)
    expected = model(pixels).logits
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*model.vit.layers, model):
            torch.distributed.fsdp.fully_shard(part, mesh=mesh)
        found = []
        assert rows_of_the_last_mlp(model, lambda: found.append(model(pixels).logits)) == [1]
        torch.testing.assert_close(found[0], expected)
    finally:
        torch.distributed.destroy_process_group()


def test_poolings_that_read_all_tokens_refuse_fewer():
    with pytest.raises(ValueError, match='pooling="gap" reads all tokens'):
        build(pooling="gap").vit(random_images(build()), tokens=1)


def test_soft_labels_are_cross_entropy_and_leave_the_config_alone():
    model = build()
    x, soft = random_images(model), torch.tensor([[0.3, 0.7, 0, 0, 0], [0, 0, 0, 0, 1.0]])
    out = model(x, labels=soft)
    torch.testing.assert_close(out.loss, -(soft * out.logits.log_softmax(-1)).sum(-1).mean())
    assert model.config.problem_type is None


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = HFViTDropPath(0.25).train()
    x = drop(torch.ones_like, torch.zeros(4000, 3, 2))
    per_sample = x.flatten(1)
    assert per_sample.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (per_sample == per_sample[:, :1]).all()
    assert abs(x.mean().item() - 1) < 0.03
    assert (drop.eval()(torch.ones_like, torch.zeros(4, 3, 2)) == 1).all()
    rates = [layer.drop_path.rate for layer in build(drop_path_rate=0.2).vit.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_drop_path_skips_the_work_and_gives_what_the_ordinary_one_gives():
    sizes, branch = [], torch.nn.Linear(2, 2)
    drop, x = HFViTDropPath(0.5).train(), torch.randn(64, 3, 2)

    def noting(part):
        sizes.append(len(part))
        return branch(part)

    found = []
    for whole in (False, True):
        torch.manual_seed(1)
        branch.zero_grad()
        leaf = x.clone().requires_grad_()
        out = drop(noting, leaf, whole)
        out.square().sum().backward()
        found.append((out.detach(), leaf.grad, branch.weight.grad.clone()))
    for ours, ordinary in zip(*found):
        torch.testing.assert_close(ours, ordinary)
    assert 20 < sizes[0] < 44 and sizes[1] == 64


def test_drop_path_that_drops_every_sample_still_gives_every_weight_a_gradient():
    torch.manual_seed(0)
    drop, branch, x = HFViTDropPath(0.999).train(), torch.nn.Linear(2, 2), torch.randn(2, 3, 2)
    out = drop(branch, x)
    assert not out.any()
    out.sum().backward()
    assert (branch.weight.grad == 0).all()


def test_attentions_asked_for_while_training_are_those_of_all_samples():
    model = build(drop_path_rate=0.9).train()
    model.set_attn_implementation("eager")
    outputs = model(random_images(model).repeat(5, 1, 1, 1)[:5], output_attentions=True)
    assert all(len(weights) == 5 for weights in outputs.attentions)


def test_patch_dropout_keeps_other_patches_with_their_positions_of_each_image_and_only_while_training():
    model = build(patch_dropout_rate=0.75)
    x = random_images(model, 8)
    whole = model.vit.embeddings(x)
    kept = model.train().vit.embeddings(x)
    assert whole.shape[1] == 1 + 16 and kept.shape[1] == 1 + 4
    assert torch.equal(kept[:, 0], whole[:, 0])
    same = (kept[:, 1:, None] == whole[:, None, 1:]).all(-1)  # (B, kept, all)
    assert (same.sum(-1) == 1).all() and same.any(1).sum(-1).eq(4).all()
    assert len(same.any(1).unique(dim=0)) > 1


@pytest.mark.parametrize("place", ["embeddings", "attention", "mlp", "blocks"])
def test_dropout_stands_at_every_place_and_only_while_training(place, monkeypatch):
    model = build(num_hidden_layers=1)
    x = random_images(model)
    expected = model.vit(x).last_hidden_state
    layer = model.vit.layers[0]
    if place == "attention":
        model.config.attention_probs_dropout_prob = 0.5
    else:
        module = {"embeddings": model.vit.embeddings, "mlp": layer.mlp, "blocks": layer}[place]
        module.dropout.p = 0.5
    assert same_outputs(model.vit(x).last_hidden_state, expected)
    assert not torch.allclose(model.train().vit(x).last_hidden_state, expected)


def test_the_fields_of_the_config_are_the_rates_of_dropout():
    model = build(hidden_dropout_prob=0.25)
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates == [0.25] * (1 + 3 * 2)
    passed = []
    model.vit.layers[0].dropout.register_forward_hook(lambda *_: passed.append(1))
    model(random_images(model))
    assert len(passed) == 2  # after attention, after the MLP


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 7, 32), "smaller than one patch: give at least 8 x 8"),
        (torch.zeros(1, 1, 32, 32), "images of 3 channels"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "normalize the image"),
    ],
)
def test_bad_images_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        build()(pixels)


def test_unused_pixels_are_mentioned_once(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_hf_vit.logger, "warning_once", said.append)
    model = build(image_size=45, patch_size=14)
    assert model(random_images(model)).logits.shape == (2, 5)
    assert said and "last 3 rows and 3 columns of the image are not used" in said[0]


# -- heads ------------------------------------------------------------------------------------------


def test_replace_head_keeps_dtype_names_and_the_initial_bias():
    model = build(representation_size=24, head_bias_init=-10.0).to(torch.bfloat16)
    model.replace_head(2, id2label={0: "cat", 1: "dog"})
    assert model.classifier.bias.eq(-10).all()
    assert model.classifier.weight.dtype == torch.bfloat16 and not model.classifier.weight.any()
    assert model.config.label2id == {"cat": 0, "dog": 1} and model.vit.pooler is None
    with pytest.raises(ValueError, match="name each of 0 to 2"):
        model.replace_head(3, id2label={0: "cat"})


def test_freeze_backbone_leaves_the_classifier():
    model = build()
    model.freeze_backbone()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]
