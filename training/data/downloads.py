"""Images of a table that are given by address: downloaded once into the cache, before training begins.

Not `datasets`' DownloadManager: one address that fails ends all of its downloads.
"""

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from hf_vit.atomic_file import atomic_path
from hf_vit.download import download, is_address
from hf_vit.errors import listed
from hf_vit.image_io import UnreadableImage, one_line

from .sources import digest, own_cache


CONNECTIONS = 16  # at a time
ATTEMPTS, PAUSE = 2, 1.0  # downloads of one address; seconds between them


@dataclass(frozen=True)
class Downloads:
    """Where the images of addresses lie.

    Attributes:
        folder: of the downloaded files. failed: the reason for each address that could not be downloaded.
    """

    folder: Path
    failed: dict[str, str]

    def file(self, address: str) -> Path:
        """The downloaded file; raises UnreadableImage where there is none."""
        path = file_of(self.folder, address)
        if address in self.failed and not path.exists():  # another process may have had it since
            raise UnreadableImage(f"{address}: could not be downloaded ({self.failed[address]})")
        return path


def download_all(values: Iterable[object], cache_dir: str | os.PathLike | None, notes: list[str]) -> Downloads:
    """Download those of `values` that are addresses, unless the cache has them; others are paths and not looked at.

    Of several processes that share the cache, one downloads and the others wait for it. What failed is tried again
    by the next run.

    Args:
        notes: takes how many were downloaded and how many could not be.
    """
    addresses = list(dict.fromkeys(value for value in values if is_address(value)))
    folder = own_cache(cache_dir) / "downloads"
    if not addresses:
        return Downloads(folder, {})
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{digest(*addresses)}.lock"):
        missing = [address for address in addresses if not file_of(folder, address).exists()]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            reasons = pool.map(lambda address: fetch(address, file_of(folder, address)), missing)
            failed = {address: reason for address, reason in zip(missing, reasons) if reason is not None}
    if missing:
        notes.append(f"{len(missing) - len(failed):,} of {len(addresses):,} addresses downloaded into {folder}")
    if failed:
        said = listed([f"{address} ({reason})" for address, reason in failed.items()])
        notes.append(f"{len(failed):,} of {len(addresses):,} addresses could not be downloaded: {said}")
    return Downloads(folder, failed)


def file_of(folder: Path, address: str) -> Path:
    return folder / digest(address)


def fetch(address: str, path: Path) -> str | None:
    """Download into a file that appears whole; the reason where that fails."""
    for attempt in range(ATTEMPTS):
        try:
            content = download(address)
            with atomic_path(path) as temporary:
                Path(temporary).write_bytes(content)
            return None
        except OSError as error:
            reason = one_line(error)
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE)
    return reason
