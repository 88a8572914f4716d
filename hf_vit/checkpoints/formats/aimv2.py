"""transformers' AIMv2 vision encoder, in and out: RMSNorm, SwiGLU, no biases, a norm of the patches.

Source: transformers 5.23 `models/aimv2`. Its own code works at the native size only (the native variant at any); here
a learned table is refitted bicubically.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

import re
from typing import Any

import torch

from ...errors import HFViTError
from ...image_processing import CLIP_MEAN, CLIP_STD, ImageProcessing
from ...modeling.configuration_hf_vit import HFViTConfig
from ..spec import CheckpointSpec, linear_head
from ..tensor_file import TensorFile
from .encoder import FLAT_TABLE, EncoderNames, model_mappings
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


MODEL_TYPES: tuple[str, ...] = ("aimv2", "aimv2_vision_model")
PATCH = "embeddings.patch_embed.weight"
NAMES = EncoderNames(
    layer="encoder.layers.{n}.",
    norm1="rms_norm1",
    norm2="rms_norm2",
    patch="embeddings.patch_embed",
    patch_norm="embeddings.rms_norm",
    positions="embeddings.position_embedding.weight",
    positions_transform=FLAT_TABLE,
    final_norm="rms_norm",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.out_proj",
    gate="ffn.gate_proj",
    up="ffn.up_proj",
    down="ffn.down_proj",
)
MAP_HEAD = {"probe": "head.cls_token", "k": "head.k_proj", "v": "head.v_proj", "o": "head.output_proj"}
OUTSIDE = r"(text_model|text_projection|visual_projection|logit_scale)\b|(.*\.)?position_ids$"


def matches(file: TensorFile) -> bool:
    """Whether a vision encoder of AIMv2 is there."""
    return any(name == PATCH or name.endswith("." + PATCH) for name in file)


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Take the architecture from config.json, its `vision_config` if there are two towers.

    Raises:
        HFViTError: no config.json, one of another file, or biases that `HFViTConfig` does not have.
    """
    stored = required_config(file, sidecars, MODEL_TYPES, "AIMv2")
    model_type = stored["model_type"]
    vision = stored.get("vision_config") or {} if model_type == "aimv2" else stored
    theirs: Any = with_defaults(file, vision, "aimv2_vision_model")
    prefix = prefix_before(file, PATCH)
    check_depth(file, re.escape(f"{prefix}encoder.layers.") + r"(\d+)\.", theirs.num_hidden_layers)
    if theirs.qkv_bias != theirs.mlp_bias:
        raise HFViTError(f"{file.path}: biases of only some of the dense layers have no counterpart in hf_vit")
    fields = common_fields(file, theirs, file.shapes[prefix + PATCH]) | {
        "hidden_act": theirs.hidden_act,
        "layer_norm_eps": theirs.rms_norm_eps,
        "norm_type": "rms",
        "mlp_type": "swiglu",
        "qkv_bias": theirs.qkv_bias,
        "dense_bias": theirs.mlp_bias,
        "patch_norm": True,
        "use_class_token": False,
        "class_token_has_position": False,
        "num_register_tokens": 0,
        "position_embedding_type": "sincos_aim" if theirs.is_native else "learned",
        "pooling": "map" if theirs.use_head else "gap",
        "layer_scale_init": None,
    }
    if theirs.use_head:
        fields |= {"map_query_proj": False, "map_mlp": False}
    labels, head = linear_head(file, "classifier", requested)
    fields |= class_names(file, stored, labels)
    unused, notes = unused_names(file, OUTSIDE)
    if not theirs.is_native:
        notes.append("other sizes by a bicubic refit of its table; AIMv2's own code has none")
    return CheckpointSpec(
        format=f"transformers {model_type}",
        fields=fields,
        key_mappings=lambda config: model_mappings(config, NAMES, prefix, MAP_HEAD),
        not_specified=not_specified(fields),
        unused=unused | head,
        notes=notes,
        image_processing=ImageProcessing(224, (224, 224), "bicubic", 1 / 255, CLIP_MEAN, CLIP_STD).at_size(
            fields["image_size"]
        ),
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def cannot(config: HFViTConfig) -> list[str]:
    """Features of a configuration that the family does not support."""
    conditions = {
        "LayerNorm": config.norm_type != "rms",
        "patches without a norm": not config.patch_norm,
        "an MLP without a gate": config.mlp_type != "swiglu",
        "a class token": bool(config.use_class_token),
        "a classifier (transformers has no such class)": bool(config.num_labels),
        f"pooling={config.pooling!r}": config.pooling not in ("map", "gap"),
        "an attention pooling with query projection or MLP": (
            config.pooling == "map" and (config.map_query_proj or config.map_mlp)
        ),
        "biases of only some of the dense layers": config.qkv_bias != config.dense_bias,
        "positions of that kind": config.position_embedding_type not in ("learned", "sincos_aim"),
        "LayerScale": config.layer_scale_init is not None,
    }
    supported = {"norm_type", "patch_norm", "mlp_type", "dense_bias", "map_query_proj", "map_mlp"} | {
        "position_embedding_type"
    }
    return unsupported_features(config, conditions, supported)


def write(config: HFViTConfig, dtype: torch.dtype) -> TransformersFolder:
    """The content of a folder for transformers' own class."""
    entries = stated_sizes(config) | {
        "patch_size": config.patch_size_hw[0],
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.layer_norm_eps,
        "qkv_bias": config.qkv_bias,
        "mlp_bias": config.dense_bias,
        "attention_dropout": config.attention_probs_dropout_prob,
        "use_head": config.pooling == "map",
        "is_native": config.position_embedding_type == "sincos_aim",
    }
    config_dict = config_json("aimv2_vision_model", "Aimv2VisionModel", config, dtype, **entries)
    return TransformersFolder(config_dict, model_mappings(config, NAMES, "", MAP_HEAD))
