"""A few passes before a run: how fast this machine trains, evaluates and reads, and how much memory a pass takes.

For the Trainer, which logs an estimate before the first step and fits the run into `--time_limit`. A trial leaves no
trace: gradients are dropped, and BatchNorm's buffers and all generators are restored, so that the run is bit for bit
the same without it.

Tests: tests/training/engine/planning/test_time_plan.py.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hf_vit.errors import HFViTError

from ...config.arguments import TrainArguments
from ...data.dataset import collate
from ...data.samplers import KeyedDataset, TrainSampler, stack
from ...data.shards.streaming import ImageStream
from ..distributed import agreed
from .schedule import Stage, at_image_size


IMAGES = 8  # read for a trial, and repeated to fill a batch
LONG_PASS = 2.5  # seconds: longer passes are tried with fewer images, and only once
MEMORY_INTERVAL = 0.002  # seconds between two readings of a process's memory


@dataclass(frozen=True)
class Trial:
    """What was measured on this process; all times are in seconds per image.

    Attributes:
        train: forward and backward pass. evaluate: forward pass alone.
        read_train, read_eval: decoding and transforms, without data workers.
        peak_bytes: memory of the process in a pass of `batch_size` images.
    """

    batch_size: int
    train: float
    evaluate: float
    read_train: float
    read_eval: float
    peak_bytes: int

    def step_seconds(self, images: int, workers: int) -> float:
        """Seconds of a step of `images` images on this process, while `workers` data workers read."""
        return images * _overlapped(self.train, self.read_train, workers)

    def evaluation_seconds(self, images: int, workers: int) -> float:
        """Seconds of an evaluation of `images` images on this process."""
        return images * _overlapped(self.evaluate, self.read_eval, workers)


def _overlapped(compute: float, read: float, workers: int) -> float:
    # Without workers the loop reads between two passes; with them the slower of the two sets the pace.
    return compute + read if workers == 0 else max(compute, read / workers)


class Passes:
    """Forward and backward passes whose results are discarded.

    Args:
        loss_module: prepared network and loss. kernels: context of training passes.
        pixel_values, labels: (B, C, H, W) and labels on the device, as the loop has them; repeated to fill a batch.
    """

    def __init__(
        self,
        loss_module: nn.Module,
        accelerator: Accelerator,
        kernels: AbstractContextManager,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
    ):
        self.loss_module, self.accelerator, self.kernels = loss_module, accelerator, kernels
        self.pixel_values, self.labels = pixel_values, labels
        self.device = accelerator.device

    def train(self, images: int, measured_kernels: bool = True) -> tuple[float, int]:
        """Seconds of one forward and backward pass, and its peak memory in bytes.

        Args:
            measured_kernels: use the kernels of training, which are benchmarked at the first use of a size.
        """
        self.loss_module.train()
        index = torch.arange(images, device=self.device) % len(self.labels)
        pixel_values, labels = self.pixel_values[index], self.labels[index]
        with untouched(self.loss_module, self.device), peak_memory(self.device) as peak:
            began = self._now()
            with self.kernels if measured_kernels else nullcontext():
                losses = self.loss_module(pixel_values, labels)[0]
                self.accelerator.backward(losses.mean())
            return self._now() - began, peak()

    @torch.no_grad()
    def evaluate(self, images: int) -> float:
        """Seconds of a forward pass in evaluation mode."""
        self.loss_module.eval()
        index = torch.arange(images, device=self.device) % len(self.labels)
        with untouched(self.loss_module, self.device):
            began = self._now()
            self.loss_module(self.pixel_values[index], self.labels[index])
            return self._now() - began

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Drop gradients and restore buffers, generators and training mode at exit."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = [] if device.type == "cpu" else [device]
    training = module.training
    try:
        # fork_rng needs the name of a device type even without devices
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        for parameter in module.parameters():
            parameter.grad = None
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])
        module.train(training)


def measure(passes: Passes, read: tuple[float, float], batch_size: int, compiled: bool) -> Trial:
    """Time passes of `batch_size` images, or of fewer on a CPU for which these take long.

    Args:
        read: seconds of reading one training image, and one evaluation image.
        compiled: with torch.compile no other batch size is tried, since each size compiles a graph of its own.
    """
    images, few, growth = batch_size, 1, 0.0
    if not compiled:
        few = min(2, batch_size)  # BatchNorm trains on no fewer
        _, low = passes.train(few, measured_kernels=False)
        first = agreed(passes.train(few, measured_kernels=False)[0]) / few  # the first one also allocates
        if passes.device.type == "cpu" and first * batch_size > 2 * LONG_PASS:
            images = min(batch_size, IMAGES, max(2, int(LONG_PASS / first)))
    whole = images == batch_size
    seconds, high = passes.train(images, measured_kernels=whole)
    if agreed(seconds) < LONG_PASS or whole:  # the first pass may have benchmarked kernels, or compiled
        again, later = passes.train(images, measured_kernels=whole)
        seconds, high = min(seconds, again), max(high, later)
    evaluation = min(passes.evaluate(images) for _ in range(2))
    if not compiled:
        growth = max(0.0, (high - low) / max(1, images - few))
    peak = round(high + growth * (batch_size - images))
    return Trial(batch_size, seconds / images, evaluation / images, *read, peak)


def try_out(
    passes_of: Callable[[dict], Passes], train_dataset, eval_dataset, args: TrainArguments, stage: Stage, position: int
) -> Trial | None:
    """Measure passes of a stage; None if images are streamed, or none of the first ones can be read.

    Args:
        passes_of: makes `Passes` of a batch. position: in the training order.
    """
    if isinstance(train_dataset, ImageStream):
        return None
    images = at_image_size(train_dataset, stage.image_size)
    batch, read = sample_images(images, eval_dataset, args.seed, position, stage.batch_size)
    return None if batch is None else measure(passes_of(batch), read, stage.batch_size, args.torch_compile)


def read_some(dataset, seed: int, position: int, most: int = IMAGES) -> tuple[dict | None, float]:
    """A few images from `position` of the training order on, and the seconds that reading one of them took.

    The batch is None if none of them can be read.
    """
    order = TrainSampler(len(dataset), 1, seed=seed, position=position, stop=position, rank=0, world_size=1)
    keys = order.keys(position, min(IMAGES, most, len(dataset)))
    began = time.perf_counter()
    try:
        batch = (stack if isinstance(dataset, KeyedDataset) else collate)([dataset[key] for key in keys])
    except HFViTError:  # the run reports what it cannot read when it gets there
        return None, 0.0
    return (batch if len(batch["labels"]) else None), (time.perf_counter() - began) / len(keys)


def sample_images(
    train_dataset, eval_dataset, seed: int, position: int, batch_size: int
) -> tuple[dict | None, tuple[float, float]]:
    """A batch of training images, and the seconds of reading one training and one evaluation image, for `measure`.

    The batch is None on all processes if one of them can read no image.
    """
    batch, read_train = read_some(train_dataset, seed, position, batch_size)
    _, read_eval = (None, 0.0) if eval_dataset is None else read_some(eval_dataset, seed, 0)
    return (batch if all(gather_object([batch is not None])) else None), (read_train, read_eval)


# -- memory --------------------------------------------------------------------------------------------------------


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak memory in bytes since then: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return
    # resource.getrusage only knows the peak since the process began, which an earlier pass may have set.
    process = psutil.Process()
    highest, done = [process.memory_info().rss], threading.Event()

    def sample() -> None:
        while not done.wait(MEMORY_INTERVAL):
            highest[0] = max(highest[0], process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True, name="peak memory")
    thread.start()
    try:
        yield lambda: max(highest[0], process.memory_info().rss)
    finally:
        done.set()
        thread.join()
