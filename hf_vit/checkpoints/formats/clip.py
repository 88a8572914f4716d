"""CLIP's and SigLIP's vision towers: transformers' `clip`, `metaclip_2`, `siglip`, `siglip2`, and open_clip's layout.

Of a checkpoint of two towers the vision tower is read and the rest named. CLIP's classifier of transformers reads the
mean patch of the last block without any norm, SigLIP's the mean of the normed patches; a new head reads the pooled
vector.

Sources: transformers 5.23 `models/clip`, `models/siglip`, `models/siglip2`; open_clip 89fb801 `transformer.py`.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

import math
import re
from typing import Any

import torch

from ...errors import HFViTError
from ...image_processing import CLIP_MEAN, CLIP_STD, ImageProcessing
from ...modeling.configuration_hf_vit import HFViTConfig
from ..mapping import SAME, Transform
from ..spec import CheckpointSpec, linear_head
from ..tensor_file import TensorFile
from .encoder import (
    FLAT_TABLE,
    FLAT_TOKEN,
    EncoderNames,
    model_mappings,
)
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


# A model type of two towers or a classifier, and that of its vision tower.
TOWERS = {
    "clip": "clip_vision_model",
    "metaclip_2": "metaclip_2_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
}
MODEL_TYPES: tuple[str, ...] = (*TOWERS, *TOWERS.values())
PATCH = "embeddings.patch_embedding.weight"
OUTSIDE = r"(text_model|text_projection|visual_projection|logit_scale|logit_bias)\b|(.*\.)?position_ids$"
MAP_HEAD = {
    "probe": "head.probe",
    "in_proj": "head.attention.in_proj",
    "o": "head.attention.out_proj",
    "norm": "head.layernorm",
    "fc1": "head.mlp.fc1",
    "fc2": "head.mlp.fc2",
}


def names(patch: int | None = None, channels: int = 3) -> EncoderNames:
    """Names of a tower; `patch`: of a NaFlex model, whose projection is a linear layer over flattened patches."""
    flat = Transform(
        lambda t: [t.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2)],  # (D, P P C) -> (D, C, P, P)
        lambda t: [t.permute(0, 2, 3, 1).flatten(1)],
    )
    return EncoderNames(
        layer="encoder.layers.{n}.",
        norm1="layer_norm1",
        norm2="layer_norm2",
        patch="embeddings.patch_embedding",
        patch_transform=SAME if patch is None else flat,
        cls_token="embeddings.class_embedding",
        cls_transform=FLAT_TOKEN,
        positions="embeddings.position_embedding.weight",
        positions_transform=FLAT_TABLE,
        pre_layernorm="pre_layrnorm",  # their spelling
        final_norm="post_layernorm",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
    )


def matches(file: TensorFile) -> bool:
    """Whether a vision tower of CLIP or SigLIP is there, in transformers' names."""
    return any(name == PATCH or name.endswith("." + PATCH) for name in file)


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Take the architecture from config.json, its `vision_config` if there are two towers.

    Raises:
        HFViTError: no config.json, or one of another file.
    """
    stored = required_config(file, sidecars, MODEL_TYPES, "a vision tower of CLIP or SigLIP")
    model_type = stored["model_type"]
    tower = TOWERS.get(model_type, model_type)
    vision = stored.get("vision_config") or {} if model_type in TOWERS else stored
    theirs: Any = with_defaults(file, vision, tower)
    prefix = prefix_before(file, PATCH)
    is_clip = "siglip" not in tower
    flat = tower == "siglip2_vision_model" and len(file.shapes[prefix + PATCH]) == 2
    check_depth(file, re.escape(f"{prefix}encoder.layers.") + r"(\d+)\.", theirs.num_hidden_layers)
    fields = (_naflex_fields if flat else common_fields)(file, theirs, file.shapes[prefix + PATCH])
    labels, head = linear_head(file, "classifier", requested)
    uses_map = not is_clip and getattr(theirs, "vision_use_head", True)
    fields |= {
        "patch_bias": not is_clip,
        "pre_layernorm": is_clip,
        "final_norm": "pooled" if is_clip else "tokens",
        "use_class_token": is_clip,
        "class_token_has_position": is_clip,
        "num_register_tokens": 0,
        "position_embedding_type": "learned",
        "pooling": "token" if is_clip else "map" if uses_map else "gap",
        "head_input": "pooled" if not labels else "mean_unnormalised" if is_clip else "mean",
        "layer_scale_init": None,
    }
    if flat:
        fields["position_interpolation"] = "bilinear_antialias"
    tensor_names = names(theirs.patch_size if flat else None, theirs.num_channels)
    unused, notes = unused_names(file, OUTSIDE)
    fields |= class_names(file, stored, labels)
    return CheckpointSpec(
        format=f"transformers {model_type}" + (", its vision tower" if unused else ""),
        fields=fields,
        key_mappings=lambda config: model_mappings(config, tensor_names, prefix, MAP_HEAD),
        not_specified=not_specified(fields),
        unused=unused | head,
        notes=notes,
        image_processing=_clip_processing(is_clip, fields["image_size"]),
        new_head={"head_input": "pooled"},
    )


def _naflex_fields(file: TensorFile, theirs: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """SigLIP 2 NaFlex at one square size: that of its table."""
    patch, channels, side = theirs.patch_size, theirs.num_channels, math.isqrt(theirs.num_patches)
    if size[1] != patch**2 * channels or side**2 != theirs.num_patches:
        raise HFViTError(f"{file.path}: config.json says another patch_size or num_patches than the file")
    fields = common_fields(file, theirs, (size[0], channels, patch, patch))
    return fields | {"image_size": side * patch}


def _clip_processing(is_clip: bool, image_size: Any) -> ImageProcessing:
    if is_clip:
        return ImageProcessing(224, (224, 224), "bicubic", 1 / 255, CLIP_MEAN, CLIP_STD).at_size(image_size)
    return ImageProcessing((224, 224), None, "bicubic").at_size(image_size)


# -- writing ----------------------------------------------------------------------------------------------------------


def cannot_clip(config: HFViTConfig) -> list[str]:
    """Features of a configuration that CLIP does not support."""
    conditions = {
        "no LayerNorm before the blocks": not config.pre_layernorm,
        "a bias of the patch projection": config.patch_bias,
        "a last norm of all tokens": config.final_norm != "pooled",
        f"pooling={config.pooling!r}": config.pooling != "token",
        "a classifier of the pooled vector": bool(config.num_labels) and config.head_input != "mean_unnormalised",
    }
    supported = {"pre_layernorm", "patch_bias", "final_norm", "head_input"}
    return unsupported_features(config, conditions | _common_conditions(config), supported)


def cannot_siglip(config: HFViTConfig) -> list[str]:
    """Features of a configuration that SigLIP does not support."""
    conditions = {
        "a class token": bool(config.use_class_token),
        f"pooling={config.pooling!r}": config.pooling not in ("map", "gap"),
        "a last norm that is not of all tokens": config.final_norm != "tokens",
        "a classifier of the pooled vector": bool(config.num_labels) and config.head_input != "mean",
        "images that are not square": config.grid_size[0] != config.grid_size[1],
    }
    return unsupported_features(config, conditions | _common_conditions(config), {"head_input"})


def _common_conditions(config: HFViTConfig) -> dict[str, bool]:
    return {
        "positions other than a learned table": config.position_embedding_type != "learned",
        "LayerScale": config.layer_scale_init is not None,
        "register tokens": config.num_register_tokens > 0,
        "patches that are not square": config.patch_size_hw[0] != config.patch_size_hw[1],
        "query, key and value without bias": not config.qkv_bias,
    }


def write_clip(config: HFViTConfig, dtype: torch.dtype) -> TransformersFolder:
    """A vision model of CLIP, or its classifier."""
    kind = "metaclip_2" if getattr(config, "source_model_type", "").startswith("metaclip_2") else "clip"
    stem = "MetaClip2" if kind == "metaclip_2" else "CLIP"
    vision = _vision_entries(config)
    if config.num_labels:
        config_dict = config_json(kind, f"{stem}ForImageClassification", config, dtype, vision_config=vision)
        return TransformersFolder(config_dict, model_mappings(config, names(), "vision_model.", MAP_HEAD))
    config_dict = config_json(f"{kind}_vision_model", f"{stem}VisionModel", config, dtype, **vision)
    return TransformersFolder(config_dict, model_mappings(config, names(), "", MAP_HEAD))


def write_siglip(config: HFViTConfig, dtype: torch.dtype) -> TransformersFolder:
    """A vision model of SigLIP, or its classifier; of SigLIP 2 NaFlex where positions are refitted as there."""
    flat = config.position_interpolation == "bilinear_antialias"
    kind, stem = ("siglip2", "Siglip2") if flat else ("siglip", "Siglip")
    vision = _vision_entries(config) | {"vision_use_head": config.pooling == "map"}
    if flat:
        vision["num_patches"] = math.prod(config.grid_size)
        del vision["image_size"]
    tensor_names = names(config.patch_size_hw[0] if flat else None, config.num_channels)
    if config.num_labels:
        config_dict = config_json(kind, f"{stem}ForImageClassification", config, dtype, vision_config=vision)
        return TransformersFolder(config_dict, model_mappings(config, tensor_names, "vision_model.", MAP_HEAD))
    config_dict = config_json(f"{kind}_vision_model", f"{stem}VisionModel", config, dtype, **vision)
    return TransformersFolder(config_dict, model_mappings(config, tensor_names, "", MAP_HEAD))


def _vision_entries(config: HFViTConfig) -> dict[str, Any]:
    return stated_sizes(config) | {
        "patch_size": config.patch_size_hw[0],
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "attention_dropout": config.attention_probs_dropout_prob,
    }
