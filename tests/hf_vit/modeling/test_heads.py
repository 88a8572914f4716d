"""modeling_hf_vit.py, the other heads: feature maps that detectors can read, and the paper's masked patch prediction.

pytest tests/hf_vit/modeling/test_heads.py
"""

import pytest
import torch
from transformers import AutoBackbone, AutoModelForImageClassification, AutoModelForMaskedImageModeling

from hf_vit import (
    HFViTBackbone,
    HFViTConfig,
    HFViTForImageClassification,
    HFViTForMaskedPatchPrediction,
    load_checkpoint,
    save_checkpoint,
)


TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.mark.parametrize("fields", [{}, {"num_register_tokens": 2}, {"pooling": "map"}, {"representation_size": 8}])
def test_backbone_gives_the_classifier_s_tokens(fields, tmp_path):
    classifier = HFViTForImageClassification(HFViTConfig(**TINY, **fields)).eval()
    classifier.save_pretrained(tmp_path)
    backbone = HFViTBackbone.from_pretrained(tmp_path, out_features=["stem", "stage2", "stage3"]).eval()
    assert isinstance(AutoBackbone.from_config(backbone.config), HFViTBackbone)
    assert backbone.channels == [32, 32, 32]
    x = torch.randn(2, 3, 40, 24)  # another size than trained for: 5 x 3 patches
    maps = backbone(x).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 32, 5, 3)] * 3
    tokens = classifier.vit(x).last_hidden_state[:, classifier.config.num_prefix_tokens :]
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), tokens)


def test_colors_are_three_bits_a_channel():
    model = HFViTForMaskedPatchPrediction(HFViTConfig(**TINY))
    x = torch.full((1, 3, 32, 32), -1.0)
    x[:, 0, :8, :8], x[:, 2, 8:16, :8], x[:, :, 24:, 24:] = 1.0, -0.5, 1.0
    colors = model.patch_colors(x).reshape(4, 4)
    assert colors[0, 0] == 7 * 64 and colors[1, 0] == 2 and colors[3, 3] == 511 and colors[2, 2] == 0


def test_corruption_is_half_in_80_10_10():
    model = HFViTForMaskedPatchPrediction(HFViTConfig(**TINY))
    kinds = model.draw_corruption(2000, 16, torch.device("cpu"))
    assert ((kinds > 0).sum(1) == 8).all()
    shares = [(kinds == kind).float().mean().item() / 0.5 for kind in (1, 2, 3)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_loss_reads_corrupted_patches_only_and_masked_ones_are_hidden():
    model = HFViTForMaskedPatchPrediction(HFViTConfig(**TINY)).eval()
    x, corruption = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 16, dtype=torch.long)
    corruption[:, 5] = 1
    out = model(x, corruption=corruption)
    labels = model.patch_colors(x)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, 5], labels[:, 5]))
    changed = x.clone()
    changed[:, :, 8:16, 8:16] = 0.9  # patch 5: its pixels are behind the mask token
    torch.testing.assert_close(model(changed, corruption=corruption).logits, out.logits)


def test_masked_patch_prediction_learns_saves_and_feeds_a_classifier(tmp_path):
    model = HFViTForMaskedPatchPrediction(HFViTConfig(**TINY)).train()
    x = torch.linspace(-1, 1, 4)[:, None, None, None].expand(4, 3, 32, 32)  # plain colors: neighbors tell
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(model(x).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedImageModeling.from_pretrained(tmp_path)
    assert isinstance(again, HFViTForMaskedPatchPrediction) and torch.equal(again.mask_token, model.mask_token)
    classifier = HFViTForImageClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(classifier.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight)


def test_patch_dropout_is_refused():
    with pytest.raises(ValueError, match="patch_dropout_rate=0"):
        HFViTForMaskedPatchPrediction(HFViTConfig(**TINY, patch_dropout_rate=0.5))


@pytest.fixture(scope="module")
def regressor():
    names, scale = {0: "year", 1: "height", 2: "x"}, {"target_mean": [2000.0, 1.5, -3], "target_std": [10, 0.25, 1]}
    config = HFViTConfig(**TINY, id2label=names, problem_type="regression", **scale)
    model = HFViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    return model


def test_a_regression_answers_in_the_unit_of_its_targets(regressor, tmp_path):
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = regressor(pixels, labels=torch.zeros(3, 3))
        z = regressor.classifier(regressor.vit(pixels).pooler_output)
        torch.testing.assert_close(found.logits, z * torch.tensor([10, 0.25, 1]) + torch.tensor([2000, 1.5, -3]))
        torch.testing.assert_close(found.loss, found.logits.square().mean())
        regressor.save_pretrained(tmp_path)
        again = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(again(pixels).logits, found.logits)
        half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert (half(pixels.bfloat16()).logits[:, 0] - found.logits[:, 0]).abs().max() < 2  # 2000 in bfloat16: +- 4


@pytest.mark.parametrize("format", ["timm", "transformers", "google-npz"])
def test_formats_that_do_not_scale_get_a_head_in_the_unit(regressor, format, tmp_path):
    path, pixels = tmp_path / ("model.npz" if "npz" in format else "folder"), torch.randn(2, 3, 32, 32)
    save_checkpoint(regressor, path, format)
    fields = {"num_attention_heads": 4} if "npz" in format else {}
    again = load_checkpoint(path, **fields)
    assert again.config.target_std is None
    assert again.config.problem_type == ("regression" if "npz" not in format else None)
    torch.testing.assert_close(again(pixels).logits, regressor(pixels).logits, rtol=1e-5, atol=1e-4)


def test_a_new_head_has_neither_the_scale_nor_the_thresholds_of_the_old_one(regressor, tmp_path):
    regressor.save_pretrained(tmp_path)
    for model in (
        HFViTForImageClassification.from_pretrained(tmp_path, num_labels=4),
        load_checkpoint(tmp_path, id2label={number: str(number) for number in range(4)}),
    ):
        assert model.config.target_mean is model.config.target_std is None and model.config.num_labels == 4
    assert HFViTForImageClassification.from_pretrained(tmp_path, num_labels=3).config.target_std == [10, 0.25, 1]
    assert load_checkpoint(tmp_path).config.target_std == [10, 0.25, 1]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"label_thresholds": [0.5]}, "label_thresholds is one number for each of 2 labels"),
        ({"label_thresholds": [0.5, 1.5]}, "scores from 0 to 1"),
        ({"target_mean": [0, 0]}, "set both, or neither"),
        ({"target_mean": [0, 0], "target_std": [1, 0]}, "target_std must be above 0"),
        ({"target_mean": [0, float("inf")], "target_std": [1, 1]}, "target_mean is one number for each"),
    ],
)
def test_thresholds_and_scales_that_fit_no_head_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HFViTConfig(**TINY, num_labels=2, **fields)
