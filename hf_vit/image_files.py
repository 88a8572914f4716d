"""Find the image files below a folder: one walk with `os.scandir`, for training and for the commands.

Sizes and dates of files are not read. A known suffix decides, otherwise the first bytes of the file. Skipped files are
counted by reason, with a few examples. Names are bytes: they need not be UTF-8. Not `os.walk(followlinks=True)`: it
does not end if a link leads to a folder above it.
"""

import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .image_io import (
    HEIC_SUFFIXES,
    OTHER_SUFFIXES,
    SUFFIXES,
    format_of_file,
    printable,
    readable_formats,
)


IMAGE_SUFFIXES = frozenset(suffix.encode() for suffix in SUFFIXES)
NO_IMAGE_SUFFIXES = frozenset(suffix.encode() for suffix in OTHER_SUFFIXES)
HEIF_SUFFIXES = frozenset(suffix.encode() for suffix in HEIC_SUFFIXES)
# Suffixes of nearly all files, compared first and without lower(): twice as fast as cutting the suffix off
COMMON_SUFFIXES = (b".jpg", b".JPEG", b".png", b".jpeg", b".JPG", b".webp")
# Files that hold many images, or labels and paths: reported in `ScannedFolder.data`
DATA_SUFFIXES = frozenset((
    b".parquet", b".csv", b".tsv", b".jsonl", b".arrow", b".tar", b".zip", b".tgz", b".gz", b".bz2", b".xz", b".zst",
    b".7z", b".rar",
))  # fmt: skip
DATA_NAMES = frozenset((b"dataset_info.json", b"dataset_dict.json", b"state.json", b"label_names.json"))
DOT = ord(".")
SKIPPED_FOLDERS = frozenset((b"__MACOSX", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information"))
MAX_EXAMPLES = 3  # names for each reason
MAX_LINK_DEPTH = 2  # links of splits or classes may lead to folders that are also read elsewhere

NOT_IMAGES = "not images"
HEIC = "HEIC, which Pillow cannot read"
HIDDEN = "hidden"
DANGLING = "links to nothing"
SPECIAL = "not regular files"
AGAIN = "links to folders that are read already"
CLOSED = "folders that cannot be read"
RUN = "outputs of a training run"
RUN_FILE = b"config_resolved.yaml"  # the first file that training writes into its output folder


@dataclass
class LeftOut:
    """Files and folders that a walk skipped: a count for each reason, and the first names."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: bytes) -> None:
        self.counts[reason] += 1
        names = self.examples.setdefault(reason, [])
        if len(names) < MAX_EXAMPLES:
            names.append(printable(name))

    def __str__(self) -> str:
        """One line: `3 not images (a.txt, ...), 1 hidden (.b)`; empty if nothing was skipped."""
        return ", ".join(
            f"{count:,} {reason} ({', '.join(self.examples[reason])}{', ...' if count > MAX_EXAMPLES else ''})"
            for reason, count in self.counts.most_common()
        )


@dataclass
class ScannedFolder:
    """One folder of a walk.

    Attributes:
        path: relative to the root, b"" for the root itself. images: names, sorted, joined by NUL bytes; of an index, a
            view of all folders' names.
        count: of the images. data: names of tables, shards and archives. modified: time stamp of the folder, in ns.
    """

    path: bytes
    images: bytes | memoryview
    count: int
    data: list[bytes]
    modified: int

    def names(self) -> list[bytes]:
        """The images' names."""
        return bytes(self.images).split(b"\0") if self.count else []


@dataclass
class Walk:
    """All folders below a root, sorted by path, and what was skipped."""

    root: bytes
    folders: list[ScannedFolder]
    left_out: LeftOut

    def images(self) -> list[bytes]:
        """Relative paths of all images, sorted."""
        return sorted(join(folder.path, name) for folder in self.folders for name in folder.names())


def join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name


def walk(
    root: "str | bytes | os.PathLike", limit: int | None = None, at_limit: Callable[[], Walk | None] | None = None
) -> Walk:
    """Find all images below a folder; links to folders are followed, except in circles.

    Hidden files and folders, and those of operating systems (`__MACOSX`), are skipped.

    Args:
        at_limit: called once if there are more images than `limit`; if it returns a walk (from a cache), the search
            ends with it.
    """
    count = 0
    base = os.fsencode(root)
    left_out = LeftOut()
    folders: list[ScannedFolder] = []
    links: list[bytes] = []
    seen = {identity(base)}
    pending = [b""]
    while pending:  # folders before links to folders: what both lead to has the name of the folder
        path = pending.pop()
        folder, subfolders, new_links = scan(base, path, left_out)
        folders.append(folder)
        count += folder.count
        if at_limit is not None and limit is not None and count > limit:
            if (cached := at_limit()) is not None:
                return cached
            at_limit = None
        seen |= {identity(os.path.join(base, join(path, name))) for name in subfolders}
        pending += [join(path, name) for name in subfolders]
        links += [join(path, name) for name in new_links]
    for link in sorted(links):
        follow(base, link, seen, folders, left_out)
    folders.sort(key=lambda folder: folder.path.split(b"/"))
    return Walk(base, folders, left_out)


def follow(
    base: bytes, link: bytes, seen: set[tuple[int, int]], folders: list[ScannedFolder], left_out: LeftOut
) -> None:
    """Read a link to a folder, unless that is above the link, or read already and the link is deep."""
    parts = link.split(b"/")
    above = {identity(os.path.join(base, *parts[:depth])) for depth in range(len(parts))}
    target = identity(os.path.join(base, link))
    if target in above or (target in seen and len(parts) > MAX_LINK_DEPTH):
        left_out.add(AGAIN, link)
        return
    inside = above | {target}
    pending = [link]
    while pending:
        path = pending.pop()
        folder, subfolders, links = scan(base, path, left_out)
        folders.append(folder)
        for name in subfolders + links:
            below = join(path, name)
            folder_id = identity(os.path.join(base, below))
            if folder_id in inside or (folder_id in seen and name in links):
                left_out.add(AGAIN, below)
            else:
                inside.add(folder_id)
                pending.append(below)
    seen |= inside


def identity(path: bytes) -> tuple[int, int]:
    """Device and inode of a folder: the same by every path to it."""
    try:
        status = os.stat(path)
    except OSError:
        return (-1, hash(path))
    return (status.st_dev, status.st_ino)


def scan(base: bytes, path: bytes, left_out: LeftOut) -> tuple[ScannedFolder, list[bytes], list[bytes]]:
    """One folder, its subfolders, and its links to folders."""
    images: list[bytes] = []
    data: list[bytes] = []
    subfolders: list[bytes] = []
    links: list[bytes] = []
    heic = "HEIF" in readable_formats()
    here = os.path.join(base, path) if path else base
    if path and os.path.lexists(os.path.join(here, RUN_FILE)):  # its figures are not images of a class
        left_out.add(RUN, path)
        return ScannedFolder(path, b"", 0, [], os.stat(here).st_mtime_ns), [], []
    try:
        modified = os.stat(here).st_mtime_ns
        entries = os.scandir(here)
    except OSError:
        left_out.add(CLOSED, path)
        return ScannedFolder(path, b"", 0, [], 0), [], []
    with entries:
        for entry in entries:
            name = entry.name
            if name.endswith(COMMON_SUFFIXES) and name[0] != DOT and entry.is_file(follow_symlinks=False):
                images.append(name)
                continue
            suffix = name[name.rfind(b".") :].lower() if b"." in name else b""
            if name[0] == DOT or name in SKIPPED_FOLDERS:
                left_out.add(HIDDEN, join(path, name))
            elif entry.is_dir(follow_symlinks=False):
                subfolders.append(name)
            else:
                kind = regular(entry)
                if kind != "file":
                    links.append(name) if kind == "folder" else left_out.add(kind, join(path, name))
                elif suffix in IMAGE_SUFFIXES or (heic and suffix in HEIF_SUFFIXES):
                    images.append(name)
                elif suffix in DATA_SUFFIXES or name in DATA_NAMES:
                    data.append(name)
                elif suffix in NO_IMAGE_SUFFIXES:
                    left_out.add(NOT_IMAGES, join(path, name))
                else:
                    format = format_of_file(os.path.join(here, name))
                    if format == "HEIC":
                        left_out.add(HEIC, join(path, name))
                    elif format is None:
                        left_out.add(NOT_IMAGES, join(path, name))
                    else:
                        images.append(name)
    images.sort()
    return ScannedFolder(path, b"\0".join(images), len(images), sorted(data), modified), sorted(subfolders), links


def regular(entry: "os.DirEntry[bytes]") -> str:
    """ "file", "folder" for a link to one, or the reason why an entry is skipped."""
    if not entry.is_symlink():
        return "file" if entry.is_file(follow_symlinks=False) else SPECIAL
    try:
        mode = entry.stat().st_mode
    except OSError:
        return DANGLING
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else SPECIAL
