"""Images of a table that are given as addresses: downloaded once into the cache, before training begins.

Not `datasets`' DownloadManager, which stops at the first address that fails.
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

from ..sources import digest, own_cache


CONNECTIONS = 16  # at a time
ATTEMPTS, PAUSE = 2, 1.0  # downloads of one address; seconds between them


@dataclass(frozen=True)
class Downloads:
    """Downloaded images.

    Attributes:
        folder: of the downloaded files. failed: the reason for each address that could not be downloaded.
    """

    folder: Path
    failed: dict[str, str]

    def file(self, address: str) -> Path:
        """The downloaded file; raises UnreadableImage if the download failed."""
        path = file_of(self.folder, address)
        if address in self.failed and not path.exists():  # another process may have succeeded since
            raise UnreadableImage(f"{address}: could not be downloaded ({self.failed[address]})")
        return path


def download_all(values: Iterable[object], cache_dir: str | os.PathLike | None, notes: list[str]) -> Downloads:
    """Download those of `values` that are addresses, unless they are in the cache; others are paths.

    Of several processes that share the cache, one downloads while the others wait. The next run tries failed addresses
    again.

    Args:
        notes: a line about downloads, and one about failures, are added.
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
        reasons_in_words = listed([f"{address} ({reason})" for address, reason in failed.items()])
        notes.append(f"{len(failed):,} of {len(addresses):,} addresses could not be downloaded: {reasons_in_words}")
    return Downloads(folder, failed)


def file_of(folder: Path, address: str) -> Path:
    return folder / digest(address)


def fetch(address: str, path: Path) -> str | None:
    """Download to `path`, where the file appears whole; returns the reason if that fails."""
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
