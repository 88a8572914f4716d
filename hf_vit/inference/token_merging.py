"""Token merging (ToMe, arXiv:2210.09461): after the attention of each block, the r most alike patch tokens become one.

For inference, without training: `merge_tokens(model, r=8)`. Class and register tokens (and the token that pooling
"first" reads) are never merged. Keys, averaged over heads, say what is alike; a token that stands for s patches counts
s times in attention and pooling. Works with models optimized by `optimize_for_inference`, before or after. Not the
authors' `tome` package: it replaces the forward pass of timm's classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import HFViTError
from .layers import OptimizedLayer
from .wrapper import has_forward_hooks, plain_module, wrap


# fields beyond the plain ViT's that merging does not touch
MERGEABLE = {"pre_layernorm", "patch_bias", "patch_norm", "final_norm", "num_class_tokens", "pooling"}


def merge_tokens(model: nn.Module, r: int | Sequence[int], proportional: bool = True) -> nn.Module:
    """Let every block of a model merge r pairs of tokens, in place. Returns the model; `r=0` is the plain model again.

    In training mode nothing is merged. `last_hidden_state` has as many tokens as are left.

    Args:
        model: `HFViTForImageClassification` or `HFViTModel`.
        r: pairs merged in each block, or a number for each block; no more than half of the patch tokens are.
        proportional: attention and pooling count a merged token as often as it has patches (the paper's choice).

    Raises:
        HFViTError: another kind of model, a negative r, or not one number for each block.
    """
    if type(model).__name__ not in ("HFViTModel", "HFViTForImageClassification"):  # also those loaded with their code
        raise HFViTError(f"tokens of a {type(model).__name__} cannot be merged: it answers for every patch")
    encoder: Any = model.encoder
    unsupported = encoder.config.family_fields.keys() - MERGEABLE
    if unsupported:
        raise HFViTError(f"tokens cannot be merged in a model with {', '.join(sorted(unsupported))}")
    pairs = [r] * len(encoder.layers) if isinstance(r, int) else list(r)
    if len(pairs) != len(encoder.layers) or any(not isinstance(count, int) or count < 0 for count in pairs):
        raise HFViTError(f"r={r}: give one number from 0, or {len(encoder.layers)} of them, one for each block")
    state = MergeState(encoder.config, proportional)
    for index, count in enumerate(pairs):
        merging = Merging(count, state, first=index == 0) if any(pairs) else None
        encoder.layers[index] = with_merging(encoder.layers[index], merging)
    encoder.optimized = not any(pairs) and any(isinstance(layer, OptimizedLayer) for layer in encoder.layers)
    encoder.__dict__.pop("pool", None)
    if any(pairs) and encoder.config.pooling in ("gap", "map"):
        encoder.pool = MergedPool(encoder, state)
    return model


def with_merging(layer: nn.Module, merging: "Merging | None") -> nn.Module:
    """A block, plain or optimized, that merges tokens in this way; None: the block without merging."""
    if not isinstance(layer, OptimizedLayer):
        return layer if merging is None else wrap(OptimizedLayer, layer, merging=merging, fast=False)
    if merging is None and not layer.fast:
        return plain_module(layer)
    return wrap(layer.kind, layer.plain, **(layer.settings | {"merging": merging}))


class MergeState:
    """What the blocks of one forward pass hand on: for how many patches each token stands, `(B, N)`; None for one."""

    def __init__(self, config, proportional: bool):
        self.protected = max(config.num_prefix_tokens, int(config.pooling == "first"))
        self.proportional = proportional
        self.sizes: torch.Tensor | None = None

    def bias(self, like: torch.Tensor) -> torch.Tensor | None:
        """log s, added to the scores of Eq. 6: `(B, 1, 1, N)`, or None where every token stands for itself."""
        if self.sizes is None or not self.proportional:
            return None
        return self.sizes.log().to(like.dtype)[:, None, None]


class Merging:
    """What an `OptimizedLayer` does between Eq. 2 and Eq. 3: merge r pairs of tokens by the keys of its attention."""

    def __init__(self, r: int, state: MergeState, first: bool):
        self.r, self.state, self.first = r, state, first

    def begin(self, layer: Any, kwargs: dict) -> None:
        """Before a block: the first one starts with single patches. Raises HFViTError where maps are asked for."""
        if self.first:
            self.state.sizes = None
        attention = layer.plain.attention
        asks = kwargs.get("output_attentions") or attention.config.output_attentions
        if asks or has_forward_hooks(attention):
            raise HFViTError("attention maps are of unmerged tokens: call merge_tokens(model, r=0) first")

    def bias(self, like: torch.Tensor) -> torch.Tensor | None:
        return self.state.bias(like)

    def __call__(self, x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, N, D)` and keys `(B, k, N, d)` -> `(B, N - r, D)`."""
        return merge(x, key.mean(dim=1), self.r, self.state)


class MergedPool:
    """Stands before `HFViTModel.pool` for the poolings that read all tokens."""

    def __init__(self, encoder: nn.Module, state: MergeState):
        self.encoder: Any = encoder
        self.state = state

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        encoder, bias, sizes = self.encoder, self.state.bias(x), self.state.sizes
        if bias is None or sizes is None:
            return type(encoder).pool(encoder, x)
        if encoder.map_head is None:
            weights = sizes[:, encoder.config.num_prefix_tokens :, None].to(x.dtype)
            return (x[:, encoder.config.num_prefix_tokens :] * weights).sum(1) / weights.sum(1)
        head = encoder.map_head
        query, key = head.attention.queries_and_keys(x, head.probe.expand(len(x), -1, -1))
        value = head.attention._heads(head.attention.v_proj(x))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=head.attention.scaling)
        pooled = head.attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]


def merge(x: torch.Tensor, keys: torch.Tensor, r: int, state: MergeState) -> torch.Tensor:
    """Average the r most alike pairs of tokens, weighted by what they stand for: `(B, N, D)` -> `(B, N - r, D)`.

    The paper's bipartite matching: every second token looks for its nearest among the others, and the r nearest pairs
    merge. Order: protected tokens, those left of the first half in their order, the second half.
    """
    batch, tokens, _ = x.shape
    free = tokens - state.protected
    r = min(r, free // 2)
    if r == 0:
        return x
    sizes = x.new_ones(batch, tokens, dtype=torch.float32) if state.sizes is None else state.sizes
    protected, kept_sizes = x[:, : state.protected], sizes[:, : state.protected]
    keys = F.normalize(keys[:, state.protected :], dim=-1)
    nearness, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=-1)  # (B, ceil(free / 2)) each
    order = nearness.argsort(dim=-1, descending=True)
    leaving, staying = order[:, :r], order[:, r:].sort(dim=-1).values
    target = partner.gather(1, leaving)  # (B, r), among the second half

    def halves(values: torch.Tensor) -> torch.Tensor:
        """`(B, free, width)` -> `(B, free - r, width)`: sums where tokens merge."""
        first, second = values[:, ::2], values[:, 1::2]
        wide = values.shape[2]
        moved = first.gather(1, leaving[..., None].expand(-1, -1, wide))
        rest = first.gather(1, staying[..., None].expand(-1, -1, wide))
        return torch.cat([rest, second.scatter_add(1, target[..., None].expand(-1, -1, wide), moved)], dim=1)

    weights = sizes[:, state.protected :, None]
    merged_sizes = halves(weights)
    merged = halves(x[:, state.protected :] * weights.to(x.dtype)) / merged_sizes.to(x.dtype)
    state.sizes = torch.cat([kept_sizes, merged_sizes[..., 0]], dim=1)
    return torch.cat([protected, merged], dim=1)
