"""Columns of tables: which holds the pictures, which the labels, and labels as numbers from 0.

For tables.py, shards.py and streaming.py.
"""

import re
from collections.abc import Container
from typing import Any

import numpy as np

from hf_vit.errors import HFViTError

from .sources import LISTED, listed, relabel


IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label", "class", "target", "category", "cls")
GROUPED = re.compile(r"(?P<column>.+)//(?P<group>[1-9]\d*(\.\d+)?)")


def find_image_column(name: str, features: Any, wanted: str | None) -> str:
    """The column of pictures: the one asked for, the only one of type Image, or one with a usual name."""
    import datasets

    available = listed(list(features))
    if wanted is not None:
        if wanted not in features:
            raise HFViTError(f"'{name}' has no column '{wanted}'; its columns are {available}")
        return wanted
    found = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [column for column in IMAGE_COLUMNS if column in features]
    if not found:
        raise HFViTError(f"'{name}' has no column of pictures among {available}; name it with --image_column")
    if len(found) > 1:
        raise HFViTError(f"'{name}' has several columns of pictures, {listed(found)}; choose one with --image_column")
    return found[0]


def find_label_column(name: str, features: Any, wanted: str | None, image_column: str) -> str:
    """The column of labels: the one asked for, or the only one of type ClassLabel or with a usual name."""
    import datasets

    if wanted is not None:
        if wanted not in features:
            raise HFViTError(f"'{name}' has no column '{wanted}'; its columns are {listed(list(features))}")
        return wanted
    available = listed([column for column in features if column != image_column])
    found = [
        column
        for column, feature in features.items()
        if column != image_column and (isinstance(feature, datasets.ClassLabel) or column in LABEL_COLUMNS)
    ]
    if not found:
        raise HFViTError(
            f"'{name}' has no column of labels among {available or 'none at all'}; name it with --label_column"
        )
    if len(found) > 1:
        raise HFViTError(
            f"'{name}' has several columns that could be the label, {listed(found)}; choose one with --label_column"
        )
    return found[0]


def grouped(wanted: str | None, columns: Container[str]) -> tuple[str | None, float | None]:
    """The column and the divisor of `COLUMN//NUMBER`, which makes one class of neighbouring numbers."""
    match = None if wanted is None or wanted in columns else GROUPED.fullmatch(wanted)
    return (wanted, None) if match is None else (match["column"], float(match["group"]))


def class_label_rows(name: str, column: str, values: list) -> np.ndarray:
    """Labels of a ClassLabel column, checked."""
    labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    refuse_unlabelled(name, column, labels)
    return labels


def string_rows(name: str, column: str, values: list, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Labels of a column of strings; without names given, the classes are the strings in sorted order."""
    missing = sum(value is None or value == "" for value in values)
    if missing:
        raise HFViTError(f"{missing} rows of '{name}' have no label in column '{column}'; remove or label them")
    own = sorted(set(values))
    place = {value: number for number, value in enumerate(own)}
    labels = np.array([place[value] for value in values], dtype=np.int64)
    if names is None:
        return labels, own
    return relabel(labels, own, names, f"column '{column}' of '{name}'"), list(names)


def integer_rows(name: str, column: str, values: list, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Labels of a plain integer column: 0..K-1, each of them used unless names are given."""
    strange = {type(value).__name__ for value in values} - {"int", "NoneType"}
    if strange:
        raise HFViTError(
            f"column '{column}' of '{name}' holds {listed(sorted(strange))}, but labels are strings or whole numbers"
        )
    labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    refuse_unlabelled(name, column, labels)
    count = int(labels.max(initial=-1)) + 1
    if names is not None:
        if count > len(names):
            raise HFViTError(
                f"column '{column}' of '{name}' has label {count - 1}, but only {len(names)} classes are known"
            )
        return labels, list(names)
    used = np.unique(labels)
    if len(used) != count:
        missing = np.setdiff1d(np.arange(min(count, used.max() + 1)), used)[:LISTED] if count < 10**7 else []
        raise HFViTError(
            f"labels in column '{column}' of '{name}' are not contiguous: {len(used)} classes, the largest is "
            f"{count - 1}, unused for instance {listed(list(missing))}; renumber them from 0, or store them as strings"
        )
    return labels, [str(number) for number in range(count)]


def refuse_unlabelled(name: str, column: str, labels: np.ndarray) -> None:
    """Raise where rows carry -1, the usual mark of an unlabelled row."""
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise HFViTError(
            f"{unlabelled} of {len(labels)} rows of '{name}' have no label (-1 in column '{column}'); "
            "use a labelled split, or remove these rows"
        )
