"""Every architectural number of a ViT or hybrid ViT, and the table of published sizes.

This file travels to the Hub beside the weights: it imports only the standard library, transformers and
huggingface_hub.

Sources: Dosovitskiy et al. 2020 (arXiv:2010.11929), Table 1 and section 4.1; Steiner et al. 2021 (AugReg,
arXiv:2106.10270); google-research/vision_transformer `vit_jax/configs/models.py` at c6de1e5.
"""

import difflib
import math
import re
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin


# name: (Google's name, hidden, layers, mlp, heads, patch, pooling, dropout, ResNet depths). `patch` is the kernel of
# the patch projection: in pixels, or for a hybrid in cells of the ResNet's map (R+Ti/16 is really /32: a root of
# stride 4, then 8x8).
PRESETS: dict[str, tuple[str, int, int, int, int, int, str, float, tuple[int, ...] | None]] = {
    "vit-tiny-patch16": ("ViT-Ti_16", 192, 12, 768, 3, 16, "token", 0.0, None),
    "vit-small-patch16": ("ViT-S_16", 384, 12, 1536, 6, 16, "token", 0.0, None),
    "vit-small-patch32": ("ViT-S_32", 384, 12, 1536, 6, 32, "token", 0.0, None),
    "vit-base-patch8": ("ViT-B_8", 768, 12, 3072, 12, 8, "token", 0.0, None),
    "vit-base-patch16": ("ViT-B_16", 768, 12, 3072, 12, 16, "token", 0.0, None),
    "vit-base-patch32": ("ViT-B_32", 768, 12, 3072, 12, 32, "token", 0.0, None),
    "vit-large-patch16": ("ViT-L_16", 1024, 24, 4096, 16, 16, "token", 0.1, None),
    "vit-large-patch32": ("ViT-L_32", 1024, 24, 4096, 16, 32, "token", 0.0, None),
    "vit-huge-patch14": ("ViT-H_14", 1280, 32, 5120, 16, 14, "token", 0.1, None),
    "vit-small-patch16-gap": ("ViT-S_16-gap-norep", 384, 12, 1536, 6, 16, "gap", 0.0, None),
    "vit-base-patch16-gap": ("ViT-B_16-gap-norep", 768, 12, 3072, 12, 16, "gap", 0.0, None),
    "vit-small-patch32-gap": ("ViT-S_32-gap-norep", 384, 12, 1536, 6, 32, "gap", 0.0, None),
    "vit-base-patch32-gap": ("ViT-B_32-gap-norep", 768, 12, 3072, 12, 32, "gap", 0.0, None),
    "r-vit-tiny-patch16": ("R+ViT-Ti_16", 192, 12, 768, 3, 8, "token", 0.0, ()),
    "r26-vit-small-patch32": ("R26+ViT-S_32", 384, 12, 1536, 6, 1, "token", 0.0, (2, 2, 2, 2)),
    "r26-vit-base-patch32": ("R26+ViT-B_32", 768, 12, 3072, 12, 1, "token", 0.0, (2, 2, 2, 2)),
    "r50-vit-base-patch16": ("R50+ViT-B_16", 768, 12, 3072, 12, 1, "token", 0.1, (3, 4, 9)),
    "r50-vit-large-patch32": ("R50+ViT-L_32", 1024, 24, 4096, 16, 1, "token", 0.1, (3, 4, 6, 3)),
}

# Every auto class under which a saved folder can be loaded, also when the weights came from another of our classes.
AUTO_MAP = {
    "AutoConfig": "configuration_hf_vit.HFViTConfig",
    "AutoModel": "modeling_hf_vit.HFViTModel",
    "AutoModelForImageClassification": "modeling_hf_vit.HFViTForImageClassification",
    "AutoBackbone": "modeling_hf_vit.HFViTBackbone",
    "AutoModelForMaskedImageModeling": "modeling_hf_vit.HFViTForMaskedPatchPrediction",
}

# Fields that transformers' config.json leaves out, because they are the class's default or its fixed behavior.
_UPSTREAM_NUMERICS: dict[str, dict[str, Any]] = {
    family: {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "position_interpolation": "bicubic",
        "initializer": "truncated_normal",
    }
    for family in ("vit", "deit", "vit-hybrid")
}
_UPSTREAM_NUMERICS["vit-hybrid"] |= {
    "group_norm_eps": 1e-5,
    "weight_standardization": "sqrt_var_plus_eps",
    "weight_standardization_eps": 1e-8,
}
# Fields of transformers' config.json without a counterpart here.
_UPSTREAM_UNUSED = (
    "initializer_range",
    "encoder_stride",
    "pooler_output_size",
    "pooler_act",
    "backbone_config",
    "backbone_featmap_shape",
    "backbone",
    "backbone_kwargs",
    "use_timm_backbone",
    "use_pretrained_backbone",
)

# The largest value of each size: far above any ViT, and small enough that a damaged config.json is refused before it
# allocates memory.
_MAX_SIZES = {
    "image_size": 2**17,
    "patch_size": 2**14,
    "num_channels": 2**14,
    "hidden_size": 2**17,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**14,
    "intermediate_size": 2**20,
    "num_class_tokens": 2**12,
    "num_register_tokens": 2**12,
    "representation_size": 2**17,
    "map_num_heads": 2**14,
    "map_intermediate_size": 2**20,
    "num_labels": 10**6,
}
_MAX_POSITIONS = 2**24  # rows of a position table
_MAX_RESNET_STAGES = 8
_DTYPES = ("float16", "bfloat16", "float32", "float64")

# Fields that change what a block computes. The optimized layers know the plain block only.
_BLOCK_FIELDS = (
    "mlp_type",
    "mlp_norm",
    "key_bias",
    "dense_bias",
    "attention_norm",
    "norm_type",
    "rope",
    "relative_position_bias",
)
# Further fields that only later encoders need (DINOv2, CLIP, BEiT, ...), next to `rope_*`.
_FAMILY_FIELDS = (
    *_BLOCK_FIELDS,
    "pre_layernorm",
    "patch_bias",
    "patch_norm",
    "num_class_tokens",
    "final_norm",
    "head_input",
    "map_num_heads",
    "map_intermediate_size",
    "map_over_prefix",
    "map_query_proj",
    "map_mlp",
)
# Fields that describe the labels of the present head; a new head resets them.
HEAD_FIELDS = ("label_thresholds", "target_mean", "target_std")
# Defaults of each kind of rotary positions.
_ROPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "dinov3": {"rope_theta": 100.0, "rope_layout": "half"},
    "axial": {"rope_theta": 10_000.0, "rope_layout": "interleaved"},
}


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that is one number or a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@strict
class HFViTConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of `HFViTModel` and its heads; the defaults are ViT-B/16 at 224 px with Google's numerics.

    Symbols in brackets are the paper's.

    Args:
        image_size: pixels, one number or (height, width) [H, W]. The position table is made for it; a forward pass
            accepts any size.
        patch_size: kernel and stride of the patch projection, one number or (height, width) [P]; in cells of the
            ResNet's feature map for a hybrid. Images that it does not divide are cut at the right and the bottom.
        num_channels: channels of the image [C].
        hidden_size: width of a token [D]. num_hidden_layers: depth [L]. num_attention_heads: heads [k].
        intermediate_size: width of the MLP's hidden layer.
        hidden_act: activation of the MLP, a key of transformers' `ACT2FN`; Google's is the tanh approximation.
        layer_norm_eps: epsilon of every LayerNorm (Flax: 1e-6).
        qkv_bias: whether query, key and value projections have a bias.
        key_bias: whether the key projection has one where the others do. False: DINOv3, BEiT, EVA. (A bias of the key
            changes nothing under softmax, but with rotary positions it does.)
        dense_bias: whether the other dense layers of a block have biases. False: AIMv2.
        mlp_type: `"mlp"` fc2(act(fc1(x))); `"swiglu"` down(silu(gate(x)) * up(x)) (arXiv:2002.05202), whose width is
            also `intermediate_size` (DINOv2-g, DINOv3 S+/H+/7B, EVA-02, AIMv2, Virchow).
        mlp_norm, attention_norm: a norm before the last dense layer of the MLP (EVA-02 B and L), before the output
            projection of attention (EVA-02 CLIP).
        norm_type: `"layer"` LayerNorm; `"rms"` RMSNorm (AIMv2).
        hidden_dropout_prob: after the position embedding and every dense layer but q, k, v (paper, appendix B.1).
        attention_probs_dropout_prob: on attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        patch_dropout_rate: fraction of patch tokens left out while training (FLIP, arXiv:2212.00794).
        pooling: the input of the head: `"token"` the class token (Eq. 4); `"gap"` the mean of the patch tokens;
            `"map"` attention pooling with a learned probe (arXiv:2106.04560); `"first"` the first token, whichever it
            is (big_vision's "0"); `"prefix_mean"` the mean of class and register tokens (Pixio).
        map_num_heads, map_intermediate_size: heads of the attention pooling and width of its MLP; None: those of the
            blocks.
        map_over_prefix: whether it also pools class and register tokens (PE: yes; timm elsewhere: no).
        map_query_proj, map_mlp: whether the probe passes through a query projection, and the result through an MLP
            (AIMv2: neither).
        use_class_token: whether a class token is prepended; None: if the pooling reads it (`"token"` and
            `"prefix_mean"`).
        num_class_tokens: number of class tokens (Pixio: 8).
        class_token_has_position: whether the class token has a row in the position table (Google's
            vision_transformer: yes; big_vision: no).
        num_register_tokens: learned tokens without position, between class token and patches (arXiv:2309.16588).
        pre_layernorm: a norm of all tokens before the first block (CLIP, PE).
        patch_bias: whether the patch projection has a bias (CLIP, PE: no).
        patch_norm: a norm of the projected patches before positions are added (AIMv2).
        final_norm: what the last norm applies to: all `"tokens"`; only the `"pooled"` vector, so that
            `last_hidden_state` is not normalized (CLIP, BEiT, EVA-02, timm's `fc_norm`); `"none"` (PE spatial and
            lang).
        head_input: the input of the classifier: the `"pooled"` vector; `"token_and_mean"` class token and mean patch
            token, concatenated (DINOv2); `"two_tokens"` the first two tokens, concatenated (DeiT's two heads);
            `"mean"` the mean patch token, whatever is pooled (SigLIP); `"mean_unnormalised"` the mean patch token
            without the last norm (CLIP).
        representation_size: width of the dense + tanh layer before the classifier (pre-training head), or None.
        position_embedding_type: `"learned"` table over the grid; `"sincos2d"` fixed (arXiv:2104.02057); `"none"`;
            `"learned1d"` a table over the raster sequence, refitted along the sequence (appendix D.4);
            `"sincos_aim"` fixed, as in AIMv2's native variant.
        position_interpolation: how a table is resized to another grid: `"bilinear_align_corners"` (Google),
            `"bicubic"` (transformers), `"bicubic_antialias"` (timm), `"bilinear_antialias"` (SigLIP 2 NaFlex, TIPSv2),
            `"bilinear"` (PE's own code), `"bicubic_offset"` (DINOv2's own: by the scale factor (n + 0.1) / side).
        rope: rotary positions of the patch tokens in every block: None; `"dinov3"` coordinates from -1 to 1 on each
            axis; `"axial"` coordinates in cells of a reference grid (EVA-02, PE).
        rope_theta: base of the frequencies; None: 100 for `"dinov3"`, 10,000 for `"axial"`.
        rope_layout: which channels are rotated as a pair: `"half"` j and j + d / 2, `"interleaved"` 2 j and 2 j + 1;
            None: the first for `"dinov3"`, the second for `"axial"`.
        rope_axes: `"yx"` angles of rows before those of columns, or `"xy"` (PE).
        rope_offset: added to the row and column of a cell (axial; PE with a class token: 1).
        rope_reference_grid: the grid (rows, columns) whose cells have distance 1 (axial); `"image"`: the grid of
            each image; None: the grid of `image_size` when the configuration is made.
        rope_bfloat16_periods: round the periods to bfloat16, as DINOv3's own checkpoints hold them.
        rope_rescale, rope_jitter, rope_shift: DINOv3's augmentation of coordinates while training: both axes times a
            log-uniform factor in [1 / rescale, rescale], each axis in [1 / jitter, jitter], plus a uniform shift in
            [-shift, shift]; None: none.
        relative_position_bias: learned biases of the attention scores by relative position (BEiT): None, a table in
            each `"layer"`, one `"shared"` table, or `"both"`.
        layer_scale_init: initial value of LayerScale (arXiv:2103.17239), or None for no LayerScale.
        qk_norm: LayerNorm on queries and keys per head (arXiv:2302.05442).
        resnet_depths: None is a plain ViT; otherwise the residual units of each stage of the hybrid's ResNet:
            `(3, 4, 9)` is R50+ViT-B/16, `()` only the root (section 3.1).
        resnet_width_factor: width of the ResNet, in units of 64 channels at the root.
        group_norm_eps: epsilon of the ResNet's GroupNorms (Flax: 1e-6).
        weight_standardization: `"std_plus_eps"` is w / (std + eps) (Google), `"sqrt_var_plus_eps"` is
            w / sqrt(var + eps) (timm and transformers' BiT).
        weight_standardization_eps: that eps.
        head_bias_init: initial bias of the classifier (-10 in the paper's pre-training with sigmoid loss).
        label_thresholds: score from which each label counts as present, for `problem_type`
            "multi_label_classification"; None: 0.5. Used by `hf-vit predict`, not by the network.
        target_mean, target_std: mean and standard deviation of each target of a "regression": the logits are the
            head's outputs times std plus mean, in the unit of the targets; None: the outputs as they are.
        initializer: `"jax"` Google's; `"truncated_normal"` std 0.02 for every weight and token; `"normal_tokens"`
            Google's but class and position tokens from N(0, 1), as many ViT tutorials teach.

    `num_labels`, `id2label` and `label2id` are fields of the base class; `out_features` and `out_indices`, the feature
    maps of a backbone, of `BackboneConfigMixin`.

    Raises:
        ValueError: a field of the wrong type or range, or a misspelled one.
    """

    model_type = "hf_vit"
    base_model_tp_plan = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    key_bias: bool = True
    dense_bias: bool = True
    mlp_type: Literal["mlp", "swiglu"] = "mlp"
    mlp_norm: bool = False
    attention_norm: bool = False
    norm_type: Literal["layer", "rms"] = "layer"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    patch_dropout_rate: float | int = 0.0
    pooling: Literal["token", "gap", "map", "first", "prefix_mean"] = "token"
    map_num_heads: int | None = None
    map_intermediate_size: int | None = None
    map_over_prefix: bool = True
    map_query_proj: bool = True
    map_mlp: bool = True
    use_class_token: bool | None = None
    num_class_tokens: int = 1
    class_token_has_position: bool = True
    num_register_tokens: int = 0
    pre_layernorm: bool = False
    patch_bias: bool = True
    patch_norm: bool = False
    final_norm: Literal["tokens", "pooled", "none"] = "tokens"
    head_input: Literal["pooled", "token_and_mean", "two_tokens", "mean", "mean_unnormalised"] = "pooled"
    representation_size: int | None = None
    position_embedding_type: Literal["learned", "sincos2d", "none", "learned1d", "sincos_aim"] = "learned"
    position_interpolation: Literal[
        "bilinear_align_corners", "bicubic", "bicubic_antialias", "bilinear", "bilinear_antialias", "bicubic_offset"
    ] = "bilinear_align_corners"
    rope: Literal["dinov3", "axial"] | None = None
    rope_theta: float | int | None = None
    rope_layout: Literal["half", "interleaved"] | None = None
    rope_axes: Literal["yx", "xy"] = "yx"
    rope_offset: float | int = 0
    rope_reference_grid: int | list[int] | tuple[int, int] | Literal["image"] | None = None
    rope_bfloat16_periods: bool = False
    rope_rescale: float | int | None = None
    rope_jitter: float | int | None = None
    rope_shift: float | int | None = None
    relative_position_bias: Literal["layer", "shared", "both"] | None = None
    layer_scale_init: float | int | None = None
    qk_norm: bool = False
    resnet_depths: list[int] | tuple[int, ...] | None = None
    resnet_width_factor: float | int = 1.0
    group_norm_eps: float = 1e-6
    weight_standardization: Literal["std_plus_eps", "sqrt_var_plus_eps"] = "std_plus_eps"
    weight_standardization_eps: float = 1e-5
    head_bias_init: float | int = 0.0
    label_thresholds: list[float | int] | tuple[float | int, ...] | None = None
    target_mean: list[float | int] | tuple[float | int, ...] | None = None
    target_std: list[float | int] | tuple[float | int, ...] | None = None
    initializer: Literal["jax", "truncated_normal", "normal_tokens"] = "jax"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        for key in ("model_type", "auto_map"):
            kwargs.pop(key, None)  # fixed by this class: another model's folder must not rename it
        self._check_sizes()  # before anything whose size a field gives is built
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        fields = [name for name in self.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]
        # 0.86: `patchsize` is a misspelling, `hidden_dropout` of transformers' other models is not
        # a config.json, known by its transformers_version, may carry fields of other libraries
        for key in kwargs if self.transformers_version is None else ():
            close = difflib.get_close_matches(key, fields, n=1, cutoff=0.86)
            if close and not key.startswith("_"):
                raise ValueError(f"{type(self).__name__} has no field '{key}'; did you mean '{close[0]}'?")
        if self.use_class_token is None:
            self.use_class_token = self.pooling in ("token", "prefix_mean")
        for name, value in _ROPE_DEFAULTS.get(self.rope or "", {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.rope == "axial" and self.rope_reference_grid is None:
            # stays when the image size changes: cells are then closer or wider than in pre-training
            self.rope_reference_grid = list(self.grid_size)
        self.auto_map = dict(AUTO_MAP)
        super().__post_init__(**kwargs)
        if self.id2label is not None:
            self.label2id = {name: number for number, name in self.id2label.items()}
        self.check_architecture()

    # -- derived sizes -------------------------------------------------------------------------------------------

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps: of the embeddings and of each block."""
        return ["stem", *(f"stage{block}" for block in range(1, self.num_hidden_layers + 1))]

    @property
    def image_size_hw(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return as_pair(self.image_size)

    @property
    def patch_size_hw(self) -> tuple[int, int]:
        """(height, width) of the patch, in pixels or in cells of the ResNet's map."""
        return as_pair(self.patch_size)

    @property
    def stem_channels(self) -> int:
        """Input channels of the patch projection."""
        if self.resnet_depths is None:
            return self.num_channels
        width = int(64 * self.resnet_width_factor)  # the last unit of a stage has 4 times its width
        return width * 4 * 2 ** (len(self.resnet_depths) - 1) if self.resnet_depths else width

    @property
    def total_stride(self) -> tuple[int, int]:
        """Pixels of the image between neighboring tokens, (vertical, horizontal)."""
        # the root halves twice, and every stage but the first once
        stem = 1 if self.resnet_depths is None else 4 * 2 ** max(len(self.resnet_depths) - 1, 0)
        return stem * self.patch_size_hw[0], stem * self.patch_size_hw[1]

    def grid_for(self, image_size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the patch tokens of an image of that size in pixels."""
        rows, columns = as_pair(image_size)
        for _ in range(0 if self.resnet_depths is None else 2 + max(len(self.resnet_depths) - 1, 0)):
            rows, columns = -(-rows // 2), -(-columns // 2)  # SAME padding: rounded up; at the patch, VALID: down
        return rows // self.patch_size_hw[0], columns // self.patch_size_hw[1]

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of the position table, without class tokens."""
        return self.grid_for(self.image_size)

    @property
    def has_position_table(self) -> bool:
        """Whether positions are a learned parameter."""
        return self.position_embedding_type in ("learned", "learned1d")

    @property
    def has_class_position(self) -> bool:
        """Whether the first rows of the position table belong to the class tokens."""
        return bool(self.use_class_token) and self.class_token_has_position

    @property
    def num_class_rows(self) -> int:
        """Rows of the position table before those of the grid."""
        return self.num_class_tokens if self.has_class_position else 0

    @property
    def num_position_rows(self) -> int:
        """Rows of the position table: those of the grid and, if they have any, of the class tokens."""
        rows, columns = self.grid_size
        return rows * columns + self.num_class_rows

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class and registers."""
        return (self.num_class_tokens if self.use_class_token else 0) + self.num_register_tokens

    @property
    def head_width(self) -> int:
        """Input channels of the classifier [D, 2 D, or `representation_size`]."""
        if self.head_input in ("token_and_mean", "two_tokens"):
            return 2 * self.hidden_size
        return self.representation_size or self.hidden_size

    @property
    def family_fields(self) -> dict[str, Any]:
        """Fields that differ from the plain ViT, with their values; `{}` for every ViT and hybrid of the papers.

        Code that supports only the plain architecture refuses these by name.
        """
        fields = {name: getattr(self, name) for name in _FAMILY_FIELDS}
        defaults = {name: type(self).__dataclass_fields__[name].default for name in fields}
        changed = {name: value for name, value in fields.items() if value != defaults[name]}
        if self.pooling == "prefix_mean":
            changed["pooling"] = self.pooling
        if self.position_embedding_type == "sincos_aim":
            changed["position_embedding_type"] = self.position_embedding_type
        return changed

    @property
    def has_plain_blocks(self) -> bool:
        """Whether every block is LN, MSA, LN and a two-layer MLP, as the optimized layers require."""
        return not set(self.family_fields).intersection(_BLOCK_FIELDS)

    @PreTrainedConfig.num_labels.setter  # type: ignore[attr-defined]
    def num_labels(self, num_labels: int):
        # checked first: the base class makes a list of as many names
        if not _is_int(num_labels) or not 0 <= num_labels <= _MAX_SIZES["num_labels"]:
            raise ValueError(f"num_labels={num_labels} is no number of classes: 1 or more, or 0 for no classifier")
        PreTrainedConfig.num_labels.fset(self, num_labels)  # type: ignore[attr-defined]

    # -- validation ----------------------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        """Check each number's range on its own; raise ValueError."""
        for name, most in _MAX_SIZES.items():
            size = getattr(self, name, None)
            if name == "num_labels" or size is None:
                continue
            if name in ("image_size", "patch_size") and not _is_int(size):
                if len(size) != 2 or not all(map(_is_int, size)):
                    raise ValueError(f"{name} is one number or (height, width), got {size}")
                least, largest = min(size), max(size)
            else:
                least = largest = size
            fewest = 0 if name in ("num_hidden_layers", "num_register_tokens") else 1
            if not _is_int(largest) or not fewest <= least or not largest <= most:
                raise ValueError(f"{name} must be a whole number from {fewest} to {most}, got {size}")
        for name, field in type(self).__dataclass_fields__.items():
            value = getattr(self, name, None)
            # 1e6: far above any rate or factor, and JSON's NaN and Infinity are refused with it
            if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= 1e6):
                raise ValueError(f"{name} must be a number between -1e6 and 1e6, got {value}")
            if "float" in str(field.type) and isinstance(value, bool):  # `strict` takes True for 1
                raise ValueError(f"{name} must be a number, got {value}")
        for name in ("layer_norm_eps", "group_norm_eps", "weight_standardization_eps"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_dropout_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.resnet_depths is not None:
            depths = list(self.resnet_depths)
            if len(depths) > _MAX_RESNET_STAGES or not all(_is_int(depth) and 1 <= depth <= 1000 for depth in depths):
                raise ValueError(
                    f"resnet_depths is at most {_MAX_RESNET_STAGES} stages of at least one unit each, got "
                    f"{self.resnet_depths}"
                )
        width = int(64 * self.resnet_width_factor)
        if self.resnet_depths is not None and (width % 32 or not 32 <= width <= 2**14):
            raise ValueError(
                "GroupNorm has 32 groups: resnet_width_factor must make the root a multiple of 32 channels wide, "
                f"got {self.resnet_width_factor}"
            )
        rows, columns = self.grid_size
        if min(rows, columns) < 1:
            height, width = self.total_stride
            raise ValueError(
                f"image_size={self.image_size} is smaller than one patch: it must be at least {height} x {width} px"
            )
        if rows * columns > _MAX_POSITIONS:
            raise ValueError(f"image_size={self.image_size} makes {rows} x {columns} patches: make it smaller")

    def check_architecture(self) -> None:
        """Check that the fields make a network; raise ValueError with the way out."""
        self._check_sizes()
        if self.hidden_act not in ACT2FN:
            close = difflib.get_close_matches(self.hidden_act, ACT2FN, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "for example 'gelu', 'gelu_pytorch_tanh', 'quick_gelu'"
            raise ValueError(f"hidden_act='{self.hidden_act}' is no activation of transformers; {hint}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}: "
                "choose a number of heads that does"
            )
        if self.pooling == "token" and not self.use_class_token:
            raise ValueError('pooling="token" reads the class token: set use_class_token=True or pooling="gap"')
        if self.position_embedding_type in ("sincos2d", "sincos_aim") and (
            self.hidden_size % 4 or self.hidden_size < 8
        ):
            raise ValueError(
                f"{self.position_embedding_type} needs a hidden_size that 4 divides, 8 or more; got {self.hidden_size}"
            )
        self._check_positions()
        self._check_head()
        self._check_labels()

    def _check_positions(self) -> None:
        """Check rotary positions and relative position biases."""
        options = {name: getattr(self, name) for name in self.__dataclass_fields__ if name.startswith("rope_")}
        if self.rope is None:
            needless = [name for name, value in options.items() if value not in (None, False, 0, "yx")]
            if needless:
                raise ValueError(f'{needless[0]} has no effect without rotary positions: set rope="dinov3" or "axial"')
        elif self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(
                f"rope turns rows and columns in pairs of channels: 4 must divide the width of a head, which is "
                f"{self.hidden_size // self.num_attention_heads}"
            )
        elif not self.rope_theta or self.rope_theta <= 0:
            raise ValueError(f"rope_theta must be above 0, got {self.rope_theta}")
        if self.rope == "axial":
            grid = self.rope_reference_grid
            assert grid is not None
            pair = self.grid_size if grid == "image" else [grid, grid] if isinstance(grid, int) else list(grid)
            if len(pair) != 2 or not all(_is_int(side) and side >= 1 for side in pair):
                raise ValueError(f'rope_reference_grid is (rows, columns) or "image", got {grid}')
        elif self.rope == "dinov3" and (self.rope_offset or self.rope_reference_grid is not None):
            raise ValueError('rope_offset and rope_reference_grid belong to rope="axial"')
        for name, least in (("rope_rescale", 1), ("rope_jitter", 1), ("rope_shift", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.rope != "dinov3" and (self.rope_rescale or self.rope_jitter or self.rope_shift):
            raise ValueError('rope_rescale, rope_jitter and rope_shift belong to rope="dinov3"')
        if self.relative_position_bias and (self.num_prefix_tokens != 1 or not self.use_class_token):
            raise ValueError(
                "relative_position_bias has rows for one class token and the patches: set use_class_token=True, "
                "num_class_tokens=1 and num_register_tokens=0"
            )
        if self.relative_position_bias and self.rope:
            raise ValueError("rope and relative_position_bias both say where patches are: choose one of them")
        if self.patch_dropout_rate and (self.rope or self.relative_position_bias):
            raise ValueError(
                "patch_dropout_rate leaves patches out, and rope and relative_position_bias need all of them: set it "
                "to 0"
            )

    def _check_labels(self) -> None:
        """Check thresholds of labels, mean and standard deviation of targets: one finite number for each output."""
        for name in HEAD_FIELDS:
            values = getattr(self, name)
            if values is not None and (len(values) != self.num_labels or not all(map(math.isfinite, values))):
                raise ValueError(f"{name} is one number for each of {self.num_labels} labels, got {str(values)[:60]}")
        if any(not 0 <= threshold <= 1 for threshold in self.label_thresholds or ()):
            raise ValueError(f"label_thresholds are scores from 0 to 1, got {str(self.label_thresholds)[:60]}")
        if (self.target_mean is None) != (self.target_std is None):
            raise ValueError("target_mean and target_std belong together: set both, or neither")
        if any(std <= 0 for std in self.target_std or ()):
            raise ValueError(f"target_std must be above 0, got {str(self.target_std)[:60]}")

    def _check_head(self) -> None:
        """Check pooling, the last norm and the classifier's input."""
        if self.num_class_tokens > 1 and not self.use_class_token:
            raise ValueError(f"num_class_tokens={self.num_class_tokens} needs use_class_token=True")
        if self.pooling == "prefix_mean" and not self.num_prefix_tokens:
            raise ValueError('pooling="prefix_mean" reads class and register tokens, and there are none')
        changed = [name for name in self.family_fields if name.startswith("map_")]
        if changed and self.pooling != "map":
            raise ValueError(f'{changed[0]} has no effect without attention pooling: set pooling="map"')
        if self.map_num_heads is not None and self.hidden_size % self.map_num_heads:
            raise ValueError(f"map_num_heads={self.map_num_heads} does not divide hidden_size={self.hidden_size}")
        if self.head_input == "token_and_mean" and not self.use_class_token:
            raise ValueError('head_input="token_and_mean" reads the class token: set use_class_token=True')
        if self.head_input == "two_tokens" and self.num_prefix_tokens < 2:
            raise ValueError('head_input="two_tokens" reads two tokens before the patches: add a register token')
        if self.head_input != "pooled" and self.representation_size is not None:
            raise ValueError(
                f'representation_size changes the pooled vector, which head_input="{self.head_input}" does not read: '
                "set it to None"
            )
        if self.final_norm == "pooled" and self.head_input in ("token_and_mean", "two_tokens", "mean"):
            raise ValueError(
                f'head_input="{self.head_input}" reads normalized tokens, and final_norm="pooled" leaves them as they '
                "are"
            )
        if self.final_norm == "tokens" and self.head_input == "mean_unnormalised":
            raise ValueError(
                'head_input="mean_unnormalised" reads tokens before the last norm: set final_norm="pooled" or "none"'
            )

    # -- where configs come from ---------------------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "HFViTConfig":
        """The configuration of a published size, e.g. `vit-base-patch16-224` or `r50-vit-base-patch16-384`.

        Args:
            name: a key of `PRESETS` followed by `-RESOLUTION` in pixels (default 224), or Google's own name
                (`ViT-B_16`, `R50+ViT-B_16`).
            overrides: any field of the configuration.

        Raises:
            ValueError: unknown preset or field; the message names the nearest.
        """
        match = re.fullmatch(r"(.+?)(?:-(\d{2,4}))?", name)
        key, resolution = (match[1], match[2]) if match else (name, None)
        key = {row[0]: preset for preset, row in PRESETS.items()}.get(key, key)
        if key not in PRESETS:
            close = difflib.get_close_matches(key, PRESETS, n=1, cutoff=0.3)
            hint = f", did you mean '{close[0]}-{resolution or 224}'?" if close else ";"
            raise ValueError(f"unknown preset '{name}'{hint} the presets are: {', '.join(PRESETS)}")
        for field in overrides:
            if field not in cls.__dataclass_fields__ and field not in ("num_labels", "attn_implementation"):
                close = difflib.get_close_matches(field, cls.__dataclass_fields__, n=1)
                raise ValueError(
                    f"HFViTConfig has no field '{field}'" + (f"; did you mean '{close[0]}'?" if close else "")
                )
        _, hidden, layers, mlp, heads, patch, pooling, dropout, depths = PRESETS[key]
        fields = {
            "image_size": int(resolution or 224),
            "patch_size": patch,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "pooling": pooling,
            "hidden_dropout_prob": dropout,
            "resnet_depths": depths,
        }
        try:
            return cls(**(fields | overrides))
        except StrictDataclassError as error:
            raise ValueError(_one_line(error)) from None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers' own. Raises ValueError for a file that is nested too deeply or is not a JSON object."""
        try:
            config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except RecursionError:
            raise ValueError(f"{pretrained_model_name_or_path}: config.json is nested too deeply") from None
        if not isinstance(config_dict, dict):
            raise ValueError(f"{pretrained_model_name_or_path}: config.json is not a JSON object")
        return config_dict, unused

    @classmethod
    def reads(cls, config_dict: dict[str, Any]) -> bool:
        """Whether `from_dict` reads this config.json: ours, or transformers' `vit`, `deit`, `vit-hybrid`."""
        family = config_dict.get("model_type")
        if family in (None, ""):
            return "architecture" not in config_dict  # a field of timm's config.json
        return not isinstance(family, str) or family == cls.model_type or family in _UPSTREAM_NUMERICS

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers' own, and for the config.json of its `vit`, `deit` and removed `vit-hybrid`.

        Raises:
            ValueError: another architecture, or an invalid field; one line that names it.
        """
        family = config_dict.get("model_type")
        if not isinstance(family, (str, type(None))):
            raise ValueError(f'config.json: model_type={family!r} is no name; this class reads "{cls.model_type}"')
        if family in _UPSTREAM_NUMERICS:
            config_dict = _translate_upstream(config_dict, family)
        elif family not in (None, "", cls.model_type):
            raise ValueError(
                f"this is a '{family}' checkpoint: {cls.__name__} reads hf_vit, {', '.join(_UPSTREAM_NUMERICS)}; "
                "hf_vit.load_checkpoint reads more families of ViTs"
            )
        try:
            config_dict = _checked_config(config_dict)
            if "num_hidden_layers" in kwargs:  # a backbone's default map is that of the last block: choose it anew
                if config_dict.get("out_features") == [f"stage{config_dict.get('num_hidden_layers')}"]:
                    config_dict = {k: v for k, v in config_dict.items() if k not in ("out_features", "out_indices")}
                config_dict["num_hidden_layers"] = kwargs["num_hidden_layers"]
            names, count = kwargs.get("id2label"), kwargs.get("num_labels")
            if names is not None or count is not None:  # thresholds and target statistics are not those of a new head
                before = len(config_dict["id2label"]) if config_dict.get("id2label") else config_dict.get("num_labels")
                if before != (len(names) if names is not None else count):
                    config_dict = {k: v for k, v in config_dict.items() if k not in HEAD_FIELDS}
            result = super().from_dict(config_dict, **kwargs)
            config = result[0] if isinstance(result, tuple) else result
            config.check_architecture()  # again: transformers sets keyword arguments after construction
        except StrictDataclassError as error:
            raise ValueError(f"config.json: {_one_line(error)}") from None
        except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
            # the various errors that transformers raises for values of the wrong type
            raise ValueError(f"config.json describes no model ({type(error).__name__}: {_one_line(error)})") from None
        return result


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _checked_config(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Check the types of transformers' own fields of a config.json, before transformers reads them.

    Returns:
        a copy with sorted class names and dtypes by name.

    Raises:
        ValueError: class names that are not numbered from 0, an unknown dtype, or values of the wrong type.
    """
    checked = dict(config_dict)
    labels = checked.get("id2label")
    if labels is not None:
        if not isinstance(labels, dict):
            raise ValueError(f"config.json: id2label maps class numbers to names, got a {type(labels).__name__}")
        try:
            names = {int(number): name for number, name in labels.items()}
        except (TypeError, ValueError):
            raise ValueError("config.json: id2label maps class numbers to names; a key is no number") from None
        if sorted(names) != list(range(len(labels))):
            raise ValueError(
                f"config.json: id2label has {len(labels)} names for the numbers {min(names)} to {max(names)}: name "
                f"each class from 0 to {len(labels) - 1}"
            )
        if not all(isinstance(name, str) or _is_int(name) for name in names.values()):
            raise ValueError("config.json: id2label maps class numbers to names; a name is no text")
        checked["id2label"] = {number: str(names[number]) for number in sorted(names)}
        checked.pop("label2id", None)  # derived from id2label
        checked.pop("num_labels", None)
    elif "num_labels" in checked:
        count = checked["num_labels"]
        if not _is_int(count) or not 0 <= count <= _MAX_SIZES["num_labels"]:
            raise ValueError(f"num_labels={count} is no number of classes: 1 or more, or 0 for no classifier")
    for key in ("dtype", "torch_dtype"):
        dtype = checked.get(key)
        name = str(dtype).removeprefix("torch.")
        if dtype is not None and name not in _DTYPES:
            raise ValueError(f"config.json: {key}={dtype!r} is none of {', '.join(_DTYPES)}")
        if dtype is not None:
            checked[key] = name
    implementation = checked.get("attn_implementation")
    if not isinstance(implementation, (str, dict, type(None))):
        raise ValueError(f'config.json: attn_implementation={implementation!r} is no name such as "sdpa" or "eager"')
    if checked.get("per_layer_config"):
        raise ValueError("config.json: per_layer_config (blocks that differ) is not supported; remove it")
    return checked


def _translate_upstream(config_dict: dict[str, Any], family: str) -> dict[str, Any]:
    """Translate a transformers config.json to our fields, and add the numerics that it leaves out."""
    ours = {
        key: value for key, value in config_dict.items() if key not in (*_UPSTREAM_UNUSED, "model_type", "auto_map")
    }
    ours = _UPSTREAM_NUMERICS[family] | ours
    if family == "vit-hybrid":
        # stages after the one that the backbone returns are in its config, but not in the network
        backbone = config_dict.get("backbone_config") or {}
        if backbone.get("layer_type", "bottleneck") != "bottleneck":
            raise ValueError(f"vit-hybrid with layer_type={backbone['layer_type']} has no counterpart in hf_vit")
        depths = backbone.get("depths", [3, 4, 9])
        stages = [f"stage{stage}" for stage in range(1, len(depths) + 1)]
        last = (backbone.get("out_features") or stages[-1:])[-1]
        ours["resnet_depths"] = list(depths[: stages.index(last) + 1])
        ours["resnet_width_factor"] = backbone.get("embedding_size", 64) / 64
        ours.setdefault("patch_size", 1)
    return ours
