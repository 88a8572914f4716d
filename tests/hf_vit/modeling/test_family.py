"""The encoders after the paper (DINOv2/v3, CLIP, BEiT, EVA-02, PE, AIMv2): their fields, as the families set them.

pytest tests/hf_vit/modeling/test_family.py
"""

import pytest
import torch
import torch.nn.functional as F

from hf_vit import HFViTBackbone, HFViTConfig, HFViTError, HFViTForImageClassification
from hf_vit.export import ExportedClassifier, check_any_size
from hf_vit.inference.token_merging import merge_tokens
from hf_vit.interpretability import attention, relevance
from hf_vit.modeling.position_embedding import relative_bias, resize_position_grid, rotary_angles, rotate
from tests.helpers.compare import same_outputs
from tests.hf_vit.modeling.test_modeling_hf_vit import TINY, build, random_images


FAMILIES = {
    "dinov2": {"layer_scale_init": 0.1, "head_input": "token_and_mean", "position_interpolation": "bicubic_offset"},
    "dinov2_giant": {"layer_scale_init": 0.1, "mlp_type": "swiglu", "num_register_tokens": 4},
    "dinov3": {
        "rope": "dinov3", "key_bias": False, "position_embedding_type": "none", "num_register_tokens": 4,
        "layer_scale_init": 0.1,
    },
    "clip": {
        "pre_layernorm": True, "patch_bias": False, "final_norm": "pooled", "hidden_act": "quick_gelu",
        "head_input": "mean_unnormalised",
    },
    "siglip": {"pooling": "map", "head_input": "mean", "position_interpolation": "bilinear_antialias"},
    "beit": {
        "pooling": "gap", "use_class_token": True, "position_embedding_type": "none", "key_bias": False,
        "relative_position_bias": "both", "final_norm": "pooled",
    },
    "beit_class_token": {"relative_position_bias": "layer"},
    "beit_shared": {"relative_position_bias": "shared"},
    "eva02": {
        "rope": "axial", "mlp_type": "swiglu", "mlp_norm": True, "attention_norm": True, "key_bias": False,
        "pooling": "gap", "use_class_token": True, "final_norm": "pooled",
    },
    "pe": {
        "rope": "axial", "rope_axes": "xy", "rope_offset": 1, "pre_layernorm": True, "patch_bias": False,
        "pooling": "map", "map_num_heads": 8, "map_intermediate_size": 40, "use_class_token": True,
    },
    "pe_spatial": {"rope": "axial", "final_norm": "none", "pooling": "gap"},
    "aimv2": {
        "norm_type": "rms", "patch_norm": True, "dense_bias": False, "qkv_bias": False, "mlp_type": "swiglu",
        "pooling": "map", "map_query_proj": False, "map_mlp": False, "position_embedding_type": "sincos_aim",
    },
    "deit": {"num_register_tokens": 1, "head_input": "two_tokens"},
    "pixio": {"num_class_tokens": 8, "pooling": "prefix_mean"},
    "map_of_patches": {"pooling": "map", "num_register_tokens": 2, "map_over_prefix": False},
    "first_with_rope": {"pooling": "first", "rope": "dinov3"},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_saves_and_loads(name, tmp_path):
    model = build(**FAMILIES[name])
    assert bool(model.config.family_fields) and not HFViTConfig().family_fields
    x = random_images(model)
    out = model(x, labels=torch.tensor([1, 4]))
    out.loss.backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    if name == "siglip":  # its classifier reads the mean patch, not the attention pooling
        assert unused and all(n.startswith("vit.map_head") for n in unused)
    elif name == "clip":  # and CLIP's no last norm
        assert unused == {"vit.layernorm.weight", "vit.layernorm.bias"}
    else:
        assert not unused
    model.save_pretrained(tmp_path)
    again = HFViTForImageClassification.from_pretrained(tmp_path).eval()
    assert same_outputs(again(x).logits, model(x).logits)
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())
    for one in (model, again):  # DistributedDataParallel waits for the gradient of every other parameter
        assert unused == {n for n, p in one.named_parameters() if not p.requires_grad}
    assert again.config.family_fields == model.config.family_fields


@pytest.mark.parametrize("name", FAMILIES)
def test_another_size_at_load_is_the_same_as_in_forward(name, tmp_path):
    model = build(**FAMILIES[name])
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 24, 56)
    resized = HFViTForImageClassification.from_pretrained(tmp_path, image_size=(24, 56)).eval()
    with torch.no_grad():
        torch.testing.assert_close(resized(x).logits, model(x).logits, atol=1e-6, rtol=1e-5)
    head = HFViTForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert head(x).logits.shape == (1, 7) and not head(x).logits.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_block_trains_on_the_token_that_is_read_as_if_on_all(name):
    model = build(**FAMILIES[name]).double().train()
    pixels, labels = random_images(model, 3).double(), torch.tensor([0, 1, 2])
    losses = [model(pixels, labels=labels, output_hidden_states=all_tokens).loss for all_tokens in (False, True)]
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(loss, trained) for loss in losses]
    torch.testing.assert_close(*losses)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_the_same_by_every_backend_and_every_way_to_look_at_it(name):
    model = build(**FAMILIES[name])
    x = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        fused = model(x).logits
        maps = model.attention_maps(x, layers=[0, 2])
        watched = attention.attention_maps(model, x, layers=[0, 2])
        model.set_attn_implementation("eager")
        eager = model(x, output_attentions=True)
        torch.testing.assert_close(eager.logits, fused, atol=1e-5, rtol=1e-5)
        for layer in (0, 2):
            torch.testing.assert_close(maps[layer], eager.attentions[layer])
            torch.testing.assert_close(watched[layer], eager.attentions[layer])
        attended = attention.class_attention(model, x)[-1]
    assert attended.shape[-2:] == (5, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_explains_every_family(name):
    model = build(**FAMILIES[name])
    x = random_images(model, 1)
    heat = relevance.explain(model, x, target=2, method="relevance")
    assert heat.shape == (1, 4, 4) and heat.isfinite().all()
    rolled = attention.rollout_map(model, x)
    assert rolled.shape == (1, 4, 4) and rolled.ge(0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_optimized_models_are_never_wrong_and_merging_refuses_what_it_does_not_know(name):
    plain, fast = build(**FAMILIES[name]), build(**FAMILIES[name]).optimize_for_inference()
    x = random_images(plain)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x).logits, plain(x).logits, atol=2e-5, rtol=2e-5)
    if not plain.config.has_plain_blocks:
        assert not fast.vit.optimized
        with pytest.raises(HFViTError, match=r"rope|relative|mlp_type|norm_type"):
            merge_tokens(fast, 2)
        with pytest.raises(HFViTError, match="int8 knows the plain ViT's block alone"):
            plain.optimize_for_inference(int8_calibration=x)


@pytest.mark.parametrize("name", ["dinov3", "beit", "eva02"])
def test_compiled_in_one_graph_and_recomputed_in_training(name):
    model = build(**FAMILIES[name])
    x = random_images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).logits, model(x).logits)
    model.train()
    expected = torch.autograd.grad(model(x).logits.sum(), model.vit.layers[0].mlp.parameters())
    # gradient_checkpointing_enable: its name before transformers 5.23
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    found = torch.autograd.grad(model(x).logits.sum(), model.vit.layers[0].mlp.parameters())
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["dinov3", "eva02", "beit"])
def test_exported_with_any_batch_and_where_it_can_be_any_size(name):
    model = build(**FAMILIES[name])
    any_size = name == "dinov3"
    batch, any_number = torch.export.Dim("batch", min=1, max=64), torch.export.Dim.DYNAMIC
    shapes = {0: batch} | ({2: any_number, 3: any_number} if any_size else {})
    example = (torch.zeros(2, 3, 48, 40) if any_size else torch.zeros(2, 3, 32, 32),)
    program = torch.export.export(
        ExportedClassifier(model, any_size), example, dynamic_shapes={"pixel_values": shapes}
    )
    x = torch.randn(3, 3, *((24, 56) if any_size else (32, 32)))
    torch.testing.assert_close(program.module()(x), model(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "field"), [("beit", "relative_position_bias"), ("dinov2", "position_interpolation")])
def test_positions_that_cannot_be_exported_for_any_size_are_refused_by_name(name, field):
    with pytest.raises(HFViTError, match=f"{field}=.* cannot be exported for any image size"):
        check_any_size(build(**FAMILIES[name]).config)


def test_backbone_gives_tokens_without_the_norm_that_is_for_the_pooled_vector():
    model = build(HFViTBackbone, **FAMILIES["beit"])
    x = random_images(model)
    maps = model(x).feature_maps[-1]
    tokens = model.vit(x).last_hidden_state[:, 1:]
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), tokens)


# -- positions -------------------------------------------------------------------------------------


def test_dinov3_angles_by_hand():
    config = HFViTConfig(**TINY, rope="dinov3")  # heads of 8 channels: two frequencies an axis, theta 100
    assert (config.rope_theta, config.rope_layout) == (100.0, "half")
    cos, sin = rotary_angles(config, (2, 3))
    row, column = 2 * (1 + 0.5) / 2 - 1, 2 * (2 + 0.5) / 3 - 1  # the last patch
    angles = 2 * torch.pi * torch.tensor([row, row / 10, column, column / 10]).repeat(2)
    torch.testing.assert_close(cos[5], angles.cos())
    torch.testing.assert_close(sin[5], angles.sin())


def test_axial_angles_by_hand():
    config = HFViTConfig(**TINY, rope="axial", rope_axes="xy", rope_offset=1, rope_reference_grid=(16, 8))
    cos, _ = rotary_angles(config, (2, 3))
    row, column = (1 + 1) / 2 * 16, (2 + 1) / 3 * 8
    angles = torch.tensor([column, column / 100, row, row / 100]).repeat_interleave(2)
    torch.testing.assert_close(cos[5], angles.cos())


def test_the_reference_grid_stays_that_of_pretraining(tmp_path):
    model = build(rope="axial")
    assert model.config.rope_reference_grid == [4, 4]
    model.save_pretrained(tmp_path)
    larger = HFViTForImageClassification.from_pretrained(tmp_path, image_size=64)
    assert larger.config.rope_reference_grid == [4, 4] and larger.config.grid_size == (8, 8)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_turned_queries_and_keys_meet_by_their_distance_and_the_prefix_stays(layout):
    config = HFViTConfig(**TINY, rope="axial", rope_layout=layout)
    cos, sin = rotary_angles(config, (1, 6))
    q, k = torch.randn(8), torch.randn(8)
    tokens = rotate(q.expand(1, 1, 7, 8), cos, sin, 1, layout), rotate(k.expand(1, 1, 7, 8), cos, sin, 1, layout)
    scores = (tokens[0] @ tokens[1].transpose(2, 3))[0, 0]
    torch.testing.assert_close(scores[1, 3], scores[3, 5])  # patches two columns apart
    assert not torch.allclose(scores[1, 3], scores[1, 4])
    assert torch.equal(tokens[0][0, 0, 0], q)


def test_coordinates_are_augmented_in_training_alone():
    config = HFViTConfig(**TINY, rope="dinov3", rope_rescale=2, rope_jitter=1.5, rope_shift=0.5)
    plain = rotary_angles(config, (4, 4))[0]
    assert torch.equal(rotary_angles(config, (4, 4))[0], plain)
    assert not torch.allclose(rotary_angles(config, (4, 4), training=True)[0], plain)
    scaled = HFViTConfig(**TINY, rope="dinov3", rope_rescale=2)
    center = rotary_angles(scaled, (1, 1), training=True)[0]
    torch.testing.assert_close(center, torch.ones_like(center))  # the middle stays where it is


def test_relative_biases_by_hand():
    table = torch.arange((2 * 2 - 1) * (2 * 3 - 1) + 3.0)[:, None]  # 2 x 3 patches, one head
    bias = relative_bias(table, (2, 3), (2, 3))[0, 0]
    assert bias.shape == (7, 7)
    assert bias[0, 0] == 17 and (bias[0, 1:] == 15).all() and (bias[1:, 0] == 16).all()
    for query in range(6):
        for key in range(6):
            down, across = query // 3 - key // 3 + 1, query % 3 - key % 3 + 2
            assert bias[1 + query, 1 + key] == 5 * down + across
    larger = relative_bias(table, (2, 3), (3, 4))[0, 0]
    square = F.interpolate(table[:-3].reshape(1, 1, 3, 5), size=(5, 7), mode="bilinear", align_corners=False)[0, 0]
    assert larger[1 + 11, 1] == square[2 + 2, 3 + 3] and larger[0, 0] == 17


def test_dinov2_offset_moves_the_samples():
    table = torch.randn(1, 16, 8)
    found = resize_position_grid(table, (4, 4), (6, 3), "bicubic_offset")
    assert found.shape == (1, 18, 8)
    assert not torch.allclose(found, resize_position_grid(table, (4, 4), (6, 3), "bicubic"))


# -- fields that make no network ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope": "dinov3", "hidden_size": 24, "num_attention_heads": 4}, "4 must divide the width of a head"),
        ({"rope_theta": 50.0}, "rope_theta has no effect"),
        ({"rope": "dinov3", "rope_offset": 1}, "belong to rope=\"axial\""),
        ({"rope": "axial", "rope_rescale": 2}, "belong to rope=\"dinov3\""),
        ({"rope": "dinov3", "patch_dropout_rate": 0.5}, "need all of them"),
        ({"rope": "axial", "rope_reference_grid": [0, 4]}, "rope_reference_grid"),
        ({"rope": "dinov3", "relative_position_bias": "layer"}, "one of them"),
        ({"relative_position_bias": "layer", "num_register_tokens": 2}, "one class token and the patches"),
        ({"relative_position_bias": "layer", "pooling": "gap"}, "one class token and the patches"),
        ({"head_input": "two_tokens"}, "add a register token"),
        ({"head_input": "token_and_mean", "pooling": "gap"}, "use_class_token=True"),
        ({"head_input": "mean", "representation_size": 8}, "set it to None"),
        ({"head_input": "mean", "final_norm": "pooled"}, "leaves them as they are"),
        ({"head_input": "mean_unnormalised"}, "before the last norm"),
        ({"map_num_heads": 8}, "set pooling=\"map\""),
        ({"pooling": "map", "map_num_heads": 5}, "map_num_heads=5 does not divide"),
        ({"pooling": "prefix_mean", "use_class_token": False}, "there are none"),
        ({"num_class_tokens": 2, "pooling": "gap"}, "needs use_class_token=True"),
        ({"num_class_tokens": 0}, "num_class_tokens must be a whole number from 1"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        HFViTConfig(**(TINY | fields))


def test_flash_attention_is_refused_where_scores_have_biases():
    model = build(relative_position_bias="layer")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention adds no biases"):
        model(random_images(model))
