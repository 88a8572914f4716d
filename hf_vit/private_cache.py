"""A folder and files that only this user can have written: what is kept there may be trusted in a later process.

Compiled kernels are executed and measured times decide which code runs, so neither is read where another user could
have put it: `HF_HOME/hf_vit` has mode 0700, and owner and mode of every file are checked.

Tests: tests/hf_vit/test_kernel_table.py.
"""

import functools
import os
import stat
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from transformers.utils import logging


logger = logging.get_logger(__name__)


def cache_folder() -> Path | None:
    """`HF_HOME/hf_vit`, or a folder of this user among the temporary files where that cannot serve; else None."""
    return _first_private_folder((Path(HF_HOME, "hf_vit"), Path(tempfile.gettempdir(), f"hf_vit-{_user()}")))


@functools.cache
def _first_private_folder(candidates: tuple[Path, ...]) -> Path | None:
    """Logs one line where the first is refused: said once a process."""
    reasons: list[str] = []
    for folder in candidates:
        reason = _make_private(folder)
        if reason is None:
            if reasons:
                logger.warning(f"{'; '.join(reasons)}: using {folder} instead")
            return folder
        reasons.append(reason)
    logger.warning(f"{'; '.join(reasons)}: nothing is cached; set HF_HOME to a folder of your own")
    return None


def _make_private(folder: Path) -> str | None:
    """Create a folder with mode 0700 or check and tighten one; returns why it cannot serve, None where it can."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if owner := _foreign_owner(folder):
            return f"{folder} belongs to {owner}"
        if hasattr(os, "geteuid") and stat.S_IMODE(folder.stat().st_mode) & 0o022:
            folder.chmod(0o700)  # files that others put here before are told by their owner
        with tempfile.TemporaryFile(dir=folder):  # a full or read-only file system shows only when written to
            pass
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"
    return None


def distrust(path: Path) -> str | None:
    """Why a file in the cache must not be read, None where it may: another owner, or writable by others."""
    if owner := _foreign_owner(path):
        return f"{path} belongs to {owner}"
    if hasattr(os, "geteuid") and stat.S_IMODE(path.stat().st_mode) & 0o022:
        return f"{path} is writable by other users"
    return None


def _foreign_owner(path: Path) -> str | None:
    """Who else owns a path or where it links to; None for this user, and on systems without owners."""
    if not hasattr(os, "geteuid"):
        return None
    owners = {path.lstat().st_uid, path.stat().st_uid} - {os.geteuid()}
    return f"user {min(owners)}" if owners else None


def _user() -> str:
    return str(os.geteuid()) if hasattr(os, "geteuid") else os.environ.get("USERNAME", "user")
