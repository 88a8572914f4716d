"""Files of tar shards: patterns of names, sizes and versions, and reading ranges of bytes.

Local files are read with `pread`, remote ones through fsspec by range requests. A server that ignores range requests
would send a whole shard for every few images, so its shards are copied once.

Tests: tests/training/data/shards/test_shard_index.py.
"""

import glob
import http
import itertools
import os
import re
import shutil
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_vit.atomic_file import atomic_path
from hf_vit.errors import HFViTError, listed
from hf_vit.image_io import one_line

from ..sources import digest


CONNECTIONS = 32  # at once to remote shards, for their sizes and headers
CHANGED = "the shard has changed since its index was read"
TAGS = ("ETag", "etag", "blob_id")  # of web servers and object stores, and of the Hub
COPIES = 8  # shards that are copied at once
TIMEOUT = 30  # seconds for a server's first answer


class ShardChanged(Exception):
    """A shard has changed since its index was built; the message is for the user."""


@dataclass(frozen=True)
class TarShard:
    """One tar file: size in bytes, and a version that changes with the file ("mtime:...", "etag:..." or "")."""

    url: str
    size: int
    version: str

    def is_still(self, facts: os.stat_result) -> bool:
        """Whether a local file has the same size and modification time."""
        # in whole seconds, to which network disks may round
        return facts.st_size == self.size and int(facts.st_mtime) == int(self.version[6:]) // 10**9


def is_remote(url: str) -> bool:
    return "://" in url


def folder_of(url: str) -> str:
    return url.split("?")[0].rpartition("/")[0]


def shard_name(url: str) -> str:
    return os.path.basename(url.split("?")[0])


def is_shard_pattern(name: str) -> bool:
    """Whether a name is that of tar shards: it ends in .tar, apart from braces or a query."""
    return name.split("?")[0].rstrip("}").endswith(".tar")


def expand_shards(pattern: str) -> list[str]:
    """The shards of a pattern with {000..127}, {a,b} or *, sorted.

    Raises:
        HFViTError: local files that do not exist.
    """
    names = expand_braces(pattern)
    if not is_remote(pattern):
        names = [os.path.expanduser(name) for name in names]
        matches = [
            sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.exists(name) for name in names
        ]
        missing = [name for name, files in zip(names, matches) if not files]
        if missing:
            raise HFViTError(f"no shard '{missing[0]}'" + (f", nor {len(missing) - 1} more" if missing[1:] else ""))
        names = list(itertools.chain.from_iterable(matches))
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


def look_at(urls: Sequence[str]) -> list[TarShard]:
    """Size and version of every shard.

    Raises:
        HFViTError: a shard cannot be reached, or does not tell its size.
    """
    if not any(map(is_remote, urls)):
        return [_look_at_one(url) for url in urls]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(_look_at_one, urls))


def _look_at_one(url: str) -> TarShard:
    try:
        if not is_remote(url):
            facts = os.stat(url)
            return TarShard(url, facts.st_size, f"mtime:{facts.st_mtime_ns}")
        files, path = file_system(url)
        info = files.info(path)
    except Exception as error:  # every file system of fsspec has its own
        raise HFViTError(f"cannot reach the shard '{url}' ({one_line(error)})") from error
    if info.get("size") is None:
        raise HFViTError(f"the server of '{url}' does not tell its size; copy the shards to this machine")
    tag = next((info[key] for key in TAGS if info.get(key)), None)
    version = f"etag:{tag}" if tag else f"mtime:{info['mtime']}" if info.get("mtime") else ""
    return TarShard(url, int(info["size"]), version)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    import fsspec

    return fsspec.core.url_to_fs(url)


def read_range(shard: TarShard, begin: int, end: int) -> bytes:
    """The bytes from `begin` to `end` of a shard; fewer where it ends before.

    Raises:
        ShardChanged: the shard is gone, or its size or date is another than before.
        HFViTError: it cannot be read.
    """
    url = shard.url
    try:
        if not is_remote(url):
            handle = os.open(url, os.O_RDONLY)
            try:
                if not shard.is_still(os.fstat(handle)):
                    raise ShardChanged(CHANGED)
                return os.pread(handle, end - begin, begin)
            finally:
                os.close(handle)
        files, path = file_system(url)
        data = files.cat_file(path, begin, end)
    except ShardChanged:
        raise
    except FileNotFoundError as error:
        raise ShardChanged("the shard is gone") from error
    except Exception as error:  # every file system of fsspec has its own
        raise HFViTError(f"cannot read '{url}' any more ({one_line(error)}); the run can be resumed") from error
    if len(data) > end - begin:
        raise HFViTError(
            f"the server of '{url}' ignored a request for {end - begin:,} bytes and sent {len(data):,}: every read "
            "would cost a whole shard. Resume the run: if the server still does, the shards are copied first"
        )
    return data


def with_local_copies(urls: list[str], folder: Path, log: Callable[[str], None]) -> list[str]:
    """The shards, or copies of them below `folder` if their server ignores range requests.

    Raises:
        HFViTError: the copies do not fit the disk, or a shard cannot be copied.
    """
    servers = {host_of(url): url for url in reversed(urls) if url.startswith(("http://", "https://"))}
    without = sorted(host for host, first in servers.items() if not _answers_ranges(first))
    of_them = [url for url in urls if host_of(url) in without]
    if not of_them:
        return urls
    ignores = "ignores" if len(without) == 1 else "ignore"
    copies = dict(zip(of_them, copy_shards(of_them, folder, f"{listed(without)} {ignores} range requests: ", log)))
    return [copies.get(url, url) for url in urls]


def host_of(url: str) -> str:
    """`https://example.org` of `https://example.org/a.tar`."""
    return "/".join(url.split("/")[:3])


def copy_shards(urls: list[str], folder: Path, why: str, log: Callable[[str], None]) -> list[str]:
    """Copies of remote shards below `folder`; existing ones are not copied again.

    Args:
        why: begins the line that is logged.

    Raises:
        HFViTError: the copies do not fit the disk, or a shard cannot be copied.
    """
    shards = look_at(urls)
    copies = [
        folder / f"copies-{digest(shard.url, shard.size, shard.version)}" / shard_name(shard.url) for shard in shards
    ]
    missing = [(shard, copy) for shard, copy in zip(shards, copies) if not copy.exists()]
    if missing:
        size = sum(shard.size for shard, _ in missing)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise HFViTError(
                f"{why}copies of {len(missing):,} shards ({size / 1e9:.1f} GB) do not fit into '{folder}' "
                f"({free / 1e9:.1f} GB free): choose another --cache_dir or server"
            )
        log(f"{why}{len(missing):,} shards ({size / 1e9:.1f} GB) are copied to '{folder}' before the first step")
        with ThreadPoolExecutor(COPIES) as pool:
            list(pool.map(_copy, *zip(*missing)))
    return [str(copy) for copy in copies]


def _answers_ranges(url: str) -> bool:
    """Whether a web server answers a range request with a part; the body of the answer is not read."""
    request = urllib.request.Request(url, headers={"Range": "bytes=0-1"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.status == http.HTTPStatus.PARTIAL_CONTENT
    except OSError:  # fsspec, which has the credentials, will report what is wrong
        return True


def _copy(shard: TarShard, copy: Path) -> None:
    files, path = file_system(shard.url)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(copy) as temporary:
        try:
            files.get_file(path, str(temporary))
        except Exception as error:  # every file system of fsspec has its own
            raise HFViTError(f"cannot copy the shard '{shard.url}' ({one_line(error)})") from error
        if temporary.stat().st_size != shard.size:
            raise HFViTError(f"the copy of the shard '{shard.url}' breaks off; run the command again")
