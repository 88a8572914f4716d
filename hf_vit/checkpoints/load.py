"""A checkpoint of any dialect becomes a model: recognise, infer, load exactly, then change what was asked for."""

import difflib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from ..errors import HFViTError
from ..modeling.configuration_hf_vit import HFViTConfig
from ..modeling.modeling_hf_vit import HFViTForImageClassification
from .formats import google, timm, torchvision, transformers
from .mapping import assemble
from .spec import Reading
from .tensor_file import TensorFile, find_weights, open_tensors, read_json


DIALECTS: tuple[ModuleType, ...] = (transformers, timm, torchvision, google)
BESIDE = ("config.json", "preprocessor_config.json")
# Changed on the loaded model, by its own methods; everything else must agree with the file.
CHANGED_AFTERWARDS = ("image_size", "patch_size", "num_channels", "num_labels", "id2label", "label2id")
OPTIONS = ("checkpoint_image_size", "keep_representation", "dtype")

# Names of checkpoints that people try and that are no ViT: what they are.
STRANGERS = (
    (r"(.*/)?(MixerBlock_\d+|pre_head_layer_norm)/", "an MLP-Mixer"),
    (r"(.*/)?(root_block|resnet|block\d+/unit\d+)/", "a BiT ResNet without a transformer"),
    (
        r"(visual\.|text_model\.|vision_model\.|token_embedding|logit_scale|(params/)?txt/)",
        "a CLIP or SigLIP pair of towers",
    ),
    (r"layers\.\d+\.blocks\.|swin\.", "a Swin transformer"),
    (r"(beit|data2vec_vision)\.", "BEiT"),
    (r"(dinov2|dinov2_with_registers)\.|embeddings\.register_tokens", "transformers' DINOv2"),
    (r"(layer1\.0\.conv1|resnet\.embedder|bit\.embedder|conv1\.weight)", "a convolutional network"),
    (r"(bert|roberta|model\.embed_tokens|transformer\.wte)\b", "a language model"),
)


@dataclass
class Loaded:
    """A model and how it came about.

    Attributes:
        model: exact weights, in eval mode. dialect: what was recognised. path: the file that was read.
        notes: conventions assumed. changed: what differs from the file: resized, dropped, newly initialised.
        processor: settings of a `ViTImageProcessor` for the model, with the size.
    """

    model: HFViTForImageClassification
    dialect: str
    path: Path
    notes: list[str]
    changed: list[str]
    processor: dict[str, Any]


def load_checkpoint(
    path: str | Path, *, revision: str | None = None, **config_overrides
) -> HFViTForImageClassification:
    """Load a ViT checkpoint of any dialect, exactly, at any resolution.

    Args:
        path: a file, a folder or a Hub id: Google's `.npz` (vision_transformer, big_vision), transformers' `vit`,
            `deit` and `vit-hybrid`, timm's `vit_*`, torchvision's `vit_*`, or a folder of ours.
        revision: branch, tag or commit on the Hub.
        config_overrides: fields of `HFViTConfig`. `image_size` refits the position table, `patch_size` and
            `num_channels` the patch kernel, `num_labels` or `id2label` of another length put a zero head in place
            (`keep_representation=True` keeps the representation layer under it). Others answer what a file cannot
            say (`num_attention_heads`, `pooling`, `hidden_act`, ...); what contradicts the file is an error.
            `checkpoint_image_size` is the image size that the file was made for, where its grid is not square.
            `dtype` converts the weights.

    Returns:
        the model in eval mode; float32 for npz files, otherwise the file's dtype.

    Raises:
        HFViTError: unreadable, foreign, incomplete or contradicted; the message names what, and the way out.
    """
    return read_checkpoint(path, revision=revision, **config_overrides).model


def read_checkpoint(path: str | Path, *, revision: str | None = None, **config_overrides) -> Loaded:
    """`load_checkpoint` with an account of what was recognised, assumed and changed."""
    asked = _checked(config_overrides)
    file, beside = _open(path, revision)
    dialect = _recognise(file)
    try:
        reading: Reading = dialect.read(file, asked, beside)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, HFViTError):
            raise
        name = dialect.__name__.rpartition(".")[2]
        raise HFViTError(
            f"{file.path}: looks like the {name} layout, but its shapes do not fit it ({error})"
        ) from error
    config = _config(file, reading, asked)
    model = assemble(config, file, reading.table(config), reading.left_aside, reading.dialect, asked.get("dtype"))
    try:
        changed = _change(model, asked)
    except ValueError as error:
        raise HFViTError(f"{file.path}: {error}") from error
    _warn_of_zero_head(file, model, asked)
    model.name_or_path = model.config._name_or_path = str(path)
    model.config.dtype = model.dtype
    processor = _processor_settings(reading.processor, model.config)
    return Loaded(model, reading.dialect, file.path, reading.notes, changed, processor)


# -- where it lies ----------------------------------------------------------------------------------------------------


def _open(path: str | Path, revision: str | None) -> tuple[TensorFile, dict[str, dict]]:
    """The weights, and the JSON files that lie beside them and describe them."""
    local = Path(path)
    if not local.exists():
        local = _download(str(path), revision)
    weights = find_weights(local) if local.is_dir() else local
    file = open_tensors(weights)
    beside = {}
    if local.is_dir() or weights.name.startswith(("model.safetensors", "pytorch_model.bin")):
        beside = {name: read_json(weights.parent / name) for name in BESIDE if (weights.parent / name).is_file()}
    return file, beside


def _download(repo_id: str, revision: str | None) -> Path:
    """Folder of a Hub repository's configuration and weights, safetensors before pickles."""
    if "://" in repo_id:
        raise HFViTError(f"{repo_id}: download the file first, and give its path")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or Path(repo_id).suffix in (
        ".npz",
        ".safetensors",
        ".pth",
        ".bin",
        ".pt",
    ):
        raise HFViTError(f"{repo_id}: no such file or folder")
    try:
        folder = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=[*BESIDE, "*.safetensors", "*.index.json"])
        )
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(
                    repo_id, revision=revision, allow_patterns=[*BESIDE, "*.bin", "*.index.json", "*.npz"]
                )
            )
    except (HfHubHTTPError, OSError, ValueError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if isinstance(error, GatedRepoError):
            reason = "the repository is gated: accept its terms on the Hub, then run `hf auth login`"
        elif status in (401, 403, 404):
            reason = "it does not exist, or is private: then run `hf auth login` with a token that may read it"
        else:
            reason = str(error).strip().splitlines()[0]
        raise HFViTError(
            f"{repo_id}: no such file or folder here, and not to be had from the Hub ({reason})"
        ) from error
    return folder


def _recognise(file: TensorFile) -> ModuleType:
    for dialect in DIALECTS:
        if dialect.matches(file):
            return dialect
    for pattern, what in STRANGERS:
        found = next((name for name in file if re.match(pattern, name)), None)
        if found:
            raise HFViTError(f"{file.path}: this is {what} ('{found}'), not a ViT that hf_vit can load")
    first = ", ".join(list(file)[:5])
    raise HFViTError(
        f"{file.path}: not a ViT of a known dialect (Google npz, transformers, timm, torchvision); its "
        f"{len(file.shapes)} tensors begin with {first or 'nothing'}. A prefix before every name must be removed first"
    )


# -- what was asked for -----------------------------------------------------------------------------------------------


def _checked(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides, label names as a mapping and sizes as tuples; unknown names are errors."""
    known = {*HFViTConfig.__dataclass_fields__, "num_labels", "attn_implementation", *OPTIONS}
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise HFViTError(
                f"'{name}' is no field of HFViTConfig" + (f"; did you mean '{close[0]}'?" if close else "")
            )
    asked: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()
    }
    if isinstance(asked.get("dtype"), str):
        asked["dtype"] = getattr(torch, asked["dtype"], None)
        if not isinstance(asked["dtype"], torch.dtype):
            raise HFViTError(f"dtype='{overrides['dtype']}' is no dtype of torch: float32, bfloat16, float16")
    names, numbers = asked.pop("id2label", None), asked.pop("label2id", None)
    if names is None and numbers is not None:
        names = {number: name for name, number in numbers.items()}
    if not isinstance(asked.get("num_labels", 0), int) or asked.get("num_labels", 0) < 0:
        raise HFViTError(f"num_labels={asked['num_labels']} is no number of classes")
    if names is not None:
        names = dict(enumerate(names)) if isinstance(names, tuple) else {int(i): name for i, name in names.items()}
        count = asked.setdefault("num_labels", len(names))
        if sorted(names) != list(range(count)):
            raise HFViTError(
                f"id2label names {len(names)} classes, num_labels is {count}: name each of 0 to {count - 1} once"
            )
        if numbers is not None and {int(i): name for name, i in numbers.items()} != names:
            raise HFViTError("id2label and label2id do not say the same; give one of them")
        asked["id2label"] = names
    return asked


def _config(file: TensorFile, reading: Reading, asked: dict[str, Any]) -> HFViTConfig:
    """The file's own architecture, with what the caller adds to it."""
    fields = dict(reading.fields)
    for name, value in asked.items():
        if name in CHANGED_AFTERWARDS or name in OPTIONS:
            continue
        if name in fields and name not in reading.unsaid and not _equal(fields[name], value):
            way_out = "; num_labels= gives a new head without it" if name == "representation_size" else ""
            raise HFViTError(
                f"{file.path}: {name}={value!r} contradicts the file, which says {fields[name]!r}{way_out}"
            )
        fields[name] = value
    try:
        return HFViTConfig(**fields)
    except ValueError as error:
        raise HFViTError(f"{file.path}: {error}") from error


def _equal(a: Any, b: Any) -> bool:
    return (tuple(a) if isinstance(a, list) else a) == (tuple(b) if isinstance(b, list) else b)


def _change(model: HFViTForImageClassification, asked: dict[str, Any]) -> list[str]:
    """Bring the exact model to the size and labels asked for; a line for each change."""
    changed, config = [], model.config
    grid, patch, channels = config.grid_size, config.patch_size_hw, config.num_channels
    if "patch_size" in asked or "num_channels" in asked:
        model.resize_patch_embeddings(
            asked.get("patch_size", config.patch_size), asked.get("num_channels"), image_size=asked.get("image_size")
        )
    elif "image_size" in asked:
        model.resize_position_embeddings(asked["image_size"])
    if config.patch_size_hw != patch:
        changed.append(f"patch kernel refitted from {patch} to {config.patch_size_hw}")
    if config.num_channels != channels:
        changed.append(f"first kernel adapted from {channels} to {config.num_channels} channels")
    if config.grid_size != grid and config.has_position_table:
        changed.append(
            f"position table refitted from {grid[0]}x{grid[1]} to {config.grid_size[0]}x{config.grid_size[1]}"
        )
    labels, representation = config.num_labels, config.representation_size
    wanted: int = asked.get("num_labels", labels)
    if wanted != labels:
        model.replace_head(wanted, asked.get("id2label"), keep_representation=asked.get("keep_representation", False))
        changed.append(f"classifier of {labels} classes replaced by one of {wanted}, all zeros: train it")
        if representation is not None and config.representation_size is None:
            changed.append(f"representation layer of width {representation} dropped")
    elif "id2label" in asked:
        config.id2label = asked["id2label"]
        config.label2id = {name: number for number, name in asked["id2label"].items()}
    return changed


def _warn_of_zero_head(file: TensorFile, model: HFViTForImageClassification, asked: dict[str, Any]) -> None:
    labels = model.config.num_labels
    head = model.state_dict().get("classifier.weight")
    if head is not None and "num_labels" not in asked and not head.any():
        warnings.warn(
            f"{file.path}: the head of {labels} classes (classifier.weight) is all zeros, as in Google's imagenet21k "
            "files: it tells nothing apart. num_labels= puts a new one in its place",
            stacklevel=4,
        )


def _processor_settings(settings: dict[str, Any], config: HFViTConfig) -> dict[str, Any]:
    """Settings of a ViTImageProcessor: squash to the size, or resize the shorter side and crop as the origin does."""
    height, width = config.image_size_hw
    settings = dict(settings)
    for name in (
        "image_mean",
        "image_std",
    ):  # a first kernel of other than three channels reads the same range in each
        if len(settings[name]) != config.num_channels:
            settings[name] = [sum(settings[name]) / len(settings[name])] * config.num_channels
    crop_pct = settings.pop("crop_pct", None)
    if crop_pct and height == width:
        return settings | {
            "size": {"shortest_edge": int(height / crop_pct)},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    return settings | {"size": {"height": height, "width": width}}
