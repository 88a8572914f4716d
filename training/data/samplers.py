"""Which images each process sees at each step, as a pure function of (seed, position): a resumed run replays nothing.

For the Trainer. The training order is one endless sequence: the permutation of epoch 0, then that of epoch 1, and so
on. `position` is the number of images that the run has taken from it, and all that a checkpoint has to store. A step
takes the next `processes x passes x batch` images, so that neither processes nor gradient accumulation change which
ones. As in Google's pipeline (`repeat` before batching) a batch may straddle two epochs; each epoch shows every image
once. Not torch's `DistributedSampler`: it repeats or drops images to divide an epoch evenly, and has no position.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from hf_vit.errors import HFViTError

from ..rng import generator
from .dataset import ImageDataset, stack_labels
from .shards.streaming import ImageStream


# First words of addresses (see rng.py): the purpose of the numbers.
ORDER = 16  # (seed, epoch): the order of one epoch
UPDATE = 17  # (seed, draw, rank): what dropout and user code draw in one forward pass
ROUND = 18  # (seed, round): the order of the classes in one round of balanced sampling
CLASS_ORDER = 19  # (seed, class, epoch of the class): the order of its images in balanced sampling

Key = tuple[int, int]  # (epoch, index)


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Permutation of `range(size)` for one epoch."""
    return generator(ORDER, seed, epoch).permutation(size)


def seed_draw(seed: int, draw: int, rank: int, device: torch.device) -> None:
    """Seed Python's, NumPy's and torch's global generators from (seed, draw, rank), so that none needs saving."""
    # Not torch.manual_seed: without a GPU it formats the call stack each time, for a CUDA that may be initialized
    # later.
    word = int(generator(UPDATE, seed, draw, rank).integers(1 << 63))
    random.seed(word)
    np.random.seed(word % (1 << 32))
    torch.default_generator.manual_seed(word)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(word)


class TrainSampler:
    """Batch sampler: lists of (epoch, index) for one process, from `position` up to `stop` of the training order."""

    def __init__(self, size: int, batch_size: int, *, seed: int, position: int, stop: int, rank: int, world_size: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.position, self.stop = position, stop
        self.rank, self.world_size = rank, world_size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return max(0, self.stop - self.position) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Key]]:
        stride = self.batch_size * self.world_size
        for batch in range(len(self)):
            yield self.keys(self.position + batch * stride + self.rank * self.batch_size, self.batch_size)

    def keys(self, first: int, count: int) -> list[Key]:
        """The `count` positions from `first` on, as (epoch, index)."""
        return [self._key(index) for index in range(first, first + count)]

    def _key(self, place: int) -> Key:
        epoch, offset = divmod(place, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.seed, epoch, self.size)
        return epoch, int(self._order[offset])


class BalancedSampler(TrainSampler):
    """As `TrainSampler`, but all classes come equally often, whatever their number of images.

    The training order consists of rounds. A round has each class once, in random order; each class goes through its
    images again and again, in another order each time. The n-th time that an image comes its epoch is n, so that it is
    augmented differently. Not `torch.utils.data.WeightedRandomSampler`, which would need a generator's state to
    resume.

    Args:
        labels: int (size,), the class of each image. Classes without images are left out.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, **where: int):
        super().__init__(len(labels), batch_size, **where)
        order = np.argsort(labels, kind="stable")
        starts = np.flatnonzero(np.diff(np.asarray(labels)[order], prepend=-1))
        self.images = np.split(order, starts[1:])  # of each class
        self._round, self._classes = -1, np.empty(0, dtype=np.int64)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each class: its epoch, and the order of its images

    def _key(self, place: int) -> Key:
        number, turn = divmod(place, len(self.images))
        if number != self._round:
            order = generator(ROUND, self.seed, number).permutation(len(self.images))
            self._round, self._classes = number, order
        chosen = int(self._classes[turn])
        images = self.images[chosen]
        epoch, offset = divmod(number, len(images))
        if chosen not in self._orders or self._orders[chosen][0] != epoch:
            order = generator(CLASS_ORDER, self.seed, chosen, epoch).permutation(len(images))
            self._orders[chosen] = epoch, images[order]
        return epoch, int(self._orders[chosen][1][offset])


class EvalSampler:
    """Batch sampler: every index once over all processes, in order; all processes get the same sizes of batches.

    Sharded models need the same number of forward passes on every process, so a process with one image less repeats
    the last index (`filler`, else None), which its caller does not count.
    """

    def __init__(self, size: int, batch_size: int, *, rank: int, world_size: int):
        slots = -(-size // world_size)
        mine = range(rank, slots * world_size, world_size)
        self.indices = [min(index, size - 1) for index in mine]
        self.filler = size - 1 if slots and mine[-1] >= size else None
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first : first + self.batch_size]]


class KeyedDataset(Dataset):
    """Any map-style dataset of {"pixel_values", "labels"}, addressed by (epoch, index)."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict:
        item = self.dataset[key[1]]
        return {
            "pixel_values": torch.as_tensor(item["pixel_values"]),
            "labels": as_label(item["labels"]),
            "index": key[1],
            "name": f"item {key[1]}",
        }


def as_label(label: Any) -> int | torch.Tensor:
    """A class number, or the float32 vector of several labels or numbers."""
    values = torch.as_tensor(label)
    return int(values) if values.ndim == 0 and not values.is_floating_point() else values.float().reshape(-1)


def keyed(dataset: Dataset | None) -> Dataset | None:
    """The data set, wrapped if it cannot be addressed by (epoch, index)."""
    ours = dataset is None or isinstance(dataset, ImageDataset | ImageStream | KeyedDataset)
    return dataset if ours else KeyedDataset(dataset)


def known_labels(dataset: Dataset, option: str) -> np.ndarray:
    """The labels of a data set, int (n,), known without reading images.

    Args:
        option: that needs them, for the error.

    Raises:
        HFViTError: a stream, or a data set of the user's own without `labels`.
    """
    labels = getattr(dataset.dataset if isinstance(dataset, KeyedDataset) else dataset, "labels", None)
    if labels is None:
        raise HFViTError(
            f"{option} has to know all labels first: leave out --streaming, or give the data set an attribute `labels`"
        )
    return np.asarray(labels)


def stack(items: list[dict]) -> dict:
    """Collate for `KeyedDataset`."""
    return {
        "pixel_values": default_collate([item["pixel_values"] for item in items]),
        "labels": stack_labels([item["labels"] for item in items]),
        "index": torch.tensor([item["index"] for item in items]),
        "unreadable": [],
    }
