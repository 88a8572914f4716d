"""Write a network for timm: the entry point that builds it, its arguments, and the names of tensors.

timm's code ties epsilon, activation and positions to the entry point, so one is chosen that has them; sizes are
arguments. Source: pytorch-image-models 1.0.31.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

import json
from collections.abc import Callable
from typing import Any

from ...image_processing import ImageProcessing
from ...modeling.configuration_hf_vit import PRESETS, HFViTConfig
from ..spec import label_names
from .timm import CONFIG_KEY, HYBRID_NUMERICS, NUMERICS, Style


def is_eva(config: HFViTConfig) -> bool:
    """Whether timm's Eva class builds it: rotary positions, or no bias of the key."""
    return config.rope is not None or (config.qkv_bias and not config.key_bias and not is_beit(config))


def is_beit(config: HFViTConfig) -> bool:
    """Whether timm's Beit class builds it: relative positions."""
    return config.relative_position_bias is not None


def style_of(config: HFViTConfig) -> Style:
    """Names and packing of the class that builds it."""
    eva = is_eva(config)
    rms = config.norm_type == "rms"
    return Style(
        gamma=eva or is_beit(config),
        fused=not (config.mlp_norm and eva),
        packed=not rms and not (eva and (config.mlp_norm or config.rope == "dinov3")),
        registers_in_table=config.num_register_tokens > 0 and config.has_class_position and config.has_position_table,
        distilled=config.head_input == "two_tokens" and config.num_class_tokens == 2,
    )


CANNOT: tuple[tuple[str, Callable[[HFViTConfig], bool]], ...] = (
    ("a representation layer", lambda c: c.representation_size is not None),
    ('pooling="first"', lambda c: c.pooling == "first"),
    ("sine-cosine positions", lambda c: c.position_embedding_type in ("sincos2d", "sincos_aim")),
    ("positions along the sequence", lambda c: c.position_embedding_type == "learned1d"),
    (
        "attention pooling over class or register tokens",
        lambda c: c.pooling == "map" and c.num_prefix_tokens > 0 and not c.pre_layernorm,
    ),
    ("QK-norm in the attention pooling", lambda c: c.pooling == "map" and c.qk_norm),
    ("attention pooling without query projection or MLP", lambda c: c.pooling == "map" and not c.map_mlp),
    (
        "a classifier that reads other than the pooled vector",
        lambda c: bool(c.num_labels) and c.head_input != "pooled" and not style_of(c).distilled,
    ),
    (
        "several class tokens",
        lambda c: bool(c.use_class_token) and c.num_class_tokens > 1 and not style_of(c).distilled,
    ),
    ("relative positions shared by blocks", lambda c: c.relative_position_bias in ("shared", "both")),
    ("periods rounded to bfloat16", lambda c: c.rope_bfloat16_periods),
    ("rotary positions beside RMSNorm", lambda c: c.rope is not None and c.norm_type == "rms"),
    (
        "no last norm for a mean over patches",
        lambda c: c.final_norm == "none" and c.pooling == "gap" and not c.pre_layernorm,
    ),
    (
        "a norm of the mean under a class that has none",
        lambda c: c.final_norm == "pooled" and c.pooling not in ("token", "gap"),
    ),
)


def timm_numerics(config: HFViTConfig) -> dict[str, Any]:
    """Fields whose values timm's entry point fixes, without an argument to change them."""
    numerics = {key: value for key, value in NUMERICS.items() if key != "position_interpolation"}
    if config.pre_layernorm or config.rope == "dinov3" or config.norm_type == "rms":
        numerics["layer_norm_eps"] = 1e-5
    if config.pre_layernorm and config.hidden_act == "quick_gelu" and config.rope is None:
        numerics["hidden_act"] = "quick_gelu"
    if config.mlp_type == "swiglu":
        numerics.pop("hidden_act")  # silu always
    return numerics | ({} if config.resnet_depths is None else HYBRID_NUMERICS)


def header(config: HFViTConfig, fields: dict[str, Any], processing: ImageProcessing) -> dict[str, str]:
    """Header of a safetensors file in timm's names, from which `timm.read` restores the configuration."""
    pretrained_cfg = processing.to_timm(config.num_channels, config.image_size_hw)
    stored = {"fields": fields, "style": vars(style_of(config)), "pretrained_cfg": pretrained_cfg}
    return {"format": "pt", CONFIG_KEY: json.dumps(stored)}


def folder_config(config: HFViTConfig, processing: ImageProcessing) -> dict[str, Any]:
    """A config.json with which `timm.create_model("local-dir:FOLDER")` builds this network."""
    height, width = config.image_size_hw
    pool = {"token": "token", "gap": "avg", "map": "map", "prefix_mean": "token"}[config.pooling]
    ratio = config.intermediate_size / config.hidden_size
    if style_of(config).packed and config.mlp_type == "swiglu" and not is_eva(config):
        ratio *= 2  # SwiGLUPacked counts both halves
    args: dict[str, Any] = {
        "img_size": [height, width],
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "init_values": config.layer_scale_init,
        "in_chans": config.num_channels,
    }
    if config.resnet_depths is None:
        args["patch_size"] = list(config.patch_size_hw)
    args |= _class_arguments(config, pool)
    return {
        "architecture": architecture(config),
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": {
            **processing.to_timm(config.num_channels, config.image_size_hw),
            "num_classes": config.num_labels,
            "pool_size": None,
            "first_conv": "patch_embed.proj" if config.resnet_depths is None else "patch_embed.backbone.stem.conv",
            "classifier": ["head", "head_dist"] if style_of(config).distilled else "head",
            "label_names": label_names(config),
        },
    }


def _class_arguments(config: HFViTConfig, pool: str) -> dict[str, Any]:
    """Arguments that only one of timm's classes has."""
    if is_beit(config):
        return {"global_pool": pool, "use_rel_pos_bias": True, "use_abs_pos_emb": config.has_position_table}
    if is_eva(config):
        args = {
            "global_pool": pool,
            "class_token": bool(config.use_class_token),
            "num_reg_tokens": config.num_register_tokens,
            "no_embed_class": not config.has_class_position,
            "use_abs_pos_emb": config.has_position_table,
            "use_fc_norm": config.final_norm == "pooled" and pool == "avg",
        }
        if config.rope == "axial":
            reference = config.rope_reference_grid
            args |= {
                "ref_feat_shape": list(_grid_pair(reference)) if reference != "image" else None,
                "rope_temperature": float(config.rope_theta or 0),
                "rope_grid_offset": float(config.rope_offset),
                "rope_grid_indexing": "xy" if config.rope_axes == "xy" else "ij",
            }
        return args
    if style_of(config).distilled:
        return {}
    args = {
        "qk_norm": config.qk_norm,
        "class_token": bool(config.use_class_token),
        "no_embed_class": not config.has_class_position,
        "reg_tokens": config.num_register_tokens,
        "fc_norm": config.final_norm == "pooled" and pool == "avg",
        "global_pool": pool,
    }
    if config.final_norm == "none":
        args["final_norm"] = False
    if config.norm_type == "rms":
        args["proj_bias"] = config.dense_bias
    acts = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
    if config.hidden_act in acts and config.mlp_type == "mlp":
        args["act_layer"] = acts[config.hidden_act]
    if not config.has_position_table:
        args["pos_embed"] = "none"
    return args


def _grid_pair(grid: Any) -> tuple[int, int]:
    return (grid, grid) if isinstance(grid, int) else (int(grid[0]), int(grid[1]))


HYBRIDS = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}


def has_entry_point(config: HFViTConfig) -> bool:
    """Whether `timm.create_model` can build this network: of the hybrids only those with a published ResNet."""
    if config.resnet_depths is None:
        return True
    patch = 8 if not config.resnet_depths else 1
    published = tuple(config.resnet_depths) in HYBRIDS and config.resnet_width_factor == 1
    return published and config.patch_size_hw == (patch, patch)


def architecture(config: HFViTConfig) -> str:
    """timm's entry point of the same kind; sizes that differ from it are in the arguments next to it."""
    if config.resnet_depths is not None:
        return HYBRIDS.get(tuple(config.resnet_depths), HYBRIDS[(2, 2, 2, 2)])
    swiglu = config.mlp_type == "swiglu"
    if is_beit(config):
        return "beit_base_patch16_224"
    if config.rope == "dinov3":
        return f"vit_small{'_plus' * swiglu}_patch16_dinov3{'_qkvb' * config.qkv_bias}"
    if config.rope is not None and config.pre_layernorm:
        if config.pooling == "map":
            return "vit_pe_core_base_patch16_224"
        return (
            "vit_pe_spatial_base_patch16_512" if config.layer_scale_init is None else "vit_pe_lang_large_patch14_448"
        )
    if is_eva(config):
        if config.attention_norm:
            return "eva02_base_patch16_clip_224"
        if config.rope is None:
            return "eva_giant_patch14_224"
        if not config.use_class_token and not swiglu:
            return "vit_medium_patch16_rope_reg1_gap_256"
        return "eva02_base_patch14_224" if config.mlp_norm else "eva02_small_patch14_224"
    if config.norm_type == "rms":
        return "aimv2_large_patch14_224"
    if style_of(config).distilled:
        return "deit_base_distilled_patch16_224"
    if config.pre_layernorm:
        quick = config.hidden_act == "quick_gelu"
        return f"vit_base_patch16_clip{'_quickgelu' * quick}_224"
    if swiglu:
        return "vit_giant_patch14_dinov2"
    sizes = {row[1]: name.split("-")[1] for name, row in PRESETS.items() if row[8] is None}
    size = sizes.get(config.hidden_size, "base")
    return "vit_huge_patch14_224" if size == "huge" else f"vit_{size}_patch16_224"
