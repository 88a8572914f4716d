"""The one way to write a file or folder: under a temporary name, flushed to the disk, then renamed.

Whoever opens the final name sees the old content or the new one, never a half: not after a kill, a power cut, a full
disk. For all of hf_vit but what travels to the Hub, and for training.

    atomic_write(path, text)                       # content at hand
    with atomic_path(path) as temporary:           # a library that writes by itself, such as savefig or save_file
        figure.savefig(temporary)
    with atomic_folder(path) as temporary:         # a folder that is replaced as a whole
        model.save_pretrained(temporary)

Not `transformers`' or `huggingface_hub`'s helpers: theirs do not flush, so a rename can outlive the content.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import HFViTError


TEMPORARY, REPLACED = ".writing-", ".replaced-"  # what a killed process may leave, before the final name
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FREE_SPACE = "free some space, or choose another disk, and run the command again"


def atomic_write(path: str | Path, content: str | bytes, advice: str = FREE_SPACE) -> None:
    """Write text (UTF-8) or bytes to a file that appears whole.

    Args:
        advice: the way out that a full disk's message names.

    Raises:
        HFViTError: the disk is full, or `path` is no regular file.
    """
    with atomic_path(path, advice) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_path(path: str | Path, advice: str = FREE_SPACE) -> Iterator[Path]:
    """Give a temporary path, of the same suffix, to write a file at; on success it takes the place of `path`.

    The file gets the mode that the umask says, or that of the file it replaces, whatever the writing library sets.

    Raises:
        HFViTError: the disk is full (nothing is left of the attempt), or `path` is no regular file.
    """
    target = regular_file(path)
    temporary = _temporary_name(target)
    with full_disk_is_an_error(target, advice):
        try:
            # Created here, not by the library: its mode shows the umask, which cannot be read without setting it.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
            yield temporary
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                os.chmod(temporary, mode)
            _flush(temporary)
            os.replace(temporary, target)
            _flush(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, advice: str = FREE_SPACE) -> Iterator[Path]:
    """Give a temporary folder to write in; on success it takes the place of `path`, on failure it disappears.

    What stood at `path` goes as a whole: no file of the old folder is left among the new ones.

    Raises:
        HFViTError: the disk is full (what stood at `path` is untouched), or `path` is neither a folder nor free.
    """
    target = Path(path)
    if target.is_symlink() and target.is_dir():
        target = target.resolve()
    if os.path.lexists(target) and not target.is_dir():
        raise HFViTError(f"{target} is {_kind(target)}, not a folder: give another path")
    temporary, replaced = _temporary_name(target), target.with_name(REPLACED + target.name)
    if replaced.is_dir() and not target.exists():  # killed between the two renames below
        os.rename(replaced, target)
    try:
        temporary.mkdir(parents=True)
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        yield temporary
        for file in sorted(temporary.rglob("*"), reverse=True):
            if file.is_file():
                os.chmod(file, mode)  # as the umask says, whatever the writing library set
            _flush(file)
        _flush(temporary)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(target, replaced)
        os.rename(temporary, target)
        _flush(target.parent)
    except BaseException as error:
        written = folder_size(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.is_dir() and not target.exists():
            os.rename(replaced, target)
        if isinstance(error, Exception) and is_full_disk(error) and not isinstance(error, HFViTError):
            raise HFViTError(full_disk_message(target, advice, written)) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def full_disk_is_an_error(target: Path, advice: str = FREE_SPACE) -> Iterator[None]:
    """Within it, a full disk is an HFViTError of one line: what did not fit, how much is free, the way out.

    Libraries say it in their own ways: `OSError`, safetensors' `SafetensorError`, torch's `RuntimeError`.
    """
    try:
        yield
    except HFViTError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise HFViTError(full_disk_message(target, advice)) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that no space is left."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    text = str(error)
    if any(f"os error {code}" in text for code in FULL_DISK) or os.strerror(errno.ENOSPC) in text:
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_full_disk(cause)


def full_disk_message(target: Path, advice: str = FREE_SPACE, written: int = 0) -> str:
    """The one line of a full disk."""
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    sizes = f"{written / 1e6:.1f} MB written, " if written else ""
    return f"no space left for {target} ({sizes}{shutil.disk_usage(folder).free / 1e6:.1f} MB free): {advice}"


def check_folder(path: str | Path) -> None:
    """Raise HFViTError where something that is no folder has the name that an output folder shall have."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise HFViTError(f"{path} is {_kind(Path(path))}, not a folder: give another path")


def regular_file(path: str | Path) -> Path:
    """`path`, or what it links to, where a regular file is or can be.

    Raises:
        HFViTError: a folder, FIFO, socket, device or dangling link, which a rename would silently replace.
    """
    target = Path(path)
    if target.is_symlink() and target.is_file():
        target = target.resolve()
    if os.path.lexists(target) and not (target.is_file() and not target.is_symlink()):
        raise HFViTError(f"{target} is {_kind(target)}, not a regular file: give another path")
    return target


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _kind(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return "a dangling link"
    kinds = (
        (path.is_dir, "a folder"),
        (path.is_fifo, "a FIFO"),
        (path.is_socket, "a socket"),
        (path.is_char_device, "a device"),
        (path.is_block_device, "a device"),
    )
    return next((name for is_kind, name in kinds if is_kind()), "a file")


def _temporary_name(target: Path) -> Path:
    # The suffix stays last, since savefig, savez and others choose the format by it.
    return target.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{target.name}")


def _flush(path: Path) -> None:
    """Bring a file's or folder's content to the disk, so that a rename never outlives it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it, such as some network mounts
            raise
    finally:
        os.close(handle)
