"""The chunks of a stream: parts of tar shards, parquet files, or sets of generated images.

For streaming.py. The sizes of all chunks are known before any image is read; a record stays encoded, as bytes, until a
worker opens it. Shards and generated sets are cut into short runs of neighbors, so that a window of a stream has
records from many places; shards sorted by class are cut into single records.

Tests: tests/training/data/shards/test_streaming.py.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from hf_vit.errors import HFViTError
from hf_vit.image_io import one_line, open_encoded

from ..sources import Columns, SyntheticSource, digest, relabel, synthetic_reader
from ..tables.columns import class_label_rows, find_image_column, find_label_column, label_rows
from .webdataset import LabelledShards


RUN_LENGTH = 8  # neighboring records of a tar shard, or images of a generated set, that are read at once
SORTED = 0.1  # excess over chance of neighbors that share their class, from which shards count as sorted by class
READERS = 16  # connections for the footers of parquet files

Encoded = tuple[bytes | str, int, str]  # the image's bytes, or why there are none; its label, its name


class Chunks(Protocol):
    """Data that are read chunk by chunk. `sizes`: records of each chunk, int (chunks,)."""

    sizes: np.ndarray
    label_names: list[str]
    fingerprint: str

    def read(self, chunk: int) -> list[Encoded]:
        """All records of a chunk, in order."""

    def open(self, data: bytes, name: str) -> Image.Image:
        """A record's image, in the worker that decodes it."""
        return open_encoded(data, name)

    def drawn_for(self, height: int, width: int) -> "Chunks":
        """The same chunks for a transform of this image size."""
        return self


@dataclass(frozen=True)
class TarChunks(Chunks):
    """Runs of neighboring records in tar shards, each read as one range of bytes."""

    shards: LabelledShards
    shard: np.ndarray  # of each run
    first: np.ndarray  # record with which each run begins
    sizes: np.ndarray
    label_names: list[str]
    fingerprint: str

    @classmethod
    def of(cls, shards: LabelledShards, run_length: int) -> "TarChunks":
        """Cut the shards of an index into runs of at most `run_length` records."""
        kind = np.int32 if len(shards.index) < 2**31 else np.int64  # of single records there are as many as images
        begins = shards.index.first.astype(kind)
        runs = -(-np.diff(begins) // run_length)  # of each shard
        within = np.arange(runs.sum(), dtype=kind) - np.repeat((np.cumsum(runs) - runs).astype(kind), runs)
        first = np.repeat(begins[:-1], runs) + within * kind(run_length)
        sizes = np.minimum(kind(run_length), np.repeat(begins[1:], runs) - first)
        shard = np.repeat(np.arange(len(runs), dtype=kind), runs)
        return cls(shards, shard, first, sizes, shards.label_names, shards.fingerprint)

    def read(self, chunk: int) -> list[Encoded]:
        shard, first, count = int(self.shard[chunk]), int(self.first[chunk]), int(self.sizes[chunk])
        images, names = self.shards.read(shard, first, count), self.shards.index.names(shard, first, count)
        return list(zip(images, self.shards.labels[first : first + count].tolist(), names))


@dataclass(frozen=True)
class ParquetChunks(Chunks):
    """Row groups of parquet files; only the columns of images and labels are read."""

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
            HFViTError: unreadable files, unclear columns, or classes without names.
        """
        import datasets

        with ThreadPoolExecutor(READERS) as readers:
            footers = list(readers.map(read_footer, urls))
        features = datasets.Features.from_arrow_schema(footers[0].schema.to_arrow_schema())
        image_column = find_image_column(name, features, columns.image)
        label_column = find_label_column(name, features, columns.label, image_column)
        feature = features[label_column]
        class_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        label_names = columns.label_names or class_names
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
        fingerprint = digest(*names, *(file.serialized_size for file in footers), sizes.tobytes(), *label_names)
        return cls(
            urls, footers, numbers, groups, sizes, image_column, label_column, class_names, label_names, name,
            fingerprint,
        )  # fmt: skip

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
        images = table.column(self.image_column).to_pylist()
        labels = self.numbered(table.column(self.label_column).to_pylist())
        name = os.path.basename(url)
        return [
            (bytes_of(image), int(label), f"{name}[{group}, {row}]")
            for row, (image, label) in enumerate(zip(images, labels))
        ]

    def numbered(self, values: list) -> np.ndarray:
        """Values of the label column as indices into `label_names`."""
        if self.own_names is not None:
            labels = class_label_rows(self.name, self.label_column, values)
            if self.own_names == self.label_names:
                return labels
            return relabel(labels, self.own_names, self.label_names, f"'{self.name}'")
        return label_rows(self.name, self.label_column, values, self.label_names)[0]


def default_run_length(labels: np.ndarray) -> int:
    """Number of neighbors to read at once: one if shards are sorted by class, else RUN_LENGTH.

    With runs of sorted shards, each window would have few classes, which are learned and forgotten again; measured by
    `benchmarks/scale.py --parts losses`.

    Args:
        labels: int (n,), in the order of the records.
    """
    chance = float(np.square(np.bincount(labels) / len(labels)).sum())
    same = float(np.mean(labels[1:] == labels[:-1])) if len(labels) > 1 else 0.0
    return 1 if same - chance > SORTED * (1 - chance) else RUN_LENGTH


def bytes_of(image: Any) -> bytes | str:
    """The bytes in a row of an image column, or the reason why there are none."""
    data = image.get("bytes") if isinstance(image, dict) else image
    return "the row holds no image" if data is None else data


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
    """Runs of generated images; a record's bytes are its number, from which the worker draws it."""

    source: SyntheticSource
    numbers: np.ndarray  # of each class among `label_names`
    first: np.ndarray  # image with which each run begins
    sizes: np.ndarray
    label_names: list[str]
    fingerprint: str

    @classmethod
    def of(cls, name: str, split: str, label_names: list[str] | None, run_length: int) -> "SyntheticChunks":
        """Cut a split of a set into runs of at most `run_length` images."""
        source = synthetic_reader(name).load(split)
        source_names, requested = source.label_names, label_names or source.label_names
        numbers = relabel(np.arange(len(source_names)), source_names, requested, f"'{name}'")
        first = np.arange(0, len(source.labels), run_length)
        sizes = np.diff(first, append=len(source.labels))
        return cls(source, numbers, first, sizes, requested, source.fingerprint)

    def read(self, chunk: int) -> list[Encoded]:
        rows = range(int(self.first[chunk]), int(self.first[chunk] + self.sizes[chunk]))
        labels = self.numbers[self.source.labels[rows.start : rows.stop]]
        return [(row.to_bytes(8, "little"), int(label), self.source.name(row)) for row, label in zip(rows, labels)]

    def open(self, data: bytes, name: str) -> Image.Image:
        return self.source.open(int.from_bytes(data, "little"))

    def drawn_for(self, height: int, width: int) -> "SyntheticChunks":
        return replace(self, source=self.source.drawn_for(height, width))
