"""WebDataset tar shards: found by pattern, indexed once, read by byte range.

A record is a run of neighboring members that share their name up to the first dot: `000017.jpg`, `000017.cls`. The
index holds where each image's bytes lie and its label, so that shards on a local disk are as good as any other
map-style data set (`TarSource`), and remote ones can be read a run at a time (streaming.py). It is built from the
members' headers in one pass and kept in a cache folder, under the shards' names, sizes and times of change. Labels
that are numbers are called by them, unless a local `label_names.json` beside the shards, a list, names the classes.
Format: https://github.com/webdataset/webdataset.
"""

import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_vit.errors import HFViTError
from hf_vit.image_io import SUFFIXES, one_line, open_encoded

from .columns import grouped, integer_rows, refuse_unlabelled
from .sources import SPLIT_IN_FILE_NAME, SPLIT_NAMES, Columns, Reader, classes_in_turn, digest, own_cache, relabel


NAMES_FILE = "label_names.json"
INDEX_VERSION = 2  # of the kept index: another one where labels are read in another way
LABEL_FIELDS = ("label", "cls", "class", "class_id", "class_name")  # of a .json member
NAME_FIELDS = ("class_name", "label_name")  # what the number beside it is called


@dataclass(frozen=True)
class TarIndex:
    """Where the images of some shards are.

    `shard`, `offset`, `size` (bytes) and `labels`: one entry per record; `label_names` is empty where the labels are
    bare numbers.
    """

    urls: list[str]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray
    label_names: list[str]

    def name(self, row: int) -> str:
        """What messages call a record."""
        return f"{os.path.basename(self.urls[self.shard[row]])}@{self.offset[row]}"


@dataclass(frozen=True)
class TarSource:
    """Images in tar shards on a local disk, by record."""

    index: TarIndex
    labels: np.ndarray
    label_names: list[str]
    fingerprint: str
    sorted_by_class: bool = False

    def open(self, row: int) -> Image.Image:
        index = self.index
        with open(index.urls[index.shard[row]], "rb") as shard:
            shard.seek(index.offset[row])
            return open_encoded(shard.read(index.size[row]), index.name(row))

    def name(self, row: int) -> str:
        return self.index.name(row)


def is_shard_pattern(name: str) -> bool:
    """Whether a name means tar shards: it ends in .tar, also after braces or a question mark."""
    return name.split("?")[0].rstrip("}").endswith(".tar")


def expand_shards(pattern: str) -> list[str]:
    """Names of the shards that a pattern with {000..127}, {a,b} or * means, sorted.

    Raises:
        HFViTError: local files that are not there.
    """
    names = expand_braces(pattern)
    if "://" not in pattern:
        names = [os.path.expanduser(name) for name in names]
        found = [sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.exists(name) for name in names]
        missing = [name for name, files in zip(names, found) if not files]
        if missing:
            raise HFViTError(f"no shard '{missing[0]}'" + (f", nor {len(missing) - 1} more" if missing[1:] else ""))
        names = list(itertools.chain.from_iterable(found))
    return names


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` as a-08.tar, a-09.tar, a-10.tar; `{x,y}` as its alternatives."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = match[1].split(",")
    return [
        rest
        for choice in choices
        for rest in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def shard_facts(urls: Sequence[str]) -> list[str]:
    """Name, size and version of every shard: what an index, once built, is good for.

    Raises:
        HFViTError: a shard cannot be reached.
    """
    import fsspec

    facts = []
    for url in urls:
        try:
            files, path = fsspec.core.url_to_fs(url)
            info = files.info(path)
        except Exception as error:  # every file system of fsspec has its own
            raise HFViTError(f"cannot reach the shard '{url}' ({one_line(error)})") from error
        version = info.get("ETag") or info.get("etag") or info.get("mtime") or ""
        facts.append(f"{url} {info.get('size')} {version}")
    return facts


def index_shards(urls: list[str], cache: Path) -> TarIndex:
    """Read the index from the file `cache`, or build it and keep it there."""
    if cache.exists():
        with np.load(cache, allow_pickle=False) as kept:
            return TarIndex(urls, kept["shard"], kept["offset"], kept["size"], kept["labels"], kept["names"].tolist())
    rows: list[tuple[int, int, int, Any]] = []
    for number, url in enumerate(urls):
        rows += [(number, *row) for row in scan_shard(url)]
    if not rows:
        raise HFViTError(f"no images in {len(urls)} shards, of which the first is '{urls[0]}'")
    shard, offset, size = (np.array(column, dtype=np.int64) for column in list(zip(*rows))[:3])
    labels, names = number_labels([row[3] for row in rows])
    cache.parent.mkdir(parents=True, exist_ok=True)
    aside = cache.with_name(f"{cache.name}.{os.getpid()}.npz")
    np.savez(aside, shard=shard, offset=offset, size=size, labels=labels, names=np.array(names, dtype=np.str_))
    aside.replace(cache)
    return TarIndex(urls, shard, offset, size, labels, names)


def number_labels(values: list[Any]) -> tuple[np.ndarray, list[str]]:
    """Labels as numbers: strings in sorted order with their names, numbers as they are, with names where all have."""
    pairs = {value for value in values if isinstance(value, tuple)}
    names_of = dict(pairs)
    complete = sorted(names_of) == list(range(len(names_of))) and len(set(names_of.values())) == len(pairs)
    if pairs and complete and all(isinstance(value, tuple) for value in values):
        return np.array([number for number, _ in values], dtype=np.int64), [names_of[n] for n in range(len(names_of))]
    values = [value[0] if isinstance(value, tuple) else value for value in values]
    if all(isinstance(value, int) for value in values):
        return np.array(values, dtype=np.int64), []
    names = sorted({str(value) for value in values})
    place = {name: number for number, name in enumerate(names)}
    return np.array([place[str(value)] for value in values], dtype=np.int64), names


def scan_shard(url: str) -> list[tuple[int, int, Any]]:
    """(offset, size, label) of every record of one shard.

    Raises:
        HFViTError: not a plain tar file, or a record without image or label.
    """
    import fsspec

    rows = []
    try:
        # Local files are seeked through; remote ones pass by once, for a request per header would be slower.
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r|" if "://" in url else "r:") as tar:
            members = (
                member for member in tar if member.isfile() and not os.path.basename(member.name).startswith(".")
            )
            for key, group in itertools.groupby(members, key=lambda member: split_name(member.name)[0]):
                rows.append(scan_record(url, key, tar, group))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise HFViTError(f"cannot read the shard '{url}' as a plain tar file ({one_line(error)})") from error
    return rows


def split_name(name: str) -> tuple[str, str]:
    """A member's record and the kind of its content: "a/17", "seg.png" for a/17.seg.png."""
    folder, _, base = name.rpartition("/")
    key, _, kind = base.partition(".")
    return f"{folder}/{key}", kind.lower()


def scan_record(url: str, key: str, tar: tarfile.TarFile, members: Any) -> tuple[int, int, Any]:
    """The image's place and the label of one record; its members are read as they come."""
    place, label = None, None
    for member in members:
        kind = split_name(member.name)[1]
        if f".{kind}" in SUFFIXES and place is None:
            place = (member.offset_data, member.size)
        elif kind in ("cls", "json"):
            content = tar.extractfile(member).read()
            found = read_label(content, kind, f"record '{key.lstrip('/')}' of the shard '{url}'")
            label = found if label is None else label
    if place is None:
        raise HFViTError(f"record '{key.lstrip('/')}' of the shard '{url}' has no image")
    if label is None:
        raise HFViTError(
            f"record '{key.lstrip('/')}' of the shard '{url}' has no label; "
            f'write it into a .cls file, or as "label" into its .json'
        )
    if isinstance(label, str) and re.fullmatch(r"-?(0|[1-9]\d*)", label, re.ASCII):  # 00 and 01 are names
        label = int(label)
    return (*place, label)


def read_label(content: bytes, kind: str, where: str) -> Any:
    """The label in a record's .cls or .json: a number, a name, or (number, name); None where a .json has none.

    Raises:
        HFViTError: what is no text, no JSON or no object.
    """
    try:
        text = content.decode("utf-8").strip()
        if kind == "cls":
            return text or None
        fields = json.loads(text)
    except UnicodeDecodeError as error:
        raise HFViTError(f"the .{kind} of {where} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise HFViTError(f"the .json of {where} is not JSON ({one_line(error)})") from error
    if not isinstance(fields, dict):
        raise HFViTError(f'the .json of {where} holds no object with a "label"')
    found = [fields[field] for field in LABEL_FIELDS if isinstance(fields.get(field), (int, str))]
    found = [label for label in found if label != ""]
    if not found:
        return None
    named = [fields[field] for field in NAME_FIELDS if isinstance(fields.get(field), str)]
    number = isinstance(found[0], int) and not isinstance(found[0], bool)
    return (found[0], named[0]) if number and named else found[0]


def shards_reader(name: str, files: list[str], columns: Columns, cache_dir: str | os.PathLike | None) -> Reader:
    """Reader of tar shards on a local disk."""
    if any("://" in file for file in files):
        raise HFViTError(f"'{name}' lies elsewhere; stream it (--streaming), or copy the shards to this machine")
    splits = shards_by_split(files)

    def load(split: str) -> TarSource:
        index, mark = load_index(name, splits[split], columns, cache_dir)
        return TarSource(index, index.labels, index.label_names, mark, classes_in_turn(index.labels))

    return Reader(name, list(splits), load, by_names=True)


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
    name: str, urls: list[str], columns: Columns, cache_dir: str | os.PathLike | None
) -> tuple[TarIndex, str]:
    """The index of shards with checked labels, and its fingerprint."""
    facts = shard_facts(urls)
    index = index_shards(urls, own_cache(cache_dir) / f"shards-{INDEX_VERSION}-{digest(*facts)}.npz")
    index = with_names(index, name, columns)
    names = [os.path.basename(url) for url in urls]
    arrays = (index.shard, index.offset, index.size, index.labels)
    return index, digest(*names, *index.label_names, *(array.tobytes() for array in arrays))


def with_names(index: TarIndex, name: str, columns: Columns) -> TarIndex:
    """The index with class names and checked labels: as given, as named beside the shards, or one per number from 0.

    Raises:
        HFViTError: labels below 0, above the names, or with gaps; a column, which shards do not have.
    """
    wanted, group = grouped(columns.label, ())
    if columns.image is not None or wanted not in (None, "cls"):
        raise HFViTError(
            f"'{name}' is tar shards, which have no columns: the image is the first of a record, the label its .cls "
            "or the label in its .json; leave out --image_column and --label_column"
        )
    if index.label_names:
        if columns.label_names is None:
            return index
        labels = relabel(index.labels, index.label_names, columns.label_names, f"'{name}'")
        return replace(index, labels=labels, label_names=columns.label_names)
    if group is not None:
        refuse_unlabelled(name, "cls", index.labels)
        values = (index.labels // group).astype(int).tolist()
        labels, names = integer_rows(name, "cls", values, columns.label_names)
        return replace(index, labels=labels, label_names=names)
    own = names_beside(index.urls[0]) or columns.label_names
    labels, names = integer_rows(name, "cls", index.labels.tolist(), own)
    if columns.label_names is not None and columns.label_names != names:
        labels, names = relabel(labels, names, columns.label_names, f"'{name}'"), columns.label_names
    return replace(index, labels=labels, label_names=names)


def names_beside(shard: str) -> list[str] | None:
    """The classes' names in the `label_names.json` beside a local shard, None where there is none.

    Raises:
        HFViTError: it does not hold a list of different names.
    """
    path = Path(shard).with_name(NAMES_FILE)
    if "://" in shard or not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HFViTError(f"'{path}' is not JSON ({one_line(error)})") from error
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise HFViTError(f"'{path}' must hold a list of the classes' names, each once")
    return names
