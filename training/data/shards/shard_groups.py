"""Streaming from tar shards without an index of all: groups of shards, each indexed while the one before is read.

An index of all shards takes one request per image of a remote set before the first step. Here the shards of an epoch
come in a random order, divided into groups; the headers of a group are read, and its records are shuffled like those
of a whole stream. The order is a function of (seed, epoch, group) and of the shards, so that a position restores a
run.
The index of each shard is cached: no header is read twice on a machine.

Without an index of all shards, the number of images is estimated from the first one, and the classes must be named in
a `label_names.json` next to the shards.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hf_vit.errors import HFViTError

from ...rng import STREAM, WORD, generator
from ..folders import index_folder
from ..sources import Columns, digest
from .chunks import Chunks, TarChunks, default_run_length
from .shard_files import CONNECTIONS, TarShard, look_at, with_local_copies
from .shard_index import (
    VERSION,
    ShardIndex,
    enter_lock,
    indices_beside,
    join_shards,
    read_kept_index,
    write_shard_index,
)
from .shard_records import ShardRecords, scan_shard
from .webdataset import NAMES_FILE, LabelledShards, labels_of, names_beside


ORDER_OF_SHARDS = WORD  # a word of its address in the generator; groups count from 0
SHARD_BITS = 32  # an image's number has that of its shard in the upper half, its own in the shard in the lower one


@dataclass(frozen=True)
class ShardGroups(Chunks):
    """Shards that are not all indexed yet.

    Attributes:
        kept: indices next to the shards, which may have some of them. cache: folder of the others.
        group_size: shards that are shuffled together. run_length: as in `open_stream`.
        images: of all shards, estimated. on_left_out: called with a line for each group's damaged records.
    """

    name: str
    shards: list[TarShard]
    columns: Columns
    kept: list[ShardIndex]
    cache: Path
    group_size: int
    run_length: int | None
    connections: int
    images: int
    label_names: list[str]
    fingerprint: str
    on_left_out: Callable[[str], None]
    left_out: set[int] = field(default_factory=set)  # shards whose damaged records have been logged

    def __getstate__(self) -> dict:
        """For worker processes, which only open single images."""
        return self.__dict__ | {"kept": [], "on_left_out": None}

    def order(self, seed: int, epoch: int) -> list[np.ndarray]:
        """The shards of each group in an epoch."""
        order = generator(STREAM, seed, epoch, 0, ORDER_OF_SHARDS).permutation(len(self.shards))
        return np.split(order, range(self.group_size, len(order), self.group_size))

    def index(self, numbers: np.ndarray, stopped: threading.Event) -> ShardIndex:
        """The index of some shards; headers of shards without a stored index are read now."""
        shards = [self.shards[number] for number in numbers]
        with contextlib.ExitStack() as stack:
            stored = [self.known(shard) for shard in shards]
            writable = False
            if None in stored:  # one process of a machine reads, the others wait for it
                writable = enter_lock(stack, self.cache / f"shards-{VERSION}-{self.fingerprint}")
                stored = [self.known(shard) if records is None else records for shard, records in zip(shards, stored)]

            def read(shard: TarShard, records: ShardRecords | None) -> ShardRecords:
                if stopped.is_set():
                    raise HFViTError("the stream is closed")
                return self.scan(shard, writable) if records is None else records

            with ThreadPoolExecutor(self.connections) as pool:
                return join_shards(shards, list(pool.map(read, shards, stored)))

    def known(self, shard: TarShard) -> ShardRecords | None:
        """The records of a shard from a stored index; None without one."""
        for index in self.kept:
            (number,) = index.numbers_of([shard])
            if number is not None:
                return index.records(number)
        index = read_kept_index(self.path(shard), lambda _: None)
        part = None if index is None else index.part([shard])
        return None if part is None else part.records(0)

    def scan(self, shard: TarShard, writable: bool) -> ShardRecords:
        """The records of a shard from its headers, stored for the next time."""
        records = scan_shard(shard)
        if writable:
            with contextlib.suppress(OSError, HFViTError):  # a full disk: they are read again
                self.path(shard).parent.mkdir(parents=True, exist_ok=True)
                write_shard_index(join_shards([shard], [records]), self.path(shard))
        return records

    def path(self, shard: TarShard) -> Path:
        """The file for the index of one shard."""
        return self.cache / "shards" / f"{VERSION}-{digest(shard.url, shard.size, shard.version)}.index"

    def group(self, numbers: np.ndarray, stopped: threading.Event) -> tuple[TarChunks, np.ndarray]:
        """The chunks of some shards, and for each chunk the number of its first image."""
        index = self.index(numbers, stopped)
        new = [number for number, shard in enumerate(numbers.tolist()) if shard not in self.left_out]
        self.left_out.update(numbers.tolist())
        left_out = replace(
            index, shards=[index.shards[n] for n in new], facts=[index.facts[n] for n in new]
        ).left_out()
        if left_out:
            self.on_left_out(left_out)
        labels, label_names = labels_of(index, self.name, self.columns, self.label_names)
        records = LabelledShards(index, labels, label_names, self.fingerprint)
        chunks = TarChunks.of(records, self.run_length or default_run_length(labels))
        first = (numbers.astype(np.int64)[chunks.shard] << SHARD_BITS) + chunks.first - index.first[chunks.shard]
        return chunks, first


def open_shard_groups(
    name: str,
    urls: list[str],
    columns: Columns,
    group_size: int,
    run_length: int | None,
    connections: int,
    on_unreadable: str,
    cache_dir: str | os.PathLike | None,
    log: Callable[[str], None],
) -> ShardGroups:
    """The shards of one split; headers are read now up to the first shard with images.

    Args:
        group_size: shards that are shuffled together. connections: for reading headers; at least 32 are used.
        Other arguments as in `open_stream`.

    Raises:
        HFViTError: classes without names; a shard that cannot be read; no image in any of them.
    """
    cache = index_folder(cache_dir)
    shards = look_at(with_local_copies(urls, cache, log))
    label_names = columns.label_names or names_beside(shards[0].url)
    if label_names is None:
        raise HFViTError(
            f"--shuffle_shards reads before all shards of '{name}' are known: name the classes in a {NAMES_FILE} "
            "beside them (a list of names), or leave it out"
        )

    def on_left_out(text: str) -> None:
        if on_unreadable == "stop":
            raise HFViTError(f"'{name}' has {text}: mend them, or leave them out (--on_decode_error skip)")
        log(f"left out in '{name}': {text}")

    fingerprint = digest("groups", group_size, *(f"{Path(s.url).name} {s.size}" for s in shards), *label_names)
    groups = ShardGroups(
        name, shards, columns.counting_in(label_names), indices_beside(shards, log), cache, group_size, run_length,
        max(connections, CONNECTIONS), 0, label_names, fingerprint, on_left_out,
    )  # fmt: skip
    stopped = threading.Event()
    for number, shard in enumerate(shards):
        if records := len(groups.index(np.array([number]), stopped)):
            images = round(records / shard.size * sum(shard.size for shard in shards))
            log(
                f"'{name}' has about {images:,} images in {len(shards):,} shards, estimated from the first; "
                f"{group_size:,} shards at a time are indexed and mixed"
            )
            return replace(groups, images=images)
    raise HFViTError(f"no images in {len(urls)} shards, of which the first is '{urls[0]}'")
