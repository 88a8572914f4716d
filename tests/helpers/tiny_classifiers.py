"""Image classifiers of every kind, small enough to score in a moment; and the scoring of one, as a function.

For the tests of scoring, probes and suites.
"""

import json

import numpy as np
import torch
from transformers import (
    BitConfig,
    BitForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification
from training import score


DIGITS = {number: str(number) for number in range(10)}


def save_tiny(folder, size=16, seed=0, **fields):
    """A folder of ours with a head that is not zero."""
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config |= {"id2label": DIGITS, **fields}
    model = HFViTForImageClassification(HFViTConfig(image_size=size, patch_size=4, **config))
    if model.config.num_labels:
        torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    return str(folder)


def save_classifiers(root):
    """Folders: ours; of transformers ViT, ResNet (BatchNorm), EfficientNet, and BiT with a processor that crops."""
    save_tiny(root / "ours")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=10, **small)).save_pretrained(
        root / "vit"
    )
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "vit")
    bit = BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4, num_labels=10)
    BitForImageClassification(bit).save_pretrained(root / "bit")
    slim = EfficientNetConfig(
        image_size=32, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, num_labels=10
    )
    EfficientNetForImageClassification(slim).save_pretrained(root / "efficientnet")
    (root / "efficientnet" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "EfficientNetImageProcessor", "size": {"height": 32, "width": 32},
                    "resample": 2, "image_mean": [0.4] * 3, "image_std": [0.2, 0.3, 0.4], "include_top": True})
    )  # fmt: skip
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
    ResNetForImageClassification(resnet).save_pretrained(root / "resnet")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "resnet")
    (root / "bit" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40}, "do_center_crop": True,
                    "crop_size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.4] * 3,
                    "image_std": [0.2] * 3})
    )  # fmt: skip
    return {path.name: str(path) for path in root.iterdir()}


def run(*words, **options):
    """Facts of `training.score` with these options."""
    flags = [word for name, value in options.items() for word in (f"--{name}", *map(str, np.atleast_1d(value)))]
    return score.main([*words, *flags, "--use_cpu", "--no_speed"])


def value(facts, metric):
    return next(row["value"] for row in facts["results"] if row["metric"] == metric)
