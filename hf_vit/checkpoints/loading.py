"""A checkpoint of any dialect becomes a model: recognise, infer, load exactly, then change what was asked for."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configuration_hf_vit import HFViTConfig
from ..errors import HFViTError
from ..modeling_hf_vit import HFViTForImageClassification
from . import google
from .files import TensorFile, open_tensors
from .reading import Reading
from .rules import assemble


# Changed on the loaded model, by its own methods; everything else must agree with the file.
CHANGED_AFTERWARDS = ("image_size", "num_labels", "id2label", "label2id", "patch_size", "num_channels")
OPTIONS = ("checkpoint_image_size", "keep_representation")


@dataclass
class Loaded:
    """A model and how it came about.

    Attributes:
        model: exact weights, in eval mode. dialect: what was recognised.
        notes: conventions assumed. changed: what differs from the file (resized, dropped, newly initialised).
        processor: settings of a `ViTImageProcessor` for it, with the size.
    """

    model: HFViTForImageClassification
    dialect: str
    notes: list[str]
    changed: list[str]
    processor: dict[str, Any]


def load_checkpoint(path: str | Path, **config_overrides) -> HFViTForImageClassification:
    """Load a ViT checkpoint of any dialect, exactly, at any resolution.

    Args:
        path: a file, a folder or a Hub id: Google's `.npz` (vision_transformer, big_vision), transformers' `vit`,
            `deit` and `vit-hybrid`, timm's `vit_*`, torchvision's `vit_*`, or a folder of ours.
        config_overrides: fields of `HFViTConfig`. `image_size` refits the position table, `patch_size` and
            `num_channels` the patch kernel, `num_labels` or `id2label` of another length put a zero head in place
            (`keep_representation=True` keeps the representation layer under it). Others answer what a file cannot
            say (`num_attention_heads`, `pooling`, `hidden_act`, ...); what contradicts the file is an error.
            `checkpoint_image_size` is the image size that the file was made for, where its grid is not square.

    Returns:
        the model in eval mode, float32 weights for npz files, otherwise in the file's dtype.

    Raises:
        HFViTError: unreadable, foreign, incomplete or contradicted; the message names what and the way out.
    """
    return read_checkpoint(path, **config_overrides).model


def read_checkpoint(path: str | Path, **config_overrides) -> Loaded:
    """`load_checkpoint` with an account of what was recognised, assumed and changed."""
    file = open_tensors(Path(path))
    reading = google.read(file, config_overrides)
    config = _config(file, reading, config_overrides)
    model = assemble(config, file, reading.table(config), reading.left_aside, reading.dialect)
    changed = _change(file, model, config_overrides)
    height, width = model.config.image_size_hw
    processor = reading.processor | {"size": {"height": height, "width": width}}
    return Loaded(model, reading.dialect, reading.notes, changed, processor)


def _config(file: TensorFile, reading: Reading, asked: dict[str, Any]) -> HFViTConfig:
    """The file's own architecture, with what the caller adds to it."""
    fields = dict(reading.fields)
    for name, value in asked.items():
        if name in CHANGED_AFTERWARDS or name in OPTIONS:
            continue
        if name in fields and name not in reading.unsaid and not _equal(fields[name], value):
            raise HFViTError(f"{file.path}: {name}={value!r} contradicts the file, which says {fields[name]!r}")
        fields[name] = value
    try:
        return HFViTConfig(**fields)
    except ValueError as error:
        raise HFViTError(f"{file.path}: {error}") from error


def _equal(a: Any, b: Any) -> bool:
    return (tuple(a) if isinstance(a, list) else a) == (tuple(b) if isinstance(b, list) else b)


def _change(file: TensorFile, model: HFViTForImageClassification, asked: dict[str, Any]) -> list[str]:
    """Bring the exact model to the size and labels asked for; a line for each change."""
    changed = []
    config = model.config
    if config.num_labels and not model.classifier.weight.any() and "num_labels" not in asked:
        warnings.warn(
            f"{file.path}: the head of {config.num_labels} classes (classifier.weight) is all zeros, as in Google's "
            "imagenet21k files; it classifies nothing, num_labels= puts a new one in its place",
            stacklevel=4,
        )
    if asked.get("image_size", config.image_size) != config.image_size:
        before = config.grid_size
        model.resize_position_embeddings(asked["image_size"])
        if before != config.grid_size:
            changed.append(f"position table refitted from grid {before} to {config.grid_size}")
    num_labels = asked.get("num_labels", config.num_labels)
    if num_labels != config.num_labels:
        changed.append(f"classifier newly initialised with zeros: {config.num_labels} to {num_labels} classes")
        model.replace_head(
            num_labels, asked.get("id2label"), keep_representation=asked.get("keep_representation", False)
        )
    return changed
