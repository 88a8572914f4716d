"""The Vision Transformer and its hybrid, in the order of the paper's equations (arXiv:2010.11929, section 3.1).

This file travels to the Hub beside the weights: it imports only torch, transformers and its sibling files. Parameter
names are those of transformers' `models/vit`; numerics are those of `vit_jax/models_vit.py` in
google-research/vision_transformer at c6de1e5 and of `models/vit.py` in google-research/big_vision at 0127fb6.

    B batch   C image channels   H, W image size   P patch size   N tokens   D hidden size   k heads   d = D / k

Later encoders (DINOv2, CLIP, BEiT, EVA-02, ...) differ in some modules, which are chosen when the network is built;
the plain ViT has `nn.Identity` there. Not transformers' `models/vit`: it has no hybrid, no drop path and no patch
dropout.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedLMOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_hf_vit import HFViTConfig
from .position_embedding import (
    relative_bias,
    relative_table_rows,
    resize_position_grid,
    resize_position_sequence,
    rotary_angles,
    rotate,
    sincos2d,
    sincos_aim,
)
from .pretrained_hf_vit import HFViTPreTrainedModel
from .resnet_stem import ResNetStem, with_role


logger = logging.get_logger(__name__)


def norm_layer(config: HFViTConfig, width: int | None = None) -> nn.Module:
    """LN of Eqs. 2 to 4, over `width` channels [D]."""
    norm_class = nn.RMSNorm if config.norm_type == "rms" else nn.LayerNorm
    return norm_class(width or config.hidden_size, eps=config.layer_norm_eps)


# -- Eq. 1: an image becomes tokens ----------------------------------------------------------------


class HFViTPatchEmbeddings(nn.Module):
    """x_p E of Eq. 1: each patch of the image, or of a ResNet's feature map, projected to D channels."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        self.config = config
        self.backbone = None if config.resnet_depths is None else ResNetStem(config)
        self.projection = nn.Conv2d(
            config.stem_channels,
            config.hidden_size,
            kernel_size=config.patch_size_hw,
            stride=config.patch_size_hw,
            bias=config.patch_bias,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` -> `(B, D, rows, columns)`; pixels beyond the last whole patch are dropped."""
        height, width = pixel_values.shape[-2:]
        if pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"the model reads images of {self.config.num_channels} channels, pixel_values has shape "
                f"{tuple(pixel_values.shape)}; expected (batch, channels, height, width)"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values is {pixel_values.dtype}: rescale and normalize the image first, for example with the "
                "checkpoint's AutoImageProcessor"
            )
        if min(self.config.grid_for((height, width))) < 1:
            down, across = self.config.total_stride
            raise ValueError(
                f"an image of {height} x {width} pixels is smaller than one patch: give at least {down} x {across}"
            )
        x = pixel_values.to(self.projection.weight.dtype)  # processors give float32, also to bfloat16 models
        if self.backbone is not None:
            x = self.backbone(x)  # (B, C', H', W')
        # Flax's patch convolution is VALID: a remainder at the right and the bottom is dropped, not padded.
        rows, columns = x.shape[-2] % self.projection.stride[0], x.shape[-1] % self.projection.stride[1]
        if (rows or columns) and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{height} x {width} pixels are not a multiple of the patch: the last {rows} rows and {columns} "
                f"columns of the {'image' if self.backbone is None else 'feature map'} are not used."
            )
        return self.projection(x)  # (B, D, rows, columns)


class HFViTEmbeddings(nn.Module):
    """z_0 = [x_class; x_p^1 E; ...; x_p^N E] + E_pos (Eq. 1), then dropout."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        with_role(self, "tokens")
        self.config = config
        self.grid_size = config.grid_size
        self.patch_embeddings = HFViTPatchEmbeddings(config)
        dim, registers = config.hidden_size, config.num_register_tokens
        self.cls_token = nn.Parameter(torch.empty(1, config.num_class_tokens, dim)) if config.use_class_token else None
        self.register_tokens = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.position_embeddings = (
            nn.Parameter(torch.empty(1, config.num_position_rows, dim)) if config.has_position_table else None
        )
        self.patch_norm = norm_layer(config) if config.patch_norm else nn.Identity()
        self.pre_layernorm = norm_layer(config) if config.pre_layernorm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self._refitted: dict[tuple, torch.Tensor] = {}  # not a buffer: never saved, never cast

    def patch_positions(self, grid: tuple[int, int]) -> torch.Tensor | None:
        """E_pos of the patches of an image with this grid, `(1, rows * columns, D)`; None without positions.

        A table refitted for inference is cached until the weights change or `train()` or `eval()` is called: fused
        optimizers change a table without raising its version.
        """
        if self.config.position_embedding_type == "none":
            return None
        if not self.config.has_position_table:
            weight = self.patch_embeddings.projection.weight
            fixed = sincos2d if self.config.position_embedding_type == "sincos2d" else sincos_aim
            return fixed(grid, self.config.hidden_size, device=weight.device, dtype=weight.dtype)
        table = self.position_embeddings
        patch_rows = table[:, self.config.num_class_rows :]  # (1, rows * columns, D)
        if grid == self.grid_size:
            return patch_rows
        # With gradients the refit is part of the graph; a tensor of inference mode has no version to compare.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or table.is_inference():
            return self._refit(patch_rows, grid)
        key = (grid, table._version, table.data_ptr(), table.dtype, table.device)
        if key not in self._refitted:
            # drop tables of earlier weights, keep those of other grids: evaluation returns to the same few sizes
            self._refitted = {old: table for old, table in self._refitted.items() if old[1:] == key[1:]}
            self._refitted[key] = self._refit(patch_rows, grid)
        return self._refitted[key]

    def train(self, mode: bool = True):
        self._refitted = {}
        return super().train(mode)

    def _refit(self, patch_rows: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        if self.config.position_embedding_type == "learned1d":
            return resize_position_sequence(patch_rows, grid[0] * grid[1])
        return resize_position_grid(patch_rows, self.grid_size, grid, self.config.position_interpolation)

    def forward(
        self, pixel_values: torch.Tensor, corrupt: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """`(B, C, H, W)` -> `(B, prefix + rows * columns, D)`, order: class, registers, patches.

        `corrupt` changes the projected patches `(B, N, D)` before positions are added (masked patch prediction).
        """
        x = self.patch_embeddings(pixel_values)  # (B, D, rows, columns)
        batch, grid = x.shape[0], (x.shape[2], x.shape[3])
        x = self.patch_norm(x.flatten(2).transpose(1, 2))  # (B, N, D)
        if corrupt is not None:
            x = corrupt(x)  # before positions: a masked patch still tells where it is
        positions = self.patch_positions(grid)
        if positions is not None:
            x = x + positions  # E_pos, Eq. 1
        x = self._drop_patches(x)  # after positions, so that the remaining patches keep theirs
        prefix = []
        if self.cls_token is not None:
            token = self.cls_token
            if self.config.has_class_position and self.position_embeddings is not None:
                token = token + self.position_embeddings[:, : self.config.num_class_rows]
            prefix.append(token.expand(batch, -1, -1))
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(batch, -1, -1))  # no position: they belong to no place
        return self.pre_layernorm(self.dropout(torch.cat([*prefix, x], dim=1)))  # (B, prefix + N, D)

    def _drop_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Keep a random fraction of the patch tokens of each image while training (arXiv:2212.00794)."""
        rate = self.config.patch_dropout_rate
        if not self.training or rate == 0:
            return x
        batch, tokens, dim = x.shape
        keep = max(1, round(tokens * (1 - rate)))
        # ranks of random numbers: every image keeps the same number of patches, so the batch stays one tensor
        indices = torch.rand(batch, tokens, device=x.device).argsort(dim=1)[:, :keep, None]  # (B, keep, 1)
        return x.gather(1, indices.expand(-1, -1, dim))  # (B, keep, D)


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
    """The reference for every other attention backend; `(B, k, N, d)` each -> `(B, N, k, d)` and the weights."""
    weights = attention_weights(query, key, scaling, attention_mask)  # Eq. 6
    dropped = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), weights  # Eq. 7: (B, N, k, d)


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, scaling: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. 6: A = softmax(q k^T / sqrt(d)), the softmax in float32; `(B, k, N, d)` twice -> `(B, k, N, N)`.

    `bias` `(1, k, N, N)` is added to the scores: relative positions.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, k, N, N)
    if bias is not None:
        scores = scores + bias
    # float32: sums of hundreds of bfloat16 exponentials lose the small ones
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


class HFViTAttention(nn.Module):
    """MSA of Eq. 8, through transformers' attention interface (eager, sdpa, flash, flex, kernels from the Hub)."""

    def __init__(self, config: HFViTConfig, num_heads: int | None = None):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.head_dim = dim // (num_heads or config.num_attention_heads)
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # read by transformers' attention functions
        # three layers, not one of width 3 D: tensor parallelism and LoRA address them by name, and biases may differ
        self.q_proj = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=config.qkv_bias and config.key_bias)
        self.v_proj = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(dim, dim, bias=config.dense_bias)
        self.q_norm = norm_layer(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = norm_layer(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.norm = norm_layer(config) if config.attention_norm else nn.Identity()

    def queries_and_keys(
        self, hidden_states: torch.Tensor, queries_from: torch.Tensor | None = None, **positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k of Eq. 5, `(B, N, D)` -> `(B, k, N, d)` each.

        `positions` come from `HFViTModel.relative_positions`; the plain ViT has none.
        """
        source = hidden_states if queries_from is None else queries_from
        return self.q_norm(self._heads(self.q_proj(source))), self.k_norm(self._heads(self.k_proj(hidden_states)))

    def score_bias(self, **positions) -> torch.Tensor | None:
        """Bias added to the scores of Eq. 6, `(1, k, N, N)`, or None."""
        return None

    def weights(self, hidden_states: torch.Tensor, **positions) -> torch.Tensor:
        """A of Eq. 6, with any attention backend; `(B, N, D)` -> `(B, k, N, N)`."""
        query, key = self.queries_and_keys(hidden_states, **positions)
        return attention_weights(query, key, self.scaling, self.score_bias(**positions))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        # the number of heads comes from x: under tensor parallelism each rank holds only some of them
        return x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)  # (B, k, N, d)

    def forward(
        self, hidden_states: torch.Tensor, queries_from: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(B, N, D)` -> `(B, N, D)` and, with `output_attentions`, the weights `(B, k, N, N)`; else None.

        `queries_from` `(B, M, D)`: tokens to compute queries and results for; default: all of `hidden_states`.
        """
        positions = {name: kwargs.pop(name) for name in ("rotary", "grid", "shared_bias") if name in kwargs}
        output_attentions = kwargs.pop("output_attentions", None) or self.config.output_attentions
        query, key = self.queries_and_keys(hidden_states, queries_from, **positions)  # Eq. 5: (B, k, N, d) each
        value = self._heads(self.v_proj(hidden_states))  # Eq. 5: (B, k, N, d)
        bias = self.score_bias(**positions)
        if bias is not None:
            bias = bias[:, :, : query.shape[2]]  # (1, k, M, N): queries are the first M tokens
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        x, weights = attention(  # Eqs. 6 and 7: (B, N, k, d)
            self, query, key, value, bias, dropout=dropout, scaling=self.scaling, **kwargs
        )
        if not output_attentions:
            weights = None
        elif weights is None or weights.shape[-2:] != (query.shape[2], key.shape[2]):
            # fused backends return no weights, or another tensor (flash: the log-sum-exp) in their place
            weights = attention_weights(query, key, self.scaling, bias)
        return self.o_proj(self.norm(x.flatten(2))), weights  # Eq. 8: (B, N, D)


class HFViTRotaryAttention(HFViTAttention):
    """Attention with rotary positions of queries and keys (arXiv:2104.09864): DINOv3, EVA-02, PE."""

    def queries_and_keys(
        self, hidden_states: torch.Tensor, queries_from: torch.Tensor | None = None, **positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As above, rotated by the angles `rotary`: cosine and sine, `(N, d)` each."""
        query, key = super().queries_and_keys(hidden_states, queries_from)
        cos, sin = positions["rotary"]
        prefix, layout = self.config.num_prefix_tokens, self.config.rope_layout
        return rotate(query, cos, sin, prefix, layout), rotate(key, cos, sin, prefix, layout)


class HFViTRelativeAttention(HFViTAttention):
    """Attention with learned relative position biases of the scores (arXiv:2106.08254): BEiT, data2vec."""

    def __init__(self, config: HFViTConfig):
        super().__init__(config)
        self.grid_size = config.grid_size
        self.relative_position_bias_table = None
        if config.relative_position_bias in ("layer", "both"):
            rows = relative_table_rows(config.grid_size)
            self.relative_position_bias_table = nn.Parameter(torch.empty(rows, config.num_attention_heads))
            with_role(self, "relative_positions")

    def score_bias(self, **positions) -> torch.Tensor | None:
        """This layer's biases for the image's `grid`, plus `shared_bias` `(1, k, N, N)` or None."""
        shared = positions["shared_bias"]
        if self.relative_position_bias_table is None:
            return shared
        bias = relative_bias(self.relative_position_bias_table, self.grid_size, positions["grid"])
        return bias if shared is None else bias + shared

    def forward(self, hidden_states: torch.Tensor, queries_from: torch.Tensor | None = None, **kwargs):
        """As above. Raises ValueError under flash attention, whose kernels ignore the bias."""
        if "flash" in str(self.config._attn_implementation):
            raise ValueError(
                "flash attention adds no biases to the scores, which relative_position_bias needs: choose "
                'attn_implementation="sdpa"'
            )
        return super().forward(hidden_states, queries_from, **kwargs)


def attention_layer(config: HFViTConfig) -> HFViTAttention:
    """The attention that the configuration asks for."""
    if config.rope is not None:
        return HFViTRotaryAttention(config)
    return HFViTAttention(config) if config.relative_position_bias is None else HFViTRelativeAttention(config)


# -- Eqs. 2 and 3: the encoder block ---------------------------------------------------------------


class HFViTMLP(nn.Module):
    """Two dense layers with a GELU between them, dropout after each (section 3.1, appendix B.1)."""

    def __init__(self, config: HFViTConfig, width: int | None = None):
        super().__init__()
        dim, width, bias = config.hidden_size, width or config.intermediate_size, config.dense_bias
        self.fc1 = with_role(nn.Linear(dim, width, bias=bias), "mlp")
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = norm_layer(config, width) if config.mlp_norm else nn.Identity()
        self.fc2 = with_role(nn.Linear(width, dim, bias=bias), "mlp")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(self.dropout(self.activation_fn(self.fc1(hidden_states)))))


class HFViTGatedMLP(nn.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)) (arXiv:2002.05202): DINOv2-g, DINOv3 S+, H+, 7B, EVA-02, AIMv2."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        dim, width, bias = config.hidden_size, config.intermediate_size, config.dense_bias
        self.gate_proj = with_role(nn.Linear(dim, width, bias=bias), "mlp")
        self.up_proj = with_role(nn.Linear(dim, width, bias=bias), "mlp")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = norm_layer(config, width) if config.mlp_norm else nn.Identity()
        self.down_proj = with_role(nn.Linear(width, dim, bias=bias), "mlp")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)  # (B, N, width)
        return self.down_proj(self.norm(self.dropout(x)))


class HFViTLayerScale(nn.Module):
    """A learned factor per channel on a branch (arXiv:2103.17239)."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(config.hidden_size))
        with_role(self, "layer_scale")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class HFViTDropPath(nn.Module):
    """Stochastic depth: while training, a branch is left out for random samples (arXiv:1603.09382)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(
        self, branch: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, every_sample: bool = False
    ) -> torch.Tensor:
        """`branch(x)`, `(B, N, D)`; while training zero for random samples, the others scaled to keep the mean.

        Args:
            every_sample: run the branch also on the samples for which the result is zero.
        """
        if not self.training or self.rate == 0:
            return branch(x)
        keep, batch = 1 - self.rate, x.shape[0]
        # compiled code needs shapes that do not depend on the draw
        if every_sample or torch.compiler.is_compiling():
            mask = x.new_empty(batch).bernoulli_(keep)
            return branch(x) * (mask / keep)[:, None, None]  # 1 / keep: the mean over draws is branch(x)
        # Dropped samples are not computed at all: half of the work of a deep block at rate 0.5.
        mask = torch.empty(batch).bernoulli_(keep)  # drawn on the CPU: counting it there does not wait for the GPU
        if not mask.any():  # still run the branch on one sample, times zero: every weight gets a gradient under DDP
            return branch(x[:1]).mul(0).expand(batch, -1, -1)
        samples = mask.nonzero()[:, 0].to(x.device, non_blocking=True)
        y = branch(x.index_select(0, samples)) / keep  # (samples, N, D)
        return y.new_zeros(batch, *y.shape[1:]).index_copy(0, samples, y)  # (B, N, D)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class HFViTLayer(GradientCheckpointingLayer):
    """One pre-LN block: z' = MSA(LN(z)) + z (Eq. 2), z = MLP(LN(z')) + z' (Eq. 3)."""

    def __init__(self, config: HFViTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        scaled = config.layer_scale_init is not None
        self.layernorm_before = norm_layer(config)
        self.attention = attention_layer(config)
        self.layer_scale1 = HFViTLayerScale(config) if scaled else nn.Identity()
        self.layernorm_after = norm_layer(config)
        self.mlp = HFViTGatedMLP(config) if config.mlp_type == "swiglu" else HFViTMLP(config)
        self.layer_scale2 = HFViTLayerScale(config) if scaled else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = HFViTDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, tokens: int | None = None, **kwargs) -> torch.Tensor:
        """`(B, N, D)` -> `(B, N, D)`, or `(B, tokens, D)`: only the first tokens, which attend to all N."""
        # attention weights are recorded for the whole batch, also for samples whose branch is dropped
        every_sample = bool(kwargs.get("output_attentions") or self.attention.config.output_attentions)

        def msa(z: torch.Tensor) -> torch.Tensor:
            z = self.layernorm_before(z)
            queries = z if tokens is None else z[:, :tokens]
            return self.layer_scale1(self.dropout(self.attention(z, queries, **kwargs)[0]))

        def mlp(z: torch.Tensor) -> torch.Tensor:
            return self.layer_scale2(self.dropout(self.mlp(self.layernorm_after(z))))

        z = hidden_states if tokens is None else hidden_states[:, :tokens]
        z = self.drop_path(msa, hidden_states, every_sample) + z  # Eq. 2: z' = MSA(LN(z)) + z
        return self.drop_path(mlp, z, every_sample) + z  # Eq. 3: z = MLP(LN(z')) + z'


# -- Eq. 4: the image representation ---------------------------------------------------------------


class HFViTMapHead(nn.Module):
    """Multi-head attention pooling: a learned probe queries the tokens, then a residual MLP (arXiv:2106.04560)."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        with_role(self, "probe")
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = HFViTAttention(config, config.map_num_heads)
        if not config.map_query_proj:
            self.attention.q_proj = nn.Identity()
        if not config.dense_bias:  # AIMv2 has no biases in its blocks, but one here
            self.attention.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.layernorm = norm_layer(config) if config.map_mlp else nn.Identity()
        self.mlp = HFViTMLP(config, config.map_intermediate_size) if config.map_mlp else None
        self.first = 0 if config.map_over_prefix else config.num_prefix_tokens

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` -> `(B, D)`."""
        probe = self.probe.expand(hidden_states.shape[0], -1, -1)  # (B, 1, D)
        x, _ = self.attention(hidden_states[:, self.first :], queries_from=probe)
        if self.mlp is not None:
            x = x + self.mlp(self.layernorm(x))
        return x[:, 0]


class HFViTPooler(nn.Module):
    """The representation layer of the pre-training head: dense and tanh (section 3.1, "MLP with one hidden layer")."""

    def __init__(self, config: HFViTConfig):
        super().__init__()
        self.dense = with_role(nn.Linear(config.hidden_size, config.representation_size), "representation")

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(pooled))


# -- The models ------------------------------------------------------------------------------------


class HFViTModel(HFViTPreTrainedModel):
    """The encoder: Eqs. 1-4 and, if the config has one, the representation layer. No classifier."""

    optimized = False  # set by `optimize_for_inference`
    _reads_upstream_pooler = True
    _can_record_outputs = {
        "hidden_states": HFViTLayer,
        "attentions": OutputRecorder(HFViTAttention, index=1, layer_name="layers"),
    }

    def __init__(self, config: HFViTConfig):
        super().__init__(config)
        depth = config.num_hidden_layers
        # deeper blocks are dropped more often: early features serve all that follow (arXiv:1603.09382, section 3)
        rates = [config.drop_path_rate * block / max(depth - 1, 1) for block in range(depth)]
        self.embeddings = HFViTEmbeddings(config)
        self.layers = nn.ModuleList(HFViTLayer(config, rate) for rate in rates)
        self.layernorm = nn.Identity() if config.final_norm == "none" else norm_layer(config)
        self.shared_relative_position_bias_table = None
        if config.relative_position_bias in ("shared", "both"):
            rows = relative_table_rows(config.grid_size)
            self.shared_relative_position_bias_table = nn.Parameter(torch.empty(rows, config.num_attention_heads))
            with_role(self, "relative_positions")
        self.map_head = HFViTMapHead(config) if config.pooling == "map" else None
        self.pooler = HFViTPooler(config) if config.representation_size is not None else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        corrupt: Callable[[torch.Tensor], torch.Tensor] | None = None,
        tokens: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode a batch of normalized images `(B, C, H, W)` of any size.

        Args:
            corrupt: changes the projected patches `(B, N, D)` before positions are added.
            tokens: number of leading tokens that the last block computes, if the caller reads no others; None: all.
            output_hidden_states, output_attentions, return_dict: as everywhere in transformers.

        Returns:
            `last_hidden_state` `(B, prefix + N, D)` after the final LayerNorm, and `pooler_output`, the image's
            representation: `(B, D)`, or `(B, R)` with a representation layer. `final_norm="pooled"` normalizes only
            `pooler_output`.

        Raises:
            ValueError: not normalized images of `num_channels`, images smaller than a patch, or `tokens` with a
                pooling that reads all of them.
        """
        if tokens is not None and self.config.pooling not in ("token", "first"):
            raise ValueError(f'pooling="{self.config.pooling}" reads all tokens: leave tokens={tokens} out')
        x = self.embeddings(pixel_values, corrupt)  # z_0, Eq. 1
        kwargs |= self.relative_positions(pixel_values)
        for layer in self.layers:
            if tokens is not None and layer is self.layers[-1]:
                kwargs["tokens"] = tokens
            x = layer(x, **kwargs)  # z_l, Eqs. 2 and 3
        return self.represent(x)  # y, Eq. 4

    def represent(self, x: torch.Tensor) -> BaseModelOutputWithPooling:
        """Outputs of `forward` from those of the last block `(B, prefix + N, D)`: y = LN(z_L^0) (Eq. 4)."""
        if self.config.final_norm == "pooled":
            pooled = self.layernorm(self.pool(x))
        else:
            x = self.layernorm(x)
            pooled = self.pool(x)
        return BaseModelOutputWithPooling(
            last_hidden_state=x, pooler_output=pooled if self.pooler is None else self.pooler(pooled)
        )

    def relative_positions(self, pixel_values: torch.Tensor) -> dict:
        """Rotary angles or relative biases that every block's attention takes; `{}` for the plain ViT."""
        if self.config.rope is None and self.config.relative_position_bias is None:
            return {}
        grid = self.config.grid_for((pixel_values.shape[-2], pixel_values.shape[-1]))
        if self.config.rope is not None:
            weight = self.embeddings.patch_embeddings.projection.weight
            angles = rotary_angles(self.config, grid, weight.device, self.training)
            return {"rotary": tuple(part.to(weight.dtype) for part in angles)}
        table = self.shared_relative_position_bias_table
        return {
            "grid": grid,
            "shared_bias": None if table is None else relative_bias(table, self.embeddings.grid_size, grid),
        }

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Eq. 4 and its alternatives (appendix D.3), from tokens `(B, prefix + N, D)` to `(B, D)`."""
        if self.map_head is not None:
            return self.map_head(x)
        if self.config.pooling == "gap":
            return x[:, self.config.num_prefix_tokens :].mean(dim=1)
        if self.config.pooling == "prefix_mean":
            return x[:, : self.config.num_prefix_tokens].mean(dim=1)
        return x[:, 0]


class HFViTForImageClassification(HFViTPreTrainedModel):
    """The encoder and one linear layer: the head of fine-tuning, or of pre-training above a representation layer."""

    _keys_to_ignore_on_load_unexpected = [r"pooler\.dense\."]
    _has_to_be_used = rf"{HFViTPreTrainedModel._has_to_be_used}|^classifier\."

    def __init__(self, config: HFViTConfig):
        super().__init__(config)
        self.vit = HFViTModel(config)
        self.classifier = (
            with_role(nn.Linear(config.head_width, config.num_labels), "classifier")
            if config.num_labels
            else nn.Identity()
        )
        self.post_init()
        self._freeze_unread_parameters()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """Classify a batch of normalized images `(B, C, H, W)` of any size.

        Args:
            labels: class numbers `(B,)`, or soft labels `(B, K)`, both for softmax cross-entropy; with
                `config.problem_type` set, what transformers' losses of that name expect.

        Returns:
            `logits` `(B, K)`, `loss` if labels are given, hidden states and attentions if requested. Logits of a
            regression are in the unit of its targets.
        """
        if self._reads_first_token_only(kwargs):
            kwargs["tokens"] = 1
        outputs = self.vit(pixel_values, **kwargs)
        logits = self.classifier(self.head_input(outputs))
        if self.config.target_std is not None and self.config.target_mean is not None:
            # float32: bfloat16 has three digits, and a mean may be large compared with its standard deviation
            logits = logits.float()
            logits = logits * logits.new_tensor(self.config.target_std) + logits.new_tensor(self.config.target_mean)
        loss = None
        # without a problem_type transformers' loss would take soft labels for a multi-label problem
        if labels is not None and self.config.problem_type is not None:
            loss = self.loss_function(labels, logits, self.config)
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels.float() if labels.is_floating_point() else labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _freeze_unread_parameters(self) -> None:
        """Freeze parameters that no logit depends on: DistributedDataParallel would wait for their gradients."""
        if self.config.head_input != "pooled" and self.vit.map_head is not None:
            self.vit.map_head.requires_grad_(False)
        if self.config.head_input == "mean_unnormalised":
            self.vit.layernorm.requires_grad_(False)

    def head_input(self, outputs: BaseModelOutputWithPooling) -> torch.Tensor:
        """The classifier's input, from the encoder's outputs, `(B, config.head_width)`."""
        kind, x = self.config.head_input, outputs.last_hidden_state  # (B, prefix + N, D)
        assert x is not None and outputs.pooler_output is not None
        if kind == "pooled":
            return outputs.pooler_output
        if kind == "two_tokens":
            return x[:, :2].flatten(1)  # (B, 2 D)
        mean = x[:, self.config.num_prefix_tokens :].mean(dim=1)  # (B, D)
        return torch.cat([x[:, 0], mean], dim=1) if kind == "token_and_mean" else mean

    def _reads_first_token_only(self, kwargs: dict) -> bool:
        """Whether the last block computes only the token that Eq. 4 reads: 6 % fewer operations for ViT-B.

        It does in training, and in an encoder optimized for inference. Evaluation of the plain network computes all
        tokens: its matmuls then have the same shapes as transformers' ViT, and so the same last bits. A hook on the
        last block sees that one token; request hidden states or attentions to get all.
        """
        may_differ_in_last_bits = self.vit.training or self.vit.optimized
        records = any(
            kwargs.get(name) or getattr(self.config, name) for name in ("output_hidden_states", "output_attentions")
        )
        reads_one_token = self.config.pooling in ("token", "first") and self.config.head_input == "pooled"
        return may_differ_in_last_bits and reads_one_token and not records

    def _change_head(self, requested: HFViTConfig, keep_representation: bool) -> None:
        drops = requested.representation_size is None and self.config.representation_size is not None
        if drops or requested.num_labels != self.config.num_labels:
            self.replace_head(requested.num_labels, requested.id2label, keep_representation and not drops)
        self.config.id2label, self.config.label2id = requested.id2label, requested.label2id
        self._freeze_unread_parameters()  # again: loaded parameters are new ones

    @torch.no_grad()
    def replace_head(
        self, num_labels: int, id2label: dict[int, str] | None = None, keep_representation: bool = False
    ) -> None:
        """Replace the head by a zero-initialized linear layer of the same device and dtype (section 3.2).

        Args:
            num_labels: number of classes; 0 removes the classifier.
            id2label: class names by number, from 0; default LABEL_0, LABEL_1, ...
            keep_representation: keep the dense + tanh layer of pre-training below the head; the paper drops it.

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
        like = self.vit.embeddings.patch_embeddings.projection.weight
        self.classifier = nn.Identity()
        if num_labels:
            head = nn.Linear(self.config.head_width, num_labels, device=like.device, dtype=like.dtype)
            head.weight.zero_()  # section 3.2: fine-tuning starts from equal probabilities
            head.bias.fill_(self.config.head_bias_init)
            self.classifier = with_role(head, "classifier")
        self.config.id2label = {int(index): name for index, name in names.items()}
        self.config.label2id = {name: index for index, name in self.config.id2label.items()}
        # these belong to the labels of the old head
        self.config.label_thresholds = self.config.target_mean = self.config.target_std = None

    def freeze_backbone(self) -> None:
        """Leave only the classifier trainable: a linear probe."""
        self.requires_grad_(False)
        self.classifier.requires_grad_(True)


class HFViTBackbone(BackboneMixin, HFViTPreTrainedModel):
    """Feature maps of chosen blocks, for `AutoBackbone` in detection and segmentation models.

    `config.out_features` or `out_indices` select from "stem" (the embeddings) and "stage1" ... "stageL"; each map is
    the block's patch tokens, after the final LayerNorm if the config has one for tokens.
    """

    _keys_to_ignore_on_load_unexpected = [r"pooler\.dense\.", r"classifier\.", r"map_head\."]

    def __init__(self, config: HFViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.vit = HFViTModel(config)
        self.vit.pooler = self.vit.map_head = None  # feature maps are read, not a pooled vector
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        """`(B, C, H, W)` -> `feature_maps`, a tuple of `(B, D, rows, columns)`."""
        outputs = self.vit(pixel_values, **kwargs)
        rows, columns = self.config.grid_for(tuple(pixel_values.shape[-2:]))
        maps = []
        for stage, tokens in zip(self.stage_names, outputs.hidden_states):
            if stage in self.out_features:
                if self.config.final_norm == "tokens":
                    tokens = self.vit.layernorm(tokens)
                patches = tokens[:, self.config.num_prefix_tokens :].transpose(1, 2)  # (B, D, N)
                maps.append(patches.unflatten(2, (rows, columns)))  # (B, D, rows, columns)
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class HFViTForMaskedPatchPrediction(HFViTPreTrainedModel):
    """The paper's self-supervision (section 4.6, appendix B.1.2): mean colors of corrupted patches, 3 bits a channel.

    Half of the patches are corrupted: of these, 80 % become a learned [mask] embedding, 10 % the embedding of another
    patch of the batch, and 10 % stay. Each is classified into one of 8^C colors.
    """

    corrupted, masked, swapped = 0.5, 0.8, 0.1
    levels = 8

    def __init__(self, config: HFViTConfig):
        super().__init__(config)
        if config.patch_dropout_rate:
            raise ValueError("masked patch prediction answers for every patch: set patch_dropout_rate=0")
        self.vit = HFViTModel(config)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        with_role(self, "tokens")
        self.colours = nn.Linear(config.hidden_size, self.levels**config.num_channels)  # the name in saved weights
        self.post_init()

    def patch_colors(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Classes of the patches' mean colors, `(B, C, H, W)` in [-1, 1] -> `(B, N)`.

        The class is a number of C digits to base 8, channel 0 first: 3 bits a channel as in the paper.
        """
        rows, columns = self.config.grid_for(tuple(pixel_values.shape[-2:]))
        down, across = self.config.total_stride
        pixels = pixel_values[..., : rows * down, : columns * across].float()  # without the cut remainder
        mean = F.adaptive_avg_pool2d(pixels, (rows, columns))  # (B, C, rows, columns)
        level = ((mean + 1) / 2 * self.levels).long().clamp(0, self.levels - 1)  # 1.0 would be level 8
        weights = self.levels ** torch.arange(pixels.shape[1] - 1, -1, -1, device=pixels.device)
        return (level * weights[:, None, None]).sum(1).flatten(1)  # (B, N)

    def draw_corruption(self, batch: int, patches: int, device: torch.device) -> torch.Tensor:
        """`(B, N)` of 0 (not predicted), 1 (masked), 2 (swapped), 3 (unchanged, but predicted); torch's generator."""
        count = round(patches * self.corrupted)
        # ranks below `count`: exactly half of each image; with a threshold on the numbers it would vary
        is_corrupted = torch.rand(batch, patches, device=device).argsort(dim=1).argsort(dim=1) < count
        draw = torch.rand(batch, patches, device=device)
        kind = 1 + (draw >= self.masked).long() + (draw >= self.masked + self.swapped).long()
        return kind * is_corrupted

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        corruption: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Predict the colors of corrupted patches.

        Args:
            pixel_values: `(B, C, H, W)`, normalized to [-1, 1] (mean and standard deviation 0.5).
            corruption: `(B, N)` as from `draw_corruption`; drawn if left out.
            labels: `(B, N)` color classes; computed from the pixels if left out.

        Returns:
            `loss` over the corrupted patches and `logits` `(B, N, 8^C)`.
        """
        batch = pixel_values.shape[0]
        rows, columns = self.config.grid_for(tuple(pixel_values.shape[-2:]))
        if corruption is None:
            corruption = self.draw_corruption(batch, rows * columns, pixel_values.device)
        if labels is None:
            labels = self.patch_colors(pixel_values)

        def corrupt(x: torch.Tensor) -> torch.Tensor:
            # of the batch, not of the image: the paper's "random other patch embedding"
            flat = x.flatten(0, 1)  # (B * N, D)
            others = flat[torch.randint(max(len(flat), 1), (len(flat),), device=x.device)].view_as(x)
            x = torch.where((corruption == 1)[..., None], self.mask_token.to(x.dtype), x)
            return torch.where((corruption == 2)[..., None], others, x)  # (B, N, D)

        outputs = self.vit(pixel_values, corrupt=corrupt, **kwargs)
        logits = self.colours(outputs.last_hidden_state[:, self.config.num_prefix_tokens :])  # (B, N, 8^C)
        targets = labels.masked_fill(corruption == 0, -100)  # the loss is over corrupted patches only
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["HFViTBackbone", "HFViTForImageClassification", "HFViTForMaskedPatchPrediction", "HFViTModel"]
