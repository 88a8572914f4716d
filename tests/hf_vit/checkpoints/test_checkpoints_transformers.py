"""Folders of transformers, in and out, against transformers' own classes; and folders of ours.

python -m pytest tests/hf_vit/checkpoints/test_checkpoints_transformers.py
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BitBackbone,
    BitConfig,
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_vit import HFViTConfig, HFViTError, HFViTForImageClassification, HFViTModel
from hf_vit.checkpoints import AssumptionWarning, load_checkpoint, read_checkpoint, save_checkpoint
from hf_vit.checkpoints.formats.transformers import BEFORE_V5, SINCE_V5
from tests.helpers.checkpoints import SMALL, ours, same, shaken
from tests.helpers.compare import same_outputs


pytestmark = pytest.mark.numerics


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("original", [True, False], ids=["keys before v5", "keys since v5"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_vit_classifier_is_bit_exact(tmp_path, pixels, original, qkv_bias):
    theirs = shaken(ViTForImageClassification(ViTConfig(**SMALL, num_labels=3, qkv_bias=qkv_bias)))
    theirs.save_pretrained(tmp_path, save_original_format=original)
    assert ("vit.encoder.layer.0.output.dense.bias" in load_file(tmp_path / "model.safetensors")) == original
    model = load_checkpoint(tmp_path)
    with torch.no_grad():
        assert same_outputs(model(pixels).logits, theirs(pixels).logits)
    assert model.config.layer_norm_eps == 1e-12 and model.config.position_interpolation == "bicubic"


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("original", [True, False])
def test_vit_encoder_with_and_without_pooler(tmp_path, pixels, pooler, original):
    theirs = shaken(ViTModel(ViTConfig(**SMALL), add_pooling_layer=pooler))
    theirs.save_pretrained(tmp_path, save_original_format=original)
    model = load_checkpoint(tmp_path)
    assert model.config.num_labels == 0
    assert model.config.representation_size == (32 if pooler else None)
    with torch.no_grad():
        expected, found = theirs(pixels), model.vit(pixels)
    assert same_outputs(found.last_hidden_state, expected.last_hidden_state)
    if pooler:
        assert same_outputs(found.pooler_output, expected.pooler_output)
    new = load_checkpoint(tmp_path, num_labels=4)
    assert new.config.representation_size is None and not new.classifier.weight.any()
    assert load_checkpoint(tmp_path, num_labels=4, keep_representation=True).config.representation_size == (
        32 if pooler else None
    )


def test_pooler_under_a_classifier_is_left_aside_and_said(tmp_path, pixels):
    theirs = shaken(ViTForImageClassification(ViTConfig(**SMALL, num_labels=3)))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"vit.pooler.dense.weight": torch.randn(32, 32), "vit.pooler.dense.bias": torch.randn(32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = read_checkpoint(tmp_path)
    assert any("pooler" in note for note in loaded.notes)
    with torch.no_grad():
        assert same_outputs(loaded.model(pixels).logits, theirs(pixels).logits)


def test_state_dict_without_config(tmp_path, pixels):
    theirs = shaken(ViTForImageClassification(ViTConfig(**SMALL, num_labels=3)))
    torch.save({"state_dict": {f"module.{name}": t for name, t in theirs.state_dict().items()}}, tmp_path / "vit.pth")
    with pytest.raises(HFViTError, match="num_attention_heads="):
        load_checkpoint(tmp_path / "vit.pth")
    with pytest.warns(AssumptionWarning, match="LayerNorm eps 1e-12"):
        loaded = read_checkpoint(tmp_path / "vit.pth", num_attention_heads=4)
    assert any("module." in note for note in loaded.notes)
    with torch.no_grad():
        assert same_outputs(loaded.model(pixels).logits, theirs(pixels).logits)


def test_deit_reads_its_second_token_as_a_register(tmp_path, pixels):
    theirs = shaken(DeiTForImageClassification(DeiTConfig(**SMALL, num_labels=3)))
    for original in (True, False):
        theirs.save_pretrained(tmp_path / str(original), save_original_format=original)
        model = load_checkpoint(tmp_path / str(original))
        assert model.config.num_register_tokens == 1
        with torch.no_grad():
            assert same_outputs(model(pixels).logits, theirs(pixels).logits)


def _write_hybrid(folder, width: int = 32):
    """A folder as `google/vit-hybrid-base-bit-384` is laid out, its network put together from transformers' parts."""
    bit = BitConfig(
        layer_type="bottleneck",
        depths=[1, 2],
        hidden_sizes=[4 * width, 8 * width],
        embedding_size=width,
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=["stage2"],
    )
    backbone = shaken(BitBackbone(bit))
    head = {"num_channels": 8 * width, "patch_size": 1, "image_size": 4}
    vit = shaken(ViTForImageClassification(ViTConfig(**(SMALL | head), num_labels=3)))
    state = {}
    for name, tensor in vit.state_dict().items():
        for part in ("query", "key", "value", "output", "fc1", "fc2"):
            before, since = getattr(BEFORE_V5, part), getattr(SINCE_V5, part)
            name = name.replace(f".{since}.", f".{before}.")
        state[name.replace("vit.layers.", "vit.encoder.layer.")] = tensor.clone()
    state |= {f"vit.embeddings.patch_embeddings.backbone.{n}": t.clone() for n, t in backbone.state_dict().items()}
    config = vit.config.to_dict() | {
        "model_type": "vit-hybrid",
        "architectures": ["ViTHybridForImageClassification"],
        "image_size": 32,
        "num_channels": 3,
        "backbone_config": bit.to_dict(),
        "backbone_featmap_shape": [1, 8 * width, 4, 4],
    }
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ViTHybridImageProcessor",
                "do_center_crop": True,
                "size": {"shortest_edge": 40},
                "crop_size": {"height": 32, "width": 32},
                "image_mean": [0.5] * 3,
                "image_std": [0.25] * 3,
                "resample": 3,
            }
        )
    )
    return lambda pixels: vit(backbone(pixels).feature_maps[0]).logits


def test_removed_vit_hybrid_layout(tmp_path, pixels):
    theirs = _write_hybrid(tmp_path / "hybrid")
    loaded = read_checkpoint(tmp_path / "hybrid")
    assert tuple(loaded.model.config.resnet_depths) == (1, 2)
    assert loaded.model.config.weight_standardization == "sqrt_var_plus_eps"
    with torch.no_grad():
        expected, found = theirs(pixels), loaded.model(pixels).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert loaded.processor["size"] == {"shortest_edge": 40} and loaded.processor["image_std"] == [0.25] * 3
    model, info = HFViTForImageClassification.from_pretrained(tmp_path / "hybrid", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    same(model, loaded.model)


def test_overrides_resize_and_replace(tmp_path):
    theirs = shaken(ViTForImageClassification(ViTConfig(**SMALL, num_labels=3)))
    theirs.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path, image_size=(48, 24), id2label=["cat", "dog"])
    assert model.config.grid_size == (6, 3) and model.config.id2label == {0: "cat", 1: "dog"}
    assert model.vit.embeddings.position_embeddings.shape == (1, 19, 32)
    assert not model.classifier.weight.any() and model.classifier.weight.shape == (2, 32)
    table = theirs.vit.embeddings.interpolate_pos_encoding(torch.zeros(1, 19, 32), 48, 24)
    assert torch.equal(model.vit.embeddings.position_embeddings, table)
    renamed = load_checkpoint(tmp_path, id2label=["a", "b", "c"])
    assert renamed.classifier.weight.any() and renamed.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert load_checkpoint(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def test_what_contradicts_the_file_is_an_error(tmp_path):
    ViTForImageClassification(ViTConfig(**SMALL, num_labels=3)).save_pretrained(tmp_path)
    for field, value in {"num_hidden_layers": 3, "qkv_bias": False, "use_class_token": False}.items():
        with pytest.raises(HFViTError, match=f"{field}={value} contradicts"):
            load_checkpoint(tmp_path, **{field: value})
    with pytest.raises(HFViTError, match="map_head"):
        load_checkpoint(tmp_path, pooling="map")
    with pytest.raises(HFViTError, match="hidden_size=64 contradicts the file, which says 32"):
        load_checkpoint(tmp_path, hidden_size=64)
    with pytest.raises(HFViTError, match="did you mean 'num_attention_heads'"):
        load_checkpoint(tmp_path, num_attention_head=4)
    with pytest.raises(HFViTError, match="id2label names 2 classes, num_labels is 3"):
        load_checkpoint(tmp_path, num_labels=3, id2label=["a", "b"])


# -- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"image_size": (32, 48), "hidden_act": "gelu", "layer_norm_eps": 1e-12}, {"class_token_has_position": False}],
    ids=["google numerics", "rectangular", "class token without position"],
)
def test_out_loads_in_transformers_without_a_key_too_many(tmp_path, fields):
    model = ours(**fields)
    model.config.id2label = {i: f"class {i}" for i in range(5)}
    model.config.label2id = {f"class {i}": i for i in range(5)}
    save_checkpoint(model, tmp_path / "out", format="transformers")
    theirs, info = ViTForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    pixels = torch.randn(2, 3, *model.config.image_size_hw)
    with torch.no_grad():
        assert same_outputs(theirs.eval()(pixels).logits, model(pixels).logits)
    assert theirs.config.id2label[3] == "class 3"
    back = load_checkpoint(tmp_path / "out")
    with torch.no_grad():
        assert same_outputs(back(pixels).logits, model(pixels).logits)
    if "class_token_has_position" not in fields:
        same(back, model)


def test_out_encoder_with_pooler(tmp_path, pixels):
    model = ours(num_labels=0, representation_size=32)
    save_checkpoint(model, tmp_path / "out", format="transformers")
    theirs, info = ViTModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert same_outputs(theirs.eval()(pixels).pooler_output, model.vit(pixels).pooler_output)
    same(load_checkpoint(tmp_path / "out"), model)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"resnet_depths": (1,), "resnet_width_factor": 0.5, "patch_size": 1}, "ResNet"),
        ({"pooling": "gap", "use_class_token": True}, "pooling"),
        ({"pooling": "map"}, "pooling"),
        ({"representation_size": 16}, "representation layer"),
        ({"num_register_tokens": 2}, "register"),
        ({"layer_scale_init": 0.1}, "LayerScale"),
        ({"qk_norm": True}, "QK-norm"),
        ({"position_embedding_type": "sincos2d"}, "positions"),
    ],
)
def test_out_refuses_by_name(tmp_path, fields, named):
    with pytest.raises(HFViTError, match=named):
        save_checkpoint(ours(**fields), tmp_path / "out", format="transformers")
    assert not list(tmp_path.iterdir())


# -- our own folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pooling": "map", "qk_norm": True, "layer_scale_init": 0.1, "representation_size": 16, "qkv_bias": False},
        {"num_register_tokens": 2, "resnet_depths": (1, 1), "resnet_width_factor": 0.5, "patch_size": 1},
        {"position_embedding_type": "sincos2d", "pooling": "gap"},
    ],
)
def test_own_folder(tmp_path, fields):
    model = ours(**fields)
    model.save_pretrained(tmp_path)
    back = load_checkpoint(tmp_path)
    same(back, model)
    there, again = back.config.to_dict(), HFViTForImageClassification.from_pretrained(tmp_path).config.to_dict()
    assert {key for key in there if there[key] != again.get(key)} <= {"architectures"}


def test_own_encoder_and_missing_tensor(tmp_path):
    encoder = shaken(HFViTModel(HFViTConfig(**SMALL)))
    encoder.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    assert model.config.num_labels == 0
    same(model.vit, encoder)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.fc1.weight"))
    del tensors[name]
    tensors["something.else"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HFViTError, match=r"missing \(1\).*fc1.weight[\s\S]*not used \(1\): something.else \(3\)"):
        load_checkpoint(tmp_path)
