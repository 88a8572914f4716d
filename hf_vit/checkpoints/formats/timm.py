"""timm's `vit_*`, `deit_*` and hybrids, in and out: a state dict, or a folder with timm's config.json.

Source: pytorch-image-models 1.0.31, `timm/models/vision_transformer.py` and `vision_transformer_hybrid.py`.
Numerics are timm's: erf GELU, LayerNorm 1e-6, GroupNorm 1e-5, weight standardisation with its eps inside the root.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...errors import HFViTError
from ...image_processing import IMAGENET_CROP, ImageProcessing
from ...modeling.configuration_hf_vit import PRESETS, HFViTConfig
from ..mapping import KeyMapping, Transform, rename, split, weight_and_bias
from ..spec import (
    CheckpointSpec,
    count_layers,
    grid_of_table,
    heads_for_width,
    image_size_of_table,
    label_names,
    linear_head,
    patch_size,
)
from ..tensor_file import TensorFile


NUMERICS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "position_interpolation": "bicubic_antialias"}
HYBRID_NUMERICS = {
    "group_norm_eps": 1e-5,
    "weight_standardization": "sqrt_var_plus_eps",
    "weight_standardization_eps": 1e-8,
}
NOT_SPECIFIED = {
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "layer_scale_init",
    *NUMERICS,
    *HYBRID_NUMERICS,
}
UNUSED = r"mask_token$|decoder_|(head|dino_head|ibot_head)\.(mlp\.|last_layer|prototypes)|local_cls_norm\."
CONFIG_KEY = "hf_vit_config"  # in the header of files that we write: what timm's names do not tell

# What architectures of timm fix and their tensors do not show; the beginning of a name decides.
NO_CLASS_POSITION = ("deit3_", "flexivit_")
TANH_GELU = (
    "vit_base_patch32_siglip",
    "vit_giantopt_",
    "vit_large_patch16_siglip_512",
    "vit_large_patch16_siglip_gap_512",
    "vit_so400m_patch16_siglip",
)
HEADS = {"vit_base_patch16_gap_224": 16, "test_vit": 2}

# A name that only another architecture has, and what it is.
UNSUPPORTED = (
    (r"fc_norm\.", "a LayerNorm after average pooling (fc_norm)"),
    (r"norm_pre\.", "a LayerNorm before the blocks (norm_pre, CLIP's)"),
    (r"dist_token|head_dist\.", "a distillation token with its own head"),
    (r"patch_embed\.backbone\.(conv1\.0|layer1|body)\.", "a ResNet-D stem"),
    (r"patch_embed\.backbone\.stem\.\d+\.", "a convolutional stem other than the ResNet"),
    (r"blocks\.\d+\.(attns|ffns)\.", "parallel blocks"),
    (r"blocks\.\d+\.(in_proj|mlp_out_proj|attn_out_proj|qkv_bias)", "parallel scaling blocks"),
    (r"blocks\.\d+\.mlp\.(w12|w3|fc1_g|fc1_x)\.", "a gated MLP (SwiGLU)"),
    (r"blocks\.\d+\.(attn|mlp)\.(inner_attn_ln|norm)\.", "norms inside attention or MLP"),
    (r"blocks\.\d+\.attn\.(lambda_|sub_norm|gate)", "differential or gated attention"),
    (r"blocks\.\d+\.(gamma_1|gamma_2|attn\.(q_bias|relative_position))|.*rope|.*freqs", "BEiT or rotary positions"),
    (r"layers\.\d+\.blocks\.", "a hierarchical transformer (Swin)"),
)

# (their name, our name, ours that exist only with a feature of the config)
BLOCK = (
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.o_proj"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
MAP_HEAD = (
    ("q", "attention.q_proj"),
    ("proj", "attention.o_proj"),
    ("norm", "layernorm"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)


def folded_registers(class_rows: int, registers: int) -> Transform:
    """timm gives registers rows in the position table; a constant sum of two constants, ours is one register."""

    def to_ours(table: torch.Tensor, tokens: torch.Tensor):
        own = table[:, class_rows : class_rows + registers]
        return [torch.cat([table[:, :class_rows], table[:, class_rows + registers :]], dim=1), tokens + own]

    def to_theirs(table: torch.Tensor, tokens: torch.Tensor):
        return [torch.cat([table[:, :class_rows], torch.zeros_like(tokens), table[:, class_rows:]], dim=1), tokens]

    return Transform(to_ours, to_theirs)


def key_mappings(config: HFViTConfig, registers_in_table: bool = False) -> list[KeyMapping]:
    """Every tensor of the model, their name and ours."""
    mappings = _embedding_rules(config, registers_in_table)
    for i in range(config.num_hidden_layers):
        theirs, ours = f"blocks.{i}.", f"vit.layers.{i}."
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = tuple(f"{ours}attention.{letter}_proj.{kind}" for letter in "qkv")
            mappings.append(KeyMapping((f"{theirs}attn.qkv.{kind}",), parts, split(3)))
        for a, b in BLOCK:
            mappings += weight_and_bias(theirs + a, ours + b)
        if config.qk_norm:
            mappings += weight_and_bias(theirs + "attn.q_norm", ours + "attention.q_norm")
            mappings += weight_and_bias(theirs + "attn.k_norm", ours + "attention.k_norm")
        if config.layer_scale_init is not None:
            mappings += [rename(f"{theirs}ls{n}.gamma", f"{ours}layer_scale{n}.lambda1") for n in (1, 2)]
    mappings += weight_and_bias("norm", "vit.layernorm")
    if config.pooling == "map":
        mappings.append(rename("attn_pool.latent", "vit.map_head.probe"))
        for kind in ("weight", "bias"):
            parts = tuple(f"vit.map_head.attention.{letter}_proj.{kind}" for letter in "kv")
            mappings.append(KeyMapping((f"attn_pool.kv.{kind}",), parts, split(2)))
        for a, b in MAP_HEAD:
            mappings += weight_and_bias(f"attn_pool.{a}", f"vit.map_head.{b}")
    if config.num_labels:
        mappings += weight_and_bias("head", "classifier")
    return mappings


def _embedding_rules(config: HFViTConfig, registers_in_table: bool) -> list[KeyMapping]:
    ours = "vit.embeddings."
    mappings = weight_and_bias("patch_embed.proj", ours + "patch_embeddings.projection")
    if config.use_class_token:
        mappings.append(rename("cls_token", ours + "cls_token"))
    positions, registers = ours + "position_embeddings", ours + "register_tokens"
    if registers_in_table:
        transform = folded_registers(int(config.has_class_position), config.num_register_tokens)
        mappings.append(KeyMapping(("pos_embed", "reg_token"), (positions, registers), transform))
    else:
        mappings += [rename("pos_embed", positions)] if config.has_position_table else []
        mappings += [rename("reg_token", registers)] if config.num_register_tokens else []
    if config.resnet_depths is None:
        return mappings
    theirs, ours = "patch_embed.backbone.", ours + "patch_embeddings.backbone."
    stem = "stem." if config.resnet_depths else ""
    mappings += [
        rename(f"{theirs}{stem}conv.weight", f"{ours}conv_root.weight"),
        *weight_and_bias(f"{theirs}{stem}norm", f"{ours}gn_root"),
    ]
    for stage, depth in enumerate(config.resnet_depths):
        for unit in range(depth):
            a, b = f"{theirs}stages.{stage}.blocks.{unit}.", f"{ours}stages.{stage}.units.{unit}."
            for n in (1, 2, 3):
                mappings += [
                    rename(f"{a}conv{n}.weight", f"{b}conv{n}.weight"),
                    *weight_and_bias(f"{a}norm{n}", f"{b}gn{n}"),
                ]
            if unit == 0:
                mappings.append(rename(f"{a}downsample.conv.weight", f"{b}conv_proj.weight"))
                mappings += weight_and_bias(f"{a}downsample.norm", f"{b}gn_proj")
    return mappings


# -- reading ----------------------------------------------------------------------------------------------------------


def matches(file: TensorFile) -> bool:
    """Whether the names are those of a timm vision transformer."""
    return "patch_embed.proj.weight" in file and any(name.startswith("blocks.0.") for name in file)


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Infer the architecture from names and shapes, and from timm's config.json where there is one.

    Raises:
        HFViTError: a feature that `HFViTConfig` does not have (it is named), or a question for the caller.
    """
    refuse_unsupported(file, UNSUPPORTED)
    if CONFIG_KEY in file.metadata:
        return _read_own(file)
    hub = sidecars.get("config.json", {})
    name = hub.get("architecture", "")
    fields, assumptions = _architecture(file, requested, name, hub)
    described = hub.get("pretrained_cfg") or {}
    registers_in_table = False
    if "pos_embed" in file:
        size, class_rows, registers_in_table = _position_table(file, fields, requested, name, hub)
        fields |= {
            "image_size": size,
            "class_token_has_position": bool(class_rows),
            "position_embedding_type": "learned",
        }
    elif (
        requested.get("position_embedding_type") == "none" or (hub.get("model_args") or {}).get("pos_embed") == "none"
    ):
        fields |= {"position_embedding_type": "none", "class_token_has_position": False}
    else:
        raise HFViTError(
            f"{file.path}: incomplete, it has no 'pos_embed'; a model without positions is said with "
            'position_embedding_type="none"'
        )
    unused = {key for key in file if re.match(UNUSED, key)}
    labels, head = linear_head(file, "head", requested, pattern=r"head\.(?!mlp\.|last_layer|prototypes)")
    names = described.get("label_names") or hub.get("label_names")
    if isinstance(names, list) and len(names) == labels:
        fields["id2label"] = dict(enumerate(map(str, names)))
    if not name:
        if "hidden_act" not in requested:
            assumptions.append("erf GELU (hidden_act=)")
        if any(key.startswith("decoder_") for key in unused):
            assumptions.append("images as MAE evaluates them")
        else:
            assumptions.append("images as timm prepares most of its ViTs: crop_pct 0.9, mean = std = 0.5")
    notes = [f"not used: {', '.join(sorted(unused | head)[:10])}"] if unused | head else []
    return CheckpointSpec(
        format=f"timm {name or 'vision transformer'}",
        fields=fields | {"num_labels": labels},
        not_specified=NOT_SPECIFIED | ({"pooling"} if fields["pooling"] != "map" else set()),
        key_mappings=lambda config: key_mappings(config, registers_in_table),
        unused=unused | head,
        assumptions=assumptions,
        notes=notes,
        image_processing=_image_processing(unused, fields.get("image_size", 224)),
    )


def _image_processing(unused: set[str], image_size: Any) -> ImageProcessing:
    """What a file without a description is evaluated with."""
    if any(key.startswith("decoder_") for key in unused):
        return IMAGENET_CROP.at_size(image_size)
    return ImageProcessing.from_timm({"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}).at_size(image_size)


def refuse_unsupported(file: TensorFile, foreign: tuple[tuple[str, str], ...]) -> None:
    """Raise for the first name that shows a feature this package does not have."""
    for pattern, feature in foreign:
        found = next((name for name in file if re.match(pattern, name)), None)
        if found:
            raise HFViTError(f"{file.path}: has {feature} ('{found}'), which has no counterpart in hf_vit")


def _read_own(file: TensorFile) -> CheckpointSpec:
    """A file that `save_checkpoint` wrote: its header holds our configuration."""
    stored = json.loads(file.metadata[CONFIG_KEY])
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in stored["fields"].items()}
    fields["id2label"] = {int(i): label for i, label in stored["fields"]["id2label"].items()}
    fields["num_labels"] = len(fields["id2label"])
    return CheckpointSpec(
        format="timm's names, written by hf_vit",
        fields=fields,
        not_specified={*NUMERICS, *HYBRID_NUMERICS},
        key_mappings=lambda config: key_mappings(config, stored["registers_in_table"]),
        image_processing=ImageProcessing.from_timm(stored["pretrained_cfg"])
        if "pretrained_cfg" in stored
        else _processing_of_0_1(stored["processor"], fields["image_size"]),
    )


def _architecture(
    file: TensorFile, requested: dict[str, Any], name: str, hub: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The fields but those of positions, and what was assumed."""
    shapes, args = file.shapes, hub.get("model_args") or {}
    width, channels, patch_h, patch_w = shapes["patch_embed.proj.weight"]
    depth = count_layers(file, r"blocks\.(\d+)\.")
    for needed in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "norm.weight"):
        if needed not in file:
            raise HFViTError(f"{file.path}: has no '{needed}': not a plain pre-norm vision transformer of timm")
    hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    if shapes["blocks.0.mlp.fc2.weight"][1] != hidden:
        raise HFViTError(f"{file.path}: has a gated MLP (SwiGLU), which has no counterpart in hf_vit")
    if "norm.bias" not in file:
        raise HFViTError(f"{file.path}: has RMSNorm ('norm.weight' without bias), which has no counterpart in hf_vit")
    known = next((heads for start, heads in HEADS.items() if name.startswith(start)), None)
    heads: int | None = args.get("num_heads") or known
    assumptions: list[str] = []
    if heads is None:
        heads, assumptions = heads_for_width(file.path, width, requested)
        assumptions = [] if name else assumptions  # timm's names go with the published widths
    has_class = "cls_token" in file
    act = args.get("act_layer") or ("gelu_tanh" if name.startswith(TANH_GELU) else "gelu")
    if act not in ("gelu", "gelu_tanh"):
        raise HFViTError(
            f"{file.path}: act_layer={act} has no counterpart in hf_vit; give hidden_act= if you know one"
        )
    fields = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "patch_size": patch_size(patch_h, patch_w),
        "num_channels": channels,
        "representation_size": None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in file,
        "use_class_token": has_class,
        "num_register_tokens": shapes["reg_token"][1] if "reg_token" in file else 0,
        "layer_scale_init": 1e-5 if "blocks.0.ls1.gamma" in file else None,
        "qk_norm": "blocks.0.attn.q_norm.weight" in file,
        "pooling": _pooling(file, has_class, hub),
        "resnet_depths": None,
        **NUMERICS,
        "hidden_act": "gelu_pytorch_tanh" if act == "gelu_tanh" else "gelu",
    }
    if fields["pooling"] == "map" and (has_class or fields["num_register_tokens"]):
        raise HFViTError(f"{file.path}: attention pooling that leaves out class and register tokens is not in hf_vit")
    return fields | _stem(file), assumptions


def _pooling(file: TensorFile, has_class: bool, hub: dict[str, Any]) -> str:
    if "attn_pool.latent" in file:
        return "map"
    stated = (hub.get("model_args") or {}).get("global_pool") or hub.get("global_pool")
    return "gap" if stated == "avg" or not has_class else "token"


def _stem(file: TensorFile) -> dict[str, Any]:
    root = next(
        (
            f"patch_embed.backbone.{s}conv.weight"
            for s in ("stem.", "")
            if f"patch_embed.backbone.{s}conv.weight" in file
        ),
        None,
    )
    if root is None:
        return {}
    units = [m for n in file if (m := re.match(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.", n))]
    stages = 1 + max((int(m[1]) for m in units), default=-1)
    return {
        "num_channels": file.shapes[root][1],
        "resnet_width_factor": file.shapes[root][0] / 64,
        "resnet_depths": tuple(1 + max(int(m[2]) for m in units if int(m[1]) == s) for s in range(stages)),
        **HYBRID_NUMERICS,
    }


def _position_table(file: TensorFile, fields: dict, requested: dict, name: str, hub: dict) -> tuple[Any, int, bool]:
    """(image size, class rows, whether registers have rows too): the tensors tell none of it.

    timm's default gives every prefix token a row; models with registers, and some without, give them none. A
    config.json decides; without one the default is taken, unless `checkpoint_image_size` agrees only with the
    other reading.
    """
    rows, args = file.shapes["pos_embed"][1], hub.get("model_args") or {}
    class_token, registers = int(fields["use_class_token"]), fields["num_register_tokens"]
    without_rows = args.get("no_embed_class", True if name.startswith(NO_CLASS_POSITION) else None)
    if "class_token_has_position" in requested:
        without_rows = not requested["class_token_has_position"]
    choices = [registers > 0, registers == 0] if without_rows is None else [bool(without_rows)]
    cells = {choice: rows - (0 if choice else class_token + registers) for choice in choices}

    def found(size: Any, choice: bool) -> tuple[Any, int, bool]:
        return size, class_token * (not choice), registers > 0 and not choice

    told: list[Any] = [args.get("img_size"), ((hub.get("pretrained_cfg") or {}).get("input_size") or [])[1:]]
    for size in [requested.get("checkpoint_image_size"), *told]:
        for choice in choices if size else []:
            if grid_of_table(cells[choice], fields, size):
                return found(tuple(size) if isinstance(size, list) else size, choice)
    try:
        return found(image_size_of_table(file.path, cells[choices[0]], fields, requested), choices[0])
    except HFViTError as error:
        taken = rows - cells[choices[0]]
        raise HFViTError(
            f"{error}. {taken} of its {rows} rows were taken for class and register tokens; if that is wrong, say "
            f"class_token_has_position={choices[0]}"
        ) from error


def _processing_of_0_1(settings: dict[str, Any], image_size: Any) -> ImageProcessing:
    """Of the header that version 0.1.0 wrote: settings of a ViTImageProcessor without size, and crop_pct."""
    stated = {key: value for key, value in settings.items() if key != "crop_pct"}
    processing = ImageProcessing.from_transformers(stated).at_size(image_size)
    if (crop_pct := settings.get("crop_pct")) and processing.output_size is not None:
        height, width = processing.output_size
        if height == width:
            return replace(processing, resize_to=int(height / crop_pct), crop_to=(height, width))
    return processing


# -- writing ----------------------------------------------------------------------------------------------------------

CANNOT: tuple[tuple[str, Callable[[HFViTConfig], bool]], ...] = (
    ("a representation layer", lambda c: c.representation_size is not None),
    ('pooling="first"', lambda c: c.pooling == "first"),
    ("sine-cosine positions", lambda c: c.position_embedding_type == "sincos2d"),
    ("positions along the sequence", lambda c: c.position_embedding_type == "learned1d"),
    ("attention pooling over class or register tokens", lambda c: c.pooling == "map" and c.num_prefix_tokens > 0),
    ("QK-norm in the attention pooling", lambda c: c.pooling == "map" and c.qk_norm),
)


def numerics(config: HFViTConfig) -> dict[str, Any]:
    """What timm computes for this architecture, field by field."""
    return {k: v for k, v in NUMERICS.items() if k != "position_interpolation"} | (
        {} if config.resnet_depths is None else HYBRID_NUMERICS
    )


def registers_in_table(config: HFViTConfig) -> bool:
    """Where the class token has a row, timm gives registers one too; theirs are written as zeros."""
    return config.num_register_tokens > 0 and config.has_class_position and config.has_position_table


def header(config: HFViTConfig, fields: dict[str, Any], processing: ImageProcessing) -> dict[str, str]:
    """Header of a safetensors file in timm's names, from which `read` restores the configuration."""
    described = processing.to_timm(config.num_channels, config.image_size_hw)
    stored = {"fields": fields, "registers_in_table": registers_in_table(config), "pretrained_cfg": described}
    return {"format": "pt", CONFIG_KEY: json.dumps(stored)}


def folder_config(config: HFViTConfig, processing: ImageProcessing) -> dict[str, Any]:
    """A config.json with which `timm.create_model("local-dir:FOLDER")` builds this network."""
    height, width = config.image_size_hw
    pool = {"token": "token", "gap": "avg", "map": "map"}[config.pooling]
    args: dict[str, Any] = {
        "img_size": [height, width],
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "init_values": config.layer_scale_init,
        "class_token": bool(config.use_class_token),
        "no_embed_class": not config.has_class_position,
        "reg_tokens": config.num_register_tokens,
        "fc_norm": False,
        "global_pool": pool,
        "in_chans": config.num_channels,
    }
    if config.resnet_depths is None:
        args["patch_size"] = list(config.patch_size_hw)
    if config.hidden_act == "gelu_pytorch_tanh":
        args["act_layer"] = "gelu_tanh"
    if not config.has_position_table:
        args["pos_embed"] = "none"
    return {
        "architecture": _architecture_name(config),
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": {
            **processing.to_timm(config.num_channels, config.image_size_hw),
            "num_classes": config.num_labels,
            "pool_size": None,
            "first_conv": "patch_embed.proj" if config.resnet_depths is None else "patch_embed.backbone.stem.conv",
            "classifier": "head",
            "label_names": label_names(config),
        },
    }


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


def _architecture_name(config: HFViTConfig) -> str:
    """timm's entry point of the same kind; sizes that differ from it are in the arguments next to it."""
    if config.resnet_depths is not None:
        return HYBRIDS.get(tuple(config.resnet_depths), HYBRIDS[(2, 2, 2, 2)])
    sizes = {row[1]: name.split("-")[1] for name, row in PRESETS.items() if row[8] is None}
    size = sizes.get(config.hidden_size, "base")
    return "vit_huge_patch14_224" if size == "huge" else f"vit_{size}_patch16_224"
