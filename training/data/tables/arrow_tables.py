"""Tables of images and labels read by `datasets`: parquet files, data sets on the Hub, and Dataset objects.

Images stay encoded until they are opened.

Tests: tests/training/data/test_dataset.py.
"""

import base64
import contextlib
import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_vit.download import is_address
from hf_vit.errors import HFViTError, listed
from hf_vit.image_io import UnreadableImage, format_of, one_line, open_encoded

from ..sources import Columns, Reader, by_split, classes_in_turn, digest, groups_of, only_one_class, own_cache
from .columns import (
    SPLIT_COLUMNS,
    class_label_rows,
    find_image_column,
    find_label_column,
    grouped,
    integer_rows,
    label_rows,
    requested_labels,
    rows_of_splits,
)
from .downloads import Downloads, download_all
from .path_tables import missing_files
from .targets import read_targets


MAX_PATH = 4096  # characters
BASE64_HEAD = 88  # characters of base64 that hold as many bytes as tell a format


@dataclass(frozen=True)
class TableSource:
    """Rows of a memory-mapped `datasets.Dataset`; images stay encoded until they are opened."""

    table: Any
    image_column: str
    labels: np.ndarray
    label_names: list[str]
    prefix: str
    fingerprint: str
    sorted_by_class: bool = False
    root: str = ""  # folder that paths are relative to
    missing: tuple[str, ...] = ()  # files that do not exist, and addresses that could not be downloaded
    downloads: Downloads | None = None  # of paths that are addresses
    groups: np.ndarray | None = None  # of the rows, text (n,)

    def record(self, row: int) -> dict[str, Any]:
        """The encoded image: {"bytes": ..., "path": ...}, either may be None."""
        # One row of the Arrow table: ten times faster than Dataset.__getitem__, which formats all columns.
        value = self.table.data.fast_slice(row, 1).column(self.image_column)[0].as_py()
        if isinstance(value, str):  # a path, or the image itself as text
            return text_record(value)
        return value if isinstance(value, dict) else {"bytes": value, "path": None}

    def open(self, row: int) -> Image.Image:
        record, name = self.record(row), self.name(row)
        if record is None or (record.get("bytes") is None and record.get("path") is None):
            raise UnreadableImage(f"{name}: the row holds no image")
        if record.get("bytes") is not None:
            return open_encoded(record["bytes"], name)
        if self.downloads is not None and is_address(record["path"]):
            return open_encoded(self.downloads.file(record["path"]), name)
        return open_encoded(os.path.join(self.root, os.path.expanduser(record["path"])), name)

    def name(self, row: int) -> str:
        return f"{self.prefix}[{row}]"


def text_record(text: str) -> dict[str, Any]:
    """An image written as text: base64, also as a data: URL; else a path."""
    if text.startswith("data:") or len(text) > MAX_PATH or is_base64_image(text):
        with contextlib.suppress(ValueError):
            return {"bytes": base64.b64decode(text.partition("base64,")[2] or text), "path": None}
    return {"bytes": None, "path": text[:MAX_PATH]}


def is_base64_image(text: str) -> bool:
    """Whether a text begins like an image in base64: paths of that length have a dot."""
    try:
        return len(text) >= BASE64_HEAD and format_of(base64.b64decode(text[:BASE64_HEAD], validate=True)) is not None
    except ValueError:
        return False


def parquet_reader(
    name: str, root: Path, files: list[Path], columns: Columns, cache_dir: str | os.PathLike | None
) -> Reader:
    """Reader of parquet files; a split name in a file's or folder's name is its split, without one it is "train"."""
    import datasets

    splits = by_split([str(file.relative_to(root)) for file in files])

    def read(split: str) -> Any:
        # `datasets` keys its cache by folder names and patterns, so that two folders of one name would share their
        # rows. A cache folder of our own for each path, size and modification time cannot be stale.
        paths = [root / file for file in splits[split]]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        try:
            table = datasets.load_dataset(
                "parquet", data_files={split: [glob.escape(str(path)) for path in paths]}, split=split,
                cache_dir=str(own_cache(cache_dir) / digest(*stats)),
            )  # fmt: skip
        except Exception as error:  # datasets wraps whatever pyarrow raises
            cause = error.__cause__ or error
            if "BatchSize must be greater than 0" in str(cause):  # pyarrow's error for files without rows
                raise HFViTError(f"split '{split}' of '{name}' is empty") from error
            raise HFViTError(f"cannot read split '{split}' of '{name}' ({one_line(cause)})") from error
        return table

    bases = {split: str(columns.image_root or (root / files[0]).parent) for split, files in splits.items()}
    return reader_of(name, list(splits), read, columns, bases.__getitem__, cache_dir)


def reader_of(
    name: str,
    splits: list[str],
    read: Callable[[str], Any],
    columns: Columns,
    base: Callable[[str], str] = lambda split: "",
    cache_dir: str | os.PathLike | None = None,
) -> Reader:
    """Reader of the tables that `read(split)` returns; a single table may have a column of splits.

    Args:
        base: returns the folder that paths in the table of a split are relative to.

    Raises:
        HFViTError: a column of splits that does not exist, or one of several tables.
    """
    notes: list[str] = []
    if columns.split is not None and len(splits) > 1:
        raise HFViTError(f"'{name}' has the splits {listed(splits)} already: leave out --split_column")
    indices: dict[str, list[int]] = {}
    if len(splits) == 1:
        table = read(splits[0])
        column = columns.split or next((usual for usual in SPLIT_COLUMNS if usual in table.features), None)
        if column is not None:
            cells = cells_of_splits(name, table, column)
            indices = rows_of_splits(name, column, cells, columns.split is not None, notes)
    if indices:
        names, part, root = list(indices), lambda split: table.select(indices[split]), lambda split: base(splits[0])
    else:
        names, part, root = splits, read, base

    def load(split: str) -> TableSource:
        train = lambda: load("train") if "train" in names else None  # noqa: E731
        return table_source(name, split, part(split), columns, train, root(split), notes, cache_dir)

    return Reader(name, names, load, notes, by_names=True)


def cells_of_splits(name: str, table: Any, column: str) -> list[Any]:
    """The values of a column of splits, by name if it is a ClassLabel."""
    if column not in table.features:
        raise HFViTError(f"'{name}' has no column '{column}'; its columns are {listed(list(table.features))}")
    feature, values = table.features[column], table.data.column(column).to_pylist()
    if hasattr(feature, "int2str"):  # a ClassLabel
        values = [None if value is None else feature.int2str(value) for value in values]
    return values


def saved_reader(name: str, path: Path, columns: Columns, cache_dir: str | os.PathLike | None = None) -> Reader:
    """Reader of a Dataset or DatasetDict written by `save_to_disk`."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds: a half-written folder, an older format
        raise HFViTError(f"cannot read '{name}' as what `save_to_disk` writes ({one_line(error)})") from error
    tables = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    return dataset_reader(name, tables, columns, cache_dir)


def dataset_reader(
    name: str, tables: dict[Any, Any], columns: Columns, cache_dir: str | os.PathLike | None = None
) -> Reader:
    """Reader of `datasets.Dataset` objects."""
    named = {str(split): table for split, table in tables.items()}
    base = str(columns.image_root or "")

    def read(split: str) -> Any:
        table = named[split]
        # After select or shuffle, the Arrow table still has all rows in their old order.
        return table if table._indices is None else table.flatten_indices()

    return reader_of(name, list(named), read, columns, lambda split: base, cache_dir)


def hub_reader(name: str, config_name: str | None, columns: Columns, cache_dir: str | os.PathLike | None) -> Reader:
    """Reader of a data set on the Hub.

    Raises:
        HFViTError: unreachable, unknown, private, or of several configurations with none chosen.
    """
    import datasets

    check_dataset_access(name)
    cache = None if cache_dir is None else str(cache_dir)
    builder = ask(name, lambda: datasets.load_dataset_builder(name, config_name, cache_dir=cache))
    splits = list(builder.info.splits or ()) or ask(name, lambda: datasets.get_dataset_split_names(name, config_name))

    def read(split: str) -> Any:
        return ask(name, lambda: datasets.load_dataset(name, config_name, split=split, cache_dir=cache))

    return reader_of(name, splits, read, columns, cache_dir=cache_dir)


def hub_files(name: str, config_name: str | None, cache_dir: str | os.PathLike | None) -> dict[str, list[str]]:
    """Addresses of the files of each split of a Hub data set; empty if a script makes them."""
    import datasets

    check_dataset_access(name)
    cache = None if cache_dir is None else str(cache_dir)
    builder = ask(name, lambda: datasets.load_dataset_builder(name, config_name, cache_dir=cache))
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}


def check_dataset_access(name: str) -> None:
    """Ask the Hub for a data set once, before `datasets`, which retries for half a minute without a network.

    Raises:
        HFViTError: unreachable, unknown, private or gated; never in offline mode, which reads the cache.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except GatedRepoError as error:
        raise HFViTError(f"the Hub dataset '{name}' is gated; accept its terms and run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise HFViTError(
            f"'{name}' is neither a local path nor a dataset on the Hub; check the name, "
            "or run `hf auth login` if it is private"
        ) from error
    except OfflineModeIsEnabled:
        pass
    except Exception as error:  # the HTTP library's own exceptions, which differ between versions of huggingface_hub
        raise unreachable(name, error) from error


def ask(name: str, question: Callable[[], Any]) -> Any:
    """Call `datasets` after `check_dataset_access`, and turn its errors into HFViTError."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    try:
        return question()
    except DatasetNotFoundError as error:  # a gated one, which `check_dataset_access` finds without its files
        raise HFViTError(
            f"'{name}' cannot be read ({one_line(error)}); accept its terms on its page and run `hf auth login`"
        ) from error
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        raise HFViTError(f"'{name}' is on the Hub, but holds no data ({one_line(error)}); choose another") from error
    except (ConnectionError, FileNotFoundError) as error:
        raise unreachable(name, error) from error
    except Exception as error:  # of many kinds: a loading script, a damaged download, an unknown configuration
        cause = one_line(error.__cause__ or error)
        hint = "; choose one with --dataset_config_name" if re.match("Config name|BuilderConfig", cause) else ""
        raise HFViTError(f"'{name}' cannot be read ({cause}){hint}") from error


def unreachable(name: str, error: BaseException) -> HFViTError:
    """The error for a Hub id without network."""
    return HFViTError(
        f"'{name}' is neither a local path nor a Hub dataset that can be reached now ({one_line(error)}); give "
        "a folder of train/CLASS/*.jpg, a parquet folder or `digits`, or go online; what was downloaded before opens "
        "with HF_HUB_OFFLINE=1"
    )


def table_source(
    name: str,
    split: str,
    table: Any,
    columns: Columns,
    load_train: Callable[[], TableSource | None],
    root: str,
    notes: list[str],
    cache_dir: str | os.PathLike | None,
) -> TableSource:
    """One split of a table as a source: finds its columns, reads and checks its labels, downloads addresses."""
    import datasets
    from pyarrow import ArrowInvalid, compute

    if table._indices is not None:
        table = table.flatten_indices()
    image_column = find_image_column(name, table.features, columns.image)
    labels, names = np.zeros(len(table), dtype=np.int64), ["unlabelled"]
    if columns.labelled:
        labels, names = read_labels(name, split, table, columns, image_column, load_train)
    feature = table.features[image_column]
    is_text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    if not is_text:
        try:
            table = table.cast_column(image_column, datasets.Image(decode=False))
        except (ArrowInvalid, NotImplementedError, TypeError) as error:
            raise HFViTError(
                f"column '{image_column}' of '{name}' holds no images, paths or bytes ({one_line(error)}); choose "
                "another with --image_column"
            ) from error
    missing: list[str] = []
    downloads = None
    if is_text:
        texts = [text for text in table.data.column(image_column).to_pylist() if text is not None]
        paths = [path for text in texts if (path := text_record(text)["path"]) is not None]
        missing, downloads = missing_files(name, paths, Path(root), notes), download_all(paths, cache_dir, notes)
        missing += downloads.failed
    prefix = f"{Path(name).name}:{split}"
    sample = np.unique(np.linspace(0, len(labels) - 1, num=min(64, len(labels)), dtype=np.int64))
    in_turn = classes_in_turn(labels)
    source = TableSource(table, image_column, labels, names, prefix, "", in_turn, root, tuple(missing), downloads)
    pieces = [str(source.record(int(row))["bytes"] or source.record(int(row))["path"]).encode() for row in sample]
    stored = table.data.column(image_column)
    sizes = compute.binary_length(stored if is_text else compute.struct_field(stored, "bytes"))
    # All sizes and a sample of the contents: reading all images would take as long as an epoch.
    fingerprint = digest(*names, labels.tobytes(), compute.fill_null(sizes, -1).to_numpy().tobytes(), *pieces)
    chosen = [columns.group] if columns.group in table.features else []
    cells = {column: table.data.column(column).to_pylist() if column in chosen else [] for column in table.features}
    groups = groups_of(name, columns.group, cells)
    return replace(source, fingerprint=fingerprint, groups=groups)


def read_labels(
    name: str,
    split: str,
    table: Any,
    columns: Columns,
    image_column: str,
    load_train: Callable[[], TableSource | None],
) -> tuple[np.ndarray, list[str]]:
    """Labels of all rows, and the names of classes, labels or numbers."""
    import datasets

    each = requested_labels(columns.label)
    requested, group = grouped(each[0] if len(each) == 1 else None, table.features)
    chosen = [
        find_label_column(name, table.features, w, image_column) for w in ([requested] if len(each) == 1 else each)
    ]
    feature = table.features[chosen[0]]
    values = {column: table.data.column(column).to_pylist() for column in chosen}
    if group is not None:
        only_one_class(name, columns, f"has one class for each image in '{columns.label}'")
        labels = class_label_rows(name, chosen[0], values[chosen[0]])
        return integer_rows(name, chosen[0], (labels // group).astype(int).tolist(), columns.label_names)
    if len(chosen) == 1 and isinstance(feature, datasets.ClassLabel):
        only_one_class(name, columns, f"has one class for each image in its column '{chosen[0]}'")
        return class_label_rows(name, chosen[0], values[chosen[0]]), list(feature.names)
    if columns.label_names is None and split != "train":
        columns = columns.like(load_train())
    if isinstance(inner := getattr(feature, "feature", None), datasets.ClassLabel):  # lists of class numbers
        named = [None if row is None else [inner.int2str(number) for number in row] for row in values[chosen[0]]]
        values = {chosen[0]: named}
        columns = columns if columns.label_names is not None else columns.counting_in(list(inner.names))
    names = columns.label_names
    return read_targets(name, values, columns, lambda: label_rows(name, chosen[0], values[chosen[0]], names))
