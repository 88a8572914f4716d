"""Which parameters decay, which optimizer moves them, and how its rate changes over the run.

For the Trainer. Sources: google-research/vision_transformer `vit_jax/utils.py` (schedule) and big_vision `optax.py`
(decay mask `.*/kernel$`); Table 3 and Table 4 of arXiv:2010.11929.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .arguments import TrainArguments


# Tables and tokens: they are matrices, but not kernels.
NOT_KERNELS = ("position_embeddings", "cls_token", "register_tokens", "probe", "mask_token", "distillation_token")


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: kernels only, so no norm, bias, scale, position or token."""
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in NOT_KERNELS


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the trainable parameters into those that decay and those that do not, in the model's order."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kernels = [p for name, p in trainable if decays(name, p)]
    others = [p for name, p in trainable if not decays(name, p)]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def create_optimizer(model: nn.Module, args: TrainArguments) -> torch.optim.Optimizer:
    """Build the optimizer `args.optim` over the model's trainable parameters."""
    groups = parameter_groups(model, args.weight_decay)
    if args.optim == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum)
    betas = (args.adam_beta1, args.adam_beta2)
    fused = args.optim == "adamw_torch_fused" and _fused_works(group["params"] for group in groups)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=fused)


def _fused_works(groups: Iterable[list[torch.Tensor]]) -> bool:
    """One kernel for all tensors exists for floating point on CPU, CUDA and MPS."""
    return all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for group in groups for p in group)


def warmup_updates(warmup_steps: float, max_steps: int) -> int:
    """A number below 1 is a share of the run."""
    return math.ceil(warmup_steps * max_steps) if warmup_steps < 1 else int(warmup_steps)


def rate_factor(step: int, *, max_steps: int, warmup: int, kind: str, end: float = 0.0) -> float:
    """Learning rate of update `step` (from 0) as a share of the peak.

    Google's `vit_jax.utils.create_learning_rate_schedule`: with warm-up, the first update has rate 0. `end` is the
    share that the schedule falls to.
    """
    progress = min(1.0, max(0.0, (step - warmup) / max(1, max_steps - warmup)))
    if kind == "cosine":
        factor = end + (1 - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
    elif kind == "linear":
        factor = end + (1 - end) * (1 - progress)
    elif kind == "constant":
        factor = 1.0
    else:
        raise ValueError(f"unknown lr_scheduler_type {kind!r}: cosine, linear or constant")
    return factor * min(1.0, step / warmup) if warmup else factor


def create_scheduler(optimizer: torch.optim.Optimizer, args: TrainArguments, max_steps: int) -> LambdaLR:
    """Build the schedule; one `step()` per update, whatever the number of processes."""
    warmup = warmup_updates(args.warmup_steps, max_steps)
    end = args.lr_end / args.learning_rate if args.learning_rate else 0.0

    def factor(step: int) -> float:
        return rate_factor(step, max_steps=max_steps, warmup=warmup, kind=args.lr_scheduler_type, end=end)

    return LambdaLR(optimizer, factor)
