"""A model whose answer is known, of each pooling: explanations show the patch that it must have looked at.

python -m pytest tests/hf_vit/interpretability/test_draw_inspection.py
python -m tests.hf_vit.interpretability.test_draw_inspection     # trains the models anew (a minute)
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from assets.draw_inspection import CLASSES, bright_patches, train
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.interpretability.perturbation import compare_explanations
from hf_vit.interpretability.relevance import METHODS, explain
from tests.conftest import ROOT


GRID, PATCH = (6, 6), 4
SEEKERS = [("token", 2, 250), ("gap", 1, 250), ("map", 1, 250)]  # pooling, layers, steps of training


def weights_path(pooling):
    return ROOT / "tests" / "fixtures" / "seekers" / f"{pooling}.safetensors"


def images(count, generator):
    noise = torch.randn(count, 1, 24, 24, generator=generator) * 0.2
    bright, place, label = bright_patches(count, generator, GRID, PATCH)
    return noise + bright, place, label


def config_of(pooling, layers):
    return HFViTConfig(
        image_size=24, patch_size=PATCH, num_channels=1, hidden_size=32, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=64, num_labels=CLASSES + 1, pooling=pooling,
    )  # fmt: skip


def accuracy_and_hits(model):
    """Right answers, and for each method how often its largest value is in the patch that decides the class."""
    pixels, place, label = images(512, torch.Generator().manual_seed(2))
    there = label < CLASSES
    pixels, place, label = pixels[there], place[there], label[there]
    with torch.no_grad():
        accuracy = (model(pixels).logits.argmax(1) == label).float().mean().item()
    maps = {method: explain(model, pixels, method).flatten(1).argmax(1) for method in METHODS}
    return accuracy, {method: (found == place).float().mean().item() for method, found in maps.items()}


@pytest.fixture(scope="module", params=SEEKERS, ids=lambda p: p[0])
def seeker(request):
    """A tiny ViT that tells which pattern the one bright patch of meaning has.

    Its weights are a file: how sharply such a model looks depends on its first weights, which differ between
    versions of PyTorch, and what is tested here is the explanations.
    """
    pooling, layers, _ = request.param
    model = HFViTForImageClassification(config_of(pooling, layers))
    model.load_state_dict({name: value.float() for name, value in load_file(weights_path(pooling)).items()})
    return model.eval()


@pytest.fixture(scope="module")
def measured(seeker):
    return accuracy_and_hits(seeker)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_seeks_a_bright_patch_looks_at_it(measured, method):
    accuracy, hits = measured
    assert accuracy > 0.95 and hits[method] > 0.95  # one patch of 36: chance is under 3 %


def test_curves_tell_right_from_random(seeker):
    pixels, _, label = images(64, torch.Generator().manual_seed(3))
    found = compare_explanations(seeker, pixels[label < CLASSES], steps=12, baseline="gray", random_orders=3)
    random = found.pop("random").score.mean()
    for method, curves in found.items():
        assert curves.score.mean() > random + 0.2, method


def write_weights():
    """Train each model with seed after seed until every explanation finds the patch, and keep it in 16 bits."""
    torch.set_num_threads(1)
    for pooling, layers, steps in SEEKERS:
        for seed in range(20):
            model = train(config_of(pooling, layers), images, steps, seed).half().float()
            accuracy, hits = accuracy_and_hits(model)
            print(
                pooling, "seed", seed, f"accuracy {accuracy:.3f}", {name: round(hit, 3) for name, hit in hits.items()}
            )
            if min(accuracy, *hits.values()) > 0.97:
                weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
                weights_path(pooling).parent.mkdir(exist_ok=True)
                save_file(weights, weights_path(pooling))
                break


if __name__ == "__main__":
    write_weights()
