"""Facts that timm's code ties to the name of an architecture, and that neither tensors nor config.json show.

Activation, epsilon, heads, rotary positions, norms: for `timm.py`, and which entry points are plain ViTs at all.

Source: pytorch-image-models 1.0.31, `timm/models/vision_transformer.py`, `eva.py`, `beit.py`, `deit.py`.

Tests: tests/hf_vit/checkpoints/test_checkpoints_timm.py.
"""

import re
from collections.abc import Mapping
from typing import Any

from ...errors import HFViTError
from ..spec import heads_for_width
from ..tensor_file import TensorFile


# Architectures of timm with facts that their tensors do not show, by the beginning of the name.
NO_CLASS_POSITION = ("deit3_", "flexivit_", "vit_small_patch16_rope_ape", "vit_base_patch16_rope_ape")
TANH_GELU = (
    "vit_base_patch32_siglip",
    "vit_giantopt_",
    "vit_large_patch16_siglip_512",
    "vit_large_patch16_siglip_gap_512",
    "vit_so400m_patch16_siglip",
)
# Heads of timm's entry points that are not those of the width.
HEADS = (
    (r"vit_base_patch16_gap_224", 16),
    (r"vit_giant_patch14_(reg\d_)?(dinov2|tipsv2)|vit_giant_patch16_lingbot", 24),
    (r"vit_giantopt_|vit_pe_\w+_gigantic|vit_giant_|vit_gigantic_|eva_giant|eva02_enormous", 16),
    (r"vit_huge_plus_patch16_dinov3", 20),
    (r"vit_7b_", 32),
    (r"aimv2_large", 8),
    (r"aimv2_huge", 12),
    (r"aimv2_1b", 16),
    (r"aimv2_3b", 24),
    (r"test_vit[34]", 3),
    (r"test_vit", 2),
)
DINOV3 = r"vit_\w+_(dinov3|lingbot)"
EVA02 = r"eva02_|vit_\w+_rope_reg\d_gap"
PE = r"vit_pe_"
NAVER = r"vit_\w+_rope_(ape_)?\d+$"  # axial, with base 100 and columns first
EPS_1E5 = r"vit_\w+_clip_|vit_pe_|aimv2_|beit3_|" + DINOV3
NO_FINAL_NORM = r"vit_intern300m|vit_pe_(spatial|lang)"
MEAN = r"vit_\w+_dinov3|vit_pe_(spatial|lang)"  # pooled by the mean without a norm after it, unless config.json says
RADIO = r"vit_\w+_radio"
POST_NORM = r"eva02_enormous_|vit_\w+_rpn_"

# Entry points that this file reads; the rest of timm has other networks.
PLAIN = r"(?!vit_\w+_mci_)(vit|deit3?|eva|eva02|beit|beitv2|beit3|flexivit|aimv2)_|test_vit"
NOT_PLAIN = rf"{POST_NORM}|{RADIO}|vit_s?relpos_|vit_\w+_rope_mixed|vit_\w+_(parallel|dpar)"


def entry_point_of(stored: Mapping[str, Any]) -> str | None:
    """timm's entry point in a config.json, timm's own or that of transformers' wrapper."""
    ours = stored.get("model_type") == "timm_wrapper" or ("model_type" not in stored and "pretrained_cfg" in stored)
    name = stored.get("architecture")
    return name if ours and isinstance(name, str) else None


def is_plain(architecture: str) -> bool:
    """Whether an entry point of timm is a plain ViT."""
    return bool(re.match(PLAIN, architecture)) and not re.match(NOT_PLAIN, architecture)


def attention_heads(
    file: TensorFile, requested: dict[str, Any], name: str, args: dict[str, Any], width: int
) -> tuple[int, list[str]]:
    """The number of heads, by config.json's arguments, the name or the width; and assumptions."""
    known = next((heads for pattern, heads in HEADS if re.match(pattern, name)), None)
    configured: int | None = args.get("num_heads") or (known if "num_attention_heads" not in requested else None)
    if configured:
        return configured, []
    heads, assumptions = heads_for_width(file.path, width, requested)
    return heads, [] if name else assumptions  # timm's names go with the published widths


def implied_by_name(
    file: TensorFile, fields: dict[str, Any], requested: dict[str, Any], name: str, args: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Activation, epsilon and rotary positions, which timm's code ties to the architecture's name; and assumptions.

    Raises:
        HFViTError: an unsupported activation, or a file without config.json that may have rotary positions.
    """
    if not name:
        return _implied_alone(file, fields, requested)
    act = args.get("act_layer") or (
        "gelu_tanh" if name.startswith(TANH_GELU) else "quick_gelu" if "_quickgelu" in name else "gelu"
    )
    acts = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
    if act not in acts:
        raise HFViTError(
            f"{file.path}: act_layer={act} has no counterpart in hf_vit; give hidden_act= if you know one"
        )
    implied: dict[str, Any] = {"hidden_act": acts[act]}
    if re.match(EPS_1E5, name) or fields["norm_type"] == "rms":
        implied["layer_norm_eps"] = 1e-5

    def reference(default: Any) -> Any:  # an explicit None: the grid of each image
        return args.get("ref_feat_shape", default) or "image"

    if re.match(DINOV3, name):
        implied |= {"rope": "dinov3", "rope_theta": 100.0, "rope_rescale": args.get("rope_rescale_coords")}
    elif re.match(EVA02, name):
        implied |= {"rope": "axial", "rope_theta": 10_000.0, "rope_reference_grid": reference([16, 16])}
    elif re.match(PE, name):
        side = 14 if name.endswith("_224") else 24 if name.endswith(("_336", "_384")) else 32
        implied |= {
            "rope": "axial",
            "rope_theta": 10_000.0,
            "rope_axes": "xy",
            "rope_reference_grid": reference([side] * 2),
        }
        implied["rope_offset"] = args.get("rope_grid_offset", 1.0 if fields["use_class_token"] else 0.0)
    elif re.match(NAVER, name):
        implied |= {"rope": "axial", "rope_theta": 100.0, "rope_axes": "xy", "rope_reference_grid": "image"}
    elif args.get("use_rot_pos_emb"):
        raise HFViTError(f"{file.path}: rotary positions of '{name}' are not known; give rope= and rope_theta=")
    return implied, []


def _implied_alone(
    file: TensorFile, fields: dict[str, Any], requested: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The same for a state dict without a name."""
    assumptions = []
    if not fields["use_class_token"] and fields["pooling"] == "gap" and "pooling" not in requested:
        assumptions.append("the mean over patches, for it has no class token (pooling=)")
    is_eva = (
        not fields["key_bias"]
        or "blocks.0.gamma_1" in file
        or (fields["pre_layernorm"] and "attn_pool.latent" in file)
    )
    if is_eva and fields["relative_position_bias"] is None and "rope" not in requested:
        raise HFViTError(
            f"{file.path}: a model of timm's Eva class, whose rotary positions are not in the file: give the folder "
            'with its config.json, or rope="axial" (EVA-02, PE), rope="dinov3" (DINOv3) or rope=None (EVA giant)'
        )
    if fields["final_norm"] == "pooled" and not fields["pre_layernorm"] and fields["hidden_size"] == 1792:
        raise HFViTError(
            f"{file.path}: may be EVA-02 enormous, a post-norm model: give the folder with its config.json"
        )
    implied: dict[str, Any] = {}
    if fields["pre_layernorm"] or fields["norm_type"] == "rms":
        implied["layer_norm_eps"] = 1e-5
        if "layer_norm_eps" not in requested:
            assumptions.append("norms' eps 1e-5, as CLIP, PE and AIMv2 have (layer_norm_eps=)")
    if fields["pre_layernorm"] and not is_eva:
        assumptions.append("no rotary positions, as in CLIP (rope=)")
    if "hidden_act" not in requested and fields["mlp_type"] == "mlp":
        extra = "; OpenAI's CLIP has quick_gelu" * fields["pre_layernorm"]
        assumptions.append(f"erf GELU (hidden_act={extra})")
    return implied, assumptions
