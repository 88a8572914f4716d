"""A cache folder that only this user can have written to, so that a later process may trust its files.

Compiled kernels are executed and measured times decide which code runs, so neither is read if another user could have
written it: `HF_HOME/hf_vit` has mode 0700, and owner and mode of every file are checked.

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
    """`HF_HOME/hf_vit`, or if that is unusable a folder of this user among the temporary files, or None."""
    return _first_private_folder((Path(HF_HOME, "hf_vit"), Path(tempfile.gettempdir(), f"hf_vit-{_user()}")))


@functools.cache
def _first_private_folder(candidates: tuple[Path, ...]) -> Path | None:
    """The first usable folder; cached, so that a refusal is logged once per process."""
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
    """Create a folder with mode 0700, or check and restrict one; returns the reason if it is unusable."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if owner := _foreign_owner(folder):
            return f"{folder} belongs to {owner}"
        if hasattr(os, "geteuid") and stat.S_IMODE(folder.stat().st_mode) & 0o022:
            folder.chmod(0o700)  # files that others have written before are recognized by their owner
        with tempfile.TemporaryFile(dir=folder):  # a full or read-only file system is noticed only by writing
            pass
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"
    return None


def distrust(path: Path) -> str | None:
    """Why a file in the cache must not be read (another owner, or writable by others), or None."""
    if owner := _foreign_owner(path):
        return f"{path} belongs to {owner}"
    if hasattr(os, "geteuid") and stat.S_IMODE(path.stat().st_mode) & 0o022:
        return f"{path} is writable by other users"
    return None


def _foreign_owner(path: Path) -> str | None:
    """The other user who owns a path or its link target; None for this user, and on systems without owners."""
    if not hasattr(os, "geteuid"):
        return None
    owners = {path.lstat().st_uid, path.stat().st_uid} - {os.geteuid()}
    return f"user {min(owners)}" if owners else None


def _user() -> str:
    return str(os.geteuid()) if hasattr(os, "geteuid") else os.environ.get("USERNAME", "user")
