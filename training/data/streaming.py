"""Images read in order, without a local copy, and without losing the place.

A stream is a list of chunks (row groups of parquet files, runs of records in tar shards) whose sizes are known before
any image is read. An epoch is a random order of the chunks; a window of some thousand records is read ahead and
shuffled. Which record stands where is a pure function of (seed, process, number of processes, position), so the
position alone restores a run, and nothing that came before is read again.

The process reads encoded bytes (in a thread, one window ahead) and its workers decode them: the batch sampler's keys
carry the bytes. So the number of workers changes nothing. Each process reads its own chunks of every epoch: together
they read every record exactly once.

    stream = open_stream("shards/train-{000..127}.tar", split="train").with_transform(TrainTransform(224), seed=0)
    order = stream.order(batch_size=64, seed=0, position=0, stop=64_000)
    loader = DataLoader(stream, batch_sampler=order, collate_fn=collate, num_workers=4)
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vit.errors import HFViTError, listed
from hf_vit.image_io import UnreadableImage

from ..rng import STREAM, SUBSET, generator
from .chunks import RUN, Chunks, ParquetChunks, SyntheticChunks, TarChunks
from .dataset import Transform, View, check_reading
from .sources import SPLIT_NAMES, Columns, by_split, digest, only_for_tables, only_on_the_hub, synthetic_reader
from .tables import hub_files
from .transforms import ImageTransform
from .webdataset import expand_shards, is_shard_pattern, load_index, shards_by_split


WINDOW = 2048  # records that are read ahead and shuffled; two windows are in memory


@dataclass(frozen=True)
class Record:
    """One encoded image on its way to a worker: a key of `ImageStream`."""

    data: bytes | None
    label: int
    name: str
    epoch: int
    index: int


@dataclass(frozen=True)
class ImageStream(torch.utils.data.Dataset):
    """Labelled images in chunks; `order` says which come when, and its keys carry their bytes.

    Attributes:
        chunks: what is read. fraction: of the records to keep; a smaller fraction lies inside a larger one.
        name, split, label_names, fingerprint: as of `ImageDataset`.
    """

    chunks: Chunks
    name: str
    split: str
    fraction: float = 1.0
    on_unreadable: str = "skip"
    transform: Transform | None = None
    seed: int = 0
    window: int = WINDOW

    @property
    def label_names(self) -> list[str]:
        """What the classes are called."""
        return self.chunks.label_names

    @property
    def fingerprint(self) -> str:
        """Changes when the files, labels or the kept fraction do."""
        return self.chunks.fingerprint if self.fraction == 1.0 else digest(self.chunks.fingerprint, self.fraction)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Kept records per chunk, int64."""
        if self.fraction == 1.0:
            return self.chunks.sizes
        return np.array([len(self.kept(chunk)) for chunk in range(len(self.chunks.sizes))], dtype=np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of each chunk's first record in the whole set, int64."""
        return np.concatenate([[0], np.cumsum(self.chunks.sizes)[:-1]]).astype(np.int64)

    def kept(self, chunk: int) -> np.ndarray:
        """Records of a chunk that belong to the kept fraction."""
        return np.flatnonzero(generator(SUBSET, 0, 2, chunk).random(int(self.chunks.sizes[chunk])) < self.fraction)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def with_transform(self, transform: Transform | None, seed: int = 0) -> "ImageStream":
        """The same stream seen through `transform(image, rng) -> uint8 (H, W, C)`."""
        chunks = self.chunks
        if isinstance(transform, ImageTransform):
            chunks = chunks.drawn_for(*transform.image_size_hw)
        return replace(self, chunks=chunks, transform=transform, seed=seed)

    def __getitem__(self, record: Record) -> dict[str, Any]:
        """Decode a record to an item, as `ImageDataset` does; the randomness is that of (seed, epoch, index)."""

        def opened():
            if record.data is None:
                raise UnreadableImage(f"{record.name}: the row holds no image")
            return self.chunks.open(record.data, record.name)

        view = View(self.transform, self.seed, self.on_unreadable)
        return view.item(opened, record.label, record.name, record.epoch, record.index)

    def read(self, chunk: int, epoch: int) -> list[Record]:
        """The kept records of a chunk."""
        records = self.chunks.read(chunk)
        rows = range(len(records)) if self.fraction == 1.0 else self.kept(chunk)
        return [Record(*records[row], epoch, int(self.starts[chunk] + row)) for row in rows]

    def order(
        self, batch_size: int, *, seed: int, position: int, stop: int, rank: int = 0, world_size: int = 1
    ) -> "StreamSampler":
        """Batch sampler of one process, from `position` to `stop` images of all processes together."""
        return StreamSampler(self, batch_size, seed, position, stop, rank, world_size)


class StreamSampler:
    """Lists of `Record`, endless over epochs: each epoch, a process reads every `world_size`-th chunk of a new order.

    Processes whose chunks hold fewer records begin their next epoch earlier, so that all make equally many batches.
    """

    def __init__(
        self, stream: ImageStream, batch_size: int, seed: int, position: int, stop: int, rank: int, world_size: int
    ):
        filled = int((stream.sizes > 0).sum())
        if filled < world_size:
            raise HFViTError(
                f"'{stream.name}' has {filled} chunks (row groups, or runs of {RUN} records) for {world_size} "
                "processes; write it in smaller ones, or train without --streaming"
            )
        if position % world_size:
            raise HFViTError(
                f"a run at image {position} cannot go on with {world_size} processes: take as many as "
                "before, or a number that divides it"
            )
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.position, self.stop, self.rank, self.world_size = position, stop, rank, world_size

    def __len__(self) -> int:
        return max(0, self.stop - self.position) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Record]]:
        records = self.records(self.position // self.world_size)
        for _ in range(len(self)):
            yield [next(records) for _ in range(self.batch_size)]

    def lane(self, epoch: int) -> np.ndarray:
        """This process's chunks of an epoch, in order."""
        filled = np.flatnonzero(self.stream.sizes)
        return filled[generator(STREAM, self.seed, epoch).permutation(len(filled))][self.rank :: self.world_size]

    def windows(self, place: int) -> Iterator[tuple[int, int, list[int], int]]:
        """(epoch, number of the window, its chunks, records to leave out in front) from a place on, endless."""
        epoch = 0
        while place >= (size := int(self.stream.sizes[self.lane(epoch)].sum())):
            place -= size
            epoch += 1
        while True:
            for number, chunks in enumerate(self.grouped(self.lane(epoch))):
                size = int(self.stream.sizes[chunks].sum())
                if place < size:
                    yield epoch, number, chunks, place
                place = max(0, place - size)
            epoch += 1

    def grouped(self, lane: np.ndarray) -> Iterator[list[int]]:
        """Neighboring chunks, as many as fill a window."""
        group: list[int] = []
        held = 0
        for chunk in lane:
            group.append(int(chunk))
            held += int(self.stream.sizes[chunk])
            if held >= self.stream.window:
                yield group
                group, held = [], 0
        if group:
            yield group

    def load(self, epoch: int, number: int, chunks: list[int], skip: int) -> list[Record]:
        """The records of a window in their shuffled order, without the first `skip`."""
        records = [record for chunk in chunks for record in self.stream.read(chunk, epoch)]
        order = generator(STREAM, self.seed, epoch, 1 + number, self.rank).permutation(len(records))
        return [records[place] for place in order[skip:]]

    def records(self, place: int) -> Iterator[Record]:
        """This process's records from a place in its row on, endless; the next window is read in a thread."""
        windows = self.windows(place)
        with ThreadPoolExecutor(max_workers=1) as reader:
            pending = reader.submit(self.load, *next(windows))
            while True:
                ready = pending.result()
                pending = reader.submit(self.load, *next(windows))
                yield from ready


def open_stream(
    name: str,
    *,
    config_name: str | None = None,
    split: str,
    image_column: str | None = None,
    label_column: str | None = None,
    fraction: float = 1.0,
    label_names: Sequence[str] | None = None,
    on_unreadable: str = "skip",
    cache_dir: str | os.PathLike | None = None,
    window: int = WINDOW,
) -> ImageStream:
    """Open one split as a stream.

    Args:
        name: tar shards ("path/train-{000..127}.tar", also a URL or a folder), parquet files (a file, folder or URL
            pattern), the id of a Hub data set that is stored as parquet or tar, or "synthetic:NAME".
        split: the name of a split. Slices need a copy: `open_dataset`.
        fraction: of the records to keep; nested, but drawn record by record, so not stratified.
        window: records that are read ahead and shuffled.
        Others as of `open_dataset`. Shards are indexed when they are first opened: one pass over them, kept on disk.

    Raises:
        HFViTError: with cause and way out, for anything the user can fix.
    """
    check_reading(on_unreadable, fraction)
    if window < 1:
        raise HFViTError(f"a window holds at least 1 record, got {window}")
    names = None if label_names is None else list(label_names)
    columns = Columns(image_column, label_column, names)
    splits = stream_files(name, config_name, cache_dir)
    chosen = split if split in splits else SPLIT_NAMES.get(split.lower(), split)
    if chosen not in splits:
        hint = "; slices need a copy: train without --streaming" if "[" in split or "+" in split else ""
        raise HFViTError(f"'{name}' has no split '{split}' to stream; available: {listed(list(splits))}{hint}")
    urls = splits[chosen]
    if name.startswith("synthetic:"):
        only_for_tables(name, columns)
        chunks: Chunks = SyntheticChunks.of(name, chosen, names)
    elif is_shard_pattern(urls[0]):
        chunks = TarChunks.of(*load_index(name, urls, columns, cache_dir))
    else:
        chunks = ParquetChunks.of(name, urls, columns)
    if len(chunks.label_names) < 2 and names is None:
        raise HFViTError(f"'{name}' has only one class, {listed(chunks.label_names)}; a classifier needs two or more")
    stream = ImageStream(chunks, name, split, fraction, on_unreadable, window=window)
    if not len(stream):
        if len(replace(stream, fraction=1.0)):
            raise HFViTError(f"the fraction {fraction:g} selects no images of '{name}' (split '{split}'); increase it")
        raise HFViTError(f"split '{split}' of '{name}' is empty")
    return stream


def stream_files(name: str, config_name: str | None, cache_dir: str | os.PathLike | None) -> dict[str, list[str]]:
    """The tar shards or parquet files of each split that can be streamed; of generated images none."""
    path = Path(name).expanduser()
    is_files = is_shard_pattern(name) or name.split("?")[0].endswith(".parquet")
    if name == "digits" or name.startswith("synthetic:") or is_files or path.is_dir():
        only_on_the_hub(name, config_name)
    if name == "digits":
        raise HFViTError("the digits are all in memory: leave out --streaming")
    if name.startswith("synthetic:"):
        return {split: [] for split in synthetic_reader(name).splits}
    if path.is_dir():
        shards = [str(file) for file in sorted(path.glob("*.tar"))]
        if shards:
            return shards_by_split(shards)
        tables = sorted(str(file.relative_to(path)) for file in path.rglob("*.parquet"))
        if not tables:
            raise HFViTError(f"'{name}' holds neither .tar nor .parquet files; folders of images need no --streaming")
        return {split: [str(path / file) for file in files] for split, files in by_split(tables).items()}
    if is_files:
        return shards_by_split(expand_shards(name))
    splits = hub_files(name, config_name, cache_dir)
    for files in splits.values():
        if not all(is_shard_pattern(file) or file.endswith(".parquet") for file in files):
            raise HFViTError(f"'{name}' is stored in files that cannot be streamed; train without --streaming")
    return splits
