"""transformers' `dinov2`, `dinov2_with_registers` and `pixio`, in and out.

Same layout: RAD-DINO, Phikon-v2, Midnight, Hibou, Franca. A classifier reads class token and mean patch side by side.
Sources: transformers 5.23 `models/dinov2`, `models/dinov2_with_registers`, `models/pixio`, `conversion_mapping.py`.

Tests: tests/hf_vit/checkpoints/test_families.py.
"""

import re
from typing import Any

import torch

from ...errors import HFViTError
from ...image_processing import IMAGENET_CROP
from ...modeling.configuration_hf_vit import HFViTConfig
from ..spec import CheckpointSpec, linear_head
from ..tensor_file import TensorFile
from . import transformers
from .encoder import EncoderNames, model_mappings
from .transformers_folder import (
    TransformersFolder,
    check_depth,
    class_names,
    common_fields,
    config_json,
    not_specified,
    prefix_before,
    stated_sizes,
    unsupported_features,
    unused_names,
    with_defaults,
)


MODEL_TYPES: tuple[str, ...] = ("dinov2", "dinov2_with_registers", "pixio")
PATCH = "embeddings.patch_embeddings.projection.weight"
BEFORE_V5 = EncoderNames(
    layer="encoder.layer.{n}.",
    norm1="norm1",
    norm2="norm2",
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    output="attention.output.dense",
    gate_up="mlp.weights_in",
    down="mlp.weights_out",
)
SINCE_V5 = EncoderNames(
    layer="encoder.layer.{n}.",
    norm1="norm1",
    norm2="norm2",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
)
PIXIO_MLP = {"fc1": "intermediate.dense", "fc2": "output.dense"}


def layout_names(model_type: str, old: bool) -> EncoderNames:
    """Names in the layout before transformers v5, or since."""
    if model_type == "pixio":
        return EncoderNames(**(vars(BEFORE_V5) | PIXIO_MLP)) if old else transformers.SINCE_V5
    return BEFORE_V5 if old else SINCE_V5


def matches(file: TensorFile) -> bool:
    """Whether the names are those of DINOv2 in transformers."""
    return any(name.endswith("." + PATCH) or name == PATCH for name in file) and any(
        re.match(r"(\w+\.)?encoder\.layer\.0\.norm1\.", name)
        or (re.match(r"(pixio\.)?embeddings\.cls_token$", name) and file.shapes[name][1:2] > (1,))  # Pixio since v5
        for name in file
    )


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Take the architecture from config.json and the width of the MLP from the file.

    Raises:
        HFViTError: no config.json, one of another file, or a classifier over several layers.
    """
    stored = sidecars.get("config.json")
    if stored is None:
        raise HFViTError(
            f"{file.path}: DINOv2 of transformers without its config.json; give the folder that holds both"
        )
    model_type = stored.get("model_type")
    if model_type not in MODEL_TYPES:
        raise HFViTError(f"{file.path}: has DINOv2's names, but config.json says model_type '{model_type}'")
    theirs: Any = with_defaults(file, stored, model_type)
    prefix = prefix_before(file, PATCH)
    old = f"{prefix}encoder.layer.0.attention.attention.query.weight" in file
    names = layout_names(model_type, old)
    check_depth(file, re.escape(prefix + names.layer.partition("{")[0]) + r"(\d+)\.", theirs.num_hidden_layers)
    first = prefix + names.layer.format(n=0)
    gated = any(name.startswith((f"{first}mlp.weights_in", f"{first}mlp.gate_proj")) for name in file)
    down = f"{first}{(names.down if gated else names.fc2)}.weight"
    if down not in file:
        raise HFViTError(f"{file.path}: incomplete, it has no '{down}'")
    fields = common_fields(file, theirs, file.shapes[prefix + PATCH]) | {
        "intermediate_size": file.shapes[down][1],
        "mlp_type": "swiglu" if gated else "mlp",
        "layer_scale_init": None if model_type == "pixio" else theirs.layerscale_value,
        "use_class_token": True,
        "num_class_tokens": getattr(theirs, "n_cls_tokens", 1),
        "class_token_has_position": True,
        "num_register_tokens": getattr(theirs, "num_register_tokens", 0),
        "position_embedding_type": "learned",
        "pooling": "prefix_mean" if model_type == "pixio" else "token",
        "head_input": "pooled" if model_type == "pixio" else "token_and_mean",
    }
    if model_type == "dinov2_with_registers":
        fields["position_interpolation"] = "bicubic_antialias"
    labels, head = linear_head(file, "classifier", requested)
    if labels and file.shapes["classifier.weight"][1] != 2 * theirs.hidden_size:
        columns = file.shapes["classifier.weight"][1] // theirs.hidden_size
        raise HFViTError(
            f"{file.path}: its classifier reads {columns} vectors of width {theirs.hidden_size} (DINOv2's heads over "
            "several layers), hf_vit's class token and mean patch: num_labels= needs a file without it"
        )
    unused, notes = unused_names(file, r"(.*\.)?(mask_token|position_ids)$")
    fields |= class_names(file, stored, labels)
    return CheckpointSpec(
        format=f"transformers {model_type}, keys {'before' if old else 'since'} transformers v5",
        fields=fields,
        key_mappings=lambda config: model_mappings(config, names, prefix),
        not_specified=not_specified(fields),
        unused=unused | head,
        notes=notes,
        image_processing=IMAGENET_CROP,
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def model_type_for(config: HFViTConfig) -> str:
    """Which of the three a configuration is."""
    if config.pooling == "prefix_mean":
        return "pixio"
    registers = config.num_register_tokens or getattr(config, "source_model_type", "") == "dinov2_with_registers"
    return "dinov2_with_registers" if registers else "dinov2"


def cannot(config: HFViTConfig) -> list[str]:
    """Features of a configuration that these families do not support."""
    kind = model_type_for(config)
    conditions = {
        "no class token": not config.use_class_token or not config.has_class_position,
        "positions other than a learned table": config.position_embedding_type != "learned",
        f"pooling={config.pooling!r}": config.pooling not in ("token", "prefix_mean"),
        "an MLP of that width": not _width_fits(config),
        "a classifier of the pooled vector": bool(config.num_labels) and config.head_input != "token_and_mean",
        "a classifier": bool(config.num_labels) and kind == "pixio",
        "blocks without LayerScale": (config.layer_scale_init is None) != (kind == "pixio"),
        "several class tokens": config.num_class_tokens > 1 and kind != "pixio",
        "SwiGLU": config.mlp_type == "swiglu" and kind == "pixio",
    }
    return unsupported_features(config, conditions, SUPPORTED_FIELDS)


SUPPORTED_FIELDS = {"mlp_type", "head_input", "num_class_tokens", "pooling"}


def _width_fits(config: HFViTConfig) -> bool:
    return config.intermediate_size == _width(config, _ratio(config))


def _width(config: HFViTConfig, ratio: float) -> int:
    """The MLP's width that transformers computes from `mlp_ratio`."""
    width = int(config.hidden_size * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if config.mlp_type == "swiglu" else width


def _ratio(config: HFViTConfig) -> float | int:
    ratio = config.intermediate_size / config.hidden_size * (1.5 if config.mlp_type == "swiglu" else 1)
    candidates = (round(ratio), ratio, round(ratio, 6), ratio + 1e-9)
    return next((value for value in candidates if _width(config, value) == config.intermediate_size), ratio)


def write(config: HFViTConfig, dtype: torch.dtype) -> TransformersFolder:
    """The content of a folder for transformers' own class."""
    kind = model_type_for(config)
    stem = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters", "pixio": "Pixio"}[kind]
    entries: dict[str, Any] = stated_sizes(config) | {
        "mlp_ratio": _ratio(config),
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
    }
    if kind == "pixio":
        entries["n_cls_tokens"] = config.num_class_tokens
    else:
        entries |= {"layerscale_value": float(config.layer_scale_init or 1.0)}
        entries |= {"use_swiglu_ffn": config.mlp_type == "swiglu"}
    if kind == "dinov2_with_registers":
        entries["num_register_tokens"] = config.num_register_tokens
    if kind == "dinov2":
        entries["use_mask_token"] = False
    architecture = f"{stem}ForImageClassification" if config.num_labels else f"{stem}Model"
    prefix = f"{kind}." if config.num_labels else ""
    zeros: dict[str, tuple[int, ...]] = {}
    if kind == "dinov2_with_registers":
        zeros = {f"{prefix}embeddings.mask_token": (1, config.hidden_size)}
        if not config.num_register_tokens:
            zeros[f"{prefix}embeddings.register_tokens"] = (1, 0, config.hidden_size)
    config_dict = config_json(kind, architecture, config, dtype, **entries)
    return TransformersFolder(config_dict, model_mappings(config, layout_names(kind, old=True), prefix), zeros)
