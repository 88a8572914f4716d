"""Tables that list image files with their labels: CSV, TSV and JSON lines, also the `metadata.csv` of an imagefolder.

The files are read by hf_vit/image_tables.py. Tables with the images themselves in them are read by tables.py.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_vit.download import is_address
from hf_vit.errors import HFViTError, listed
from hf_vit.image_files import Walk, join
from hf_vit.image_io import printable
from hf_vit.image_tables import MAX_CELL, path_column, read_rows

from ..folders import LARGE, FileSource, Tree, file_source, metadata_of, split_of
from ..sources import Columns, Reader, classes_in_turn, groups_of
from .columns import LABEL_COLUMNS, SPLIT_COLUMNS, label_rows, requested_labels, rows_of_splits
from .downloads import download_all
from .targets import read_targets


SHOWN = 200  # characters of a path that a message shows
NUMBER = re.compile(r"(0|[1-9]\d{0,14})(\.\d+)?", re.ASCII)
FILE_KEY = "path of the image"  # column of the files that metadata files list; no column of labels has this name


def label_column(name: str, rows: dict[str, list[Any]], requested: str | None, image: str) -> str:
    """The column of labels: the requested one, or the only one with a usual name."""
    if requested is not None:
        if requested not in rows:
            raise HFViTError(f"'{name}' has no column '{requested}'; its columns are {listed(list(rows))}")
        return requested
    columns = [column for column in rows if column in LABEL_COLUMNS and column != image]
    if len(columns) != 1:
        others = listed([column for column in rows if column != image]) or "none"
        which = (
            f"several columns that could be the label, {listed(columns)}" if columns else f"no label among {others}"
        )
        raise HFViTError(f"'{name}' has {which}; choose with --label_column (one, or one column a label)")
    return columns[0]


def label_columns(name: str, rows: dict[str, list[Any]], columns: Columns, image: str) -> list[str]:
    """The columns of labels: the requested ones, or the only one with a usual name."""
    return [label_column(name, rows, requested, image) for requested in requested_labels(columns.label)]


def labels_of_columns(
    name: str, rows: dict[str, list[Any]], columns: Columns, image: str
) -> tuple[np.ndarray, list[str]]:
    """Labels of all rows, and the names of classes, labels or numbers."""
    chosen = label_columns(name, rows, columns, image)
    return read_targets(
        name,
        {column: rows[column] for column in chosen},
        columns,
        lambda: label_rows(name, chosen[0], numbers_of(rows[chosen[0]]), columns.label_names),
    )


def table_reader(
    name: str, files: dict[str, list[Path]], columns: Columns, cache_dir: str | os.PathLike | None = None
) -> Reader:
    """Reader of tables of paths, one or more per split; a single table may have a column of splits.

    Raises:
        HFViTError: unreadable tables, unclear columns.
    """
    splits: dict[str, dict[str, list[Any]]] = {}
    roots: dict[str, Path] = {}
    notes: list[str] = []
    for split, paths in files.items():
        parts = [read_rows(path) for path in paths]
        if any(list(part) != list(parts[0]) for part in parts):
            raise HFViTError(f"the tables of split '{split}' of '{name}' have different columns")
        rows = {column: [value for part in parts for value in part[column]] for column in parts[0]}
        if columns.split is not None and len(files) > 1:
            raise HFViTError(f"'{name}' has a table for each split ({listed(list(files))}): leave out --split_column")
        divided = by_column(name, rows, columns.split, notes) if len(files) == 1 else {}
        for part, chosen in (divided or {split: rows}).items():
            splits[part] = chosen
            roots[part] = Path(columns.image_root or paths[0].parent).expanduser()

    def load(split: str) -> FileSource:
        rows = splits[split]
        known = load("train") if columns.needs_train(split, splits) else None
        return source_of(name, rows, roots[split], columns.like(known), notes, cache_dir)

    return Reader(name, list(splits), load, notes, by_names=True)


def by_column(
    name: str, rows: dict[str, list[Any]], requested: str | None, notes: list[str]
) -> dict[str, dict[str, list[Any]]]:
    """The rows of each split, by a column; empty without such a column, or without names of splits in it.

    Args:
        requested: the column, which may use any names of splits; None: one with a usual name and usual names of
        splits.
        notes: lines about the column, and rows without a split, are added.

    Raises:
        HFViTError: no such column, or no row with a split.
    """
    column = next((usual for usual in SPLIT_COLUMNS if usual in rows), None) if requested is None else requested
    if column is None:
        return {}
    if column not in rows:
        raise HFViTError(f"'{name}' has no column '{column}'; its columns are {listed(list(rows))}")
    indices_of = rows_of_splits(name, column, rows[column], requested is not None, notes)
    return {
        split: {key: [values[index] for index in indices] for key, values in rows.items()}
        for split, indices in indices_of.items()
    }


def source_of(
    name: str,
    rows: dict[str, list[Any]],
    root: Path,
    columns: Columns,
    notes: list[str],
    cache_dir: str | os.PathLike | None = None,
) -> FileSource:
    """The rows of a table as a source. Missing files are noted, and addresses are downloaded."""
    image = path_column(name, rows, columns.image)
    labels, names = np.zeros(len(rows[image]), dtype=np.int64), ["unlabelled"]
    if columns.labelled:
        labels, names = labels_of_columns(name, rows, columns, image)
    values = [value.strip() if isinstance(value, str) else value for value in rows[image]]
    bad = [row for row, value in enumerate(values) if not isinstance(value, str) or not 0 < len(value) <= MAX_CELL]
    if bad:
        raise HFViTError(
            f"{len(bad)} of {len(values)} rows of '{name}' have no path of an image in column '{image}' (the first is "
            f"row {bad[0] + 1}): {str(values[bad[0]])[:60]!r}"
        )
    values = [value if is_address(value) else os.path.expanduser(value) for value in values]
    values = from_windows(root, values)
    notes += repeated_rows(name, values, labels)
    missing = missing_files(name, values, root, notes)
    downloads = download_all(values, cache_dir, notes)
    if len(missing) + len(downloads.failed) >= len(values):
        raise HFViTError(f"none of the {len(values):,} images that '{name}' lists could be had: {notes[-1]}")
    where = np.zeros(len(values), dtype=np.int32)
    blobs = [b"\0".join(os.fsencode(value) for value in values)]
    base = os.fsencode(root.resolve())
    source = file_source(base, [b""], where, blobs, labels, names, classes_in_turn(labels))
    groups = groups_of(name, columns.group, rows)
    return replace(source, missing=(*missing, *downloads.failed), downloads=downloads, groups=groups)


def missing_files(name: str, values: Sequence[str], root: Path, notes: list[str]) -> list[str]:
    """The paths of a table that do not exist; addresses and very long tables are not checked.

    Raises:
        HFViTError: none of them exists.
    """
    paths = [value for value in values if not is_address(value)]
    if len(paths) > LARGE:
        return []
    missing = [path for path in paths if not os.path.exists(os.path.join(root, path))]
    if missing and len(missing) == len(values):
        raise HFViTError(
            f"none of the {len(paths):,} images that '{name}' lists is there; paths count from "
            f"'{root}', the first is '{printable(paths[0])[:SHOWN]}': give the folder with --image_root"
        )
    if missing:
        names = listed([printable(path) for path in missing])
        notes.append(f"{len(missing):,} of {len(paths):,} images that '{name}' lists are missing: {names}")
    return missing


def from_windows(root: Path, paths: list[str]) -> list[str]:
    """The paths with `/` in place of `\\`, if the first path with a backslash only exists under that name."""
    first = next((path for path in paths if "\\" in path), None)
    if first is None or os.path.exists(os.path.join(root, first)):
        return paths
    if not os.path.exists(os.path.join(root, first.replace("\\", "/"))):
        return paths
    return [path.replace("\\", "/") for path in paths]


def repeated_rows(name: str, paths: list[str], labels: np.ndarray) -> list[str]:
    """A note about images in more than one row, and rows that disagree about the class."""
    label_of: dict[str, int] = {}
    known = [label_of.setdefault(path, label) for path, label in zip(paths, labels.tolist())]
    repeats = len(paths) - len(label_of)
    if not repeats:
        return []
    note = f"{repeats:,} rows of '{name}' list an image again: it may be trained and evaluated on"
    others = [printable(path) for path, first, label in zip(paths, known, labels.tolist()) if first != label]
    return [note + (f"; another class than before: {listed(others)}" if others else "")]


def numbers_of(cells: list[Any]) -> list[Any]:
    """Cells of text as numbers if all of them are, so that 2 sorts before 10; 007 stays text."""
    filled = [cell for cell in cells if cell not in ("", None)]
    if not all(isinstance(cell, str) and NUMBER.fullmatch(cell) for cell in filled):
        return cells
    return [None if cell in ("", None) else float(cell) if "." in cell else int(cell) for cell in cells]


def metadata_reader(
    name: str,
    root: Path,
    walk: Walk,
    tree: Tree,
    columns: Columns,
    notes: list[str],
    cache_dir: str | os.PathLike | None = None,
) -> Reader | None:
    """Reader of `datasets`' imagefolder with `metadata.csv`: labels by file name; None without a column of labels.

    Args:
        notes: assumptions, and what was left out, are added.

    Raises:
        HFViTError: unclear columns, missing files.
    """
    if columns.image_root is not None:
        raise HFViTError(
            f"paths in the metadata files of '{name}' count from their own folder: leave out --image_root"
        )
    splits: dict[str, dict[str, list[Any]]] = {}
    listed_files, labels = 0, list[str]()
    for folder in walk.folders:
        file = metadata_of(folder)
        if file is None:
            continue
        relative = join(folder.path, file)
        rows = read_rows(root / os.fsdecode(relative))
        image = path_column(printable(relative), rows, columns.image)
        if columns.label is None and not any(column in LABEL_COLUMNS for column in rows if column != image):
            notes.append(
                f"'{printable(relative)}' has no column of labels among {listed(list(rows))}: classes are folders"
            )
            continue
        chosen = label_columns(printable(relative), rows, columns, image)
        if labels and chosen != labels:
            raise HFViTError(
                f"'{printable(relative)}' has the labels {listed(chosen)}, another metadata file has {listed(labels)}"
            )
        labels = chosen
        for part, resolved in (by_column(printable(relative), rows, columns.split, notes) or {None: rows}).items():
            if columns.group is not None and columns.group not in resolved:
                columns_there = listed(list(resolved))
                raise HFViTError(
                    f"'{printable(relative)}' has no column '{columns.group}'; its columns are {columns_there}"
                )
            others = list(dict.fromkeys([*chosen, *([columns.group] if columns.group is not None else [])]))
            for value, *cells in zip(resolved[image], *(resolved[column] for column in others)):
                path = os.fsdecode(join(folder.path, os.fsencode(str(value))))
                split = splits.setdefault(part or split_of_path(path), {key: [] for key in (FILE_KEY, *others)})
                for key, cell in zip((FILE_KEY, *others), (path, *cells)):
                    split[key].append(cell)
        listed_files += len(rows[image])
    if not splits:
        return None
    total = tree.total[b""]
    if total > listed_files:
        notes.append(
            f"left out: {total - listed_files:,} of {total:,} images of '{name}', which no metadata file lists"
        )
    notes.insert(0, "labels are read from metadata files, not from folders")
    resolved = replace(columns, image=FILE_KEY, label=labels)

    def load(split: str) -> FileSource:
        known = load("train") if resolved.needs_train(split, splits) else None
        return source_of(name, splits[split], root, resolved.like(known), notes, cache_dir)

    return Reader(name, list(splits), load, notes, by_names=True)


def split_of_path(path: str) -> str:
    """The split that the first folder of a path names; "train" without one."""
    first, slash, _ = path.partition("/")
    return (split_of(os.fsencode(first)) if slash else None) or "train"
