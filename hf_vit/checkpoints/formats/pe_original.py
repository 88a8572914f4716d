"""The `.pt` files of Perception Encoder (PE core, lang and spatial), as its own repository publishes them.

The vision tower; its names begin with `visual.` if the file also has the text tower. At other sizes its code uses the
cells of the new grid (timm's port scales them to the native grid) and resizes its table bilinearly without
antialiasing; so does the loaded model.

Source: perception_models 60f507b `core/vision_encoder/pe.py`, `config.py`.
"""

from typing import Any

from ...errors import HFViTError
from ...image_processing import HALF, ImageProcessing
from ...modeling.configuration_hf_vit import HFViTConfig
from ..mapping import KeyMapping
from ..spec import CheckpointSpec, count_layers, heads_for_width, image_size_of_table, patch_size
from ..tensor_file import TensorFile
from .encoder import encoder_mappings, map_head_mappings
from .open_clip import NAMES
from .transformers_folder import not_specified


MODEL_TYPES: tuple[str, ...] = ()
PREFIXES = ("visual.", "")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 16}  # of the published widths
POOL = {
    "probe": "attn_pool.probe",
    "in_proj": "attn_pool.attn.in_proj",
    "o": "attn_pool.attn.out_proj",
    "norm": "attn_pool.layernorm",
    "fc1": "attn_pool.mlp.c_fc",
    "fc2": "attn_pool.mlp.c_proj",
}


def _prefix(file: TensorFile) -> str | None:
    """The prefix of the vision tower's names; None if it is not one of PE.

    CLIP has the same names with a last LayerNorm and no probe; CoCa's pooling has a `query`.
    """
    for prefix in PREFIXES:
        tower = f"{prefix}conv1.weight" in file and f"{prefix}transformer.resblocks.0.attn.in_proj_weight" in file
        last = f"{prefix}attn_pool.probe" in file or f"{prefix}ln_post.weight" not in file
        if tower and last and f"{prefix}ln_pre.weight" in file and f"{prefix}conv1.bias" not in file:
            return prefix
    return None


def matches(file: TensorFile) -> bool:
    """Whether a vision tower of PE is there."""
    return _prefix(file) is not None


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Infer sizes from shapes, heads from the width.

    Raises:
        HFViTError: incomplete, or a question for the caller.
    """
    prefix = _prefix(file)
    assert prefix is not None
    shapes, first = file.shapes, f"{prefix}transformer.resblocks.0."
    width, channels, patch_h, patch_w = shapes[f"{prefix}conv1.weight"]
    pooled, has_class = f"{prefix}attn_pool.probe" in file, f"{prefix}class_embedding" in file
    heads = requested.get("num_attention_heads") or HEADS.get(width)
    assumptions: list[str] = []
    if not heads:
        heads, assumptions = heads_for_width(file.path, width, requested)
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(file, rf"{prefix}transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": heads,
        "intermediate_size": shapes[f"{first}mlp.c_fc.weight"][0],
        "patch_size": patch_size(patch_h, patch_w),
        "num_channels": channels,
        "num_labels": 0,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "position_interpolation": "bilinear",
        "position_embedding_type": "learned",
        "rope": "axial",
        "rope_theta": 10_000.0,
        "rope_axes": "xy",
        "rope_offset": 1.0 if has_class else 0.0,
        "rope_reference_grid": "image",
        "patch_bias": False,
        "pre_layernorm": True,
        "final_norm": "tokens" if f"{prefix}ln_post.weight" in file else "none",
        "pooling": "map" if pooled else "token" if has_class else "gap",
        "use_class_token": has_class,
        "class_token_has_position": has_class,
        "num_register_tokens": 0,
        "layer_scale_init": 1e-5 if f"{first}ls_1.gamma" in file else None,
        "qkv_bias": True,
        "qk_norm": False,
        "resnet_depths": None,
        "representation_size": None,
        "initializer": "truncated_normal",
    }
    if pooled:
        fields |= {"map_num_heads": 8, "map_over_prefix": True}
        fields["map_intermediate_size"] = shapes[f"{prefix}attn_pool.mlp.c_fc.weight"][0]
    table = f"{prefix}positional_embedding"
    if table not in file:
        raise HFViTError(f"{file.path}: incomplete, it has no '{table}'")
    fields["image_size"] = image_size_of_table(file.path, shapes[table][0] - has_class, fields, requested)
    text = sorted(name for name in file if prefix and not name.startswith(prefix))
    projection = [f"{prefix}proj"] if f"{prefix}proj" in file else []
    unused = [*projection, *(["the text tower"] if text else [])]
    return CheckpointSpec(
        format="Perception Encoder's own checkpoint",
        fields=fields,
        key_mappings=lambda config: key_mappings(config, prefix),
        not_specified=not_specified(fields) | {"num_attention_heads"},
        unused={*projection, *text},
        assumptions=assumptions,
        notes=[f"the vision tower is read; not used: {', '.join(unused)}"] if unused else [],
        image_processing=ImageProcessing((224, 224), None, "bilinear", 1 / 255, HALF, HALF).at_size(
            fields["image_size"]
        ),
    )


def key_mappings(config: HFViTConfig, prefix: str) -> list[KeyMapping]:
    """Mappings of all tensors of the model."""
    mappings = encoder_mappings(config, NAMES, prefix)
    return mappings + (map_head_mappings(config, POOL, prefix) if config.pooling == "map" else [])
