"""Save a model as a checkpoint of another format: weights are exact, unsupported features are refused by name.

Tests: tests/hf_vit/checkpoints/test_checkpoints.py.
"""

import json
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.models.vit import ViTImageProcessorPil

from ..atomic_file import atomic_folder, atomic_path
from ..errors import HFViTError
from ..image_processing import GOOGLE, ImageProcessing
from ..modeling.configuration_hf_vit import HFViTConfig
from ..modeling.modeling_hf_vit import HFViTForImageClassification
from .formats import aimv2, beit, clip, dinov2, dinov3, google, timm, timm_folder, tipsv2, transformers
from .mapping import to_state_dict


FORMATS = ("google-npz", "big-vision-npz", "timm", "transformers")
State = dict[str, torch.Tensor]


def save_checkpoint(
    model: HFViTForImageClassification,
    path: str | Path,
    format: str,
    processor: ImageProcessing | Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as a checkpoint of another format; reading it gives bit-equal weights.

    Written atomically: after an error `path` is unchanged. A folder is replaced as a whole.

    Args:
        format: `"google-npz"`: an `.npz` like those of vision_transformer (numbered as before Linen).
            `"big-vision-npz"`: an `.npz` like those of big_vision; the class token's position is added to the token.
            `"timm"`: a `.safetensors` file, or without that suffix a folder for `timm.create_model("local-dir:...")`.
            `"transformers"`: a folder for `ViTForImageClassification.from_pretrained`.
        processor: the image processing, for formats that store it: an `ImageProcessing`, or settings of a
            `ViTImageProcessor`; default: Google's.

    Returns:
        the path written.

    Raises:
        HFViTError: unknown format, a feature of the model that the format cannot express (it is named), a full disk,
            or a path that cannot be written.
    """
    writers = dict(zip(FORMATS, (_save_google, _save_big_vision, _save_timm, _save_transformers)))
    if format not in writers:
        raise HFViTError(f"unknown format '{format}': choose one of {', '.join(FORMATS)}")
    path = Path(path)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if isinstance(processor, Mapping):
        processor = ImageProcessing.from_transformers(processor)
    processing = GOOGLE.at_size(model.config.image_size_hw) if processor is None else processor
    if processing.output_size is None:
        processing = processing.at_size(model.config.image_size_hw)
    path.parent.mkdir(parents=True, exist_ok=True)
    config, state = _in_target_unit(model.config, state)
    if config.label_thresholds is not None and format != "timm":
        warnings.warn(
            f"the {format} format has no label_thresholds: who reads it counts labels from 0.5 on", stacklevel=2
        )
    writers[format](config, state, path, processing)
    return path


def _refuse(config: HFViTConfig, format: str, cannot: Iterable[tuple[str, Callable[[HFViTConfig], bool]]]) -> None:
    features = [feature for feature, present in cannot if present(config)]
    if format != "timm":  # timm has most of the families; its list names the exceptions
        features += [f"{name}={value!r}" for name, value in config.family_fields.items()]
    if features:
        raise HFViTError(f"the {format} format cannot express {'; '.join(features)}: choose another format")


def _warn_of_numerics(config: HFViTConfig, reader: str, numerics: dict[str, Any]) -> None:
    """Warn of constants, such as epsilons, that the reader's code fixes to other values."""
    different = [f"{name}={value!r} instead of {getattr(config, name)!r}" for name, value in numerics.items()]
    different = [line for line, name in zip(different, numerics) if getattr(config, name) != numerics[name]]
    if different:
        warnings.warn(f"{reader} computes with {', '.join(different)}: its outputs differ slightly", stacklevel=4)


def _in_target_unit(config: HFViTConfig, state: State) -> tuple[HFViTConfig, State]:
    """Fold the mean and std of a regression's targets into the head: other formats do not scale outputs."""
    if config.target_mean is None or config.target_std is None:
        return config, state
    weight, bias = state["classifier.weight"], state["classifier.bias"]
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (config.target_mean, config.target_std))
    scaled = {"classifier.weight": (weight.double() * std[:, None]).to(weight.dtype)}
    scaled["classifier.bias"] = (bias.double() * std + mean).to(bias.dtype)
    return _changed(config, target_mean=None, target_std=None), state | scaled


# -- the class token's row of the position table ----------------------------------------------------------------------


def _with_class_row(config: HFViTConfig, state: State) -> tuple[HFViTConfig, State]:
    """The same network with a row for the class token in the position table: zeros if it had none."""
    if not config.use_class_token or config.class_token_has_position or not config.has_position_table:
        return config, state
    name = "vit.embeddings.position_embeddings"
    rows = torch.cat([torch.zeros_like(state["vit.embeddings.cls_token"]), state[name]], dim=1)
    return _changed(config, class_token_has_position=True), state | {name: rows}


def _without_class_row(config: HFViTConfig, state: State) -> tuple[HFViTConfig, State]:
    """The same network with the class token's row added to the token, as big_vision does for older files."""
    if not config.has_class_position or not config.has_position_table:
        return config, state
    table, token = "vit.embeddings.position_embeddings", "vit.embeddings.cls_token"
    folded = {token: state[token] + state[table][:, :1], table: state[table][:, 1:]}
    return _changed(config, class_token_has_position=False), state | folded


def _changed(config: HFViTConfig, **fields) -> HFViTConfig:
    return HFViTConfig(**(config.to_dict() | fields))


# -- the formats ------------------------------------------------------------------------------------------------------


def _save_google(config: HFViTConfig, state: State, path: Path, processing: ImageProcessing) -> None:
    _refuse(config, "google-npz", google.CANNOT_VISION_TRANSFORMER)
    _warn_of_numerics(config, "vision_transformer", google.google_numerics(config))
    config, state = _with_class_row(config, state)
    _write_npz(path, to_state_dict(state, google.key_mappings(config, google.VISION_TRANSFORMER)))


def _save_big_vision(config: HFViTConfig, state: State, path: Path, processing: ImageProcessing) -> None:
    _refuse(config, "big-vision-npz", google.CANNOT_BIG_VISION)
    _warn_of_numerics(config, "big_vision", google.google_numerics(config))
    config, state = _without_class_row(config, state)
    _write_npz(path, to_state_dict(state, google.key_mappings(config, google.BIG_VISION)))


def _save_timm(config: HFViTConfig, state: State, path: Path, processing: ImageProcessing) -> None:
    _refuse(config, "timm", timm_folder.CANNOT)
    tensors = _contiguous(to_state_dict(state, timm.key_mappings(config, timm_folder.style_of(config))))
    header = timm_folder.header(config, _stored_fields(config), processing)
    numerics = timm_folder.timm_numerics(config)
    if path.suffix == ".safetensors":
        _warn_of_numerics(config, "timm", numerics)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=header)
        return
    _warn_of_numerics(config, "timm", {name: value for name, value in numerics.items() if name != "hidden_act"})
    if not timm_folder.has_entry_point(config):
        warnings.warn("timm has no entry point for this ResNet: create_model will not open the folder", stacklevel=3)
    with replaced_folder(path) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata=header)
        config_json = timm_folder.folder_config(config, processing)
        (temporary / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")


# Families of transformers: (unsupported features of a configuration, writer); the first that supports all is used.
FAMILIES = {
    "ViT": (transformers.cannot, transformers.write),
    "DINOv2": (dinov2.cannot, dinov2.write),
    "DINOv3": (dinov3.cannot, dinov3.write),
    "CLIP": (clip.cannot_clip, clip.write_clip),
    "SigLIP": (clip.cannot_siglip, clip.write_siglip),
    "BEiT": (beit.cannot, beit.write),
    "AIMv2": (aimv2.cannot, aimv2.write),
    "TIPSv2": (tipsv2.cannot, tipsv2.write),
}
# The family of a source's model type, preferred if several can express the network.
FAMILY_OF_SOURCE = {
    **dict.fromkeys(("tipsv2", "tipsv2_vision_model"), "TIPSv2"),
    **dict.fromkeys(("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"), "SigLIP"),
}


def _save_transformers(config: HFViTConfig, state: State, path: Path, processing: ImageProcessing) -> None:
    config, state = _with_class_row(config, state)
    preferred = FAMILY_OF_SOURCE.get(getattr(config, "source_model_type", ""), "ViT")
    families = [preferred, *(name for name in FAMILIES if name != preferred)]
    reasons = {name: FAMILIES[name][0](config) for name in families}
    family = next((name for name in families if not reasons[name]), None)
    if family is None:
        nearest = _nearest(config) or min(families, key=lambda name: len(reasons[name]))
        missing = [
            f"{name} does not have {'; '.join(dict.fromkeys(reasons[name]))}" for name in {nearest: 0, "ViT": 0}
        ]
        raise HFViTError(
            f"the transformers format cannot express this network ({', and '.join(missing)}): choose another format"
        )
    dtype = next(iter(state.values())).dtype
    folder = FAMILIES[family][1](config, dtype)
    tensors = _contiguous(to_state_dict(state, folder.key_mappings))
    tensors |= {name: torch.zeros(shape, dtype=dtype) for name, shape in folder.zeros.items()}
    with replaced_folder(path) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(folder.config, indent=2) + "\n")
        save_processor(temporary, processing.to_transformers(config.num_channels))


def _nearest(config: HFViTConfig) -> str | None:
    """The family with the same characteristic feature as a configuration, for the error."""
    features = {
        "DINOv3": config.rope == "dinov3",
        "BEiT": config.relative_position_bias is not None,
        "AIMv2": config.norm_type == "rms",
        "CLIP": config.pre_layernorm,
        "DINOv2": config.layer_scale_init is not None and bool(config.use_class_token),
    }
    return next((name for name, present in features.items() if present), None)


def save_processor(folder: Path, settings: dict[str, Any]) -> None:
    """Write the preprocessor_config.json of a ViTImageProcessor with these settings."""
    ViTImageProcessorPil(**settings).save_pretrained(folder)


def _stored_fields(config: HFViTConfig) -> dict[str, Any]:
    fields = [name for name in HFViTConfig.__annotations__ if not name.startswith("_")]
    problem = {} if config.problem_type is None else {"problem_type": config.problem_type}
    return {name: getattr(config, name) for name in fields} | {"id2label": config.id2label} | problem


def _contiguous(tensors: Iterator[tuple[str, torch.Tensor]]) -> State:
    return {name: tensor.contiguous() for name, tensor in tensors}


def _write_npz(path: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write an uncompressed npz of float32 arrays, one at a time; `numpy.savez` needs all in memory."""
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for name, tensor in tensors:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                array = np.ascontiguousarray(tensor.float().numpy())
                np.lib.format.write_array(member, array, allow_pickle=False)


# -- folders that may be replaced -------------------------------------------------------------------------------------

# Suffixes of the files in a model's folder; a folder with any other file is not replaced.
MODEL_FILES = (
    *(
        ".json",
        ".jsonl",
        ".safetensors",
        ".bin",
        ".pth",
        ".pt",
        ".npz",
        ".onnx",
        ".data",
        ".pt2",
        ".py",
        ".md",
        ".txt",
    ),
    *(".png", ".svg", ".html", ".csv", ".msgpack", ".h5", ".yaml", ".yml", ".gitattributes"),
)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that replaces `path` as a whole when the block ends without an error.

    Raises:
        HFViTError: `path` holds a file that is not part of a model (it is named), or the working directory.
    """
    if path.is_dir():
        if path.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise HFViTError(f"{path}: is or holds the working directory; give a folder of its own")
        for entry in sorted(path.iterdir()):
            suffix = entry.suffix.lower() or entry.name
            if entry.is_dir() or (suffix not in MODEL_FILES and entry.name not in ("LICENSE", "NOTICE")):
                raise HFViTError(
                    f"{path}: holds '{entry.name}', which is no file of a model's folder, and would be replaced as a "
                    "whole: choose another place, or take that away first"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(path) as temporary:
        yield temporary
