"""A model whose answer is known, of each pooling: explanations show the patch that it must have looked at.

python -m pytest tests/hf_vit/interpretability/test_draw_inspection.py
"""

import pytest
import torch

from assets.draw_inspection import CLASSES, bright_patches, train
from hf_vit import HFViTConfig
from hf_vit.interpretability.perturbation import compare_explanations
from hf_vit.interpretability.relevance import METHODS, explain


GRID, PATCH = (6, 6), 4


def images(count, generator):
    noise = torch.randn(count, 1, 24, 24, generator=generator) * 0.2
    bright, place, label = bright_patches(count, generator, GRID, PATCH)
    return noise + bright, place, label


@pytest.fixture(scope="module", params=[("token", 2, 150), ("gap", 1, 100), ("map", 1, 150)], ids=lambda p: p[0])
def seeker(request):
    """A tiny ViT that tells which pattern the one bright patch of meaning has."""
    pooling, layers, steps = request.param
    config = HFViTConfig(
        image_size=24, patch_size=PATCH, num_channels=1, hidden_size=32, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=64, num_labels=CLASSES + 1, pooling=pooling,
    )  # fmt: skip
    return train(config, images, steps)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_seeks_a_bright_patch_looks_at_it(seeker, method):
    pixels, place, label = images(512, torch.Generator().manual_seed(2))
    there = label < CLASSES
    pixels, place, label = pixels[there], place[there], label[there]
    with torch.no_grad():
        assert (seeker(pixels).logits.argmax(1) == label).float().mean() > 0.95
    hits = explain(seeker, pixels, method).flatten(1).argmax(1) == place
    # One patch of 36: chance is under 3 %. How sharply a model looks depends on its first weights and on rounding:
    # with two layers 0.37 to 1.0 over three seeds and two versions of torch, all of them with every answer right.
    assert hits.float().mean() > 0.25


def test_curves_tell_right_from_random(seeker):
    pixels, _, label = images(64, torch.Generator().manual_seed(3))
    found = compare_explanations(seeker, pixels[label < CLASSES], steps=12, baseline="gray", random_orders=3)
    random = found.pop("random").score.mean()
    for method, curves in found.items():
        assert curves.score.mean() > random + 0.2, method
