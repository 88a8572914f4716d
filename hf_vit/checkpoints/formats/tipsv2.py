"""transformers' TIPSv2 vision encoder, in and out: the names of its own code, with a second class token as register.

In memory transformers names it as DINOv2: files saved from a state dict have these names.

Source: transformers 5.23 `models/tipsv2`, `conversion_mapping.py`.

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
from . import dinov2
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


MODEL_TYPES: tuple[str, ...] = ("tipsv2", "tipsv2_vision_model")
NAMES = EncoderNames(
    layer="blocks.{n}.",
    norm1="norm1",
    norm2="norm2",
    patch="patch_embed.proj",
    cls_token="cls_token",
    positions="pos_embed",
    registers="register_tokens",
    final_norm="norm",
    qkv_weight="attn.qkv.weight",
    qkv_bias="attn.qkv.bias",
    output="attn.proj",
    fc1="mlp.c_fc",
    fc2="mlp.c_proj",
    gate_up="mlp.w12",
    down="mlp.w3",
    layer_scale=("ls1.gamma", "ls2.gamma"),
)


def matches(file: TensorFile) -> bool:
    """Whether the names may be those of TIPSv2: DINOv2's own giant and transformers' DINOv2 have the same."""
    return any(name.endswith(("blocks.0.mlp.c_fc.weight", "register_tokens")) for name in file)


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Take the architecture from config.json, its `vision_config` if there are two towers.

    Raises:
        HFViTError: no config.json, or one of another file.
    """
    stored = required_config(file, sidecars, MODEL_TYPES, "TIPSv2")
    model_type = stored["model_type"]
    vision = stored.get("vision_config") or {} if model_type == "tipsv2" else stored
    theirs: Any = with_defaults(file, vision, "tipsv2_vision_model")
    names = dinov2.SINCE_V5 if any(name.endswith(dinov2.PATCH) for name in file) else NAMES
    patch = f"{names.patch}.weight"
    prefix = prefix_before(file, patch)
    check_depth(file, re.escape(prefix + names.layer.partition("{")[0]) + r"(\d+)\.", theirs.num_hidden_layers)
    gated = bool(theirs.use_swiglu_ffn)
    down = f"{prefix}{names.layer.format(n=0)}{names.down if gated else names.fc2}.weight"
    if down not in file:
        raise HFViTError(f"{file.path}: incomplete, it has no '{down}'")
    fields = common_fields(file, theirs, file.shapes[prefix + patch]) | {
        "intermediate_size": file.shapes[down][1],
        "mlp_type": "swiglu" if gated else "mlp",
        "layer_scale_init": theirs.layerscale_value,
        "use_class_token": True,
        "class_token_has_position": True,
        "num_register_tokens": theirs.num_register_tokens,
        "position_embedding_type": "learned",
        "position_interpolation": "bilinear_antialias",
        "pooling": "token",
    }
    labels, head = linear_head(file, "classifier", requested)
    fields |= class_names(file, stored, labels)
    unused, notes = unused_names(file, r"(.*\.)?mask_token$|(text_encoder|text_model|temperature|logit_scale)\b")
    return CheckpointSpec(
        format=f"transformers {model_type}",
        fields=fields,
        key_mappings=lambda config: model_mappings(config, names, prefix),
        not_specified=not_specified(fields),
        unused=unused | head,
        notes=notes,
        image_processing=ImageProcessing((448, 448), None, "bilinear", 1 / 255, None, None).at_size(
            fields["image_size"]
        ),
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def cannot(config: HFViTConfig) -> list[str]:
    """Features of a configuration that the family does not support."""
    conditions = {
        "no class token": not config.use_class_token or not config.has_class_position,
        "positions other than a learned table": config.position_embedding_type != "learned",
        "a refit of positions other than bilinear": config.position_interpolation != "bilinear_antialias",
        f"pooling={config.pooling!r}": config.pooling != "token",
        "a classifier (transformers has no such class)": bool(config.num_labels),
        "blocks without LayerScale": config.layer_scale_init is None,
    }
    return unsupported_features(config, conditions, {"mlp_type"})


def write(config: HFViTConfig, dtype: torch.dtype) -> TransformersFolder:
    """The content of a folder for transformers' own class."""
    gated = config.mlp_type == "swiglu"
    entries = stated_sizes(config) | {
        "mlp_ratio": config.intermediate_size / config.hidden_size * (1.5 if gated else 1),
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": config.qkv_bias,
        "layerscale_value": float(config.layer_scale_init or 1.0),
        "use_swiglu_ffn": gated,
        "num_register_tokens": config.num_register_tokens,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
    }
    config_dict = config_json("tipsv2_vision_model", "Tipsv2VisionModel", config, dtype, **entries)
    zeros: dict[str, tuple[int, ...]] = {"mask_token": (1, config.hidden_size)}
    if not config.num_register_tokens:
        zeros["register_tokens"] = (1, 0, config.hidden_size)
    return TransformersFolder(config_dict, model_mappings(config, NAMES), zeros)
