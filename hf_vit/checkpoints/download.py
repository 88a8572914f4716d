"""Download a checkpoint from the Hub to the cache, with retries and a check of its digest.

Not `snapshot_download` alone: it neither retries all errors of the network nor compares digests.
"""

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)

from ..errors import HFViTError
from .tensor_file import WEIGHT_SUFFIXES


Result = TypeVar("Result")

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SIDECARS = ("config.json", *PROCESSOR_FILES, "open_clip_config.json")
ATTEMPTS, FIRST_WAIT = 3, 1.0  # seconds, doubled each time


def download_checkpoint(repo_id: str, revision: str | None) -> Path:
    """The folder of a Hub repository's configuration and weights, safetensors before pickles.

    Raises:
        HFViTError: not found, gated, or not reachable; complete files stay in the cache.
    """
    if "://" in repo_id:
        raise HFViTError(f"{repo_id}: download the file first, and give its path")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or Path(repo_id).suffix in WEIGHT_SUFFIXES:
        raise HFViTError(f"{repo_id}: no such file or folder")
    small_files = [*SIDECARS, "README.md", "adapter_config.json"]
    folder = _snapshot(repo_id, revision, [*small_files, "*.safetensors", "*.safetensors.index.json"])
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(repo_id, revision, [*small_files, "*.bin", "*.bin.index.json", "*.npz", "*.pth", "*.pt"])
    return folder


def hub_file(repo_id: str, name: str, revision: str | None = None) -> Path | None:
    """One file of a Hub repository; None if the repository does not have it.

    Raises:
        HFViTError: the Hub is not reachable, and the cache does not tell whether the file exists.
    """

    def fetch() -> Path | None:
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError:
            if try_to_load_from_cache(repo_id, name, revision=revision) is _CACHED_NO_EXIST:
                return None
            raise

    return _retry(f"{repo_id}: whether it has a {name} cannot be asked", fetch)


def _snapshot(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    def fetch() -> Path:
        started = time.time()
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
        _check_downloads(folder, started)
        return folder

    failure = f"{repo_id}: no such file or folder, and could not be downloaded from the Hub"
    return _retry(failure, fetch)


def _retry(failure: str, fetch: Callable[[], Result]) -> Result:
    """The result of `fetch`, which is called again after temporary failures of the network or the Hub."""
    for attempt in range(ATTEMPTS):
        try:
            return fetch()
        except HFViTError:
            raise
        except Exception as error:  # the Hub's client passes on errors of its HTTP library
            status = getattr(getattr(error, "response", None), "status_code", None) or 0
            permanent = isinstance(error, GatedRepoError) or (400 <= status < 500 and status not in (408, 429))
            temporary = isinstance(error, HfHubHTTPError) and not permanent and status >= 400
            if (temporary or _is_connection(error)) and attempt + 1 < ATTEMPTS:
                time.sleep(FIRST_WAIT * 2**attempt)
                continue
            if isinstance(error, GatedRepoError):
                reason = "the repository is gated: accept its terms on the Hub, then run `hf auth login`"
            elif status in (401, 403, 404):
                reason = "it does not exist, or is private: then run `hf auth login` with a token that may read it"
            elif isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
                reason = "it is not in the cache, and the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"
            else:
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise HFViTError(f"{failure}: {reason}") from error
    raise AssertionError("the last attempt returns or raises")


def _check_downloads(folder: Path, since: float) -> None:
    """Compare the files of this download with their SHA-256, the name of large files in the Hub's cache.

    Raises:
        HFViTError: a digest differs; the file is removed from the cache.
    """
    for link in folder.iterdir():
        blob = link.resolve()
        # a second of tolerance: the clock of a file system is coarser than ours
        if not re.fullmatch(r"[0-9a-f]{64}", blob.name) or blob.stat().st_mtime < since - 1:
            continue
        with blob.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != blob.name:
            blob.unlink()
            raise HFViTError(f"{link.name} arrived with other bytes than the Hub has: it was deleted, load it again")


def _is_connection(error: BaseException) -> bool:
    """Whether a connection was interrupted, refused or too slow, in any HTTP library; not offline mode."""
    if isinstance(error, LocalEntryNotFoundError):  # raised after such an error if the cache lacks the file
        return error.__cause__ is not None and _is_connection(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(
        ("httpx", "httpcore")
    )
