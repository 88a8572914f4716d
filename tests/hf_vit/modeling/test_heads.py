"""modeling_hf_vit.py, the other heads: feature maps that detectors can read, and the paper's masked patch prediction.

pytest tests/hf_vit/modeling/test_heads.py
"""

import pytest
import torch
from transformers import AutoBackbone, AutoModelForMaskedImageModeling

from hf_vit import HFViTBackbone, HFViTConfig, HFViTForImageClassification, HFViTForMaskedPatchPrediction


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
