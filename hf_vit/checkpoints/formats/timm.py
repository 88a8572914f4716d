"""timm's ViTs, both ways: `vit_*`, `deit*`, hybrids, `eva*`, `beit*`, PE, DINOv3, AIMv2; a state dict or a folder.

A folder's config.json names the architecture. timm's code ties facts to that name which no tensor shows: epsilon,
activation, heads, rotary positions (`implied_by_name`). For a file without a folder, the caller must supply those that
cannot be assumed.

Source: pytorch-image-models 1.0.31, `timm/models/vision_transformer.py`, `eva.py`, `beit.py`, `deit.py`,
`vision_transformer_hybrid.py`. Numerics are timm's: erf GELU, LayerNorm 1e-6, GroupNorm 1e-5, weight standardization
with its eps inside the root.

Tests: tests/hf_vit/checkpoints/test_checkpoints_timm.py.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import HFViTError
from ...image_processing import CLIP_MEAN, CLIP_STD, IMAGENET_CROP, ImageProcessing
from ...modeling.configuration_hf_vit import HFViTConfig
from ..mapping import KeyMapping, Transform, rename, split, weight_and_bias
from ..spec import (
    MAE_HEAD,
    CheckpointSpec,
    count_layers,
    grid_of_table,
    image_size_of_table,
    linear_head,
    patch_size,
)
from ..tensor_file import TensorFile
from .encoder import EncoderNames, encoder_mappings, linear_classifier, norm
from .timm_architectures import (
    MEAN,
    NO_CLASS_POSITION,
    NO_FINAL_NORM,
    PE,
    POST_NORM,
    RADIO,
    attention_heads,
    implied_by_name,
)
from .transformers import TWO_TOKENS, two_heads
from .transformers_folder import not_specified


MODEL_TYPES: tuple[str, ...] = ("timm_wrapper",)  # transformers' wrapper: timm's names and timm's config.json
NUMERICS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "position_interpolation": "bicubic_antialias"}
HYBRID_NUMERICS = {
    "group_norm_eps": 1e-5,
    "weight_standardization": "sqrt_var_plus_eps",
    "weight_standardization_eps": 1e-8,
}
UNUSED = (
    r"mask_token$|decoder_|(head|dino_head|ibot_head)\.(mlp\.|last_layer|prototypes)|local_cls_norm\.|.*rel.*_index$"
)
CONFIG_KEY = "hf_vit_config"  # in the header of files that we write: the configuration, which timm's names lack

# (names of tensors that only other architectures have, the feature).
UNSUPPORTED = (
    (r"patch_embed\.backbone\.(conv1\.0|layer1|body)\.", "a ResNet-D stem"),
    (r"patch_embed\.backbone\.stem\.\d+\.", "a convolutional stem other than the ResNet"),
    (r"blocks\.\d+\.(attns|ffns)\.", "parallel blocks"),
    (r"blocks\.\d+\.(in_proj|mlp_out_proj|attn_out_proj|qkv_bias)", "parallel scaling blocks"),
    (r"blocks\.\d+\.(attn|mlp)\.inner_attn_ln\.", "norms inside attention or MLP"),
    (r"blocks\.\d+\.attn\.(lambda_|sub_norm|gate)", "differential or gated attention"),
    (r"rope\.freqs", "mixed learned rotary positions"),
    (r"blocks\.\d+\.attn\.qkv\.[A-Z]", "multiway blocks (BEiT-3)"),
    (r"layers\.\d+\.blocks\.", "a hierarchical transformer (Swin)"),
)
MAP_HEAD = (("q", "attention.q_proj"), ("proj", "attention.o_proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))


@dataclass(frozen=True)
class Style:
    """Names and packing of tensors in a class of timm.

    Attributes:
        gamma: `gamma_1` (Eva, Beit) or `ls1.gamma` (VisionTransformer). fused: one `qkv` or three projections.
        packed: a gated MLP in one `fc1`. registers_in_table: registers have rows of positions. distilled: a second
            class token `dist_token`, and two heads.
    """

    gamma: bool = False
    fused: bool = True
    packed: bool = True
    registers_in_table: bool = False
    distilled: bool = False


def timm_names(config: HFViTConfig, style: Style) -> EncoderNames:
    """Names of a class of timm."""
    registers_apart = style.registers_in_table  # mapped together with the position table
    return EncoderNames(
        layer="blocks.{n}.",
        norm1="norm1",
        norm2="norm2",
        patch="patch_embed.proj",
        cls_token=None if style.distilled else "cls_token",
        positions=None if registers_apart else "pos_embed",
        registers=None if registers_apart else "reg_token",
        patch_norm="patch_embed.norm",
        pre_layernorm="norm_pre",
        final_norm="norm",
        # with a class token to read, the norm of the pooled vector and that of all tokens are the same
        pooled_norm="norm" if config.pooling == "token" else "fc_norm",
        query="attn.q_proj",
        key="attn.k_proj",
        value="attn.v_proj",
        qkv_weight="attn.qkv.weight" if style.fused else None,
        qkv_bias="attn.qkv.bias",
        query_bias="attn.q_bias",
        value_bias="attn.v_bias",
        query_norm="attn.q_norm",
        key_norm="attn.k_norm",
        attention_norm="attn.norm",
        output="attn.proj",
        gate_up="mlp.fc1" if style.packed else None,
        gate="mlp.fc1_g",
        up="mlp.fc1_x",
        down="mlp.fc2",
        layer_scale=("gamma_1", "gamma_2") if style.gamma else ("ls1.gamma", "ls2.gamma"),
        relative_bias="attn.relative_position_bias_table",
        shared_relative_bias="rel_pos_bias.relative_position_bias_table",
    )


def folded_registers(class_rows: int, registers: int) -> Transform:
    """Add the rows of registers in timm's position table to the registers: both are constants of the network."""

    def to_ours(table: torch.Tensor, tokens: torch.Tensor):
        register_rows = table[:, class_rows : class_rows + registers]
        return [torch.cat([table[:, :class_rows], table[:, class_rows + registers :]], dim=1), tokens + register_rows]

    def to_theirs(table: torch.Tensor, tokens: torch.Tensor):
        return [torch.cat([table[:, :class_rows], torch.zeros_like(tokens), table[:, class_rows:]], dim=1), tokens]

    return Transform(to_ours, to_theirs)


def key_mappings(config: HFViTConfig, style: Style) -> list[KeyMapping]:
    """Mappings of all tensors of the model."""
    mappings = encoder_mappings(config, timm_names(config, style))
    ours = "vit.embeddings."
    if style.distilled:
        mappings.append(KeyMapping(("cls_token", "dist_token"), (ours + "cls_token",), TWO_TOKENS))
    if style.registers_in_table:
        transform = folded_registers(config.num_class_rows, config.num_register_tokens)
        tokens = (ours + "position_embeddings", ours + "register_tokens")
        mappings.append(KeyMapping(("pos_embed", "reg_token"), tokens, transform))
    mappings += _hybrid_mappings(config)
    if config.pooling == "map":
        mappings.append(rename("attn_pool.latent", "vit.map_head.probe"))
        for kind in ("weight", "bias"):
            parts = tuple(f"vit.map_head.attention.{letter}_proj.{kind}" for letter in "kv")
            mappings.append(KeyMapping((f"attn_pool.kv.{kind}",), parts, split(2)))
        for a, b in MAP_HEAD:
            mappings += weight_and_bias(f"attn_pool.{a}", f"vit.map_head.{b}")
        mappings += norm(config, "attn_pool.norm", "vit.map_head.layernorm")
    if style.distilled and config.num_labels:
        return mappings + two_heads("head", "head_dist")
    return mappings + linear_classifier(config, "head")


def _hybrid_mappings(config: HFViTConfig) -> list[KeyMapping]:
    mappings: list[KeyMapping] = []
    if config.resnet_depths is None:
        return mappings
    theirs, ours = "patch_embed.backbone.", "vit.embeddings.patch_embeddings.backbone."
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
    """Infer the architecture from names and shapes, and from timm's config.json if there is one.

    Raises:
        HFViTError: a feature that `HFViTConfig` does not have (it is named), or a question for the caller.
    """
    for pattern, feature in UNSUPPORTED:
        unknown = next((key for key in file if re.match(pattern, key)), None)
        if unknown:
            raise HFViTError(f"{file.path}: has {feature} ('{unknown}'), which has no counterpart in hf_vit")
    if CONFIG_KEY in file.metadata:
        return _read_own(file)
    hub = _described(sidecars)
    name = hub.get("architecture") or ""
    if re.match(RADIO, name):
        raise HFViTError(
            f"{file.path}: this is C-RADIO (a linear patch projection, cropped positions), not a plain ViT"
        )
    if re.match(POST_NORM, name):
        raise HFViTError(f"{file.path}: {name} has its norms after attention and MLP (post-norm), not a plain ViT's")
    fields, style, assumptions = _timm_architecture(file, requested, name, hub)
    if "pos_embed" in file:
        size, class_rows, registers_in_table = _position_table(file, fields, requested, name, hub)
        style = replace(style, registers_in_table=registers_in_table)
        fields |= {
            "image_size": size,
            "class_token_has_position": bool(class_rows),
            "position_embedding_type": "learned",
        }
    else:
        fields |= _size_without_table(file, fields, requested, hub)
    unused = {key for key in file if re.match(UNUSED, key)}
    labels, head = _head(file, style, requested)
    names = hub.get("label_names") or (hub.get("pretrained_cfg") or {}).get("label_names")
    if isinstance(names, list) and len(names) == labels:
        fields["id2label"] = dict(enumerate(map(str, names)))
    processing = _image_processing(unused, fields)
    if not name:
        assumptions.append(f"images: {processing.describe()}")
    notes = [f"not used: {', '.join(sorted(unused | head)[:10])}"] if unused | head else []
    return CheckpointSpec(
        format=f"timm {name or 'vision transformer'}",
        fields=fields | {"num_labels": labels},
        not_specified=not_specified(fields) - {"image_size"}
        | {
            "num_attention_heads",
            "layer_scale_init",
            *HYBRID_NUMERICS,
            "rope_theta",
            "rope_axes",
            "rope_reference_grid",
        },
        key_mappings=lambda config: key_mappings(config, style),
        unused=unused | head,
        assumptions=assumptions,
        notes=notes,
        image_processing=processing,
        new_head=_new_head(name, unused),
    )


def _new_head(name: str, unused: set[str]) -> dict[str, Any]:
    """Fields for a new classifier, as the family's authors fine-tune it."""
    if any(key.startswith("decoder_") for key in unused):
        return MAE_HEAD
    return {"head_input": "token_and_mean"} if re.search(r"dinov[23]", name) else {}


def _described(sidecars: dict[str, dict]) -> dict[str, Any]:
    """timm's config.json, or the same from open_clip's for a tower of timm."""
    hub = sidecars.get("config.json") or {}
    vision = ((sidecars.get("open_clip_config.json") or {}).get("model_cfg") or {}).get("vision_cfg") or {}
    if "architecture" not in hub and vision.get("timm_model_name"):
        return {"architecture": vision["timm_model_name"], "global_pool": vision.get("timm_pool") or None}
    return hub


def _head(file: TensorFile, style: Style, requested: dict[str, Any]) -> tuple[int, set[str]]:
    if style.distilled and "head_dist.weight" in file and "head.weight" in file:
        return file.shapes["head.weight"][0], set()
    return linear_head(file, "head", requested, pattern=r"(head|head_dist)\.(?!mlp\.|last_layer|prototypes)")


def _image_processing(unused: set[str], fields: dict[str, Any]) -> ImageProcessing:
    """The image processing of a file without a config.json."""
    if any(key.startswith("decoder_") for key in unused):  # MAE
        return IMAGENET_CROP.at_size(fields["image_size"])
    pretrained_cfg: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    if fields["pre_layernorm"]:
        pretrained_cfg = {"mean": CLIP_MEAN, "std": CLIP_STD, "crop_pct": 1.0}
    return ImageProcessing.from_timm(pretrained_cfg).at_size(fields["image_size"])


def _read_own(file: TensorFile) -> CheckpointSpec:
    """A file that `save_checkpoint` wrote: its header holds our configuration."""
    stored = json.loads(file.metadata[CONFIG_KEY])
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in stored["fields"].items()}
    fields["id2label"] = {int(i): label for i, label in stored["fields"]["id2label"].items()}
    fields["num_labels"] = len(fields["id2label"])
    style = Style(**stored["style"]) if "style" in stored else Style(registers_in_table=stored["registers_in_table"])
    return CheckpointSpec(
        format="timm's names, written by hf_vit",
        fields=fields,
        not_specified={*NUMERICS, *HYBRID_NUMERICS},
        key_mappings=lambda config: key_mappings(config, style),
        image_processing=ImageProcessing.from_timm(stored["pretrained_cfg"])
        if "pretrained_cfg" in stored
        else _processing_of_0_1(stored["processor"], fields["image_size"]),
    )


def _timm_architecture(
    file: TensorFile, requested: dict[str, Any], name: str, hub: dict[str, Any]
) -> tuple[dict[str, Any], Style, list[str]]:
    """The fields without those of positions, the class's style, and the assumptions."""
    shapes, args = file.shapes, hub.get("model_args") or {}
    first = "blocks.0."
    for needed in (f"{first}attn.proj.weight", f"{first}norm1.weight", f"{first}mlp.fc2.weight"):
        if needed not in file:
            raise HFViTError(f"{file.path}: has no '{needed}': not a plain pre-norm vision transformer of timm")
    width, channels, patch_h, patch_w = shapes["patch_embed.proj.weight"]
    hidden = shapes[f"{first}mlp.fc2.weight"][1]
    separate_gate = f"{first}mlp.fc1_g.weight" in file
    packed = not separate_gate and shapes[f"{first}mlp.fc1.weight"][0] == 2 * hidden
    has_class = "cls_token" in file
    style = Style(
        gamma=f"{first}gamma_1" in file,
        fused=f"{first}attn.qkv.weight" in file,
        packed=packed,
        distilled="dist_token" in file,
    )
    separate_biases = f"{first}attn.q_bias" in file or (f"{first}attn.q_proj.bias" in file)
    relative, shared = (
        f"{first}attn.relative_position_bias_table" in file,
        "rel_pos_bias.relative_position_bias_table" in file,
    )
    rms = f"{first}norm1.bias" not in file
    final_norm = "pooled" if "fc_norm.weight" in file else "tokens"
    without = re.match(NO_FINAL_NORM, name) or args.get("final_norm") is False or requested.get("final_norm") == "none"
    if without and final_norm == "tokens" and "norm.weight" not in file:
        final_norm = "none"
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(file, r"blocks\.(\d+)\."),
        "intermediate_size": hidden,
        "mlp_type": "swiglu" if separate_gate or packed else "mlp",
        "mlp_norm": f"{first}mlp.norm.weight" in file,
        "attention_norm": f"{first}attn.norm.weight" in file,
        "norm_type": "rms" if rms else "layer",
        "patch_size": patch_size(patch_h, patch_w),
        "num_channels": channels,
        "representation_size": None,
        "qkv_bias": separate_biases or f"{first}attn.qkv.bias" in file,
        "key_bias": not separate_biases or f"{first}attn.k_proj.bias" in file,
        "dense_bias": not rms or f"{first}attn.proj.bias" in file,
        "patch_bias": "patch_embed.proj.bias" in file or "norm_pre.weight" not in file,
        "patch_norm": "patch_embed.norm.weight" in file,
        "pre_layernorm": "norm_pre.weight" in file,
        "final_norm": final_norm,
        "use_class_token": has_class,
        "num_class_tokens": 2 if style.distilled else 1,
        "num_register_tokens": shapes["reg_token"][1] if "reg_token" in file else 0,
        "layer_scale_init": 1e-5 if style.gamma or f"{first}ls1.gamma" in file else None,
        "qk_norm": f"{first}attn.q_norm.weight" in file,
        "relative_position_bias": ("both" if shared else "layer") if relative else "shared" if shared else None,
        "rope": None,
        "resnet_depths": None,
        "initializer": "truncated_normal",
        **NUMERICS,
    }
    if f"{first}mlp.fc2.bias" in file and not fields["dense_bias"]:
        raise HFViTError(f"{file.path}: biases of only some of the dense layers have no counterpart in hf_vit")
    fields |= _pooling(file, fields, name, hub)
    if style.distilled:
        fields |= {"pooling": "prefix_mean", "head_input": "two_tokens"}
    heads, assumptions = attention_heads(file, requested, name, args, width)
    fields["num_attention_heads"] = heads
    implied, more = implied_by_name(file, fields, requested, name, args)
    return fields | implied | _stem_fields(file), style, assumptions + more


def _pooling(file: TensorFile, fields: dict[str, Any], name: str, hub: dict[str, Any]) -> dict[str, Any]:
    """Pooling; if config.json does not give it, the mean if a norm follows the pooling, else the class token."""
    if "attn_pool.latent" in file:
        is_pe = bool(re.match(PE, name)) or fields["pre_layernorm"]
        prefix = fields["use_class_token"] or fields["num_register_tokens"]
        if prefix and not is_pe and not _pools_prefix(name, hub):
            return {"pooling": "map", "map_over_prefix": False}
        return {"pooling": "map", "map_over_prefix": True} | ({"map_num_heads": 8} if is_pe else {})
    global_pool = (hub.get("model_args") or {}).get("global_pool") or hub.get("global_pool")
    mean = global_pool == "avg" or (
        global_pool is None and (fields["final_norm"] == "pooled" or bool(re.match(MEAN, name)))
    )
    return {"pooling": "gap" if mean or not fields["use_class_token"] else "token"}


def _pools_prefix(name: str, hub: dict[str, Any]) -> bool:
    return bool((hub.get("model_args") or {}).get("pool_include_prefix", name.startswith("test_vit3")))


def _size_without_table(
    file: TensorFile, fields: dict[str, Any], requested: dict[str, Any], hub: dict[str, Any]
) -> dict[str, Any]:
    """Image size of a model whose positions are rotary, relative or none."""
    args = hub.get("model_args") or {}
    configured = args.get("img_size") or ((hub.get("pretrained_cfg") or {}).get("input_size") or [])[1:]
    size: Any = requested.get("checkpoint_image_size") or configured or requested.get("image_size") or 224
    size = tuple(size) if isinstance(size, list) else size
    tables = [shape for key, shape in file.shapes.items() if key.endswith("relative_position_bias_table")]
    patch = fields["patch_size"]
    if tables:  # (2 h - 1) (2 w - 1) + 3 rows
        side = (math.isqrt(tables[0][0] - 3) + 1) // 2
        size = side * patch if isinstance(patch, int) else (side * patch[0], side * patch[1])
    none = requested.get("position_embedding_type") == "none" or args.get("pos_embed") == "none"
    if not tables and fields["rope"] is None and requested.get("rope") is None and not none:
        raise HFViTError(
            f"{file.path}: incomplete, it has no 'pos_embed'; a model without positions is said with "
            'position_embedding_type="none"'
        )
    return {"image_size": size, "position_embedding_type": "none", "class_token_has_position": False}


def _stem_fields(file: TensorFile) -> dict[str, Any]:
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
    """(image size, class rows, whether registers have rows too), which the tensors do not show.

    By timm's default every prefix token has a row; in models with registers, and some without, none has. A config.json
    decides; without one the default is assumed, unless `checkpoint_image_size` agrees only with the alternative.
    """
    rows, args = file.shapes["pos_embed"][1], hub.get("model_args") or {}
    class_token = fields["num_class_tokens"] if fields["use_class_token"] else 0
    registers = fields["num_register_tokens"]
    without_rows = args.get("no_embed_class", True if name.startswith(NO_CLASS_POSITION) else None)
    if "class_token_has_position" in requested:
        without_rows = not requested["class_token_has_position"]
    choices = [registers > 0, registers == 0] if without_rows is None else [bool(without_rows)]
    cells = {choice: rows - (0 if choice else class_token + registers) for choice in choices}

    def result(size: Any, choice: bool) -> tuple[Any, int, bool]:
        return size, class_token * (not choice), registers > 0 and not choice

    configured: list[Any] = [args.get("img_size"), ((hub.get("pretrained_cfg") or {}).get("input_size") or [])[1:]]
    for size in [requested.get("checkpoint_image_size"), *configured]:
        for choice in choices if size else []:
            if grid_of_table(cells[choice], fields, size):
                return result(tuple(size) if isinstance(size, list) else size, choice)
    try:
        return result(image_size_of_table(file.path, cells[choices[0]], fields, requested), choices[0])
    except HFViTError as error:
        prefix_rows = rows - cells[choices[0]]
        raise HFViTError(
            f"{error}. {prefix_rows} of its {rows} rows were taken for class and register tokens; if that is wrong, "
            f"say class_token_has_position={choices[0]}"
        ) from error


def _processing_of_0_1(settings: dict[str, Any], image_size: Any) -> ImageProcessing:
    """From a header of version 0.1.0: settings of a ViTImageProcessor without size, and crop_pct."""
    without_crop = {key: value for key, value in settings.items() if key != "crop_pct"}
    processing = ImageProcessing.from_transformers(without_crop).at_size(image_size)
    if (crop_pct := settings.get("crop_pct")) and processing.output_size is not None:
        height, width = processing.output_size
        if height == width:
            return replace(processing, resize_to=int(height / crop_pct), crop_to=(height, width))
    return processing
