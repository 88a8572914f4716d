"""Shared by the formats of transformers' families: config.json with defaults, prefix, sizes, class names.

A family's own module has the names of its tensors and the meaning of its configuration.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...errors import HFViTError
from ...modeling.configuration_hf_vit import HFViTConfig
from ..mapping import KeyMapping
from ..spec import count_layers, label_names, patch_size
from ..tensor_file import TensorFile


# Fields that follow from names and shapes of tensors: a caller cannot contradict them.
SHAPING = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_type", "mlp_norm"),
    *("qkv_bias", "key_bias", "dense_bias", "attention_norm", "norm_type", "qk_norm", "layer_scale_init"),
    *("use_class_token", "num_class_tokens", "class_token_has_position", "num_register_tokens"),
    *("pre_layernorm", "patch_bias", "patch_norm", "position_embedding_type", "rope", "relative_position_bias"),
    *("representation_size", "map_num_heads", "map_over_prefix", "map_query_proj", "map_mlp"),
    *("resnet_depths", "resnet_width_factor"),
}


@dataclass
class TransformersFolder:
    """The content of a folder for a family's own class.

    Attributes:
        config: of config.json. key_mappings: from its tensors to ours. zeros: names and shapes of tensors that our
            network does not have: mask tokens of pre-training.
    """

    config: dict[str, Any]
    key_mappings: list[KeyMapping]
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)


def required_config(
    file: TensorFile, sidecars: dict[str, dict], model_types: tuple[str, ...], family: str
) -> dict[str, Any]:
    """The config.json next to a file; HFViTError if there is none, or it is of another model type."""
    stored = sidecars.get("config.json")
    if stored is None or stored.get("model_type") not in model_types:
        raise HFViTError(f"{file.path}: {family} without its config.json; give the folder that holds both")
    return stored


def with_defaults(file: TensorFile, stored: dict[str, Any], model_type: str) -> PreTrainedConfig:
    """A config.json with transformers' defaults for that model type.

    Without labels: a damaged number of them would take all memory.

    Raises:
        HFViTError: this transformers has no such type, or a value is of the wrong type.
    """
    if model_type not in CONFIG_MAPPING:
        raise HFViTError(f"{file.path}: model_type '{model_type}' needs a newer transformers")
    settings = {key: value for key, value in stored.items() if key not in ("num_labels", "id2label", "label2id")}
    depth = settings.get("num_hidden_layers", 0)
    # before the class is made: some list a name for each layer
    if isinstance(depth, (int, float)) and not 0 <= depth <= len(file.shapes):
        raise HFViTError(f"{file.path}: config.json says num_hidden_layers {depth!r:.50}, more than the file holds")
    try:
        types = {name: type(value) for name, value in vars(CONFIG_MAPPING[model_type]()).items()}
        settings = {key: _as_typed(value, types.get(key)) for key, value in settings.items()}
        return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(settings) | {"model_type": model_type})
    except Exception as error:  # strict dataclasses and validators raise errors of their own
        raise HFViTError(f"{file.path}: config.json: {' '.join(str(error).split())[:300]}") from error


def _as_typed(value: Any, kind: type | None) -> Any:
    """A number in the type of its field: 1 for 1.0 and 4.0 for 4, which transformers before v5 accepted."""
    if kind is float and type(value) is int:
        return float(value)
    return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value


def prefix_before(file: TensorFile, anchor: str) -> str:
    """The prefix of names, from the name of a tensor that every file of a family has once.

    Raises:
        HFViTError: no such tensor, or several.
    """
    prefixes = [name.removesuffix(anchor) for name in file if name == anchor or name.endswith("." + anchor)]
    if len(prefixes) != 1:
        raise HFViTError(f"{file.path}: incomplete or of several models, it has {len(prefixes)} tensors '{anchor}'")
    return prefixes[0]


def common_fields(file: TensorFile, theirs: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """Sizes and rates that have the same names in every family's configuration.

    Args:
        theirs: its configuration. size: shape of the patch projection's weight.

    Raises:
        HFViTError: the configuration does not match the file.
    """
    channels = theirs.num_channels
    if len(size) == 5:
        raise HFViTError(f"{file.path}: its patch kernel has 5 dimensions: a video or volume model, not a plain ViT")
    if len(size) != 4 or size[0] != theirs.hidden_size or size[1] != channels:
        raise HFViTError(
            f"{file.path}: config.json says hidden_size {theirs.hidden_size} and num_channels {channels}, the patch "
            f"projection has shape {size}"
        )
    if not 0 < getattr(theirs, "layer_norm_eps", 1e-6) < 1:
        raise HFViTError(f"{file.path}: config.json says layer_norm_eps {theirs.layer_norm_eps}, not between 0 and 1")
    image_size = getattr(theirs, "image_size", 224)
    return {
        "image_size": tuple(image_size) if isinstance(image_size, list) else image_size,
        "patch_size": patch_size(*size[2:]),
        "num_channels": channels,
        "hidden_size": theirs.hidden_size,
        "num_hidden_layers": theirs.num_hidden_layers,
        "num_attention_heads": theirs.num_attention_heads,
        "intermediate_size": getattr(theirs, "intermediate_size", None),
        "hidden_act": theirs.hidden_act,
        "layer_norm_eps": getattr(theirs, "layer_norm_eps", 1e-6),
        "qkv_bias": getattr(theirs, "qkv_bias", True),
        "hidden_dropout_prob": getattr(theirs, "hidden_dropout_prob", 0.0),
        "attention_probs_dropout_prob": getattr(
            theirs, "attention_probs_dropout_prob", getattr(theirs, "attention_dropout", 0.0)
        ),
        "drop_path_rate": getattr(theirs, "drop_path_rate", 0.0),
        "position_interpolation": "bicubic",
        "initializer": "truncated_normal",
        "resnet_depths": None,
        "representation_size": None,
    }


def check_depth(file: TensorFile, pattern: str, depth: int) -> None:
    """Raise HFViTError for a configuration of another depth than the file, before a network is built."""
    layers = count_layers(file, pattern)
    if layers != depth:
        raise HFViTError(f"{file.path}: config.json says num_hidden_layers {depth!r:.50}, the file holds {layers}")


def class_names(file: TensorFile, stored: dict[str, Any], labels: int) -> dict[str, Any]:
    """`num_labels`, `id2label` and `label2id` of a classifier of that many outputs.

    Raises:
        HFViTError: config.json names other classes.
    """
    if not labels:
        return {"num_labels": 0, "id2label": {}, "label2id": {}}
    count = stored.get("num_labels", labels)
    if count != labels:
        raise HFViTError(f"{file.path}: config.json says num_labels {count!r:.50}, the file holds {labels}")
    names = stored.get("id2label")
    if names is None:
        names = {str(number): f"LABEL_{number}" for number in range(labels)}
    numbers = sorted(int(key) for key in names) if isinstance(names, dict) and all(map(_is_number, names)) else None
    if numbers != list(range(labels)):
        raise HFViTError(
            f"{file.path}: id2label in config.json does not name the classes 0 to {labels - 1} of the file's "
            "classifier, each once"
        )
    id2label = {int(key): str(name) for key, name in names.items()}
    return {"num_labels": labels, "id2label": id2label, "label2id": {name: n for n, name in id2label.items()}}


def _is_number(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.isascii() and key.isdecimal())


def not_specified(fields: dict[str, Any]) -> set[str]:
    """The fields that a caller may contradict."""
    fixed = SHAPING | ({"pooling"} if fields.get("pooling") == "map" else set())
    return set(fields) - fixed - {"num_labels", "id2label", "label2id"}


def unused_names(file: TensorFile, pattern: str) -> tuple[set[str], list[str]]:
    """Names that are deliberately not used, and a note that lists them, grouped by their first part."""
    names = {name for name in file if re.match(pattern, name)}
    groups: dict[str, int] = {}
    for name in sorted(names):
        part = name.partition(".")[0] if re.match(r"(text|lm_head|decoder|logit)", name) else name
        groups[part] = groups.get(part, 0) + 1
    listed = [part if count == 1 else f"{part} ({count} tensors)" for part, count in groups.items()]
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return names, [f"not used: {', '.join(listed[:10])}{more}"] if names else []


def stated_sizes(config: HFViTConfig) -> dict[str, Any]:
    """Entries of config.json with the same names in every family."""
    return {
        "image_size": config.image_size if isinstance(config.image_size, int) else list(config.image_size),
        "patch_size": config.patch_size if isinstance(config.patch_size, int) else list(config.patch_size),
        "num_channels": config.num_channels,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
    }


def unsupported_features(config: HFViTConfig, conditions: dict[str, bool], supported_fields: set[str]) -> list[str]:
    """Features of a configuration that a family does not have.

    Args:
        conditions: descriptions of features, and whether the configuration has them.
        supported_fields: of `config.family_fields`.
    """
    features = [feature for feature, present in conditions.items() if present]
    features += [f"{name}={value!r}" for name, value in config.family_fields.items() if name not in supported_fields]
    common = {
        "a ResNet stem (hybrid)": config.resnet_depths is not None,
        "a representation layer": config.representation_size is not None,
        "QK-norm": config.qk_norm,
    }
    return features + [feature for feature, present in common.items() if present]


def config_json(
    model_type: str, architecture: str, config: HFViTConfig, dtype: torch.dtype, **entries: Any
) -> dict[str, Any]:
    """A family's config.json: its defaults, these entries, and the class names."""
    theirs = CONFIG_MAPPING[model_type](**entries)
    names = label_names(config)
    theirs.id2label = dict(enumerate(names))
    theirs.label2id = {name: number for number, name in enumerate(names)}
    theirs.problem_type = config.problem_type
    theirs.architectures = [architecture]
    theirs.dtype = str(dtype).removeprefix("torch.")
    return theirs.to_dict()
