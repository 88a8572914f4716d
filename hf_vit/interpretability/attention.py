"""Compute attention maps, rollout, distances, filters, positions and token norms of a model; `plots.py` draws them.

All functions read the forward pass through hooks on the blocks: the attention backend is not changed, graphs of
`torch.compile` are bypassed for the analyzed call, and the output of a hook is reduced before the next block runs, so
that the weights of at most one block are in memory. ViT-L/16 at 512 px, float32, one image on a CPU, peaks at 1275 MiB
in a forward pass, 1393 MiB in `attention_maps` of one block (1.09 times; 1.17 with two images), 1292 MiB in
`class_attention` and 1418 MiB in `rollout_map` (resident memory beyond the interpreter's, torch 2.13). Images may have
any size.

    B batch   k heads   N tokens (class, registers, patches)   rows, columns: the grid of patch tokens

Not transformers' `output_attentions`: it stores the weights of all blocks, and fast backends do not return them.

Sources: paper section 4.5 and appendices D.7, D.8 (arXiv:2010.11929); Abnar and Zuidema, attention rollout
(arXiv:2005.00928); Darcet et al., token norms (arXiv:2309.16588). Explanations of one class are in `relevance.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import HFViTError
from ..modeling.modeling_hf_vit import attention_weights
from ..modeling.resnet_stem import StdConv2d


HeadFusion = Literal["mean", "max", "min"]


# -- the model: unwrapped, in eval mode, with hooks -----------------------------------------------------------------


def uncompiled(model: nn.Module) -> Any:
    """The model inside `torch.compile`'s wrapper.

    Raises:
        HFViTError: a network without attention blocks, such as a ResNet.
    """
    inside: Any = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model
    if getattr(getattr(inside, "config", None), "model_type", None) != "hf_vit":
        raise HFViTError(
            f"{type(inside).__name__} has no attention that could be shown: these functions read hf_vit's ViTs and "
            "hybrids (perturbation_curves works for every classifier)"
        )
    if not len(inside.base_model.layers):
        raise HFViTError("the model has no transformer blocks (num_hidden_layers=0), so there is no attention to show")
    return inside


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watched(model: nn.Module) -> Iterator[Any]:
    """The model inside `torch.compile`'s wrapper, in eval mode and run eagerly; restored afterwards."""
    inside = uncompiled(model)
    with evaluating(inside), torch.compiler.set_stance("force_eager"):
        yield inside


def layer_numbers(model: nn.Module, layers: Sequence[int] | None) -> dict[int, int]:
    """The block number, from 0, of each index; None means all blocks.

    Raises:
        HFViTError: an index that does not exist, or an empty list.
    """
    depth = len(uncompiled(model).base_model.layers)
    indices = range(depth) if layers is None else layers
    for index in indices:
        if not -depth <= index < depth:
            raise HFViTError(
                f"layer {index} does not exist: the model has {depth}, 0 to {depth - 1}, or -1 for the last"
            )
    if not indices:
        raise HFViTError("no layers asked for: give at least one, for example layers=[-1]")
    return {index: index % depth for index in indices}


def head_numbers(model: nn.Module, heads: Sequence[int] | None) -> list[int]:
    """The numbers, from 0, of the requested heads; None means all.

    Raises:
        HFViTError: an index that does not exist, or an empty list.
    """
    count = uncompiled(model).config.num_attention_heads
    indices = range(count) if heads is None else heads
    for index in indices:
        if not -count <= index < count:
            raise HFViTError(f"head {index} does not exist: the model has {count}, 0 to {count - 1}")
    if not indices:
        raise HFViTError("no heads asked for: give at least one, for example heads=[0]")
    return [index % count for index in indices]


@torch.no_grad()
def watch_attention(
    model: nn.Module,
    pixel_values: torch.Tensor,
    see: Callable[[int, torch.Tensor, torch.Tensor, float, torch.Tensor | None], None],
    layers: Sequence[int] | None = None,
) -> Any:
    """Run the encoder and call `see(number, q, k, scaling, bias)` for each chosen block.

    Queries and keys are `(B, heads, N, d)`; `bias` `(1, heads, N, N)`, or None, is added to the scores.

    Returns:
        the encoder's output.
    """
    with watched(model) as inside:
        blocks = inside.base_model.layers

        def make_hook(number: int) -> Callable:
            def hook(attention: Any, args: tuple, kwargs: dict, output: tuple) -> None:
                positions = {name: kwargs[name] for name in ("rotary", "grid", "shared_bias") if name in kwargs}
                query, key = attention.queries_and_keys(args[0], **positions)
                bias = attention.score_bias(**positions) if positions else None
                see(number, query, key, attention.scaling, bias)

            return hook

        numbers = set(layer_numbers(inside, layers).values())
        hooks = [
            blocks[number].attention.register_forward_hook(make_hook(number), with_kwargs=True) for number in numbers
        ]
        try:
            return inside.base_model(_batch(pixel_values))
        finally:
            for hook in hooks:
                hook.remove()


def _batch(pixel_values: torch.Tensor) -> torch.Tensor:
    if pixel_values.ndim != 4:
        raise HFViTError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: expected (batch, channels, height, width)"
        )
    return pixel_values


def grid_of(model: nn.Module, pixel_values: torch.Tensor) -> tuple[int, int]:
    """(rows, columns) of the patch tokens of these images."""
    return uncompiled(model).config.grid_for(tuple(pixel_values.shape[-2:]))


def on_grid(model: nn.Module, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Values of all tokens `(..., N)` -> of the patches `(..., rows, columns)`, without class and register tokens.

    Raises:
        HFViTError: patches were merged.
    """
    patches = tokens[..., uncompiled(model).config.num_prefix_tokens :]
    if patches.shape[-1] != grid[0] * grid[1]:
        raise HFViTError(
            f"{patches.shape[-1]} of {grid[0]} x {grid[1]} patch tokens are left, the others were merged: call "
            "merge_tokens(model, r=0) first"
        )
    return patches.unflatten(-1, grid)


# -- attention ------------------------------------------------------------------------------------------------------


def attention_maps(
    model: nn.Module, pixel_values: torch.Tensor, layers: Sequence[int] = (-1,), heads: Sequence[int] | None = None
) -> dict[int, torch.Tensor]:
    """Attention weights of chosen blocks and heads.

    Args:
        pixel_values: normalized images `(B, C, H, W)`. layers: blocks; negative ones count from the last.
        heads: None for all.

    Returns:
        for each index of `layers`, `(B, heads, N queries, N keys)` in float32; rows sum to one.

    Raises:
        HFViTError: a layer or head that does not exist, or a model without attention.
    """
    numbers, chosen = layer_numbers(model, layers), head_numbers(model, heads)
    maps: dict[int, torch.Tensor] = {}

    def see(number: int, query: torch.Tensor, key: torch.Tensor, scaling: float, bias: torch.Tensor | None) -> None:
        part = None if bias is None else bias[:, chosen]
        maps[number] = attention_weights(query[:, chosen], key[:, chosen], scaling, part).float()

    watch_attention(model, pixel_values, see, layers)
    return {index: maps[number] for index, number in numbers.items()}


def class_attention(
    model: nn.Module, pixel_values: torch.Tensor, layers: Sequence[int] = (-1,), heads: Sequence[int] | None = None
) -> dict[int, torch.Tensor]:
    """Attention of the class token to the patches, `(B, heads, rows, columns)` for each index of `layers`.

    Without a class token: the mean of all patches' attention (`"gap"`, `"map"`), or that of the first (`"first"`).
    Attention to class and register tokens is left out, so a map sums to at most one.
    """
    numbers, chosen = layer_numbers(model, layers), head_numbers(model, heads)
    config, grid = uncompiled(model).config, grid_of(model, pixel_values)
    one_row = config.use_class_token or config.pooling == "first"
    maps: dict[int, torch.Tensor] = {}

    rows = slice(0, 1) if one_row else slice(config.num_prefix_tokens, None)

    def see(number: int, query: torch.Tensor, key: torch.Tensor, scaling: float, bias: torch.Tensor | None) -> None:
        part = None if bias is None else bias[:, chosen, rows]
        weights = attention_weights(query[:, chosen, rows], key[:, chosen], scaling, part).float()
        weights = weights.mean(dim=2)  # (B, heads, N)
        maps[number] = on_grid(model, weights, grid)

    watch_attention(model, pixel_values, see, layers)
    return {index: maps[number] for index, number in numbers.items()}


@torch.no_grad()
def probe_attention(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Attention of the pooling probe to the patches, `(B, heads, rows, columns)`; HFViTError without a probe."""
    with watched(model) as inside:
        if inside.base_model.map_head is None:
            raise HFViTError(f'pooling="{inside.config.pooling}" has no probe: class_attention shows what is read')
        weights = readout(inside, inside.base_model(_batch(pixel_values)).last_hidden_state)  # (B, heads, N)
    return on_grid(model, weights, grid_of(model, pixel_values))


def readout(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Weight of each final token in the head's input, from the encoder's `last_hidden_state` `(B, N, D)`.

    Returns:
        `(B, heads or 1, N)`, rows sum to one: one token for `"token"` and `"first"`, all patches equally for `"gap"`,
        the probe's attention for `"map"`; one half each if the classifier reads two concatenated vectors.
    """
    inside = uncompiled(model)
    head, (batch, count, _), config = inside.base_model.map_head, tokens.shape, inside.config
    prefix, reads = config.num_prefix_tokens, getattr(config, "head_input", "pooled")
    if head is not None and reads == "pooled":
        first = getattr(head, "first", 0)  # tokens before it are not pooled
        query, key = head.attention.queries_and_keys(tokens[:, first:], head.probe.expand(batch, -1, -1))
        weights = attention_weights(query, key, head.attention.scaling).float()[:, :, 0]  # (B, heads, N - first)
        return nn.functional.pad(weights, (first, 0))
    weights = torch.zeros(batch, 1, count, device=tokens.device)
    if reads in ("mean", "mean_unnormalised") or (reads == "pooled" and config.pooling == "gap"):
        weights[..., prefix:] = 1 / (count - prefix)
    elif reads == "token_and_mean":
        weights[..., prefix:] = 0.5 / (count - prefix)
        weights[..., 0] = 0.5
    elif reads == "two_tokens":
        weights[..., :2] = 0.5
    elif config.pooling == "prefix_mean":
        weights[..., :prefix] = 1 / prefix
    else:
        weights[..., 0] = 1
    return weights


def fuse_heads(weights: torch.Tensor, fusion: HeadFusion) -> torch.Tensor:
    """`(B, heads, N, N)` -> `(B, N, N)`."""
    if fusion == "mean":
        return weights.mean(dim=1)
    if fusion not in ("max", "min"):
        raise HFViTError(f"fusion='{fusion}' is not one of mean, max, min")
    return weights.amax(dim=1) if fusion == "max" else weights.amin(dim=1)


def with_residual(fused: torch.Tensor) -> torch.Tensor:
    """One step of rollout: add the skip connection and divide every row by its sum; `(..., N, N)`."""
    step = fused + torch.eye(fused.shape[-1], device=fused.device)
    return step / step.sum(dim=-1, keepdim=True)


def rollout(model: nn.Module, pixel_values: torch.Tensor, fusion: HeadFusion = "mean") -> torch.Tensor:
    """Attention rollout (arXiv:2005.00928): the product over blocks of (A + I), each row divided by its sum.

    For the mean over heads this is (mean A + I) / 2, as in the paper's appendix D.7. Widely copied code divides by
    `a.sum(-1)` without keepdim, which scales columns: its rows do not sum to one.

    Returns:
        `(B, N, N)`: weight of each input token (column) in each output token (row); rows sum to one.
    """
    return _rollout(model, pixel_values, fusion)[0]


@torch.no_grad()
def rollout_map(model: nn.Module, pixel_values: torch.Tensor, fusion: HeadFusion = "mean") -> torch.Tensor:
    """Rollout from the pooled vector to the patches, for every pooling; `(B, rows, columns)`."""
    rolled, tokens = _rollout(model, pixel_values, fusion)
    row = (readout(model, tokens).mean(dim=1, keepdim=True) @ rolled)[:, 0]  # (B, N)
    return on_grid(model, row, grid_of(model, pixel_values))


def _rollout(model: nn.Module, pixel_values: torch.Tensor, fusion: HeadFusion) -> tuple[torch.Tensor, torch.Tensor]:
    rolled: list[torch.Tensor] = []

    def see(number: int, query: torch.Tensor, key: torch.Tensor, scaling: float, bias: torch.Tensor | None) -> None:
        step = with_residual(fuse_heads(attention_weights(query, key, scaling, bias).float(), fusion))
        rolled[:] = [step @ rolled[0] if rolled else step]

    output = watch_attention(model, pixel_values, see)
    return rolled[0], output.last_hidden_state


# -- distance -------------------------------------------------------------------------------------------------------


def attention_distance(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Mean distance over which each head attends, in pixels of the model's input (paper, Figure 7 right).

    The mean over images and querying patches i of sum_j a_ij |p_i - p_j|, where p are the patches' centers and a is
    the attention among patches, normalized to sum one. A hybrid's patches are its total stride apart.

    Returns:
        `(layers, heads)`.
    """
    inside, (rows, columns) = uncompiled(model), grid_of(model, pixel_values)
    down, across = inside.config.total_stride
    prefix = inside.config.num_prefix_tokens
    centers = torch.cartesian_prod(torch.arange(rows) * float(down), torch.arange(columns) * float(across))
    between = torch.cdist(centers, centers, compute_mode="donot_use_mm_for_euclid_dist").to(
        pixel_values.device
    )  # (N, N)
    distances = torch.zeros(len(inside.base_model.layers), inside.config.num_attention_heads)

    def see(number: int, query: torch.Tensor, key: torch.Tensor, scaling: float, bias: torch.Tensor | None) -> None:
        part = None if bias is None else bias[:, :, prefix:, prefix:]
        weights = attention_weights(query[:, :, prefix:], key[:, :, prefix:], scaling, part).float()  # rows of sum one
        distances[number] = (weights * between).sum(dim=-1).mean(dim=(0, 2)).cpu()

    watch_attention(model, pixel_values, see)
    return distances


# -- parameters -----------------------------------------------------------------------------------------------------


@dataclass
class Filters:
    """Principal components `(n, C, height, width)` in [0, 1] each, and the fraction of variance that each explains."""

    components: torch.Tensor
    explained: torch.Tensor


@torch.no_grad()
def embedding_filters(model: nn.Module, count: int = 28) -> Filters:
    """First principal components of the embedding filters (paper, Figure 7 left).

    The D filters of a ViT's patch projection, or of a hybrid's first convolution, standardized. Components are scaled
    to [0, 1], with fixed signs; there are at most as many as filters.
    """
    patches = uncompiled(model).base_model.embeddings.patch_embeddings
    root = None if patches.backbone is None else patches.backbone.conv_root
    weight = patches.projection.weight if root is None else StdConv2d.standardized_weight(root)
    flat = weight.float().cpu().flatten(1)  # (D, C h w)
    components, explained = principal_components(flat, min(count, *flat.shape))
    low, high = components.amin(dim=1, keepdim=True), components.amax(dim=1, keepdim=True)
    scaled = (components - low) / (high - low).clamp_min(1e-12)
    return Filters(scaled.unflatten(1, weight.shape[1:]), explained)


def principal_components(samples: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components of `(samples, features)`: `(count, features)` and their fractions of the variance.

    The sign of each is such that its largest entry is positive: an SVD leaves it open.
    """
    centered = samples.double() - samples.double().mean(dim=0)
    _, spread, directions = torch.linalg.svd(centered, full_matrices=False)
    directions, fractions = directions[:count], spread.square() / spread.square().sum().clamp_min(1e-300)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return (directions * largest.sign()).float(), fractions[:count].float()


@torch.no_grad()
def position_similarity(model: nn.Module) -> torch.Tensor:
    """Cosine similarity of every patch's position embedding with all others (paper, Figure 7 center).

    Returns:
        `(rows, columns, rows, columns)`. Raises HFViTError for a model without positions.
    """
    inside = uncompiled(model)
    rows, columns = inside.config.grid_size
    table = inside.base_model.embeddings.patch_positions((rows, columns))
    if table is None:
        raise HFViTError('position_embedding_type="none": the model has no position embeddings to compare')
    unit = nn.functional.normalize(table[0].float(), dim=-1)  # (N, D)
    return (unit @ unit.T).reshape(rows, columns, rows, columns)


# -- tokens ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_states(
    model: nn.Module, pixel_values: torch.Tensor, layers: Sequence[int] = (-1,), normalized: bool = False
) -> dict[int, torch.Tensor]:
    """Patch tokens after chosen blocks, `(B, rows, columns, D)`; `normalized` applies the model's final LayerNorm."""
    numbers, states = layer_numbers(model, layers), {}
    with watched(model) as inside:
        encoder, grid = inside.base_model, grid_of(inside, pixel_values)

        def make_hook(number: int) -> Callable:
            def hook(block: nn.Module, args: tuple, output: torch.Tensor) -> None:
                states[number] = output

            return hook

        hooks = [encoder.layers[number].register_forward_hook(make_hook(number)) for number in set(numbers.values())]
        try:
            encoder(_batch(pixel_values))
        finally:
            for hook in hooks:
                hook.remove()
        final: Any = encoder.layernorm if normalized else nn.Identity()
        return {
            index: on_grid(inside, final(states[number]).float().transpose(1, 2), grid).permute(0, 2, 3, 1)
            for index, number in numbers.items()
        }


def feature_colors(features: torch.Tensor) -> torch.Tensor:
    """Three principal components of patch features as red, green and blue.

    `(B, rows, columns, D)` -> `(B, rows, columns, 3)` in [0, 1]. Components are common to the batch, so equal colors
    mean equal features across images; each channel is clipped at the 1st and 99th percentile.
    """
    flat = features.float().flatten(0, -2).cpu()  # (B rows columns, D)
    directions, _ = principal_components(flat, min(3, *flat.shape))
    scores = (flat - flat.mean(dim=0)) @ directions.T
    scores = nn.functional.pad(scores, (0, 3 - scores.shape[1]))  # fewer than three samples or features
    low, high = scores.quantile(0.01, dim=0), scores.quantile(0.99, dim=0)
    return ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).unflatten(0, features.shape[:-1])


def token_norms(
    model: nn.Module, pixel_values: torch.Tensor, layers: Sequence[int] = (-1,)
) -> dict[int, torch.Tensor]:
    """Length of every patch token after chosen blocks, `(B, rows, columns)`.

    A few tokens much longer than the others are the artifacts that register tokens avoid (arXiv:2309.16588).
    """
    return {index: states.norm(dim=-1) for index, states in token_states(model, pixel_values, layers).items()}
