"""Load a checkpoint of any format: recognize it, infer the architecture, load exactly, then apply requested changes.

Not transformers' `convert_*` scripts: each works in one direction, for the published files of one family.

Tests: tests/hf_vit/checkpoints/test_checkpoints.py.
"""

import difflib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import HFViTError
from ..image_processing import ImageProcessing, read_settings
from ..modeling.configuration_hf_vit import HFViTConfig
from ..modeling.modeling_hf_vit import HFViTForImageClassification
from .download import PROCESSOR_FILES, SIDECARS, download_checkpoint, hub_file
from .formats import (
    aimv2,
    beit,
    clip,
    dino_original,
    dinov2,
    dinov3,
    google,
    open_clip,
    pe_original,
    timm,
    tipsv2,
    torchvision,
    transformers,
    unsupported,
)
from .license import License, read_license
from .mapping import check_sizes, from_state_dict
from .spec import CheckpointFormat, CheckpointSpec
from .tensor_file import TensorFile, find_weights, open_tensors
from .wrappers import unwrap


FORMATS_READ: tuple[CheckpointFormat, ...] = (
    *(dinov2, dinov3, beit, clip, aimv2, transformers),
    *(pe_original, open_clip, dino_original, tipsv2, timm, torchvision, google),
)
# Fields that are changed on the loaded model, by its own methods; all others must agree with the file.
CHANGED_AFTERWARDS = ("image_size", "patch_size", "num_channels", "num_labels", "id2label", "label2id")
OPTIONS = ("checkpoint_image_size", "keep_representation", "dtype")
MAX_IMAGE_SIZE = 1 << 14  # pixels; a table for 16 px patches of width 768 then takes 3 GB


class AssumptionWarning(UserWarning):
    """Assumptions about facts that a checkpoint does not store."""


class ZeroHeadWarning(UserWarning):
    """A checkpoint's classifier is all zeros, and is not replaced."""


@dataclass
class Loaded:
    """A loaded model, and how it was loaded.

    Attributes:
        model: exact weights, in eval mode. format: the recognized format. path: of the weight file.
        assumptions: about facts that the file does not store. notes: unused tensors, and other remarks.
        changed: differences from the file: resized, dropped, newly initialized.
        image_processing: of the model's images. processor: the same as settings of a `ViTImageProcessor`.
        license: of the source's model card, or None.
        new_head: fields of the configuration to set before the head is replaced: the input of the family's new heads.
    """

    model: HFViTForImageClassification
    format: str
    path: Path
    assumptions: list[str]
    notes: list[str]
    changed: list[str]
    image_processing: ImageProcessing
    license: License | None = None
    new_head: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(init=False)

    def __post_init__(self):
        self.processor = self.image_processing.to_transformers(self.model.config.num_channels)


def load_checkpoint(
    path: str | Path, *, revision: str | None = None, state_dict_key: str | None = None, **config_overrides
) -> HFViTForImageClassification:
    """Load a ViT checkpoint of any format, exactly, at any resolution.

    Facts that the file does not store and the outputs depend on are assumed, with an `AssumptionWarning`.

    Args:
        path: a file, a folder or a Hub id: Google's `.npz` (vision_transformer, big_vision), transformers' `vit`,
            `deit` and `vit-hybrid`, timm's `vit_*`, torchvision's `vit_*`, or a folder of ours. Names may have the
            prefixes of compiled, distributed, Lightning and self-distillation training.
        revision: branch, tag or commit on the Hub.
        state_dict_key: the entry of a `.pth` file with the weights; by default the usual ones are tried, averages
            (`state_dict_ema`) and teachers first.
        config_overrides: fields of `HFViTConfig`. `image_size` resizes the position table, `patch_size` and
            `num_channels` the patch kernel, `num_labels` or `id2label` of another length make a new zero head
            (`keep_representation=True` keeps the representation layer below it). Others supply facts that a file does
            not store (`num_attention_heads`, `pooling`, `hidden_act`, ...); contradictions to the file are errors.
            `checkpoint_image_size` is the image size of the file's position table, if its grid is not square. `dtype`
            converts the weights.

    Returns:
        the model in eval mode; float32 for npz files, otherwise the file's dtype.

    Raises:
        HFViTError: unreadable, unsupported, incomplete or contradictory; the message names the cause and the way out.
    """
    return read_checkpoint(path, revision=revision, state_dict_key=state_dict_key, **config_overrides).model


def read_checkpoint(
    path: str | Path, *, revision: str | None = None, state_dict_key: str | None = None, **config_overrides
) -> Loaded:
    """As `load_checkpoint`; also returns what was recognized, assumed and changed."""
    requested = _checked_overrides(config_overrides)
    file, sidecars, folder = _open(path, revision, state_dict_key)
    file = unwrap(file)
    format = _recognize(file, sidecars)
    name = format.__name__.rpartition(".")[2]  # type: ignore[attr-defined]  # formats are modules
    try:
        spec = format.read(file, requested, sidecars)
        config = _config(file, spec, requested)
        mappings = spec.key_mappings(config)
    except HFViTError:
        raise
    except Exception as error:  # config files may have values of any type
        raise HFViTError(f"{file.path}: looks like the {name} layout, but does not fit it ({error!r:.200})") from error
    model = from_state_dict(config, file, mappings, spec.unused, spec.format, requested.get("dtype"))
    try:
        changed = _change(model, requested, spec.new_head)
    except ValueError as error:
        raise HFViTError(f"{file.path}: {error}") from error
    _warn_of_zero_head(file, model, requested)
    model.name_or_path = model.config._name_or_path = str(path)
    model.config.dtype = model.dtype
    model_type = sidecars.get("config.json", {}).get("model_type")
    if model_type not in (None, "hf_vit"):  # for `save_checkpoint`, where several classes compute the same
        model.config.source_model_type = model_type
    assumptions = file.assumptions + spec.assumptions
    if assumptions:
        warnings.warn(f"{file.path} does not say; assumed: {'; '.join(assumptions)}", AssumptionWarning, stacklevel=3)
    processing = ImageProcessing.from_files(sidecars, str(file.path.parent)) or spec.image_processing
    if "image_size" in requested or processing.output_size is None:
        processing = processing.at_size(model.config.image_size_hw)
    license = read_license(folder) if folder is not None else None
    notes = file.notes + spec.notes
    if license is not None and license.is_non_commercial():
        notes.append(f"the license of these weights ({license.name or license.id}) is non-commercial")
    return Loaded(
        model, spec.format, file.path, assumptions, notes, changed, processing, license, new_head=spec.new_head
    )


# -- files ------------------------------------------------------------------------------------------------------------


def _open(
    path: str | Path, revision: str | None, state_dict_key: str | None
) -> tuple[TensorFile, dict[str, dict], Path | None]:
    """The weights, the JSON files next to them, and the folder; without these for a weight file of any name."""
    local = Path(path)
    try:
        exists = local.exists()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise HFViTError(f"{str(path)[:200]!r} is no path ({error})") from error
    if not exists:
        local = download_checkpoint(str(path), revision)
    weights = find_weights(local) if local.is_dir() else local
    file = open_tensors(weights, state_dict_key)
    if not (local.is_dir() or weights.name.startswith(("model.safetensors", "pytorch_model.bin", "open_clip_"))):
        return file, {}, None
    folder = weights.parent
    try:
        sidecars = {name: read_settings(folder / name) for name in SIDECARS if (folder / name).is_file()}
        if not exists and ImageProcessing.from_files(sidecars, str(folder)) is None:
            # another program may have downloaded only the weights to the cache
            files = {name: hub_file(str(path), name, folder.name) for name in PROCESSOR_FILES}
            sidecars |= {name: read_settings(file) for name, file in files.items() if file is not None}
        return file, sidecars, folder
    except HFViTError as error:
        if exists:
            raise
        raise HFViTError(
            f"{error}: it lies in the Hub's cache; delete that file, and it is downloaded again"
        ) from error


def _recognize(file: TensorFile, sidecars: dict[str, dict]) -> CheckpointFormat:
    """The format of config.json's model type, or the first that matches the names of tensors."""
    unsupported.refuse(file, sidecars)
    model_type = sidecars.get("config.json", {}).get("model_type")
    for format in FORMATS_READ:
        if model_type in format.MODEL_TYPES and format.matches(file):
            return format
    for format in FORMATS_READ:
        if format.matches(file):
            return format
    unsupported.refuse_by_names(file)
    if isinstance(model_type, str) and model_type != "hf_vit":
        known = sorted({name for format in FORMATS_READ for name in format.MODEL_TYPES} - {"hf_vit"})
        if model_type not in known:
            raise HFViTError(
                f"{file.path}: model_type {model_type!r} is no plain ViT that hf_vit reads; it reads "
                f"{', '.join(known)}"
            )
    first = ", ".join(list(file)[:5])
    raise HFViTError(
        f"{file.path}: not a ViT of a known format (Google npz, transformers, timm, torchvision, open_clip); its "
        f"{len(file.shapes)} tensors begin with {first or 'nothing'}"
    )


# -- requested changes ------------------------------------------------------------------------------------------------


def _checked_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, with label names as a mapping and sizes as tuples; HFViTError for unknown names."""
    known = {*HFViTConfig.__dataclass_fields__, "num_labels", "attn_implementation", *OPTIONS}
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise HFViTError(
                f"'{name}' is no field of HFViTConfig" + (f"; did you mean '{close[0]}'?" if close else "")
            )
    requested: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()
    }
    for name in ("image_size", "checkpoint_image_size", "patch_size"):
        sides = requested.get(name, 1)
        sides = sides if isinstance(sides, tuple) else (sides,)
        if len(sides) > 2 or not all(type(side) is int and 1 <= side <= MAX_IMAGE_SIZE for side in sides):
            raise HFViTError(
                f"{name}={overrides[name]!r} must be one number or (height, width), from 1 to {MAX_IMAGE_SIZE} pixels"
            )
    if isinstance(requested.get("dtype"), str):
        requested["dtype"] = getattr(torch, requested["dtype"], None)
        if not isinstance(requested["dtype"], torch.dtype):
            raise HFViTError(f"dtype='{overrides['dtype']}' is no dtype of torch: float32, bfloat16, float16")
    names, numbers = requested.pop("id2label", None), requested.pop("label2id", None)
    if names is None and numbers is not None:
        names = {number: name for name, number in numbers.items()}
    if not isinstance(requested.get("num_labels", 0), int) or requested.get("num_labels", 0) < 0:
        raise HFViTError(f"num_labels={requested['num_labels']} is no number of classes")
    if names is not None:
        names = dict(enumerate(names)) if isinstance(names, tuple) else {int(i): name for i, name in names.items()}
        count = requested.setdefault("num_labels", len(names))
        if sorted(names) != list(range(count)):
            raise HFViTError(
                f"id2label names {len(names)} classes, num_labels is {count}: name each of 0 to {count - 1} once"
            )
        if numbers is not None and {int(i): name for name, i in numbers.items()} != names:
            raise HFViTError("id2label and label2id do not say the same; give one of them")
        requested["id2label"] = names
    return requested


def _config(file: TensorFile, spec: CheckpointSpec, requested: dict[str, Any]) -> HFViTConfig:
    """The file's architecture, completed by the overrides; HFViTError if they contradict it."""
    fields = dict(spec.fields)
    for name, value in requested.items():
        if name in CHANGED_AFTERWARDS or name in OPTIONS:
            continue
        if name in fields and name not in spec.not_specified and not _equal(fields[name], value):
            way_out = "; num_labels= gives a new head without it" if name == "representation_size" else ""
            raise HFViTError(
                f"{file.path}: {name}={value!r} contradicts the file, which says {fields[name]!r}{way_out}"
            )
        fields[name] = value
    check_sizes(fields, file)
    try:
        return HFViTConfig(**fields)
    except Exception as error:  # of the strict dataclass and its validators
        raise HFViTError(f"{file.path}: {' '.join(str(error).split())}") from error


def _equal(a: Any, b: Any) -> bool:
    return (tuple(a) if isinstance(a, list) else a) == (tuple(b) if isinstance(b, list) else b)


def _change(model: HFViTForImageClassification, requested: dict[str, Any], new_head: dict[str, Any]) -> list[str]:
    """Change the exact model to the requested sizes and labels; returns a line for each change."""
    changed, config = [], model.config
    grid, patch, channels = config.grid_size, config.patch_size_hw, config.num_channels
    if "patch_size" in requested or "num_channels" in requested:
        model.resize_patch_embeddings(
            requested.get("patch_size", config.patch_size),
            requested.get("num_channels"),
            image_size=requested.get("image_size"),
        )
    elif "image_size" in requested:
        model.resize_position_embeddings(requested["image_size"])
    if config.patch_size_hw != patch:
        changed.append(f"patch kernel refitted from {patch} to {config.patch_size_hw}")
    if config.num_channels != channels:
        changed.append(f"first kernel adapted from {channels} to {config.num_channels} channels")
    if config.grid_size != grid and config.has_position_table:
        changed.append(
            f"position table refitted from {grid[0]}x{grid[1]} to {config.grid_size[0]}x{config.grid_size[1]}"
        )
    labels, representation = config.num_labels, config.representation_size
    num_labels: int = requested.get("num_labels", labels)
    if num_labels != labels:
        for name, value in new_head.items():
            if name not in requested and getattr(config, name) != value:
                setattr(config, name, value)
                changed.append(f"{name} becomes {value!r}, as the family's authors read a new head")
        model.replace_head(
            num_labels, requested.get("id2label"), keep_representation=requested.get("keep_representation", False)
        )
        old = f"classifier of {labels} classes replaced by one" if labels else "new classifier"
        changed.append(f"{old} of {num_labels}, all zeros: train it")
        if representation is not None and config.representation_size is None:
            changed.append(f"representation layer of width {representation} dropped")
    elif "id2label" in requested:
        config.id2label = requested["id2label"]
        config.label2id = {name: number for number, name in requested["id2label"].items()}
    return changed


def _warn_of_zero_head(file: TensorFile, model: HFViTForImageClassification, requested: dict[str, Any]) -> None:
    labels = model.config.num_labels
    head = model.state_dict().get("classifier.weight")
    if head is not None and "num_labels" not in requested and not head.any():
        warnings.warn(
            f"{file.path}: the head of {labels} classes (classifier.weight) is all zeros, as in Google's imagenet21k "
            "files: it tells nothing apart. num_labels= puts a new one in its place",
            ZeroHeadWarning,
            stacklevel=4,
        )
