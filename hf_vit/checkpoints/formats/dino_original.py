"""The `.pth` files of DINOv2 and DINOv3, as their own repositories publish them: timm's names with differences.

DINOv2 without registers refits its table by a scale factor with an offset of 0.1; DINOv3 stores its rotary periods
rounded to bfloat16. Both are kept, so outputs are those of the original code; transformers' folders of the same
weights answer slightly differently.

Sources: dinov2 b8931f7 `models/vision_transformer.py`; dinov3 6876159 `models/vision_transformer.py`.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

from typing import Any

import torch

from ...errors import HFViTError
from ...image_processing import IMAGENET_CROP, IMAGENET_MEAN, IMAGENET_STD, ImageProcessing
from ...modeling.configuration_hf_vit import HFViTConfig
from ..mapping import KeyMapping
from ..spec import CheckpointSpec, count_layers, heads_for_width, image_size_of_table, patch_size
from ..tensor_file import TensorFile
from .encoder import EncoderNames, encoder_mappings
from .transformers_folder import not_specified, unused_names


MODEL_TYPES: tuple[str, ...] = ()
DINOV2 = EncoderNames(
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
    gate_up="mlp.w12",
    down="mlp.w3",
    layer_scale=("ls1.gamma", "ls2.gamma"),
)
DINOV3 = EncoderNames(
    **(vars(DINOV2) | {"registers": "storage_tokens", "gate_up": None, "gate": "mlp.w1", "up": "mlp.w2"})
)
# Widths of the published models whose heads are not 64 wide, or not those of a ViT of that width.
DINOV2_HEADS = {384: 6, 768: 12, 1024: 16, 1536: 24}
UNUSED = r"mask_token$|local_cls_norm\.|rope_embed\.|.*\.bias_mask$|(dino_head|ibot_head|head)\."


def matches(file: TensorFile) -> bool:
    """Whether it is a backbone of DINOv2 or DINOv3: mask token and LayerScale, or DINOv3's storage tokens."""
    if "patch_embed.proj.weight" not in file or "blocks.0.norm1.weight" not in file:
        return False
    dinov3 = "storage_tokens" in file or "rope_embed.periods" in file
    return dinov3 or ("mask_token" in file and "blocks.0.ls1.gamma" in file and "blocks.0.mlp.c_fc.weight" not in file)


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Infer the architecture from names and shapes; DINOv3's heads from its periods, DINOv2's from the width.

    Raises:
        HFViTError: incomplete, or a question for the caller.
    """
    shapes = file.shapes
    width, channels, patch_h, patch_w = shapes["patch_embed.proj.weight"]
    is_v3 = "pos_embed" not in file
    first = "blocks.0.mlp."
    gated = f"{first}w3.weight" in file
    down = f"{first}{'w3' if gated else 'fc2'}.weight"
    if down not in file:
        raise HFViTError(f"{file.path}: incomplete, it has no '{down}'")
    registers = "storage_tokens" if is_v3 else "register_tokens"
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(file, r"blocks\.(\d+)\."),
        "intermediate_size": shapes[down][1],
        "mlp_type": "swiglu" if gated else "mlp",
        "patch_size": patch_size(patch_h, patch_w),
        "num_channels": channels,
        "num_labels": 0,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5 if is_v3 else 1e-6,
        "qkv_bias": "blocks.0.attn.qkv.bias" in file,
        "qk_norm": False,
        "layer_scale_init": 1e-5 if "blocks.0.ls1.gamma" in file else None,
        "use_class_token": True,
        "class_token_has_position": not is_v3,
        "num_register_tokens": shapes[registers][1] if registers in file else 0,
        "position_embedding_type": "none" if is_v3 else "learned",
        "pooling": "token",
        "head_input": "token_and_mean",
        "resnet_depths": None,
        "representation_size": None,
        "initializer": "truncated_normal",
    }
    assumptions: list[str] = []
    if is_v3:
        fields |= _rope(file, width) | {"image_size": 224, "position_interpolation": "bicubic", "key_bias": False}
    else:
        heads = requested.get("num_attention_heads") or DINOV2_HEADS.get(width)
        fields["num_attention_heads"] = heads or heads_for_width(file.path, width, requested)[0]
        if not heads:
            assumptions.append(f"{fields['num_attention_heads']} heads (num_attention_heads=)")
        fields["position_interpolation"] = "bicubic_antialias" if fields["num_register_tokens"] else "bicubic_offset"
        fields["image_size"] = image_size_of_table(file.path, shapes["pos_embed"][1] - 1, fields, requested)
    unused, notes = unused_names(file, UNUSED)
    names = DINOV3 if is_v3 else DINOV2
    processing = ImageProcessing((224, 224), None, "bilinear", 1 / 255, IMAGENET_MEAN, IMAGENET_STD)
    return CheckpointSpec(
        format=f"{'DINOv3' if is_v3 else 'DINOv2'}'s own checkpoint",
        fields=fields,
        key_mappings=lambda config: key_mappings(config, names),
        not_specified=not_specified(fields) | ({"num_attention_heads"} if not is_v3 else set()),
        unused=unused,
        assumptions=assumptions,
        notes=notes,
        image_processing=processing if is_v3 else IMAGENET_CROP,
    )


def _rope(file: TensorFile, width: int) -> dict[str, Any]:
    """Heads and rotary positions from the stored periods, one for each quarter of a head's width.

    Raises:
        HFViTError: no periods, or such that no theta of DINOv3 gives.
    """
    if "rope_embed.periods" not in file:
        raise HFViTError(f"{file.path}: incomplete, it has no 'rope_embed.periods'")
    stored = file.read("rope_embed.periods").float()
    exact = 100.0 ** (torch.arange(len(stored), dtype=torch.float32) / len(stored))
    rounded = exact.bfloat16().float()
    if not torch.allclose(stored, exact, rtol=1e-2):
        raise HFViTError(f"{file.path}: its rotary periods are not those of DINOv3 (base 100)")
    if width % (4 * len(stored)):
        raise HFViTError(f"{file.path}: {len(stored)} rotary periods do not fit the width {width}")
    return {
        "num_attention_heads": width // (4 * len(stored)),
        "rope": "dinov3",
        "rope_theta": 100.0,
        "rope_bfloat16_periods": bool(torch.equal(stored, rounded)) and not torch.equal(rounded, exact),
        "rope_rescale": 2.0,
    }


def key_mappings(config: HFViTConfig, names: EncoderNames) -> list[KeyMapping]:
    """Mappings of all tensors of the encoder."""
    return encoder_mappings(config, names)
