"""pretrained_hf_vit.py: initialization, loading at any size, in the layouts of others, code that travels, maps.

pytest tests/hf_vit/modeling/test_pretrained_hf_vit.py
"""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTModel
from hf_vit.modeling.pretrained_hf_vit import TRAVELLING_FILES
from tests.helpers.compare import same_outputs
from tests.hf_vit.modeling.test_modeling_hf_vit import TINY, VARIANTS, build, random_images


pytestmark = pytest.mark.numerics
THEIRS = {name: value for name, value in TINY.items() if name != "num_labels"}  # of a transformers config


# -- transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("original", [True, False], ids=["keys_before_v5", "keys_of_v5"])
def test_transformers_vit_folder_loads_exactly(original, tmp_path):
    torch.manual_seed(0)
    theirs = ViTForImageClassification(ViTConfig(**THEIRS, id2label={0: "cat", 1: "dog", 2: "owl"})).eval()
    theirs.save_pretrained(tmp_path, save_original_format=original)
    ours = HFViTForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 32, 32)
    assert same_outputs(ours(x).logits, theirs(x).logits)
    assert ours.config.id2label == {0: "cat", 1: "dog", 2: "owl"} and ours.config.model_type == "hf_vit"
    larger = HFViTForImageClassification.from_pretrained(tmp_path, image_size=48).eval()
    y = torch.randn(2, 3, 48, 48)
    expected = theirs(y, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(larger(y).logits, expected, atol=1e-5, rtol=1e-5)


def test_our_folder_loads_in_transformers_vit(tmp_path):
    ours = build()
    ours.save_pretrained(tmp_path)
    theirs, info = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    x = random_images(ours)
    assert same_outputs(theirs.eval()(x).logits, ours(x).logits)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_transformers_pooler_becomes_the_representation_layer(tmp_path):
    torch.manual_seed(0)
    theirs = ViTModel(ViTConfig(**THEIRS)).eval()
    theirs.save_pretrained(tmp_path)
    ours = HFViTModel.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 32, 32)
    assert same_outputs(ours(x).pooler_output, theirs(x).pooler_output)
    assert HFViTForImageClassification.from_pretrained(tmp_path, num_labels=3).vit.pooler is None


def test_the_callers_configuration_stays_as_it_is(tmp_path):
    ViTModel(ViTConfig(**THEIRS)).save_pretrained(tmp_path)
    config = HFViTConfig(**TINY)
    before = config.to_dict()
    model = HFViTModel.from_pretrained(tmp_path, config=config)
    model.config.id2label[0] = "another"
    assert model.config.representation_size is not None and config.to_dict() == before


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
    assert same_outputs(first, second) and same_outputs(resized(x).logits, first)


def test_patch_size_and_channels_can_change(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    changed = HFViTForImageClassification.from_pretrained(tmp_path, patch_size=16, image_size=64).eval()
    x = F.interpolate(random_images(model, 1), 32)
    large = F.interpolate(x, (64, 64), mode="nearest")
    assert changed.vit.embeddings.patch_embeddings.projection.weight.shape == (32, 3, 16, 16)
    assert changed(large).logits.shape == (1, 5)
    tables = [one.vit.embeddings.position_embeddings for one in (changed, model)]
    assert torch.equal(*tables)  # 4 x 4 patches before and after
    for channels in (1, 4, 12):
        other = HFViTForImageClassification.from_pretrained(tmp_path, num_channels=channels).eval()
        gray = torch.randn(1, 1, 32, 32)
        expected = model(gray.expand(-1, 3, -1, -1)).logits
        torch.testing.assert_close(other(gray.expand(-1, channels, -1, -1)).logits, expected, atol=1e-4, rtol=1e-4)


# -- initialization --------------------------------------------------------------------------------


def test_jax_initialization_of_every_tensor():
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


def test_other_initializers():
    torch.manual_seed(0)
    wide = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
    model = HFViTForImageClassification(HFViTConfig(**(TINY | wide), initializer="truncated_normal"))
    for name in ("classifier.weight", "vit.embeddings.position_embeddings", "vit.layers.1.mlp.fc1.weight"):
        p = model.get_parameter(name)
        assert 0.015 < p.std().item() < 0.02 and p.abs().max() <= 0.04, name
    model = HFViTForImageClassification(HFViTConfig(**(TINY | wide), initializer="normal_tokens"))
    assert 0.9 < model.vit.embeddings.position_embeddings.std().item() < 1.1
    assert 0.8 < model.vit.embeddings.cls_token.std().item() < 1.2


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
    x = random_images(model)
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
    DeiTForImageClassification(DeiTConfig(**THEIRS)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hf_vit\.load_checkpoint"):
        HFViTForImageClassification.from_pretrained(tmp_path)


# -- damaged folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_whole_numbers_are_refused(tmp_path, dtype):
    """transformers takes them for the values themselves: each answer would be wrong."""
    model = build()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vit.layers.1.mlp.fc1.weight"] = tensors["vit.layers.1.mlp.fc1.weight"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc1\.weight' holds .* numbers \(1 tensors do\)"):
        HFViTForImageClassification.from_pretrained(tmp_path)


def test_weights_that_are_nan_are_refused(tmp_path):
    model = build()
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight[3, 4] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 tensors hold NaN .*layers\.1\.mlp\.fc1\.weight.*earlier checkpoint"):
        HFViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 900}, "num_hidden_layers=900, the weights have 3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 0 to 1000"),
        ({"num_hidden_layers": 1, "out_features": None, "out_indices": None}, "without 32 tensors of the file"),
        ({"hidden_size": 2**16}, "hidden_size=65536, the weights have 32"),
        ({"qkv_bias": False}, "without 9 tensors of the file"),
        ({"id2label": {}}, r"without 2 tensors of the file \(classifier"),
        ({"id2label": {"0": "a"}}, "does not fit the weights, 2 tensors have other shapes"),
        (
            {"id2label": {"1": "a", "2": "b"}},
            "id2label has 2 names for the numbers 1 to 2: name each class from 0 to 1",
        ),
        ({"id2label": ["a", "b"]}, "id2label maps class numbers to names, got a list"),
        ({"dtype": "float99"}, "dtype='float99' is none of float16"),
        ({"hidden_act": "nosuch"}, "hidden_act='nosuch' is no activation"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps must be a number"),
        ({"hidden_size": "32"}, "'hidden_size'.* expected int, got str"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_refused_in_one_line_before_a_large_network_is_built(fields, message, tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message) as refused:
        HFViTForImageClassification.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_fewer_blocks_are_loaded_when_they_are_asked_for(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    short = HFViTForImageClassification.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(short.vit.layers) == 2 and short.config.out_features == ["stage2"]
    assert torch.equal(short.vit.layers[1].mlp.fc1.weight, model.vit.layers[1].mlp.fc1.weight)


def test_a_config_nested_without_end_and_a_plan_that_splits_what_is_whole(tmp_path):
    model = build(relative_position_bias="layer")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="relative_position_bias needs all heads"):
        HFViTForImageClassification.from_pretrained(tmp_path, tp_plan="auto")
    (tmp_path / "config.json").write_text('{"model_type": "hf_vit", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match="nested too deeply"):
        HFViTConfig.from_pretrained(tmp_path)


def test_shards_are_checked_too(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    x = random_images(model)
    assert same_outputs(HFViTForImageClassification.from_pretrained(tmp_path).eval()(x).logits, model(x).logits)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 2**20}))
    with pytest.raises(ValueError, match="intermediate_size=1048576, the weights have 48"):
        HFViTForImageClassification.from_pretrained(tmp_path)


# -- attention maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_maps_of_chosen_layers(backend):
    model = build()
    model.set_attn_implementation(backend)
    x = random_images(model)
    maps = model.attention_maps(x, layers=[0, -1])
    assert not any(layer.attention._forward_hooks for layer in model.vit.layers)
    all_layers = model(x, output_attentions=True).attentions
    assert list(maps) == [0, -1]
    torch.testing.assert_close(maps[0], all_layers[0])
    torch.testing.assert_close(maps[-1], all_layers[2])
    model.vit.compile(backend="eager")
    model(x)
    torch.testing.assert_close(model.attention_maps(x, layers=[0])[0], maps[0])
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        model.attention_maps(x, layers=[3])
