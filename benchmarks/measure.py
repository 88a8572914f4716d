"""Measure candidates in turns in one process: medians, quartiles, and the limit of the machine.

For the suites in this folder. A point is one piece of work (a model, a precision, a batch) and its candidates: ours,
each baseline's, and the machine's limit, timed in the same rounds.
"""

import contextlib
import gc
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_vit.capabilities import processor_name, widest_instructions
from training.reporting.facts import commit


MAX_SLOWDOWN = 1.03  # of a fast path against the plain code: the noise of medians
LIMIT = "limit: its matmuls, best library"
PACKAGES = (
    "torch", "transformers", "timm", "torchvision", "vit-pytorch", "onnxruntime", "openvino", "jax", "flax", "hf-vit",
)  # fmt: skip
ROUNDS = range(4, 41)  # as many as the time of a point allows, after one for warm-up
SLOW, SELDOM = 4, 3  # a candidate that takes SLOW times the median is timed in every SELDOM-th round


@contextlib.contextmanager
def training_clock(now: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Times by `now` of the `first` forward pass and the `last` optimizer step within, of any library."""
    moments: dict[str, float] = {}

    def begin(*_: Any) -> None:
        moments.setdefault("first", now())

    def end(*_: Any) -> None:
        moments["last"] = now()

    hooks = [register_module_forward_pre_hook(begin), register_optimizer_step_post_hook(end)]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Point:
    """One row of work.

    Attributes:
        title: the work in one line; identifies the result. images: of one call.
        ours, baselines: candidates by name; a call does the work once.
        limit: the matmuls and convolutions alone, each by the library that is fastest at it (`limit.py`).
        absent: baselines that do not run here, with the reason. quoted: published figures, with their source.
        unit: per image, or "s" for calls without images.
        never_slower: fast candidates, each with the plain one that it must not be slower than.
    """

    title: str
    images: int
    ours: dict[str, Callable[[], Any]]
    baselines: dict[str, Callable[[], Any]]
    limit: Callable[[], Any] | None = None
    absent: dict[str, str] = field(default_factory=dict)
    quoted: list[str] = field(default_factory=list)
    note: str = ""
    unit: str = "ms/image"
    never_slower: dict[str, str] = field(default_factory=dict)


def measure(point: Point, seconds: float, device: torch.device, without: Sequence[str] = ()) -> dict[str, Any]:
    """Time all candidates of a point in turns for about `seconds`; returns the entry of the results file.

    A fast path that was slower than the plain one is timed again with the plain one alone, and judged by that: what
    the other candidates leave behind in caches and memory adds a few percent to some calls.
    """
    for name in [name for name in point.baselines if name in without]:
        del point.baselines[name]
        point.absent[name] = "--without"
    candidates = point.ours | point.baselines | ({LIMIT: point.limit} if point.limit else {})
    times = interleaved(candidates, seconds, device)
    result = {
        "title": point.title,
        "images": point.images,
        "unit": point.unit,
        "ours": list(point.ours),
        "baselines": list(point.baselines),
        "seconds": times,
        "absent": point.absent,
        "quoted": point.quoted,
        "note": point.note,
        "never_slower": point.never_slower,
    }
    slower = {
        fast: plain
        for fast, plain in point.never_slower.items()
        if plain in candidates and ratio(result, fast, plain) > MAX_SLOWDOWN
    }
    pairs = ({name: candidates[name] for name in pair} for pair in slower.items())
    return result | {"alone": dict(zip(slower, (interleaved(pair, seconds, device) for pair in pairs)))}


def interleaved(
    candidates: dict[str, Callable[[], Any]], seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call of each candidate: one call per round, in rotating order; the first round is warm-up."""
    names, times = list(candidates), {name: [] for name in candidates}
    warm_up: dict[str, float] = {}
    number, began = 0, time.perf_counter()
    while number <= ROUNDS[0] or (number <= ROUNDS[-1] and time.perf_counter() - began < seconds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if number and number % SELDOM != 1 and warm_up[name] > SLOW * statistics.median(warm_up.values()):
                continue
            synchronize(device)
            start = time.perf_counter()
            candidates[name]()
            synchronize(device)
            taken = time.perf_counter() - start
            if number:
                times[name].append(taken)
            else:
                warm_up[name] = taken
        number += 1
        if sys.stderr.isatty():
            print(f"\rround {number}", end="", file=sys.stderr, flush=True)
    return times


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# -- models without waiting ------------------------------------------------------------------------------------------


def filled(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A model with small random weights: its own initialization would take longer than the measurement."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()  # small factors here would make gradients too small for normal numbers
    return model


# -- the report ------------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, its widest instructions, threads, versions and commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpu = device.type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name() if gpu else processor_name(),
        "instructions": None if gpu else widest_instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def ratio(result: dict[str, Any], slower: str, faster: str) -> float:
    """How many times faster: the median over rounds of the ratio; of medians if the numbers of rounds differ."""
    slow_times, fast_times = result["seconds"][slower], result["seconds"][faster]
    if len(slow_times) != len(fast_times):
        return statistics.median(slow_times) / statistics.median(fast_times)
    return statistics.median(slow / fast for slow, fast in zip(slow_times, fast_times))


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The table of one point: median and quartiles of each candidate, and how many times faster ours are."""
    ours = result["ours"]
    scale = 1e3 / result["images"] if result["unit"] == "ms/image" else 1.0
    heads = "".join(f"{short(name):>16}" for name in ours)
    yield f"{result['title']}  ({len(result['seconds'][ours[0]])} rounds in turns)"
    yield f"  {'':<34}{result['unit']:>10}{'quartiles':>22}{heads}"
    for name, taken in result["seconds"].items():
        low, middle, high = (scale * value for value in statistics.quantiles(taken, n=4))
        spread = f"{low:.4g} to {high:.4g}"
        cells = "".join(
            f"{'' if name in ours and name == one else f'{ratio(result, name, one):.2f}x':>16}" for one in ours
        )
        yield f"  {name:<34}{middle:>10.4g}{spread:>22}{cells}"
    for name, reason in result["absent"].items():
        yield f"  {name:<34}{'absent':>10}  {reason}"
    for text in [*result["quoted"], *([result["note"]] if result["note"] else [])]:
        yield f"  ({text})"


def losses(result: dict[str, Any]) -> list[str]:
    """One sentence per fast path of ours that was slower than the plain code, among all and alone with it."""
    lost = []
    for fast, times in result["alone"].items():
        plain = result["never_slower"][fast]
        if (longer := ratio({"seconds": times}, fast, plain)) > MAX_SLOWDOWN:
            lost.append(
                f"{result['title']}: {fast!r} takes {longer:.2f} times as long as {plain!r}, which it replaces"
            )
    return lost


def short(name: str) -> str:
    """The heading of one of our columns."""
    return name.removeprefix("hf_vit, ").removeprefix("hf_vit ")[:14]


def free() -> None:
    """Free the models of a finished point before the next is built."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
