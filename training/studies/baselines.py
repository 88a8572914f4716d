"""Baselines: any of transformers' image classifiers, trained by the same Trainer on the same images.

For stages.py and report.py: mainly BiT (arXiv:1912.11370: pre-activation, GroupNorm, weight standardization), the ViT
paper's "ResNet (BiT)"; and EfficientNet as Noisy Student's teacher.

Tests: tests/training/test_study.py.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from hf_vit.errors import HFViTError

from ..build_model import image_processor_for, pixels
from ..config.arguments import Arguments
from ..data.splits import ModelInput, open_splits, transforms
from ..engine.trainer import Trainer
from ..reporting.flops import counted_forward_flops
from ..train import finish_training, train_or_leave_nothing


def run_baseline(arguments: Arguments, stage: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate a network as `train.run` does a ViT; its facts, empty if a signal ended the run early.

    Args:
        fields: of its config, `model_type` among them, for a start from scratch.

    Raises:
        HFViTError: no image size; errors of data and training.
    """
    requested, data, seed = arguments.model, arguments.data, arguments.train.seed
    if requested.image_size is None:
        raise HFViTError("a convolutional network takes images of any size: give --image_size")
    splits = open_splits(data, seed)
    transformers.set_seed(seed)
    side = pixels(requested.image_size)
    model = build(requested.model, splits.train.label_names, fields | {"image_size": side})
    view = ModelInput((side, side) if isinstance(side, int) else tuple(side), num_channels=3)
    train_transform, eval_transform = transforms(data, view)
    trainer = Trainer(
        model,
        arguments.train,
        splits.train.with_transform(train_transform, seed),
        splits.evaluation.with_transform(eval_transform, seed),
        image_processor_for(view, data, None),
        about={
            "stage": stage,
            "recipe": arguments.recipe,
            "arguments": arguments.non_default(),
            "augmentation": train_transform.describe(),
            "data": {"train_fraction": data.train_fraction},
        },
    )
    train_or_leave_nothing(trainer)
    return finish_training(trainer)


def build(folder: str | None, names: list[str], fields: dict[str, Any]) -> PreTrainedModel:
    """The network for these classes, from `folder` with a new head, or new. The head starts at zero, as in ours."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if folder is None:
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model(**fields, **labels))
    else:
        model = AutoModelForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **labels)
    head = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return model


def baseline_train_flops(facts: dict[str, Any]) -> int:
    """Operations of such a network's training, from its facts: three forward passes per image.

    Counted by torch; includes the gradient of the images, although it is not computed.
    """
    about, training = facts["model"], facts["training"]
    config = AutoConfig.for_model(about["model_type"], num_labels=about["num_labels"], **about["architecture"])
    with torch.device("meta"):
        model_class = type(AutoModelForImageClassification.from_config(config))
    forward = counted_forward_flops(model_class, config, tuple(about["image_size"]))
    return 3 * forward * training["steps"] * training["global_batch_size"]
