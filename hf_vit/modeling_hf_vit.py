"""The Vision Transformer and its hybrid, in the order of the paper's equations (arXiv:2010.11929, section 3.1).

This file travels to the Hub beside the weights: it imports only torch, safetensors, transformers and its sibling
files. Parameter names are those of transformers' `models/vit`; numerics are those of `vit_jax/models_vit.py` in
google-research/vision_transformer at c6de1e5 and of `models/vit.py` in google-research/big_vision at 0127fb6.

    B batch   C image channels   H, W image size   P patch size   N tokens   D hidden size   k heads   d = D / k
"""

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_hf_vit import HFViTConfig, as_pair
from .position_embedding import resize_patch_kernel, resize_position_grid, resize_position_sequence, sincos2d
from .resnet_stem import ResNetStem, with_role


logger = logging.get_logger(__name__)

Size: TypeAlias = int | list[int] | tuple[int, int]  # pixels: one number, or (height, width)

TRAVELLING_FILES = ("configuration_hf_vit.py", "position_embedding.py", "resnet_stem.py", "modeling_hf_vit.py")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

# The key layouts that transformers has written over the years, read by every `from_pretrained` below: ViT before v5,
# and the removed vit-hybrid.
register_checkpoint_conversion_mapping(
    "HFViTModel",
    [
        WeightRenaming(r"encoder\.layer\.", r"(?<!\d\.)layers."),
        WeightRenaming("attention.query", "q_proj"),
        WeightRenaming("attention.key", "k_proj"),
        WeightRenaming("attention.value", "v_proj"),
        WeightRenaming("attention.output.dense", "attention.o_proj"),
        WeightRenaming("intermediate.dense", "mlp.fc1"),
        WeightRenaming("output.dense", "mlp.fc2"),
        WeightRenaming(r"backbone\.bit\.embedder\.convolution\.", "backbone.conv_root."),
        WeightRenaming(r"backbone\.bit\.embedder\.norm\.", "backbone.gn_root."),
        WeightRenaming(r"backbone\.bit\.encoder\.stages\.(\d+)\.layers\.", r"backbone.stages.\1.units."),
        WeightRenaming(r"units\.(\d+)\.norm(\d)\.", r"units.\1.gn\2."),
        WeightRenaming(r"units\.(\d+)\.downsample\.conv\.", r"units.\1.conv_proj."),
        WeightRenaming(r"units\.(\d+)\.downsample\.norm\.", r"units.\1.gn_proj."),
    ],
    overwrite=True,
)


# -- Eq. 1: an image becomes tokens ----------------------------------------------------------------


class HFViTPatchEmbeddings(nn.Module):
    """x_p E of Eq. 1: every patch, of pixels or of a ResNet's feature map, projected to D numbers."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        self.config = config
        self.backbone = None if config.resnet_depths is None else ResNetStem(config)
        self.projection = nn.Conv2d(
            config.stem_channels, config.hidden_size, kernel_size=config.patch_size_hw, stride=config.patch_size_hw
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` -> `(B, D, rows, columns)`; what the patch does not divide is cut, right and bottom."""
        height, width = pixel_values.shape[-2:]
        if pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"the model reads images of {self.config.num_channels} channels, pixel_values has shape "
                f"{tuple(pixel_values.shape)}; expected (batch, channels, height, width)"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values is {pixel_values.dtype}: rescale and normalise the picture first, for example with the "
                "checkpoint's AutoImageProcessor"
            )
        if min(self.config.grid_for((height, width))) < 1:
            down, across = self.config.total_stride
            raise ValueError(
                f"an image of {height} x {width} pixels is smaller than one patch: give at least {down} x {across}"
            )
        x = pixel_values.to(self.projection.weight.dtype)
        if self.backbone is not None:
            x = self.backbone(x)  # (B, C', H', W')
        rest = x.shape[-2] % self.projection.stride[0], x.shape[-1] % self.projection.stride[1]
        if any(rest) and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{height} x {width} pixels are not a multiple of the patch: the last {rest[0]} rows and {rest[1]} "
                f"columns of the {'image' if self.backbone is None else 'feature map'} are not used."
            )
        return self.projection(x)


class HFViTEmbeddings(nn.Module):
    """z_0 = [x_class; x_p^1 E; ...; x_p^N E] + E_pos (Eq. 1), then dropout."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        self.config = config
        self.grid_size = config.grid_size
        self.patch_embeddings = HFViTPatchEmbeddings(config)
        dim, registers = config.hidden_size, config.num_register_tokens
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.use_class_token else None
        self.register_tokens = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.position_embeddings = (
            nn.Parameter(torch.empty(1, config.num_position_rows, dim)) if config.has_position_table else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self._refitted: dict[tuple, torch.Tensor] = {}

    def patch_positions(self, grid: tuple[int, int]) -> torch.Tensor | None:
        """E_pos of the patches of an image with this grid, `(1, rows * columns, D)`; None without positions.

        A table refitted for inference is kept until the weights change.
        """
        if self.config.position_embedding_type == "none":
            return None
        if self.config.position_embedding_type == "sincos2d":
            weight = self.patch_embeddings.projection.weight
            return sincos2d(grid, self.config.hidden_size, device=weight.device, dtype=weight.dtype)
        table = self.position_embeddings
        rows = table[:, int(self.config.has_class_position) :]  # (1, rows * columns, D)
        if grid == self.grid_size:
            return rows
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or table.is_inference():
            return self._refit(rows, grid)
        key = (grid, table._version, table.data_ptr(), table.dtype, table.device)
        if key not in self._refitted:
            self._refitted = {old: kept for old, kept in self._refitted.items() if old[1:] == key[1:]}
            self._refitted[key] = self._refit(rows, grid)
        return self._refitted[key]

    def _refit(self, rows: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        if self.config.position_embedding_type == "learned1d":
            return resize_position_sequence(rows, grid[0] * grid[1])
        return resize_position_grid(rows, self.grid_size, grid, self.config.position_interpolation)

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor | None = None, mask_fill=None) -> torch.Tensor:
        """`(B, C, H, W)` -> `(B, prefix + rows * columns, D)`, order: class, registers, patches.

        `mask` (B, N) bool and `mask_fill` (B, N, D) replace projected patches before positions are added.
        """
        x = self.patch_embeddings(pixel_values)  # (B, D, rows, columns)
        batch, grid = x.shape[0], (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], mask_fill, x)  # (B, N, D)
        positions = self.patch_positions(grid)
        if positions is not None:
            x = x + positions
        x = self._drop_patches(x)
        prefix = []
        if self.cls_token is not None:
            token = self.cls_token
            if self.config.has_class_position and self.position_embeddings is not None:
                token = token + self.position_embeddings[:, :1]
            prefix.append(token.expand(batch, -1, -1))
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(batch, -1, -1))
        return self.dropout(torch.cat([*prefix, x], dim=1))  # (B, prefix + N, D)

    def _drop_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Keep a random share of the patch tokens of each image while training (arXiv:2212.00794)."""
        rate = self.config.patch_dropout_rate
        if not self.training or rate == 0:
            return x
        batch, tokens, dim = x.shape
        keep = max(1, round(tokens * (1 - rate)))
        chosen = torch.rand(batch, tokens, device=x.device).argsort(dim=1)[:, :keep, None]  # (B, kept, 1)
        return x.gather(1, chosen.expand(-1, -1, dim))  # (B, kept, D)


# -- Eqs. 5-8 (appendix A): multi-head self-attention ----------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference that every other backend agrees with; `(B, k, N, d)` each -> `(B, N, k, d)` and the weights."""
    weights = attention_weights(query, key, scaling)  # Eq. 6
    dropped = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), weights  # Eq. 7: (B, N, k, d)


def attention_weights(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Eq. 6: A = softmax(q k^T / sqrt(d)), the softmax in float32; `(B, k, N, d)` twice -> `(B, k, N, N)`."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, k, N, N)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


class HFViTAttention(nn.Module):
    """MSA of Eq. 8, through transformers' attention interface (eager, sdpa, flash, flex, kernels from the Hub)."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.head_dim = dim // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()

    def queries_and_keys(
        self, hidden_states: torch.Tensor, queries_from: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k of Eq. 5, `(B, N, D)` -> `(B, k, N, d)` each."""
        source = hidden_states if queries_from is None else queries_from
        return self.q_norm(self._heads(self.q_proj(source))), self.k_norm(self._heads(self.k_proj(hidden_states)))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)  # (B, k, N, d)

    def forward(
        self, hidden_states: torch.Tensor, queries_from: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(B, N, D)` -> `(B, N, D)` and, where asked for by `output_attentions`, the weights `(B, k, N, N)`."""
        wants_weights = kwargs.pop("output_attentions", None) or self.config.output_attentions
        query, key = self.queries_and_keys(hidden_states, queries_from)  # Eq. 5
        value = self._heads(self.v_proj(hidden_states))
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        x, weights = attend(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)
        if not wants_weights:
            weights = None
        elif weights is None or weights.shape[-2:] != (query.shape[2], key.shape[2]):  # backends that keep no weights
            weights = attention_weights(query, key, self.scaling)
        return self.o_proj(x.flatten(2)), weights  # Eq. 8: (B, N, D)


# -- Eqs. 2 and 3: the encoder block ---------------------------------------------------------------


class HFViTMLP(nn.Module):
    """Two dense layers with a GELU between them, dropout after each (section 3.1, appendix B.1)."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        self.fc1 = with_role(nn.Linear(config.hidden_size, config.intermediate_size), "mlp")
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.fc2 = with_role(nn.Linear(config.intermediate_size, config.hidden_size), "mlp")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.activation_fn(self.fc1(hidden_states))))


class HFViTLayerScale(nn.Module):
    """A learned factor per channel on a branch (arXiv:2103.17239)."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class HFViTDropPath(nn.Module):
    """Stochastic depth: a branch is left out for whole samples while training (arXiv:1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - self.rate)  # (B, 1, 1)
        return branch * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class HFViTLayer(GradientCheckpointingLayer):
    """One pre-LN block: z' = MSA(LN(z)) + z (Eq. 2), z = MLP(LN(z')) + z' (Eq. 3)."""

    def __init__(self, config: HFViTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        scaled = config.layer_scale_init is not None
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = HFViTAttention(config)
        self.layer_scale1 = HFViTLayerScale(config) if scaled else nn.Identity()
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HFViTMLP(config)
        self.layer_scale2 = HFViTLayerScale(config) if scaled else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = HFViTDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """`(B, N, D)` -> `(B, N, D)`."""
        branch, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(self.dropout(branch)))  # Eq. 2

        branch = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale2(self.dropout(branch)))  # Eq. 3


# -- Eq. 4: the image representation ---------------------------------------------------------------


class HFViTMapHead(nn.Module):
    """Multi-head attention pooling: a learned probe queries the tokens, then a residual MLP (arXiv:2106.04560)."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = HFViTAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HFViTMLP(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` -> `(B, D)`."""
        probe = self.probe.expand(hidden_states.shape[0], -1, -1)  # (B, 1, D)
        x, _ = self.attention(hidden_states, queries_from=probe)
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class HFViTPooler(nn.Module):
    """The representation layer of the pre-training head: dense and tanh (section 3.1, "MLP with one hidden layer")."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        self.dense = with_role(nn.Linear(config.hidden_size, config.representation_size), "representation")

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(pooled))


# -- The models ------------------------------------------------------------------------------------


class HFViTPreTrainedModel(PreTrainedModel):
    """Initialisation, loading at any resolution, saving with code, and attention maps, for every class below."""

    config: HFViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["HFViTEmbeddings", "HFViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": HFViTLayer,
        "attentions": OutputRecorder(HFViTAttention, index=1, layer_name="layers"),
    }
    _input_embed_layer = "patch_embeddings"

    @property
    def encoder(self) -> "HFViTModel":
        """The encoder inside a model with a head; the encoder itself otherwise."""
        return cast(HFViTModel, self.base_model)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every tensor and its distribution under `initializer="jax"` (Flax modules of vit_jax and big_vision).

        LayerNorm, GroupNorm        ones, zeros; the last norm of a residual unit (`gn3`) has scale zero
        patch projection            LeCun normal (truncated, variance 1 / fan_in), bias zeros
        ResNet convolutions         LeCun normal
        class token                 zeros
        positions, registers        normal 0.02
        q, k, v, o                  Xavier uniform, bias zeros
        MLP                         Xavier uniform, bias normal 1e-6
        LayerScale                  `layer_scale_init`
        MAP probe                   Xavier uniform
        representation layer        LeCun normal, bias zeros
        classifier                  zeros, bias `head_bias_init`

        `"truncated_normal"`: every weight and token from a normal of deviation 0.02 cut at two deviations, biases zero
        except the classifier's. `"normal_tokens"`: as `"jax"`, class token and positions from N(0, 1).
        """
        scheme, role = self.config.initializer, getattr(module, "role", None)
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            (init.zeros_ if role == "end_of_branch" else init.ones_)(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            if scheme == "truncated_normal":
                init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            elif role == "classifier":
                init.zeros_(module.weight)
            elif isinstance(module, nn.Conv2d) or role == "representation":
                _lecun_normal(module.weight)
            else:
                init.xavier_uniform_(module.weight)
            if role == "classifier":
                init.constant_(module.bias, self.config.head_bias_init)
            elif role == "mlp" and scheme != "truncated_normal":
                init.normal_(module.bias, std=1e-6)
            elif module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, HFViTLayerScale):
            init.constant_(module.lambda1, self.config.layer_scale_init)
        elif isinstance(module, HFViTMapHead):
            limit = math.sqrt(6 / (1 + self.config.hidden_size))
            init.uniform_(module.probe, -limit, limit)
        elif isinstance(module, HFViTEmbeddings):
            self._init_tokens(module, scheme)

    def _init_tokens(self, embeddings: HFViTEmbeddings, scheme: str) -> None:
        def draw(token: nn.Parameter) -> None:
            if scheme == "truncated_normal":
                init.trunc_normal_(token, std=0.02, a=-0.04, b=0.04)
            else:
                init.normal_(token, std=1.0 if scheme == "normal_tokens" else 0.02)

        if embeddings.cls_token is not None:
            init.zeros_(embeddings.cls_token) if scheme == "jax" else draw(embeddings.cls_token)
        if embeddings.position_embeddings is not None:
            draw(embeddings.position_embeddings)
        if embeddings.register_tokens is not None:
            init.normal_(embeddings.register_tokens, std=0.02)

    # -- loading and saving

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, keep_representation=False, **kwargs
    ):
        """As transformers' own; a config that differs from the folder's is met after an exact load.

        Args:
            pretrained_model_name_or_path: folder or Hub id, ours or in the layouts of transformers' `vit`, `deit` and
                removed `vit-hybrid`.
            config: a configuration; or give its fields by name: `image_size` refits the position table, `patch_size`
                and `num_channels` the patch kernel, `num_labels` or an `id2label` of another length put a zero head in
                place.
            keep_representation: keep the dense + tanh layer under a new head.

        Raises:
            OSError: nothing at that path or id. ValueError: another architecture, or fields that make no network.
        """
        path = pretrained_model_name_or_path
        if path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        source = cls.config_class.from_pretrained(path, **hub)
        if config is None or isinstance(config, (str, Path)):
            config, kwargs = cls.config_class.from_pretrained(config or path, return_unused_kwargs=True, **kwargs)
            kwargs |= hub
        load = copy.deepcopy(config)
        for name in ("image_size", "patch_size", "num_channels", "representation_size", "id2label", "label2id"):
            setattr(load, name, getattr(source, name))
        if cls._reads_upstream_pooler and source.representation_size is None and config.representation_size is None:
            load.representation_size = config.representation_size = _stored_pooler_width(path, hub)
        loaded = super().from_pretrained(path, *model_args, config=load, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._change_to(config, keep_representation)
        return loaded

    _reads_upstream_pooler = False

    def _change_to(self, wanted: HFViTConfig, keep_representation: bool) -> None:
        """Bring a loaded model to the resolution, patch, channels and labels of another configuration."""
        config = self.config
        if wanted.patch_size_hw != config.patch_size_hw or wanted.num_channels != config.num_channels:
            self.resize_patch_embeddings(wanted.patch_size, wanted.num_channels, image_size=wanted.image_size)
        if wanted.image_size_hw != config.image_size_hw:
            self.resize_position_embeddings(wanted.image_size)
        if wanted.representation_size not in (None, config.representation_size):
            raise ValueError(
                f"representation_size={wanted.representation_size} asks for a layer that the checkpoint does not have "
                f"(it has {config.representation_size}): load it as it is, or from scratch"
            )
        if wanted.representation_size is None and config.representation_size is not None:
            keep_representation = False
        elif wanted.num_labels == config.num_labels or not isinstance(self, HFViTForImageClassification):
            config.id2label, config.label2id = wanted.id2label, wanted.label2id
            return
        if isinstance(self, HFViTForImageClassification):
            self.replace_head(wanted.num_labels, wanted.id2label, keep_representation=keep_representation)
        else:
            self.encoder.pooler, config.representation_size = None, None

    def save_pretrained(  # type: ignore[override]
        self, save_directory, *, save_original_format=False, push_to_hub=False, **kwargs
    ):
        """As transformers' own, and lays the travelling code beside the weights.

        The folder loads on any machine with `trust_remote_code=True`. Keys are those of transformers v5;
        `save_original_format=True` writes those that the model came with.
        """
        hub = {name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private") if name in kwargs}
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)
        if kwargs.get("is_main_process", True):
            for name in TRAVELLING_FILES:
                here, there = Path(__file__).parent / name, Path(save_directory) / name
                if here.resolve() != there.resolve():
                    shutil.copyfile(here, there)
        if push_to_hub:
            hub.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(**hub, token=kwargs.get("token"))

    # -- resolution

    @torch.no_grad()
    def resize_position_embeddings(self, image_size: Size) -> None:
        """Refit the position table to the grid of another image size (section 3.2).

        `image_size` is in pixels, one number or (height, width). Class and register tokens are left as they are.
        Raises ValueError for an image smaller than one patch.
        """
        embeddings = self.encoder.embeddings
        grid = self.config.grid_for(image_size)
        if min(grid) < 1:
            down, across = self.config.total_stride
            raise ValueError(f"image_size={image_size} is smaller than one patch, {down} x {across} pixels")
        table = embeddings.position_embeddings
        patches = embeddings.patch_positions(grid)
        if table is not None and patches is not None and grid != embeddings.grid_size:
            prefix = table[:, : int(self.config.has_class_position)]
            rows = torch.cat([prefix, patches], dim=1)  # (1, [1 +] rows * columns, D)
            embeddings.position_embeddings = nn.Parameter(rows.clone(), requires_grad=table.requires_grad)
        embeddings.grid_size = grid
        self.config.image_size = image_size if isinstance(image_size, int) else as_pair(image_size)

    @torch.no_grad()
    def resize_patch_embeddings(
        self,
        patch_size: Size,
        num_channels: int | None = None,
        image_size: Size | None = None,
    ) -> None:
        """Refit the patch kernel to another patch size (FlexiViT's pseudo-inverse) or number of channels.

        The position table follows to the grid of `image_size` (default: the present one) under the new patch.
        Channels are repeated in turn and scaled so that a grey picture given in every channel answers the same.
        """
        config, embeddings = self.config, self.encoder.embeddings
        patches = embeddings.patch_embeddings
        first = patches.projection if patches.backbone is None else patches.backbone.conv_root
        if num_channels is not None and num_channels != config.num_channels:
            old = first.weight
            order = torch.arange(num_channels) % config.num_channels
            counts = torch.bincount(order, minlength=config.num_channels)[order].to(old)
            weight = old[:, order] / counts[:, None, None]  # (D, C', P, P)
            if num_channels < config.num_channels:
                weight = old.sum(dim=1, keepdim=True).expand(-1, num_channels, -1, -1) / num_channels
            first.weight = nn.Parameter(weight.clone(), requires_grad=old.requires_grad)
            first.in_channels = config.num_channels = num_channels
        new = as_pair(patch_size)
        if new != config.patch_size_hw:
            kernel = patches.projection.weight
            resized = resize_patch_kernel(kernel, new)
            patches.projection.weight = nn.Parameter(resized, requires_grad=kernel.requires_grad)
            patches.projection.kernel_size = patches.projection.stride = new
            config.patch_size = patch_size if isinstance(patch_size, int) else new
        self.resize_position_embeddings(config.image_size if image_size is None else image_size)

    # -- looking inside

    @torch.no_grad()
    def attention_maps(self, pixel_values: torch.Tensor, layers: Sequence[int] = (-1,)) -> dict[int, torch.Tensor]:
        """Attention weights of chosen blocks, whatever the attention backend, without keeping those of the others.

        Args:
            pixel_values: `(B, C, H, W)`.
            layers: indices of blocks; negative ones count from the last.

        Returns:
            for each index as given, `(B, heads, queries, keys)`; rows sum to one.

        Raises:
            ValueError: an index out of range.
        """
        blocks: nn.ModuleList = self.encoder.layers
        maps: dict[int, torch.Tensor] = {}
        for index in layers:
            if not -len(blocks) <= index < len(blocks):
                raise ValueError(f"layer {index} does not exist: the model has {len(blocks)}, 0 to {len(blocks) - 1}")

        def keep(index: int) -> Callable:
            def hook(attention: HFViTAttention, args: tuple, output: tuple) -> None:
                query, key = attention.queries_and_keys(args[0])
                maps[index] = attention_weights(query, key, attention.scaling)

            return hook

        hooks = [blocks[index].get_submodule("attention").register_forward_hook(keep(index)) for index in layers]
        try:
            self.encoder(pixel_values)
        finally:
            for hook in hooks:
                hook.remove()
        return {index: maps[index] for index in layers}


def _lecun_normal(weight: torch.Tensor) -> None:
    """Flax's default: a normal cut at two deviations whose variance after the cut is 1 / fan_in."""
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978
    init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def _stored_pooler_width(path, hub: dict) -> int | None:
    """Width of `pooler.dense` in a safetensors checkpoint of transformers, whose config does not tell, or None."""
    stored = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False, **hub)
    if stored is None:
        return None
    with safe_open(stored, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if name.endswith("pooler.dense.weight"):
                return tensors.get_slice(name).get_shape()[0]
    return None


class HFViTModel(HFViTPreTrainedModel):
    """The encoder: Eqs. 1-4 and, where the config has it, the representation layer. No classifier."""

    _reads_upstream_pooler = True

    def __init__(self, config: HFViTConfig):
        super().__init__(config)
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * block / max(depth - 1, 1) for block in range(depth)]
        self.embeddings = HFViTEmbeddings(config)
        self.layers = nn.ModuleList(HFViTLayer(config, rate) for rate in rates)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.map_head = HFViTMapHead(config) if config.pooling == "map" else None
        self.pooler = HFViTPooler(config) if config.representation_size is not None else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        mask: torch.Tensor | None = None,
        mask_fill: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode a batch of normalised images `(B, C, H, W)` of any size.

        Args:
            mask: `(B, N)` bool, patches whose projection is replaced. mask_fill: `(B, N, D)`, by what.
            output_hidden_states, output_attentions, return_dict: as everywhere in transformers.

        Returns:
            `last_hidden_state` `(B, prefix + N, D)` after the final LayerNorm, and `pooler_output`, what a classifier
            reads: `(B, D)`, or `(B, R)` with a representation layer.
        """
        x = self.embeddings(pixel_values, mask, mask_fill)  # z_0, Eq. 1
        for layer in self.layers:
            x = layer(x, **kwargs)  # z_l, Eqs. 2 and 3
        x = self.layernorm(x)
        pooled = self.pool(x)  # y, Eq. 4
        return BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=pooled if self.pooler is None else self.pooler(pooled)
        )

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Eq. 4 and its alternatives (appendix D.3), from normalised tokens `(B, prefix + N, D)` to `(B, D)`."""
        if self.map_head is not None:
            return self.map_head(x)
        if self.config.pooling == "gap":
            return x[:, self.config.num_prefix_tokens :].mean(dim=1)
        return x[:, 0]


class HFViTForImageClassification(HFViTPreTrainedModel):
    """The encoder and one linear layer: the head of fine-tuning, or of pre-training above a representation layer."""

    _keys_to_ignore_on_load_unexpected = [r"pooler\.dense\."]

    def __init__(self, config: HFViTConfig):
        super().__init__(config)
        self.vit = HFViTModel(config)
        width = config.representation_size or config.hidden_size
        self.classifier = (
            with_role(nn.Linear(width, config.num_labels), "classifier") if config.num_labels else nn.Identity()
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """Classify a batch of normalised images `(B, C, H, W)` of any size.

        Args:
            labels: class numbers `(B,)`, or soft labels `(B, K)`, both for softmax cross-entropy; with
                `config.problem_type` set, what transformers' losses of that name expect.

        Returns:
            `logits` `(B, K)`, `loss` where labels are given, and hidden states and attentions where asked for.
        """
        outputs = self.vit(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None and self.config.problem_type is not None:
            loss = self.loss_function(labels, logits, self.config)
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels.float() if labels.is_floating_point() else labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    @torch.no_grad()
    def replace_head(
        self, num_labels: int, id2label: dict[int, str] | None = None, keep_representation: bool = False
    ) -> None:
        """Put a zero-initialised linear layer in the head's place, of the same device and dtype (section 3.2).

        Args:
            num_labels: classes; 0 leaves no classifier.
            id2label: their names, one for each number from 0; LABEL_0, LABEL_1, ... where left out.
            keep_representation: keep the dense + tanh layer of pre-training under it; the paper drops it.

        Raises:
            ValueError: names that do not match the number of classes.
        """
        names = {index: f"LABEL_{index}" for index in range(num_labels)} if id2label is None else dict(id2label)
        if sorted(map(int, names)) != list(range(num_labels)):
            raise ValueError(
                f"id2label names {len(names)} classes, num_labels is {num_labels}: name each of 0 to {num_labels - 1}"
            )
        if not keep_representation:
            self.vit.pooler, self.config.representation_size = None, None
        like = self.vit.layernorm.weight
        width = self.config.representation_size or self.config.hidden_size
        self.classifier = nn.Identity()
        if num_labels:
            head = nn.Linear(width, num_labels, device=like.device, dtype=like.dtype)
            head.weight.zero_()
            head.bias.fill_(self.config.head_bias_init)
            self.classifier = with_role(head, "classifier")
        self.config.id2label = {int(index): name for index, name in names.items()}
        self.config.label2id = {name: index for index, name in self.config.id2label.items()}

    def freeze_backbone(self) -> None:
        """Leave only the classifier trainable: a linear probe."""
        self.requires_grad_(False)
        self.classifier.requires_grad_(True)


__all__ = ["TRAVELLING_FILES", "HFViTForImageClassification", "HFViTModel", "HFViTPreTrainedModel"]
