"""Learning-rate schedules.

For the Trainer. Sources: google-research/vision_transformer `vit_jax/utils.py` (cosine, linear, warm-up) and
big_vision `utils.py` (rsqrt, cooldown). Not transformers' `get_scheduler`: it has no rsqrt with a timescale, no
cooldown on top of another shape, and its warm-up differs from Google's by one step.

Tests: tests/training/engine/test_optimizers.py.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR

from ...config.arguments import TrainArguments
from ...config.durations import RAMPS, check_ramps, steps_of


def rate_factor(
    step: float,
    *,
    max_steps: int,
    warmup: int,
    kind: str,
    end: float = 0.0,
    cooldown: int = 0,
    timescale: float = 1e4,
    drops: Sequence[float] = (0.3, 0.6, 0.9),
) -> float:
    """Learning rate of `step` (from 0) as a fraction of the peak.

    As Google's `vit_jax.utils.create_learning_rate_schedule`: with warm-up, the first step has rate 0.

    Args:
        max_steps, warmup, cooldown, timescale: steps.
        end: fraction that cosine and linear fall to.
        cooldown: multiplies any schedule by a linear fall to 0 over the last steps, as in big_vision.
        drops: fractions of the run at which `step` divides the rate by 10.
    """
    progress = min(1.0, max(0.0, (step - warmup) / max(1, max_steps - warmup)))
    if kind == "cosine":
        factor = end + (1 - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
    elif kind == "linear":
        factor = end + (1 - end) * (1 - progress)
    elif kind == "rsqrt":
        # big_vision's form, which is 1 at the end of the warm-up for any timescale
        factor = 1 / math.sqrt(1 + max(0, step - warmup) / timescale)
    elif kind == "step":
        factor = 0.1 ** sum(step > fraction * max_steps for fraction in drops)
    elif kind == "constant":
        factor = 1.0
    else:
        raise ValueError(f"unknown lr_scheduler_type {kind!r}: cosine, linear, rsqrt, step or constant")
    if warmup:
        factor *= min(1.0, step / warmup)
    if cooldown:
        factor *= min(1.0, max(0, max_steps - step) / cooldown)
    return factor


def create_scheduler(
    optimizer: torch.optim.Optimizer,
    args: TrainArguments,
    max_steps: int,
    epoch: float = 0.0,
    scheduled: Callable[[int], float] = float,
) -> LambdaLR:
    """Build the schedule; it needs one `step()` per optimizer step, whatever the number of processes.

    Args:
        epoch: steps of one epoch. scheduled: maps a step of the run to its step of the schedule (time limits).

    Raises:
        HFViTError: warm-up and cooldown longer than the run.
    """
    warmup, cooldown = (steps_of(name, getattr(args, name), max_steps, epoch) for name in RAMPS)
    check_ramps(warmup, cooldown, max_steps)
    end = args.lr_end / args.learning_rate if args.learning_rate else 0.0

    # LambdaLR multiplies each group's own rate, which layer-wise decay has set, by this factor.
    def factor(step: int) -> float:
        return rate_factor(
            scheduled(step),
            max_steps=max_steps,
            warmup=warmup,
            kind=args.lr_scheduler_type,
            end=end,
            cooldown=cooldown,
            timescale=args.rsqrt_timescale,
            drops=args.lr_steps,
        )

    return LambdaLR(optimizer, factor)
