"""transformers' `beit` and `data2vec-vision`, in and out: relative position biases, the norm after the mean.

BEiT v2 has the same layout. Sources: transformers 5.23 `models/beit`, `models/data2vec`, `conversion_mapping.py`.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

import re
from typing import Any

import torch

from ...errors import HFViTError
from ...image_processing import ImageProcessing
from ...modeling.configuration_hf_vit import HFViTConfig
from ..spec import CheckpointSpec, linear_head
from ..tensor_file import TensorFile
from .encoder import EncoderNames, model_mappings
from .transformers_folder import (
    TransformersFolder,
    check_depth,
    class_names,
    common_fields,
    config_json,
    not_specified,
    prefix_before,
    required_config,
    stated_sizes,
    unsupported_features,
    unused_names,
    with_defaults,
)


MODEL_TYPES: tuple[str, ...] = ("beit", "data2vec-vision")
PATCH = "embeddings.patch_embeddings.projection.weight"
QUERY_BIAS = (".attention.attention.query.bias", ".attention.q_proj.bias")  # and the key has none
_TABLE = "relative_position_bias.relative_position_bias_table"
BEFORE_V5 = EncoderNames(
    layer="encoder.layer.{n}.",
    norm1="layernorm_before",
    norm2="layernorm_after",
    pooled_norm="pooler.layernorm",
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    output="attention.output.dense",
    fc1="intermediate.dense",
    fc2="output.dense",
    layer_scale=("lambda_1", "lambda_2"),
    relative_bias=f"attention.attention.{_TABLE}",
    shared_relative_bias=f"encoder.{_TABLE}",
)
SINCE_V5 = EncoderNames(
    layer="layers.{n}.",
    norm1="layernorm_before",
    norm2="layernorm_after",
    pooled_norm="pooler.layernorm",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    layer_scale=("lambda_1", "lambda_2"),
    relative_bias=_TABLE,
    shared_relative_bias="shared_position_bias.relative_position_bias_table",
)
UNUSED = r"(.*\.)?(mask_token|relative_position_index|position_ids)$|lm_head\.|(decode_head|auxiliary_head|fpn\d?)\."


def matches(file: TensorFile) -> bool:
    """Whether the names are those of BEiT or data2vec in transformers."""
    return any(name.endswith(PATCH) for name in file) and any(
        re.search(r"layers?\.0\.(lambda_1|attention\.attention\.relative_position_bias)", name)
        or re.match(r"(beit|data2vec_vision)\.|encoder\.relative_position_bias", name)
        or (name.endswith(QUERY_BIAS) and name.replace("query", "key").replace("q_proj", "k_proj") not in file)
        for name in file
    )


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Take the architecture from config.json; which norm there is, from the file.

    Raises:
        HFViTError: no config.json, one of another file, or a native grid that is not square.
    """
    stored = required_config(file, sidecars, MODEL_TYPES, "BEiT of transformers")
    model_type = stored["model_type"]
    theirs: Any = with_defaults(file, stored, model_type)
    prefix = prefix_before(file, PATCH)
    old = any(name.startswith(f"{prefix}encoder.layer.") for name in file)
    names = BEFORE_V5 if old else SINCE_V5
    check_depth(file, re.escape(prefix + names.layer.partition("{")[0]) + r"(\d+)\.", theirs.num_hidden_layers)
    layer_bias, shared_bias = theirs.use_relative_position_bias, theirs.use_shared_relative_position_bias
    fields = common_fields(file, theirs, file.shapes[prefix + PATCH]) | {
        "key_bias": False,
        "use_class_token": True,
        "class_token_has_position": theirs.use_absolute_position_embeddings,
        "num_register_tokens": 0,
        "position_embedding_type": "learned" if theirs.use_absolute_position_embeddings else "none",
        "relative_position_bias": (
            ("both" if shared_bias else "layer") if layer_bias else "shared" if shared_bias else None
        ),
        "layer_scale_init": theirs.layer_scale_init_value if theirs.layer_scale_init_value > 0 else None,
        "pooling": "gap" if theirs.use_mean_pooling else "token",
    }
    size = fields["image_size"]
    if fields["relative_position_bias"] is not None and not isinstance(size, int) and size[0] != size[1]:
        raise HFViTError(
            f"{file.path}: a table of relative positions for {size}, which transformers reads as (width, height): "
            "not loaded, its outputs would differ"
        )
    names, fields["final_norm"] = _final_norm(file, names, prefix, theirs.use_mean_pooling)
    labels, head = linear_head(file, "classifier", requested)
    fields |= class_names(file, stored, labels)
    unused, notes = unused_names(file, UNUSED)
    return CheckpointSpec(
        format=f"transformers {model_type}, keys {'before' if old else 'since'} transformers v5",
        fields=fields,
        key_mappings=lambda config: model_mappings(config, names, prefix),
        not_specified=not_specified(fields) - {"final_norm"},
        unused=unused | head,
        notes=notes,
        image_processing=ImageProcessing((224, 224), None, "bicubic").at_size(size),
    )


def _final_norm(file: TensorFile, names: EncoderNames, prefix: str, mean: bool) -> tuple[EncoderNames, str]:
    """Where the last norm stands: a bare encoder of mean pooling has none, masked image modeling one outside."""
    if not mean:
        return names, "tokens"
    if f"{prefix}pooler.layernorm.weight" in file:
        return names, "pooled"
    if prefix and "layernorm.weight" in file:
        return EncoderNames(**(vars(names) | {"pooled_norm": "/layernorm"})), "pooled"
    return names, "none"


# -- writing ----------------------------------------------------------------------------------------------------------


def _is_bare_data2vec(config: HFViTConfig) -> bool:
    """data2vec's model has no pooler, and so no last norm; BEiT's has one."""
    return getattr(config, "source_model_type", "") == "data2vec-vision" and not config.num_labels


def cannot(config: HFViTConfig) -> list[str]:
    """Features of a configuration that these families do not support."""
    mean = config.pooling == "gap"
    conditions = {
        "a bias of the key": config.key_bias,
        "no class token": not config.use_class_token,
        "a class token with a position of its own": config.has_class_position != config.has_position_table,
        "positions that are computed": config.position_embedding_type not in ("learned", "none"),
        f"pooling={config.pooling!r} with final_norm={config.final_norm!r}": (
            config.final_norm != ("none" if _is_bare_data2vec(config) else "pooled")
            if mean
            else config.final_norm != "tokens"
        ),
        f"pooling={config.pooling!r}": config.pooling not in ("gap", "token"),
        "register tokens": config.num_register_tokens > 0,
    }
    supported = {"key_bias", "final_norm", "relative_position_bias"}
    return unsupported_features(config, conditions, supported)


def write(config: HFViTConfig, dtype: torch.dtype) -> TransformersFolder:
    """The content of a folder for transformers' own class."""
    kind = "data2vec-vision" if getattr(config, "source_model_type", "") == "data2vec-vision" else "beit"
    stem, prefix = ("Beit", "beit.") if kind == "beit" else ("Data2VecVision", "data2vec_vision.")
    entries = stated_sizes(config) | {
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
        "layer_scale_init_value": float(config.layer_scale_init or 0.0),
        "use_absolute_position_embeddings": config.has_position_table,
        "use_relative_position_bias": config.relative_position_bias in ("layer", "both"),
        "use_shared_relative_position_bias": config.relative_position_bias in ("shared", "both"),
        "use_mean_pooling": config.pooling == "gap",
        "use_mask_token": False,
    }
    architecture = f"{stem}ForImageClassification" if config.num_labels else f"{stem}Model"
    config_dict = config_json(kind, architecture, config, dtype, **entries)
    return TransformersFolder(config_dict, model_mappings(config, BEFORE_V5, prefix if config.num_labels else ""))
