"""timm's `vit_*`, `deit_*` and hybrids, in and out: a state dict, or a folder with timm's config.json.

Source: pytorch-image-models 1.0.31, `timm/models/vision_transformer.py` and `vision_transformer_hybrid.py`.
Numerics are timm's: erf GELU, LayerNorm 1e-6, GroupNorm 1e-5, weight standardisation with its eps inside the root.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import torch

from ...errors import HFViTError
from ...modeling.configuration_hf_vit import PRESETS, HFViTConfig
from ..mapping import Form, Rule, both, rule, split
from ..spec import GOOGLE_PROCESSOR, Reading, grid_of_table, heads_of, image_size_of_table, label_names, layers_of
from ..tensor_file import TensorFile


NUMERICS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "position_interpolation": "bicubic_antialias"}
HYBRID_NUMERICS = {
    "group_norm_eps": 1e-5,
    "weight_standardization": "sqrt_var_plus_eps",
    "weight_standardization_eps": 1e-8,
}
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
FOREIGN = (
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


def folded_registers(class_rows: int, registers: int) -> Form:
    """timm gives registers rows in the position table; a constant sum of two constants, ours is one register."""

    def to_ours(table: torch.Tensor, tokens: torch.Tensor):
        own = table[:, class_rows : class_rows + registers]
        return [torch.cat([table[:, :class_rows], table[:, class_rows + registers :]], dim=1), tokens + own]

    def to_theirs(table: torch.Tensor, tokens: torch.Tensor):
        return [torch.cat([table[:, :class_rows], torch.zeros_like(tokens), table[:, class_rows:]], dim=1), tokens]

    return Form(to_ours, to_theirs)


def table(config: HFViTConfig, registers_in_table: bool = False) -> list[Rule]:
    """Every tensor of the model, their name and ours."""
    rules = _embedding_rules(config, registers_in_table)
    for i in range(config.num_hidden_layers):
        theirs, ours = f"blocks.{i}.", f"vit.layers.{i}."
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = tuple(f"{ours}attention.{letter}_proj.{kind}" for letter in "qkv")
            rules.append(Rule((f"{theirs}attn.qkv.{kind}",), parts, split(3)))
        for a, b in BLOCK:
            rules += both(theirs + a, ours + b)
        if config.qk_norm:
            rules += both(theirs + "attn.q_norm", ours + "attention.q_norm")
            rules += both(theirs + "attn.k_norm", ours + "attention.k_norm")
        if config.layer_scale_init is not None:
            rules += [rule(f"{theirs}ls{n}.gamma", f"{ours}layer_scale{n}.lambda1") for n in (1, 2)]
    rules += both("norm", "vit.layernorm")
    if config.pooling == "map":
        rules.append(rule("attn_pool.latent", "vit.map_head.probe"))
        for kind in ("weight", "bias"):
            parts = tuple(f"vit.map_head.attention.{letter}_proj.{kind}" for letter in "kv")
            rules.append(Rule((f"attn_pool.kv.{kind}",), parts, split(2)))
        for a, b in MAP_HEAD:
            rules += both(f"attn_pool.{a}", f"vit.map_head.{b}")
    if config.num_labels:
        rules += both("head", "classifier")
    return rules


def _embedding_rules(config: HFViTConfig, registers_in_table: bool) -> list[Rule]:
    ours = "vit.embeddings."
    rules = both("patch_embed.proj", ours + "patch_embeddings.projection")
    if config.use_class_token:
        rules.append(rule("cls_token", ours + "cls_token"))
    positions, registers = ours + "position_embeddings", ours + "register_tokens"
    if registers_in_table:
        form = folded_registers(int(config.has_class_position), config.num_register_tokens)
        rules.append(Rule(("pos_embed", "reg_token"), (positions, registers), form))
    else:
        rules += [rule("pos_embed", positions)] if config.has_position_table else []
        rules += [rule("reg_token", registers)] if config.num_register_tokens else []
    if config.resnet_depths is None:
        return rules
    theirs, ours = "patch_embed.backbone.", ours + "patch_embeddings.backbone."
    stem = "stem." if config.resnet_depths else ""
    rules += [
        rule(f"{theirs}{stem}conv.weight", f"{ours}conv_root.weight"),
        *both(f"{theirs}{stem}norm", f"{ours}gn_root"),
    ]
    for stage, depth in enumerate(config.resnet_depths):
        for unit in range(depth):
            a, b = f"{theirs}stages.{stage}.blocks.{unit}.", f"{ours}stages.{stage}.units.{unit}."
            for n in (1, 2, 3):
                rules += [rule(f"{a}conv{n}.weight", f"{b}conv{n}.weight"), *both(f"{a}norm{n}", f"{b}gn{n}")]
            if unit == 0:
                rules.append(rule(f"{a}downsample.conv.weight", f"{b}conv_proj.weight"))
                rules += both(f"{a}downsample.norm", f"{b}gn_proj")
    return rules


# -- reading ----------------------------------------------------------------------------------------------------------


def matches(file: TensorFile) -> bool:
    """Whether the names are those of a timm vision transformer."""
    return "patch_embed.proj.weight" in file and any(name.startswith("blocks.0.") for name in file)


def read(file: TensorFile, asked: dict[str, Any], beside: dict[str, dict]) -> Reading:
    """Infer the architecture from names and shapes, and from timm's config.json where there is one.

    Raises:
        HFViTError: a feature that `HFViTConfig` does not have (it is named), or a question for the caller.
    """
    refuse_foreign(file, FOREIGN)
    if CONFIG_KEY in file.metadata:
        return _read_own(file)
    hub = beside.get("config.json", {})
    name = hub.get("architecture", "")
    fields = _architecture(file, asked, name, hub.get("model_args") or {})
    described = hub.get("pretrained_cfg") or {}
    registers_in_table = False
    if "pos_embed" in file:
        size, class_rows, registers_in_table = _position_table(file, fields, asked, name, hub)
        fields |= {
            "image_size": size,
            "class_token_has_position": bool(class_rows),
            "position_embedding_type": "learned",
        }
    elif asked.get("position_embedding_type") == "none" or (hub.get("model_args") or {}).get("pos_embed") == "none":
        fields |= {"position_embedding_type": "none", "class_token_has_position": False}
    else:
        raise HFViTError(
            f"{file.path}: incomplete, it has no 'pos_embed'; a model without positions is said with "
            'position_embedding_type="none"'
        )
    names = described.get("label_names") or hub.get("label_names")
    if isinstance(names, list) and len(names) == fields["num_labels"]:
        fields["id2label"] = dict(enumerate(names))
    notes = []
    if not name and "num_attention_heads" not in asked:
        notes.append(
            f"{fields['num_attention_heads']} heads taken for width {fields['hidden_size']}: the file does not say"
        )
    if not name:
        notes.append(
            "erf GELU and pixels normalised with mean = std = 0.5 taken, timm's defaults: the file does not say"
        )
    return Reading(
        dialect=f"timm {name or 'vision transformer'}",
        fields=fields,
        unsaid={"num_attention_heads", "hidden_act", "layer_norm_eps", *NUMERICS, *HYBRID_NUMERICS, "layer_scale_init"}
        | ({"pooling"} if fields["pooling"] != "map" else set()),
        table=lambda config: table(config, registers_in_table),
        notes=notes,
        processor=_processor(described),
    )


def refuse_foreign(file: TensorFile, foreign: tuple[tuple[str, str], ...]) -> None:
    """Raise for the first name that shows a feature this package does not have."""
    for pattern, feature in foreign:
        found = next((name for name in file if re.match(pattern, name)), None)
        if found:
            raise HFViTError(f"{file.path}: has {feature} ('{found}'), which has no counterpart in hf_vit")


def _read_own(file: TensorFile) -> Reading:
    """A file that `save_checkpoint` wrote: its header holds our configuration."""
    stored = json.loads(file.metadata[CONFIG_KEY])
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in stored["fields"].items()}
    fields["id2label"] = {int(i): label for i, label in stored["fields"]["id2label"].items()}
    fields["num_labels"] = len(fields["id2label"])
    return Reading(
        dialect="timm's names, written by hf_vit",
        fields=fields,
        unsaid={*NUMERICS, *HYBRID_NUMERICS},
        table=lambda config: table(config, stored["registers_in_table"]),
        processor=stored["processor"],
    )


def _architecture(file: TensorFile, asked: dict[str, Any], name: str, args: dict[str, Any]) -> dict[str, Any]:
    shapes = file.shapes
    width, channels, patch_h, patch_w = shapes["patch_embed.proj.weight"]
    depth = layers_of(file, r"blocks\.(\d+)\.")
    for needed in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "norm.weight"):
        if needed not in file:
            raise HFViTError(f"{file.path}: has no '{needed}': not a plain pre-norm vision transformer of timm")
    hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    if shapes["blocks.0.mlp.fc2.weight"][1] != hidden:
        raise HFViTError(f"{file.path}: has a gated MLP (SwiGLU), which has no counterpart in hf_vit")
    if "norm.bias" not in file:
        raise HFViTError(f"{file.path}: has RMSNorm ('norm.weight' without bias), which has no counterpart in hf_vit")
    known = next((heads for start, heads in HEADS.items() if name.startswith(start)), None)
    heads = args.get("num_heads") or known or heads_of(file.path, width, asked)
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
        "patch_size": patch_h if patch_h == patch_w else (patch_h, patch_w),
        "num_channels": channels,
        "num_labels": shapes["head.weight"][0] if "head.weight" in file else 0,
        "representation_size": None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in file,
        "use_class_token": has_class,
        "num_register_tokens": shapes["reg_token"][1] if "reg_token" in file else 0,
        "layer_scale_init": 1e-5 if "blocks.0.ls1.gamma" in file else None,
        "qk_norm": "blocks.0.attn.q_norm.weight" in file,
        "pooling": "map" if "attn_pool.latent" in file else "token" if has_class else "gap",
        "resnet_depths": None,
        **NUMERICS,
        "hidden_act": "gelu_pytorch_tanh" if act == "gelu_tanh" else "gelu",
    }
    if fields["pooling"] == "map" and (has_class or fields["num_register_tokens"]):
        raise HFViTError(f"{file.path}: attention pooling that leaves out class and register tokens is not in hf_vit")
    return fields | _stem(file)


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


def _position_table(file: TensorFile, fields: dict, asked: dict, name: str, hub: dict) -> tuple[Any, int, bool]:
    """(image size, class rows, whether registers have rows too): the tensors tell none of it.

    timm's default gives every prefix token a row; models with registers, and some without, give them none. A
    config.json decides; without one the default is taken, unless `checkpoint_image_size` agrees only with the
    other reading.
    """
    rows, args = file.shapes["pos_embed"][1], hub.get("model_args") or {}
    class_token, registers = int(fields["use_class_token"]), fields["num_register_tokens"]
    without_rows = args.get("no_embed_class", True if name.startswith(NO_CLASS_POSITION) else None)
    if "class_token_has_position" in asked:
        without_rows = not asked["class_token_has_position"]
    choices = [registers > 0, registers == 0] if without_rows is None else [bool(without_rows)]
    cells = {choice: rows - (0 if choice else class_token + registers) for choice in choices}

    def found(size: Any, choice: bool) -> tuple[Any, int, bool]:
        return size, class_token * (not choice), registers > 0 and not choice

    told: list[Any] = [args.get("img_size"), ((hub.get("pretrained_cfg") or {}).get("input_size") or [])[1:]]
    for size in [asked.get("checkpoint_image_size"), *told]:
        for choice in choices if size else []:
            if grid_of_table(cells[choice], fields, size):
                return found(tuple(size) if isinstance(size, list) else size, choice)
    try:
        return found(image_size_of_table(file.path, cells[choices[0]], fields, asked), choices[0])
    except HFViTError as error:
        taken = rows - cells[choices[0]]
        raise HFViTError(
            f"{error}. {taken} of its {rows} rows were taken for class and register tokens; if that is wrong, say "
            f"class_token_has_position={choices[0]}"
        ) from error


def _processor(described: dict[str, Any]) -> dict[str, Any]:
    resample = {"bilinear": 2, "bicubic": 3}.get(described.get("interpolation", "bicubic"), 3)
    settings = GOOGLE_PROCESSOR | {"resample": resample}
    if described.get("mean") and described.get("std"):
        settings |= {"image_mean": list(described["mean"]), "image_std": list(described["std"])}
    if described.get("crop_pct", 1.0) < 1.0:
        settings["crop_pct"] = described["crop_pct"]
    return settings


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


def header(config: HFViTConfig, fields: dict[str, Any], processor: dict[str, Any]) -> dict[str, str]:
    """Header of a safetensors file in timm's names, from which `read` restores the configuration."""
    stored = {"fields": fields, "registers_in_table": registers_in_table(config), "processor": processor}
    return {"format": "pt", CONFIG_KEY: json.dumps(stored)}


def folder_config(config: HFViTConfig, processor: dict[str, Any]) -> dict[str, Any]:
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
            "input_size": [config.num_channels, height, width],
            "num_classes": config.num_labels,
            "pool_size": None,
            "first_conv": "patch_embed.proj" if config.resnet_depths is None else "patch_embed.backbone.stem.conv",
            "classifier": "head",
            "mean": processor["image_mean"],
            "std": processor["image_std"],
            "interpolation": "bicubic" if processor["resample"] == 3 else "bilinear",
            "crop_pct": processor.get("crop_pct", 1.0),
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
    """timm's entry point of the same kind; sizes that differ from it are in the arguments beside it."""
    if config.resnet_depths is not None:
        return HYBRIDS.get(tuple(config.resnet_depths), HYBRIDS[(2, 2, 2, 2)])
    sizes = {row[1]: name.split("-")[1] for name, row in PRESETS.items() if row[8] is None}
    size = sizes.get(config.hidden_size, "base")
    return "vit_huge_patch14_224" if size == "huge" else f"vit_{size}_patch16_224"
