"""The compute account, against torch's own counter and the paper's Table 6.

pytest tests/training/reporting/test_flops.py
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.cli.info import describe_network
from tests.hf_vit.modeling.test_family import FAMILIES
from training.reporting.flops import forward_flops, measured_peak, train_flops


CASES = {
    "token": {},
    "gap, rectangle, floor": {"pooling": "gap", "image_size": [26, 19]},
    "map, registers, representation": {"pooling": "map", "num_register_tokens": 3, "representation_size": 24},
    "root only": {"resnet_depths": [], "patch_size": 2, "image_size": 24},
    "hybrid": {"resnet_depths": [2, 1, 2], "patch_size": 1, "image_size": [40, 36]},
    "patch dropout": {"patch_dropout_rate": 0.4},
    "one block": {"num_hidden_layers": 1},
    "first token": {"pooling": "first"},
} | FAMILIES


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_matrix_products_and_convolutions_are_counted_exactly(name, training):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = HFViTConfig(**sizes | {"image_size": 16, "patch_size": 4, "num_labels": 7} | CASES[name])
    model = HFViTForImageClassification(config).train(training)
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(torch.randn(1, 3, *config.image_size_hw)).logits
        if training:
            logits.sum().backward()
    if training and name == "siglip":
        return  # its attention pooling is computed and has no gradient: the classifier reads the mean patch
    expected = train_flops(config) if training else forward_flops(config)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("name", CASES)
def test_info_counts_every_part(name):
    """`hf-vit info`: its parts add up to the whole, and its multiply-adds to this account."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = HFViTConfig(**sizes | {"image_size": 16, "patch_size": 4, "num_labels": 7} | CASES[name])
    facts = describe_network(config)
    assert sum(part["parameters"] for part in facts["parts"]) == facts["parameters"]
    assert sum(part["macs"] for part in facts["parts"]) == facts["macs"] == forward_flops(config) // 2


def test_a_linear_probe_costs_a_forward_pass_and_the_heads_gradient():
    config = HFViTConfig(num_labels=10)
    assert train_flops(config, frozen=True) == forward_flops(config) + 2 * 768 * 10


def test_drop_path_is_counted_by_the_mean_of_what_it_leaves_out():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = HFViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3, drop_path_rate=0.6)
    model = HFViTForImageClassification(config).train()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        for _ in range(20):
            model(torch.randn(50, 3, 8, 8)).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(1000 * train_flops(config), rel=0.02)
    plain = HFViTConfig.from_dict(config.to_dict() | {"drop_path_rate": 0.0})
    assert train_flops(config, compiled=True) == train_flops(plain) > 1.2 * train_flops(config)
    assert forward_flops(config) == forward_flops(plain)


# exaFLOPs of 7 epochs (14 for H/14) of JFT-300M; the paper rounds, and says 303 million images.
@pytest.mark.parametrize(
    ("preset", "epochs", "exaflops"),
    [
        ("vit-base-patch32-224", 7, 55),
        ("vit-base-patch16-224", 7, 224),
        ("vit-large-patch32-224", 7, 196),
        ("vit-large-patch16-224", 7, 783),
        ("vit-huge-patch14-224", 14, 4262),
    ],
)
def test_table_6(preset, epochs, exaflops):
    config = HFViTConfig.from_preset(preset, num_labels=18_291)
    found = train_flops(config, all_tokens=True) * 303e6 * epochs / 1e18
    assert found == pytest.approx(exaflops, rel=0.03)


def test_another_resolution_can_be_asked_for():
    config = HFViTConfig()
    assert forward_flops(config, (384, 384)) == forward_flops(HFViTConfig(image_size=384))


def test_the_peak_is_measured_on_the_cpu_and_unknown_where_nothing_measures_it():
    assert measured_peak(torch.device("cpu"), "fp32") > 1e8
    assert measured_peak(torch.device("cpu"), "bf16") is None
