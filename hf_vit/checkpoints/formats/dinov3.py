"""transformers' `dinov3_vit`, in and out; it has no classifier class, so only the encoder goes out.

Source: transformers 5.23 `models/dinov3_vit`. A new head reads class token and mean patch, as DINOv3's linear
evaluation does.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

import re
from typing import Any

import torch

from ...errors import HFViTError
from ...image_processing import IMAGENET_MEAN, IMAGENET_STD, ImageProcessing
from ...modeling.configuration_hf_vit import HFViTConfig
from ..spec import CheckpointSpec, linear_head
from ..tensor_file import TensorFile
from .encoder import EncoderNames, encoder_mappings, linear_classifier
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


MODEL_TYPES: tuple[str, ...] = ("dinov3_vit",)
PATCH = "embeddings.patch_embeddings.weight"
NAMES = EncoderNames(
    layer="layer.{n}.",
    norm1="norm1",
    norm2="norm2",
    patch="embeddings.patch_embeddings",
    final_norm="norm",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    fc1="mlp.up_proj",  # without a gate it is a plain MLP under the names of a gated one
    fc2="mlp.down_proj",
)
SINCE_V5 = EncoderNames(**(vars(NAMES) | {"layer": "model.layer.{n}."}))


def matches(file: TensorFile) -> bool:
    """Whether the names are those of DINOv3 in transformers."""
    return any(name == PATCH or name.endswith("." + PATCH) for name in file) and any(
        re.match(r"(.*\.)?layer\.0\.attention\.q_proj", name) for name in file
    )


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Take the architecture from config.json.

    Raises:
        HFViTError: no config.json, one of another file, or biases that `HFViTConfig` does not have.
    """
    stored = required_config(file, sidecars, MODEL_TYPES, "DINOv3 of transformers")
    theirs: Any = with_defaults(file, stored, "dinov3_vit")
    prefix = prefix_before(file, PATCH)
    names = SINCE_V5 if f"{prefix}model.layer.0.norm1.weight" in file else NAMES
    check_depth(file, re.escape(prefix + names.layer.partition("{")[0]) + r"(\d+)\.", theirs.num_hidden_layers)
    if theirs.query_bias != theirs.value_bias or (theirs.key_bias and not theirs.query_bias):
        raise HFViTError(f"{file.path}: biases of only some of query, key and value have no counterpart in hf_vit")
    if theirs.proj_bias != theirs.mlp_bias:
        raise HFViTError(f"{file.path}: biases of only some of the dense layers have no counterpart in hf_vit")
    if theirs.use_gated_mlp and theirs.hidden_act not in ("silu", "swish"):
        raise HFViTError(
            f"{file.path}: an MLP gated by {theirs.hidden_act} has no counterpart in hf_vit, which has silu"
        )
    fields = common_fields(file, theirs, file.shapes[prefix + PATCH]) | {
        "mlp_type": "swiglu" if theirs.use_gated_mlp else "mlp",
        "qkv_bias": theirs.query_bias,
        "key_bias": bool(theirs.key_bias),
        "dense_bias": theirs.proj_bias,
        "layer_scale_init": theirs.layerscale_value,
        "use_class_token": True,
        "class_token_has_position": False,
        "num_register_tokens": theirs.num_register_tokens,
        "position_embedding_type": "none",
        "rope": "dinov3",
        "rope_theta": theirs.rope_theta,
        "rope_rescale": theirs.pos_embed_rescale,
        "rope_jitter": theirs.pos_embed_jitter,
        "rope_shift": theirs.pos_embed_shift,
        "pooling": "token",
        "head_input": "token_and_mean",
    }
    labels, head = linear_head(file, "classifier", requested)
    fields |= class_names(file, stored, labels)
    unused, notes = unused_names(file, r"(.*\.)?(mask_token|inv_freq|periods)$")
    return CheckpointSpec(
        format=f"transformers dinov3_vit, keys {'since' if names is SINCE_V5 else 'before'} transformers v5",
        fields=fields,
        key_mappings=lambda config: encoder_mappings(config, names, prefix) + linear_classifier(config),
        not_specified=not_specified(fields) | {"rope_theta", "rope_rescale", "rope_jitter", "rope_shift"},
        unused=unused | head,
        notes=notes,
        image_processing=ImageProcessing((224, 224), None, "bilinear", 1 / 255, IMAGENET_MEAN, IMAGENET_STD),
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def cannot(config: HFViTConfig) -> list[str]:
    """Features of a configuration that the family does not support."""
    conditions = {
        "positions other than DINOv3's rotary ones": config.rope != "dinov3"
        or config.position_embedding_type != "none",
        "the rounded periods of DINOv3's own checkpoints (rope_bfloat16_periods=False)": config.rope_bfloat16_periods,
        "a classifier (transformers has no such class)": bool(config.num_labels),
        "no class token": not config.use_class_token,
        f"pooling={config.pooling!r}": config.pooling != "token",
        "blocks without LayerScale": config.layer_scale_init is None,
    }
    supported = {"mlp_type", "key_bias", "dense_bias", "head_input"}
    supported |= {name for name in config.family_fields if name.startswith("rope")}
    return unsupported_features(config, conditions, supported)


def write(config: HFViTConfig, dtype: torch.dtype) -> TransformersFolder:
    """The content of a folder for transformers' own class."""
    gated = config.mlp_type == "swiglu"
    entries = stated_sizes(config) | {
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu" if gated else config.hidden_act,
        "use_gated_mlp": gated,
        "layer_norm_eps": config.layer_norm_eps,
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and config.key_bias,
        "value_bias": config.qkv_bias,
        "proj_bias": config.dense_bias,
        "mlp_bias": config.dense_bias,
        "layerscale_value": float(config.layer_scale_init or 1.0),
        "num_register_tokens": config.num_register_tokens,
        "rope_theta": float(config.rope_theta or 100.0),
        "pos_embed_rescale": config.rope_rescale,
        "pos_embed_jitter": config.rope_jitter,
        "pos_embed_shift": config.rope_shift,
        "attention_dropout": config.attention_probs_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
    }
    config_dict = config_json("dinov3_vit", "DINOv3ViTModel", config, dtype, **entries)
    zeros: dict[str, tuple[int, ...]] = {"embeddings.mask_token": (1, 1, config.hidden_size)}
    if not config.num_register_tokens:
        zeros["embeddings.register_tokens"] = (1, 0, config.hidden_size)
    return TransformersFolder(config_dict, encoder_mappings(config, NAMES), zeros)
