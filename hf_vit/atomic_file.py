"""Write files and folders atomically: under a temporary name, flushed to the disk, then renamed.

A reader of the final name sees the old content or the new one, never a part of it: also after a kill, a power cut or
on a full disk. All of hf_vit and training uses it, except the files that travel to the Hub.

    atomic_write(path, text)                       # text or bytes
    with atomic_path(path) as temporary:           # a library that writes by itself, such as savefig or save_file
        figure.savefig(temporary)
    with atomic_folder(path) as temporary:         # a folder that is replaced as a whole
        model.save_pretrained(temporary)

Not `transformers`' or `huggingface_hub`'s helpers: they do not flush, so after a power cut a renamed file can be
empty.
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


TEMPORARY, REPLACED = ".writing-", ".replaced-"  # prefixes of names that a killed process may leave behind
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FREE_SPACE = "free some space, or choose another disk, and run the command again"


def atomic_write(path: str | Path, content: str | bytes, advice: str = FREE_SPACE) -> None:
    """Write text (UTF-8) or bytes to a file atomically.

    Args:
        advice: the last part of the error message for a full disk.

    Raises:
        HFViTError: the disk is full, or `path` is no regular file.
    """
    with atomic_path(path, advice) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_path(path: str | Path, advice: str = FREE_SPACE) -> Iterator[Path]:
    """A temporary path with the same suffix to write to; on success the file replaces `path`.

    The file has the mode of the file it replaces, or the umask's, regardless of the writing library.

    Raises:
        HFViTError: the disk is full (the temporary file is removed), or `path` is no regular file.
    """
    target = regular_file(path)
    temporary = _temporary_name(target)
    with full_disk_is_an_error(target, advice):
        try:
            # created here, not by the library: its mode shows the umask, which cannot be read without setting it
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
    """A temporary folder to write to; on success it replaces `path`, on failure it is removed.

    An old folder at `path` is replaced as a whole: none of its files remain among the new ones.

    Raises:
        HFViTError: the disk is full (`path` is unchanged), or `path` exists and is not a folder.
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
                os.chmod(file, mode)  # that of the umask, regardless of the writing library
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
    """Raise an HFViTError of one line for a full disk: the file, how much is free, the way out.

    Libraries raise different errors for it: `OSError`, safetensors' `SafetensorError`, torch's `RuntimeError`.
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
    """Whether an error, or one that caused it, is about a full disk."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    text = str(error)
    if any(f"os error {code}" in text for code in FULL_DISK) or os.strerror(errno.ENOSPC) in text:
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_full_disk(cause)


def full_disk_message(target: Path, advice: str = FREE_SPACE, written: int = 0) -> str:
    """The error message for a full disk, one line."""
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    sizes = f"{written / 1e6:.1f} MB written, " if written else ""
    return f"no space left for {target} ({sizes}{shutil.disk_usage(folder).free / 1e6:.1f} MB free): {advice}"


def check_folder(path: str | Path) -> None:
    """Raise HFViTError if the path of an output folder exists and is not a folder."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise HFViTError(f"{path} is {_kind(Path(path))}, not a folder: give another path")


def regular_file(path: str | Path) -> Path:
    """`path`, or its link target, if it is a regular file or does not exist yet.

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
    # the suffix stays at the end: savefig, savez and others choose the format by it
    return target.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{target.name}")


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename is never stored before its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported, such as by some network mounts
            raise
    finally:
        os.close(handle)
