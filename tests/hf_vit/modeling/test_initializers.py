"""The distribution of every tensor under each initializer, for a model with every part that there is.

Google's own ("jax"), tensor by tensor, is in test_pretrained_hf_vit.py.

pytest tests/hf_vit/modeling/test_initializers.py
"""

import math

import pytest
import torch

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForMaskedPatchPrediction


FIELDS = {
    "image_size": 64, "patch_size": 2, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 512, "num_labels": 7, "resnet_depths": (1, 1), "head_bias_init": -10.0, "qk_norm": True,
    "num_register_tokens": 8, "layer_scale_init": 0.1,
}  # fmt: skip
CUT = 0.8796256610342398  # deviation of a unit normal cut at two deviations


def everything(initializer):
    torch.manual_seed(0)
    classifier = HFViTForImageClassification(
        HFViTConfig(**FIELDS, initializer=initializer, pooling="map", representation_size=192)
    )
    masked = HFViTForMaskedPatchPrediction(HFViTConfig(**FIELDS, initializer=initializer))
    assert classifier.vit.embeddings.cls_token is None  # the one part that a map head is without
    return dict(masked.named_parameters()) | dict(classifier.named_parameters())


def near(tensor, std):
    few = 4 / math.sqrt(tensor.numel())
    return abs(tensor.std().item() / std - 1) < max(0.05, few) and abs(tensor.mean().item()) < max(0.05, few) * std


def constant(name):
    """What a parameter is filled with under every initializer, or None."""
    leaf = name.rsplit(".", 1)[1] if "." in name else name
    if name == "classifier.bias":
        return -10.0
    if leaf == "lambda1":
        return 0.1
    if "gn3" in name:
        return 0.0
    if "norm" in name or ".gn" in name:
        return float(leaf == "weight")
    return None


@pytest.mark.parametrize("initializer", ["jax", "truncated_normal", "normal_tokens"])
def test_norms_scales_and_the_heads_bias_are_constants(initializer):
    found = {name: (p, constant(name)) for name, p in everything(initializer).items() if constant(name) is not None}
    assert len(found) > 40
    for name, (p, value) in found.items():
        assert (p == torch.tensor(value)).all(), name


def test_truncated_normal_is_every_weight_and_token():
    for name, p in everything("truncated_normal").items():
        if constant(name) is None and name.endswith(".bias"):
            assert not p.any(), name
        elif constant(name) is None:
            assert near(p, 0.02 * CUT) and p.abs().max() <= 0.04, name


def test_normal_tokens_is_googles_but_for_class_token_and_positions():
    ours, googles = everything("normal_tokens"), everything("jax")
    assert {"vit.map_head.probe", "vit.pooler.dense.weight", "vit.embeddings.register_tokens"} < set(ours)
    tokens = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "mask_token"}
    for name, p in ours.items():
        if name in tokens:
            assert near(p, 1.0), name
        elif constant(name) is None and googles[name].any():
            assert near(p, googles[name].std().item()) or name.endswith(".bias"), name
        else:
            assert torch.equal(p, googles[name]), name


def test_google_leaves_class_token_and_head_at_zero_and_draws_the_task_of_masked_patches():
    found = everything("jax")
    assert not found["vit.embeddings.cls_token"].any() and not found["classifier.weight"].any()
    assert near(found["mask_token"], 0.02) and not found["colours.bias"].any()
    assert near(found["colours.weight"], math.sqrt(2 / (256 + 512)))  # Xavier uniform
