"""Columns of tables: find those of images, labels and splits, and number the classes from 0.

For arrow_tables.py, path_tables.py and the modules of shards/.

Tests: tests/training/data/test_dataset.py.
"""

import re
from collections.abc import Container
from typing import Any

import numpy as np

from hf_vit.errors import HFViTError, listed
from hf_vit.image_tables import PATH_COLUMNS, URL_COLUMNS

from ..sources import SPLIT_NAMES, relabel


IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label", "class", "target", "category", "cls")
SPLIT_COLUMNS = ("split", "subset", "partition")
MANY_ROWS, ALMOST_UNIQUE = 20, 0.9  # from so many rows on, a column with this fraction of different values is of ids
GROUPED = re.compile(r"(?P<column>.+)//(?P<group>[1-9]\d*(\.\d+)?)")


def find_image_column(name: str, features: Any, requested: str | None) -> str:
    """The column of images: the requested one, the only one of type Image, or one with a usual name."""
    import datasets

    available = listed(list(features))
    if requested is not None:
        if requested not in features:
            raise HFViTError(f"'{name}' has no column '{requested}'; its columns are {available}")
        return requested
    columns = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    columns = columns or [column for column in IMAGE_COLUMNS if column in features]
    for usual in (PATH_COLUMNS, URL_COLUMNS):
        columns = columns or [column for column in usual if column in features and is_text(features[column])]
    if not columns:
        raise HFViTError(f"'{name}' has no column of images among {available}; name it with --image_column")
    if len(columns) > 1:
        raise HFViTError(f"'{name}' has several columns of images, {listed(columns)}; choose one with --image_column")
    if not isinstance(features[columns[0]], datasets.Image | datasets.Value | dict):
        raise HFViTError(f"column '{columns[0]}' of '{name}' holds lists: expected one image a row")
    return columns[0]


def is_text(feature: Any) -> bool:
    """Whether a column holds strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def find_label_column(name: str, features: Any, requested: str | None, image_column: str) -> str:
    """The column of labels: the requested one, or the only one of type ClassLabel or with a usual name."""
    import datasets

    if requested is not None:
        if requested not in features:
            raise HFViTError(f"'{name}' has no column '{requested}'; its columns are {listed(list(features))}")
        return requested
    available = listed([column for column in features if column != image_column])
    columns = [
        column
        for column, feature in features.items()
        if column != image_column and (isinstance(feature, datasets.ClassLabel) or column in LABEL_COLUMNS)
    ]
    if not columns:
        raise HFViTError(
            f"'{name}' has no column of labels among {available or 'none at all'}; name it with --label_column"
        )
    if len(columns) > 1:
        raise HFViTError(
            f"'{name}' has several columns that could be the label, {listed(columns)}; choose with --label_column "
            "(one, or one column a label)"
        )
    return columns[0]


def requested_labels(requested: str | list[str] | None) -> list[str | None]:
    """The requested columns of labels, each once; [None] if none is requested."""
    names = list(requested) if isinstance(requested, list | tuple) else [requested]
    if len(set(names)) < len(names):
        raise HFViTError(f"--label_column {' '.join(map(str, names))}: give each column once")
    return names


def grouped(requested: str | None, columns: Container[str]) -> tuple[str | None, float | None]:
    """Column and divisor of `COLUMN//NUMBER`, which joins neighboring numbers into classes; else (column, None)."""
    match = None if requested is None or requested in columns else GROUPED.fullmatch(requested)
    return (requested, None) if match is None else (match["column"], float(match["group"]))


def class_label_rows(name: str, column: str, values: list) -> np.ndarray:
    """Labels of a ClassLabel column, checked."""
    labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    refuse_unlabelled(name, column, labels)
    return labels


def label_rows(name: str, column: str, values: list, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Labels (n,) of a column of strings, whole numbers or booleans, and the class names.

    Raises:
        HFViTError: rows without a label, several types, values that are not classes.
    """
    values = [None if isinstance(value, float) and value != value else value for value in values]  # pandas' empty cell
    types = {type(value) for value in values if value is not None}
    kinds = listed(sorted(kind.__name__ for kind in types))
    if not types:
        raise HFViTError(f"column '{column}' of '{name}' is empty: no row has a label")
    if types == {str}:
        return string_rows(name, column, values, names)
    if types == {bool}:
        return string_rows(name, column, [None if value is None else str(value) for value in values], names)
    if types & {list, dict, tuple, np.ndarray}:
        raise HFViTError(f"column '{column}' of '{name}' holds {kinds}, but each image needs one label")
    if types == {float} or types == {int, float}:
        if any(value is not None and value != int(value) for value in values):
            raise HFViTError(f"column '{column}' of '{name}' holds fractions, which are no classes")
        values = [None if value is None else int(value) for value in values]
    elif types != {int}:
        raise HFViTError(
            f"column '{column}' of '{name}' holds {kinds}, but labels are strings or whole numbers, all of one type"
        )
    return integer_rows(name, column, values, names)


def string_rows(name: str, column: str, values: list, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Labels of a column of strings, and the class names: `names`, or the strings in sorted order."""
    missing = sum(value is None or not value.strip() for value in values)
    if missing:
        raise HFViTError(
            f"{missing:,} of {len(values):,} rows of '{name}' have no label in column '{column}'; remove or label them"
            ", or give --problem_type multi_label_classification if an image may have none"
        )
    used = sorted(set(values))
    refuse_ids(name, column, len(used), len(values), names)
    codes = {value: number for number, value in enumerate(used)}
    labels = np.array([codes[value] for value in values], dtype=np.int64)
    if names is None:
        return labels, used
    return relabel(labels, used, names, f"column '{column}' of '{name}'"), list(names)


def integer_rows(
    name: str, column: str, values: list, names: list[str] | None, count: int | None = None
) -> tuple[np.ndarray, list[str]]:
    """Labels of a column of whole numbers: each number that occurs is a class of that name.

    Args:
        names: the classes; if all are numbers, a label is the class of that name, else it is an index.
        count: number of rows, if `values` has each value only once.
    """
    other_types = {type(value).__name__ for value in values} - {"int", "NoneType"}
    if other_types:
        raise HFViTError(
            f"column '{column}' of '{name}' holds {listed(sorted(other_types))}, but labels are strings or whole "
            "numbers"
        )
    labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    refuse_unlabelled(name, column, labels)
    used = np.unique(labels)
    if names is None:
        refuse_ids(name, column, len(used), count or len(labels), names)
        return np.searchsorted(used, labels), [str(number) for number in used]
    if all(text.isascii() and text.isdecimal() for text in names):
        label_names = [str(number) for number in used]
        return relabel(np.searchsorted(used, labels), label_names, names, f"column '{column}' of '{name}'"), list(
            names
        )
    if len(used) and used[-1] >= len(names):
        raise HFViTError(
            f"column '{column}' of '{name}' has label {used[-1]}, but only {len(names)} classes are known"
        )
    return labels, list(names)


def refuse_ids(name: str, column: str, distinct: int, count: int, names: list[str] | None) -> None:
    """Raise if nearly every row has a label of its own: a column of ids, names or sentences."""
    if names is None and count >= MANY_ROWS and distinct > ALMOST_UNIQUE * count:
        raise HFViTError(
            f"column '{column}' of '{name}' has {distinct:,} different values in {count:,} rows: an id, not classes; "
            "choose another with --label_column, or give --problem_type regression if these are numbers to predict"
        )


def refuse_unlabelled(name: str, column: str, labels: np.ndarray) -> None:
    """Raise if rows have -1, the usual label of unlabelled rows."""
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise HFViTError(
            f"{unlabelled} of {len(labels)} rows of '{name}' have no label (-1 or empty in column '{column}'); "
            "use a labelled split, or remove these rows"
        )


def rows_of_splits(
    name: str, column: str, values: list[Any], any_words: bool, notes: list[str]
) -> dict[str, list[int]]:
    """Rows of each split, by the words in a column; empty if these are not the usual names of splits.

    Args:
        any_words: allow other names too. notes: lines about the splits, and rows without one, are added.

    Raises:
        HFViTError: no row has a split.
    """
    texts = ["" if value is None or value != value else str(value).strip() for value in values]
    words = [SPLIT_NAMES.get(text.lower()) for text in texts]
    if None in words:
        if not any_words:
            return {}
        usual = all(word is not None for word, text in zip(words, texts) if text)
        words = [word if usual else text or None for word, text in zip(words, texts)]
    splits: dict[str, list[int]] = {}
    for index, word in enumerate(words):
        if word is not None:
            splits.setdefault(word, []).append(index)
    if not splits:
        raise HFViTError(f"column '{column}' of '{name}' is empty: no row has a split")
    counts = listed([f"{split} ({len(indices):,})" for split, indices in splits.items()])
    notes.append(f"splits by the column '{column}': {counts}")
    if None in words:
        notes.append(f"left out: {words.count(None):,} rows of '{name}' without a split in column '{column}'")
    return splits
