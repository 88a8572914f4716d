"""The training step on CPUs: forward, backward, AdamW; ours with the Trainer's kernels, baselines as they are.

A suite of `benchmarks.run`. Baselines' optimizers are those of their own training scripts: transformers' Trainer fuses
AdamW, timm's factory gives PyTorch's default. Flax's ViT is a few lines of our own (`flax_vit.py`), compiled by XLA.
"""

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import baselines
from benchmarks.limit import products
from benchmarks.measure import Point, filled, free
from hf_vit import HFViTConfig, HFViTForImageClassification
from training.engine.cpu_kernels import CPUKernels


CPU = torch.device("cpu")
NEVER_SLOWER = {"hf_vit": "hf_vit without its CPU kernels"}


def points(options: argparse.Namespace) -> Iterator[Point]:
    preset = "vit-base-patch16-224"
    for precision, batch in itertools.product(options.precision, options.batch_size or [8]):
        autocast = precision == "bfloat16"
        config = HFViTConfig.from_preset(preset, num_labels=1000)
        pixels, labels = torch.randn(batch, 3, *config.image_size_hw), torch.randint(1000, (batch,))
        model = filled(lambda config=config: HFViTForImageClassification(config), CPU)
        others, absent = baselines.networks(preset)
        others["transformers ViT, eager attention"] = lambda: baselines.networks(preset, attention="eager")[0][
            "transformers ViT"
        ]()
        calls = {}
        for name, build in others.items():
            theirs = filled(build, CPU)
            calls[name] = step(theirs, pixels, labels, autocast, optimizer_of(name, theirs))
        flax, missing = {}, {"JAX, Flax": "--without"}
        if "JAX, Flax" not in options.without:
            flax, missing = flax_step(config, pixels, labels, autocast)
        ours = {"hf_vit": step(model, pixels, labels, autocast, fused(model), CPUKernels())}
        plain = filled(lambda config=config: HFViTForImageClassification(config), CPU)
        calls["hf_vit without its CPU kernels"] = step(plain, pixels, labels, autocast, fused(plain))
        low = torch.bfloat16 if autocast else torch.float32
        title = f"training step {'bfloat16 autocast' if autocast else 'float32'}, {preset}, batch {batch}"
        limit = products(model, pixels, low, training=True)
        yield Point(title, batch, ours, calls | flax, limit, absent | missing, never_slower=NEVER_SLOWER)
        free()


def small(options: argparse.Namespace) -> Iterator[Point]:
    """The quickstart's ViT: 17 tokens of width 96, where Python and small kernels count."""
    config = HFViTConfig(
        image_size=16, patch_size=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=192, hidden_dropout_prob=0.0, num_labels=52,
    )  # fmt: skip
    for precision, batch in itertools.product(options.precision, options.batch_size or [64]):
        autocast = precision == "bfloat16"
        pixels, labels = torch.randn(batch, 3, 16, 16), torch.randint(52, (batch,))
        model, plain = (filled(lambda: HFViTForImageClassification(config), CPU) for _ in range(2))
        theirs = filled(lambda: baselines.transformers_vit(config, "sdpa"), CPU)
        kernels = kernels_of(model, pixels, labels, autocast)
        yield Point(
            f"training step {'bfloat16 autocast' if autocast else 'float32'}, 4 blocks of width 96, batch {batch}",
            batch, {"hf_vit": step(model, pixels, labels, autocast, fused(model), kernels)},
            {
                "hf_vit without its CPU kernels": step(plain, pixels, labels, autocast, fused(plain)),
                "transformers ViT": step(theirs, pixels, labels, autocast, fused(theirs)),
            },
            never_slower=NEVER_SLOWER,
        )  # fmt: skip
        free()


def drop_path(options: argparse.Namespace) -> Iterator[Point]:
    """Branches that are left out cost nothing: drop path in ViT-L against timm's."""
    for batch in options.batch_size or [8]:
        yield drop_path_point("vit-large-patch16-224", batch)
        free()


def drop_path_point(preset: str, batch: int) -> Point:
    pixels, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    config = HFViTConfig.from_preset(preset, num_labels=1000, drop_path_rate=0.4)
    config.hidden_dropout_prob = 0.0  # 0.1 in the preset, as in the paper; timm's network has none
    model = filled(lambda: HFViTForImageClassification(config), CPU)
    others, absent = baselines.networks(preset, drop_path=0.4)
    calls = {"timm": step(filled(others["timm"], CPU), pixels, labels, True)} if "timm" in others else {}
    return Point(
        f"forward and backward bfloat16 autocast, {preset}, drop path 0.4, batch {batch}",
        batch, {"hf_vit": step(model, pixels, labels, True, None, CPUKernels())}, calls,
        absent=absent | {"transformers ViT": "no stochastic depth"},
        note="from 0 in the first block to 0.4 in the last, 0.2 on average; timm multiplies what it drops by zero",
    )  # fmt: skip


def patch_dropout(options: argparse.Namespace) -> Iterator[Point]:
    """Patches that are left out cost nothing: half of them against none."""
    for batch in options.batch_size or [32]:
        yield patch_dropout_point("vit-base-patch16-224", batch)
        free()


def patch_dropout_point(preset: str, batch: int) -> Point:
    pixels, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    half, whole = (
        filled(
            lambda rate=rate: HFViTForImageClassification(
                HFViTConfig.from_preset(preset, num_labels=1000, patch_dropout_rate=rate)
            ),
            CPU,
        )
        for rate in (0.5, 0.0)
    )
    others, absent = baselines.networks(preset, patch_dropout=0.5)
    calls = {"hf_vit, no patch dropout": step(whole, pixels, labels, True, fused(whole), CPUKernels())}
    if "timm" in others:
        theirs = filled(others["timm"], CPU)
        calls["timm, patch dropout 0.5"] = step(theirs, pixels, labels, True, optimizer_of("timm", theirs))
    return Point(
        f"training step bfloat16 autocast, {preset}, patch dropout 0.5, batch {batch}",
        batch, {"hf_vit": step(half, pixels, labels, True, fused(half), CPUKernels())}, calls,
        absent=absent | {"transformers ViT": "no patch dropout"},
    )  # fmt: skip


def step(
    model: nn.Module,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    autocast: bool,
    optimizer: torch.optim.Optimizer | None = None,
    kernels: CPUKernels | None = None,
) -> Callable[[], None]:
    """One training step, or forward and backward alone without an optimizer; kernels as the Trainer uses them."""
    model.train()
    device = pixels.device.type

    def run() -> None:
        with kernels or contextlib.nullcontext():
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                output = model(pixels)
                loss = F.cross_entropy((output if torch.is_tensor(output) else output.logits).float(), labels)
            loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return run


def kernels_of(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, autocast: bool) -> CPUKernels:
    """The Trainer's kernels for a small model, which does without them where its whole pass is slower."""
    kernels = CPUKernels()
    plain, fast = (step(model, pixels, labels, autocast, None, each) for each in (None, kernels))
    kernels.disable_if_slower((type(model).__name__, tuple(pixels.shape), autocast), plain, fast)
    return kernels


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as the baseline's own training script makes it."""
    if name.startswith("timm"):
        from timm.optim import create_optimizer_v2

        return create_optimizer_v2(model, opt="adamw", lr=1e-6)
    return fused(model)


def flax_step(
    config: HFViTConfig, pixels: torch.Tensor, labels: torch.Tensor, autocast: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """One step of the same network in Flax, in float32 or with bfloat16 activations."""
    reasons: Iterable[str] = filter(None, map(baselines.missing, ("jax", "flax", "optax")))
    if reason := next(iter(reasons), None):
        return {}, {"JAX, Flax": reason}
    from benchmarks.flax_vit import update

    return {"JAX, Flax": update(config, pixels.numpy(), labels.numpy(), low=autocast)}, {}
