"""Folders of images: which folders are splits, which are classes, and the files in them.

One walk of the whole tree (hf_vit/image_files.py) finds images, tables and archives together. The index of a large
tree is cached, and valid as long as no folder has changed. Names are bytes in one NumPy buffer: a list of a million
strings would be copied into every worker, page by page, as it is read. The buffer of a large split is mapped from a
file, so that the processes of a machine share its memory. Not torchvision's `ImageFolder`: it holds a list of tuples,
and knows neither splits nor tables.
"""

import contextlib
import itertools
import json
import os
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import HF_HOME
from PIL import Image

from hf_vit.atomic_file import atomic_path
from hf_vit.download import is_address
from hf_vit.errors import HFViTError, listed
from hf_vit.image_files import DATA_NAMES, LeftOut, ScannedFolder, Walk, identity, join, walk
from hf_vit.image_io import one_line, open_encoded, printable

from .sources import SPLIT_IN_FILE_NAME, SPLIT_NAMES, Reader, digest, relabel
from .tables.downloads import Downloads


LARGE = 100_000  # images; of more, the index is cached and the fingerprint has no file sizes
SETTLED = 2_000_000_000  # ns: a folder that was changed shortly before the walk may change again in the same tick
READ_WHOLE = 32 << 20  # bytes of images up to which the fingerprint has the contents of all
SAMPLED = 64  # files whose contents it has otherwise
METADATA_NAMES = (b"metadata.csv", b"metadata.jsonl", b"metadata.parquet")
CACHE_VERSION = 1


@dataclass(frozen=True)
class FileSource:
    """Image files below a root; the names are bytes, without a Python object for each.

    Attributes:
        folders: relative to the root. folder_of: int32 (n,), index of each image's folder.
        names: uint8, all file names, each followed by a NUL byte. ends: int64 (n,), positions of these bytes.
        missing: files that are known not to exist. downloads: of names that are addresses.
    """

    root: bytes
    folders: list[bytes]
    folder_of: np.ndarray
    names: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    label_names: list[str]
    fingerprint: str
    sorted_by_class: bool = True
    missing: tuple[str, ...] = ()
    downloads: Downloads | None = None
    groups: np.ndarray | None = None

    def path(self, row: int) -> bytes:
        """Relative to the root."""
        start = int(self.ends[row - 1]) + 1 if row else 0
        return join(self.folders[self.folder_of[row]], self.names[start : self.ends[row]].tobytes())

    def open(self, row: int) -> Image.Image:
        path = self.path(row)
        if self.downloads is not None and is_address(address := os.fsdecode(path)):
            return open_encoded(self.downloads.file(address), address)
        return open_encoded(os.fsdecode(os.path.join(self.root, path)), printable(path))

    def name(self, row: int) -> str:
        return printable(self.path(row))

    def paths(self) -> Iterator[bytes]:
        return (self.path(row) for row in range(len(self.labels)))


@dataclass
class Layout:
    """The splits and classes of a tree of folders.

    Attributes:
        splits: the classes of each split, and for each class the folders with its images.
        notes: lines for the user: assumptions, and what was left out.
    """

    splits: dict[str, dict[str, list[bytes]]]
    notes: list[str] = field(default_factory=list)

    def has_classes(self, tree: "Tree") -> bool:
        """Whether some split has two classes with images."""
        return any(
            sum(any(tree.total[path] for path in paths) for paths in classes.values()) > 1
            for classes in self.splits.values()
        )


class Tree:
    """A walk as a tree: children of each folder, and the number of images in and below it."""

    def __init__(self, walk: Walk):
        self.folders = {folder.path: folder for folder in walk.folders}
        self.children: dict[bytes, list[bytes]] = defaultdict(list)
        self.total: Counter = Counter()
        for folder in walk.folders:
            path = folder.path
            if path:
                self.children[path.rpartition(b"/")[0]].append(path)
            while folder.count:
                self.total[path] += folder.count
                if not path:
                    break
                path = path.rpartition(b"/")[0]

    def filled(self, path: bytes) -> list[bytes]:
        """The children that hold images, at any depth."""
        return [child for child in self.children[path] if self.total[child]]

    def holds_classes(self, path: bytes) -> bool:
        return bool(self.filled(path)) or metadata_of(self.folders[path]) is not None

    def below(self, path: bytes) -> list[bytes]:
        """The folder and all below it that hold images."""
        paths = [path] if self.folders[path].count else []
        return paths + [folder for child in self.children[path] for folder in self.below(child)]

    def unwrapped(self, path: bytes, known: Sequence[str] = ()) -> bytes:
        """The folder with the class folders: `path`, or one that wraps them (`seg_train/seg_train/CLASS`)."""
        while not self.folders[path].count and metadata_of(self.folders[path]) is None:
            filled = self.filled(path)
            if len(filled) != 1 or class_name(filled[0]) in known or not self.filled(filled[0]):
                break
            if len(self.children[path]) > 1 and split_of(filled[0]) is not None:
                break
            path = filled[0]
        return path


def base_name(path: bytes) -> str:
    return printable(path.rpartition(b"/")[2])


def class_name(path: bytes) -> str:
    """Name of a class: that of its folder, in Unicode's NFC."""
    # macOS decomposes letters in file names, keyboards and tables compose them.
    return unicodedata.normalize("NFC", base_name(path))


def split_of(path: bytes) -> str | None:
    """The split in a folder's name (`train`, `training_set`, `seg_train`, `val2017`), by the rules of `datasets`."""
    words = SPLIT_IN_FILE_NAME.findall(base_name(path))
    return SPLIT_NAMES[words[-1].lower()] if words else None


def metadata_of(folder: ScannedFolder) -> bytes | None:
    """Name of the `metadata.csv`, `.jsonl` or `.parquet` of `datasets`' imagefolder; None without one."""
    return next((name for name in METADATA_NAMES if name in folder.data), None)


def read_layout(name: str, walk: Walk, tree: Tree) -> Layout:
    """Find out which folders are splits and which are classes.

    Raises:
        HFViTError: images without class folders.
    """
    notes: list[str] = []
    root = b"" if any(is_split(tree, child) for child in tree.filled(b"")) else tree.unwrapped(b"")
    if root:
        notes.append(f"'{name}' is wrapped: the images are read from its folder '{printable(root)}'")
    filled = tree.filled(root)
    named = [path for path in filled if is_split(tree, path)]
    exact = [path for path in named if base_name(path).lower() in SPLIT_NAMES]
    meant = {split_of(path) for path in named}
    splits: dict[str, list[bytes]] = {}
    if exact or len(named) == len(filled) or ("train" in meant and len(meant) > 1):
        for path in named:
            splits.setdefault(str(split_of(path)), []).append(path)
        left = [path for path in filled if path not in named]
        if left:
            count = sum(tree.total[path] for path in left)
            notes.append(
                f"left out: {count:,} images in {listed([base_name(path) for path in left])}, outside of the splits"
            )
        for split, paths in splits.items():
            if len(paths) > 1:
                notes.append(f"split '{split}' is {' and '.join(base_name(path) for path in paths)} together")
    if not splits:
        words = [path for path in filled if split_of(path) is not None]
        if filled and len(words) == len(filled):
            split_names = listed([base_name(path) for path in words])
            raise HFViTError(
                f"'{name}' has folders named after splits ({split_names}) without class folders in them; put the "
                "images into train/CLASS/*.jpg, one folder per class, or give their labels in a metadata.csv"
            )
        splits = {"train": [root]}
    if "train" in splits:  # first, since its classes distinguish a wrapping folder from a class
        splits = {"train": splits["train"], **splits}
    layout = Layout({}, notes)
    for split, paths in splits.items():
        known = list(layout.splits.get("train", {}))
        classes: dict[str, list[bytes]] = {}
        for path in paths:
            inner = tree.unwrapped(path, known) if path else path
            loose = tree.folders[inner].count
            if loose and tree.filled(inner):
                first = printable(join(inner, tree.folders[inner].names()[0]))
                notes.append(f"left out: {loose:,} images beside the class folders of '{split}' ({first}, ...)")
            for child in tree.children[inner]:
                classes.setdefault(class_name(child), []).append(child)
        ordered = sorted(classes, key=class_order(list(classes)))
        layout.splits[split] = {label: classes[label] for label in ordered}
    return layout


def is_split(tree: Tree, path: bytes) -> bool:
    """Whether a folder is named after a split and holds class folders."""
    # A class called "train" holds images.
    return split_of(path) is not None and tree.holds_classes(path)


def class_order(names: Sequence[str]) -> Any:
    """Sort key of class names: by number if all are numbers, so that 2 comes before 10."""
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    return (lambda name: (int(name), name)) if numbers else (lambda name: name)


def folder_reader(
    name: str, root: Path, walk: Walk, tree: Tree, layout: Layout, cache_dir: str | os.PathLike | None = None
) -> Reader:
    """Reader of `SPLIT/CLASS/*` or of `CLASS/*`, which is all "train".

    Args:
        cache_dir: where large splits are mapped from.

    Raises:
        HFViTError: no class folders.
    """
    left_out = str(walk.left_out)
    if not any(layout.splits.values()):
        reason = f" (left out: {left_out})" if left_out else ""
        raise HFViTError(
            f"'{name}' holds no class folders{reason}; put the images into train/CLASS/*.jpg (or CLASS/*.jpg), "
            "one folder per class"
        )
    notes = list(layout.notes)
    if left_out:
        notes.append(f"left out in '{name}': {left_out}")
    data = [join(folder.path, item) for folder in walk.folders for item in folder.data if item not in DATA_NAMES]
    if data:
        notes.append(f"left out: tables and archives beside the class folders ({listed([*map(printable, data)])})")

    def load(split: str) -> FileSource:
        classes = layout.splits[split]
        empty = [label for label, paths in classes.items() if not any(tree.total[path] for path in paths)]
        if empty and split == "train":
            raise HFViTError(
                f"the class folder '{empty[0]}' of '{name}' holds no images"
                f"{' (left out: ' + left_out + ')' if left_out else ''}; fill it or remove it"
            )
        check_each_once(name, root, [f for paths in classes.values() for path in paths for f in tree.below(path)])
        folders: list[bytes] = []
        blobs: list[bytes | memoryview] = []
        counts: list[np.ndarray] = []
        sizes: list[int] = []
        for paths in classes.values():
            below = [folder for path in paths for folder in tree.below(path)]
            blob, of, count = class_files(tree, below, len(folders))
            folders += below
            blobs += [blob] if count else []
            counts.append(of)
            sizes.append(count)
        labels = np.repeat(np.arange(len(classes)), sizes).astype(np.int64)
        names = list(classes)
        if split != "train" and "train" in layout.splits:
            train_names = list(layout.splits["train"])
            labels, names = relabel(labels, names, train_names, f"split '{split}' of '{name}'"), train_names
        of = np.concatenate(counts) if counts else np.empty(0, np.int32)
        source = file_source(os.fsencode(root), folders, of, blobs, labels, names)
        if len(labels) <= LARGE:
            return source
        file = index_folder(cache_dir) / f"files-{digest(os.path.realpath(source.root), split)}.bin"
        labels, ends, of, every_name = mapped([source.labels, source.ends, source.folder_of, source.names], file)
        return replace(source, labels=labels, ends=ends, folder_of=of, names=every_name)

    return Reader(name, list(layout.splits), load, notes)


def check_each_once(name: str, root: Path, folders: Sequence[bytes]) -> None:
    """Raise HFViTError if two folders of a split are the same, by a link: its images would be of two classes."""
    first: dict[tuple[int, int], bytes] = {}
    for folder in folders:
        inode = identity(os.path.join(os.fsencode(root), folder))
        if inode in first:
            raise HFViTError(
                f"'{printable(first[inode])}' and '{printable(folder)}' of '{name}' are the same folder, by a link: "
                "its images would count twice; remove the link"
            )
        first[inode] = folder


def class_files(tree: Tree, folders: list[bytes], first: int) -> tuple[bytes | memoryview, np.ndarray, int]:
    """Names of a class's files joined by NUL bytes, in the order of their paths; index of each one's folder; count.

    Args:
        first: index of the first of these folders.
    """
    if len(folders) == 1:
        folder = tree.folders[folders[0]]
        return folder.images, np.full(folder.count, first, dtype=np.int32), folder.count
    rows = sorted(
        (join(path, name), number, name)
        for number, path in enumerate(folders, start=first)
        for name in tree.folders[path].names()
    )
    blob = b"\0".join(name for _, _, name in rows)
    return blob, np.array([number for _, number, _ in rows], dtype=np.int32), len(rows)


def file_source(
    root: bytes,
    folders: list[bytes],
    folder_of: np.ndarray,
    blobs: Sequence[bytes | memoryview],
    labels: np.ndarray,
    label_names: list[str],
    sorted_by_class: bool = True,
) -> FileSource:
    """A source of files and its fingerprint.

    Args:
        blobs: names joined by NUL bytes.
    """
    names = np.frombuffer(b"\0".join([*blobs, b""]), dtype=np.uint8)
    ends = np.flatnonzero(names == 0)
    source = FileSource(root, folders, folder_of, names, ends, labels, label_names, "", sorted_by_class)
    return FileSource(
        root, folders, folder_of, names, ends, labels, label_names, fingerprint_of_files(source), sorted_by_class
    )


def fingerprint_of_files(source: FileSource) -> str:
    """Fingerprint of names, labels and contents.

    It has all sizes and contents of a small set; of a large one only the contents of some files, since asking a
    million files for their size takes longer than finding them.
    """
    count = len(source.labels)
    if count <= LARGE:
        files = list(source.paths())
        sizes = [size_of(os.path.join(source.root, file)) for file in files]
        few = sum(sizes) <= READ_WHOLE
        rows = range(count) if few else np.linspace(0, count - 1, num=SAMPLED, dtype=np.int64)
        contents = [content_of(os.path.join(source.root, files[row])) for row in rows]
        return digest(*source.label_names, *files, *sizes, source.labels.tobytes(), *contents)
    rows = np.linspace(0, count - 1, num=SAMPLED, dtype=np.int64)
    contents = [content_of(os.path.join(source.root, source.path(int(row)))) for row in rows]
    parts = (source.names.data, source.folder_of.data, source.labels.data)
    return digest("large", *source.label_names, *source.folders, *parts, *contents)


def size_of(path: bytes) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # reported when it is decoded
        return 0


def content_of(path: bytes) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


# -- the index of large trees, kept ----------------------------------------------------------------------------------


def cached_walk(root: Path, cache_dir: str | os.PathLike | None, notes: list[str] | None = None) -> Walk:
    """`walk`, from the cache if no folder has changed; of a large tree by one process at a time.

    Args:
        notes: a line is added if the cached index is damaged.
    """
    base = os.fsencode(root)
    index = index_folder(cache_dir) / f"folders-{digest(os.path.realpath(base))}.npz"
    if (cached := read_index(index, base, notes)) is not None:
        return cached
    from filelock import FileLock

    began = time.time_ns()
    with contextlib.ExitStack() as until_written:
        to_be_written = False

        def written_meanwhile() -> Walk | None:
            nonlocal to_be_written
            try:
                index.parent.mkdir(parents=True, exist_ok=True)
                until_written.enter_context(FileLock(f"{index}.lock"))
            except (OSError, NotImplementedError):  # a cache that cannot be written, or locked: each process walks
                return None
            written = read_index(index, base)
            to_be_written = written is None
            return written

        result = walk(base, LARGE, written_meanwhile)
        if to_be_written:
            with contextlib.suppress(OSError, HFViTError):  # a full disk, say
                write_index(index, result, began)
    return result


def mapped(arrays: Sequence[np.ndarray], path: Path) -> Sequence[np.ndarray]:
    """The arrays, mapped from a file whose memory all processes of a machine share; the first process writes it.

    Args:
        arrays: contiguous, with those of larger items first, which aligns all. Returned as they are if the file cannot
            be written.
    """
    from filelock import FileLock

    sizes = [array.nbytes for array in arrays]

    def read() -> list[np.ndarray] | None:
        if not path.exists() or path.stat().st_size != sum(sizes):
            return None
        offsets = itertools.accumulate(sizes[:-1], initial=0)
        parts = [
            np.asarray(np.memmap(path, array.dtype, "r", offset=offset, shape=array.shape))
            for array, offset in zip(arrays, offsets)
        ]
        return (
            parts if all(map(np.array_equal, parts, arrays)) else None
        )  # the set has changed, or the file is damaged

    try:
        if (parts := read()) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if (parts := read()) is None:
                    with atomic_path(path) as temporary, open(temporary, "wb") as file:
                        file.writelines(array.data for array in arrays)
                    parts = read()
    except (OSError, NotImplementedError, HFViTError):  # a full disk, say
        parts = None
    return arrays if parts is None else parts


def index_folder(cache_dir: str | os.PathLike | None) -> Path:
    """`own_cache`, without importing `datasets` for it."""
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")).expanduser() / "hf_vit"


def write_index(path: Path, walk: Walk, began: int) -> None:
    """Write a walk for `read_index`.

    Args:
        began: time at which the walk began, ns.
    """
    about = {
        "version": CACHE_VERSION,
        "root": os.fsdecode(os.path.realpath(walk.root)),
        "began": began,
        "counts": dict(walk.left_out.counts),
        "examples": walk.left_out.examples,
        "data": [[os.fsdecode(name) for name in folder.data] for folder in walk.folders],
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            paths=np.frombuffer(b"\0".join(folder.path for folder in walk.folders), np.uint8),
            images=np.frombuffer(b"".join(folder.images for folder in walk.folders), np.uint8),
            lengths=np.array([len(folder.images) for folder in walk.folders], np.int64),
            counts=np.array([folder.count for folder in walk.folders], np.int64),
            modified=np.array([folder.modified for folder in walk.folders], np.int64),
        )


def read_index(path: Path, base: bytes, notes: list[str] | None = None) -> Walk | None:
    """A cached walk; None if there is none, it is damaged (which is noted), or a folder has changed."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            about = json.loads(saved["about"].tobytes())
            if about["version"] != CACHE_VERSION:
                return None
            if about["root"] != os.fsdecode(os.path.realpath(base)):
                raise ValueError(f"it is of {about['root']}")
            paths = saved["paths"].tobytes().split(b"\0")
            modified = saved["modified"].tolist()
            for folder, stamp in zip(paths, modified, strict=True):
                if stamp > about["began"] - SETTLED or os.stat(os.path.join(base, folder)).st_mtime_ns != stamp:
                    return None
            images, counts, ends = saved["images"].data, saved["counts"].tolist(), np.cumsum(saved["lengths"])
        starts = [0, *ends.tolist()]
        folders = [
            ScannedFolder(
                folder, images[starts[i] : starts[i + 1]], counts[i], list(map(os.fsencode, data)), modified[i]
            )
            for i, (folder, data) in enumerate(zip(paths, about["data"], strict=True))
        ]
        return Walk(base, folders, LeftOut(Counter(about["counts"]), about["examples"]))
    except FileNotFoundError:  # no index, or a folder that no longer exists
        return None
    except Exception as error:  # half a file, or one of another program or data set
        if notes is not None:
            notes.append(f"the index '{path}' is damaged ({one_line(error)}): the folder is walked through again")
        return None
