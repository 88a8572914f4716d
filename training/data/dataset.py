"""Data sets of labelled images, opened by name: a folder, a table, shards, a Hub id, digits or generated images.

    train = open_dataset("path/or/hub-id", split="train").with_transform(TrainTransform(224), seed=0)
    item = train[epoch, index]      # {"pixel_values": uint8 (3, H, W), "labels": int, "index": int, "name": str}

Workers decode, crop and flip, and return uint8; normalizing and mixing run on the device. An item depends on (seed,
epoch, index) alone, neither on the number of workers nor on their order. The sources are in sources.py, folders.py,
tables/ and shards/; image formats in hf_vit/image_io.py.
"""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_vit.errors import HFViTError, listed
from hf_vit.image_files import join
from hf_vit.image_io import UnreadableImage, decode, readable_formats
from hf_vit.image_tables import SUFFIXES_OF_TABLES

from ..rng import SPLIT, TRANSFORM, generator
from .folders import METADATA_NAMES, Layout, Tree, cached_walk, folder_reader, metadata_of, read_layout
from .shards.shard_files import expand_shards, is_shard_pattern
from .shards.webdataset import shards_reader
from .sources import (
    SPLIT_NAMES,
    Columns,
    Reader,
    Source,
    SyntheticSource,
    by_split,
    digest,
    digits_split,
    only_for_tables,
    only_on_the_hub,
    problem_type_of_labels,
    relabel,
    synthetic_reader,
)
from .strata import nested_subset, shuffled_classes
from .tables.arrow_tables import hub_reader, parquet_reader, saved_reader
from .tables.in_memory import object_reader
from .tables.path_tables import metadata_reader, table_reader
from .transforms import ImageTransform


Transform = Callable[[Image.Image, np.random.Generator], np.ndarray]

SPLIT_EXPRESSION = re.compile(r"(?P<name>[^\[\]+]+?)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
ON_UNREADABLE = ("skip", "stop")
FILE_SUFFIXES = (".parquet", ".tar", *SUFFIXES_OF_TABLES)  # of names that are not Hub ids


@dataclass(frozen=True)
class View:
    """Turns an image into an item; shared by data sets and streams."""

    transform: Transform | None
    seed: int
    on_unreadable: str

    def item(
        self, open: Callable[[], Image.Image], label: int | torch.Tensor, name: str, epoch: int, index: int
    ) -> dict[str, Any]:
        """The item at (epoch, index), or {"unreadable": name and reason, "index": index}."""
        try:
            pixels = self._pixels(open(), name, epoch, index)
        except UnreadableImage as error:
            if self.on_unreadable == "stop":
                raise
            return {"unreadable": str(error), "index": index}
        tensor = torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))  # a copy: Pillow's is read-only
        return {"pixel_values": tensor, "labels": label, "index": index, "name": name}

    def _pixels(self, opened: Image.Image, name: str, epoch: int, index: int) -> np.ndarray:
        if self.transform is None:
            return np.asarray(decode(opened, name))
        rng = generator(TRANSFORM, self.seed, epoch, index)
        if isinstance(self.transform, ImageTransform):  # these decode no more of a file than they need
            return self.transform.from_file(opened, name, rng)
        return self.transform(decode(opened, name), rng)


@dataclass(frozen=True)
class ImageDataset(torch.utils.data.Dataset):
    """A map-style data set of labelled images.

    Attributes:
        source: of the images. rows: int64 (n,), the rows of the source, in order.
        labels: int64 (n,), indices into `label_names`; bool (n, K) for several labels, float32 (n, K) for numbers.
        name, split: as requested. fingerprint: changes with the images, the labels or their order.
    """

    source: Source
    rows: np.ndarray
    labels: np.ndarray
    label_names: list[str]
    name: str
    split: str
    fingerprint: str
    on_unreadable: str = "skip"
    transform: Transform | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def groups(self) -> np.ndarray | None:
        """Text (n,), equal for images that must stay together (`--group_column`); None without groups."""
        groups = getattr(self.source, "groups", None)
        return None if groups is None else groups[self.rows]

    @property
    def problem_type(self) -> str:
        """The kind of the labels, as in transformers' `config.problem_type`."""
        return problem_type_of_labels(self.labels)

    def label(self, index: int) -> int | torch.Tensor:
        """The class of an image; for several labels (0 or 1) or numbers float32 (K,)."""
        if self.labels.ndim == 1:
            return int(self.labels[index])
        return torch.from_numpy(self.labels[index].astype(np.float32))

    def read(self, index: int) -> tuple[Image.Image, int | torch.Tensor, str]:
        """Return (RGB image at full size, label, name); raises UnreadableImage."""
        row = self._row(index)
        name = self.source.name(row)
        return decode(self.source.open(row), name), self.label(index), name

    def image_name(self, index: int) -> str:
        """Name of the image for messages and lists."""
        return self.source.name(self._row(index))

    def with_transform(self, transform: Transform | None, seed: int = 0) -> "ImageDataset":
        """The same images with `transform(image, rng) -> uint8 (H, W, C)`.

        Generated images are drawn at the transform's image size, unless the data set's name has a size.
        """
        readable_formats()  # loads Pillow's plugins: here once, not in every worker
        source = self.source
        if isinstance(source, SyntheticSource) and isinstance(transform, ImageTransform):
            source = source.drawn_for(*transform.image_size_hw)
        return replace(self, source=source, transform=transform, seed=seed)

    def select(self, indices: Sequence[int] | np.ndarray) -> "ImageDataset":
        """The images at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        fingerprint = digest(self.fingerprint, chosen.tobytes())
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen], fingerprint=fingerprint)

    def per_class(self, count: int, seed: int = 0) -> "ImageDataset":
        """`count` images of every class; the choice of 5 is a part of that of 10.

        Raises:
            HFViTError: a class has fewer images; labels that are not classes.
        """
        if self.labels.ndim == 2:
            raise HFViTError(
                f"--samples_per_class counts one class for each image, '{self.name}' is for {self.problem_type}"
            )
        chosen = [rows[:count] for rows in shuffled_classes(self.labels, seed)]
        counts = np.bincount(self.labels, minlength=len(self.label_names))
        scarce = [self.label_names[label] for label in np.flatnonzero(counts < count)]
        if scarce:
            raise HFViTError(f"'{self.name}' has fewer than {count} images of {listed(scarce)}")
        return self.select(np.sort(np.concatenate(chosen)))

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"index {index} is outside the {len(self.rows)} images of '{self.name}'")
        return int(self.rows[index])

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """One item. An unreadable image raises, or gives {"unreadable": name and reason, "index": index}.

        Args:
            key: index, or (epoch, index); each epoch draws another random view.
        """
        epoch, index = (int(key[0]), int(key[1])) if isinstance(key, tuple) else (0, int(key))
        row = self._row(index)
        return View(self.transform, self.seed, self.on_unreadable).item(
            lambda: self.source.open(row), self.label(index), self.source.name(row), epoch, index
        )


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate items into a batch; unreadable ones are left out and listed.

    Returns:
        {"pixel_values": uint8 (B, C, H, W), "labels": int64 (B,) or float32 (B, K), "index": int64 (B,),
        "unreadable": list[str]}. Without any readable item the shapes are (0, 0, 0, 0) and (0,).
    """
    good = [item for item in items if "unreadable" not in item]
    pixel_values = [item["pixel_values"] for item in good]
    shapes = {tuple(pixels.shape) for pixels in pixel_values}
    if len(shapes) > 1:
        raise HFViTError(f"images of different sizes in one batch, {listed(sorted(shapes))}; give a transform")
    empty = torch.zeros((0, 0, 0, 0), dtype=torch.uint8)
    return {  # torch's own collate stacks where the main process reads: no batch is copied, or left over in a worker
        "pixel_values": torch.utils.data.default_collate(pixel_values) if good else empty,
        "labels": stack_labels([item["labels"] for item in good]),
        "index": torch.tensor([item["index"] for item in good], dtype=torch.int64),
        "unreadable": [item["unreadable"] for item in items if "unreadable" in item],
    }


def stack_labels(labels: Sequence[Any]) -> torch.Tensor:
    """Stack labels: int64 (B,) for classes, float32 (B, K) for several labels or numbers."""
    if labels and isinstance(labels[0], torch.Tensor) and labels[0].ndim:
        return torch.stack(list(labels)).float()
    return torch.tensor([int(label) for label in labels], dtype=torch.int64)


def open_dataset(
    name: Any,
    *,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | list[str] | None = None,
    problem_type: str | None = None,
    label_separator: str | None = None,
    image_root: str | PathLike | None = None,
    split_column: str | None = None,
    fraction: float = 1.0,
    label_names: Sequence[str] | None = None,
    on_unreadable: str = "skip",
    cache_dir: str | PathLike | None = None,
    labelled: bool = True,
    log: Callable[[str], None] | None = None,
) -> ImageDataset:
    """Open one split of a data set.

    Args:
        name: "digits" (scikit-learn's handwritten digits, 1437 for training and 360 for test),
            "synthetic:FAMILY[@classes,instances[,size]]", a folder (`train/CLASS/*.jpg` with optional `validation` and
            `test` beside it, `CLASS/*.jpg`, or images with a `metadata.csv`), a table (.csv, .tsv, .jsonl, .parquet),
            a folder of tables or of `save_to_disk`, tar shards, or a Hub id. Also what Python holds: a list of
            (image, label), a DataFrame, a `datasets.Dataset` or DatasetDict.
        config_name: configuration of a Hub data set.
        split: "train", "test", ..., a slice such as "train[:98%]" or "train[800:1000]", or a sum "train+validation".
            Rows of tables keep their order; sources sorted by class are sliced in a fixed random order instead.
        image_column, label_column: columns of a table; by default found by type and name. COLUMN//NUMBER joins
            neighboring numbers into classes: `cls//2.5` has 16 classes where `cls` has 40, as in VTAB's dSprites. A
            list of columns has one per label (0 or 1), or one per number.
        problem_type: transformers' "single_label_classification", "multi_label_classification" or "regression"; by
            default inferred from the labels.
        label_separator: between several labels in one cell of text.
        image_root: folder that paths in a table are relative to; by default the table's. Cells may also be addresses
            (`https://...`), which are downloaded into the cache once.
        split_column: column of a table with the split of each row; by default one called `split`, `subset` or
            `partition`, if it holds the usual names.
        fraction: of the split to keep; stratified and nested, so that 1 % is a part of 10 %.
        label_names: the classes to use, for evaluation those of the training data.
        on_unreadable: "skip" lists unreadable images in the batch, "stop" raises UnreadableImage.
        cache_dir: where tables are unpacked; the default is `datasets`' own cache.
        labelled: False ignores a table's label columns.
        log: called with one line for each assumption, and for what was left out.

    Raises:
        HFViTError: with cause and way out, for anything the user can fix.
    """
    check_reading(on_unreadable, fraction)
    names = None if label_names is None else list(label_names)
    root = None if image_root is None else str(image_root)
    columns = Columns(image_column, label_column, names, labelled, root, split_column, problem_type, label_separator)
    reader = open_reader(name, config_name, columns, cache_dir)
    dataset = open_split(reader, split, names, on_unreadable, labelled)
    for note in reader.notes if log is not None else ():
        log(note)  # type: ignore[misc]  # not None, or there is no note
    return take_fraction(dataset, fraction)


def open_split(
    reader: Reader, split: str, names: list[str] | None, on_unreadable: str, labelled: bool = True
) -> ImageDataset:
    """A split, slice or sum of an open data set; arguments as in `open_dataset`."""
    parts = [open_part(reader, part.strip(), names, on_unreadable, split) for part in split.split("+")]
    for first, other in itertools.combinations(parts, 2):
        same = first.source.fingerprint == other.source.fingerprint
        if same and (repeated := len(np.intersect1d(first.rows, other.rows))):
            raise HFViTError(
                f"split '{split}' of '{reader.name}' takes {repeated:,} images twice; name each part once"
            )
    dataset = parts[0] if len(parts) == 1 else concatenate(parts, split)
    if labelled and names is None and dataset.labels.ndim == 1 and len(dataset.label_names) < 2:
        raise HFViTError(
            f"'{reader.name}' has only one class, {listed(dataset.label_names)}; a classifier needs two or more"
        )
    return dataset


def check_reading(on_unreadable: str, fraction: float) -> None:
    """Raise HFViTError for values out of range."""
    if on_unreadable not in ON_UNREADABLE:
        raise HFViTError(f"on_unreadable must be one of {', '.join(ON_UNREADABLE)}, got '{on_unreadable}'")
    if not 0.0 < fraction <= 1.0:
        raise HFViTError(f"the fraction of a data set must lie in (0, 1], got {fraction}")


def open_reader(name: Any, config_name: str | None, columns: Columns, cache_dir: str | PathLike | None) -> Reader:
    """The reader for a name, or for a Python object.

    Raises:
        HFViTError: nothing of that name exists, or it holds no images.
    """
    if not isinstance(name, str | PathLike):
        only_on_the_hub(type(name).__name__, config_name)
        return object_reader(name, columns, cache_dir)
    name = str(name)
    path = Path(name).expanduser()
    if name == "digits" or name.startswith("synthetic:"):
        only_for_tables(name, columns)
    if name == "digits" or name.startswith("synthetic:") or is_shard_pattern(name) or path.exists():
        only_on_the_hub(name, config_name)
    if name == "digits":
        return Reader(name, ["train", "test"], digits_split)
    if name.startswith("synthetic:"):
        return synthetic_reader(name)
    if is_shard_pattern(name) and not path.is_dir():
        return shards_reader(name, expand_shards(name), columns, cache_dir)
    if path.is_dir():
        return directory_reader(name, path.resolve(), columns, cache_dir)
    if path.exists():
        return file_reader(name, path.resolve(), columns, cache_dir)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) or path.suffix in FILE_SUFFIXES:
        raise HFViTError(
            f"no file or folder '{name}'; give a folder of train/CLASS/*.jpg, a parquet file or folder, "
            "a Hub id such as user/name, or a built-in name: digits, synthetic:glyphs"
        )
    return hub_reader(name, config_name, columns, cache_dir)


def file_reader(name: str, path: Path, columns: Columns, cache_dir: str | PathLike | None) -> Reader:
    """Reader of a table in one file."""
    if path.suffix == ".parquet":
        return parquet_reader(name, path.parent, [path], columns, cache_dir)
    if path.suffix in SUFFIXES_OF_TABLES:
        return table_reader(name, {"train": [path]}, columns, cache_dir)
    raise HFViTError(
        f"'{name}' is a file, but no table (.parquet, .csv, .tsv, .jsonl) and no tar shard; give the folder that "
        "holds the images, and unpack archives"
    )


def directory_reader(name: str, path: Path, columns: Columns, cache_dir: str | PathLike | None) -> Reader:
    """Reader of a folder: one of `save_to_disk`, with metadata.csv, with class folders, tar shards or tables.

    Class folders of images come before archives and tables next to them, which the notes name.
    """
    notes: list[str] = []
    walk = cached_walk(path, cache_dir, notes)
    tree = Tree(walk)
    data = [join(folder.path, item) for folder in walk.folders for item in folder.data]
    if b"dataset_dict.json" in data or (b"state.json" in data and b"dataset_info.json" in data):
        return saved_reader(name, path, columns, cache_dir)
    if any(metadata_of(folder) for folder in walk.folders):
        reader = metadata_reader(name, path, walk, tree, columns, notes, cache_dir)
        if reader is not None:
            return reader
    files = [path / os.fsdecode(item) for item in data if os.path.basename(item) not in METADATA_NAMES]
    shards = sorted(str(file) for file in files if file.suffix == ".tar" and file.parent == path)
    tables = sorted(file for file in files if file.suffix == ".parquet")
    texts = sorted(file for file in files if file.suffix in SUFFIXES_OF_TABLES and file.parent == path)
    layout = None
    try:
        layout = read_layout(name, walk, tree)
    except HFViTError:
        if not (shards or tables or texts):
            raise
    classes = layout is not None and layout.has_classes(tree)
    if shards and not classes:
        return shards_reader(name, shards, columns, cache_dir)
    if tables and not classes:
        return parquet_reader(name, path, tables, columns, cache_dir)
    if texts and (not classes or columns.label is not None or columns.image is not None):
        splits = by_split([file.name for file in texts])
        by_split_name = {split: [path / file for file in files] for split, files in splits.items()}
        return table_reader(name, by_split_name, columns, cache_dir)
    only_for_tables(name, columns)
    layout = layout or Layout({})
    layout.notes[:0] = notes
    return folder_reader(name, path, walk, tree, layout, cache_dir)


def open_part(reader: Reader, part: str, names: list[str] | None, on_unreadable: str, split: str) -> ImageDataset:
    """One term of a split expression: a split, or a slice of one."""
    match = SPLIT_EXPRESSION.fullmatch(part)
    if match is None:
        raise HFViTError(f"split '{part}' is not understood; write train, train[:98%], train[800:1000] or train+test")
    base = match["name"]
    if base not in reader.splits:
        base = SPLIT_NAMES.get(base.lower(), base)
    if base not in reader.splits:
        raise HFViTError(
            f"'{reader.name}' has no split '{match['name']}'; available: {listed(reader.splits)}; name them with "
            "--train_split and --eval_split"
        )
    source = reader.load(base)
    if reader.damaged and on_unreadable == "stop":
        raise HFViTError(
            f"'{reader.name}' has {reader.damaged[0]}: fix them, or leave them out (--on_decode_error skip)"
        )
    if not len(source.labels):
        raise HFViTError(f"split '{base}' of '{reader.name}' is empty")
    missing = getattr(source, "missing", ())
    if missing and on_unreadable == "stop":
        raise HFViTError(
            f"{len(missing):,} of {len(source.labels):,} images that '{reader.name}' lists are missing: "
            f"{listed(missing)}; --on_decode_error skip trains without them"
        )
    labels, label_names = source.labels, source.label_names
    if names is not None and names != label_names:
        labels, label_names = relabel(labels, label_names, names, f"split '{base}' of '{reader.name}'"), names
    rows = slice_rows(source, part, match["start"], match["stop"])
    fingerprint = digest(source.fingerprint, *label_names, rows.tobytes())
    chosen = labels if len(rows) == len(labels) else labels[rows]  # no copy for a whole split
    return ImageDataset(source, rows, chosen, label_names, reader.name, split, fingerprint, on_unreadable)


def slice_rows(source: Source, part: str, start: str | None, stop: str | None) -> np.ndarray:
    """Rows of a slice, ascending. `[:98%]` and `[98%:]` are disjoint, and together complete."""
    count = len(source.labels)
    if start is None and stop is None:
        return np.arange(count)
    order = generator(SPLIT, 0).permutation(count) if source.sorted_by_class else np.arange(count)
    rows = np.sort(order[boundary(start, count, 0) : boundary(stop, count, count)])
    if not len(rows):
        raise HFViTError(f"split '{part}' holds none of the {count} images; widen the slice")
    return rows


def boundary(text: str | None, count: int, default: int) -> int:
    """A slice's start or stop in rows: a number, a percentage rounded to the nearest row, negative from the end."""
    if text is None:
        return default
    number = round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)
    return min(max(number + count if number < 0 else number, 0), count)


@dataclass(frozen=True)
class Chain:
    """Several sources, one after another."""

    sources: list[Source]
    labels: np.ndarray
    label_names: list[str]
    fingerprint: str
    starts: np.ndarray  # first row of each source
    sorted_by_class: bool = False
    groups: np.ndarray | None = None

    def _locate(self, row: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.sources[number], int(row - self.starts[number])

    def open(self, row: int) -> Image.Image:
        source, row = self._locate(row)
        return source.open(row)

    def name(self, row: int) -> str:
        source, row = self._locate(row)
        return source.name(row)


def concatenate(parts: Sequence[ImageDataset], split: str) -> ImageDataset:
    """Data sets with the same classes as one."""
    first = parts[0]
    for part in parts[1:]:
        if part.problem_type != first.problem_type:
            raise HFViTError(f"'{first.name}' and '{part.name}' cannot be joined: their labels are of other kinds")
        if part.label_names != first.label_names:
            raise HFViTError(f"'{first.name}' and '{part.name}' cannot be joined: their classes differ")
    sizes = [len(part.source.labels) for part in parts]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    rows = np.concatenate([part.rows + start for part, start in zip(parts, starts)])
    labels = np.concatenate([part.labels for part in parts])
    fingerprint = digest(*(part.fingerprint for part in parts))
    every_label = np.concatenate([part.source.labels for part in parts])
    groups = [getattr(part.source, "groups", None) for part in parts]
    every_group = None if any(group is None for group in groups) else np.concatenate(groups)
    sources = [part.source for part in parts]
    chain = Chain(sources, every_label, first.label_names, fingerprint, starts, groups=every_group)
    return replace(first, source=chain, rows=rows, labels=labels, split=split, fingerprint=fingerprint)


def take_fraction(dataset: ImageDataset, fraction: float, seed: int = 0) -> ImageDataset:
    """A stratified fraction of the images; smaller fractions are parts of larger ones."""
    check_reading(dataset.on_unreadable, fraction)
    if fraction == 1.0:
        return dataset
    count = round(fraction * len(dataset))
    if count < 1:
        raise HFViTError(
            f"the fraction {fraction:g} selects no images of '{dataset.name}' (split '{dataset.split}'); increase it"
        )
    return dataset.select(nested_subset(dataset.labels, seed, count))


def check_problem_type(dataset: Any, problem_type: str) -> None:
    """Raise HFViTError if the labels do not fit the model's `config.problem_type`."""
    if isinstance(dataset, ImageDataset) and dataset.problem_type != problem_type:
        raise HFViTError(
            f"the labels of '{dataset.name}' ({dataset.split}) are for {dataset.problem_type}, the model is "
            f"for {problem_type}: set its config.problem_type, or choose other labels"
        )


def holds_classes(dataset: ImageDataset) -> bool:
    """Whether the labels are one class per image, not several labels or numbers."""
    return dataset.labels.ndim == 1 and np.issubdtype(dataset.labels.dtype, np.integer)
