"""What folders of transformers' families have in common: config.json with defaults, prefix, sizes, class names.

A family's own file says what its parts are called and what its configuration means.

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


# Fields that decide which tensors there are: names and shapes say them, a caller cannot contradict them.
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
    """What is to be written for a family's own class.

    Attributes:
        config: of config.json. key_mappings: our tensors under its names. zeros: tensors that the class has and that
            our network has not, by name and shape: mask tokens of pre-training.
    """

    config: dict[str, Any]
    key_mappings: list[KeyMapping]
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)


def with_defaults(file: TensorFile, stored: dict[str, Any], model_type: str) -> PreTrainedConfig:
    """A config.json of that model type with what it leaves out, as transformers fills it in.

    Labels are left out: a damaged number of them would take all memory.

    Raises:
        HFViTError: this transformers has no such type, or a value is of the wrong type.
    """
    if model_type not in CONFIG_MAPPING:
        raise HFViTError(f"{file.path}: model_type '{model_type}' needs a newer transformers")
    settings = {key: value for key, value in stored.items() if key not in ("num_labels", "id2label", "label2id")}
    depth = settings.get("num_hidden_layers", 0)
    if isinstance(depth, (int, float)) and not 0 <= depth <= len(
        file.shapes
    ):  # some classes list a name for each layer
        raise HFViTError(f"{file.path}: config.json says num_hidden_layers {depth!r:.50}, more than the file holds")
    try:
        types = {name: type(value) for name, value in vars(CONFIG_MAPPING[model_type]()).items()}
        settings = {key: _as_typed(value, types.get(key)) for key, value in settings.items()}
        return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(settings) | {"model_type": model_type})
    except Exception as error:  # strict dataclasses and validators raise errors of their own
        raise HFViTError(f"{file.path}: config.json: {' '.join(str(error).split())[:300]}") from error


def _as_typed(value: Any, kind: type | None) -> Any:
    """A number as its class declares it: 1 for 1.0, and 4.0 for 4, which transformers before v5 took."""
    if kind is float and type(value) is int:
        return float(value)
    return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value


def prefix_before(file: TensorFile, anchor: str) -> str:
    """What stands before the name of a tensor that every file of a family has once.

    Raises:
        HFViTError: no such tensor, or several.
    """
    prefixes = [name.removesuffix(anchor) for name in file if name == anchor or name.endswith("." + anchor)]
    if len(prefixes) != 1:
        raise HFViTError(f"{file.path}: incomplete or of several models, it has {len(prefixes)} tensors '{anchor}'")
    return prefixes[0]


def common_fields(file: TensorFile, theirs: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """Sizes and rates that every family's configuration names alike.

    Args:
        theirs: its configuration. size: shape of the patch projection's weight, which has to agree.

    Raises:
        HFViTError: the configuration is not that of the file.
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
    """Refuse a configuration of another depth before anything of that size is built."""
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
    """Those of the fields that a caller may contradict."""
    fixed = SHAPING | ({"pooling"} if fields.get("pooling") == "map" else set())
    return set(fields) - fixed - {"num_labels", "id2label", "label2id"}


def unused_names(file: TensorFile, pattern: str) -> tuple[set[str], list[str]]:
    """Names that are deliberately not used, and a note of them by their first part."""
    names = {name for name in file if re.match(pattern, name)}
    groups: dict[str, int] = {}
    for name in sorted(names):
        part = name.partition(".")[0] if re.match(r"(text|lm_head|decoder|logit)", name) else name
        groups[part] = groups.get(part, 0) + 1
    listed = [part if count == 1 else f"{part} ({count} tensors)" for part, count in groups.items()]
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return names, [f"not used: {', '.join(listed[:10])}{more}"] if names else []


def stated_sizes(config: HFViTConfig) -> dict[str, Any]:
    """Entries of config.json that every family names alike."""
    return {
        "image_size": config.image_size if isinstance(config.image_size, int) else list(config.image_size),
        "patch_size": config.patch_size if isinstance(config.patch_size, int) else list(config.patch_size),
        "num_channels": config.num_channels,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
    }


def beyond(config: HFViTConfig, expressed: set[str]) -> list[str]:
    """Features of a configuration that a family does not have: those of other families, but for `expressed`."""
    features = [f"{name}={value!r}" for name, value in config.family_fields.items() if name not in expressed]
    wrong = {
        "a ResNet stem (hybrid)": config.resnet_depths is not None,
        "a representation layer": config.representation_size is not None,
        "QK-norm": config.qk_norm,
    }
    return features + [what for what, is_so in wrong.items() if is_so]


def config_json(
    model_type: str, architecture: str, config: HFViTConfig, dtype: torch.dtype, **entries: Any
) -> dict[str, Any]:
    """A family's config.json: its defaults, sizes, these entries, and the class names."""
    theirs = CONFIG_MAPPING[model_type](**entries)
    names = label_names(config)
    theirs.id2label = dict(enumerate(names))
    theirs.label2id = {name: number for number, name in enumerate(names)}
    theirs.problem_type = config.problem_type
    theirs.architectures = [architecture]
    theirs.dtype = str(dtype).removeprefix("torch.")
    return theirs.to_dict()
