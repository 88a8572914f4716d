"""Images read in order, without a local copy, and without losing the place.

A stream is a list of chunks (row groups of parquet files, records or short runs of them in tar shards) whose sizes are
known before any image is read. An epoch is a random order of the chunks; a window of some thousand records is read
ahead, by several threads, and shuffled. Which record stands where is a pure function of (seed, process, number of
processes, position), so the position alone restores a run, and nothing that came before is read again.

The process reads encoded bytes (one window ahead) and its workers decode them: the batch sampler's keys carry the
bytes. So the number of workers changes nothing. Each process reads its own chunks of every epoch: together they read
every record exactly once.

    stream = open_stream("shards/train-{000..127}.tar", split="train").with_transform(TrainTransform(224), seed=0)
    order = stream.order(batch_size=64, seed=0, position=0, stop=64_000)
    loader = DataLoader(stream, batch_sampler=order, collate_fn=collate, num_workers=4)
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_vit.errors import HFViTError, listed
from hf_vit.image_io import UnreadableImage

from ..rng import STREAM, SUBSET, generator, hashed
from .chunks import RUN_LENGTH, Chunks, ParquetChunks, SyntheticChunks, TarChunks, default_run_length
from .dataset import Transform, View, check_reading
from .shard_files import expand_shards, is_shard_pattern
from .sources import SPLIT_NAMES, Columns, by_split, digest, only_for_tables, only_on_the_hub, synthetic_reader
from .tables import hub_files
from .transforms import ImageTransform
from .webdataset import LabelledShards, open_shards, shards_by_split


BUFFER_SIZE = 4096  # records that are read ahead and shuffled; two such windows are in memory
READ_THREADS = 16


class Record(NamedTuple):
    """One encoded image on its way to a worker: a key of `ImageStream`."""

    data: bytes | str  # a sentence: why there are no bytes
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

    @property
    def label_names(self) -> list[str]:
        """What the classes are called."""
        return self.chunks.label_names

    @property
    def fingerprint(self) -> str:
        """Changes when the files, labels or the kept fraction do."""
        if self.fraction == 1.0:
            return self.chunks.fingerprint
        return digest(self.chunks.fingerprint, self.fraction, "by record")

    @cached_property
    def sizes(self) -> np.ndarray:
        """Kept records per chunk, int64."""
        if self.fraction == 1.0:
            return self.chunks.sizes
        kept = np.concatenate([[0], np.cumsum(self._is_kept(0, int(self.chunks.sizes.sum())))])
        return kept[self.starts + self.chunks.sizes] - kept[self.starts]

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of each chunk's first record in the whole set, int64."""
        return (np.cumsum(self.chunks.sizes) - self.chunks.sizes).astype(np.int64)

    def kept(self, chunk: int) -> np.ndarray:
        """Records of a chunk that belong to the kept fraction."""
        return np.flatnonzero(self._is_kept(int(self.starts[chunk]), int(self.chunks.sizes[chunk])))

    def _is_kept(self, first: int, count: int) -> np.ndarray:
        """Which of some neighboring records belong to the kept fraction, drawn for each however they are cut."""
        words = hashed(SUBSET, 0, np.arange(first, first + count), 2)
        return (words >> np.uint64(11)) * 2.0**-53 < self.fraction

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
                f"'{stream.name}' has {filled} chunks (row groups, or runs of --shuffle_run_length records) for "
                f"{world_size} processes; write it in smaller ones, or train without --streaming"
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

    def windows(self, place: int) -> Iterator[tuple[int, int, np.ndarray, int]]:
        """(epoch, number of the window, its chunks, records to leave out in front) from a place on, endless."""
        epoch = 0
        while place >= (size := int(self.stream.sizes[self.lane(epoch)].sum())):
            place -= size
            epoch += 1
        while True:
            lane = self.lane(epoch)
            for number, (begin, stop, size) in enumerate(self.cut(self.stream.sizes[lane])):
                if place < size:
                    yield epoch, number, lane[begin:stop], place
                place = max(0, place - size)
            epoch += 1

    def cut(self, sizes: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(begin, stop, records) of windows: neighboring chunks, as many as fill the buffer."""
        ends = np.cumsum(sizes)
        begin = before = 0
        while begin < len(ends):
            stop = min(int(np.searchsorted(ends, before + self.stream.buffer_size)) + 1, len(ends))
            yield begin, stop, int(ends[stop - 1]) - before
            begin, before = stop, int(ends[stop - 1])

    def load(
        self, readers: ThreadPoolExecutor, epoch: int, number: int, chunks: np.ndarray, skip: int
    ) -> list[Record]:
        """The records of a window in their shuffled order, without the first `skip`."""
        threads = self.stream.read_threads

        def read(thread: int) -> list[list[Record]]:
            return [self.stream.read(int(chunk), epoch) for chunk in chunks[thread::threads]]

        parts = list(readers.map(read, range(min(threads, len(chunks)))))
        # Back in the chunks' order, whichever thread was first: the window is the same for any number of threads.
        records = [record for place in range(len(chunks)) for record in parts[place % threads][place // threads]]
        order = generator(STREAM, self.seed, epoch, 1 + number, self.rank).permutation(len(records))
        return [records[place] for place in order[skip:].tolist()]

    def records(self, place: int) -> Iterator[Record]:
        """This process's records from a place in its row on, endless; the next window is read meanwhile."""
        windows = self.windows(place)
        with ThreadPoolExecutor(self.stream.read_threads) as readers, ThreadPoolExecutor(max_workers=1) as ahead:
            pending = ahead.submit(self.load, readers, *next(windows))
            while True:
                ready = pending.result()
                pending = ahead.submit(self.load, readers, *next(windows))
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
    buffer_size: int = BUFFER_SIZE,
    run_length: int | None = None,
    read_threads: int = READ_THREADS,
    log: Callable[[str], None] | None = None,
) -> ImageStream:
    """Open one split as a stream.

    Args:
        name: tar shards ("path/train-{000..127}.tar", also a URL or a folder), parquet files (a file, folder or URL
            pattern), the id of a Hub data set that is stored as parquet or tar, or "synthetic:NAME".
        split: the name of a split. Slices need a copy: `open_dataset`.
        fraction: share of the records to keep; nested, but drawn record by record, so not stratified.
        buffer_size: records that are read ahead and shuffled.
        run_length: neighboring records of a shard that are read at once; None: 8, but 1 where shards are sorted by
            class. Longer runs mean fewer reads.
        read_threads: runs or row groups that are read at once.
        log: called with what was assumed and left out, a line each.
        Others as of `open_dataset`. Shards are indexed when they are first opened, from their headers; the index is
        kept (`shard_index.py`).

    Raises:
        HFViTError: with cause and way out, for anything the user can fix.
    """
    check_reading(on_unreadable, fraction)
    for option, value in (
        ("shuffle_buffer_size", buffer_size), ("shuffle_run_length", run_length), ("read_threads", read_threads)
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


def stream_shards(
    name: str,
    urls: list[str],
    columns: Columns,
    on_unreadable: str,
    cache_dir: str | os.PathLike | None,
    log: Callable[[str], None] | None,
) -> LabelledShards:
    """`open_shards`; damaged records are left out, which is said, or stop the run."""
    log = log or (lambda _: None)
    shards = open_shards(name, urls, columns, cache_dir, log)
    if left_out := shards.index.left_out():
        if on_unreadable == "stop":
            raise HFViTError(f"'{name}' has {left_out}: fix them, or leave them out (--on_decode_error skip)")
        log(f"left out in '{name}': {left_out}")
    return shards


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
