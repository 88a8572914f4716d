"""Batches on their way to the loop: which ones make a step, who reads them, how long the loop waits.

For the Trainer. Which images they hold is samplers.py's, and a function of (seed, position) alone.

Tests: tests/training/engine/test_distributed.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
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
        dataset: addressed by (epoch, index). rank, world_size: of this process, and how many there are.
        handler: of the callbacks, which are shown the loader in use. timer: learns how long the loop waited.

    Attributes:
        error: what this process could not read, where there are others, who have to hear of it.
    """

    def __init__(
        self,
        dataset: Dataset,
        args: TrainArguments,
        schedule: TrainingSchedule,
        rank: int,
        world_size: int,
        device: torch.device,
        handler: CallbackHandler,
        timer: Timer,
    ):
        self.dataset, self.args, self.schedule, self.device = dataset, args, schedule, device
        self.rank, self.world_size = rank, world_size
        self.handler, self.timer = handler, timer
        self.error: HFViTError | None = None

    def steps(self, step: int, position: int) -> Iterator[list[dict]]:
        """The batches of one step after another, from `step`, whose first image stands at `position`."""
        for stage in self.schedule.stages:
            if step >= stage.stop:
                continue
            stop = position + (stage.stop - step) * stage.images
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
        """The batches of this process from one place of the row to another."""
        where = {"position": position, "stop": stop, "rank": self.rank, "world_size": self.world_size}
        if isinstance(self.dataset, ImageStream):
            return self.dataset.order(stage.batch_size, seed=self.args.seed, **where)
        if self.args.train_sampling_strategy == "balanced":
            labels = known_labels(self.dataset, "--train_sampling_strategy balanced")
            return BalancedSampler(labels, stage.batch_size, seed=self.args.seed, **where)
        return TrainSampler(len(self.dataset), stage.batch_size, seed=self.args.seed, **where)

    def names(self, step: int, position: int) -> tuple[list[str], list[str]]:
        """The files that this process reads for `step`, whose first image stands at `position`; and those of
        them that it cannot read."""
        stage = self.schedule.stage_of(step)
        order = self.order(stage, position, position + stage.images)
        items = [self.dataset[key] for keys in order for key in keys]
        return [str(i["name"]) for i in items if "name" in i], [i["unreadable"] for i in items if "unreadable" in i]

    def next_epoch(self, position: int) -> int:
        """The next place of the row at which an epoch begins, for all processes alike."""
        size = len(self.dataset)
        return math.ceil(math.ceil(position / size) * size / self.world_size) * self.world_size


def all_batches(loader: DataLoader, keep: Callable[[HFViTError], None] | None) -> Iterator[dict]:
    """As many batches as the loader has.

    Args:
        keep: where other processes wait for this one at every batch: takes the error that would end it, and empty
            batches follow. None raises it.
    """
    batches, failed = iter(loader), None
    for _ in range(len(loader)):
        if failed is None:
            try:
                batch = next(batches)
            except HFViTError as error:
                failed = as_raised(error)
            except (ConnectionError, EOFError, FileNotFoundError) as error:  # a worker's end of a pipe is gone
                if not loader.num_workers:
                    raise
                failed = HFViTError(f"{worker_message(loader.num_workers)} ({type(error).__name__})")
            if failed is not None:  # not in the handler: its error holds on to the workers, which this ends
                del batches
                if keep is None:
                    raise failed
                keep(failed)
        yield batch if failed is None else collate([])


def as_raised(error: HFViTError) -> HFViTError:
    """The error as it was raised: torch puts the stack of the worker that raised it into its message."""
    text = str(error).strip()
    return type(error)(text.splitlines()[-1].partition(": ")[2]) if text.startswith("Caught ") else error


def create_loader(
    dataset: Dataset, order: TrainSampler | StreamSampler | EvalSampler, args: TrainArguments, device: torch.device
) -> DataLoader:
    """A loader with the workers that `args` asks for; signals to stop are not for them."""
    workers = args.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=stack if isinstance(dataset, KeyedDataset) else collate,
        num_workers=workers,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
