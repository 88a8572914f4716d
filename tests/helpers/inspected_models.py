"""Small models of every kind that inspection, relevance, perturbation and adapters are tested on.

A test file takes the fixtures under names of its own: `model, pixels = each_kind, two_images`.
"""

import pytest
import torch

from hf_vit import HFViTConfig, HFViTForImageClassification


KINDS = {
    "token": {},
    "gap": {"pooling": "gap", "num_register_tokens": 2},
    "map": {"pooling": "map"},
    "first": {"pooling": "first", "patch_size": (4, 12)},
    "registers": {"num_register_tokens": 3, "representation_size": 8, "qk_norm": True, "layer_scale_init": 0.5},
    "root hybrid": {"resnet_depths": (), "patch_size": 2},
    "two-stage hybrid": {"resnet_depths": (1, 1), "patch_size": (1, 1), "pooling": "map"},
}
HEIGHT, WIDTH = 32, 48


def build(**changes):
    """A classifier of random weights, also those of the head, which starts at zero."""
    torch.manual_seed(0)
    sizes = {
        "image_size": (HEIGHT, WIDTH), "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 5, "resnet_width_factor": 0.5,
    }  # fmt: skip
    model = HFViTForImageClassification(HFViTConfig(**(sizes | changes))).eval()
    torch.nn.init.normal_(model.classifier.weight)
    return model


@pytest.fixture(params=KINDS, ids=lambda name: name.replace(" ", "-"))
def each_kind(request):
    return build(**KINDS[request.param])


@pytest.fixture
def two_images():
    return torch.randn(2, 3, HEIGHT, WIDTH)


def eager(model, pixels):
    """What transformers' own interface returns."""
    model.set_attn_implementation("eager")
    return model(pixels, output_attentions=True)
