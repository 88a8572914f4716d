"""Pictures read in order, without a local copy, and without losing the place.

A stream is a list of chunks (row groups of parquet files, runs of records in tar shards) whose sizes are known before
any picture is read. An epoch is a random order of the chunks; a window of some thousand records is read ahead and
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
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from hf_vit.errors import HFViTError

from .augmentation import PictureTransform
from .columns import class_label_rows, find_image_column, find_label_column, integer_rows, string_rows
from .data import Transform, View, check_reading
from .pictures import UnreadableImage, one_line, open_picture
from .randomness import STREAM, SUBSET, generator
from .shards import TarIndex, expand_shards, is_shard_pattern, load_index, shards_by_split
from .sources import (
    SPLIT_NAMES,
    Columns,
    SyntheticSource,
    by_split,
    digest,
    listed,
    only_for_tables,
    only_on_the_hub,
    relabel,
    synthetic_door,
)
from .tables import hub_files


WINDOW = 2048  # records that are read ahead and shuffled; two windows are in memory
RUN = 256  # records of a tar shard that are read at once
READERS = 16  # connections for the footers of parquet files

Encoded = tuple[bytes | None, int, str]  # the picture's bytes, its label, its name


@dataclass(frozen=True)
class Record:
    """One encoded picture on its way to a worker: a key of `ImageStream`."""

    data: bytes | None
    label: int
    name: str
    epoch: int
    index: int


class Chunks(Protocol):
    """Something that is read a chunk at a time. `sizes`: records per chunk, int64."""

    sizes: np.ndarray
    label_names: list[str]
    fingerprint: str

    def read(self, chunk: int) -> list[Encoded]:
        """All records of a chunk, in order."""

    def open(self, data: bytes, name: str) -> Image.Image:
        """A record's picture, in the worker that decodes it."""
        return open_picture(data, name)

    def drawn_for(self, height: int, width: int) -> "Chunks":
        """The same for a transform's result of that size."""
        return self


@dataclass(frozen=True)
class ImageStream(torch.utils.data.Dataset):
    """Labelled pictures in chunks; `order` says which come when, and its keys carry their bytes.

    Attributes:
        chunks: what is read. fraction: share of the records to keep; a smaller share lies inside a larger one.
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
        """Changes when the files, labels or the kept share do."""
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
        """Records of a chunk that belong to the kept share."""
        return np.flatnonzero(generator(SUBSET, 0, 2, chunk).random(int(self.chunks.sizes[chunk])) < self.fraction)

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def with_transform(self, transform: Transform | None, seed: int = 0) -> "ImageStream":
        """The same stream seen through `transform(picture, rng) -> uint8 (H, W, C)`."""
        chunks = self.chunks
        if isinstance(transform, PictureTransform):
            chunks = chunks.drawn_for(*transform.image_size_hw)
        return replace(self, chunks=chunks, transform=transform, seed=seed)

    def __getitem__(self, record: Record) -> dict[str, Any]:
        """Decode a record to an item, as `ImageDataset` does; the randomness is that of (seed, epoch, index)."""

        def opened():
            if record.data is None:
                raise UnreadableImage(f"{record.name}: the row holds no picture")
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
    ) -> "StreamOrder":
        """Batch sampler of one process, from `position` to `stop` pictures of all processes together."""
        return StreamOrder(self, batch_size, seed, position, stop, rank, world_size)


class StreamOrder:
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
                f"a run at picture {position} cannot go on with {world_size} processes: take as many as "
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
        """Neighbouring chunks, as many as fill a window."""
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


# What is read


@dataclass(frozen=True)
class TarChunks(Chunks):
    """Runs of neighbouring records in tar shards, each read as one range of bytes."""

    index: TarIndex
    first: np.ndarray  # record with which each run begins
    sizes: np.ndarray
    label_names: list[str]
    fingerprint: str

    @classmethod
    def of(cls, index: TarIndex, fingerprint: str) -> "TarChunks":
        """Cut the shards of an index into runs of at most `RUN` records."""
        first: list[int] = []
        sizes: list[int] = []
        bounds = np.flatnonzero(np.diff(index.shard, prepend=-1, append=-1))
        for begin, end in pairwise(bounds):
            starts = np.arange(begin, end, RUN)
            first += starts.tolist()
            sizes += np.diff(starts, append=end).tolist()
        arrays = np.array(first, dtype=np.int64), np.array(sizes, dtype=np.int64)
        return cls(index, *arrays, index.label_names, fingerprint)

    def read(self, chunk: int) -> list[Encoded]:
        import fsspec

        index, rows = self.index, range(self.first[chunk], self.first[chunk] + self.sizes[chunk])
        begin, end = int(index.offset[rows[0]]), int(index.offset[rows[-1]] + index.size[rows[-1]])
        url = index.urls[index.shard[rows[0]]]
        data = cat_range(*fsspec.core.url_to_fs(url), begin, end)
        return [
            (data[place : place + size], int(index.labels[row]), index.name(row))
            for row, place, size in zip(rows, index.offset[rows] - begin, index.size[rows])
        ]


def cat_range(files: Any, path: str, begin: int, end: int) -> bytes:
    """A range of bytes of a file."""
    try:
        return files.cat_file(path, begin, end)
    except Exception as error:  # every file system of fsspec has its own
        raise HFViTError(f"cannot read '{path}' any more ({one_line(error)}); the run can be resumed") from error


@dataclass(frozen=True)
class ParquetChunks(Chunks):
    """Row groups of parquet files, of which only the columns of pictures and labels are read."""

    urls: list[str]
    footers: list[Any]  # pyarrow.parquet.FileMetaData
    file: np.ndarray  # of each row group
    group: np.ndarray  # its number in its file
    sizes: np.ndarray
    image_column: str
    label_column: str
    own_names: list[str] | None  # of a ClassLabel column
    label_names: list[str]
    name: str
    fingerprint: str

    @classmethod
    def of(cls, name: str, urls: list[str], columns: Columns) -> "ParquetChunks":
        """Read the footers, several at a time.

        Raises:
            HFViTError: unreadable files, unclear columns, or classes that nobody named.
        """
        import datasets

        with ThreadPoolExecutor(READERS) as readers:
            footers = list(readers.map(read_footer, urls))
        features = datasets.Features.from_arrow_schema(footers[0].schema.to_arrow_schema())
        image_column = find_image_column(name, features, columns.image)
        label_column = find_label_column(name, features, columns.label, image_column)
        feature = features[label_column]
        own = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        label_names = columns.label_names or own
        if label_names is None:
            raise HFViTError(
                f"the files of '{name}' do not name the classes of column '{label_column}', and a stream cannot look "
                "for them; train without --streaming, or store the column as ClassLabel"
            )
        counts = [[file.row_group(group).num_rows for group in range(file.num_row_groups)] for file in footers]
        numbers = np.repeat(np.arange(len(urls)), [len(groups) for groups in counts])
        groups = np.concatenate([np.arange(len(groups)) for groups in counts]).astype(np.int64)
        sizes = np.array([rows for groups in counts for rows in groups], dtype=np.int64)
        names = [os.path.basename(url) for url in urls]
        mark = digest(*names, *(file.serialized_size for file in footers), sizes.tobytes(), *label_names)
        return cls(urls, footers, numbers, groups, sizes, image_column, label_column, own, label_names, name, mark)

    def read(self, chunk: int) -> list[Encoded]:
        import fsspec
        from pyarrow import parquet

        number, group = int(self.file[chunk]), int(self.group[chunk])
        url = self.urls[number]
        try:
            with fsspec.open(url, "rb") as file:
                reader = parquet.ParquetFile(file, metadata=self.footers[number])
                table = reader.read_row_group(group, columns=[self.image_column, self.label_column])
        except Exception as error:  # pyarrow's and every file system's own
            raise HFViTError(f"cannot read '{url}' any more ({one_line(error)}); the run can be resumed") from error
        pictures = table.column(self.image_column).to_pylist()
        labels = self.numbered(table.column(self.label_column).to_pylist())
        name = os.path.basename(url)
        return [
            (picture["bytes"] if isinstance(picture, dict) else picture, int(label), f"{name}[{group}, {row}]")
            for row, (picture, label) in enumerate(zip(pictures, labels))
        ]

    def numbered(self, values: list) -> np.ndarray:
        """Values of the label column as numbers that count in `label_names`."""
        if self.own_names is not None:
            labels = class_label_rows(self.name, self.label_column, values)
            if self.own_names == self.label_names:
                return labels
            return relabel(labels, self.own_names, self.label_names, f"'{self.name}'")
        convert = string_rows if isinstance(values[0], str) else integer_rows
        return convert(self.name, self.label_column, values, self.label_names)[0]


def read_footer(url: str) -> Any:
    """The metadata of a parquet file."""
    import fsspec
    from pyarrow import parquet

    try:
        with fsspec.open(url, "rb") as file:
            return parquet.read_metadata(file)
    except Exception as error:  # pyarrow's and every file system's own
        raise HFViTError(f"cannot read '{url}' as parquet ({one_line(error)})") from error


@dataclass(frozen=True)
class SyntheticChunks(Chunks):
    """Runs of generated pictures; a record carries its number, and the worker draws it."""

    source: SyntheticSource
    numbers: np.ndarray  # of each class among `label_names`
    sizes: np.ndarray
    label_names: list[str]
    fingerprint: str

    @classmethod
    def of(cls, name: str, split: str, label_names: list[str] | None) -> "SyntheticChunks":
        """Cut a split of a set into runs of at most `RUN` pictures."""
        source = synthetic_door(name).load(split)
        own, wanted = source.label_names, label_names or source.label_names
        numbers = relabel(np.arange(len(own)), own, wanted, f"'{name}'")
        sizes = np.diff(np.arange(0, len(source.labels), RUN), append=len(source.labels))
        return cls(source, numbers, sizes, wanted, source.fingerprint)

    def read(self, chunk: int) -> list[Encoded]:
        rows = range(chunk * RUN, chunk * RUN + int(self.sizes[chunk]))
        labels = self.numbers[self.source.labels[rows.start : rows.stop]]
        return [(row.to_bytes(8, "little"), int(label), self.source.name(row)) for row, label in zip(rows, labels)]

    def open(self, data: bytes, name: str) -> Image.Image:
        return self.source.open(int.from_bytes(data, "little"))

    def drawn_for(self, height: int, width: int) -> "SyntheticChunks":
        return replace(self, source=self.source.drawn_for(height, width))


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
        fraction: share of the records to keep; nested, but drawn record by record, so not stratified.
        window: records that are read ahead and shuffled.
        Others as of `open_dataset`. Shards are indexed when they are first opened: one pass over them, kept on disk.

    Raises:
        HFViTError: with cause and way out, for anything the user can mend.
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
            raise HFViTError(f"{fraction:g} of the pictures of split '{split}' of '{name}' is none; raise it")
        raise HFViTError(f"split '{split}' of '{name}' is empty")
    return stream


def stream_files(name: str, config_name: str | None, cache_dir: str | os.PathLike | None) -> dict[str, list[str]]:
    """The tar shards or parquet files of each split that can be streamed; of generated pictures none."""
    path = Path(name).expanduser()
    is_files = is_shard_pattern(name) or name.split("?")[0].endswith(".parquet")
    if name == "digits" or name.startswith("synthetic:") or is_files or path.is_dir():
        only_on_the_hub(name, config_name)
    if name == "digits":
        raise HFViTError("the digits are all in memory: leave out --streaming")
    if name.startswith("synthetic:"):
        return {split: [] for split in synthetic_door(name).splits}
    if path.is_dir():
        shards = [str(file) for file in sorted(path.glob("*.tar"))]
        if shards:
            return shards_by_split(shards)
        tables = sorted(str(file.relative_to(path)) for file in path.rglob("*.parquet"))
        if not tables:
            raise HFViTError(
                f"'{name}' holds neither .tar nor .parquet files; folders of pictures need no --streaming"
            )
        return {split: [str(path / file) for file in files] for split, files in by_split(tables).items()}
    if is_files:
        return shards_by_split(expand_shards(name))
    splits = hub_files(name, config_name, cache_dir)
    for files in splits.values():
        if not all(is_shard_pattern(file) or file.endswith(".parquet") for file in files):
            raise HFViTError(f"'{name}' is stored in files that cannot be streamed; train without --streaming")
    return splits
