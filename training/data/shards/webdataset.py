"""WebDataset tar shards as a data source: splits, class names, and single images.

shard_index.py has the position of each image, so that shards on a local disk are a map-style data set (`TarSource`),
and remote ones can be streamed (streaming.py). Labels that are numbers are the names of their classes, unless a
`label_names.json` next to the shards, a list, names the classes.

Tests: tests/training/data/shards/test_streaming.py.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hf_vit.errors import HFViTError
from hf_vit.image_io import UnreadableImage, one_line, open_encoded

from ..folders import index_folder
from ..sources import (
    SPLIT_IN_FILE_NAME,
    SPLIT_NAMES,
    Columns,
    Reader,
    classes_in_turn,
    digest,
    only_one_class,
    relabel,
)
from ..tables.columns import grouped, integer_rows, refuse_unlabelled
from .shard_files import CHANGED, ShardChanged, file_system, folder_of, is_remote, read_range, with_local_copies
from .shard_index import ShardIndex, open_index
from .shard_records import Label
from .tar_headers import BLOCK, DamagedTar, content_length


NAMES_FILE = "label_names.json"


@dataclass(frozen=True)
class LabelledShards:
    """Records of tar shards with checked labels: int64 (n,), indices into `label_names`."""

    index: ShardIndex
    labels: np.ndarray
    label_names: list[str]
    fingerprint: str

    def read(self, shard: int, first: int, count: int) -> list[bytes | str]:
        """The bytes of neighboring records of one shard, read as one range; for each missing one a reason.

        Raises:
            HFViTError: the shard cannot be reached.
        """
        rows = slice(first, first + count)
        offsets, lengths = self.index.offset[rows].tolist(), self.index.length[rows].tolist()
        begin = offsets[0] - BLOCK  # with the header, which shows whether this is still the shard of the index
        try:
            data = read_range(self.index.shards[shard], begin, offsets[-1] + lengths[-1])
        except ShardChanged as error:
            return [str(error)] * count
        return [image_at(data, offset - begin, length) for offset, length in zip(offsets, lengths)]


def image_at(data: bytes, offset: int, length: int) -> bytes | str:
    """The image at a position in a shard's bytes, or the reason why it is not there."""
    image = data[offset : offset + length]
    try:
        same = len(image) == length == content_length(data[offset - BLOCK : offset])
    except DamagedTar:
        same = False
    return image if same else CHANGED


@dataclass(frozen=True)
class TarSource:
    """Images in tar shards on a local disk, by record."""

    shards: LabelledShards
    labels: np.ndarray
    label_names: list[str]
    fingerprint: str
    sorted_by_class: bool = False

    def open(self, row: int) -> Image.Image:
        (data,) = self.shards.read(self.shards.index.shard_of(row), row, 1)
        if isinstance(data, str):
            raise UnreadableImage(f"{self.name(row)}: {data}")
        return open_encoded(data, self.name(row))

    def name(self, row: int) -> str:
        return self.shards.index.name(row)


def shards_reader(name: str, files: list[str], columns: Columns, cache_dir: str | os.PathLike | None) -> Reader:
    """Reader of tar shards on a local disk."""
    if any(is_remote(file) for file in files):
        raise HFViTError(f"'{name}' lies elsewhere; stream it (--streaming), or copy the shards to this machine")
    if columns.group is not None:
        raise HFViTError(f"'{name}' is no table and has no column '{columns.group}': leave out --group_column")
    splits = shards_by_split(files)
    notes: list[str] = []
    damaged: list[str] = []

    def load(split: str) -> TarSource:
        shards = open_shards(name, splits[split], columns, cache_dir, notes.append)
        if left_out := shards.index.left_out():
            notes.append(f"left out in '{name}': {left_out}")
            damaged.append(left_out)
        in_turn = classes_in_turn(shards.labels)
        return TarSource(shards, shards.labels, shards.label_names, shards.fingerprint, in_turn)

    return Reader(name, list(splits), load, notes, damaged, by_names=True)


def shards_by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Shards by split, from their file name, else from their folder's name, else "train"."""
    splits: dict[str, list[str]] = {}
    for file in files:
        folder, base = os.path.split(file.split("?")[0])
        matches = SPLIT_IN_FILE_NAME.findall(base)
        word = matches[-1] if matches else os.path.basename(folder)
        splits.setdefault(SPLIT_NAMES.get(word.lower(), "train"), []).append(file)
    return splits


def open_shards(
    name: str,
    urls: list[str],
    columns: Columns,
    cache_dir: str | os.PathLike | None,
    log: Callable[[str], None],
) -> LabelledShards:
    """The records of shards with checked labels.

    Args:
        log: called with lines about the index: that it is built, or that a stored one is damaged.
    """
    cache = index_folder(cache_dir)
    index = open_index(with_local_copies(urls, cache, log), cache, log)
    labels, label_names = labels_of(index, name, columns, names_beside(urls[0]))
    names = [os.path.basename(url) for url in urls]
    shard = np.repeat(np.arange(len(urls)), np.diff(index.first))
    arrays = (shard, index.offset, index.length, labels)
    fingerprint = digest(*names, *label_names, *(array.tobytes() for array in arrays))
    return LabelledShards(index, labels, label_names, fingerprint)


def labels_of(
    index: ShardIndex, name: str, columns: Columns, beside: list[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Labels and class names: those of `columns`, those in or next to the shards, or the numbers themselves.

    Args:
        beside: from `names_beside`.

    Raises:
        HFViTError: labels below 0, or above the number of names; columns, which shards do not have.
    """
    only_one_class(name, columns, "is tar shards, which have one class for each image")
    requested, group = grouped(columns.label if isinstance(columns.label, str) else None, ())
    if columns.image is not None or requested not in (None, "cls") or isinstance(columns.label, list):
        raise HFViTError(
            f"'{name}' is tar shards, which have no columns: the image is the first of a record, the label its .cls "
            "or the label in its .json; leave out --image_column and --label_column"
        )
    counts = np.bincount(index.code, minlength=len(index.values))
    used = np.flatnonzero(counts)  # the rest works on the different labels only, of which there are few
    labels, label_names = number_labels([index.values[code] for code in used])
    if label_names:
        if columns.label_names is not None:
            labels = relabel(labels, label_names, columns.label_names, f"'{name}'")
            label_names = columns.label_names
    else:
        if (labels < 0).any():
            refuse_unlabelled(name, "cls", np.repeat(labels, counts[used]))
        own = columns.label_names
        if group is not None:
            labels = labels // group
        else:
            own = beside or own
        labels, label_names = integer_rows(name, "cls", labels.astype(int).tolist(), own, len(index))
        if group is None and columns.label_names is not None and columns.label_names != label_names:
            labels, label_names = relabel(labels, label_names, columns.label_names, f"'{name}'"), columns.label_names
    table = np.zeros(len(index.values), dtype=np.int64)
    table[used] = labels
    same = np.array_equal(table[used], used)  # the usual case, in which all processes share the index's own column
    return (index.code if same else table[index.code]), label_names


def number_labels(values: list[Label]) -> tuple[np.ndarray, list[str]]:
    """Labels as numbers, and class names: of strings in sorted order; of numbers only if each has a name."""
    pairs = {value for value in values if isinstance(value, tuple)}
    names_of = dict(pairs)
    complete = sorted(names_of) == list(range(len(names_of))) and len(set(names_of.values())) == len(pairs)
    if pairs and complete and all(isinstance(value, tuple) for value in values):
        return np.array([number for number, _ in values], dtype=np.int64), [names_of[n] for n in range(len(names_of))]
    values = [value[0] if isinstance(value, tuple) else value for value in values]
    if all(isinstance(value, int) for value in values):
        return np.array(values, dtype=np.int64), []
    names = sorted({str(value) for value in values})
    number_of = {name: number for number, name in enumerate(names)}
    return np.array([number_of[str(value)] for value in values], dtype=np.int64), names


def names_beside(shard: str) -> list[str] | None:
    """The class names in the `label_names.json` next to a shard; None without one.

    Raises:
        HFViTError: it is not a list of different names.
    """
    path = f"{folder_of(shard) or '.'}/{NAMES_FILE}"
    if is_remote(shard):
        files, inner = file_system(path)
        try:
            data = files.cat_file(inner)
        except Exception:  # every file system of fsspec has its own; most shards have no names beside them
            return None
    elif Path(path).is_file():
        data = Path(path).read_bytes()
    else:
        return None
    try:
        names = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HFViTError(f"'{path}' is not JSON ({one_line(error)})") from error
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise HFViTError(f"'{path}' must hold a list of the classes' names, each once")
    return names
