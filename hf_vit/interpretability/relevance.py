"""Which patches support a class: explanations from attention and its gradient, for every pooling.

Backpropagation goes one block at a time, each recomputed from its stored input, so that attention weights and
gradients of only one block are in memory (ViT-L/16 at 512 px: 1.46 times a forward pass). bf16 and fp16 models are
computed in float32, where small gradients do not underflow. The model's attention backend is restored afterwards.

Neither captum nor pytorch-grad-cam has these methods; their authors' code stores weights and gradients of all blocks.

Sources: Chefer, Gur and Wolf, generic attention explainability (arXiv:2103.15679, equations 5 and 6, self-attention);
gradient-weighted rollout as in jacobgil/vit-explain, with rows divided by their own sums.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..errors import HFViTError
from .attention import (
    class_attention,
    grid_of,
    on_grid,
    probe_attention,
    readout,
    rollout_map,
    uncompiled,
    watched,
    with_residual,
)


METHODS = ("attention", "rollout", "gradient_rollout", "relevance")
Target = int | torch.Tensor | None


def explain(
    model: nn.Module, pixel_values: torch.Tensor, method: str = "relevance", target: Target = None
) -> torch.Tensor:
    """Importance of each patch, `(B, rows, columns)`, not negative.

    Args:
        pixel_values: normalized images `(B, C, H, W)`.
        method: `"attention"` of the class token in the last block, mean over heads (for pooling `"map"` the probe's)
            and `"rollout"` do not depend on the class; `"gradient_rollout"` and `"relevance"` (Chefer) do.
        target: class number, or one for each image `(B,)`; None for the most probable.

    Raises:
        HFViTError: unknown method, no such class, or a method that needs a classifier for a model without one.
    """
    if method == "attention":
        if uncompiled(model).config.pooling == "map":
            return probe_attention(model, pixel_values).mean(dim=1)
        return class_attention(model, pixel_values)[-1].mean(dim=1)
    if method == "rollout":
        return rollout_map(model, pixel_values)
    if method not in METHODS:
        raise HFViTError(f"method='{method}' is not one of {', '.join(METHODS)}")
    step = _gradient_step if method == "gradient_rollout" else _relevance_step
    walk = _backwards(model, pixel_values, target)
    row = next(walk)  # (B, 1, N): one row is enough, and a vector by matrix product costs 1 / N of `relevance`
    if method == "gradient_rollout":
        row = row / row.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
    for weighted in walk:
        row = step(row, weighted)
    return on_grid(model, row[:, 0], grid_of(model, pixel_values))


def relevance(model: nn.Module, pixel_values: torch.Tensor, target: Target = None) -> torch.Tensor:
    """Chefer's relevance of each input token (column) for each output token (row), `(B, N, N)`.

    R = (I + E_L) ... (I + E_1) with E = mean over heads of (gradient of the class's logit times attention)+.
    """
    return _product(model, pixel_values, target, _relevance_step)


def gradient_rollout(model: nn.Module, pixel_values: torch.Tensor, target: Target = None) -> torch.Tensor:
    """Rollout of mean over heads of (A times its gradient)+ in place of A, `(B, N, N)`; rows sum to one."""
    return _product(model, pixel_values, target, _gradient_step)


def _relevance_step(rolled: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
    return rolled + rolled @ weighted


def _gradient_step(rolled: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
    return rolled @ with_residual(weighted)


def _product(model: nn.Module, pixel_values: torch.Tensor, target: Target, step: Callable) -> torch.Tensor:
    walk = _backwards(model, pixel_values, target)
    first = next(walk)
    rolled = torch.eye(first.shape[-1], device=first.device).expand(first.shape[0], -1, -1)
    for weighted in walk:
        rolled = step(rolled, weighted)
    return rolled


# -- backpropagation, one block at a time ---------------------------------------------------------------------------


class _Head(nn.Module):
    """Final tokens to logits: the model without embeddings and blocks."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model.base_model.represent(tokens)
        return self.model.classifier(self.model.head_input(outputs)), outputs.last_hidden_state


def _backwards(model: nn.Module, pixel_values: torch.Tensor, target: Target) -> Iterator[torch.Tensor]:
    """Yield weights of the final tokens in the pooled vector `(B, 1, N)`, then `(B, N, N)` of each block, last first.

    The former is `readout`, gradient-weighted for a probe; that of a block is the mean over heads of (A times its
    gradient)+.
    """
    inside = _classifier(model)
    with torch.inference_mode(False), watched(inside) as inside, _eager(inside):
        inputs = _block_inputs(inside, pixel_values.clone())  # a tensor of inference mode cannot be differentiated
        positions = inside.base_model.relative_positions(pixel_values)
        head = _Head(inside)
        attentions: list[torch.Tensor] = []
        tokens = inputs.pop().float().requires_grad_()
        probe = inside.base_model.map_head if inside.config.head_input == "pooled" else None
        with torch.enable_grad(), _record_weights(probe, attentions):
            logits, x = _in_float32(head, tokens, skip=("model.vit.layers", "model.vit.embeddings"))
            target_logits = logits.gather(1, target_classes(logits, target)[:, None]).sum()
        gradient, *probe_gradient = torch.autograd.grad(target_logits, [tokens, *attentions])
        if attentions:
            pooled = _weighted(attentions[0], probe_gradient[0])  # (B, 1, pooled tokens)
            yield nn.functional.pad(pooled, (tokens.shape[1] - pooled.shape[2], 0))
        else:
            yield readout(inside, x.detach())
        for block in reversed(inside.base_model.layers):
            attentions = []
            tokens = inputs.pop().float().requires_grad_()
            with torch.enable_grad(), _record_weights(block, attentions):
                output = _in_float32(block, tokens, output_attentions=True, **positions)
            # `gradient` is that of the block's output, and becomes that of its input
            gradient, weight_gradient = torch.autograd.grad(output, [tokens, *attentions], gradient)
            yield _weighted(attentions[0], weight_gradient)


def _weighted(weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Mean over heads of (A times its gradient)+; `(B, heads, Q, N)` twice -> `(B, Q, N)`."""
    return (weights.detach() * gradient).clamp_min(0).mean(dim=1)


def _in_float32(module: nn.Module, *args: Any, skip: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """The module's output, with its weights as float32 constants."""
    weights = {
        name: parameter.detach().float() for name, parameter in module.named_parameters() if not name.startswith(skip)
    }
    return functional_call(module, weights, args, kwargs)


@torch.no_grad()
def _block_inputs(model: Any, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The input of each block, `(B, N, D)`, and the output of the last."""
    blocks, inputs = model.base_model.layers, []
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _, args, output: inputs.append(output)))
    try:
        model.base_model(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@contextmanager
def _record_weights(module: Any, weights: list[torch.Tensor]) -> Iterator[None]:
    """Append the attention weights of a block or pooling head to `weights`, as part of the autograd graph."""
    if module is None:
        yield
        return

    def request(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"output_attentions": True}

    attention = module.attention
    hooks = [
        attention.register_forward_pre_hook(request, with_kwargs=True),
        attention.register_forward_hook(lambda _, args, output: weights.append(output[1])),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Switch to the eager attention backend, the one whose weights are part of the graph."""
    configs = {id(module.config): module.config for module in model.modules() if "q_proj" in module._modules}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _classifier(model: nn.Module) -> Any:
    inside = uncompiled(model)
    head = inside._modules.get("classifier")
    if head is None or isinstance(head, nn.Identity):
        raise HFViTError(
            f"{type(inside).__name__} without classifier has no class to explain: load it as "
            'HFViTForImageClassification with num_labels, or use method="attention" or "rollout"'
        )
    return inside


def target_classes(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """Class numbers `(B,)` of a target; HFViTError for a class that does not exist."""
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    numbers = torch.as_tensor(target, device=logits.device).reshape(-1)
    if numbers.is_floating_point() or len(numbers) not in (1, batch):
        raise HFViTError(f"target is one class number or {batch}, one for each image; got {target}")
    if not ((numbers >= 0) & (numbers < classes)).all():
        raise HFViTError(f"class {numbers.tolist()} does not exist: the model has {classes}, 0 to {classes - 1}")
    return numbers.expand(batch)
