"""Compile C++ sources for this processor at their first use, cache the libraries, and load them.

If there is no compiler, or it fails, hangs or builds nothing, `library` returns None and PyTorch's operations serve;
one line says why. A cached library is loaded only if no other user can have written it and its digest is the one
recorded when it was built; a new one only if it is whole: a truncated file would kill the process, not raise. Limits
in the environment (`capabilities.features`) hold for the compiled code too. Not `torch.utils.cpp_extension.load`: it
needs ninja and Python's headers, and waits for a compiler that hangs.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from ..capabilities import features, hardware_features
from ..private_cache import cache_folder, distrust


logger = logging.get_logger(__name__)

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 120.0  # a source takes one or two; more is a compiler that hangs
LOCK_SECONDS = COMPILE_SECONDS + 30  # timeout of waiting for another process that compiles

Functions = Mapping[str, Sequence]  # name -> types of its arguments

_hanging: set[str] = set()  # compilers that took too long: one process waits for them once, not once per library


def library(source: Path, functions: Functions) -> ctypes.CDLL | None:
    """A source compiled for this processor, with the types of its functions set; None if that is not possible.

    Args:
        source: a C++ file that needs only the standard library and OpenMP.
        functions: the functions to call; a library that lacks one is not used.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64" or not source.exists():
        return None
    try:
        command = compiler()
        if command is None:
            return None
        # features too: -march=native code of a newer processor would crash on an older one that shares the home
        key = repr((command, flags(), sorted(hardware_features()))).encode()
        name = f"{source.stem}-{hashlib.sha256(source.read_bytes() + key).hexdigest()[:16]}"
        folder = cache_folder()
        if folder is None:  # built for this process alone
            with tempfile.TemporaryDirectory(prefix="hf_vit-") as temporary:
                return _compile_and_rename(command, source, Path(temporary), name, functions)
        with FileLock(folder / f"{name}.lock", timeout=LOCK_SECONDS, mode=0o600):
            compiled = _load_cached(folder / f"{name}.so", functions)
            return compiled or _compile_and_rename(command, source, folder, name, functions)
    except (OSError, ValueError, NotImplementedError, Timeout) as error:  # older filelock: no locks here
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning(f"{source.name} was not compiled, PyTorch's own operations serve instead: {reason[0]}")
        return None


def compiler() -> list[str] | None:
    """The compiler's command: `CXX`, which may have several words ("ccache g++"), else g++ or clang++."""
    if words := shlex.split(os.environ.get("CXX", "")):
        return words
    path = shutil.which("g++") or shutil.which("clang++")
    return [path] if path else None


def flags() -> tuple[str, ...]:
    """The compiler's flags, within the limits that the environment sets to the processor's features."""
    if features() == hardware_features() or "avx512f" in features():
        architecture = "native"
    else:
        architecture = "x86-64-v3" if "avx2" in features() else "x86-64-v2"
    return *FLAGS, f"-march={architecture}"


# -- cached libraries


def _load_cached(path: Path, functions: Functions) -> ctypes.CDLL | None:
    """A library built before, or None if there is none or it must be built again."""
    digest = path.with_suffix(".sha256")
    if not (path.exists() and digest.exists()):
        return None
    if reason := distrust(path) or distrust(digest):
        logger.warning(f"{reason}: it is not loaded, and built again")
        return None
    if digest.read_text(encoding="utf-8", errors="replace").strip() != _digest(path):
        logger.warning(f"{path} is damaged: it is built again")
        return None
    try:
        return _load(path, functions)
    except (OSError, ValueError):  # built with another C library, for example, if machines share a home
        return None


def _load(path: Path, functions: Functions) -> ctypes.CDLL:
    if not _is_whole(path):
        raise ValueError(f"{path.name} is no whole library")
    loaded = ctypes.CDLL(str(path))
    for name, arguments in functions.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise ValueError(f"{path.name} has no function {name!r}")
        function.argtypes = list(arguments)
    return loaded


def _is_whole(path: Path) -> bool:
    """Whether a file is ELF (64 bits, little endian) and its headers name no byte beyond its end.

    A compiler that exits with 0 may have left half a library, as on a full disk; to load it would kill the process.
    """
    content = path.read_bytes()
    if len(content) < 64 or content[:6] != b"\x7fELF\x02\x01":
        return False
    programs, sections = struct.unpack_from("<QQ", content, 32)  # offsets of the tables of headers
    program_size, program_count, section_size, section_count = struct.unpack_from("<4H", content, 54)
    ends = [programs + program_size * program_count, sections + section_size * section_count]
    if program_size < 56 or max(ends) > len(content):
        return False
    for at in range(programs, ends[0], program_size):
        offset, _, _, size = struct.unpack_from("<4Q", content, at + 8)
        ends.append(offset + size)
    return max(ends) <= len(content)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- building


def _compile_and_rename(
    command: list[str], source: Path, folder: Path, name: str, functions: Functions
) -> ctypes.CDLL:
    """Compile in a temporary folder, then rename. Raises OSError or ValueError with the compiler's first line."""
    for stale in folder.glob(f"{name}.build-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}.build-") as temporary:
        built, digest = Path(temporary, f"{name}.so"), Path(temporary, f"{name}.sha256")
        _compile([*command, *flags(), str(source), "-o", str(built)], Path(temporary, "errors"))
        if not built.is_file():
            raise ValueError(f"{shlex.join(command)} built nothing")
        built.chmod(0o700)
        digest.write_text(_digest(built), encoding="utf-8")
        digest.chmod(0o600)
        loaded = _load(built, functions)  # before it is cached; the mapping stays valid when the file moves
        os.replace(built, folder / built.name)
        os.replace(digest, folder / digest.name)
        return loaded


def _compile(command: list[str], errors: Path) -> None:
    """Run a compiler, and kill it with all its children when it takes too long: it is not run again."""
    if command[0] in _hanging:
        raise ValueError(f"{command[0]} took too long before")
    with errors.open("wb") as file:  # not a pipe: a child that outlives the compiler would keep it open
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait(COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            _hanging.add(command[0])
            raise ValueError(f"{command[0]} took more than {COMPILE_SECONDS:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(lines[0] if lines else f"{command[0]} failed with exit status {status}")
