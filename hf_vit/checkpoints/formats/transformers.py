"""Folders of transformers and of this package: `vit` in both key layouts, `deit`, `vit_mae`, `vit_msn`, `ijepa`, the
removed `vit-hybrid`, and `hf_vit`.

Sources: transformers 5.23 `models/vit`, `models/deit`, `models/bit`, `conversion_mapping.py`; 4.5x for the layout
before v5 and for `models/deprecated/vit_hybrid`. A state dict without config.json is read too, with the defaults.

Tests: tests/hf_vit/checkpoints/test_checkpoints_transformers.py.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import HFViTError
from ...image_processing import GOOGLE
from ...modeling.configuration_hf_vit import HEAD_FIELDS, HFViTConfig
from ..mapping import KeyMapping, Transform, rename, weight_and_bias
from ..spec import (
    MAE_HEAD,
    CheckpointSpec,
    count_layers,
    heads_for_width,
    image_size_of_table,
    linear_head,
    patch_size,
)
from ..tensor_file import TensorFile
from .encoder import EncoderNames, encoder_mappings, same_names
from .transformers_folder import (
    TransformersFolder,
    check_depth,
    class_names,
    common_fields,
    config_json,
    not_specified,
    prefix_before,
    stated_sizes,
    unused_names,
    with_defaults,
)


MODEL_TYPES: tuple[str, ...] = ("vit", "deit", "vit-hybrid", "hf_vit", "vit_mae", "vit_msn", "ijepa")
FAMILIES = {
    "vit": "ViT",
    "deit": "DeiT",
    "vit-hybrid": "hybrid ViT",
    "hf_vit": "hf_vit",
    "vit_mae": "MAE",
    "vit_msn": "MSN",
    "ijepa": "I-JEPA",
}
PATCH = "embeddings.patch_embeddings.projection.weight"
BEFORE_V5 = EncoderNames(
    layer="encoder.layer.{n}.",
    norm1="layernorm_before",
    norm2="layernorm_after",
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    output="attention.output.dense",
    fc1="intermediate.dense",
    fc2="output.dense",
)
SINCE_V5 = EncoderNames(  # ours too
    layer="layers.{n}.",
    norm1="layernorm_before",
    norm2="layernorm_after",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
)
# The hybrid's BiT backbone: (their module inside a unit, ours).
UNIT = (
    *((f"{kind}{n}", f"{ours}{n}") for n in (1, 2, 3) for kind, ours in (("conv", "conv"), ("norm", "gn"))),
    ("downsample.conv", "conv_proj"),
    ("downsample.norm", "gn_proj"),
)
UNUSED = r"(.*\.)?mask_token$|decoder\.|colours\.|.*position_ids$|(encoder_to_decoder|lm_head)\."


def folded_distillation_token() -> Transform:
    """DeiT's second token with its row of the position table is a register: a constant sum of two constants."""

    def to_ours(table: torch.Tensor, token: torch.Tensor):
        return [torch.cat([table[:, :1], table[:, 2:]], dim=1), token + table[:, 1:2]]

    def to_theirs(table: torch.Tensor, token: torch.Tensor):
        return [torch.cat([table[:, :1], torch.zeros_like(token), table[:, 1:]], dim=1), token]

    return Transform(to_ours, to_theirs)


# DeiT's class and distillation token where both are read: two class tokens, each with its row of the table.
TWO_TOKENS = Transform(
    lambda first, second: [torch.cat([first, second], dim=1)],
    lambda tokens: [tokens[:, :1].contiguous(), tokens[:, 1:].contiguous()],
)


def averaged_heads() -> Transform:
    """DeiT's two heads, whose answers are averaged, as one over both tokens side by side: (a x + b y) / 2."""

    def to_ours(first: torch.Tensor, second: torch.Tensor):
        return [torch.cat([first, second], dim=1) / 2]

    return Transform(to_ours, lambda both: [half.contiguous() * 2 for half in both.chunk(2, dim=1)])


def averaged_biases() -> Transform:
    """Their two biases; written back, both are the mean."""
    return Transform(lambda first, second: [(first + second) / 2], lambda mean: [mean, mean.clone()])


def two_heads(first: str, second: str) -> list[KeyMapping]:
    """One classifier from two heads."""
    return [
        KeyMapping((f"{first}.weight", f"{second}.weight"), ("classifier.weight",), averaged_heads()),
        KeyMapping((f"{first}.bias", f"{second}.bias"), ("classifier.bias",), averaged_biases()),
    ]


@dataclass(frozen=True)
class TransformersLayout:
    """How a file of the family names its tensors.

    Attributes:
        prefix: before the encoder's names: `"vit."`, `"deit."` or none; `layer_prefix` before those of blocks, which
            MSN's classifier writes without. old: the key layout before transformers v5.
        bit: names of the hybrid's BiT backbone. distilled: position rows and token of DeiT. two_heads: its classifier.
    """

    prefix: str = "vit."
    layer_prefix: str = "vit."
    old: bool = True
    bit: bool = False
    distilled: bool = False
    two_heads: bool = False


def key_mappings(config: HFViTConfig, layout: TransformersLayout) -> list[KeyMapping]:
    """Mappings of all tensors of the model."""
    names = BEFORE_V5 if layout.old else SINCE_V5
    mappings = []
    theirs, ours = f"{layout.prefix}embeddings.", "vit.embeddings."
    if layout.distilled and layout.two_heads:
        names = EncoderNames(**(vars(names) | {"cls_token": None}))
        pair = (theirs + "cls_token", theirs + "distillation_token")
        mappings.append(KeyMapping(pair, (ours + "cls_token",), TWO_TOKENS))
    elif layout.distilled:
        names = EncoderNames(**(vars(names) | {"positions": None, "registers": None}))
        pair = (theirs + "position_embeddings", theirs + "distillation_token")
        tokens = (ours + "position_embeddings", ours + "register_tokens")
        mappings.append(KeyMapping(pair, tokens, folded_distillation_token()))
    mappings += encoder_mappings(config, names, layout.prefix, layout.layer_prefix)
    if layout.two_heads and config.num_labels:
        mappings += two_heads("cls_classifier", "distillation_classifier")
    if layout.bit:
        mappings += _bit_mappings(config, layout.prefix)
    return mappings + same_names(config, layout.prefix, mappings)


def _bit_mappings(config: HFViTConfig, prefix: str) -> list[KeyMapping]:
    ours, theirs = "vit.embeddings.patch_embeddings.backbone.", f"{prefix}embeddings.patch_embeddings.backbone.bit."
    mappings = [
        rename(theirs + "embedder.convolution.weight", ours + "conv_root.weight"),
        *weight_and_bias(theirs + "embedder.norm", ours + "gn_root"),
    ]
    for stage, depth in enumerate(config.resnet_depths or ()):
        for unit in range(depth):
            a, b = f"{theirs}encoder.stages.{stage}.layers.{unit}.", f"{ours}stages.{stage}.units.{unit}."
            for their_module, our_module in UNIT if unit == 0 else UNIT[:6]:
                mappings += weight_and_bias(a + their_module, b + our_module, bias="conv" not in our_module)
    return mappings


# -- reading ----------------------------------------------------------------------------------------------------------


def matches(file: TensorFile) -> bool:
    """Whether the names are those of transformers' ViT family, or ours."""
    return any(name.endswith(PATCH) for name in file) and any(
        re.match(r"((vit|deit|ijepa)\.)?(encoder\.layer|layers)\.\d+\.(layernorm_before|attention)", name)
        for name in file
    )


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Take the architecture from config.json, or from names and shapes if there is none.

    Raises:
        HFViTError: another architecture, or a config.json that is not the file's.
    """
    prefix = prefix_before(file, PATCH)
    old = any(re.match(r"(.*\.)?encoder\.layer\.\d+\.", name) for name in file)
    inside = f"{prefix}encoder.layer.0.layernorm_before.weight"
    layout = TransformersLayout(
        prefix=prefix,
        layer_prefix=""
        if old and inside not in file and "encoder.layer.0.layernorm_before.weight" in file
        else prefix,
        old=old,
        bit=any(".backbone.bit." in name for name in file),
        distilled=f"{prefix}embeddings.distillation_token" in file,
        two_heads="cls_classifier.weight" in file and "distillation_classifier.weight" in file,
    )
    stored: Any = sidecars.get("config.json")
    assumptions: list[str] = []
    if stored is None:
        stored, assumptions = _config_from_shapes(file, layout, requested)
    family = stored.get("model_type", "vit")
    if family not in FAMILIES:
        raise HFViTError(f"{file.path}: config.json says model_type '{family}', not one of {', '.join(FAMILIES)}")
    blocks = layout.layer_prefix + (BEFORE_V5 if old else SINCE_V5).layer.partition("{")[0]
    check_depth(file, re.escape(blocks) + r"(\d+)\.", stored.get("num_hidden_layers", 12))
    labels, unused = _classifier_names(file, layout, requested)
    names = class_names(file, stored, labels)
    fields = _fields(file, stored) | names
    if labels:
        fields |= {name: stored.get(name) for name in HEAD_FIELDS}
    left_over, notes = unused_names(file, UNUSED)
    unused |= left_over
    pooler = {f"{prefix}pooler.dense.weight", f"{prefix}pooler.dense.bias"}
    if family != "hf_vit":
        fields["representation_size"] = None
        fields["num_register_tokens"] = int(layout.distilled and not layout.two_heads)
        if pooler <= set(file) and labels:  # transformers' classifier reads the class token, not the pooler
            unused |= pooler
            notes.append(f"not used by the classifier: {', '.join(sorted(pooler))}")
        elif pooler <= set(file):
            fields["representation_size"] = file.shapes[f"{prefix}pooler.dense.weight"][0]
        if layout.two_heads:
            fields |= {"head_input": "two_tokens", "num_class_tokens": 2}
    format = f"transformers {FAMILIES[family]}, keys {'before' if old else 'since'} transformers v5"
    return CheckpointSpec(
        format=format if family != "hf_vit" else "hf_vit",
        fields=fields,
        key_mappings=lambda config: key_mappings(config, layout),
        not_specified=not_specified(fields) | {"problem_type"},
        unused=unused,
        assumptions=assumptions,
        notes=notes,
        image_processing=GOOGLE.at_size(fields["image_size"]),
        new_head=MAE_HEAD if family == "vit_mae" or any(name.startswith("decoder.decoder_") for name in file) else {},
    )


def _classifier_names(file: TensorFile, layout: TransformersLayout, requested: dict[str, Any]) -> tuple[int, set[str]]:
    """(number of labels, names that are not used)."""
    if layout.two_heads:
        labels = file.shapes["cls_classifier.weight"][0]
        return labels, {name for name in file if name.startswith("classifier.")}
    return linear_head(file, "classifier", requested)


def _fields(file: TensorFile, stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of our configuration that a config.json describes."""
    family = stored.get("model_type", "vit")
    if stored.get("pooler_act", "tanh") != "tanh":
        raise HFViTError(
            f"{file.path}: pooler_act '{stored['pooler_act']}' has no counterpart in hf_vit, whose pooler is tanh"
        )
    if family == "vit-hybrid":
        backbone = stored.get("backbone_config") or {}
        padding = str(backbone.get("global_padding", "same")).lower(), backbone.get("embedding_dynamic_padding", True)
        if padding != ("same", True):
            raise HFViTError(f"{file.path}: a BiT backbone without SAME padding has no counterpart in hf_vit")
    of_the_head = ("num_labels", "id2label", "label2id", *HEAD_FIELDS)  # the classifier tells how many there are
    config_dict = {key: value for key, value in stored.items() if key not in of_the_head}
    if family in ("vit_mae", "vit_msn", "ijepa"):
        theirs: Any = with_defaults(file, stored, family)
        patch = next(size for name, size in file.shapes.items() if name.endswith(PATCH))
        fields = common_fields(file, theirs, patch)
        config_dict = {name: value for name, value in fields.items() if value is not None} | {"model_type": "hf_vit"}
        if family == "ijepa":
            config_dict |= {"pooling": "gap", "use_class_token": False}
    try:
        config = HFViTConfig.from_dict(config_dict)
    except Exception as error:  # the strict dataclass raises its own error, and what validators run into
        raise HFViTError(f"{file.path}: config.json: {' '.join(str(error).split())}") from error
    for name in ("layer_norm_eps", "group_norm_eps", "weight_standardization_eps"):
        if not 0 < getattr(config, name) < 1:
            raise HFViTError(f"{file.path}: config.json says {name} {getattr(config, name)}, not between 0 and 1")
    names = [name for name in HFViTConfig.__annotations__ if not name.startswith("_")]
    return {name: getattr(config, name) for name in names} | {"problem_type": config.problem_type}


def _config_from_shapes(
    file: TensorFile, layout: TransformersLayout, requested: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What a config.json would say, for a state dict that lies alone, and what was assumed."""
    prefix, old, distilled = layout.prefix, layout.old, layout.distilled
    module = BEFORE_V5 if old else SINCE_V5
    first = layout.layer_prefix + module.layer.partition("{")[0]
    if any(".backbone." in name for name in file):
        raise HFViTError(f"{file.path}: a hybrid without its config.json; give the folder that holds both")
    fc1 = f"{first}0.{module.fc1}.weight"
    positions, cls_token = f"{prefix}embeddings.position_embeddings", f"{prefix}embeddings.cls_token"
    if cls_token not in file and positions in file:
        raise HFViTError(
            f"{file.path}: a ViT without class token (I-JEPA?) and without its config.json, which says its epsilon; "
            "give the folder that holds both"
        )
    for needed in (fc1, positions, cls_token):
        if needed not in file:
            raise HFViTError(f"{file.path}: incomplete, it has no '{needed}' and there is no config.json next to it")
    width, channels, patch_h, patch_w = file.shapes[f"{prefix}embeddings.patch_embeddings.projection.weight"]
    heads, assumptions = heads_for_width(file.path, width, requested)
    if "hidden_act" not in requested or "layer_norm_eps" not in requested:
        eps = "1e-12, transformers' default; MSN has 1e-6"
        assumptions.append(f"erf GELU and LayerNorm eps {eps} (hidden_act=, layer_norm_eps=)")
    config: dict[str, Any] = {
        "model_type": "deit" if distilled else "vit",
        "hidden_size": width,
        "num_hidden_layers": count_layers(file, re.escape(first) + r"(\d+)\."),
        "num_attention_heads": heads,
        "intermediate_size": file.shapes[fc1][0],
        "patch_size": patch_size(patch_h, patch_w),
        "num_channels": channels,
        "qkv_bias": f"{first}0.{module.query}.bias" in file,
    }
    rows = file.shapes[positions][1] - 1 - int(distilled)
    known = {name: value for name, value in config.items() if name != "model_type"}
    config["image_size"] = image_size_of_table(file.path, rows, known, requested)
    labels, _ = _classifier_names(file, layout, requested)
    config["id2label"] = {i: f"LABEL_{i}" for i in range(labels)}
    config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return config, assumptions + ["images squashed, mean = std = 0.5"]


# -- writing ----------------------------------------------------------------------------------------------------------


def source(config: HFViTConfig) -> str:
    """The model type that a configuration was read from."""
    return getattr(config, "source_model_type", "")


def model_type_for(config: HFViTConfig) -> str:
    """Which of the families a configuration is: that of its source where several compute the same."""
    if config.head_input == "two_tokens" or config.num_register_tokens or config.num_class_tokens == 2:
        return "deit"
    if config.pooling == "gap" and not config.use_class_token:
        return "ijepa"
    if source(config) == "vit_mae" and not config.num_labels and config.representation_size is None:
        return "vit_mae"
    return "vit_msn" if source(config) == "vit_msn" and config.representation_size is None else "vit"


def cannot(config: HFViTConfig) -> list[str]:
    """Features of a configuration that these families do not support."""
    kind = model_type_for(config)
    pooling = "gap" if kind == "ijepa" else "token"
    other = dict(config.family_fields)
    two = kind == "deit" and config.num_class_tokens == 2
    if two:
        other = {name: value for name, value in other.items() if name not in ("head_input", "num_class_tokens")}
    conditions = {
        "a ResNet stem (hybrid)": config.resnet_depths is not None,
        f'pooling other than "{pooling}"': config.pooling != pooling,
        "a representation layer under a classifier": (
            config.representation_size is not None and (bool(config.num_labels) or kind not in ("vit", "deit") or two)
        ),
        "register tokens": config.num_register_tokens > (1 if kind == "deit" else 0),
        "a distillation token without a head of its own": two
        and bool(config.num_labels) != (config.head_input == "two_tokens" and bool(config.num_labels)),
        "positions that are not a learned table over the grid": config.position_embedding_type != "learned",
        "LayerScale": config.layer_scale_init is not None,
        "QK-norm": config.qk_norm,
        ", ".join(f"{name}={value!r}" for name, value in other.items()): bool(other),
    }
    return [feature for feature, present in conditions.items() if present]


def write(config: HFViTConfig, dtype: torch.dtype) -> TransformersFolder:
    """A folder that transformers' own class loads; the class token has a row in the position table."""
    kind = model_type_for(config)
    entries = stated_sizes(config) | {
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": config.qkv_bias,
    }
    if kind in ("vit", "deit", "ijepa"):
        entries["pooler_output_size"] = config.representation_size
    stem = {"vit": "ViT", "deit": "DeiT", "ijepa": "IJepa", "vit_mae": "ViTMAE", "vit_msn": "ViTMSN"}[kind]
    head = bool(config.num_labels)
    two = kind == "deit" and config.num_class_tokens == 2
    # without a classifier and a pooler it goes out as a classifier with an Identity: the bare model has a pooler
    classifier = config.representation_size is None if kind in ("vit", "deit") and not two else head
    architecture = f"{stem}ForImageClassification{'WithTeacher' * two}" if classifier else f"{stem}Model"
    prefix = {"deit": "deit.", "ijepa": "ijepa."}.get(kind, "vit.") if classifier else ""
    layout = TransformersLayout(prefix, prefix, distilled=kind == "deit", two_heads=two)
    return TransformersFolder(config_json(kind, architecture, config, dtype, **entries), key_mappings(config, layout))
