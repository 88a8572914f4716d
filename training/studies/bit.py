"""The ResNet to compare with: transformers' BiT, trained by the same Trainer on the same pictures.

For stages.py and study.py. Big Transfer (arXiv:1912.11370), the ViT paper's "ResNet (BiT)": pre-activation, GroupNorm,
weight standardisation.
"""

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitConfig, BitForImageClassification

from hf_vit.errors import HFViTError

from ..arguments import Arguments
from ..run import finish, image_processor_for, pixels, train_or_leave_nothing
from ..splits import open_splits, transforms
from ..trainer import Trainer


def run_bit(arguments: Arguments, stage: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate a BiT as `run.run` does ours; its facts (empty if a signal ended the run early).

    Args:
        fields: of BitConfig, for a start from scratch.

    Raises:
        HFViTError: no picture size; whatever data and training raise.
    """
    wish, data, seed = arguments.model, arguments.data, arguments.train.seed
    if wish.image_size is None:
        raise HFViTError("a ResNet takes pictures of any size: give --image_size")
    splits = open_splits(data, seed)
    names = splits.train.label_names
    transformers.set_seed(seed)
    model = build(wish.model, names, fields)
    side = pixels(wish.image_size)
    view = SimpleNamespace(image_size_hw=(side, side) if isinstance(side, int) else tuple(side), num_channels=3)
    model.config.image_size = side
    train_transform, eval_transform = transforms(data, view)
    about = {
        "stage": stage,
        "recipe": arguments.recipe,
        "arguments": arguments.non_default(),
        "augmentation": train_transform.describe(),
        "data": {"train_fraction": data.train_fraction},
    }
    trainer = Trainer(
        model,
        arguments.train,
        splits.train.with_transform(train_transform, seed),
        splits.evaluation.with_transform(eval_transform, seed),
        image_processor_for(view, data, None),
        about=about,
    )
    train_or_leave_nothing(trainer)
    return finish(trainer)


def build(folder: str | None, names: list[str], fields: dict[str, Any]) -> BitForImageClassification:
    """A BiT for these classes; its network from `folder`, or new. The head begins at zero, as ours."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    if folder is None:
        model = BitForImageClassification(BitConfig(**fields, **labels))
    else:
        model = BitForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **labels)
    head = model.classifier[1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return model


def train_flops(facts: dict[str, Any]) -> int:
    """Operations of a BiT's training, from its facts: three forward passes' worth for every picture it saw.

    Exact but for the input's gradient, which nobody computes; ours leaves it out.
    """
    model = BitForImageClassification(BitConfig(num_labels=facts["model"]["num_labels"], **network(facts)))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, *facts["model"]["image_size"]))
    training = facts["training"]
    return 3 * counter.get_total_flops() * training["steps"] * training["global_batch_size"]


def network(facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of BitConfig among a run's facts."""
    known = ("depths", "hidden_sizes", "embedding_size", "layer_type", "num_groups", "width_factor")
    return {name: facts["model"]["architecture"][name] for name in known}
