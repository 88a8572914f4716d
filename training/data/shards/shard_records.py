"""The records of tar shards, from the headers of their members: position, length and label of each image.

For shard_index.py and shard_groups.py. A record is a run of neighboring members with the same name up to the first
dot: `000017.jpg`, `000017.cls`. Records without a readable image or label are left out, counted and named. Format:
https://github.com/webdataset/webdataset.

Tests: tests/training/data/shards/test_shard_index.py.
"""

import contextlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context

import numpy as np
from tqdm.auto import tqdm

from hf_vit.capabilities import usable_cores
from hf_vit.errors import HFViTError
from hf_vit.image_io import SUFFIXES, one_line

from .shard_files import CONNECTIONS, ShardChanged, TarShard, is_remote, read_range
from .tar_headers import DamagedTar, Fetch, TarHeaders, UnusualTar


IMAGE_KINDS = frozenset(suffix[1:] for suffix in SUFFIXES)
LABEL_FIELDS = ("label", "cls", "class", "class_id", "class_name")  # of a .json member
NAME_FIELDS = ("class_name", "label_name")  # of a .json member: the name of the class whose number is the label
EXAMPLES = 3  # damaged records that are named, for each shard
IN_THIS_PROCESS = 64 << 20  # bytes of shards up to which no processes are started
BUILD = "python -m training.shards index"

WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)  # 00 and 01 are names

Member = tuple[str, int, int]  # of a tar file: name, position of the content, bytes of the content
Label = int | str | tuple[int, str]  # a number, a name, or both


@dataclass(frozen=True)
class ShardFacts:
    """One shard of an index.

    Attributes:
        size, version: as in `TarShard`. records: their number.
        damaged: number of records left out. examples: messages about the first of them.
    """

    name: str
    size: int
    version: str
    records: int
    damaged: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ShardRecords:
    """The records of one shard; columns as in `ShardIndex`."""

    facts: ShardFacts
    offset: np.ndarray
    length: np.ndarray
    code: np.ndarray
    values: list[Label]


def scan_shards(shards: Sequence[TarShard], log: Callable[[str], None]) -> list[ShardRecords]:
    """`scan_shard` of each, in one process per core, or over many connections for remote shards."""
    size = sum(shard.size for shard in shards)
    cores = usable_cores()
    with contextlib.ExitStack() as stack:
        pool: ProcessPoolExecutor | ThreadPoolExecutor | None = None
        if any(is_remote(shard.url) for shard in shards):
            log(
                f"the index of {len(shards):,} shards ({size / 1e9:.1f} GB) is built from their headers: one request "
                f"for each image; {BUILD} builds it once and for all machines, --shuffle_shards 64 begins after 64"
            )
            pool = stack.enter_context(ThreadPoolExecutor(CONNECTIONS))
        elif size > IN_THIS_PROCESS and min(cores, len(shards)) > 1 and "fork" in get_all_start_methods():
            # Forked, not spawned: a spawned child would import torch, only to parse headers.
            pool = stack.enter_context(ProcessPoolExecutor(min(cores, len(shards)), get_context("fork")))
        scans = map(scan_shard, shards) if pool is None else pool.map(scan_shard, shards)
        return list(tqdm(scans, "index", len(shards), unit="shard", disable=None, leave=False, dynamic_ncols=True))


def scan_shard(shard: TarShard) -> ShardRecords:
    """The records of one shard.

    Raises:
        HFViTError: not a plain tar file.
    """
    if not shard.size:
        empty = np.empty(0, dtype=np.int64)
        return ShardRecords(ShardFacts("", 0, "", 0), empty, empty, empty, [])
    try:
        with shard_bytes(shard) as fetch:
            try:
                headers = TarHeaders(fetch, shard.size)
                return scan_members(shard, visible(headers.members()), headers.read)
            except UnusualTar:
                members = visible(unusual_members(shard.url))
                return scan_members(shard, members, lambda begin, count: fetch(begin, begin + count))
    except (tarfile.TarError, DamagedTar, ShardChanged, OSError, EOFError) as error:
        raise HFViTError(f"cannot read the shard '{shard.url}' as a plain tar file ({one_line(error)})") from error


@contextlib.contextmanager
def shard_bytes(shard: TarShard) -> Iterator[Fetch]:
    """A function from (begin, end) to a shard's bytes."""
    if is_remote(shard.url):
        yield lambda begin, end: read_range(shard, begin, end)
        return
    handle = os.open(shard.url, os.O_RDONLY)
    try:
        yield lambda begin, end: os.pread(handle, end - begin, begin)
    finally:
        os.close(handle)


def unusual_members(url: str) -> Iterator[Member]:
    """`TarHeaders.members` for kinds of tar files that it does not support."""
    import fsspec

    with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.isfile() and not member.issparse():
                yield member.name, member.offset_data, member.size


def scan_members(shard: TarShard, members: Iterator[Member], read: Callable[[int, int], bytes]) -> ShardRecords:
    """The records that a shard's members form; their labels are read on the way."""
    offsets: list[int] = []
    lengths: list[int] = []
    codes: list[int] = []
    values: dict[Label, int] = {}
    problems: list[str] = []
    for key, record in records_in(members):
        try:
            offset, length, label = scan_record(f"record '{key}' of the shard '{shard.url}'", record, read)
        except HFViTError as error:
            problems.append(str(error))
            continue
        offsets.append(offset)
        lengths.append(length)
        codes.append(values.setdefault(label, len(values)))
    facts = ShardFacts("", shard.size, shard.version, len(codes), len(problems), problems[:EXAMPLES])
    columns = [np.array(column, dtype=np.int64) for column in (offsets, lengths, codes)]
    return ShardRecords(facts, *columns, list(values))


def records_in(members: Iterator[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Name and members of each record; a second member of the same kind begins another record of that name."""
    for key, group in itertools.groupby(members, key=record_of):
        record: list[Member] = []
        for member in group:
            if kind_of(member[0]) in map(kind_of, (name for name, _, _ in record)):
                yield key, record
                record = []
            record.append(member)
        yield key, record


def kind_of(name: str) -> str:
    """The part of a member's name after the first dot, in lower case."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def visible(members: Iterator[Member]) -> Iterator[Member]:
    """The members without names that begin with a dot, which macOS adds."""
    return (member for member in members if not member[0].rpartition("/")[2].startswith("."))


def record_of(member: Member) -> str:
    """Name of a member's record: "a/17" for a/17.seg.png."""
    folder, slash, base = member[0].rpartition("/")
    return folder + slash + base.partition(".")[0]


def scan_record(where: str, members: Iterable[Member], read: Callable[[int, int], bytes]) -> tuple[int, int, Label]:
    """Position and length of a record's image, and its label.

    Raises:
        HFViTError: no image, or no readable label.
    """
    member, label = None, None
    for name, offset, length in members:
        kind = kind_of(name)
        if kind in IMAGE_KINDS and member is None:
            member = (offset, length)
        elif kind in ("cls", "json"):
            number = read_label(read(offset, length), kind, where)
            label = number if label is None else label
    if member is None:
        raise HFViTError(f"{where} has no image")
    if label is None:
        raise HFViTError(f'{where} has no label; write it into a .cls file, or as "label" into its .json')
    if isinstance(label, str) and WHOLE_NUMBER.fullmatch(label):
        label = int(label)
    return (*member, label)


def read_label(content: bytes, kind: str, where: str) -> Label | None:
    """The label in a record's .cls or .json: a number, a name, or (number, name); None without one.

    Raises:
        HFViTError: not UTF-8, not JSON, or not an object.
    """
    try:
        text = content.decode("utf-8-sig").strip()
        if kind == "cls":
            return text or None
        fields = json.loads(text)
    except UnicodeDecodeError as error:
        raise HFViTError(f"the .{kind} of {where} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise HFViTError(f"the .json of {where} is not JSON ({one_line(error)})") from error
    if not isinstance(fields, dict):
        raise HFViTError(f'the .json of {where} holds no object with a "label"')
    labels = [fields[field] for field in LABEL_FIELDS if isinstance(fields.get(field), (int, str))]
    labels = [label for label in labels if label != ""]
    if not labels:
        return None
    named = [fields[field] for field in NAME_FIELDS if isinstance(fields.get(field), str)]
    number = isinstance(labels[0], int) and not isinstance(labels[0], bool)
    return (labels[0], named[0]) if number and named else labels[0]
