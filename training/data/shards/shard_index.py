"""The index of tar shards: position, length and label of each image. Built once, cached, shared by all processes.

It is built from the members' headers (tar_headers.py), many shards at a time, and written as an Arrow file to the
cache or, by `python -m training.shards index`, next to the shards. The file is memory-mapped: the processes of a
machine share its pages, and opening fourteen million records takes no longer than a thousand. A shard's part is valid
as long as the shard's size and version are unchanged; only new or changed shards are read again.

A record is a run of neighboring members with the same name up to the first dot: `000017.jpg`, `000017.cls`. Records
without a readable image or label are left out, counted and named. Not WebDataset's `wids`: it copies each remote shard
whole, and every process reads the headers again. Format: https://github.com/webdataset/webdataset.
"""

import contextlib
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from hf_vit.atomic_file import atomic_path
from hf_vit.capabilities import usable_cores
from hf_vit.errors import HFViTError
from hf_vit.image_io import SUFFIXES, one_line

from ..sources import digest
from .shard_files import (
    CONNECTIONS,
    ShardChanged,
    TarShard,
    file_system,
    folder_of,
    is_remote,
    look_at,
    read_range,
    shard_name,
)
from .tar_headers import DamagedTar, Fetch, TarHeaders, UnusualTar


SIDECAR = "shards.index"  # next to the shards
VERSION = 4  # of the file; changes also when labels are read in another way
IMAGE_KINDS = frozenset(suffix[1:] for suffix in SUFFIXES)
LABEL_FIELDS = ("label", "cls", "class", "class_id", "class_name")  # of a .json member
NAME_FIELDS = ("class_name", "label_name")  # of a .json member: the name of the class whose number is the label
EXAMPLES = 3  # damaged records that are named, for each shard
IN_THIS_PROCESS = 64 << 20  # bytes of shards up to which no processes are started
LOCK_SECONDS = 24 * 3600  # for another process that builds the index
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


@dataclass(frozen=True)
class ShardIndex:
    """The records of some shards, one shard after another.

    Attributes:
        shards, facts: file and contents of each shard. first: int64 (shards + 1,), number of its first record.
        offset, length: int64 (n,), position and bytes of each record's image in its shard.
        code: int64 (n,), index of its label in `values`, some of which may not occur.
        written: modification time of a file next to the shards, ns; None for one in the cache.
    """

    shards: list[TarShard]
    facts: list[ShardFacts]
    first: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    code: np.ndarray
    values: list[Label]
    written: int | None = None

    def __len__(self) -> int:
        return len(self.offset)

    def shard_of(self, row: int) -> int:
        """The number of a record's shard."""
        return int(np.searchsorted(self.first, row, side="right")) - 1

    def name(self, row: int) -> str:
        """Name of a record for messages."""
        return f"{os.path.basename(self.shards[self.shard_of(row)].url)}@{self.offset[row]}"

    def names(self, shard: int, first: int, count: int) -> list[str]:
        """Names of neighboring records of one shard for messages."""
        name = os.path.basename(self.shards[shard].url)
        return [f"{name}@{offset}" for offset in self.offset[first : first + count].tolist()]

    def records(self, number: int) -> ShardRecords:
        """The records of one shard."""
        rows = slice(self.first[number], self.first[number + 1])
        used, code = np.unique(self.code[rows], return_inverse=True)
        values = [self.values[value] for value in used]
        return ShardRecords(self.facts[number], self.offset[rows], self.length[rows], code, values)

    def holds(self, number_of: dict[str, int], shard: TarShard) -> int | None:
        """The number of a shard in this index; None if it is not in it, or has changed.

        An index next to the shards stays valid if both are copied: the versions are then of different kinds (a web
        server's tag, a time), or the shard is older than the index.
        """
        number = number_of.get(shard_name(shard.url))
        if number is None or self.facts[number].size != shard.size:
            return None
        version = self.facts[number].version
        if version == shard.version:
            return number
        if self.written is None:
            return None
        kinds = version.partition(":")[0], shard.version.partition(":")[0]
        older = kinds == ("mtime", "mtime") and not is_remote(shard.url) and int(shard.version[6:]) <= self.written
        return number if kinds[0] != kinds[1] or older else None

    def numbers_of(self, shards: Sequence[TarShard]) -> list[int | None]:
        """`holds` of each shard."""
        number_of = {facts.name: number for number, facts in enumerate(self.facts)}
        return [self.holds(number_of, shard) for shard in shards]

    def part(self, shards: Sequence[TarShard]) -> "ShardIndex | None":
        """The index of these shards, without copying columns; None unless they are here in this order."""
        numbers = self.numbers_of(shards)
        begin = numbers[0]
        if begin is None or numbers != list(range(begin, begin + len(numbers))):
            return None
        first = self.first[begin : begin + len(numbers) + 1]
        rows = slice(first[0], first[-1])
        return ShardIndex(
            list(shards),
            self.facts[begin : begin + len(numbers)],
            first - first[0],
            self.offset[rows],
            self.length[rows],
            self.code[rows],
            self.values,
        )

    def left_out(self) -> str:
        """A phrase about shards and records that are left out; empty if none is."""
        parts = []
        empty = [shard.url for shard in self.shards if not shard.size]
        if empty:
            more = ", ..." if len(empty) > EXAMPLES else ""
            parts.append(f"{len(empty):,} shards of 0 bytes ({', '.join(empty[:EXAMPLES])}{more})")
        damaged = sum(facts.damaged for facts in self.facts)
        if damaged:
            examples = [text for facts in self.facts for text in facts.examples]
            more = "; ..." if damaged > EXAMPLES else ""
            parts.append(f"{damaged:,} damaged records ({'; '.join(examples[:EXAMPLES])}{more})")
        return " and ".join(parts)


def join_shards(shards: Sequence[TarShard], parts: Sequence[ShardRecords]) -> ShardIndex:
    """The index of shards from their records."""
    values = sorted({value for part in parts for value in part.values}, key=_kind_first)
    codes_of = {value: code for code, value in enumerate(values)}
    codes = [np.array([codes_of[value] for value in part.values], dtype=np.int64)[part.code] for part in parts]
    columns = [[part.offset for part in parts], [part.length for part in parts], codes]
    joined = [np.concatenate(column).astype(np.int64) if column else np.empty(0, np.int64) for column in columns]
    facts = [replace(part.facts, name=shard_name(s.url), version=s.version) for s, part in zip(shards, parts)]
    first = np.cumsum([0, *(part.records for part in facts)]).astype(np.int64)
    return ShardIndex(list(shards), facts, first, *joined, values)


def _kind_first(value: Label) -> tuple:
    return (isinstance(value, tuple), isinstance(value, str), value)


# -- stored indices --------------------------------------------------------------------------------------------------


def open_index(urls: Sequence[str], cache: Path, log: Callable[[str], None]) -> ShardIndex:
    """The index of some shards, from the folder `cache` or next to the shards, or built now and stored.

    Processes that open the same shards at the same time wait for the one that builds.

    Raises:
        HFViTError: shards that cannot be reached or are not tar files; shards without any image.
    """
    shards = look_at(urls)
    path = cache / f"shards-{VERSION}-{digest(*urls)}.index"
    saved = read_kept_index(path, lambda _: None)
    index = None if saved is None else saved.part(shards)
    if index is None:
        with contextlib.ExitStack() as stack:
            locked = enter_lock(stack, path)
            saved = read_kept_index(path, log)
            index = None if saved is None else saved.part(shards)  # another process may have built it meanwhile
            if index is None:
                index = index_beside_or_built(shards, saved, path if locked else None, log)
    if not len(index):
        left_out = f": {text}" if (text := index.left_out()) else ""
        raise HFViTError(f"no images in {len(urls)} shards, of which the first is '{urls[0]}'{left_out}")
    return index


def index_beside_or_built(
    shards: Sequence[TarShard], cached: ShardIndex | None, path: Path | None, log: Callable[[str], None]
) -> ShardIndex:
    """The index next to the shards if it has all of them, else one that is built and stored at `path`."""
    beside = indices_beside(shards, log)
    if not is_remote(shards[0].url):  # a remote one is copied to the cache, so that it is fetched once
        for saved in beside:
            if (index := saved.part(shards)) is not None:
                return index
    index = build_index(shards, [*beside, *([cached] if cached is not None else [])], log)
    if path is not None:
        try:
            write_shard_index(index, path)
            saved = read_kept_index(path, log)  # mapped: its memory is shared by all processes
            index = (None if saved is None else saved.part(shards)) or index
        except OSError as error:
            log(f"the index of the shards cannot be kept ({one_line(error)}): the next run builds it again")
    return index


def indices_beside(shards: Sequence[TarShard], log: Callable[[str], None]) -> list[ShardIndex]:
    """The indices in the folders of the shards; problems with them are logged."""
    indices = []
    for folder in sorted({folder_of(shard.url) for shard in shards}):
        path = f"{folder or '.'}/{SIDECAR}"
        saved = load_remote_index(path, log) if is_remote(path) else read_kept_index(Path(path), log)
        if saved is None:
            continue
        saved = replace(saved, written=0 if is_remote(path) else os.stat(path).st_mtime_ns)
        inside = [shard for shard in shards if folder_of(shard.url) == folder]
        known = {facts.name for facts in saved.facts}
        missing = [shard for shard in inside if shard_name(shard.url) not in known]
        changed = len(inside) - len(missing) - sum(number is not None for number in saved.numbers_of(inside))
        if len(missing) == len(inside):
            log(f"the index '{path}' is of other shards: it is not used")
        elif missing or changed:
            log(
                f"the index '{path}' lacks {len(missing):,} of {len(inside):,} shards, and {changed:,} have changed "
                f"since: these are read now; {BUILD} writes it anew"
            )
        indices.append(saved)
    return indices


def enter_lock(stack: contextlib.ExitStack, path: Path) -> bool:
    """Wait for another process that builds the same index; False if nothing can be stored there."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(FileLock(f"{path}.lock", timeout=LOCK_SECONDS))
    except (OSError, NotImplementedError, Timeout):  # filelock: a file system without locks
        return False
    return True


def load_remote_index(path: str, log: Callable[[str], None]) -> ShardIndex | None:
    """`read_kept_index` of a remote file."""
    files, inner = file_system(path)
    try:
        data = files.cat_file(inner)
    except Exception:  # every file system of fsspec has its own; most shards have no index beside them
        return None
    return read_kept_index(Path(shard_name(path)), log, data)


def read_kept_index(path: Path, log: Callable[[str], None], data: bytes | None = None) -> ShardIndex | None:
    """Read an index; None if there is none, or if it is damaged, which is logged.

    Args:
        data: the content of a remote file.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) if data is None else pa.BufferReader(data) as source:
            table = pa.ipc.open_file(source).read_all()
        about = json.loads(table.schema.metadata[b"about"])
        if about["version"] != VERSION:
            return None
        columns = [column.chunk(0).to_numpy() for column in table.columns]
        if crc_of(columns) != about["checksum"]:
            raise ValueError("its checksum is wrong")
        facts = [ShardFacts(**shard) for shard in about["shards"]]
        first = np.cumsum([0, *(shard.records for shard in facts)]).astype(np.int64)
        values = [tuple(value) if isinstance(value, list) else value for value in about["values"]]
        shards = [TarShard(shard.name, shard.size, shard.version) for shard in facts]
        return ShardIndex(shards, facts, first, *columns, values)
    except FileNotFoundError:
        return None
    except Exception as error:  # half a file, or one of another program
        log(f"the index '{path}' is damaged ({one_line(error)}): it is built again")
        return None


def write_shard_index(index: ShardIndex, path: Path) -> None:
    """Write an index for `read_kept_index`: an Arrow file with a column each of offsets, lengths and labels.

    Raises:
        OSError: the folder cannot be written.
    """
    import pyarrow as pa

    columns = [index.offset, index.length, index.code]
    about = {
        "version": VERSION,
        "checksum": crc_of(columns),
        "values": index.values,
        "shards": [asdict(facts) for facts in index.facts],
    }
    schema = pa.schema([(name, pa.int64()) for name in ("offset", "length", "label")])
    schema = schema.with_metadata({"about": json.dumps(about)})
    with atomic_path(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(column) for column in columns], schema=schema))


def crc_of(columns: Sequence[np.ndarray]) -> int:
    value = 0
    for column in columns:
        value = zlib.crc32(np.ascontiguousarray(column), value)
    return value


# -- building --------------------------------------------------------------------------------------------------------


def build_index(shards: Sequence[TarShard], saved: Sequence[ShardIndex], log: Callable[[str], None]) -> ShardIndex:
    """Read the headers of all shards that no stored index has, many at a time."""
    parts: dict[int, ShardRecords] = {}
    for index in saved:
        for position, number in enumerate(index.numbers_of(shards)):
            if number is not None and position not in parts:
                parts[position] = index.records(number)
    missing = [position for position in range(len(shards)) if position not in parts]
    parts |= zip(missing, scan_shards([shards[position] for position in missing], log))
    return join_shards(shards, [parts[position] for position in range(len(shards))])


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
