"""Google's `.npz` files, in and out: vision_transformer (original, AugReg, SAM, hybrids) and big_vision.

Sources: `vit_jax/checkpoint.py` at c6de1e5, `big_vision/models/vit.py` and `big_vision/utils.py` at 0127fb6.
The published vision_transformer files number their modules as Flax did before Linen, per block and not per type.

Tests: tests/hf_vit/checkpoints/test_checkpoints_google.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import HFViTError
from ...image_processing import GOOGLE
from ...modeling.configuration_hf_vit import HFViTConfig
from ..mapping import CHANNELS, HWIO, SAME, TRANSPOSED, KeyMapping, Transform, rename, shape, stacked
from ..spec import CheckpointSpec, image_size_of_table, patch_size
from ..tensor_file import TensorFile


MODEL_TYPES: tuple[str, ...] = ()
PREFIXES = ("", "params/", "opt/target/", "params/img/", "img/")
POSITION_NAMES = ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding", "pos_embedding")
NUMBERING = {
    "pre-Linen": {
        "n1": "LayerNorm_0",
        "sa": "MultiHeadDotProductAttention_1",
        "n2": "LayerNorm_2",
        "mlp": "MlpBlock_3",
    },
    "Linen": {"n1": "LayerNorm_0", "sa": "MultiHeadDotProductAttention_0", "n2": "LayerNorm_1", "mlp": "MlpBlock_0"},
}

# (their name inside a block, our name inside a layer, transform); "heads*" are filled in with the number of heads.
BLOCK = (
    ("{n1}/scale", "layernorm_before.weight", "same"),
    ("{n1}/bias", "layernorm_before.bias", "same"),
    ("{sa}/query/kernel", "attention.q_proj.weight", "heads"),
    ("{sa}/query/bias", "attention.q_proj.bias", "heads_bias"),
    ("{sa}/key/kernel", "attention.k_proj.weight", "heads"),
    ("{sa}/key/bias", "attention.k_proj.bias", "heads_bias"),
    ("{sa}/value/kernel", "attention.v_proj.weight", "heads"),
    ("{sa}/value/bias", "attention.v_proj.bias", "heads_bias"),
    ("{sa}/out/kernel", "attention.o_proj.weight", "heads_out"),
    ("{sa}/out/bias", "attention.o_proj.bias", "same"),
    ("{n2}/scale", "layernorm_after.weight", "same"),
    ("{n2}/bias", "layernorm_after.bias", "same"),
    ("{mlp}/Dense_0/kernel", "mlp.fc1.weight", "dense"),
    ("{mlp}/Dense_0/bias", "mlp.fc1.bias", "same"),
    ("{mlp}/Dense_1/kernel", "mlp.fc2.weight", "dense"),
    ("{mlp}/Dense_1/bias", "mlp.fc2.bias", "same"),
)
MAP_HEAD = (
    ("probe", "probe", "same"),
    *(
        (theirs.format(sa="MultiHeadDotProductAttention_0", n2="LayerNorm_0", mlp="MlpBlock_0"), ours, transform)
        for theirs, ours, transform in ((t, o.replace("layernorm_after", "layernorm"), f) for t, o, f in BLOCK[2:])
    ),
)
HEADS = (("pre_logits", "vit.pooler.dense"), ("head", "classifier"))


@dataclass(frozen=True)
class GoogleLayout:
    """The choices of naming that differ between files."""

    numbering: str = "pre-Linen"
    position: str = POSITION_NAMES[0]
    scanned: bool = False
    prefix: str = ""
    map_prefix: str = "MAPHead_0/"
    group_norm: Transform = CHANNELS


VISION_TRANSFORMER = GoogleLayout()
BIG_VISION = GoogleLayout(numbering="Linen", position=POSITION_NAMES[2])


def flax_transforms(heads: int) -> dict[str, Transform]:
    """The shapes of Flax's modules; attention kernels keep a head axis, which is compared, not just flattened."""

    def checked(axis: int, ndim: int):
        def check(t):
            if t.ndim != ndim or t.shape[axis] != heads:
                raise ValueError(f"axis {axis} of {ndim} must hold {heads} heads")
            return t

        return check

    kernel, bias, out = checked(1, 3), checked(0, 2), checked(0, 3)
    return {
        "same": SAME,
        "dense": TRANSPOSED,
        "heads": Transform(
            lambda t: [kernel(t).flatten(1).t()],  # (D, k, D/k) -> (D, D)
            lambda t: [t.t().unflatten(1, (heads, -1))],
        ),
        "heads_bias": Transform(lambda t: [bias(t).flatten()], lambda t: [t.unflatten(0, (heads, -1))]),
        "heads_out": Transform(
            lambda t: [out(t).flatten(0, 1).t()],  # (k, D/k, D) -> (D, D)
            lambda t: [t.t().unflatten(0, (heads, -1))],
        ),
    }


def key_mappings(config: HFViTConfig, layout: GoogleLayout) -> list[KeyMapping]:
    """Mappings of all tensors of the model."""
    shapes = flax_transforms(config.num_attention_heads)
    mappings = _embedding_rules(config, layout)
    block = [row for row in BLOCK if config.qkv_bias or not re.search(r"(query|key|value)/bias", row[0])]
    for theirs, ours, transform in block:
        theirs = theirs.format(**NUMBERING[layout.numbering])
        names = [f"vit.layers.{i}.{ours}" for i in range(config.num_hidden_layers)]
        if layout.scanned:
            whole = stacked(shapes[transform], config.num_hidden_layers)
            mappings.append(KeyMapping((f"Transformer/encoderblock/{theirs}",), tuple(names), whole))
        else:
            mappings += [
                rename(f"Transformer/encoderblock_{i}/{theirs}", n, shapes[transform]) for i, n in enumerate(names)
            ]
    mappings += [
        rename("Transformer/encoder_norm/scale", "vit.layernorm.weight"),
        rename("Transformer/encoder_norm/bias", "vit.layernorm.bias"),
    ]
    if config.pooling == "map":
        mappings += [
            rename(layout.map_prefix + theirs, f"vit.map_head.{ours}", shapes[transform])
            for theirs, ours, transform in MAP_HEAD
        ]
    present = {"pre_logits": config.representation_size, "head": config.num_labels}
    for theirs, ours in HEADS:
        if present[theirs]:
            mappings += [
                rename(f"{theirs}/kernel", f"{ours}.weight", TRANSPOSED),
                rename(f"{theirs}/bias", f"{ours}.bias"),
            ]
    return [KeyMapping(tuple(layout.prefix + n for n in r.theirs), r.ours, r.transform) for r in mappings]


def _embedding_rules(config: HFViTConfig, layout: GoogleLayout) -> list[KeyMapping]:
    ours = "vit.embeddings."
    patches = ours + "patch_embeddings."
    mappings = [
        rename("embedding/kernel", patches + "projection.weight", HWIO),
        rename("embedding/bias", patches + "projection.bias"),
    ]
    if config.use_class_token:
        mappings.append(rename("cls", ours + "cls_token"))
    if config.has_position_table:
        mappings.append(rename(layout.position, ours + "position_embeddings"))
    if config.resnet_depths is None:
        return mappings

    def convolution(theirs: str, ours: str, suffix: str) -> list[KeyMapping]:
        return [
            rename(f"{theirs}conv{suffix}/kernel", f"{patches}backbone.{ours}conv{suffix}.weight", HWIO),
            rename(f"{theirs}gn{suffix}/scale", f"{patches}backbone.{ours}gn{suffix}.weight", layout.group_norm),
            rename(f"{theirs}gn{suffix}/bias", f"{patches}backbone.{ours}gn{suffix}.bias", layout.group_norm),
        ]

    mappings += convolution("", "", "_root")
    for stage, depth in enumerate(config.resnet_depths):
        for unit in range(depth):
            for suffix in ("_proj", "1", "2", "3") if unit == 0 else ("1", "2", "3"):
                mappings += convolution(f"block{stage + 1}/unit{unit + 1}/", f"stages.{stage}.units.{unit}.", suffix)
    return mappings


# -- reading ----------------------------------------------------------------------------------------------------------


def matches(file: TensorFile) -> bool:
    """Whether the names are those of a Google ViT, under any prefix."""
    return any(name.endswith("Transformer/encoder_norm/scale") for name in file) and any(
        name.endswith("embedding/kernel") for name in file
    )


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Infer architecture and layout from names and shapes.

    Args:
        requested: fields from the caller; `image_size` or `checkpoint_image_size` is needed if the grid is not square.

    Raises:
        HFViTError: an unknown prefix, an incomplete file, or a grid that the file cannot tell.
    """
    prefix = _find_prefix(file)
    shapes = {name.removeprefix(prefix): size for name, size in file.shapes.items() if name.startswith(prefix)}
    layout, depth = _find_layout(file, shapes, prefix)
    fields = _google_architecture(file, shapes, layout, depth) | _tokens(shapes, layout)
    assumptions = []
    if layout.position in shapes:
        rows = shapes[layout.position][1] - int(fields["use_class_token"] and fields["class_token_has_position"])
        fields["image_size"] = image_size_of_table(file.path, rows, fields, requested)
    elif layout.numbering == "pre-Linen" and "position_embedding_type" not in requested:
        raise HFViTError(
            f"{file.path}: incomplete, it has no position table '{prefix}{POSITION_NAMES[0]}'; a model without one is "
            'said with position_embedding_type="none" or "sincos2d"'
        )
    else:
        if "position_embedding_type" not in requested:
            assumptions.append('sine-cosine positions, for it has no table (position_embedding_type="none")')
        fields["image_size"] = requested.get("checkpoint_image_size", requested.get("image_size", 224))
        if "image_size" not in requested:
            assumptions.append(f"image size {fields['image_size']} (image_size=)")
    if fields["pooling"] == "gap" and "pooling" not in requested:
        assumptions.append('the mean over patches, for it has no class token (pooling="first" is big_vision\'s "0")')
    family = (
        "big_vision" if layout.position == "pos_embedding" or layout.numbering == "Linen" else "vision_transformer"
    )
    return CheckpointSpec(
        format=f"Google {family} npz, {layout.numbering} numbering"
        + (", scanned blocks" if layout.scanned else "")
        + (f", under {prefix}" if prefix else ""),
        fields=fields,
        not_specified={"position_embedding_type"} | ({"pooling"} if fields["pooling"] != "map" else set()),
        key_mappings=lambda config: key_mappings(config, layout),
        # next to the weights lie the optimizer's state, counters or the other tower; under the prefix all must be used
        unused={name for name in file if not name.startswith(prefix)},
        assumptions=assumptions,
        image_processing=GOOGLE.at_size(fields["image_size"]),
    )


def _find_prefix(file: TensorFile) -> str:
    for prefix in PREFIXES:
        if prefix + "embedding/kernel" in file and prefix + "Transformer/encoder_norm/scale" in file:
            return prefix
    prefixes = [n.removesuffix("embedding/kernel") for n in file if n.endswith("embedding/kernel")]
    known = ", ".join(repr(p) for p in PREFIXES)
    raise HFViTError(
        f"{file.path}: its ViT lies under {', '.join(repr(p) for p in prefixes[:3])}, which is no known prefix "
        f"({known}); save that part of the tree alone"
    )


def _find_layout(file: TensorFile, shapes: dict, prefix: str) -> tuple[GoogleLayout, int]:
    scanned = any(name.startswith("Transformer/encoderblock/") for name in shapes)
    block = "Transformer/encoderblock/" if scanned else "Transformer/encoderblock_0/"
    numbering = "pre-Linen" if f"{block}LayerNorm_2/scale" in shapes else "Linen"
    names = NUMBERING[numbering]
    query = f"{block}{names['sa']}/query/kernel"
    if query not in shapes or f"{block}{names['mlp']}/Dense_0/kernel" not in shapes:
        raise HFViTError(
            f"{file.path}: incomplete, the first block has no '{prefix}{query}' or no MLP; blocks are counted from 0"
        )
    if len(shapes[query]) != 3 + scanned:
        raise HFViTError(
            f"{file.path}: '{prefix}{query}' has shape {shape(shapes[query])} instead of (width, heads, head width): "
            "the file is not in Google's layout"
        )
    if scanned:
        depth = shapes[query][0]
    else:
        depth = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"Transformer/encoderblock_(\d+)/", name)))
        if depth > len(shapes):
            raise HFViTError(f"{file.path}: incomplete, its blocks are numbered to {depth - 1}")
    position = next((name for name in POSITION_NAMES if name in shapes), POSITION_NAMES[2])
    map_prefix = "" if "probe" in shapes else "MAPHead_0/"
    flat = len(shapes.get("gn_root/scale", (1, 1, 1, 1))) == 1
    return GoogleLayout(numbering, position, scanned, prefix, map_prefix, SAME if flat else CHANNELS), depth


def _google_architecture(file: TensorFile, shapes: dict, layout: GoogleLayout, depth: int) -> dict[str, Any]:
    names = NUMBERING[layout.numbering]
    block = "Transformer/encoderblock/" if layout.scanned else "Transformer/encoderblock_0/"
    _, heads, head_dim = shapes[f"{block}{names['sa']}/query/kernel"][-3:]
    if len(shapes["embedding/kernel"]) != 4:
        raise HFViTError(
            f"{file.path}: embedding/kernel of shape {shape(shapes['embedding/kernel'])} is no convolution: a NaFlex "
            "or other ViT over flattened patches, which has no counterpart in hf_vit"
        )
    patch_h, patch_w, channels, width = shapes["embedding/kernel"]
    if heads * head_dim != width:
        raise HFViTError(f"{file.path}: {heads} heads of width {head_dim} do not make the token width {width}")
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": shapes[f"{block}{names['mlp']}/Dense_0/kernel"][-1],
        "qkv_bias": f"{block}{names['sa']}/query/bias" in shapes,
        "patch_size": patch_size(patch_h, patch_w),
        "num_channels": channels,
        "num_labels": shapes["head/kernel"][-1] if "head/kernel" in shapes else 0,
        "representation_size": shapes["pre_logits/kernel"][-1] if "pre_logits/kernel" in shapes else None,
        "num_register_tokens": 0,
        "layer_scale_init": None,
        "qk_norm": False,
        "resnet_depths": None,
    }
    if "conv_root/kernel" in shapes:
        units = [m for name in shapes if (m := re.match(r"block(\d+)/unit(\d+)/conv1/kernel", name))]
        stages = max((int(m[1]) for m in units), default=0)
        fields |= {
            "num_channels": shapes["conv_root/kernel"][2],
            "resnet_depths": tuple(
                max((int(m[2]) for m in units if int(m[1]) == s + 1), default=0) for s in range(stages)
            ),
            "resnet_width_factor": shapes["conv_root/kernel"][3] / 64,
        }
    return fields


def _tokens(shapes: dict, layout: GoogleLayout) -> dict[str, Any]:
    """Class token, position table and pooling: read off the names, never off a length."""
    has_class = "cls" in shapes
    if layout.map_prefix + "probe" in shapes:
        pooling = "map"
    else:
        pooling = "token" if has_class else "gap"
    return {
        "use_class_token": has_class,
        "class_token_has_position": layout.position != "pos_embedding",
        "position_embedding_type": "learned" if layout.position in shapes else "sincos2d",
        "pooling": pooling,
    }


# -- writing ----------------------------------------------------------------------------------------------------------

_CANNOT: tuple[tuple[str, Callable[[HFViTConfig], bool]], ...] = (
    ("register tokens", lambda c: c.num_register_tokens > 0),
    ("LayerScale", lambda c: c.layer_scale_init is not None),
    ("QK-norm", lambda c: c.qk_norm),
    ("positions along the sequence", lambda c: c.position_embedding_type == "learned1d"),
    ("no positions at all", lambda c: c.position_embedding_type == "none"),
)
CANNOT_VISION_TRANSFORMER = (
    *_CANNOT,
    (
        'pooling other than "token", or "gap" without a class token',
        lambda c: _pools(c) not in ("token True", "gap False"),
    ),
    ("sine-cosine positions", lambda c: c.position_embedding_type == "sincos2d"),
)
CANNOT_BIG_VISION = (
    *_CANNOT,
    ("a ResNet stem (hybrid)", lambda c: c.resnet_depths is not None),
    (
        'pooling other than "token", or "gap", "map", "first" without a class token',
        lambda c: _pools(c) not in ("token True", "gap False", "map False", "first False"),
    ),
)


def _pools(config: HFViTConfig) -> str:
    return f"{config.pooling} {bool(config.use_class_token)}"


def google_numerics(config: HFViTConfig) -> dict[str, Any]:
    """What Google's code computes for this architecture, field by field."""
    numerics = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    stem = {
        "group_norm_eps": 1e-6,
        "weight_standardization": "std_plus_eps",
        "weight_standardization_eps": 1e-5,
    }
    return numerics if config.resnet_depths is None else numerics | stem
