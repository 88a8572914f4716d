"""Every architectural number of a ViT or hybrid ViT, and the table of published sizes.

This file travels to the Hub beside the weights: it imports only the standard library, transformers and
huggingface_hub.

Sources: Dosovitskiy et al. 2020 (arXiv:2010.11929), Table 1 and section 4.1; Steiner et al. 2021 (AugReg,
arXiv:2106.10270); google-research/vision_transformer `vit_jax/configs/models.py` at c6de1e5.
"""

import difflib
import re
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin


# name: (Google's name, hidden, layers, mlp, heads, patch, pooling, dropout, ResNet depths). `patch` is the kernel that
# makes tokens: pixels of the image, or cells of the ResNet's map (R+Ti/16 is really /32: a stride-4 root, then 8x8).
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

# What a config.json of transformers leaves unsaid because it is that class's default or its fixed behaviour.
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


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or as a pair."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


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
        hidden_dropout_prob: after the position embedding and every dense layer but q, k, v (paper, appendix B.1).
        attention_probs_dropout_prob: on attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        patch_dropout_rate: share of patch tokens left out while training (FLIP, arXiv:2212.00794).
        pooling: what the head reads: `"token"` the class token (Eq. 4); `"gap"` the mean over the patch tokens;
            `"map"` attention pooling with a learned probe (arXiv:2106.04560); `"first"` the first token, whatever it
            is (big_vision's "0").
        use_class_token: whether a class token is put in front; None means only for `pooling="token"`.
        class_token_has_position: whether the class token has a row in the position table (Google's
            vision_transformer: yes; big_vision: no).
        num_register_tokens: learned tokens without position between class token and patches (arXiv:2309.16588).
        representation_size: width of the dense + tanh layer before the classifier (pre-training head), or None.
        position_embedding_type: `"learned"` table over the grid; `"sincos2d"` fixed (arXiv:2104.02057); `"none"`;
            `"learned1d"` a table over the raster sequence, refitted along the sequence (appendix D.4).
        position_interpolation: how a table moves to another grid: `"bilinear_align_corners"` (Google),
            `"bicubic"` (transformers), `"bicubic_antialias"` (timm).
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
        initializer: `"jax"` Google's; `"truncated_normal"` std 0.02 for every weight and token; `"normal_tokens"`
            Google's but class and position tokens from N(0, 1), as many ViT tutorials teach.

    `num_labels`, `id2label`, `label2id` come from the base class; `out_features` and `out_indices`, the maps that a
    backbone returns, from `BackboneConfigMixin`.

    Raises:
        ValueError: a field of the wrong type or range, or a misspelt one.
    """

    model_type = "hf_vit"
    base_model_tp_plan = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
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
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    patch_dropout_rate: float | int = 0.0
    pooling: Literal["token", "gap", "map", "first"] = "token"
    use_class_token: bool | None = None
    class_token_has_position: bool = True
    num_register_tokens: int = 0
    representation_size: int | None = None
    position_embedding_type: Literal["learned", "sincos2d", "none", "learned1d"] = "learned"
    position_interpolation: Literal["bilinear_align_corners", "bicubic", "bicubic_antialias"] = (
        "bilinear_align_corners"
    )
    layer_scale_init: float | int | None = None
    qk_norm: bool = False
    resnet_depths: list[int] | tuple[int, ...] | None = None
    resnet_width_factor: float | int = 1.0
    group_norm_eps: float = 1e-6
    weight_standardization: Literal["std_plus_eps", "sqrt_var_plus_eps"] = "std_plus_eps"
    weight_standardization_eps: float = 1e-5
    head_bias_init: float | int = 0.0
    initializer: Literal["jax", "truncated_normal", "normal_tokens"] = "jax"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        for key in (
            "model_type",
            "auto_map",
        ):  # class facts, not the folder's: another model's folder must not rename ours
            kwargs.pop(key, None)
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        fields = [name for name in self.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]
        # a config.json, known by its transformers_version, may carry fields of other libraries
        for key in kwargs if self.transformers_version is None else ():
            close = difflib.get_close_matches(key, fields, n=1, cutoff=0.86)
            if close and not key.startswith("_"):
                raise ValueError(f"{type(self).__name__} has no field '{key}'; did you mean '{close[0]}'?")
        if self.use_class_token is None:
            self.use_class_token = self.pooling == "token"
        self.auto_map = dict(AUTO_MAP)
        super().__post_init__(**kwargs)
        self.check_architecture()

    # -- derived sizes -------------------------------------------------------------------------------------------

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps: the embeddings and each block."""
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
        """Channels that the patch projection reads."""
        if self.resnet_depths is None:
            return self.num_channels
        width = int(64 * self.resnet_width_factor)
        return width * 4 * 2 ** (len(self.resnet_depths) - 1) if self.resnet_depths else width

    @property
    def total_stride(self) -> tuple[int, int]:
        """Pixels of the image between neighbouring tokens, (vertical, horizontal)."""
        stem = 1 if self.resnet_depths is None else 4 * 2 ** max(len(self.resnet_depths) - 1, 0)
        return stem * self.patch_size_hw[0], stem * self.patch_size_hw[1]

    def grid_for(self, image_size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patch tokens of an image of that size: SAME padding in the ResNet, floor at the patch."""
        rows, columns = as_pair(image_size)
        for _ in range(0 if self.resnet_depths is None else 2 + max(len(self.resnet_depths) - 1, 0)):
            rows, columns = -(-rows // 2), -(-columns // 2)
        return rows // self.patch_size_hw[0], columns // self.patch_size_hw[1]

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of the position table."""
        return self.grid_for(self.image_size)

    @property
    def has_position_table(self) -> bool:
        """Whether positions are a learned parameter."""
        return self.position_embedding_type in ("learned", "learned1d")

    @property
    def has_class_position(self) -> bool:
        """Whether row 0 of the position table belongs to the class token."""
        return bool(self.use_class_token) and self.class_token_has_position

    @property
    def num_position_rows(self) -> int:
        """Rows of the position table: the grid, and the class token's where it has one."""
        rows, columns = self.grid_size
        return rows * columns + int(self.has_class_position)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class and registers."""
        return int(bool(self.use_class_token)) + self.num_register_tokens

    @PreTrainedConfig.num_labels.setter  # type: ignore[attr-defined]
    def num_labels(self, num_labels: int):
        if num_labels < 0:  # the base class takes it for a model without classes
            raise ValueError(f"num_labels={num_labels} is no number of classes: 1 or more, or 0 for no classifier")
        PreTrainedConfig.num_labels.fset(self, num_labels)  # type: ignore[attr-defined]

    # -- validation ----------------------------------------------------------------------------------------------

    def check_architecture(self) -> None:
        """Raise ValueError, with the way out, for sizes that make no network."""
        for name in ("hidden_size", "num_attention_heads", "intermediate_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}: "
                "choose a number of heads that does"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_dropout_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.pooling == "token" and not self.use_class_token:
            raise ValueError('pooling="token" reads the class token: set use_class_token=True or pooling="gap"')
        if self.position_embedding_type == "sincos2d" and (self.hidden_size % 4 or self.hidden_size < 8):
            raise ValueError(f"sincos2d needs a hidden_size that 4 divides, at least 8; got {self.hidden_size}")
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if not isinstance(size, int) and len(size) != 2:
                raise ValueError(f"{name} is one number or (height, width), got {size}")
            if min(as_pair(size)) < 1:
                raise ValueError(f"{name} must be at least 1 pixel, got {size}")
        if self.resnet_depths is not None:
            if any(depth < 1 for depth in self.resnet_depths):
                raise ValueError(f"every stage of resnet_depths needs at least one unit, got {self.resnet_depths}")
            if int(64 * self.resnet_width_factor) % 32:
                raise ValueError(
                    "GroupNorm has 32 groups: resnet_width_factor must make the root a multiple of 32 channels wide, "
                    f"got {self.resnet_width_factor}"
                )
        if min(self.grid_size) < 1:
            height, width = self.total_stride
            raise ValueError(
                f"image_size={self.image_size} is smaller than one patch: it must be at least {height} x {width} px"
            )

    # -- where configs come from ---------------------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "HFViTConfig":
        """The configuration of a published size, e.g. `vit-base-patch16-224` or `r50-vit-base-patch16-384`.

        Args:
            name: a key of `PRESETS` followed by `-RESOLUTION` in pixels (224 where left out), or Google's own name
                (`ViT-B_16`, `R50+ViT-B_16`).
            overrides: any field of the configuration.

        Raises:
            ValueError: unknown preset (the nearest is named) or unknown field.
        """
        found = re.fullmatch(r"(.+?)(?:-(\d{2,4}))?", name)
        key, resolution = (found[1], found[2]) if found else (name, None)
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
        return cls(**(fields | overrides))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers' own, and reads the config.json of its `vit`, `deit` and removed `vit-hybrid`."""
        family = config_dict.get("model_type")
        if family in _UPSTREAM_NUMERICS:
            config_dict = _translate_upstream(config_dict, family)
        elif family not in (None, "", cls.model_type):
            raise ValueError(
                f"this is a '{family}' checkpoint, not a ViT: {cls.__name__} reads hf_vit, "
                f"{', '.join(_UPSTREAM_NUMERICS)}"
            )
        return super().from_dict(config_dict, **kwargs)


def _translate_upstream(config_dict: dict[str, Any], family: str) -> dict[str, Any]:
    """The fields of a transformers config.json in our words, its unsaid numerics spelt out."""
    ours = {
        key: value for key, value in config_dict.items() if key not in (*_UPSTREAM_UNUSED, "model_type", "auto_map")
    }
    ours = _UPSTREAM_NUMERICS[family] | ours
    if family == "vit-hybrid":
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
