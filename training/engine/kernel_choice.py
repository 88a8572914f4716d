"""Which of several kernels is used: the fastest one that was measured on this machine, forward and backward together.

For cpu_kernels.py. Times are kept in the table of hf_vit/kernel_table.py, so that every process and a resumed run
choose the same kernels. Not torch.utils.benchmark: it keeps no table that several processes share.

Tests: tests/training/engine/test_cpu_kernels.py.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from transformers.utils import logging

from hf_vit import kernel_table


logger = logging.get_logger(__name__)

# In the thread that measures, OpenMP has more threads than there are cores, and lets them sleep between operations. In
# a training step they wait awake: what takes no longer is measured with more of their waking than of its work.
SHORT_SECONDS = 0.002

Implementations = dict[str, Callable]  # the first is PyTorch's own
T = TypeVar("T")


def no_autocast() -> AbstractContextManager:
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers in [-0.5, 0.5), the same for each shape."""
    # with a generator of its own: a measurement must not change the run's random numbers
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).sub_(0.5).to(dtype)


_thread = threading.local()


def in_own_thread(work: Callable[[], T]) -> T:
    """Run a measurement in a thread, apart from the training step that it interrupts.

    Autocast, saved-tensor hooks (activation checkpointing counts saved tensors) and counting modes belong to a thread.
    """
    if getattr(_thread, "measures", False):  # a measurement within one: that thread holds the table's lock
        return work()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        _thread.measures = True
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="measure CPU kernels")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def fastest_here(key: tuple, functions: dict[str, Callable[[], object]]) -> str:
    """Name of the fastest function by the table of this machine, measured in this thread.

    For whole steps, at a moment when no step is interrupted. The functions have been run once before: kernels that
    they choose are not measured again.
    """
    measures = getattr(_thread, "measures", False)
    _thread.measures = True  # a measurement within this one would wait in its thread for the table's lock
    try:
        times = kernel_table.seconds(key, functions, cold=False)
    finally:
        _thread.measures = measures
    return fastest_of(times, 1.0)


def fastest(
    key: tuple,
    functions: Implementations,
    *inputs: torch.Tensor,
    min_speedup: float = kernel_table.MIN_SPEEDUP,
    min_short_speedup: float | None = None,
) -> str:
    """Name of the fastest function, forward and backward together, by the table of this machine.

    Args:
        key: of the measurement in the table.
        functions: by name; each takes the inputs and returns a tensor or a list of tensors. The first is PyTorch's
            own, and is chosen unless another one is `min_speedup` times as fast, or `min_short_speedup` times where
            PyTorch's own takes less than SHORT_SECONDS.
        inputs: float tensors that get gradients.
    """
    first, *others = functions
    if not others:
        return first
    leaves = [x.requires_grad_() for x in inputs]
    reference: list[torch.Tensor] = []

    def measured(name: str) -> Callable:
        unchecked = True

        def run(*_: torch.Tensor) -> None:
            nonlocal unchecked
            with no_autocast():  # a measurement within a measurement: each function says what it needs
                outputs = functions[name](*leaves)
            outputs = [outputs] if torch.is_tensor(outputs) else outputs
            gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
            if unchecked:  # in the first round, which is not timed
                results = [x.detach() for x in (*outputs, *gradients)]
                reference.extend([] if reference else results)
                _check_close(name, results, reference)
                unchecked = False

        return run

    candidates = {name: measured(name) for name in functions}
    times = in_own_thread(lambda: kernel_table.seconds(key, candidates, *leaves, cold=False))
    short = min_short_speedup is not None and (times[first] or 0.0) < SHORT_SECONDS
    chosen = fastest_of(times, min_short_speedup if short else min_speedup)
    logger.info(f"{key}: {chosen} of {times}")
    return chosen


def fastest_of(times: kernel_table.Times, min_speedup: float) -> str:
    """Name of the shortest time, if the first one, PyTorch's own, is `min_speedup` times as long; else the first."""
    first = next(iter(times))
    measured = {name: time for name, time in times.items() if time is not None}  # None: it raised
    best = min(measured, key=measured.__getitem__)
    return best if measured[best] * min_speedup < measured[first] else first


def _check_close(name: str, results: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    """Raise if a candidate computes something else; the table leaves out a candidate that raises."""
    low = any(x.dtype == torch.bfloat16 for x in (*results, *reference))
    for result, expected in zip(results, reference, strict=True):
        difference = (result.float() - expected.float()).abs().max()
        # `not <=` rather than `>`, which is false for NaN
        if not difference <= (0.05 if low else 1e-4) * expected.float().abs().max():
            raise RuntimeError(f"{name} differs from PyTorch's own function by {difference:.3g}")
