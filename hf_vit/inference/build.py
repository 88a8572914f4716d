"""Compile C++ sources for this processor at their first use, cache the libraries, and load them.

If there is no compiler, or it fails, hangs or builds nothing, `library` returns None and PyTorch's operations serve;
one line says why. A cached library is loaded only if no other user can have written it and its digest is the one
recorded when it was built: a truncated file would kill the process, not raise. Not `torch.utils.cpp_extension.load`:
it needs ninja and Python's headers, and waits for a compiler that hangs.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from ..capabilities import hardware_features
from ..private_cache import cache_folder, distrust


logger = logging.get_logger(__name__)

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 120.0  # a source takes one or two; more is a compiler that hangs
LOCK_SECONDS = COMPILE_SECONDS + 30  # timeout of waiting for another process that compiles

Functions = Mapping[str, Sequence]  # name -> types of its arguments


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
        key = repr((command, FLAGS, sorted(hardware_features()))).encode()
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
    loaded = ctypes.CDLL(str(path))
    for name, arguments in functions.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise ValueError(f"{path.name} has no function {name!r}")
        function.argtypes = list(arguments)
    return loaded


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
        _compile([*command, *FLAGS, str(source), "-o", str(built)], Path(temporary, "errors"))
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
    """Run a compiler, and kill it with all its children when it takes too long."""
    with errors.open("wb") as file:  # not a pipe: a child that outlives the compiler would keep it open
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait(COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{command[0]} took more than {COMPILE_SECONDS:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(lines[0] if lines else f"{command[0]} failed with exit status {status}")
