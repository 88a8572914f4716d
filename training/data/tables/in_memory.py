"""Python objects as data: a list of (image, label), a pandas or polars DataFrame, a Dataset or DatasetDict.

Tests: tests/training/test_python_api.py.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_vit.download import is_address
from hf_vit.errors import HFViTError, listed
from hf_vit.image_io import UnreadableImage, open_encoded, printable
from hf_vit.image_tables import path_column

from ..sources import Columns, Reader, Source, classes_in_turn, digest, groups_of
from .arrow_tables import dataset_reader
from .downloads import Downloads, download_all
from .path_tables import by_column, labels_of_columns, source_of


def object_reader(data: Any, columns: Columns, cache_dir: str | os.PathLike | None = None) -> Reader:
    """Reader of an object; all rows are "train", unless it is a DatasetDict or has a column of splits.

    Raises:
        HFViTError: an object of another kind, unclear columns.
    """
    kind = type(data).__module__.partition(".")[0]
    if kind == "datasets":
        splits = dict(data) if isinstance(data, Mapping) else {"train": data}
        if not all(hasattr(table, "data") for table in splits.values()):
            raise HFViTError(
                f"{type(data).__name__} has no rows to choose from: give a Dataset, as from_generator makes one"
            )
        return dataset_reader(type(data).__name__, splits, columns, cache_dir)
    name, rows = type(data).__name__, columns_of(data)
    notes: list[str] = []
    splits_of_rows = by_column(name, rows, columns.split, notes) or {"train": rows}

    def load(split: str) -> Source:
        known = load("train") if columns.needs_train(split, splits_of_rows) else None
        return rows_source(name, splits_of_rows[split], columns.like(known), notes, cache_dir)

    return Reader(name, list(splits_of_rows), load, notes, by_names=True)


def columns_of(data: Any) -> dict[str, list[Any]]:
    """The columns of a DataFrame (polars' LazyFrame is computed), or of a list of pairs.

    Raises:
        HFViTError: neither.
    """
    if type(data).__module__.startswith("polars") and hasattr(data, "collect"):  # a LazyFrame
        data = data.collect()
    if hasattr(data, "columns") and hasattr(data, "__getitem__"):
        names = [str(column) for column in data.columns]
        if repeated := listed(sorted({name for name in names if names.count(name) > 1})):
            raise HFViTError(f"the {type(data).__name__} has columns of the same name: {repeated}")
        return {name: cells_of(data[column]) for name, column in zip(names, data.columns)}
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        if not data:
            raise HFViTError("the list of images is empty")
        wrong = next((row for row in data if not isinstance(row, tuple | list) or len(row) != 2), None)
        if wrong is None:
            return {"image": [row[0] for row in data], "label": [row[1] for row in data]}
        raise HFViTError(f"expected a list of (image, label) pairs; it holds {str(wrong)[:60]!r}")
    raise HFViTError(
        f"{type(data).__name__} is no data set: give a name, a list of (image, label), a DataFrame, or a "
        "datasets.Dataset"
    )


def cells_of(column: Any) -> list[Any]:
    """The values of a column, with None for pandas' NaN, NaT or NA."""
    if hasattr(column, "notna"):
        column = column.astype(object).where(column.notna(), None)
    return column.to_list()


def rows_source(
    name: str,
    rows: dict[str, list[Any]],
    columns: Columns,
    notes: list[str],
    cache_dir: str | os.PathLike | None = None,
) -> Source:
    """The source of these rows: files if all images are paths, otherwise the values themselves."""
    image = path_column(name, rows, columns.image)
    root = Path(columns.image_root or ".").expanduser()
    if all(isinstance(value, str | os.PathLike) for value in rows[image]):
        rows = rows | {image: [os.fspath(value) for value in rows[image]]}
        return source_of(name, rows, root, columns, notes, cache_dir)
    labels, label_names = np.zeros(len(rows[image]), dtype=np.int64), ["unlabelled"]
    if columns.labelled:
        labels, label_names = labels_of_columns(name, rows, columns, image)
    downloads = download_all(rows[image], cache_dir, notes)
    groups = groups_of(name, columns.group, rows)
    return BytesSource(rows[image], labels, label_names, name, root, downloads, groups)


class BytesSource:
    """Images in memory: encoded bytes, PIL images, arrays or paths, from a list or a DataFrame."""

    def __init__(
        self,
        values: Sequence[Any],
        labels: np.ndarray,
        label_names: list[str],
        name: str,
        root: Path,
        downloads: Downloads,
        groups: np.ndarray | None = None,
    ):
        self.groups = groups
        self.values, self.labels, self.label_names, self._name, self.root = values, labels, label_names, name, root
        self.downloads, self.missing = downloads, tuple(downloads.failed)
        self.sorted_by_class = classes_in_turn(labels)
        sample = np.unique(np.linspace(0, len(labels) - 1, num=min(64, len(labels)), dtype=np.int64))
        self.fingerprint = digest("values", *label_names, labels.tobytes(), *(content(values[row]) for row in sample))

    def open(self, row: int) -> Image.Image:
        value, name = self.values[row], self.name(row)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, Image.Image):
            return value
        if isinstance(value, np.ndarray):
            try:
                return Image.fromarray(value)
            except (TypeError, ValueError) as error:
                shown = f"an array {value.shape} of {value.dtype}"
                raise UnreadableImage(f"{name}: {shown} is no image: give uint8 (height, width, 3)") from error
        if is_address(value):
            return open_encoded(self.downloads.file(value), name)
        if isinstance(value, str | os.PathLike):
            return open_encoded(self.root / value, name)
        if not isinstance(value, bytes):
            kinds = "PIL images, uint8 arrays, encoded bytes or paths"
            raise UnreadableImage(f"{name}: {type(value).__name__} is no image: give {kinds}")
        return open_encoded(value, name)

    def name(self, row: int) -> str:
        value = self.values[row]
        return printable(value) if isinstance(value, str | os.PathLike) else f"{self._name}[{row}]"


def content(value: Any) -> bytes:
    """Bytes of an image for a fingerprint."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return value.tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
