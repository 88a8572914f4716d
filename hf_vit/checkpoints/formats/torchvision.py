"""torchvision's `vit_b_16`, `vit_b_32`, `vit_l_16`, `vit_l_32`, `vit_h_14`, read from a state dict.

Source: pytorch/vision `torchvision/models/vision_transformer.py`. Numerics are its own: erf GELU, LayerNorm 1e-6.
"""

from typing import Any

from ...errors import HFViTError
from ...modeling.configuration_hf_vit import HFViTConfig
from ..mapping import Rule, both, rule, split
from ..spec import IMAGENET_PROCESSOR, Reading, heads_of, image_size_of_table, layers_of
from ..tensor_file import TensorFile


NUMERICS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "position_interpolation": "bicubic"}

# (their name inside a block, our name inside a layer); before 0.13 the MLP's layers were named, not counted.
BLOCK = (("ln_1", "layernorm_before"), ("self_attention.out_proj", "attention.o_proj"), ("ln_2", "layernorm_after"))
MLP = {
    "counted": (("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")),
    "named": (("mlp.linear_1", "mlp.fc1"), ("mlp.linear_2", "mlp.fc2")),
}


def table(config: HFViTConfig, mlp: str) -> list[Rule]:
    """Every tensor of the model, their name and ours."""
    rules = [
        rule("class_token", "vit.embeddings.cls_token"),
        rule("encoder.pos_embedding", "vit.embeddings.position_embeddings"),
        *both("conv_proj", "vit.embeddings.patch_embeddings.projection"),
        *both("encoder.ln", "vit.layernorm"),
    ]
    for i in range(config.num_hidden_layers):
        theirs, ours = f"encoder.layers.encoder_layer_{i}.", f"vit.layers.{i}."
        for kind in ("weight", "bias"):
            parts = tuple(f"{ours}attention.{letter}_proj.{kind}" for letter in "qkv")
            rules.append(Rule((f"{theirs}self_attention.in_proj_{kind}",), parts, split(3)))
        for a, b in (*BLOCK, *MLP[mlp]):
            rules += both(theirs + a, ours + b)
    if config.representation_size is not None:
        rules += both("heads.pre_logits", "vit.pooler.dense")
    if config.num_labels:
        rules += both("heads.head", "classifier")
    return rules


def matches(file: TensorFile) -> bool:
    """Whether the names are those of a torchvision VisionTransformer."""
    return "conv_proj.weight" in file and "encoder.pos_embedding" in file


def read(file: TensorFile, asked: dict[str, Any], beside: dict[str, dict]) -> Reading:
    """Infer the architecture from names and shapes; heads from the width."""
    shapes, first = file.shapes, "encoder.layers.encoder_layer_0."
    mlp = "counted" if f"{first}mlp.0.weight" in file else "named"
    fc1 = f"{first}{MLP[mlp][0][0]}.weight"
    if fc1 not in file or "class_token" not in file:
        raise HFViTError(f"{file.path}: incomplete, it has no class_token or no '{fc1}'")
    width, channels, patch_h, patch_w = shapes["conv_proj.weight"]
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers_of(file, r"encoder\.layers\.encoder_layer_(\d+)\."),
        "num_attention_heads": heads_of(file.path, width, asked),
        "intermediate_size": shapes[fc1][0],
        "patch_size": patch_h if patch_h == patch_w else (patch_h, patch_w),
        "num_channels": channels,
        "num_labels": shapes["heads.head.weight"][0] if "heads.head.weight" in file else 0,
        "representation_size": shapes["heads.pre_logits.weight"][0] if "heads.pre_logits.weight" in file else None,
        "qkv_bias": True,
        "use_class_token": True,
        "class_token_has_position": True,
        "position_embedding_type": "learned",
        "num_register_tokens": 0,
        "layer_scale_init": None,
        "qk_norm": False,
        "pooling": "token",
        "resnet_depths": None,
        **NUMERICS,
    }
    fields["image_size"] = image_size_of_table(file.path, shapes["encoder.pos_embedding"][1] - 1, fields, asked)
    return Reading(
        dialect="torchvision vision transformer",
        fields=fields,
        unsaid={"num_attention_heads", "pooling", *NUMERICS},
        table=lambda config: table(config, mlp),
        notes=[f"{fields['num_attention_heads']} heads taken for width {width}: the file does not say"],
        processor=IMAGENET_PROCESSOR | {"resample": 2},
    )
