"""modeling_hf_vit.py: the equations against numpy, transformers' own ViT bit for bit, each promise of the classes.

pytest tests/test_modeling.py
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTModel
from hf_vit.modeling_hf_vit import HFViTDropPath
from hf_vit.pretrained_hf_vit import TRAVELLING_FILES


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
    "grey": {"num_channels": 1},
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


def picture(model, batch=2):
    return torch.randn(batch, model.config.num_channels, *model.config.image_size_hw)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_saves_and_loads_exactly(name, tmp_path):
    model = build(**VARIANTS[name])
    x = picture(model)
    out = model(x, labels=torch.tensor([1, 4]))
    assert out.logits.shape == (2, 5) and out.loss.isfinite()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = HFViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(x).logits, model(x).logits)


def test_equations_in_numpy():
    """Eqs. 1-8 written out again, without torch."""
    model = build(representation_size=24)
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    x = picture(model, 1)

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


# -- transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("original", [True, False], ids=["keys_before_v5", "keys_of_v5"])
def test_transformers_vit_folder_loads_bit_exactly(original, tmp_path):
    torch.manual_seed(0)
    config = {k: v for k, v in TINY.items() if k != "num_labels"}
    theirs = ViTForImageClassification(ViTConfig(**config, id2label={0: "cat", 1: "dog", 2: "owl"})).eval()
    theirs.save_pretrained(tmp_path, save_original_format=original)
    ours = HFViTForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(x).logits, theirs(x).logits)
    assert ours.config.id2label == {0: "cat", 1: "dog", 2: "owl"} and ours.config.model_type == "hf_vit"
    larger = HFViTForImageClassification.from_pretrained(tmp_path, image_size=48).eval()
    y = torch.randn(2, 3, 48, 48)
    expected = theirs(y, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(larger(y).logits, expected, atol=1e-5, rtol=1e-5)


def test_our_folder_loads_in_transformers_vit(tmp_path):
    ours = build()
    ours.save_pretrained(tmp_path)
    theirs, info = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    x = picture(ours)
    assert torch.equal(theirs.eval()(x).logits, ours(x).logits)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_transformers_pooler_becomes_the_representation_layer(tmp_path):
    torch.manual_seed(0)
    theirs = ViTModel(ViTConfig(**{k: v for k, v in TINY.items() if k != "num_labels"})).eval()
    theirs.save_pretrained(tmp_path)
    ours = HFViTModel.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(x).pooler_output, theirs(x).pooler_output)
    assert HFViTForImageClassification.from_pretrained(tmp_path, num_labels=3).vit.pooler is None


# -- loading with another resolution, patch, head --------------------------------------------------


def test_from_pretrained_changes_resolution_and_head_in_one_call(tmp_path):
    model = build(representation_size=24)
    model.save_pretrained(tmp_path)
    for auto in (HFViTForImageClassification, AutoModelForImageClassification):
        changed = auto.from_pretrained(tmp_path, image_size=(48, 64), num_labels=7).eval()
        assert changed.config.image_size_hw == (48, 64) and changed.config.num_labels == 7
        assert changed.vit.embeddings.position_embeddings.shape == (1, 6 * 8 + 1, 32)
        assert changed.vit.pooler is None and changed.config.representation_size is None
        assert not changed(torch.randn(1, 3, 48, 64)).logits.any()
    before, after = model.vit.embeddings.position_embeddings, changed.vit.embeddings.position_embeddings
    grid = before[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (6, 8), mode="bilinear", align_corners=True).permute(0, 2, 3, 1).reshape(1, 48, 32)
    torch.testing.assert_close(after, torch.cat([before[:, :1], grid], 1))
    kept = HFViTForImageClassification.from_pretrained(tmp_path, num_labels=7, keep_representation=True)
    assert kept.vit.pooler is not None and kept.classifier.in_features == 24
    assert isinstance(AutoModel.from_pretrained(tmp_path, image_size=48), HFViTModel)


def test_a_rectangle_of_the_same_token_count_is_resampled(tmp_path):
    model = build(image_size=(16, 64))  # 2 x 8 patches
    model.save_pretrained(tmp_path)
    square = HFViTForImageClassification.from_pretrained(tmp_path, image_size=32)  # 4 x 4
    assert not torch.equal(square.vit.embeddings.position_embeddings, model.vit.embeddings.position_embeddings)


def test_25_rows_with_a_class_token_are_a_4x6_grid(tmp_path):
    model = build(image_size=(32, 48))
    assert model.vit.embeddings.position_embeddings.shape[1] == 25
    model.save_pretrained(tmp_path)
    wide = HFViTForImageClassification.from_pretrained(tmp_path, image_size=(32, 96))
    assert torch.equal(wide.vit.embeddings.position_embeddings[:, :1], model.vit.embeddings.position_embeddings[:, :1])
    assert wide.vit.embeddings.position_embeddings.shape[1] == 4 * 12 + 1


def test_forward_at_another_size_equals_loading_at_it(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 41, 56)
    with torch.no_grad():
        first, second = model(x).logits, model(x).logits  # the second reads the kept table
    resized = HFViTForImageClassification.from_pretrained(tmp_path, image_size=(41, 56)).eval()
    assert torch.equal(first, second) and torch.equal(resized(x).logits, first)


def test_kept_table_follows_the_weights():
    model = build()
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        before = model(x).logits
        model.vit.embeddings.position_embeddings.mul_(3.0)
        after = model(x).logits
    assert not torch.allclose(before, after)
    assert torch.equal(after, build_like(model)(x).logits)


def build_like(model):
    fresh = HFViTForImageClassification(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_patch_size_and_channels_can_change(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    changed = HFViTForImageClassification.from_pretrained(tmp_path, patch_size=16, image_size=64).eval()
    x = F.interpolate(picture(model, 1), 32)
    large = F.interpolate(x, (64, 64), mode="nearest")
    assert changed.vit.embeddings.patch_embeddings.projection.weight.shape == (32, 3, 16, 16)
    assert changed(large).logits.shape == (1, 5)
    for channels in (1, 4, 12):
        other = HFViTForImageClassification.from_pretrained(tmp_path, num_channels=channels).eval()
        grey = torch.randn(1, 1, 32, 32)
        expected = model(grey.expand(-1, 3, -1, -1)).logits
        torch.testing.assert_close(other(grey.expand(-1, channels, -1, -1)).logits, expected, atol=1e-4, rtol=1e-4)


def test_replace_head_keeps_dtype_and_names():
    model = build(representation_size=24).to(torch.bfloat16)
    model.replace_head(2, id2label={0: "cat", 1: "dog"})
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


# -- initialisation --------------------------------------------------------------------------------


def test_jax_initialisation_of_every_tensor():
    torch.manual_seed(0)
    config = HFViTConfig(
        image_size=64, patch_size=2, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, num_labels=7, representation_size=192, resnet_depths=(1, 1), head_bias_init=-10.0,
        pooling="map", use_class_token=True, num_register_tokens=8, layer_scale_init=0.1,
    )  # fmt: skip
    model = HFViTForImageClassification(config)
    seen = 0

    def near(tensor, std):
        return abs(tensor.std().item() / std - 1) < 0.1 and abs(tensor.mean().item()) < 0.1 * std + 1e-12

    for name, p in model.named_parameters():
        seen += 1
        leaf = name.rsplit(".", 1)[1]
        if name == "classifier.weight" or name.endswith(("cls_token", "gn3.weight")):
            assert not p.any(), name
        elif name == "classifier.bias":
            assert (p == -10).all()
        elif "lambda1" in name:
            assert (p == torch.tensor(0.1)).all()
        elif "layernorm" in name or ".gn" in name:
            assert (p == (leaf == "weight")).all(), name
        elif "position_embeddings" in name or "register" in name:
            assert near(p, 0.02), name
        elif "probe" in name:
            assert near(p, math.sqrt(2 / 257)), name
        elif leaf == "bias":
            assert (p.abs().max() < 1e-5 and p.any()) if "mlp" in name else not p.any(), name
        elif "attention" in name or "mlp" in name:
            limit = math.sqrt(6 / sum(p.shape))
            assert near(p, limit / math.sqrt(3)) and p.abs().max() <= limit, name
        else:  # LeCun normal: patch projection, ResNet, representation
            std = 1 / math.sqrt(p[0].numel())
            assert near(p, std) and p.abs().max() <= 2 * std / 0.8796256610342398 + 1e-6, name
    assert seen == len(model.state_dict()) > 50


def test_other_initialisers():
    torch.manual_seed(0)
    wide = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
    model = HFViTForImageClassification(HFViTConfig(**(TINY | wide), initializer="truncated_normal"))
    for name in ("classifier.weight", "vit.embeddings.position_embeddings", "vit.layers.1.mlp.fc1.weight"):
        p = model.get_parameter(name)
        assert 0.015 < p.std().item() < 0.02 and p.abs().max() <= 0.04, name
    model = HFViTForImageClassification(HFViTConfig(**(TINY | wide), initializer="normal_tokens"))
    assert 0.9 < model.vit.embeddings.position_embeddings.std().item() < 1.1
    assert 0.8 < model.vit.embeddings.cls_token.std().item() < 1.2


# -- attention, outputs, backends ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token", "map", "qk_norm", "hybrid"])
def test_eager_equals_sdpa(name):
    model = build(**VARIANTS[name])
    x = picture(model)
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(x, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("eager")
    eager = model(x, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(sdpa.logits, eager.logits, atol=1e-5, rtol=1e-5)
    assert len(sdpa.attentions) == len(eager.attentions) == 3 and len(sdpa.hidden_states) == 4
    for ours, theirs in zip(sdpa.attentions, eager.attentions):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours.sum(-1)))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_maps_of_chosen_layers(backend):
    model = build()
    model.set_attn_implementation(backend)
    x = picture(model)
    maps, all_layers = model.attention_maps(x, layers=[0, -1]), model(x, output_attentions=True).attentions
    assert list(maps) == [0, -1]
    torch.testing.assert_close(maps[0], all_layers[0])
    torch.testing.assert_close(maps[-1], all_layers[2])
    model.vit.compile(backend="eager")
    model(x)
    torch.testing.assert_close(model.attention_maps(x, layers=[0])[0], maps[0])
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        model.attention_maps(x, layers=[3])


def test_compile_in_one_graph():
    model = build()
    x = picture(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).logits, model(x).logits)
    torch.testing.assert_close(compiled(x[..., :24]).logits, model(x[..., :24]).logits)


def test_activation_checkpointing_gives_the_same_gradients():
    model, x = build().train(), torch.randn(2, 3, 32, 32)
    labels = torch.tensor([0, 3])
    model(x, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(x, labels=labels).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


# -- losses and regularisation ---------------------------------------------------------------------


def test_soft_labels_are_cross_entropy_and_leave_the_config_alone():
    model = build()
    x, soft = picture(model), torch.tensor([[0.3, 0.7, 0, 0, 0], [0, 0, 0, 0, 1.0]])
    out = model(x, labels=soft)
    torch.testing.assert_close(out.loss, -(soft * out.logits.log_softmax(-1)).sum(-1).mean())
    assert model.config.problem_type is None


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = HFViTDropPath(0.25).train()
    x = drop(torch.zeros(4000, 3, 2), torch.ones_like)
    per_sample = x.flatten(1)
    assert per_sample.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (per_sample == per_sample[:, :1]).all()
    assert abs(x.mean().item() - 1) < 0.03
    assert (drop.eval()(torch.zeros(4, 3, 2), torch.ones_like) == 1).all()
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
        out = drop(leaf, noting, whole)
        out.square().sum().backward()
        found.append((out.detach(), leaf.grad, branch.weight.grad.clone()))
    for ours, ordinary in zip(*found):
        torch.testing.assert_close(ours, ordinary)
    assert 20 < sizes[0] < 44 and sizes[1] == 64


def test_drop_path_that_drops_every_sample_still_gives_every_weight_a_gradient():
    torch.manual_seed(0)
    drop, branch, x = HFViTDropPath(0.999).train(), torch.nn.Linear(2, 2), torch.randn(2, 3, 2)
    out = drop(x, branch)
    assert torch.equal(out, x)
    out.sum().backward()
    assert (branch.weight.grad == 0).all()


def test_attentions_asked_for_while_training_are_those_of_all_samples():
    model = build(drop_path_rate=0.9).train()
    model.set_attn_implementation("eager")
    outputs = model(picture(model).repeat(5, 1, 1, 1)[:5], output_attentions=True)
    assert all(len(weights) == 5 for weights in outputs.attentions)


def test_patch_dropout_only_while_training():
    model = build(patch_dropout_rate=0.5)
    x = picture(model)
    assert model.vit(x).last_hidden_state.shape[1] == 17
    assert model.train().vit(x).last_hidden_state.shape[1] == 1 + 8


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 7, 32), "smaller than one patch: give at least 8 x 8"),
        (torch.zeros(1, 1, 32, 32), "images of 3 channels"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "normalise the picture"),
    ],
)
def test_bad_pictures_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        build()(pixels)


def test_unused_pixels_are_mentioned_once(monkeypatch):
    from hf_vit import modeling_hf_vit

    said = []
    monkeypatch.setattr(modeling_hf_vit.logger, "warning_once", said.append)
    model = build(image_size=45, patch_size=14)
    assert model(picture(model)).logits.shape == (2, 5)
    assert said and "last 3 rows and 3 columns of the image are not used" in said[0]


# -- files that travel -----------------------------------------------------------------------------

ELSEWHERE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_vit", "training"):
            raise ModuleNotFoundError("No module named " + name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
folder = sys.argv[1]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
larger = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, image_size=48, num_labels=2)
encoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "hf_vit"
assert larger.config.num_labels == 2 and larger(torch.zeros(1, 3, 48, 48)).logits.shape == (1, 2)
x = torch.load(folder + "/x.pt", weights_only=True)
torch.save([model(x).logits, encoder(x).pooler_output], folder + "/out.pt")
model.save_pretrained(folder + "/again")
"""


@pytest.mark.parametrize("name", ["token", "hybrid"])
def test_folder_loads_where_the_package_is_absent(name, tmp_path):
    model = build(**VARIANTS[name])
    x = picture(model)
    model.save_pretrained(tmp_path)
    torch.save(x, tmp_path / "x.pt")
    env = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    logits, pooled = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(logits, model(x).logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pooled, model.vit(x).pooler_output, atol=1e-6, rtol=1e-5)
    assert set(TRAVELLING_FILES) <= {file.name for file in (tmp_path / "again").iterdir()}


def test_stock_trainer_trains_our_model(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = build()
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 5} for i in range(16)]
    args = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
        gradient_accumulation_steps=2, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    before = model.classifier.weight.clone()
    assert math.isfinite(Trainer(model, args, train_dataset=data).train().training_loss)
    assert not torch.equal(before, model.classifier.weight)
    assert (tmp_path / "checkpoint-4" / "modeling_hf_vit.py").is_file()


def test_an_encoder_in_another_layout_is_never_half_loaded(tmp_path):
    from transformers import DeiTConfig, DeiTForImageClassification

    DeiTForImageClassification(DeiTConfig(**{k: v for k, v in TINY.items() if k != "num_labels"})).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"hf_vit\.load_checkpoint"):
        HFViTForImageClassification.from_pretrained(tmp_path)
