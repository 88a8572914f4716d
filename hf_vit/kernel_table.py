"""Choose the fastest implementation of an operation, measured once on a machine and stored on disk.

    implementation = choose(("linear", 768, 3072, torch.float32), {"eager": eager, "packed": packed}, x)

The same machine, model and input give the same bits in every process, since times are measured only once: a table in
the cache folder holds them, one file for each processor, set of features, PyTorch version and number of threads. The
first implementation is the plain one; another replaces it only if it is clearly faster, and one that fails on this
machine is skipped. Delete the folder to measure again.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers.utils import logging

from .capabilities import machine_key
from .private_cache import cache_folder, distrust


logger = logging.get_logger(__name__)

MIN_SPEEDUP = 1.1  # over the plain implementation, to replace it
MAX_ROUNDS = 6  # interleaved, of which the best counts: other work on the machine only adds time
MIN_MEASURE_SECONDS = 0.05  # short operations run more rounds, so that other work does not hide their time
MAX_ROUNDS_OF_SHORT_WORK = 200  # also if a clock stands still or jumps back
MAX_MEASURE_SECONDS = 2.0  # no further round after this time, from the second on
COLD_BYTES = 1 << 25  # written before each run, so that weights come from memory as they do within a model
LOCK_SECONDS = 120.0  # timeout of waiting for another process that measures on this machine
MAX_SLOWDOWN, MAX_SLOW_SECONDS = 20, 5.0  # run only once: slower than the plain one by this, and at least this long
FORMAT = 3  # increase it when entries change their meaning

timer: Callable[[], float] = time.perf_counter  # tests replace it

Times = dict[str, float | None]  # seconds of each implementation; None for one that failed

_measured: dict[tuple, Times] = {}
_chosen: dict[tuple, str] = {}
_thread_lock = threading.RLock()
_waited_in_vain = False  # for the table's lock, in this process
_spent = 0.0  # seconds of measuring in this process: an implementation may itself choose, and so measure, inside


def choose(
    key: tuple, implementations: Mapping[str, Callable], *inputs: Any, min_speedup: float = MIN_SPEEDUP
) -> Callable:
    """The fastest implementation for a key.

    Args:
        key: operation, shapes, dtype: strings, numbers, dtypes and tuples of them.
        implementations: computations of the same result by name, the plain one first.
        inputs: arguments to measure them with, if this machine has no times for the key; tensors first.
        min_speedup: over the plain implementation, to replace it.

    Raises whatever the plain implementation raises.
    """
    names = tuple(implementations)
    if len(names) == 1:
        return implementations[names[0]]
    device = inputs[0].device if inputs and torch.is_tensor(inputs[0]) else None
    entry = (key, names, device, torch.get_num_threads())
    if entry not in _chosen:
        _chosen[entry] = _fastest(names, seconds(key, implementations, *inputs), min_speedup)
    return implementations[_chosen[entry]]


def seconds(key: tuple, implementations: Mapping[str, Callable], *inputs: Any, cold: bool = True) -> Times:
    """Best time of each implementation on this machine, from the table or measured now and stored.

    Args:
        cold: whether the caches are emptied before each run: weights in inference come from memory, but activations in
            training have just been written.

    Without a cache folder nothing is measured, and only the plain implementation has a time (0): which code runs must
    not depend on what one process happens to measure.
    """
    names = tuple(implementations)
    device = _device_name(inputs)
    with _thread_lock:
        entry = (key, names, device, torch.get_num_threads())
        if entry not in _measured:
            global _spent
            start, spent = timer(), _spent
            _measured[entry] = _read_or_measure(repr((key, names, device)), implementations, inputs, cold)
            _spent = spent + timer() - start  # with what was measured within it
        return _measured[entry]


def speedup(key: tuple, plain: Callable, other: Callable, *inputs: Any) -> float:
    """Time of the plain implementation over that of the other on this machine; 0 if the other fails.

    Measured once, as by `seconds`; without a cache folder, once in each process.
    """
    implementations = {"plain": plain, "other": other}
    with _thread_lock:
        times = seconds(key, implementations, *inputs)
        if "other" not in times:
            times.update(measure_times(implementations, *inputs))
    other_seconds, plain_seconds = times["other"], times["plain"]
    return 0.0 if other_seconds is None else (plain_seconds or 0.0) / max(other_seconds, 1e-9)


def forget_table() -> None:
    """Clear this process's copy of the table; the file stays."""
    with _thread_lock:
        _measured.clear()
        _chosen.clear()


def table_file() -> Path | None:
    """The file with the times of this machine, or None without a cache folder."""
    folder = cache_folder()
    digest = hashlib.sha256(repr((FORMAT, *machine_key())).encode()).hexdigest()[:16]
    return None if folder is None else folder / f"kernels-{digest}.json"


def _fastest(names: tuple[str, ...], times: Times, min_speedup: float) -> str:
    plain, *others = names
    base = times.get(plain)
    others = [name for name in others if times.get(name) is not None]
    if base is None or not others:
        return plain
    winner = min(others, key=lambda name: times[name] or 0.0)
    return winner if (times[winner] or 0.0) * min_speedup < base else plain


def measure_times(implementations: Mapping[str, Callable], *inputs: Any, cold: bool = True) -> Times:
    """Best time over interleaved rounds; the first, untimed round packs weights and skips those that fail."""
    plain = next(iter(implementations))
    times: Times = {}
    first: dict[str, float] = {}
    for name, implementation in implementations.items():
        try:
            start, spent = timer(), _spent
            implementation(*inputs)
            _wait_for_device(inputs)
            times[name], first[name] = float("inf"), timer() - start - (_spent - spent)
        except Exception as error:  # private operations fail in many ways on processors that they are not for
            if name == plain:
                raise
            times[name] = None
            logger.info(f"implementation {name!r} does not work on this machine: {error}")
    # a reference loop can take a thousand times as long: once is enough
    slow = {name for name, length in first.items() if length > max(MAX_SLOW_SECONDS, MAX_SLOWDOWN * first[plain])}
    times.update({name: first[name] for name in slow})
    began = timer()
    for completed in range(MAX_ROUNDS_OF_SHORT_WORK):
        elapsed = timer() - began
        if completed >= MAX_ROUNDS and elapsed >= MIN_MEASURE_SECONDS:
            break
        if completed >= 2 and elapsed > MAX_MEASURE_SECONDS:
            break
        for name, best in times.items():
            if best is not None and name not in slow:
                if cold:
                    _cool_caches(inputs)
                start = timer()
                implementations[name](*inputs)
                _wait_for_device(inputs)
                times[name] = min(best, max(timer() - start, 0.0))  # a clock that jumps back: no negative time
    return times


# -- the file


def _read_or_measure(key: str, implementations: Mapping[str, Callable], inputs: tuple, cold: bool) -> Times:
    if " at 0x" in key:
        raise TypeError(f"the key {key} has an object whose name differs from process to process")  # a mistake of ours
    path = table_file()
    plain: Times = {next(iter(implementations)): 0.0}
    if path is None:
        return plain
    try:
        times = _stored(path, key, implementations)  # without the lock: whoever holds it may be stopped
        return times or _measure_and_store(path, key, implementations, inputs, cold)
    except _UnusableTable as error:
        _warn_once(f"{path} cannot be used ({error}): the plain implementations serve")
        return plain


def _stored(path: Path, key: str, implementations: Mapping[str, Callable]) -> Times | None:
    """The times in the table, or None if they are not of exactly these implementations with the plain one first."""
    times = _read(path).get(key)
    if times is None or list(times) != list(implementations) or times[next(iter(implementations))] is None:
        return None
    return times


def _measure_and_store(
    path: Path, key: str, implementations: Mapping[str, Callable], inputs: tuple, cold: bool
) -> Times:
    with _locked(path):
        if times := _stored(path, key, implementations):  # another process measured while this one waited
            return times
        times = measure_times(implementations, *inputs, cold=cold)
        table = _read(path)  # again: implementations may have measured their own parts
        table[key] = times
        _write(path, table)
        return times


class _UnusableTable(Exception):
    """The table cannot be read, locked or written: apart from errors of implementations, which may be OSErrors too."""


@contextlib.contextmanager
def _access() -> Iterator[None]:
    """Around operations on files alone, never around a measurement."""
    try:
        yield
    except (OSError, NotImplementedError, Timeout) as error:  # older filelock: no locks on this file system
        raise _UnusableTable(error) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process measures, others wait. One that waited in vain only tries from then on, and does not wait again."""
    global _waited_in_vain
    lock = _file_lock(path.with_suffix(".lock"))
    with _access():
        try:
            lock.acquire(timeout=0 if _waited_in_vain else LOCK_SECONDS)
        except Timeout:
            _waited_in_vain = True
            raise
    try:
        yield
    finally:
        with _access():
            lock.release()


def _read(path: Path) -> dict[str, Times]:
    """The table, empty if there is none or it cannot be trusted."""
    with _access():
        if not path.exists():
            return {}
        if reason := distrust(path):
            _warn_once(f"{reason}: times are measured anew")
            return {}
        content = path.read_bytes()
    try:
        stored = json.loads(content)
        if stored["machine"] != list(machine_key()) or not all(map(_are_times, stored["seconds"].values())):
            raise ValueError("not times of this machine")
        return stored["seconds"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        _warn_once(f"{path} is damaged: times are measured anew")
        return {}


def _are_times(entry: Any) -> bool:
    return isinstance(entry, dict) and all(value is None or _is_time(value) for value in entry.values())


def _is_time(value: Any) -> bool:
    # by type: True and False are int too; compared with the largest float: a longer int cannot be converted, and
    # neither NaN nor infinity passes
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _write(path: Path, table: dict[str, Times]) -> None:
    """Replace the file atomically, under the lock: a reader sees the old one or the new one."""
    temporary = path.with_suffix(".tmp")  # one name, so that a killed process leaves at most one file
    content = json.dumps({"machine": machine_key(), "seconds": table}, indent=1)
    with _access():
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(temporary, path)


@functools.cache
def _file_lock(path: Path) -> FileLock:
    """One lock object per process, which it can take again: implementations may measure their own parts."""
    return FileLock(path, mode=0o600)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


# -- the device


def _device_name(inputs: tuple) -> str:
    first = next((x for x in inputs if torch.is_tensor(x)), None)
    if first is None or first.device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else first.device.type


def _cool_caches(inputs: tuple) -> None:
    """Evict weights from a CPU's caches and load the inputs, as for a layer in the middle of a model."""
    tensors = [x for x in inputs if torch.is_tensor(x)]
    if COLD_BYTES and all(x.device.type == "cpu" for x in tensors):
        torch.empty(COLD_BYTES, dtype=torch.uint8).fill_(1)
        for x in tensors:
            x.sum()


def _wait_for_device(inputs: tuple) -> None:
    if any(torch.is_tensor(x) and x.device.type != "cpu" for x in inputs):
        torch.accelerator.synchronize()
