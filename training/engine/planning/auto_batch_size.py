"""The largest micro-batch that fits in memory, for the same images in each step.

For the Trainer's `auto_batch_size`. What a step is stays as asked for: only how many passes it takes changes. On
an accelerator the search is accelerate's. On a CPU, whose system ends a process that takes too much, nothing is tried
that would not fit: the memory of a few images is measured, and that of a pass follows from it.

Tests: tests/training/engine/planning/test_auto_batch_size.py.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from hf_vit.errors import HFViTError

from ...config.arguments import TrainArguments
from .schedule import stages_of
from .trial import IMAGES, LONG_PASS, Passes


USED = 0.9  # of the memory that is free: other programs and the allocator want some
FULL = "the trial ran out of memory."  # as accelerate's search knows it
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def pass_sizes(args: TrainArguments, config, devices: int, model: nn.Module) -> list[int]:
    """Images of one pass that make the steps asked for without a remainder, the largest first.

    Args:
        config, model: to be trained; with BatchNorm, no pass is of a single image.

    Raises:
        HFViTError: steps that the devices cannot share.
    """
    share = args.per_device_train_batch_size * args.gradient_accumulation_steps
    normalizes = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    sizes = [size for size in range(share, min(normalizes, share - 1), -1) if share % size == 0]
    if not args.batch_size_schedule:
        return sizes
    possible = []
    for size in sizes:
        try:
            stages_of(with_passes_of(args, size), config, args.max_steps, 0.0, devices)
        except HFViTError:  # a later stage has a remainder
            continue
        possible.append(size)
    return possible


def with_passes_of(args: TrainArguments, size: int) -> TrainArguments:
    """The same steps in passes of so many images on a device; evaluation, which takes less memory, in no larger ones
    where memory set the limit."""
    share = args.per_device_train_batch_size * args.gradient_accumulation_steps
    evaluation = args.per_device_eval_batch_size
    return dataclasses.replace(
        args,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=share // size,
        per_device_eval_batch_size=evaluation if size == share else min(evaluation, size),
    )


def largest_that_fits(passes: Passes, sizes: list[int], state_bytes: int, queue: int) -> int:
    """The largest of `sizes` with which a pass fits on every process.

    Args:
        sizes: images of a pass, the largest first. state_bytes: gradients, and what the optimizer will keep.
        queue: batches that wait, read, for their pass.

    Raises:
        HFViTError: not even the smallest fits.
    """
    if passes.device.type == "cpu":
        fits = fits_on_cpu(passes, sizes[0], state_bytes, queue)
        found = min(gather_object([next((size for size in sizes if fits(size)), 0)]))
    else:
        found = largest_tried(passes, sizes, state_bytes)
    if not found:
        raise HFViTError(
            f"--auto_batch_size: not even a pass of {sizes[-1]} images fits in memory: add "
            "--activation_checkpointing, or lower --image_size"
        )
    return found


def largest_tried(passes: Passes, sizes: list[int], state_bytes: int) -> int:
    """The same on an accelerator, which says when its memory is full; 0 where nothing fits."""
    smaller = iter(sizes[1:])

    @find_executable_batch_size(starting_batch_size=sizes[0], reduce_batch_size_fn=lambda: next(smaller, 0))
    def largest(batch_size: int) -> int:
        if not all(gather_object([pass_fits(passes, batch_size, state_bytes)])):
            raise RuntimeError(FULL)
        return batch_size

    try:
        return largest()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        return 0


def pass_fits(passes: Passes, images: int, state_bytes: int) -> bool:
    """Tries a pass, beside gradients and what the optimizer will keep."""
    try:
        reserved = torch.empty(round(state_bytes / USED), dtype=torch.uint8, device=passes.device)
        passes.train(round(images / USED), measured_kernels=False)
        del reserved
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True


def fits_on_cpu(passes: Passes, most: int, state_bytes: int, queue: int) -> Callable[[int], bool]:
    """Tells from passes of a few images what one of more takes; memory that is free is shared by local processes."""
    few, room = min(2, most), USED * available_memory() / local_processes()
    passes.train(few, measured_kernels=False)  # allocates what stays
    seconds, low, saved = train_and_count(passes, few)
    more = min(most, IMAGES, max(few, int(LONG_PASS * few / max(seconds, 1e-9))))
    _, high, saved_by_more = train_and_count(passes, more)
    image = passes.pixel_values[0].nbytes
    # What few images of a small network take, the process may have had before: no less than the graph keeps of them
    growth = max(high - low, saved_by_more - saved) / max(1, more - few) + image * (1 + queue)
    return lambda images: growth * images + state_bytes <= room


def train_and_count(passes: Passes, images: int) -> tuple[float, int, int]:
    """A pass: its seconds, the memory of the process at its peak, and the bytes that it kept for its backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        seconds, peak = passes.train(images, measured_kernels=False)
    return seconds, peak, sum(kept.values())


def local_processes() -> int:
    """Processes of this run on this machine, as launchers say it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))


# -- memory --------------------------------------------------------------------------------------------------------


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and within the limits of its container or slice."""
    return max(0, min(psutil.virtual_memory().available, *(limit - used for limit, used in memory_limits())))


def memory_limits() -> Iterator[tuple[float, float]]:
    """(limit, used) in bytes of every Linux control group that this process is in; psutil knows the machine alone."""
    yield math.inf, 0.0
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (base / group, *(base / parent for parent in group.parents)):
            try:
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group here, or "max": no limit
                continue
            yield limit, used - int(stat.get(names[2], 0))  # what files are kept in memory gives way
