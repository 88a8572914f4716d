"""The folder that the tests of uploads share."""

import json

import pytest
import torch
from transformers import ViTImageProcessor

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.hub.model_card import write_card
from tests.helpers.hub_process import LABELS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny trained-looking folder: weights, code, processor, facts, card, figure, and leftovers of training."""
    path = tmp_path_factory.mktemp("saved") / "shapes"
    torch.manual_seed(0)
    config = HFViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        id2label=LABELS,
    )
    model = HFViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)
    facts = {
        "model": {
            "name": "shapes",
            "architecture": {"patch_size": 8},
            "parameters": 1,
            "image_size": [16, 16],
            "num_labels": 3,
        },
        "figures": ["training_curve.png"],
    }
    (path / "facts.json").write_text(json.dumps(facts))
    (path / "training_curve.png").write_bytes(b"\x89PNG not really")
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "optimizer.json").write_text("{}")
    (path / "optimizer.bin").write_bytes(b"0")
    write_card(path)
    return path
