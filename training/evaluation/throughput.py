"""The cost of a classifier: multiply-adds, parameters, images per second, latency, memory.

For score_model.py and suites.py. Measures the model alone, on images that are already on the device.

Tests: tests/training/test_score.py.
"""

import time
from typing import Any

import numpy as np
import torch

from hf_vit import HFViTConfig

from ..reporting.flops import counted_forward_flops, forward_flops
from ..reporting.progress import memory_peak
from .classifier import Classifier
from .evaluate_classifier import EvalContext


LATENCY_RUNS = 50
MAX_SECONDS = 5.0  # for latency and for throughput each


def macs(classifier: Classifier) -> int:
    """Multiply-adds of one image's forward pass, in matrix products and convolutions."""
    config, (height, width) = classifier.model.config, classifier.transform.image_size_hw
    if isinstance(config, HFViTConfig):
        return forward_flops(config, (height, width)) // 2
    return counted_forward_flops(type(classifier.model), config, (height, width)) // 2


def timed(classifier: Classifier, context: EvalContext, batch_size: int, runs: int) -> np.ndarray:
    """Seconds of each of `runs` forward passes, or as many as fit in MAX_SECONDS, after two for warm-up."""
    device = context.accelerator.device
    shape = (batch_size, classifier.transform.num_channels, *classifier.transform.image_size_hw)
    pixels, seconds = torch.zeros(shape, device=device), []
    began = time.perf_counter()
    for number in range(runs + 2):
        start = time.perf_counter()
        with torch.inference_mode(), context.precision():
            classifier.logits(pixels)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        now = time.perf_counter()
        if number >= 2:
            seconds.append(now - start)
        if seconds and now - began > MAX_SECONDS:
            break
    return np.array(seconds)


def measure_speed(classifier: Classifier, context: EvalContext) -> dict[str, Any]:
    """Parameters, GMACs, throughput (images per second of a full batch), latency (one image, ms), memory peak.

    One process measures while the others wait.
    """
    facts: dict[str, Any] = {"parameters": classifier.parameters, "gmacs": macs(classifier) / 1e9}
    if context.accelerator.is_main_process:
        classifier.model.to(context.accelerator.device)
        single = timed(classifier, context, 1, LATENCY_RUNS) * 1e3
        batched = timed(classifier, context, context.batch_size, LATENCY_RUNS)
        facts |= {
            "latency_p50_ms": float(np.percentile(single, 50)),
            "latency_p99_ms": float(np.percentile(single, 99)),
            "latency_runs": len(single),
            "images_per_second": context.batch_size / float(np.median(batched)),
            "throughput_batch_size": context.batch_size,
            "throughput_runs": len(batched),
            "memory_peak_bytes": memory_peak(context.accelerator.device),
        }
    context.accelerator.wait_for_everyone()
    return facts
