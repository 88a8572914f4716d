"""Where images come from: digits and generated images; and what every source has in common.

A `Reader` knows the splits of a data set without reading images; a `Source` is one split: its labels, and its images
opened one at a time. Folders, tables and shards have files of their own.

Tests: tests/training/data/test_dataset.py.
"""

import hashlib
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from hf_vit.errors import HFViTError, listed
from hf_vit.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL

from ..rng import SUBSET, generator
from .synthetic import SMALLEST_SIZE, SyntheticImages, parse_name


SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
SPLIT_IN_FILE_NAME = re.compile(rf"(?:^|[-_./\\ ])({'|'.join(SPLIT_NAMES)})(?=[-_./\\ 0-9]|$)", re.IGNORECASE)
DIGITS_TEST_IMAGES = 360
REGRESSION_STRATA = 10


class Source(Protocol):
    """One split of a data set.

    `labels` is int64 (n,), or bool (n, K) where an image has several, or float32 (n, K) of numbers; `label_names` are
    the classes, the labels, or what the numbers are called; `sorted_by_class` says that neighboring rows share their
    class, so that slices must not be taken in row order; `fingerprint` changes when names, labels or contents do.
    """

    labels: np.ndarray
    label_names: list[str]
    sorted_by_class: bool
    fingerprint: str

    def open(self, row: int) -> Image.Image:
        """The image, opened but not yet decoded; raises UnreadableImage."""

    def name(self, row: int) -> str:
        """What messages and lists call the image."""


@dataclass(frozen=True)
class Reader:
    """The splits of a data set, and how to read one of them."""

    name: str
    splits: list[str]
    load: Callable[[str], Source]
    notes: list[str] = field(default_factory=list)  # what was assumed and left out, for people
    damaged: list[str] = field(default_factory=list)  # what was left out because it cannot be read
    by_names: bool = False  # whether `load` needs the classes that labels count in, which `Columns` give


@dataclass(frozen=True)
class Columns:
    """What the user said about the columns of a table; None: find out."""

    image: str | None = None
    label: str | list[str] | None = None  # a list: one column a label, or a number
    label_names: list[str] | None = None
    labelled: bool = True  # False: labels are not looked at
    image_root: str | None = None  # folder that paths in tables count from; None: the table's
    split: str | None = None  # column that says which split a row belongs to
    problem_type: str | None = None  # in transformers' words; None: as the labels say, where they leave no doubt
    separator: str | None = None  # between the labels of a cell of text
    group: str | None = None  # column whose equal values belong together

    def __post_init__(self):
        if isinstance(self.label, list | tuple) and len(self.label) == 1:
            object.__setattr__(self, "label", self.label[0])

    def counting_in(self, label_names: list[str] | None, problem_type: str | None = None) -> "Columns":
        """The same for labels that count in these names, of this problem type."""
        return replace(self, label_names=label_names, problem_type=problem_type or self.problem_type)

    def needs_train(self, split: str, splits: Container[str]) -> bool:
        """Whether labels of a split count in the names of the training split, which nobody gave."""
        return self.label_names is None and split != "train" and "train" in splits and self.labelled

    def like(self, train: "Source | None") -> "Columns":
        """The same for the labels of training."""
        return self if train is None else self.counting_in(train.label_names, problem_type_of_labels(train.labels))


def only_on_the_hub(name: str, config_name: str | None) -> None:
    """Raise HFViTError where a configuration is asked of data that have none."""
    if config_name is not None:
        raise HFViTError(
            f"'{name}' is no Hub dataset and has no configuration '{config_name}': leave out --dataset_config_name"
        )


def only_for_tables(name: str, columns: Columns) -> None:
    """Raise HFViTError where columns are asked of images that are in no table."""
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
    """What each row belongs to, as text (n,); an empty cell is a group of its own. None without a column.

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
    """Raise HFViTError where several labels or numbers are asked of what holds one class for each image."""
    if columns.problem_type not in (None, SINGLE_LABEL):
        raise HFViTError(f"'{name}' {why}; --problem_type {columns.problem_type} needs a table with such labels")
    if columns.separator is not None:
        raise HFViTError(f"'{name}' {why}: leave out --label_separator")


def digest(*parts: object) -> str:
    """Hexadecimal SHA-256 over strings and bytes, shortened to 32 digits."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes | memoryview) else str(part).encode()
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        state.update(size.to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:32]


def problem_type_of_labels(labels: np.ndarray) -> str:
    """What a source's labels are, in transformers' words."""
    return SINGLE_LABEL if labels.ndim == 1 else MULTI_LABEL if labels.dtype == bool else REGRESSION


def strata(labels: np.ndarray) -> np.ndarray:
    """What a subset is balanced by, int64 (n,): the class; the rarest of several labels; the tenth of a number."""
    if labels.ndim == 1:
        return labels
    if labels.dtype == bool:
        rarity = np.argsort(labels.sum(axis=0), kind="stable")  # the rarest label first
        return np.where(labels.any(axis=1), labels[:, rarity].argmax(axis=1), labels.shape[1])
    rank = np.argsort(np.argsort(labels[:, 0], kind="stable"), kind="stable")
    return rank * REGRESSION_STRATA // max(len(labels), 1)


def nested_subset(labels: np.ndarray, seed: int, count: int) -> np.ndarray:
    """Choose rows at random, as many of each class as its fraction; a smaller subset lies inside a larger one.

    The r-th image of a shuffled class of n_c stands at (r + 1/2) / n_c of the way, and the first `count` are taken.

    Args:
        labels: of a source. seed: another seed, another choice. count: 0 to n.

    Returns:
        int64 (count,), ascending.
    """
    labels = strata(labels)
    order = np.empty(len(labels))
    for rows in shuffled_classes(labels, seed):
        order[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    if not 0 < count < len(labels):
        return np.arange(len(labels))[:count]
    last = np.partition(order, count - 1)[count - 1]  # fourteen million are not sorted for it
    taken = order < last
    level = np.flatnonzero(order == last)  # classes of one size stand level, and chance decides
    tie = generator(SUBSET, seed, 0).random(len(labels))[level]
    taken[level[np.argsort(tie, kind="stable")[: count - np.count_nonzero(taken)]]] = True
    return np.flatnonzero(taken)


def shuffled_classes(labels: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The rows of each label that occurs, in a random order that depends on nothing but seed and label."""
    for label, rows in rows_by_label(labels):
        generator(SUBSET, seed, 1, label).shuffle(rows)
        yield rows


def rows_by_label(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each label that occurs, with its rows in order: one sort, however many labels there are."""
    labels = labels.astype(np.min_scalar_type(labels.max(initial=0)))  # NumPy sorts 16 bits in one go
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    first = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    for rows in np.split(order, first) if len(order) else ():
        yield int(labels[rows[0]]), rows


def relabel(labels: np.ndarray, names: Sequence[str], requested: Sequence[str], what: str) -> np.ndarray:
    """Labels that count in `names` as labels that count in `requested`.

    Raises:
        HFViTError: a class that occurs is not among the wanted ones.
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
    """Files under the split that the last part of their name or folders contains; "train" where none does."""
    splits: dict[str, list[str]] = {}
    for file in files:
        matches = SPLIT_IN_FILE_NAME.findall(file)
        splits.setdefault(SPLIT_NAMES[matches[-1].lower()] if matches else "train", []).append(file)
    return splits


def classes_in_turn(labels: np.ndarray) -> bool:
    """Whether rows come class by class, so that the first of them are of a few classes only."""
    labels = strata(labels)
    turns = np.count_nonzero(np.diff(labels)) + 1
    return turns < len(labels) and turns == len(np.unique(labels))


def own_cache(cache_dir: str | os.PathLike | None) -> Path:
    """Where unpacked tables and indices of shards are kept: below `datasets`' cache unless the user says otherwise."""
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
    """scikit-learn's 1,797 handwritten digits, 8x8 px of values 0..16, as RGB; always the same 360 for test."""
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
    """Generated images, drawn when they are asked for."""

    images: SyntheticImages
    labels: np.ndarray
    label_names: list[str]
    fingerprint: str
    size_is_given: bool  # in the name; otherwise images are drawn at the size that the transform wants
    sorted_by_class: bool = False

    def drawn_for(self, height: int, width: int) -> "SyntheticSource":
        """The same images at the resolution of a transform's result."""
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
        mark = digest("synthetic", part.describe(), part.size if size_is_given else "any size")
        return SyntheticSource(part, part.labels, part.label_names, mark, size_is_given)

    return Reader(name, ["train", "validation", "test"], load)
