"""torchvision's `vit_b_16`, `vit_b_32`, `vit_l_16`, `vit_l_32`, `vit_h_14`, read from a state dict.

Source: pytorch/vision `torchvision/models/vision_transformer.py`. Numerics are its own: erf GELU, LayerNorm 1e-6.

Tests: tests/hf_vit/checkpoints/test_checkpoints_torchvision.py.
"""

from typing import Any

from ...errors import HFViTError
from ...image_processing import IMAGENET_MEAN, IMAGENET_STD, ImageProcessing
from ...modeling.configuration_hf_vit import HFViTConfig
from ..mapping import KeyMapping, rename, split, weight_and_bias
from ..spec import (
    CheckpointSpec,
    count_layers,
    heads_for_width,
    image_size_of_table,
    linear_head,
    patch_size,
)
from ..tensor_file import TensorFile


MODEL_TYPES: tuple[str, ...] = ()
NUMERICS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "position_interpolation": "bicubic"}

# (their name inside a block, our name inside a layer); before 0.13 the MLP's layers were named, not counted.
BLOCK = (("ln_1", "layernorm_before"), ("self_attention.out_proj", "attention.o_proj"), ("ln_2", "layernorm_after"))
MLP = {
    "counted": (("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")),
    "named": (("mlp.linear_1", "mlp.fc1"), ("mlp.linear_2", "mlp.fc2")),
}


def key_mappings(config: HFViTConfig, mlp: str) -> list[KeyMapping]:
    """Mappings of all tensors of the model."""
    mappings = [
        rename("class_token", "vit.embeddings.cls_token"),
        rename("encoder.pos_embedding", "vit.embeddings.position_embeddings"),
        *weight_and_bias("conv_proj", "vit.embeddings.patch_embeddings.projection"),
        *weight_and_bias("encoder.ln", "vit.layernorm"),
    ]
    for i in range(config.num_hidden_layers):
        theirs, ours = f"encoder.layers.encoder_layer_{i}.", f"vit.layers.{i}."
        for kind in ("weight", "bias"):
            parts = tuple(f"{ours}attention.{letter}_proj.{kind}" for letter in "qkv")
            mappings.append(KeyMapping((f"{theirs}self_attention.in_proj_{kind}",), parts, split(3)))
        for a, b in (*BLOCK, *MLP[mlp]):
            mappings += weight_and_bias(theirs + a, ours + b)
    if config.representation_size is not None:
        mappings += weight_and_bias("heads.pre_logits", "vit.pooler.dense")
    if config.num_labels:
        mappings += weight_and_bias("heads.head", "classifier")
    return mappings


def matches(file: TensorFile) -> bool:
    """Whether the names are those of a torchvision VisionTransformer."""
    return "conv_proj.weight" in file and "encoder.pos_embedding" in file


def read(file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
    """Infer the architecture from names and shapes; heads from the width.

    Raises:
        HFViTError: incomplete, a head that is not one linear layer, or a question for the caller.
    """
    shapes, first = file.shapes, "encoder.layers.encoder_layer_0."
    mlp = "counted" if f"{first}mlp.0.weight" in file else "named"
    fc1 = f"{first}{MLP[mlp][0][0]}.weight"
    if fc1 not in file or "class_token" not in file:
        raise HFViTError(f"{file.path}: incomplete, it has no class_token or no '{fc1}'")
    width, channels, patch_h, patch_w = shapes["conv_proj.weight"]
    heads, assumptions = heads_for_width(file.path, width, requested)
    labels, unused = linear_head(file, "heads.head", requested, pattern=r"heads\.(?!pre_logits)")
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(file, r"encoder\.layers\.encoder_layer_(\d+)\."),
        "num_attention_heads": heads,
        "intermediate_size": shapes[fc1][0],
        "patch_size": patch_size(patch_h, patch_w),
        "num_channels": channels,
        "num_labels": labels,
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
    fields["image_size"] = image_size_of_table(file.path, shapes["encoder.pos_embedding"][1] - 1, fields, requested)
    return CheckpointSpec(
        format="torchvision vision transformer",
        fields=fields,
        not_specified={"num_attention_heads", "pooling", *NUMERICS},
        key_mappings=lambda config: key_mappings(config, mlp),
        unused=unused,
        assumptions=assumptions + ["erf GELU and the evaluation images of torchvision's own weights (hidden_act=)"],
        image_processing=image_processing(fields["image_size"], width, patch_h),
    )


def image_processing(image_size: int | tuple[int, int], width: int, patch: int) -> ImageProcessing:
    """How torchvision evaluates its weights: a crop out of 256 (ViT-L/16: 242), larger images (SWAG) uncropped."""
    if image_size == 224:
        edge = 242 if (width, patch) == (1024, 16) else 256
        return ImageProcessing(edge, (224, 224), "bilinear", 1 / 255, IMAGENET_MEAN, IMAGENET_STD)
    return ImageProcessing(224, (224, 224), "bicubic", 1 / 255, IMAGENET_MEAN, IMAGENET_STD).at_size(image_size)
