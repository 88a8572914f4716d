"""Batches on their way to the loop: which ones make a step, who reads them, how long the loop waits.

For the Trainer. Which images they hold is decided by samplers.py, as a function of (seed, position) alone.

Tests: tests/training/engine/test_distributed.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_callback import CallbackHandler

from hf_vit.errors import HFViTError

from ..config.arguments import TrainArguments
from ..data.dataset import collate
from ..data.samplers import BalancedSampler, EvalSampler, KeyedDataset, TrainSampler, known_labels, stack
from ..data.shards.streaming import ImageStream, StreamSampler
from ..reporting.progress import Timer
from .accelerator import worker_message
from .planning.schedule import Stage, TrainingSchedule, at_image_size
from .preemption import ignore_signals


class Batches:
    """The batches of a run, as this process sees them.

    Args:
        dataset: addressed by (epoch, index).
        handler: of the callbacks, which see the loader in use. timer: adds up how long the loop waits.

    Attributes:
        error: raised by reading on this process, and not yet reported to the other ones; always None on a single one.
    """

    def __init__(
        self,
        dataset: Dataset,
        args: TrainArguments,
        schedule: TrainingSchedule,
        accelerator: Accelerator,
        handler: CallbackHandler,
        timer: Timer,
    ):
        self.dataset, self.args, self.schedule, self.device = dataset, args, schedule, accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.handler, self.timer = handler, timer
        self.error: HFViTError | None = None

    def steps(self, step: int, position: int) -> Iterator[list[dict]]:
        """The micro-batches of one step after another, from `step`, whose first image is at `position`."""
        for stage in self.schedule.stages:
            if step >= stage.stop:
                continue
            stop = position + (stage.stop - step) * stage.images
            # A loader for each stage, because its workers have copies of the transform with its image size.
            loader = create_loader(
                at_image_size(self.dataset, stage.image_size),
                self.order(stage, position, stop),
                self.args,
                self.device,
            )
            self.handler.train_dataloader = loader
            batches = all_batches(loader, self._keep if self.world_size > 1 else None)
            self.timer.start()
            for _ in range(step, stage.stop):
                with self.timer.wait():
                    micro_batches = list(itertools.islice(batches, stage.accumulation_steps))
                yield micro_batches
            step, position = stage.stop, stop

    def _keep(self, error: HFViTError) -> None:
        self.error = error

    def order(self, stage: Stage, position: int, stop: int) -> TrainSampler | StreamSampler:
        """The batches of this process from one position to another."""
        where = {"position": position, "stop": stop, "rank": self.rank, "world_size": self.world_size}
        if isinstance(self.dataset, ImageStream):
            return self.dataset.order(stage.batch_size, seed=self.args.seed, **where)
        if self.args.train_sampling_strategy == "balanced":
            labels = known_labels(self.dataset, "--train_sampling_strategy balanced")
            return BalancedSampler(labels, stage.batch_size, seed=self.args.seed, **where)
        return TrainSampler(len(self.dataset), stage.batch_size, seed=self.args.seed, **where)

    def names(self, step: int, position: int) -> tuple[list[str], list[str]]:
        """The files that this process reads for `step`, whose first image is at `position`; and unreadable ones."""
        stage = self.schedule.stage_of(step)
        order = self.order(stage, position, position + stage.images)
        items = [self.dataset[key] for keys in order for key in keys]
        return [str(i["name"]) for i in items if "name" in i], [i["unreadable"] for i in items if "unreadable" in i]

    def next_epoch(self, position: int) -> int:
        """The position at which the next epoch begins, the same on all processes."""
        size = len(self.dataset)
        # A multiple of the processes, since each takes every world_size-th image from there.
        return math.ceil(math.ceil(position / size) * size / self.world_size) * self.world_size


def all_batches(loader: DataLoader, keep: Callable[[HFViTError], None] | None) -> Iterator[dict]:
    """The batches of a loader, always as many as it promises.

    Args:
        keep: takes an error in place of raising it; empty batches follow. For runs of several processes, which wait
            for this one at every batch.
    """
    batches, failed = iter(loader), None
    for _ in range(len(loader)):
        if failed is None:
            try:
                batch = next(batches)
            except HFViTError as error:
                failed = as_raised(error)
            except (ConnectionError, EOFError, FileNotFoundError) as error:  # a worker died with its end of a pipe
                if not loader.num_workers:
                    raise
                failed = HFViTError(f"{worker_message(loader.num_workers)} ({type(error).__name__})")
            if failed is not None:  # not in the handler, whose traceback would keep the workers alive
                del batches
                if keep is None:
                    raise failed
                keep(failed)
        yield batch if failed is None else collate([])


def as_raised(error: HFViTError) -> HFViTError:
    """The error as it was raised in a worker: torch puts the worker's whole stack into the message."""
    text = str(error).strip()
    return type(error)(text.splitlines()[-1].partition(": ")[2]) if text.startswith("Caught ") else error


def create_loader(
    dataset: Dataset, order: TrainSampler | StreamSampler | EvalSampler, args: TrainArguments, device: torch.device
) -> DataLoader:
    """A loader with the workers of `args`, which ignore signals: the loop ends them."""
    workers = args.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=stack if isinstance(dataset, KeyedDataset) else collate,
        num_workers=workers,
        # torch refuses a prefetch factor without workers
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        pin_memory=device.type == "cuda",  # only from pinned memory does a copy to the GPU overlap with computation
        worker_init_fn=ignore_signals,
    )
