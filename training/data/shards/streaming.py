"""Streaming: images are read in order, without a local copy, and resumed from a position.

A stream is a list of chunks (row groups of parquet files, single records or short runs of them in tar shards) whose
sizes are known before any image is read. An epoch is a random order of the chunks; a window of some thousand records
is read ahead, by several threads, and shuffled. The order is a pure function of (seed, process, number of processes,
position), so that the position alone restores a run, and nothing before it is read again.

Each process reads encoded bytes, one window ahead, and its workers decode them: the batch sampler's keys carry the
bytes. The number of workers therefore changes nothing. In every epoch each process reads its own chunks, and together
they read every record exactly once.

    stream = open_stream("shards/train-{000..127}.tar", split="train").with_transform(TrainTransform(224), seed=0)
    order = stream.order(batch_size=64, seed=0, position=0, stop=64_000)
    loader = DataLoader(stream, batch_sampler=order, collate_fn=collate, num_workers=4)

Not `datasets.IterableDataset` or WebDataset's pipeline: their shuffle buffers are lost on resume.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from hf_vit.errors import HFViTError, listed
from hf_vit.image_io import UnreadableImage, readable_formats

from ...rng import STREAM, SUBSET, generator, hashed
from ..dataset import Transform, View, check_reading
from ..sources import SPLIT_NAMES, Columns, by_split, digest, only_for_tables, only_on_the_hub, synthetic_reader
from ..tables.arrow_tables import hub_files
from ..transforms import ImageTransform
from .chunks import RUN_LENGTH, Chunks, ParquetChunks, SyntheticChunks, TarChunks, default_run_length
from .shard_files import expand_shards, is_shard_pattern
from .shard_groups import ShardGroups, open_shard_groups
from .webdataset import LabelledShards, open_shards, shards_by_split


BUFFER_SIZE = 4096  # records of a window, which is read ahead and shuffled; two windows are in memory
READ_THREADS = 16
WINDOW_BITS = 32  # the windows of a part of an epoch are numbered by so many bits


class Record(NamedTuple):
    """One encoded image on its way to a worker: a key of `ImageStream`."""

    data: bytes | str  # a string: the reason why there are no bytes
    label: int
    name: str
    epoch: int
    index: int


class Window(NamedTuple):
    """Chunks of a part of a stream whose records are shuffled together, and the first `skip` then left out.

    `number` counts the windows of an epoch, with gaps between its parts.
    """

    part: "ImageStream"
    epoch: int
    number: int
    chunks: np.ndarray
    skip: int


@dataclass(frozen=True)
class ImageStream(torch.utils.data.Dataset):
    """Labelled images in chunks; the keys of its batch sampler, `order`, carry the bytes.

    Attributes:
        chunks: the files that are read. fraction: of the records to keep; smaller fractions are parts of larger ones.
        name, split, label_names, fingerprint: as in `ImageDataset`.
        buffer_size: records of a window. read_threads: chunks of a window that are read at once.
    """

    chunks: Chunks
    name: str
    split: str
    fraction: float = 1.0
    on_unreadable: str = "skip"
    transform: Transform | None = None
    seed: int = 0
    buffer_size: int = BUFFER_SIZE
    read_threads: int = READ_THREADS
    is_whole: ClassVar[bool] = True  # all chunks are known from the beginning

    @property
    def label_names(self) -> list[str]:
        """Names of the classes."""
        return self.chunks.label_names

    @property
    def fingerprint(self) -> str:
        """Changes with the files, the labels and the kept fraction."""
        if self.fraction == 1.0:
            return self.chunks.fingerprint
        return digest(self.chunks.fingerprint, self.fraction, "by record")

    @cached_property
    def sizes(self) -> np.ndarray:
        """Kept records per chunk."""
        if self.fraction == 1.0:
            return self.chunks.sizes
        counts = np.concatenate([[0], np.cumsum(self._is_kept(0, int(self.chunks.sizes.sum())))])
        return counts[self.starts + self.chunks.sizes] - counts[self.starts]

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of each chunk's first record in the whole set."""
        if isinstance(self.chunks, TarChunks):  # has them already
            return self.chunks.first
        return (np.cumsum(self.chunks.sizes) - self.chunks.sizes).astype(np.int64)

    def kept(self, chunk: int) -> np.ndarray:
        """Records of a chunk that belong to the kept fraction."""
        return np.flatnonzero(self._is_kept(int(self.starts[chunk]), int(self.chunks.sizes[chunk])))

    def _is_kept(self, first: int, count: int) -> np.ndarray:
        """Which of `count` neighboring records belong to the kept fraction."""
        # Drawn for each record, so that the choice does not depend on how records are cut into chunks.
        words = hashed(SUBSET, 0, np.arange(first, first + count), 2)
        return (words >> np.uint64(11)) * 2.0**-53 < self.fraction

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def with_transform(self, transform: Transform | None, seed: int = 0) -> "ImageStream":
        """The same stream with `transform(image, rng) -> uint8 (H, W, C)`."""
        readable_formats()  # loads Pillow's plugins: here once, not in every worker
        chunks = self.chunks
        if isinstance(transform, ImageTransform):
            chunks = chunks.drawn_for(*transform.image_size_hw)
        return replace(self, chunks=chunks, transform=transform, seed=seed)

    def __getitem__(self, record: Record) -> dict[str, Any]:
        """Decode a record to an item, as `ImageDataset` does, with random numbers from (seed, epoch, index)."""

        def opened():
            if isinstance(record.data, str):
                raise UnreadableImage(f"{record.name}: {record.data}")
            return self.chunks.open(record.data, record.name)

        view = View(self.transform, self.seed, self.on_unreadable)
        return view.item(opened, record.label, record.name, record.epoch, record.index)

    def read(self, chunk: int, epoch: int) -> list[Record]:
        """The kept records of a chunk."""
        records = self.chunks.read(chunk)
        rows = range(len(records)) if self.fraction == 1.0 else self.kept(chunk)
        return [Record(*records[row], epoch, int(self.starts[chunk] + row)) for row in rows]

    def parts(self, seed: int, stopped: threading.Event) -> Iterator[tuple[int, int, "ImageStream"]]:
        """(epoch, number of the part, chunks that are shuffled together), endless; here all chunks of an epoch.

        Args:
            stopped: set when no further parts are needed.
        """
        return ((epoch, 0, self) for epoch in itertools.count())

    def order(
        self, batch_size: int, *, seed: int, position: int, stop: int, rank: int = 0, world_size: int = 1
    ) -> "StreamSampler":
        """Batch sampler of one process, from `position` to `stop`, which count the images of all processes."""
        return StreamSampler(self, batch_size, seed, position, stop, rank, world_size)


@dataclass(frozen=True)
class ShardGroup(ImageStream):
    """One group of a `GroupedStream`. `first`: number of each chunk's first image in the whole set."""

    first: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @cached_property
    def starts(self) -> np.ndarray:
        return self.first


@dataclass(frozen=True)
class GroupedStream(ImageStream):
    """A stream whose shards are indexed while it is read, group by group. Its length is an estimate."""

    chunks: ShardGroups
    is_whole = False

    def __len__(self) -> int:
        return self.chunks.images

    @property
    def fingerprint(self) -> str:
        return self.chunks.fingerprint

    def parts(self, seed: int, stopped: threading.Event) -> Iterator[tuple[int, int, ImageStream]]:
        """(epoch, number of the group, the group), endless; the headers of the next group are read meanwhile."""
        groups = (
            (epoch, number, shards)
            for epoch in itertools.count()
            for number, shards in enumerate(self.chunks.order(seed, epoch))
        )
        with ThreadPoolExecutor(1) as ahead:
            pending = None
            for epoch, number, shards in groups:
                following = epoch, number, ahead.submit(self.chunks.group, shards, stopped)
                if pending is not None:
                    chunks, first = pending[2].result()
                    group = ShardGroup(**{**self._fields(), "chunks": chunks, "first": first})
                    yield pending[0], pending[1], group
                pending = following

    def _fields(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


class StreamSampler:
    """Lists of `Record`, endless over epochs: each epoch, a process reads every `world_size`-th chunk of a new order.

    Processes whose chunks hold fewer records begin their next epoch earlier, so that all make equally many batches.
    """

    def __init__(
        self, stream: ImageStream, batch_size: int, seed: int, position: int, stop: int, rank: int, world_size: int
    ):
        if position % world_size:
            raise HFViTError(
                f"a run at image {position} cannot go on with {world_size} processes: take as many as "
                "before, or a number that divides it"
            )
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.position, self.stop, self.rank, self.world_size = position, stop, rank, world_size
        if stream.is_whole:
            self._raise_if_few(int((stream.sizes > 0).sum()))

    def _raise_if_few(self, chunks: int) -> None:
        if chunks < self.world_size:
            raise HFViTError(
                f"'{self.stream.name}' has {chunks} chunks (row groups, or runs of --shuffle_run_length records) for "
                f"{self.world_size} processes; write it in smaller ones, or train without --streaming"
            )

    def __len__(self) -> int:
        return max(0, self.stop - self.position) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Record]]:
        records = self.records(self.position // self.world_size)
        for _ in range(len(self)):
            yield [next(records) for _ in range(self.batch_size)]

    def lane(self, epoch: int, number: int = 0, part: ImageStream | None = None) -> np.ndarray:
        """This process's chunks of a part of an epoch, in order."""
        sizes = (self.stream if part is None else part).sizes
        filled = np.flatnonzero(sizes).astype(sizes.dtype)  # half the memory where there are millions
        self._raise_if_few(len(filled) or self.world_size)  # a group of empty shards is no reason to stop
        order = generator(STREAM, self.seed, epoch, 0, number).permutation(filled)
        return order[self.rank :: self.world_size].copy()  # a view would keep the other processes' chunks in memory

    def windows(self, position: int, stopped: threading.Event) -> Iterator[Window]:
        """The windows from a position of this process on, endless."""
        for epoch, number, part in self.stream.parts(self.seed, stopped):
            lane = self.lane(epoch, number, part)
            sizes = part.sizes[lane]
            if position >= (total := int(sizes.sum())):
                position -= total
                continue
            for window, (begin, stop, size) in enumerate(self.cut(sizes)):
                if position < size:
                    yield Window(part, epoch, (number << WINDOW_BITS) + window, lane[begin:stop], position)
                position = max(0, position - size)

    def cut(self, sizes: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(begin, stop, records) of windows: neighboring chunks, as many as fill the buffer."""
        ends = np.cumsum(sizes, dtype=sizes.dtype)
        begin = before = 0
        while begin < len(ends):
            stop = min(int(np.searchsorted(ends, before + self.stream.buffer_size)) + 1, len(ends))
            yield begin, stop, int(ends[stop - 1]) - before
            begin, before = stop, int(ends[stop - 1])

    def load(self, readers: ThreadPoolExecutor, windows: Iterator[Window]) -> list[Record]:
        """The records of the next window in their shuffled order, without those before the position."""
        part, epoch, number, chunks, skip = next(windows)
        threads = self.stream.read_threads

        def read(thread: int) -> list[list[Record]]:
            return [part.read(int(chunk), epoch) for chunk in chunks[thread::threads]]

        parts = list(readers.map(read, range(min(threads, len(chunks)))))
        # Back in the chunks' order: the window must not depend on which thread is faster, or on their number.
        records = [record for index in range(len(chunks)) for record in parts[index % threads][index // threads]]
        order = generator(STREAM, self.seed, epoch, 1 + number, self.rank).permutation(len(records))
        return [records[index] for index in order[skip:].tolist()]

    def records(self, position: int) -> Iterator[Record]:
        """This process's records from a position on, endless; the next window is read meanwhile."""
        stopped = threading.Event()
        windows = self.windows(position, stopped)
        with ThreadPoolExecutor(self.stream.read_threads) as readers, ThreadPoolExecutor(max_workers=1) as ahead:
            pending = ahead.submit(self.load, readers, windows)
            try:
                while True:
                    ready = pending.result()
                    pending = ahead.submit(self.load, readers, windows)
                    yield from ready
            finally:
                stopped.set()


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
    buffer_size: int = BUFFER_SIZE,
    run_length: int | None = None,
    read_threads: int = READ_THREADS,
    group_size: int | None = None,
    log: Callable[[str], None] | None = None,
) -> ImageStream:
    """Open one split as a stream.

    Args:
        name: tar shards ("path/train-{000..127}.tar", also a URL or a folder), parquet files (a file, folder or URL
            pattern), the id of a Hub data set that is stored as parquet or tar, or "synthetic:NAME".
        split: the name of a split. Slices need a copy: see `open_dataset`.
        fraction: of the records to keep; nested, but drawn for each record, so not stratified.
        buffer_size: records that are read ahead and shuffled.
        run_length: neighboring records of a shard that are read at once; None: 8, but 1 where shards are sorted by
            class. Longer runs mean fewer reads.
        read_threads: runs or row groups that are read at once.
        group_size: shards that are indexed and mixed at a time, so that the first images come before all shards are
            indexed (`shard_groups.py`); None: all shards together.
        log: called with one line for each assumption, and for what was left out.
        Other arguments as in `open_dataset`. Shards are indexed from their headers when they are first opened; the
        index is stored (`shard_index.py`).

    Raises:
        HFViTError: with cause and way out, for anything the user can fix.
    """
    check_reading(on_unreadable, fraction)
    for option, value in (
        ("shuffle_buffer_size", buffer_size), ("shuffle_run_length", run_length), ("read_threads", read_threads),
        ("shuffle_shards", group_size),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise HFViTError(f"--{option} is at least 1, got {value}")
    names = None if label_names is None else list(label_names)
    columns = Columns(image_column, label_column, names)
    splits = stream_files(name, config_name, cache_dir)
    chosen = split if split in splits else SPLIT_NAMES.get(split.lower(), split)
    if chosen not in splits:
        hint = "; slices need a copy: train without --streaming" if "[" in split or "+" in split else ""
        raise HFViTError(f"'{name}' has no split '{split}' to stream; available: {listed(list(splits))}{hint}")
    urls = splits[chosen]
    if group_size is not None:
        if not (urls and is_shard_pattern(urls[0])) or fraction < 1:
            raise HFViTError(
                f"--shuffle_shards is for all records of tar shards: leave it out for a fraction of '{name}'"
                if fraction < 1
                else f"--shuffle_shards is for tar shards, '{name}' is none: leave it out"
            )
        groups = open_shard_groups(
            name, urls, columns, group_size, run_length, read_threads, on_unreadable, cache_dir, log or no_log
        )
        return GroupedStream(
            groups, name, split, 1.0, on_unreadable, buffer_size=buffer_size, read_threads=read_threads
        )
    if name.startswith("synthetic:"):
        only_for_tables(name, columns)
        chunks: Chunks = SyntheticChunks.of(name, chosen, names, run_length or RUN_LENGTH)
    elif is_shard_pattern(urls[0]):
        shards = stream_shards(name, urls, columns, on_unreadable, cache_dir, log)
        if run_length is None and (run_length := default_run_length(shards.labels)) == 1 and log is not None:
            log(
                f"the shards of '{name}' are sorted by class: images are read one by one, to mix them "
                "(--shuffle_run_length reads several neighbors at once)"
            )
        chunks = TarChunks.of(shards, run_length)
    else:
        chunks = ParquetChunks.of(name, urls, columns)
    if len(chunks.label_names) < 2 and names is None:
        raise HFViTError(f"'{name}' has only one class, {listed(chunks.label_names)}; a classifier needs two or more")
    stream = ImageStream(
        chunks, name, split, fraction, on_unreadable, buffer_size=buffer_size, read_threads=read_threads
    )
    if not len(stream):
        if len(replace(stream, fraction=1.0)):
            raise HFViTError(f"the fraction {fraction:g} selects no images of '{name}' (split '{split}'); increase it")
        raise HFViTError(f"split '{split}' of '{name}' is empty")
    return stream


def no_log(line: str) -> None:
    """A log that drops its lines."""


def stream_shards(
    name: str,
    urls: list[str],
    columns: Columns,
    on_unreadable: str,
    cache_dir: str | os.PathLike | None,
    log: Callable[[str], None] | None,
) -> LabelledShards:
    """`open_shards`; damaged records are left out, which is logged, or stop the run."""
    log = log or no_log
    shards = open_shards(name, urls, columns, cache_dir, log)
    if left_out := shards.index.left_out():
        if on_unreadable == "stop":
            raise HFViTError(f"'{name}' has {left_out}: fix them, or leave them out (--on_decode_error skip)")
        log(f"left out in '{name}': {left_out}")
    return shards


def stream_files(name: str, config_name: str | None, cache_dir: str | os.PathLike | None) -> dict[str, list[str]]:
    """The tar shards or parquet files of each split; empty lists for generated images.

    Raises:
        HFViTError: data that cannot be streamed.
    """
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
