"""Folders of transformers and of this package: `vit` in both key layouts, `deit`, the removed `vit-hybrid`, `hf_vit`.

Sources: transformers 5.23 `models/vit`, `models/deit`, `models/bit`, `conversion_mapping.py`; 4.5x for the layout
before v5 and for `models/deprecated/vit_hybrid`. A state dict without config.json is read too, with the defaults.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import ViTConfig

from ...errors import HFViTError
from ...image_processing import GOOGLE
from ...modeling.configuration_hf_vit import HFViTConfig
from ..mapping import KeyMapping, Transform, rename, weight_and_bias
from ..spec import (
    CheckpointSpec,
    count_layers,
    heads_for_width,
    image_size_of_table,
    label_names,
    linear_head,
    patch_size,
)
from ..tensor_file import TensorFile


FAMILIES = {"vit": "ViT", "deit": "DeiT", "vit-hybrid": "hybrid ViT", "hf_vit": "hf_vit"}

# (before v5, since v5): modules inside a layer; the latter names are ours.
LAYER = (
    ("layernorm_before", "layernorm_before"),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("layernorm_after", "layernorm_after"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
# The hybrid's BiT backbone: (their module inside a unit, ours).
UNIT = (
    *((f"{kind}{n}", f"{ours}{n}") for n in (1, 2, 3) for kind, ours in (("conv", "conv"), ("norm", "gn"))),
    ("downsample.conv", "conv_proj"),
    ("downsample.norm", "gn_proj"),
)
UNUSED = (r"(.*\.)?(embeddings\.)?mask_token$", r"decoder\.", r"colours\.", r".*position_ids$")
UNSUPPORTED = (
    (r"(vision_model|text_model|visual_projection|text_projection|logit_scale)", "a CLIP or SigLIP tower"),
    (
        r"(cls_classifier|distillation_classifier)\.",
        "two heads, one for the distillation token, whose answers are averaged",
    ),
    (r".*relative_position_bias", "relative positions (BEiT)"),
)


def folded_distillation_token() -> Transform:
    """DeiT's second token with its row of the position table is a register: a constant sum of two constants."""

    def to_ours(table: torch.Tensor, token: torch.Tensor):
        return [torch.cat([table[:, :1], table[:, 2:]], dim=1), token + table[:, 1:2]]

    def to_theirs(table: torch.Tensor, token: torch.Tensor):
        return [torch.cat([table[:, :1], torch.zeros_like(token), table[:, 1:]], dim=1), token]

    return Transform(to_ours, to_theirs)


def key_mappings(
    config: HFViTConfig, prefix: str = "vit.", old: bool = True, bit: bool = False, distilled: bool = False
) -> list[KeyMapping]:
    """Every tensor of the model, their name and ours.

    Args:
        prefix: before the encoder's names: `"vit."`, `"deit."` or none. old: the key layout before transformers v5.
        bit: names of the hybrid's BiT backbone. distilled: position rows and token of DeiT.
    """
    mappings = _embedding_rules(config, prefix, bit, distilled)
    for i in range(config.num_hidden_layers):
        theirs, ours = f"{prefix}encoder.layer.{i}." if old else f"{prefix}layers.{i}.", f"vit.layers.{i}."
        for before, since in LAYER:
            names = theirs + (before if old else since), ours + since
            bias = config.qkv_bias or since not in ("attention.q_proj", "attention.k_proj", "attention.v_proj")
            mappings += weight_and_bias(*names) if bias else [rename(names[0] + ".weight", names[1] + ".weight")]
        if config.qk_norm:
            mappings += weight_and_bias(theirs + "attention.q_norm", ours + "attention.q_norm")
            mappings += weight_and_bias(theirs + "attention.k_norm", ours + "attention.k_norm")
        if config.layer_scale_init is not None:
            mappings += [rename(f"{theirs}layer_scale{n}.lambda1", f"{ours}layer_scale{n}.lambda1") for n in (1, 2)]
    mappings += weight_and_bias(prefix + "layernorm", "vit.layernorm")
    if config.pooling == "map":
        mappings.append(rename(prefix + "map_head.probe", "vit.map_head.probe"))
        for since in (*(f"attention.{letter}_proj" for letter in "qkvo"), "layernorm", "mlp.fc1", "mlp.fc2"):
            plain = not config.qkv_bias and since in ("attention.q_proj", "attention.k_proj", "attention.v_proj")
            names = f"{prefix}map_head.{since}", f"vit.map_head.{since}"
            mappings += [rename(names[0] + ".weight", names[1] + ".weight")] if plain else weight_and_bias(*names)
        if config.qk_norm:
            for norm in ("q_norm", "k_norm"):
                mappings += weight_and_bias(f"{prefix}map_head.attention.{norm}", f"vit.map_head.attention.{norm}")
    if config.representation_size is not None:
        mappings += weight_and_bias(prefix + "pooler.dense", "vit.pooler.dense")
    if config.num_labels:
        mappings += weight_and_bias("classifier", "classifier")
    return mappings


def _embedding_rules(config: HFViTConfig, prefix: str, bit: bool, distilled: bool) -> list[KeyMapping]:
    theirs, ours = prefix + "embeddings.", "vit.embeddings."
    mappings = weight_and_bias(theirs + "patch_embeddings.projection", ours + "patch_embeddings.projection")
    if config.use_class_token:
        mappings.append(rename(theirs + "cls_token", ours + "cls_token"))
    if distilled:
        names = (theirs + "position_embeddings", theirs + "distillation_token")
        mappings.append(
            KeyMapping(names, (ours + "position_embeddings", ours + "register_tokens"), folded_distillation_token())
        )
    else:
        if config.has_position_table:
            mappings.append(rename(theirs + "position_embeddings", ours + "position_embeddings"))
        if config.num_register_tokens:
            mappings.append(rename(theirs + "register_tokens", ours + "register_tokens"))
    if config.resnet_depths is None:
        return mappings
    ours += "patch_embeddings.backbone."
    theirs += "patch_embeddings.backbone." + ("bit." if bit else "")
    mappings.append(
        rename(theirs + ("embedder.convolution" if bit else "conv_root") + ".weight", ours + "conv_root.weight")
    )
    mappings += weight_and_bias(theirs + ("embedder.norm" if bit else "gn_root"), ours + "gn_root")
    for stage, depth in enumerate(config.resnet_depths):
        for unit in range(depth):
            a = f"{theirs}encoder.stages.{stage}.layers.{unit}." if bit else f"{theirs}stages.{stage}.units.{unit}."
            b = f"{ours}stages.{stage}.units.{unit}."
            for foreign, own in UNIT if unit == 0 else UNIT[:6]:
                names = a + (foreign if bit else own), b + own
                mappings += (
                    [rename(names[0] + ".weight", names[1] + ".weight")] if "conv" in own else weight_and_bias(*names)
                )
    return mappings


# -- reading ----------------------------------------------------------------------------------------------------------


def matches(file: TensorFile) -> bool:
    """Whether the names are those of transformers' ViT family, or ours."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in file) and any(
        re.match(r"((vit|deit)\.)?(encoder\.layer|layers)\.\d+\.", name) for name in file
    )


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Take the architecture from config.json, or from names and shapes where it is missing.

    Raises:
        HFViTError: another architecture, a distilled DeiT with two heads, or a config.json that describes no ViT.
    """
    for pattern, feature in UNSUPPORTED:
        found = next((name for name in file if re.match(pattern, name)), None)
        if found:
            raise HFViTError(f"{file.path}: has {feature} ('{found}'), which has no counterpart in hf_vit")
    projection = next(name for name in file if name.endswith("embeddings.patch_embeddings.projection.weight"))
    prefix = projection.removesuffix("embeddings.patch_embeddings.projection.weight")
    old = any(name.startswith(f"{prefix}encoder.layer.") for name in file)
    bit = any(".backbone.bit." in name for name in file)
    distilled = f"{prefix}embeddings.distillation_token" in file
    stored: Any = sidecars.get("config.json")
    notes: list[str] = []
    assumptions: list[str] = []
    if stored is None:
        stored, assumptions = _config_from_shapes(file, prefix, old, distilled, requested)
    _check_stored(file, stored, prefix, old)
    family = stored.get("model_type", "vit")
    fields, not_specified = _fields(file, stored)
    unused = {name for name in file if any(re.match(pattern, name) for pattern in UNUSED)}
    labels, head = linear_head(file, "classifier", requested)
    if not labels:
        fields |= {"num_labels": 0, "id2label": {}, "label2id": {}}
    pooler = {f"{prefix}pooler.dense.weight", f"{prefix}pooler.dense.bias"}
    if family != "hf_vit":
        fields["representation_size"] = None
        fields["num_register_tokens"] = int(distilled)
        if pooler <= set(file) and labels:  # transformers' classifier reads the class token, not the pooler
            unused |= pooler
        elif pooler <= set(file):
            fields["representation_size"] = file.shapes[f"{prefix}pooler.dense.weight"][0]
    unused |= head
    if unused:
        notes.append(f"not used by the classifier: {', '.join(sorted(unused)[:10])}")
    layout = f", keys {'before' if old else 'since'} transformers v5" if family != "hf_vit" else ""
    return CheckpointSpec(
        format=f"transformers {FAMILIES[family]}{layout}" if family != "hf_vit" else "hf_vit",
        fields=fields,
        key_mappings=lambda config: key_mappings(config, prefix, old, bit, distilled),
        not_specified=not_specified,
        unused=unused,
        assumptions=assumptions,
        notes=notes,
        image_processing=GOOGLE.at_size(fields["image_size"]),
    )


def _check_stored(file: TensorFile, stored: dict[str, Any], prefix: str, old: bool) -> None:
    """Refuse a config.json whose sizes are not the file's, before anything of that size is built.

    Raises:
        HFViTError: the entry, what it says, what the file holds.
    """
    blocks = re.escape(f"{prefix}encoder.layer." if old else f"{prefix}layers.") + r"(\d+)\."
    found = {"num_hidden_layers": count_layers(file, blocks)}
    if "classifier.weight" in file and len(file.shapes["classifier.weight"]) == 2:
        found["num_labels"] = file.shapes["classifier.weight"][0]
    for key, size in found.items():
        if stored.get(key, size) != size:
            raise HFViTError(f"{file.path}: config.json says {key} {stored[key]!r:.50}, the file holds {size}")
    if not isinstance(stored.get("num_labels", 0), int) or stored.get("num_labels", 0) > 1 << 20:
        raise HFViTError(f"{file.path}: config.json says num_labels {stored['num_labels']!r:.50}")
    names = stored.get("id2label")
    if names is None or "num_labels" not in found:
        return
    numbers = sorted(int(key) for key in names) if isinstance(names, dict) and all(map(_is_number, names)) else None
    if numbers != list(range(found["num_labels"])):
        raise HFViTError(
            f"{file.path}: id2label in config.json does not name the classes 0 to {found['num_labels'] - 1} of the "
            "file's classifier, each once"
        )


def _is_number(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.isascii() and key.isdecimal())


def _fields(file: TensorFile, stored: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The fields of our configuration that a config.json describes, and those that a caller may contradict."""
    family = stored.get("model_type", "vit")
    if family not in FAMILIES:
        raise HFViTError(f"{file.path}: config.json says model_type '{family}', not one of {', '.join(FAMILIES)}")
    if stored.get("pooler_act", "tanh") != "tanh":
        raise HFViTError(
            f"{file.path}: pooler_act '{stored['pooler_act']}' has no counterpart in hf_vit, whose pooler is tanh"
        )
    if family == "vit-hybrid":
        backbone = stored.get("backbone_config") or {}
        padding = str(backbone.get("global_padding", "same")).lower(), backbone.get("embedding_dynamic_padding", True)
        if padding != ("same", True):
            raise HFViTError(f"{file.path}: a BiT backbone without SAME padding has no counterpart in hf_vit")
    try:
        config = HFViTConfig.from_dict(stored)
    except Exception as error:  # the strict dataclass raises its own error, and what validators run into
        raise HFViTError(f"{file.path}: config.json: {' '.join(str(error).split())}") from error
    for name in ("layer_norm_eps", "group_norm_eps", "weight_standardization_eps"):
        if not 0 < getattr(config, name) < 1:
            raise HFViTError(f"{file.path}: config.json says {name} {getattr(config, name)}, not between 0 and 1")
    own = [name for name in HFViTConfig.__annotations__ if not name.startswith("_")]
    fields = {name: getattr(config, name) for name in own}
    fields |= {"id2label": config.id2label, "label2id": config.label2id, "problem_type": config.problem_type}
    return fields, set(own) - SHAPING - ({"pooling"} if config.pooling == "map" else set()) | {"problem_type"}


# Fields that names and shapes decide; a caller cannot contradict them.
SHAPING = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "qkv_bias", "use_class_token"),
    *("class_token_has_position", "num_register_tokens", "representation_size", "position_embedding_type"),
    *("layer_scale_init", "qk_norm", "resnet_depths", "resnet_width_factor"),
}


def _config_from_shapes(
    file: TensorFile, prefix: str, old: bool, distilled: bool, requested: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What a config.json would say, for a state dict that lies alone, and what was assumed."""
    first = f"{prefix}encoder.layer." if old else f"{prefix}layers."
    if any(".backbone." in name for name in file):
        raise HFViTError(f"{file.path}: a hybrid without its config.json; give the folder that holds both")
    fc1 = f"{first}0.{LAYER[6][not old]}.weight"
    positions, cls_token = f"{prefix}embeddings.position_embeddings", f"{prefix}embeddings.cls_token"
    for needed in (fc1, positions, cls_token):
        if needed not in file:
            raise HFViTError(f"{file.path}: incomplete, it has no '{needed}' and there is no config.json next to it")
    width, channels, patch_h, patch_w = file.shapes[f"{prefix}embeddings.patch_embeddings.projection.weight"]
    heads, assumptions = heads_for_width(file.path, width, requested)
    if "hidden_act" not in requested or "layer_norm_eps" not in requested:
        assumptions.append("erf GELU and LayerNorm eps 1e-12, transformers' defaults (hidden_act=, layer_norm_eps=)")
    config: dict[str, Any] = {
        "model_type": "deit" if distilled else "vit",
        "hidden_size": width,
        "num_hidden_layers": count_layers(file, re.escape(first) + r"(\d+)\."),
        "num_attention_heads": heads,
        "intermediate_size": file.shapes[fc1][0],
        "patch_size": patch_size(patch_h, patch_w),
        "num_channels": channels,
        "qkv_bias": f"{first}0.{LAYER[1][not old]}.bias" in file,
    }
    rows = file.shapes[positions][1] - 1 - int(distilled)
    known = {name: value for name, value in config.items() if name != "model_type"}
    config["image_size"] = image_size_of_table(file.path, rows, known, requested)
    labels, _ = linear_head(file, "classifier", requested)
    config["id2label"] = {i: f"LABEL_{i}" for i in range(labels)}
    config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return config, assumptions + ["images squashed, mean = std = 0.5"]


# -- writing ----------------------------------------------------------------------------------------------------------

CANNOT: tuple[tuple[str, Callable[[HFViTConfig], bool]], ...] = (
    ("a ResNet stem (hybrid)", lambda c: c.resnet_depths is not None),
    ('pooling other than "token"', lambda c: c.pooling != "token"),
    ("a representation layer under a classifier", lambda c: c.representation_size is not None and bool(c.num_labels)),
    ("register tokens", lambda c: c.num_register_tokens > 0),
    ("positions that are not a learned table over the grid", lambda c: c.position_embedding_type != "learned"),
    ("LayerScale", lambda c: c.layer_scale_init is not None),
    ("QK-norm", lambda c: c.qk_norm),
)


def folder_config(config: HFViTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a `ViTForImageClassification` that computes the same; of a `ViTModel` with a pooler."""
    names = label_names(config)
    theirs = ViTConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        layer_norm_eps=config.layer_norm_eps,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        qkv_bias=config.qkv_bias,
        pooler_output_size=config.representation_size,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        architectures=["ViTForImageClassification" if config.representation_size is None else "ViTModel"],
        dtype=str(dtype).removeprefix("torch."),
    )
    return theirs.to_dict()
