"""The largest micro-batch that fits in memory, for the same images in each step.

For the Trainer's `auto_batch_size`. The images of a step stay as requested; only the number of its passes changes. On
a GPU the search is accelerate's. On a CPU nothing is tried that might not fit, since the system kills a process that
takes too much: the memory of a few images is measured and extrapolated.

Tests: tests/training/engine/planning/test_auto_batch_size.py.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, find_executable_batch_size, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from hf_vit.errors import HFViTError

from ...config.arguments import TrainArguments
from .run_estimate import CHECKPOINT_COPIES, OPTIMIZER_COPIES
from .schedule import TrainingSchedule, stages_of
from .trial import IMAGES, LONG_PASS, Passes


USABLE = 0.9  # of the free memory: other programs and the allocator need some
OUT_OF_MEMORY = "the trial ran out of memory."  # the words by which accelerate's search recognizes it
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def pass_sizes(args: TrainArguments, config, devices: int, model: nn.Module) -> list[int]:
    """Micro-batch sizes that divide the requested steps without a remainder, the largest first.

    Args:
        config: of the model. devices: processes of the run.
        model: with BatchNorm, which cannot train on a single image, a micro-batch has two or more.
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
        except HFViTError:  # a later stage would have a remainder
            continue
        possible.append(size)
    return possible


def with_passes_of(args: TrainArguments, size: int) -> TrainArguments:
    """The same steps in micro-batches of `size` images; if memory limits `size`, it also limits evaluation's."""
    share = args.per_device_train_batch_size * args.gradient_accumulation_steps
    evaluation = args.per_device_eval_batch_size
    return dataclasses.replace(
        args,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=share // size,
        per_device_eval_batch_size=evaluation if size == share else min(evaluation, size),
    )


def fit_batch_size(
    args: TrainArguments,
    schedule: TrainingSchedule,
    model: nn.Module,
    passes: Passes,
    log: Callable[[str], None],
    saved: dict[str, Any] | None = None,
) -> TrainArguments:
    """`args` with the largest micro-batch that fits in memory on every process; `schedule` is changed to it.

    Args:
        model: to be trained. passes: of the network alone, so that a process whose memory is full does not leave the
            others waiting in a collective operation.
        saved: arguments of the checkpoint that is resumed. Its micro-batch is kept if it makes the same steps, since
            sums over another one would round differently.

    Raises:
        HFViTError: not even the smallest fits; a sharded model.
    """
    sizes = pass_sizes(args, model.config, schedule.devices, model)
    if saved is not None and saved["per_device_train_batch_size"] in sizes:
        fitting = with_passes_of(args, saved["per_device_train_batch_size"])
        fitting.per_device_eval_batch_size = saved["per_device_eval_batch_size"]
        schedule.share_steps_out(fitting)
        return fitting
    if passes.accelerator.distributed_type == DistributedType.FSDP:
        raise HFViTError(
            "--auto_batch_size tries passes of one process alone, which shards of a model cannot do: give "
            "--per_device_train_batch_size"
        )
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # The gradients, the optimizer's state, and what an asynchronous checkpoint copies.
    copies = 1 + OPTIMIZER_COPIES + CHECKPOINT_COPIES * args.async_save
    prefetched = args.dataloader_num_workers * args.dataloader_prefetch_factor
    fitting = with_passes_of(args, largest_that_fits(passes, sizes, copies * trained, prefetched + 1))
    schedule.share_steps_out(fitting)
    step = schedule.stages[0]
    log(
        f"micro-batch: {step.batch_size} images in each of {step.accumulation_steps} passes of a step of "
        f"{step.images} on {schedule.devices} x {passes.device}, the most that fit in memory"
    )
    return fitting


def largest_that_fits(passes: Passes, sizes: list[int], state_bytes: int, queue: int) -> int:
    """The largest of `sizes` with which a pass fits on every process.

    Args:
        sizes: images of a pass, the largest first.
        state_bytes: of gradients, the optimizer's state and copies for checkpoints.
        queue: batches that have been read and wait for their pass.

    Raises:
        HFViTError: not even the smallest fits.
    """
    if passes.device.type == "cpu":
        fits = fits_on_cpu(passes, sizes[0], state_bytes, queue)
        largest = min(gather_object([next((size for size in sizes if fits(size)), 0)]))
    else:
        largest = largest_tried(passes, sizes, state_bytes)
    if not largest:
        raise HFViTError(
            f"--auto_batch_size: not even a pass of {sizes[-1]} images fits in memory: add "
            "--activation_checkpointing, or lower --image_size"
        )
    return largest


def largest_tried(passes: Passes, sizes: list[int], state_bytes: int) -> int:
    """The largest of `sizes` on a GPU, which raises when its memory is full; 0 if none fits."""
    smaller = iter(sizes[1:])

    def tried(batch_size: int) -> int:
        if not all(gather_object([pass_fits(passes, batch_size, state_bytes)])):
            raise RuntimeError(OUT_OF_MEMORY)
        return batch_size

    try:
        # not as a decorator, which forgets the function of smaller sizes up to accelerate 1.10
        return find_executable_batch_size(tried, sizes[0], lambda: next(smaller, 0))()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        return 0


def pass_fits(passes: Passes, images: int, state_bytes: int) -> bool:
    """Try a pass next to a reserved block of `state_bytes`."""
    try:
        # A little more of both than asked for, so that the run itself does not end at the very limit.
        reserved = torch.empty(round(state_bytes / USABLE), dtype=torch.uint8, device=passes.device)
        passes.train(round(images / USABLE), measured_kernels=False)
        del reserved
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True


def fits_on_cpu(passes: Passes, most: int, state_bytes: int, queue: int) -> Callable[[int], bool]:
    """Extrapolate the memory of a pass from passes of a few images; the processes of a machine share what is free."""
    few, free = min(2, most), USABLE * available_memory() / local_processes()
    passes.train(few, measured_kernels=False)  # the first pass also allocates what stays
    seconds, low, saved = train_and_count(passes, few)
    more = min(most, IMAGES, max(few, int(LONG_PASS * few / max(seconds, 1e-9))))
    _, high, saved_by_more = train_and_count(passes, more)
    image = passes.pixel_values[0].nbytes
    # A few images may fit into memory that the process already has: count at least what the graph keeps.
    growth = max(high - low, saved_by_more - saved) / max(1, more - few) + image * (1 + queue)
    return lambda images: growth * images + state_bytes <= free


def train_and_count(passes: Passes, images: int) -> tuple[float, int, int]:
    """A pass: its seconds, the peak memory of the process, and the bytes that were saved for the backward pass."""
    saved_bytes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # views share one
        saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        seconds, peak = passes.train(images, measured_kernels=False)
    return seconds, peak, sum(saved_bytes.values())


def local_processes() -> int:
    """Processes of this run on this machine, from the launcher's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))


# -- memory --------------------------------------------------------------------------------------------------------


def available_memory() -> int:
    """Bytes that this process may still allocate, on the machine and within its container's limits."""
    return max(0, min(psutil.virtual_memory().available, *(limit - used for limit, used in memory_limits())))


def memory_limits() -> Iterator[tuple[float, float]]:
    """(limit, used) in bytes of every Linux control group of this process; psutil only knows the whole machine."""
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
            yield limit, used - int(stat.get(names[2], 0))  # the page cache gives way
