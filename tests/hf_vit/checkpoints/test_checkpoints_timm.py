"""timm's models, in and out: fixtures hold tiny random models and what timm itself computes with them.

python -m pytest tests/hf_vit/checkpoints/test_checkpoints_timm.py
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vit import HFViTError
from hf_vit.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from hf_vit.image_processing import ImageProcessing
from tests.helpers.checkpoints import ours, same
from tests.helpers.compare import same_outputs


pytestmark = pytest.mark.numerics
FOLDER = Path(__file__).parents[2] / "fixtures" / "timm"
CASES = sorted(path.name.removesuffix(".io.safetensors") for path in FOLDER.glob("*.io.safetensors"))
ASKED = {
    "map": {"hidden_act": "gelu_pytorch_tanh"},
    "no_class_position": {"class_token_has_position": False},
    "nonsquare": {"image_size": (32, 48)},
    "registers_with_position": {"checkpoint_image_size": 32},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_timm(name):
    recorded = load_file(FOLDER / f"{name}.io.safetensors")
    model = load_checkpoint(
        FOLDER / f"{name}.safetensors", num_attention_heads=4, dtype=torch.float32, **ASKED.get(name, {})
    )
    with torch.no_grad():
        found = model(recorded["pixel_values"].float()).logits
    assert (found - recorded["logits"]).abs().max() <= 1e-5 * recorded["logits"].abs().max()


def test_architecture_is_inferred():
    config = load_checkpoint(FOLDER / "hybrid_2stage.safetensors", num_attention_heads=4).config
    assert (
        tuple(config.resnet_depths) == (1, 1) and config.resnet_width_factor == 0.5 and config.group_norm_eps == 1e-5
    )
    config = load_checkpoint(FOLDER / "registers.safetensors", num_attention_heads=4).config
    assert config.num_register_tokens == 3 and config.qk_norm and config.layer_scale_init is not None
    assert not config.has_class_position and config.grid_size == (4, 4)
    config = load_checkpoint(FOLDER / "gap.safetensors", num_attention_heads=4).config
    assert config.pooling == "gap" and not config.qkv_bias and not config.use_class_token
    assert (config.hidden_act, config.position_interpolation) == ("gelu", "bicubic_antialias")


def test_what_the_file_does_not_say_is_asked_for():
    with pytest.raises(HFViTError, match="num_attention_heads="):
        load_checkpoint(FOLDER / "token.safetensors")
    with pytest.raises(HFViTError, match="class_token_has_position=False"):
        load_checkpoint(FOLDER / "no_class_position.safetensors", num_attention_heads=4)
    with pytest.raises(HFViTError, match=r"no square grid.*checkpoint_image_size="):
        load_checkpoint(FOLDER / "nonsquare.safetensors", num_attention_heads=4)
    # 25 rows: a 4x6 grid and a class token. The perfect square must not make it a 5x5 grid without one.
    with pytest.raises(HFViTError, match="24 cells"):
        load_checkpoint(FOLDER / "nonsquare.safetensors", num_attention_heads=4, image_size=40)


def _folder(tmp_path, name: str, **config) -> Path:
    tensors = {key: t.float() for key, t in load_file(FOLDER / f"{name}.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_folder_of_timm(tmp_path):
    described = {
        "input_size": [3, 32, 32],
        "mean": [0.4, 0.4, 0.4],
        "std": [0.2, 0.2, 0.2],
        "interpolation": "bicubic",
        "crop_pct": 0.8,
        "label_names": list("abcde"),
    }
    folder = _folder(
        tmp_path,
        "no_class_position",
        architecture="deit3_small_patch16_224",
        num_classes=5,
        model_args={"num_heads": 4},
        pretrained_cfg=described,
    )
    loaded = read_checkpoint(folder)
    recorded = load_file(FOLDER / "no_class_position.io.safetensors")
    with torch.no_grad():
        assert torch.allclose(loaded.model(recorded["pixel_values"].float()).logits, recorded["logits"], atol=1e-5)
    assert loaded.model.config.id2label[4] == "e" and "deit3" in loaded.format
    assert loaded.processor["size"] == {"shortest_edge": 40} and loaded.processor["image_mean"] == [0.4] * 3
    assert loaded.processor["resample"] == 3


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("no_class_position", "deit3_small_patch16_224"), ("map", "vit_so400m_patch16_siglip_256")],
)
def test_what_a_name_of_timm_stands_for(tmp_path, name, architecture):
    """That the class token has no position, that the GELU is the tanh transform: no tensor shows it."""
    model = load_checkpoint(_folder(tmp_path, name, architecture=architecture, model_args={"num_heads": 4}))
    recorded = load_file(FOLDER / f"{name}.io.safetensors")
    with torch.no_grad():
        found = model(recorded["pixel_values"].float()).logits
    assert (found - recorded["logits"]).abs().max() <= 1e-5 * recorded["logits"].abs().max()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"fc_norm.weight": (32,)}, "fc_norm"),
        ({"norm_pre.weight": (32,)}, r"norm_pre\.bias"),
        ({"rope.freqs": (2, 3, 2, 8)}, "mixed learned rotary"),
        ({"blocks.0.attn.lambda_q1": (16,)}, "differential"),
        ({"patch_embed.backbone.conv1.0.weight": (8, 3, 3, 3)}, "ResNet-D"),
        ({"something.new": (3, 4)}, r"not used \(1\): something.new \(3, 4\)"),
    ],
)
def test_foreign_features_are_refused_by_name(tmp_path, extra, named):
    tensors = load_file(FOLDER / "token.safetensors") | {key: torch.zeros(size) for key, size in extra.items()}
    save_file(tensors, tmp_path / "vit.safetensors")
    with pytest.raises(HFViTError, match=named):
        load_checkpoint(tmp_path / "vit.safetensors", num_attention_heads=4)


# -- out --------------------------------------------------------------------------------------------------------------

HYBRID = {"resnet_depths": (1, 1), "resnet_width_factor": 0.5, "patch_size": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pooling": "gap", "qkv_bias": False},
        {"pooling": "map"},
        {"num_register_tokens": 2, "layer_scale_init": 0.1, "qk_norm": True},
        {"num_register_tokens": 2, "class_token_has_position": False},
        {"image_size": (32, 48), "num_labels": 0},
        {"position_embedding_type": "none"},
        HYBRID,
    ],
)
@pytest.mark.filterwarnings("ignore:timm (computes|has no)")
def test_round_trip_is_bit_exact(tmp_path, fields):
    model = ours(**fields)
    model.config.id2label = {i: f"class {i}" for i in range(model.config.num_labels)}
    for place in (tmp_path / "vit.safetensors", tmp_path / "folder"):
        save_checkpoint(model, place, format="timm")
        back = load_checkpoint(place)
        same(back, model)
        for field in ("hidden_act", "num_attention_heads", "image_size", "id2label", "pooling", "group_norm_eps"):
            assert getattr(back.config, field) == getattr(model.config, field), field
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "vit.safetensors"]


@pytest.mark.parametrize("name", ["token", "gap", "map", "registers", "gap_registers", "hybrid_2stage", "hybrid_root"])
@pytest.mark.filterwarnings("ignore:timm computes")
def test_names_and_values_go_back_to_timm_unchanged(tmp_path, name):
    model = load_checkpoint(FOLDER / f"{name}.safetensors", num_attention_heads=4, **ASKED.get(name, {}))
    save_checkpoint(model, tmp_path / "back.safetensors", format="timm")
    before, after = load_file(FOLDER / f"{name}.safetensors"), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_other_numerics_are_said_and_kept(tmp_path):
    model = ours()
    with pytest.warns(UserWarning, match="timm computes with hidden_act='gelu' instead of 'gelu_pytorch_tanh'"):
        save_checkpoint(model, tmp_path / "vit.safetensors", format="timm")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert same_outputs(load_checkpoint(tmp_path / "vit.safetensors")(pixels).logits, model(pixels).logits)


def test_the_image_processor_is_kept(tmp_path):
    settings = {
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.2, 0.2],
        "resample": 3,
        "size": {"shortest_edge": 40},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
    }
    save_checkpoint(ours(hidden_act="gelu"), tmp_path / "vit", format="timm", processor=settings)
    described = json.loads((tmp_path / "vit" / "config.json").read_text())["pretrained_cfg"]
    assert (described["mean"], described["interpolation"], described["crop_pct"]) == ([0.4, 0.5, 0.6], "bicubic", 0.8)
    read = read_checkpoint(tmp_path / "vit")
    assert read.image_processing == ImageProcessing.from_transformers(settings)
    assert settings.items() <= read.processor.items()


def test_out_refuses_by_name(tmp_path):
    for fields, named in (
        ({"representation_size": 8}, "representation layer"),
        ({"pooling": "first", "use_class_token": False}, "first"),
        ({"position_embedding_type": "sincos2d"}, "sine-cosine"),
    ):
        with pytest.raises(HFViTError, match=named):
            save_checkpoint(ours(**fields), tmp_path / "out.safetensors", format="timm")
    assert not list(tmp_path.iterdir())
