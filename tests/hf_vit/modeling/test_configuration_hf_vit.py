"""configuration_hf_vit.py: the published sizes to the last parameter, and fields that make no network refused.

pytest tests/hf_vit/modeling/test_configuration_hf_vit.py
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeiTConfig, ViTConfig

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.modeling.configuration_hf_vit import PRESETS


# vit_jax/models_test.py of google-research/vision_transformer at c6de1e5: 1000 classes, 224 px
PARAMETERS = {
    "ViT-Ti_16": 5_717_416,
    "ViT-S_16": 22_050_664,
    "ViT-S_32": 22_878_952,
    "ViT-B_8": 86_576_872,
    "ViT-B_16": 86_567_656,
    "ViT-B_32": 88_224_232,
    "ViT-L_16": 304_326_632,
    "ViT-L_32": 306_535_400,
    "ViT-H_14": 632_045_800,
    "ViT-S_16-gap-norep": 22_049_896,
    "ViT-B_16-gap-norep": 86_566_120,
    "ViT-S_32-gap-norep": 22_878_184,
    "ViT-B_32-gap-norep": 88_222_696,
    "R+ViT-Ti_16": 6_337_704,
    "R26+ViT-S_32": 36_431_912,
    "R26+ViT-B_32": 101_383_976,
    "R50+ViT-B_16": 98_659_112,
    "R50+ViT-L_32": 328_994_856,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_has_google_parameter_count(preset):
    with torch.device("meta"):
        model = HFViTForImageClassification(HFViTConfig.from_preset(f"{preset}-224", num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[PRESETS[preset][0]]


def test_every_counted_model_has_a_preset():
    assert {row[0] for row in PRESETS.values()} == set(PARAMETERS)


def test_preset_by_google_name_and_resolution():
    ours, theirs = HFViTConfig.from_preset("r50-vit-base-patch16-384"), HFViTConfig.from_preset("R50+ViT-B_16-384")
    assert ours.to_dict() == theirs.to_dict()
    assert ours.grid_size == (24, 24) and ours.stem_channels == 1024 and ours.total_stride == (16, 16)
    assert HFViTConfig.from_preset("vit-huge-patch14-384").grid_size == (27, 27)
    assert HFViTConfig.from_preset("r-vit-tiny-patch16").grid_size == (7, 7)


def test_hybrid_grid_rounds_up_in_the_resnet():
    config = HFViTConfig(image_size=72, patch_size=1, resnet_depths=(1, 1, 1))  # 72 -> 36 -> 18 -> 9 -> 5
    assert config.grid_size == (5, 5)


def test_json_round_trip(tmp_path):
    config = HFViTConfig(
        image_size=(32, 48), patch_size=(8, 4), resnet_depths=(1,), id2label={0: "a", 1: "b", 2: "c"}, pooling="map"
    )
    config.save_pretrained(tmp_path)
    again = HFViTConfig.from_pretrained(tmp_path)
    assert again.grid_size == config.grid_size and again.image_size_hw == (32, 48)
    assert again.id2label == {0: "a", 1: "b", 2: "c"} and again.num_labels == 3 and again.use_class_token is False
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hf_vit"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 10}, "does not divide hidden_size=10"),
        ({"hiden_size": 768}, "did you mean 'hidden_size'"),
        ({"image_size": 8}, "smaller than one patch"),
        ({"image_size": (224,)}, "image_size"),
        ({"pooling": "token", "use_class_token": False}, "class token"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"resnet_depths": (3, 0)}, "at least one unit"),
        ({"resnet_depths": (), "resnet_width_factor": 0.3}, "multiple of 32"),
        ({"position_embedding_type": "sincos2d", "hidden_size": 6, "num_attention_heads": 2}, "sincos2d"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        HFViTConfig(**fields)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="vit-base-patch16-384"):
        HFViTConfig.from_preset("vit-bse-patch16-384")
    with pytest.raises(ValueError, match="no field 'hiddensize'"):
        HFViTConfig.from_preset("vit-base-patch16-224", hiddensize=12)


def test_transformers_configs_keep_their_numerics():
    for theirs in (ViTConfig(num_labels=7), DeiTConfig(num_labels=7)):
        ours = HFViTConfig.from_dict(theirs.to_dict())
        assert (ours.hidden_act, ours.layer_norm_eps, ours.position_interpolation) == ("gelu", 1e-12, "bicubic")
        assert ours.num_labels == 7 and ours.model_type == "hf_vit"


def test_removed_vit_hybrid_config_is_read():
    backbone = {"layer_type": "bottleneck", "depths": [3, 4, 9], "out_features": ["stage3"], "embedding_size": 64}
    ours = HFViTConfig.from_dict(
        {"model_type": "vit-hybrid", "image_size": 384, "patch_size": 1, "backbone_config": backbone}
    )
    assert ours.resnet_depths == [3, 4, 9] and ours.grid_size == (24, 24) and ours.group_norm_eps == 1e-5


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="'clip' checkpoint"):
        HFViTConfig.from_dict({"model_type": "clip"})


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(33, 200), width=st.integers(33, 200), patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stages=st.one_of(st.none(), st.integers(0, 2)),
)  # fmt: skip
def test_grid_is_what_the_network_makes(height, width, patch, stages):
    config = HFViTConfig(
        image_size=(height, width), patch_size=patch, hidden_size=4, num_attention_heads=1, num_hidden_layers=0,
        intermediate_size=4, resnet_depths=None if stages is None else (1,) * stages, resnet_width_factor=0.5,
    )  # fmt: skip
    with torch.device("meta"):
        model = HFViTForImageClassification(config)
        tokens = model.vit.embeddings.patch_embeddings(torch.empty(1, 3, height, width))
    assert tuple(tokens.shape[-2:]) == config.grid_size


def test_a_negative_number_of_classes_is_refused(tmp_path):
    HFViTConfig().save_pretrained(tmp_path)
    for ask in (HFViTConfig, lambda **labels: HFViTConfig.from_pretrained(tmp_path, **labels)):
        with pytest.raises(ValueError, match="num_labels=-1 is no number of classes"):
            ask(num_labels=-1)
        assert ask(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        assert ask(num_labels=0).num_labels == 0
