"""Key mappings of an encoder, from a library's names of its parts.

Our tensors follow from the configuration, so a format only defines their names and packing in the library.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

from dataclasses import dataclass

import torch

from ...modeling.configuration_hf_vit import HFViTConfig
from ...modeling.modeling_hf_vit import HFViTForImageClassification
from ..mapping import SAME, KeyMapping, Transform, rename, split, weight_and_bias


OURS = "vit."


@dataclass(frozen=True)
class EncoderNames:
    """A library's names of the parts of an encoder: modules, unless documented as tensors.

    Attributes:
        patch: the projection; `patch_transform` of its weight.
        cls_token, positions, registers: tensors, with `cls_transform`, `positions_transform`; None: the format maps
            them itself.
        patch_norm, pre_layernorm, final_norm: norms of the patches, before the blocks, after them; `pooled_norm` is
            the name of the last under `final_norm="pooled"`, if it differs; a leading slash: outside the prefix.
        layer: prefix of the names inside block `{n}`; the following names are inside it.
        query, key, value: separate projections; or `qkv_weight` and `qkv_bias`, tensors that hold all three, the
            latter possibly as `query_bias` and `value_bias`, tensors without the key's.
        output: projection of attention. query_norm, key_norm, attention_norm: norms of attention.
        fc1, fc2: the MLP; gated: `gate`, `up`, `down`, or `gate_up` with both, the gate first. mlp_norm: inside it.
        layer_scale: two tensors. relative_bias: the block's table, a tensor; `shared_relative_bias` outside blocks.
    """

    layer: str
    norm1: str
    norm2: str
    output: str
    patch: str = "embeddings.patch_embeddings.projection"
    patch_transform: Transform = SAME
    cls_token: str | None = "embeddings.cls_token"
    cls_transform: Transform = SAME
    positions: str | None = "embeddings.position_embeddings"
    positions_transform: Transform = SAME
    registers: str | None = "embeddings.register_tokens"
    patch_norm: str = "embeddings.patch_norm"
    pre_layernorm: str = "embeddings.pre_layernorm"
    final_norm: str = "layernorm"
    pooled_norm: str | None = None
    query: str = ""
    key: str = ""
    value: str = ""
    qkv_weight: str | None = None
    qkv_bias: str = ""
    query_bias: str | None = None
    value_bias: str = ""
    query_norm: str = "attention.q_norm"
    key_norm: str = "attention.k_norm"
    attention_norm: str = "attention.norm"
    fc1: str = "mlp.fc1"
    fc2: str = "mlp.fc2"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate_up: str | None = None
    mlp_norm: str = "mlp.norm"
    layer_scale: tuple[str, str] = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    relative_bias: str = "attention.relative_position_bias_table"
    shared_relative_bias: str = "shared_relative_position_bias_table"


def encoder_mappings(
    config: HFViTConfig, names: EncoderNames, prefix: str = "", layer_prefix: str | None = None
) -> list[KeyMapping]:
    """Mappings of all tensors of the encoder without its heads; `prefix` is that of their names.

    Args:
        layer_prefix: of the names of blocks, if it differs.
    """
    mappings = _embedding_mappings(config, names, prefix)
    for n in range(config.num_hidden_layers):
        theirs = (prefix if layer_prefix is None else layer_prefix) + names.layer.format(n=n)
        mappings += _layer_mappings(config, names, theirs, f"{OURS}layers.{n}.")
    if config.relative_position_bias in ("shared", "both"):
        mappings.append(rename(prefix + names.shared_relative_bias, OURS + "shared_relative_position_bias_table"))
    if config.final_norm != "none":
        last = names.final_norm if config.final_norm == "tokens" else names.pooled_norm or names.final_norm
        mappings += norm(config, last[1:] if last.startswith("/") else prefix + last, OURS + "layernorm")
    return mappings


def norm(config: HFViTConfig, theirs: str, ours: str) -> list[KeyMapping]:
    """Mappings of a norm's tensors: RMSNorm has no bias."""
    return weight_and_bias(theirs, ours, bias=config.norm_type == "layer")


def _embedding_mappings(config: HFViTConfig, names: EncoderNames, prefix: str) -> list[KeyMapping]:
    ours = OURS + "embeddings."
    patch = f"{ours}patch_embeddings.projection"
    mappings = [rename(f"{prefix}{names.patch}.weight", f"{patch}.weight", names.patch_transform)]
    if config.patch_bias:
        mappings.append(rename(f"{prefix}{names.patch}.bias", f"{patch}.bias"))
    if config.use_class_token and names.cls_token is not None:
        mappings.append(rename(prefix + names.cls_token, ours + "cls_token", names.cls_transform))
    if config.has_position_table and names.positions is not None:
        mappings.append(rename(prefix + names.positions, ours + "position_embeddings", names.positions_transform))
    if config.num_register_tokens and names.registers is not None:
        mappings.append(rename(prefix + names.registers, ours + "register_tokens"))
    if config.patch_norm:
        mappings += norm(config, prefix + names.patch_norm, ours + "patch_norm")
    if config.pre_layernorm:
        mappings += norm(config, prefix + names.pre_layernorm, ours + "pre_layernorm")
    return mappings


def _layer_mappings(config: HFViTConfig, names: EncoderNames, theirs: str, ours: str) -> list[KeyMapping]:
    mappings = norm(config, theirs + names.norm1, ours + "layernorm_before")
    mappings += norm(config, theirs + names.norm2, ours + "layernorm_after")
    mappings += attention_mappings(config, names, theirs, ours + "attention.")
    mappings += weight_and_bias(theirs + names.output, ours + "attention.o_proj", config.dense_bias)
    if config.qk_norm:
        mappings += norm(config, theirs + names.query_norm, ours + "attention.q_norm")
        mappings += norm(config, theirs + names.key_norm, ours + "attention.k_norm")
    if config.attention_norm:
        mappings += norm(config, theirs + names.attention_norm, ours + "attention.norm")
    if config.relative_position_bias in ("layer", "both"):
        mappings.append(rename(theirs + names.relative_bias, ours + "attention.relative_position_bias_table"))
    if config.mlp_type == "mlp":
        mappings += weight_and_bias(theirs + names.fc1, ours + "mlp.fc1", config.dense_bias)
        mappings += weight_and_bias(theirs + names.fc2, ours + "mlp.fc2", config.dense_bias)
    else:
        if names.gate_up is not None:
            for kind in ("weight", "bias") if config.dense_bias else ("weight",):
                parts = (f"{ours}mlp.gate_proj.{kind}", f"{ours}mlp.up_proj.{kind}")
                mappings.append(KeyMapping((f"{theirs}{names.gate_up}.{kind}",), parts, split(2)))
        else:
            mappings += weight_and_bias(theirs + names.gate, ours + "mlp.gate_proj", config.dense_bias)
            mappings += weight_and_bias(theirs + names.up, ours + "mlp.up_proj", config.dense_bias)
        mappings += weight_and_bias(theirs + names.down, ours + "mlp.down_proj", config.dense_bias)
    if config.mlp_norm:
        mappings += norm(config, theirs + names.mlp_norm, ours + "mlp.norm")
    if config.layer_scale_init is not None:
        mappings += [rename(theirs + names.layer_scale[n], f"{ours}layer_scale{n + 1}.lambda1") for n in (0, 1)]
    return mappings


def attention_mappings(config: HFViTConfig, names: EncoderNames, theirs: str, ours: str) -> list[KeyMapping]:
    """Mappings of query, key and value: separate, or in one tensor."""
    if names.qkv_weight is None:
        return [
            *weight_and_bias(theirs + names.query, ours + "q_proj", config.qkv_bias),
            *weight_and_bias(theirs + names.key, ours + "k_proj", config.qkv_bias and config.key_bias),
            *weight_and_bias(theirs + names.value, ours + "v_proj", config.qkv_bias),
        ]
    parts = tuple(f"{ours}{letter}_proj.weight" for letter in "qkv")
    mappings = [KeyMapping((theirs + names.qkv_weight,), parts, split(3))]
    if not config.qkv_bias:
        return mappings
    if config.key_bias:
        parts = tuple(f"{ours}{letter}_proj.bias" for letter in "qkv")
        mappings.append(KeyMapping((theirs + names.qkv_bias,), parts, split(3)))
    elif names.query_bias is not None:
        mappings.append(rename(theirs + names.query_bias, ours + "q_proj.bias"))
        mappings.append(rename(theirs + names.value_bias, ours + "v_proj.bias"))
    else:
        parts = (f"{ours}q_proj.bias", f"{ours}v_proj.bias")
        mappings.append(KeyMapping((theirs + names.qkv_bias,), parts, WITHOUT_KEY))
    return mappings


def _without_key(fused: torch.Tensor):
    if fused.ndim != 1 or len(fused) % 3:
        raise ValueError("it must hold the biases of query, key and value")
    query, _, value = fused.chunk(3)
    return [query, value]


# A fused bias of which the key's third is masked to zero (DINOv3's own checkpoints).
WITHOUT_KEY = Transform(_without_key, lambda query, value: [torch.cat([query, torch.zeros_like(query), value])])


# A class token (D,) and a position table (N, D), as CLIP and SigLIP store them.
FLAT_TOKEN = Transform(lambda t: [t.reshape(1, 1, -1)], lambda t: [t.reshape(-1)])
FLAT_TABLE = Transform(lambda t: [t[None]], lambda t: [t[0]])


def linear_classifier(config: HFViTConfig, theirs: str = "classifier") -> list[KeyMapping]:
    """Mappings of a linear classifier, if there is one."""
    return weight_and_bias(theirs, "classifier") if config.num_labels else []


def model_mappings(
    config: HFViTConfig, names: EncoderNames, prefix: str = "", map_head: dict[str, str] | None = None
) -> list[KeyMapping]:
    """Mappings of a model: encoder, attention pooling with the names of `map_head`, and a linear classifier."""
    mappings = encoder_mappings(config, names, prefix)
    if config.pooling == "map" and map_head is not None:
        mappings += map_head_mappings(config, map_head, prefix)
    return mappings + linear_classifier(config)


def map_head_mappings(config: HFViTConfig, names: dict[str, str], prefix: str) -> list[KeyMapping]:
    """Mappings of attention pooling: as torch's MultiheadAttention (SigLIP), or with separate k and v (AIMv2).

    Args:
        names: of probe, k, v (or in_proj), o, and if the head has them norm, fc1, fc2.
    """
    ours = OURS + "map_head."
    mappings = [rename(prefix + names["probe"], ours + "probe")]
    if "in_proj" in names:
        for kind in ("weight", "bias"):
            parts = tuple(f"{ours}attention.{letter}_proj.{kind}" for letter in "qkv")
            mappings.append(KeyMapping((f"{prefix}{names['in_proj']}_{kind}",), parts, split(3)))
    else:
        for letter in "kv":
            mappings += weight_and_bias(prefix + names[letter], f"{ours}attention.{letter}_proj", config.qkv_bias)
    mappings += weight_and_bias(prefix + names["o"], ours + "attention.o_proj")
    if config.map_mlp:
        mappings += norm(config, prefix + names["norm"], ours + "layernorm")
        mappings += weight_and_bias(prefix + names["fc1"], ours + "mlp.fc1")
        mappings += weight_and_bias(prefix + names["fc2"], ours + "mlp.fc2")
    return mappings


def same_names(config: HFViTConfig, prefix: str, mappings: list[KeyMapping]) -> list[KeyMapping]:
    """Mappings of our tensors that `mappings` lacks, to our own names with another prefix."""
    with torch.device("meta"):
        names = HFViTForImageClassification(config).state_dict()
    mapped = {name for mapping in mappings for name in mapping.ours}
    return [
        rename(prefix + name.removeprefix(OURS) if name.startswith(OURS) else name, name)
        for name in names
        if name not in mapped
    ]
