"""The index of tar shards: position, length and label of each image. Built once, cached, shared by all processes.

It is built from the members' headers (shard_records.py), many shards at a time, and written as an Arrow file to the
cache or, by `python -m training.shards index`, next to the shards. The file is memory-mapped: the processes of a
machine share its pages, and opening fourteen million records takes no longer than a thousand. A shard's part is valid
as long as the shard's size and version are unchanged; only new or changed shards are read again.

Not WebDataset's `wids`: it copies each remote shard whole, and every process reads the headers again.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from hf_vit.atomic_file import atomic_path
from hf_vit.errors import HFViTError
from hf_vit.image_io import one_line

from ..sources import digest
from .shard_files import TarShard, file_system, folder_of, is_remote, look_at, shard_name
from .shard_records import BUILD, EXAMPLES, Label, ShardFacts, ShardRecords, scan_shards


SIDECAR = "shards.index"  # next to the shards
VERSION = 4  # of the file; changes also when labels are read in another way
LOCK_SECONDS = 24 * 3600  # for another process that builds the index


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
