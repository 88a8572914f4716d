"""The interface of data sources, and two of them: digits and generated images.

A `Reader` knows the splits of a data set without reading images; a `Source` is one split, its labels and its images.
Folders, tables and shards have files of their own.

Tests: tests/training/data/test_dataset.py.
"""

import hashlib
import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from hf_vit.errors import HFViTError, listed
from hf_vit.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL

from .strata import nested_subset, strata
from .synthetic import SMALLEST_SIZE, SyntheticImages, parse_name


SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
SPLIT_IN_FILE_NAME = re.compile(rf"(?:^|[-_./\\ ])({'|'.join(SPLIT_NAMES)})(?=[-_./\\ 0-9]|$)", re.IGNORECASE)
DIGITS_TEST_IMAGES = 360


class Source(Protocol):
    """One split of a data set.

    Attributes:
        labels: int64 (n,) of classes, bool (n, K) of several labels, or float32 (n, K) of numbers.
        label_names: names of the classes, labels or numbers.
        sorted_by_class: neighboring rows share their class, so that slices must not be taken in row order.
        fingerprint: changes with names, labels or contents.
    """

    labels: np.ndarray
    label_names: list[str]
    sorted_by_class: bool
    fingerprint: str

    def open(self, row: int) -> Image.Image:
        """The image, opened but not yet decoded; raises UnreadableImage."""

    def name(self, row: int) -> str:
        """Name of the image for messages and lists."""


@dataclass(frozen=True)
class Reader:
    """The splits of a data set, and how to read one of them."""

    name: str
    splits: list[str]
    load: Callable[[str], Source]
    notes: list[str] = field(default_factory=list)  # lines for the user: assumptions, and what was left out
    damaged: list[str] = field(default_factory=list)  # what was left out because it cannot be read
    by_names: bool = False  # whether `load` needs the training data's label names, from `Columns`


@dataclass(frozen=True)
class Columns:
    """The user's options about the columns of a table; None: to be found out."""

    image: str | None = None
    label: str | list[str] | None = None  # a list: one column per label, or per number
    label_names: list[str] | None = None
    labelled: bool = True  # False: ignore labels
    image_root: str | None = None  # folder that paths in tables are relative to; None: the table's
    split: str | None = None  # column with the split of each row
    problem_type: str | None = None  # transformers' `problem_type`; None: inferred from the labels
    separator: str | None = None  # between several labels in one cell of text
    group: str | None = None  # column of groups that must not be divided

    def __post_init__(self):
        if isinstance(self.label, list | tuple) and len(self.label) == 1:
            object.__setattr__(self, "label", self.label[0])

    def counting_in(self, label_names: list[str] | None, problem_type: str | None = None) -> "Columns":
        """The same columns with these label names and this problem type."""
        return replace(self, label_names=label_names, problem_type=problem_type or self.problem_type)

    def needs_train(self, split: str, splits: Container[str]) -> bool:
        """Whether the label names of the training split have to be read before those of this split."""
        return self.label_names is None and split != "train" and "train" in splits and self.labelled

    def like(self, train: "Source | None") -> "Columns":
        """The same columns with the label names of the training split, if it was read."""
        return self if train is None else self.counting_in(train.label_names, problem_type_of_labels(train.labels))


def only_on_the_hub(name: str, config_name: str | None) -> None:
    """Raise HFViTError for a configuration of data that are not on the Hub."""
    if config_name is not None:
        raise HFViTError(
            f"'{name}' is no Hub dataset and has no configuration '{config_name}': leave out --dataset_config_name"
        )


def only_for_tables(name: str, columns: Columns) -> None:
    """Raise HFViTError for columns of images that are not in a table."""
    label = columns.label if columns.label is None or isinstance(columns.label, str) else listed(columns.label)
    for option, column in (
        ("--image_column", columns.image),
        ("--label_column", label),
        ("--split_column", columns.split),
        ("--group_column", columns.group),
    ):
        if column is not None:
            raise HFViTError(f"'{name}' is no table and has no column '{column}': leave out {option}")
    if columns.image_root is not None:
        raise HFViTError(f"'{name}' is no table of paths: leave out --image_root")
    only_one_class(name, columns, "is no table: its images have one class each")


def groups_of(name: str, column: str | None, columns: Mapping[str, Sequence[Any]]) -> np.ndarray | None:
    """The group of each row, as text (n,); an empty cell is a group of its own. None without a column.

    Raises:
        HFViTError: no such column.
    """
    if column is None:
        return None
    if column not in columns:
        raise HFViTError(f"'{name}' has no column '{column}'; its columns are {listed(list(columns))}")
    empty = (None, "", "nan")
    return np.array(
        [
            f"row {row}" if str(cell).strip() in map(str, empty) else f"= {cell}"
            for row, cell in enumerate(columns[column])
        ]
    )


def only_one_class(name: str, columns: Columns, why: str) -> None:
    """Raise HFViTError for several labels or numbers of data with one class per image."""
    if columns.problem_type not in (None, SINGLE_LABEL):
        raise HFViTError(f"'{name}' {why}; --problem_type {columns.problem_type} needs a table with such labels")
    if columns.separator is not None:
        raise HFViTError(f"'{name}' {why}: leave out --label_separator")


def digest(*parts: object) -> str:
    """Fingerprint of strings and bytes: SHA-256, the first 32 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes | memoryview) else str(part).encode()
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        state.update(size.to_bytes(8, "little"))  # so that "ab", "c" differs from "a", "bc"
        state.update(data)
    return state.hexdigest()[:32]


def problem_type_of_labels(labels: np.ndarray) -> str:
    """The kind of a source's labels, as in transformers' `config.problem_type`."""
    return SINGLE_LABEL if labels.ndim == 1 else MULTI_LABEL if labels.dtype == bool else REGRESSION


def relabel(labels: np.ndarray, names: Sequence[str], requested: Sequence[str], what: str) -> np.ndarray:
    """Convert labels from indices into `names` to indices into `requested`.

    Args:
        what: the data, for the error.

    Raises:
        HFViTError: a class that occurs is not among the requested ones.
    """
    number_of = {name: number for number, name in enumerate(requested)}
    if labels.ndim == 2:
        raise HFViTError(f"{what} has labels for {listed(names)}, those of training are for {listed(requested)}")
    unknown = [names[label] for label in np.unique(labels) if names[label] not in number_of]
    if unknown:
        raise HFViTError(
            f"{what} has classes that the model does not know: {listed(unknown)}; known are {listed(list(requested))}"
        )
    table = np.array([number_of.get(name, -1) for name in names], dtype=np.int64)
    return table[labels]


def by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Files by split, from the last split name in their path; "train" without any."""
    splits: dict[str, list[str]] = {}
    for file in files:
        matches = SPLIT_IN_FILE_NAME.findall(file)
        splits.setdefault(SPLIT_NAMES[matches[-1].lower()] if matches else "train", []).append(file)
    return splits


def classes_in_turn(labels: np.ndarray) -> bool:
    """Whether rows are sorted by class, so that the first rows are of a few classes only."""
    labels = strata(labels)
    turns = np.count_nonzero(np.diff(labels)) + 1
    return turns < len(labels) and turns == len(np.unique(labels))


def own_cache(cache_dir: str | os.PathLike | None) -> Path:
    """Folder for unpacked tables and indices of shards: `cache_dir`, or one in the cache of `datasets`."""
    import datasets

    return Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "hf_vit"


# Arrays in memory


@dataclass(frozen=True)
class ArraySource:
    """Images that are already pixels: uint8 (n, H, W, 3)."""

    pixels: np.ndarray
    labels: np.ndarray
    label_names: list[str]
    names: list[str]
    fingerprint: str
    sorted_by_class: bool = False

    def open(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])

    def name(self, row: int) -> str:
        return self.names[row]


def digits_split(split: str) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits as 8x8 RGB images; always the same 360 for test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise HFViTError("the digits come with scikit-learn; pip install 'hf-vit[train]'") from error
    digits = load_digits()
    rows = nested_subset(digits.target, 0, DIGITS_TEST_IMAGES)
    rows = rows if split == "test" else np.setdiff1d(np.arange(len(digits.target)), rows)
    gray = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(gray[..., None], 3, axis=3)
    labels = digits.target[rows].astype(np.int64)
    names = [f"digits/{row}" for row in rows]
    return ArraySource(pixels, labels, [str(n) for n in range(10)], names, digest("digits", split, pixels.tobytes()))


# Generated images


@dataclass(frozen=True)
class SyntheticSource:
    """Generated images, drawn on access."""

    images: SyntheticImages
    labels: np.ndarray
    label_names: list[str]
    fingerprint: str
    size_is_given: bool  # in the name; otherwise images are drawn at the size of the transform
    sorted_by_class: bool = False

    def drawn_for(self, height: int, width: int) -> "SyntheticSource":
        """The same images at the resolution of a transform."""
        if self.size_is_given:
            return self
        return replace(self, images=replace(self.images, size=max(height, width, SMALLEST_SIZE)))

    def open(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row]["image"])

    def name(self, row: int) -> str:
        return self.images.name(row)


def synthetic_reader(name: str) -> Reader:
    """Reader of a set of generated images; no instance is in two splits."""
    images, size_is_given = parse_name(name)

    def load(split: str) -> SyntheticSource:
        part = images.split(split)
        fingerprint = digest("synthetic", part.describe(), part.size if size_is_given else "any size")
        return SyntheticSource(part, part.labels, part.label_names, fingerprint, size_is_given)

    return Reader(name, ["train", "validation", "test"], load)
