"""open_clip's and OpenAI's CLIP: the vision tower below `visual.`, read from a file with the text tower or without.

`visual.trunk.` is a model of timm (SigLIP, EVA-02, PE, BiomedCLIP): its prefix is taken off and `timm.py` reads it.
Source: open_clip 89fb801 `transformer.py`, `model.py`.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

from typing import Any

from ...errors import HFViTError
from ...image_processing import CLIP_MEAN, CLIP_STD, ImageProcessing
from ...modeling.configuration_hf_vit import HFViTConfig
from ..mapping import KeyMapping
from ..spec import CheckpointSpec, count_layers, heads_for_width, image_size_of_table, patch_size
from ..tensor_file import TensorFile
from .encoder import FLAT_TABLE, FLAT_TOKEN, EncoderNames, encoder_mappings
from .transformers_folder import not_specified


MODEL_TYPES: tuple[str, ...] = ()
NAMES = EncoderNames(
    layer="transformer.resblocks.{n}.",
    norm1="ln_1",
    norm2="ln_2",
    patch="conv1",
    cls_token="class_embedding",
    cls_transform=FLAT_TOKEN,
    positions="positional_embedding",
    positions_transform=FLAT_TABLE,
    pre_layernorm="ln_pre",
    final_norm="ln_post",
    qkv_weight="attn.in_proj_weight",
    qkv_bias="attn.in_proj_bias",
    output="attn.out_proj",
    fc1="mlp.c_fc",
    fc2="mlp.c_proj",
    layer_scale=("ls_1.gamma", "ls_2.gamma"),
)
PREFIX = "visual."


def matches(file: TensorFile) -> bool:
    """Whether a vision transformer of open_clip is there."""
    return "visual.conv1.weight" in file and "visual.transformer.resblocks.0.ln_1.weight" in file


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Infer sizes from shapes; heads and activation from open_clip_config.json, or they are asked for.

    Raises:
        HFViTError: an attention pooling, a tower without LayerNorm before the blocks, or a question for the caller.
    """
    model = (sidecars.get("open_clip_config.json") or {}).get("model_cfg") or {}
    vision = model.get("vision_cfg") or {}
    shapes = file.shapes
    if any(name.startswith("visual.attn_pool.") for name in file):
        raise HFViTError(f"{file.path}: open_clip's attentional pooling (CoCa) has no counterpart in hf_vit")
    if "visual.ln_pre.weight" not in file or vision.get("no_ln_pre"):
        raise HFViTError(f"{file.path}: a CLIP tower without LayerNorm before the blocks has no counterpart in hf_vit")
    for option in ("final_ln_after_pool", "attentional_pool", "norm_kwargs", "block_type"):
        if vision.get(option):
            raise HFViTError(f"{file.path}: open_clip's {option}={vision[option]} has no counterpart in hf_vit")
    if vision.get("pool_type", "tok") != "tok":
        raise HFViTError(f"{file.path}: open_clip's pool_type={vision['pool_type']} has no counterpart in hf_vit")
    width, channels, patch_h, patch_w = shapes["visual.conv1.weight"]
    assumptions: list[str] = []
    if "head_width" in vision or model:
        heads = width // vision.get("head_width", 64)
    else:
        heads, assumptions = heads_for_width(file.path, width, requested)
    if not model and "hidden_act" not in requested:
        raise HFViTError(
            f"{file.path}: nothing next to it says the activation of this CLIP: give hidden_act='quick_gelu' (OpenAI, "
            "MetaCLIP, DFN) or hidden_act='gelu' (LAION, DataComp)"
        )
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(file, r"visual\.transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": heads,
        "intermediate_size": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        "patch_size": patch_size(patch_h, patch_w),
        "num_channels": channels,
        "num_labels": 0,
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "position_interpolation": "bicubic_antialias",
        "position_embedding_type": "learned",
        "patch_bias": False,
        "pre_layernorm": True,
        "final_norm": "pooled",
        "pooling": "token",
        "use_class_token": True,
        "class_token_has_position": True,
        "num_register_tokens": 0,
        "layer_scale_init": 1e-5 if "visual.transformer.resblocks.0.ls_1.gamma" in file else None,
        "qkv_bias": True,
        "qk_norm": False,
        "resnet_depths": None,
        "representation_size": None,
        "initializer": "truncated_normal",
    }
    rows = shapes["visual.positional_embedding"][0] - 1
    fields["image_size"] = image_size_of_table(file.path, rows, fields, requested)
    text_tower = sorted(name for name in file if not name.startswith(PREFIX))
    unused = {*text_tower, *(name for name in file if name == "visual.proj")}
    notes = [f"the vision tower is read; not used: {'visual.proj, ' * ('visual.proj' in file)}the text tower"]
    return CheckpointSpec(
        format="open_clip, its vision tower",
        fields=fields,
        key_mappings=key_mappings,
        not_specified=not_specified(fields) | ({"num_attention_heads"} if not model else set()),
        unused=unused,
        assumptions=assumptions,
        notes=notes if unused else [],
        image_processing=ImageProcessing(224, (224, 224), "bicubic", 1 / 255, CLIP_MEAN, CLIP_STD).at_size(
            fields["image_size"]
        ),
    )


def key_mappings(config: HFViTConfig) -> list[KeyMapping]:
    """Mappings of all tensors of the model."""
    return encoder_mappings(config, NAMES, PREFIX)
