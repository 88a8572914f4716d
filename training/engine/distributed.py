"""Errors across processes: what stops one rank is raised on all ranks.

For train.py, the Trainer and what it calls. A rank that ended alone would leave the others waiting in their next
collective operation, until a timeout or the launcher kills them.
"""

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hf_vit.errors import HFViTError


THREADS_PAUSE = 0.1  # seconds
PEER_EXIT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in gloo's messages


@contextmanager
def all_ranks() -> Iterator[None]:
    """A block without collective operations: an error on one rank is raised on all ranks at its end."""
    error: Exception | None = None
    try:
        yield
    except (HFViTError, OSError) as caught:
        error = caught
    raise_on_all_ranks(error)


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise the error of this rank, or else that of another one; every rank has to call it."""
    if PartialState().num_processes > 1:
        messages = gather_object([] if error is None else [str(error)])
        free_gathered()
        if messages and error is None:
            error = HFViTError(messages[0])
    if error is not None:
        raise error


def agreed(value: Any) -> Any:
    """The main process's value, on all ranks: for decisions from clocks, which differ."""
    if PartialState().num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


@atexit.register
def free_gathered() -> None:
    """Let gloo's threads take the interpreter's lock, which they need to free what was gathered.

    A process that exits at once would hold the lock and wait for them, or be aborted by them.
    """
    if PartialState._shared_state and PartialState().num_processes > 1:
        time.sleep(THREADS_PAUSE)


@contextmanager
def handle_peer_exit() -> Iterator[None]:
    """Turn the lost connection to a rank that was killed into an HFViTError."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in PEER_EXIT):
            raise
        raise HFViTError(
            "another rank exited; see its log for the cause. Resume with --resume_from_checkpoint true"
        ) from error
