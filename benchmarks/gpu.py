"""Inference and training on a GPU: ours and each baseline, eager and compiled, and the time at the GPU's peak.

A suite of `benchmarks.run`; without a GPU it runs at tiny size on the CPU (`--tiny`), which checks the code and
measures nothing. Precision is bfloat16: pure for inference, autocast with float32 weights for training.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import baselines
from benchmarks.cpu_inference import forward
from benchmarks.cpu_training import fused, step
from benchmarks.limit import products
from benchmarks.measure import Point, filled, free
from hf_vit import HFViTConfig, HFViTForImageClassification
from training.reporting.flops import PEAKS, forward_flops, train_flops


SIZES = {  # preset -> images of a batch in inference and in training, for 141 GB
    "vit-base-patch16-224": (1024, 512),
    "vit-large-patch16-224": (512, 192),
    "vit-huge-patch14-224": (256, 96),
    "r50-vit-base-patch16-224": (512, 256),
    "r26-vit-small-patch32-224": (1024, 512),
}
QUOTED = {  # timm's results/benchmark-infer-amp-nchw-pt291-cu128-4090-dynamo.csv and -cu130-5090: images/s, compiled
    "vit-base-patch16-224": "timm's own tables, float16: RTX 4090 3375.6, RTX 5090 4378.8 images/s compiled",
    "vit-large-patch16-224": "timm's own tables, float16: RTX 4090 1035.8, RTX 5090 1338.7 images/s compiled",
    "vit-huge-patch14-224": "timm's own tables, float16: RTX 4090 398.0, RTX 5090 505.3 images/s compiled",
    "r50-vit-base-patch16-224": "timm's own tables, float16: RTX 4090 2195.1, RTX 5090 2894.3 images/s compiled",
    "r26-vit-small-patch32-224": "timm's own tables, float16: RTX 4090 7730.1, RTX 5090 10232.0 images/s compiled",
}


def points(options: argparse.Namespace) -> Iterator[Point]:
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    for preset, batches in SIZES.items():
        if options.preset and preset not in options.preset:
            continue
        for training, batch in zip((False, True), (2, 2) if options.tiny else batches):
            yield point(preset, batch, training, device, options.tiny)
            free()


def point(preset: str, batch: int, training: bool, device: torch.device, tiny: bool) -> Point:
    config = HFViTConfig.from_preset(preset, num_labels=1000)
    config.hidden_dropout_prob = 0.0  # 0.1 in the larger presets, as in the paper; the baselines' networks have none
    others, absent = ({}, {"baselines": "--tiny"}) if tiny else baselines.networks(preset)
    if tiny:
        config.num_hidden_layers = 1
    pixels = torch.randn(batch, 3, *config.image_size_hw, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    ours: dict[str, Callable[[], Any]] = {}
    theirs: dict[str, Callable[[], Any]] = {}
    others = {"hf_vit": lambda: HFViTForImageClassification(config)} | others
    for name, build in others.items():
        model = filled(build, device)
        calls = ours if name == "hf_vit" else theirs
        calls[name] = call(model, pixels, labels, training)
        compiled = torch.compile(
            filled(build, device), fullgraph=name == "hf_vit", backend="eager" if tiny else "inductor"
        )
        calls[f"{name}, compiled"] = call(compiled, pixels, labels, training)
    if not training:
        optimized = filled(others["hf_vit"], device).optimize_for_inference(torch.bfloat16)
        ours["hf_vit, optimized"] = forward(optimized, pixels.bfloat16())
    model = filled(others["hf_vit"], device).bfloat16().eval()
    limit = products(model, pixels.bfloat16(), torch.bfloat16, training)
    work = "training step bfloat16 autocast" if training else "inference bfloat16"
    return Point(
        f"{work}, {preset}, batch {batch}{', tiny' if tiny else ''}", batch, ours, theirs, limit, absent,
        quoted=[] if training else [QUOTED[preset]], note=share_of_peak(config, batch, training, device),
    )  # fmt: skip


def call(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, training: bool) -> Callable[[], Any]:
    if training:
        return step(model, pixels, labels, True, fused(model))
    return forward(model.eval().bfloat16(), pixels.bfloat16())


def share_of_peak(config: HFViTConfig, batch: int, training: bool, device: torch.device) -> str:
    """What a batch would take at the data sheet's peak: the model's FLOPs utilisation is this over the median."""
    flops = (train_flops(config) if training else forward_flops(config)) * batch
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((peak for known, peak in PEAKS.items() if known in name), None)
    each = f"{flops / batch / 1e9:.1f} GFLOP an image"
    if peak is None:
        return f"{each}; no peak is known for this device"
    return f"{each}: {1e3 * flops / batch / peak:.4f} ms/image at {peak / 1e12:.0f} TFLOP/s"
