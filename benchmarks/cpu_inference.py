"""Inference on CPUs: ours as loaded and ours optimized, beside every baseline's plain model and the runtimes.

A suite of `benchmarks.run`. Precision is that of the weights; int8 takes its scales from the pixels. Google's
networks have the tanh form of GELU and the baselines' the erf form, so ours is loaded with each. `r=16` is ours
optimized and with as many pairs of tokens merged in each block (ToMe), which computes something else: what that costs
in accuracy is in LOG.md. `--compiled` adds torch.compile, which takes minutes to begin.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import baselines
from benchmarks.limit import products
from benchmarks.measure import Point, filled, free
from hf_vit import HFViTConfig, HFViTError, HFViTForImageClassification
from hf_vit.inference.token_merging import merge_tokens


CPU = torch.device("cpu")
MERGED = 16  # of 197 tokens in each of 12 blocks
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def points(options: argparse.Namespace, preset: str = "vit-base-patch16-224") -> Iterator[Point]:
    for precision in options.precision:
        for batch in options.batch_size or [1, 8, 32]:
            yield point(preset, DTYPES[precision], batch, options.compiled)
            free()


def hybrids(options: argparse.Namespace) -> Iterator[Point]:
    """Hybrids on CPUs; BiT-50 is another network, for scale."""
    for preset in ("r50-vit-base-patch16-224", "r26-vit-small-patch32-224"):
        for precision in options.precision:
            for batch in options.batch_size or [1, 8]:
                yield point(preset, DTYPES[precision], batch, options.compiled)
                free()


def point(preset: str, dtype: torch.dtype, batch: int, compiled: bool) -> Point:
    config = HFViTConfig.from_preset(preset, num_labels=1000)
    pixels = torch.randn(batch, 3, *config.image_size_hw)
    plain, optimized, rounded = (filled(lambda: HFViTForImageClassification(config), CPU).eval() for _ in range(3))
    theirs = HFViTConfig.from_preset(preset, num_labels=1000, hidden_act="gelu")
    erf = filled(lambda: HFViTForImageClassification(theirs), CPU).eval().to(dtype)
    others, absent = baselines.networks(preset)
    models = {name: filled(build, CPU).eval().to(dtype) for name, build in others.items()}
    calls = {name: forward(model, pixels.to(dtype)) for name, model in models.items()}
    if compiled:
        calls |= {
            f"{name}, compiled": forward(torch.compile(model), pixels.to(dtype)) for name, model in models.items()
        }
    runtimes, missing = baselines.runtimes(plain, pixels, dtype)
    plain.to(dtype)
    optimized.optimize_for_inference(dtype)
    networks = {"hf_vit": plain, "hf_vit, erf": erf, "hf_vit, optimized": optimized}
    try:
        rounded.to(dtype).optimize_for_inference(int8_calibration=pixels[:8].to(dtype))
        networks["hf_vit, int8"] = rounded
    except HFViTError as error:  # refused where it would not be faster
        absent["hf_vit, int8"] = str(error)
    if config.resnet_depths is None:
        networks[f"hf_vit, r={MERGED}"] = merge_tokens(copy.deepcopy(optimized), MERGED)
    ours = {name: forward(model, pixels.to(dtype)) for name, model in networks.items()}
    for call in ours.values():
        call()  # chooses and packs here, as runtimes compile before they are timed
    precision = str(dtype).removeprefix("torch.")
    limit = products(plain, pixels.to(dtype), dtype)
    never_slower = {name: "hf_vit" for name in ("hf_vit, optimized", "hf_vit, int8") if name in ours}
    title = f"inference {precision}, {preset}, batch {batch}"
    return Point(title, batch, ours, calls | runtimes, limit, absent | missing, never_slower=never_slower)


def forward(model: nn.Module, pixels: torch.Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return model(pixels)

    return call
