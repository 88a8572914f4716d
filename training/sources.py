"""Where pictures come from: digits, folders, tables (parquet and the Hub), generated images.

data.py is the door that the rest of training uses; this room is behind it. A `Door` knows the splits of a data set
without reading pictures; a `Source` is one split: its labels, and its pictures opened one at a time.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from hf_vit.errors import HFViTError

from .pictures import EXTENSIONS, UnreadableImage, one_line, open_picture
from .randomness import SUBSET, generator
from .shards import TarIndex, TarSource, expand_shards, index_shards, is_shard_pattern, shard_facts
from .synthetic import SMALLEST_SIZE, SyntheticImages


SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
SPLIT_IN_FILE_NAME = re.compile(rf"(?:^|[-_./\\ ])({'|'.join(SPLIT_NAMES)})(?=[-_./\\ 0-9]|$)", re.IGNORECASE)
IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label", "class", "target", "category", "cls")
DIGITS_TEST_IMAGES = 360
LISTED = 8  # how many names an error message lists


class Source(Protocol):
    """One split of a data set.

    `labels` is int64 (n,); `label_names` names them; `sorted_by_class` says that neighbouring rows share their class,
    so that slices must not be taken in row order; `fingerprint` changes when names, labels or contents do.
    """

    labels: np.ndarray
    label_names: list[str]
    sorted_by_class: bool
    fingerprint: str

    def open(self, row: int) -> Image.Image:
        """The picture, opened but not yet decoded; raises UnreadableImage."""

    def name(self, row: int) -> str:
        """What messages and lists call the picture."""


@dataclass(frozen=True)
class Door:
    """The splits of a data set, and how to read one of them."""

    name: str
    splits: list[str]
    load: Callable[[str], Source]


@dataclass(frozen=True)
class Columns:
    """What the user said about the columns of a table; None: find out."""

    image: str | None = None
    label: str | None = None
    label_names: list[str] | None = None


def open_door(name: str, config_name: str | None, columns: Columns, cache_dir: str | os.PathLike | None) -> Door:
    """Find out what `name` means.

    Raises:
        HFViTError: nothing of that name, or no pictures in it.
    """
    if name == "digits":
        return Door(name, ["train", "test"], digits_split)
    if name.startswith("synthetic:"):
        return synthetic_door(name)
    path = Path(name).expanduser()
    if path.is_dir() and any(path.glob("*.tar")):
        return shards_door(name, str(path / "*.tar"), columns, cache_dir)
    if is_shard_pattern(name):
        return shards_door(name, name, columns, cache_dir)
    if path.exists():
        return local_door(name, path.resolve(), columns, cache_dir)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) or path.suffix in (".parquet", ".tar"):
        raise HFViTError(
            f"no file or folder '{name}'; give a folder of train/CLASS/*.jpg, a parquet file or folder, "
            "a Hub id such as user/name, or a built-in name: digits, synthetic:glyphs"
        )
    return hub_door(name, config_name, columns, cache_dir)


def listed(names: Sequence[object]) -> str:
    """Names for a message, the first few."""
    shown = ", ".join(str(name) for name in names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown}, ... ({len(names)} in all)"


def digest(*parts: object) -> str:
    """Hexadecimal SHA-256 over strings and bytes, shortened to 32 digits."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:32]


def nested_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Order rows so that every prefix is a stratified random subset, and a shorter prefix lies inside a longer one.

    Args:
        labels: int (n,). seed: another seed, another order.

    Returns:
        int64 (n,), a permutation: the r-th of a class's n_c pictures stands at (r + 1/2) / n_c of the way.
    """
    place = np.empty(len(labels))
    tie = generator(SUBSET, seed, 0).random(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        generator(SUBSET, seed, 1, int(label)).shuffle(rows)
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.lexsort((tie, place))


# Arrays in memory


@dataclass(frozen=True)
class ArraySource:
    """Pictures that are already pixels: uint8 (n, H, W, 3)."""

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
    order = nested_order(digits.target, seed=0)
    rows = np.sort(order[:DIGITS_TEST_IMAGES] if split == "test" else order[DIGITS_TEST_IMAGES:])
    grey = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    labels = digits.target[rows].astype(np.int64)
    names = [f"digits/{row}" for row in rows]
    return ArraySource(pixels, labels, [str(n) for n in range(10)], names, digest("digits", split, pixels.tobytes()))


# Generated pictures


@dataclass(frozen=True)
class SyntheticSource:
    """Generated pictures, drawn when they are asked for."""

    images: SyntheticImages
    labels: np.ndarray
    label_names: list[str]
    fingerprint: str
    size_is_given: bool  # in the name; otherwise pictures are drawn at the size that the transform wants
    sorted_by_class: bool = False

    def drawn_for(self, height: int, width: int) -> "SyntheticSource":
        """The same pictures at the resolution of a transform's result."""
        if self.size_is_given:
            return self
        return replace(self, images=replace(self.images, size=max(height, width, SMALLEST_SIZE)))

    def open(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row]["image"])

    def name(self, row: int) -> str:
        return self.images.name(row)


def synthetic_door(name: str) -> Door:
    """Door of `synthetic:FAMILY[@classes,instances[,size]]`; no instance is in two splits."""
    images = SyntheticImages.from_name(name)
    size_is_given = name.count(",") == 2

    def load(split: str) -> SyntheticSource:
        part = images.split(split)
        mark = digest("synthetic", part.describe(), part.size if size_is_given else "any size")
        return SyntheticSource(part, part.labels, part.label_names, mark, size_is_given)

    return Door(name, ["train", "validation", "test"], load)


# Folders


@dataclass(frozen=True)
class FolderSource:
    """Files in folders named after their class."""

    root: str
    files: list[str]
    labels: np.ndarray
    label_names: list[str]
    fingerprint: str
    sorted_by_class: bool = True

    def open(self, row: int) -> Image.Image:
        return open_picture(os.path.join(self.root, self.files[row]), self.files[row])

    def name(self, row: int) -> str:
        return self.files[row]


def local_door(name: str, path: Path, columns: Columns, cache_dir: str | os.PathLike | None) -> Door:
    """Door of a file or folder: parquet where there is any, else a folder of class folders."""
    if path.is_file():
        if path.suffix != ".parquet":
            raise HFViTError(f"'{name}' is a file, but not a .parquet file; give the folder that holds the pictures")
        return parquet_door(name, path.parent, [path], columns, cache_dir)
    tables = sorted(file for file in path.rglob("*.parquet") if not hidden(file.relative_to(path)))
    if tables:
        return parquet_door(name, path, tables, columns, cache_dir)
    return folder_door(name, path)


def hidden(path: Path) -> bool:
    """Whether any part of a relative path begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def subfolders(path: Path) -> list[Path]:
    """The folders in a folder, sorted by name; hidden ones left out."""
    return sorted((item for item in path.iterdir() if item.is_dir() and not item.name.startswith(".")),
                  key=lambda item: item.name)  # fmt: skip


def folder_door(name: str, root: Path) -> Door:
    """Door of `SPLIT/CLASS/*` or of `CLASS/*`, which is all "train"."""
    folders = subfolders(root)
    named = {SPLIT_NAMES[f.name.lower()]: f for f in folders if f.name.lower() in SPLIT_NAMES and subfolders(f)}
    splits = named or {"train": root}
    if not any(subfolders(folder) for folder in splits.values()):
        raise HFViTError(
            f"'{name}' holds no class folders; put the pictures into train/CLASS/*.jpg (or CLASS/*.jpg), "
            "one folder per class"
        )

    def load(split: str) -> FolderSource:
        files, labels, names, sizes = class_files(name, splits[split])
        if split != "train" and "train" in splits:
            train_names = [folder.name for folder in subfolders(splits["train"])]
            labels, names = relabel(labels, names, train_names, f"split '{split}' of '{name}'"), train_names
        prefix = os.path.relpath(splits[split], root)
        files = [os.path.normpath(os.path.join(prefix, file)) for file in files]
        return FolderSource(str(root), files, labels, names, digest(*names, *files, *sizes, labels.tobytes()))

    return Door(name, list(splits), load)


def class_files(name: str, folder: Path) -> tuple[list[str], np.ndarray, list[str], list[int]]:
    """Pictures below `CLASS/`, at any depth: paths relative to `folder`, labels, class names, sizes in bytes."""
    files: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    classes = subfolders(folder)
    for label, class_folder in enumerate(classes):
        found = sorted(picture_files(class_folder))
        if not found:
            raise HFViTError(
                f"the class folder '{class_folder.name}' of '{name}' holds no pictures; fill it or remove it"
            )
        files += [os.path.relpath(path, folder) for path in found]
        sizes += [os.path.getsize(path) for path in found]
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64), [item.name for item in classes], sizes


def picture_files(folder: Path) -> list[str]:
    """Paths of all pictures below a folder, by their extension; hidden ones left out."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [item for item in folders if not item.startswith(".")]
        found += [
            os.path.join(parent, file)
            for file in files
            if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith(".")
        ]
    return found


def relabel(labels: np.ndarray, names: Sequence[str], wanted: Sequence[str], what: str) -> np.ndarray:
    """Labels that count in `names` as labels that count in `wanted`.

    Raises:
        HFViTError: a class that occurs is not among the wanted ones.
    """
    place = {name: number for number, name in enumerate(wanted)}
    unknown = [names[label] for label in np.unique(labels) if names[label] not in place]
    if unknown:
        raise HFViTError(
            f"{what} has classes that the model does not know: {listed(unknown)}; known are {listed(list(wanted))}"
        )
    table = np.array([place.get(name, -1) for name in names], dtype=np.int64)
    return table[labels]


def shards_door(name: str, pattern: str, columns: Columns, cache_dir: str | os.PathLike | None) -> Door:
    """Door of tar shards on a local disk."""
    if "://" in pattern:
        raise HFViTError(f"'{name}' lies elsewhere; stream it (--streaming), or copy the shards to this machine")
    splits = shards_by_split(expand_shards(pattern))

    def load(split: str) -> TarSource:
        index, mark = load_index(name, splits[split], columns.label_names, cache_dir)
        return TarSource(index, index.labels, index.label_names, mark)

    return Door(name, list(splits), load)


def by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Files under the split that the last part of their name or folders contains; "train" where none does."""
    splits: dict[str, list[str]] = {}
    for file in files:
        found = SPLIT_IN_FILE_NAME.findall(file)
        splits.setdefault(SPLIT_NAMES[found[-1].lower()] if found else "train", []).append(file)
    return splits


def shards_by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Shards under their split: named in the file's name, or by the folder that holds it, else "train"."""
    splits: dict[str, list[str]] = {}
    for file in files:
        folder, base = os.path.split(file.split("?")[0])
        found = SPLIT_IN_FILE_NAME.findall(base)
        word = found[-1] if found else os.path.basename(folder)
        splits.setdefault(SPLIT_NAMES.get(word.lower(), "train"), []).append(file)
    return splits


def load_index(
    name: str, urls: list[str], label_names: list[str] | None, cache_dir: str | os.PathLike | None
) -> tuple[TarIndex, str]:
    """The index of shards with checked labels, and its fingerprint."""
    facts = shard_facts(urls)
    index = index_shards(urls, own_cache(cache_dir) / f"shards-{digest(*facts)}.npz")
    index = with_names(index, name, label_names)
    names = [os.path.basename(url) for url in urls]
    arrays = (index.shard, index.offset, index.size, index.labels)
    return index, digest(*names, *index.label_names, *(array.tobytes() for array in arrays))


def with_names(index: TarIndex, name: str, label_names: list[str] | None) -> TarIndex:
    """The index with class names and checked labels: as given, or one per number from 0.

    Raises:
        HFViTError: labels below 0, above the given names, or with gaps.
    """
    if index.label_names:
        if label_names is None:
            return index
        labels = relabel(index.labels, index.label_names, label_names, f"'{name}'")
        return replace(index, labels=labels, label_names=label_names)
    labels, names = integer_rows(name, "cls", index.labels.tolist(), label_names)
    return replace(index, labels=labels, label_names=names)


def own_cache(cache_dir: str | os.PathLike | None) -> Path:
    """Where unpacked tables and indices of shards are kept: below `datasets`' cache unless the user says otherwise."""
    import datasets

    return Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "hf_vit"


# Tables


@dataclass(frozen=True)
class TableSource:
    """Rows of a `datasets.Dataset`, memory-mapped; the pictures stay encoded until they are asked for."""

    table: Any
    image_column: str
    labels: np.ndarray
    label_names: list[str]
    prefix: str
    fingerprint: str
    sorted_by_class: bool = False

    def record(self, row: int) -> dict[str, Any]:
        """The encoded picture: {"bytes": ..., "path": ...}, either may be None."""
        # One row of the Arrow table: ten times faster than Dataset.__getitem__, which formats all columns.
        value = self.table.data.fast_slice(row, 1).column(self.image_column)[0].as_py()
        return value if isinstance(value, dict) else {"bytes": value, "path": None}

    def open(self, row: int) -> Image.Image:
        record, name = self.record(row), self.name(row)
        if record is None or (record.get("bytes") is None and record.get("path") is None):
            raise UnreadableImage(f"{name}: the row holds no picture")
        return open_picture(record["bytes"] if record.get("bytes") is not None else record["path"], name)

    def name(self, row: int) -> str:
        return f"{self.prefix}[{row}]"


def parquet_door(
    name: str, root: Path, files: list[Path], columns: Columns, cache_dir: str | os.PathLike | None
) -> Door:
    """Door of parquet files; the split is read from the file or folder name and is "train" where it names none."""
    import datasets

    splits = by_split([str(file.relative_to(root)) for file in files])

    def load(split: str) -> TableSource:
        # `datasets` keys its cache by folder names and patterns: two folders of one name share their rows there.
        # A cache folder of our own per path, size and time of change cannot be stale.
        paths = [root / file for file in splits[split]]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        try:
            table = datasets.load_dataset(
                "parquet", data_files={split: [str(path) for path in paths]}, split=split,
                cache_dir=str(own_cache(cache_dir) / digest(*stats)),
            )  # fmt: skip
        except Exception as error:  # datasets wraps whatever pyarrow raises
            cause = error.__cause__ or error
            if "BatchSize must be greater than 0" in str(cause):  # how it says that no file has a row
                raise HFViTError(f"split '{split}' of '{name}' is empty") from error
            raise HFViTError(f"cannot read split '{split}' of '{name}' ({one_line(cause)})") from error
        return table_source(name, split, table, columns, lambda: load("train") if "train" in splits else None)

    return Door(name, list(splits), load)


def hub_door(name: str, config_name: str | None, columns: Columns, cache_dir: str | os.PathLike | None) -> Door:
    """Door of a data set on the Hub.

    Raises:
        HFViTError: unreachable, unknown, private, or of several configurations none of which was chosen.
    """
    import datasets

    knock(name)
    cache = None if cache_dir is None else str(cache_dir)
    builder = ask(name, lambda: datasets.load_dataset_builder(name, config_name, cache_dir=cache))
    splits = list(builder.info.splits or ()) or ask(name, lambda: datasets.get_dataset_split_names(name, config_name))

    def load(split: str) -> TableSource:
        table = ask(name, lambda: datasets.load_dataset(name, config_name, split=split, cache_dir=cache))
        return table_source(name, split, table, columns, lambda: load("train") if "train" in splits else None)

    return Door(name, splits, load)


def hub_files(name: str, config_name: str | None, cache_dir: str | os.PathLike | None) -> dict[str, list[str]]:
    """Addresses of the files of each split of a Hub data set; none where they are made by a script."""
    import datasets

    knock(name)
    cache = None if cache_dir is None else str(cache_dir)
    builder = ask(name, lambda: datasets.load_dataset_builder(name, config_name, cache_dir=cache))
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}


def knock(name: str) -> None:
    """Ask the Hub for a data set, once and quickly: `datasets` retries for half a minute where there is no network.

    Raises:
        HFViTError: unreachable, unknown, private or gated. Silent when the user works offline from the cache.
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
    """What `datasets` answers; its errors as ours."""
    try:
        return question()
    except (ConnectionError, FileNotFoundError) as error:
        raise unreachable(name, error) from error
    except ValueError as error:
        raise HFViTError(f"'{name}': {one_line(error)}") from error


def unreachable(name: str, error: BaseException) -> HFViTError:
    """The error for a Hub id without network."""
    return HFViTError(
        f"'{name}' is neither a local path nor a Hub dataset that can be reached now ({one_line(error)}); give "
        "a folder of train/CLASS/*.jpg, a parquet folder or `digits`, or go online; what was downloaded before opens "
        "with HF_HUB_OFFLINE=1"
    )


def table_source(
    name: str, split: str, table: Any, columns: Columns, load_train: Callable[[], TableSource | None]
) -> TableSource:
    """One split of a table: its columns found, its labels read and checked."""
    import datasets

    image_column = find_image_column(name, table.features, columns.image)
    label_column = find_label_column(name, table.features, columns.label, image_column)
    table = table.cast_column(image_column, datasets.Image(decode=False))
    names = columns.label_names
    feature = table.features[label_column]
    values = table.data.column(label_column).to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        labels, names = class_label_rows(name, label_column, values), list(feature.names)
    elif values and isinstance(values[0], str):
        if names is None and split != "train":
            train = load_train()
            names = None if train is None else train.label_names
        labels, names = string_rows(name, label_column, values, names)
    else:
        labels, names = integer_rows(name, label_column, values, names)
    prefix = f"{Path(name).name}:{split}"
    sample = np.unique(np.linspace(0, len(labels) - 1, num=min(64, len(labels)), dtype=np.int64))
    source = TableSource(table, image_column, labels, names, prefix, "")
    pieces = [str(source.record(int(row))["bytes"] or source.record(int(row))["path"]).encode() for row in sample]
    mark = digest(*names, labels.tobytes(), *pieces)
    return TableSource(table, image_column, labels, names, prefix, mark)


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
