"""Token merging (ToMe, arXiv:2210.09461): after the attention of each block, the r most similar pairs of tokens merge.

For inference without training: `merge_tokens(model, r=8)`. Class and register tokens (and the token that pooling
"first" reads) are never merged. Similarity is that of keys, averaged over heads; a token of s merged patches counts s
times in attention and pooling. Works with `optimize_for_inference`, before or after it. Not the authors' `tome`
package: it replaces the forward pass of timm's classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import HFViTError
from .layers import OptimizedLayer
from .wrapper import has_forward_hooks, plain_module, wrap


# fields beyond the plain ViT's that merging supports: they do not depend on a token's position in the grid
MERGEABLE = {"pre_layernorm", "patch_bias", "patch_norm", "final_norm", "num_class_tokens", "pooling"}


def merge_tokens(model: nn.Module, r: int | Sequence[int], proportional: bool = True) -> nn.Module:
    """Merge r pairs of tokens in every block of a model, in place; `r=0` restores the plain model. Returns the model.

    In training mode nothing is merged. `last_hidden_state` has only the remaining tokens.

    Args:
        model: `HFViTForImageClassification` or `HFViTModel`.
        r: pairs merged in each block, or a number for each block; at most half of the patch tokens.
        proportional: whether a token counts in attention and pooling as often as it has patches (the paper's choice).

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
    for index, count in enumerate(pairs):  # also blocks of r = 0, whose attention weighs by the sizes
        merging = Merging(count, state, first=index == 0) if any(pairs) else None
        encoder.layers[index] = with_merging(encoder.layers[index], merging)
    # only then may the last block compute the one token that a classifier reads
    encoder.optimized = not any(pairs) and any(isinstance(layer, OptimizedLayer) for layer in encoder.layers)
    encoder.__dict__.pop("pool", None)  # the class's own method again
    if any(pairs) and encoder.config.pooling in ("gap", "map"):
        encoder.pool = MergedPool(encoder, state)
    return model


def with_merging(layer: nn.Module, merging: "Merging | None") -> nn.Module:
    """A plain or optimized block with this merging, or, for None, without merging."""
    if not isinstance(layer, OptimizedLayer):
        return layer if merging is None else wrap(OptimizedLayer, layer, merging=merging, fast=False)
    if merging is None and not layer.fast:
        return plain_module(layer)
    return wrap(layer.kind, layer.plain, **(layer.settings | {"merging": merging}))


class MergeState:
    """State of a forward pass: the number of patches in each token, `sizes` `(B, N)`; None: one each."""

    def __init__(self, config, proportional: bool):
        self.protected = max(config.num_prefix_tokens, int(config.pooling == "first"))
        self.proportional = proportional
        self.sizes: torch.Tensor | None = None

    def bias(self, like: torch.Tensor) -> torch.Tensor | None:
        """log s, added to the scores of Eq. 6: `(B, 1, 1, N)`; None while no tokens are merged.

        softmax then weighs a token of s patches as s tokens with the same key.
        """
        if self.sizes is None or not self.proportional:
            return None
        return self.sizes.log().to(like.dtype)[:, None, None]


class Merging:
    """The step of an `OptimizedLayer` between Eqs. 2 and 3: merge r pairs of tokens by the keys of its attention."""

    def __init__(self, r: int, state: MergeState, first: bool):
        self.r, self.state, self.first = r, state, first

    def begin(self, layer: Any, kwargs: dict) -> None:
        """Called before a block; the first one resets the sizes. Raises HFViTError if attention maps are requested."""
        if self.first:
            self.state.sizes = None
        attention = layer.plain.attention
        requested = kwargs.get("output_attentions") or attention.config.output_attentions
        if requested or has_forward_hooks(attention):
            raise HFViTError("attention maps are of unmerged tokens: call merge_tokens(model, r=0) first")

    def bias(self, like: torch.Tensor) -> torch.Tensor | None:
        return self.state.bias(like)

    def __call__(self, x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, N, D)` and keys `(B, k, N, d)` -> `(B, N - r, D)`."""
        return merge(x, key.mean(dim=1), self.r, self.state)


class MergedPool:
    """Replaces `HFViTModel.pool` for the poolings that read all tokens: weighted by the tokens' sizes."""

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
    """Average the r most similar pairs of tokens, weighted by their sizes: `(B, N, D)` -> `(B, N - r, D)`.

    The paper's bipartite matching (section 3): each token of even index is paired with the most similar one of odd
    index, and the r most similar pairs merge. Order of the result: protected tokens, remaining even ones, odd ones.
    """
    batch, tokens, _ = x.shape
    free = tokens - state.protected
    r = min(r, free // 2)
    if r == 0:
        return x
    sizes = x.new_ones(batch, tokens, dtype=torch.float32) if state.sizes is None else state.sizes
    protected, protected_sizes = x[:, : state.protected], sizes[:, : state.protected]
    keys = F.normalize(keys[:, state.protected :], dim=-1)  # cosine similarity
    similarity, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=-1)  # (B, ceil(free / 2)) each
    order = similarity.argsort(dim=-1, descending=True)
    source, unmerged = order[:, :r], order[:, r:].sort(dim=-1).values  # indices of even tokens
    target = partner.gather(1, source)  # (B, r), indices of odd tokens

    def add_pairs(values: torch.Tensor) -> torch.Tensor:
        """`(B, free, width)` -> `(B, free - r, width)`: the sums of merged pairs, other values unchanged."""
        even, odd = values[:, ::2], values[:, 1::2]
        width = values.shape[2]
        moved = even.gather(1, source[..., None].expand(-1, -1, width))
        remaining = even.gather(1, unmerged[..., None].expand(-1, -1, width))
        return torch.cat([remaining, odd.scatter_add(1, target[..., None].expand(-1, -1, width), moved)], dim=1)

    weights = sizes[:, state.protected :, None]
    merged_sizes = add_pairs(weights)
    merged = add_pairs(x[:, state.protected :] * weights.to(x.dtype)) / merged_sizes.to(x.dtype)
    state.sizes = torch.cat([protected_sizes, merged_sizes[..., 0]], dim=1)
    return torch.cat([protected, merged], dim=1)  # (B, N - r, D)
