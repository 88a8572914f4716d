"""Several processes end as one: what stops one of them, all of them say.

For train.py, the Trainer and what it calls. A process that ended alone would leave the others waiting in their next
collective operation, until a time limit or the launcher kills them.
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
PEER_EXIT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # as gloo says it


@contextmanager
def all_ranks() -> Iterator[None]:
    """Within it, processes do not wait for each other; what one cannot do, all raise when they come out."""
    error: Exception | None = None
    try:
        yield
    except (HFViTError, OSError) as caught:
        error = caught
    raise_on_all_ranks(error)


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise the error of this process, or that of another; every process has to call it."""
    if PartialState().num_processes > 1:
        messages = gather_object([] if error is None else [str(error)])
        free_gathered()
        if messages and error is None:
            error = HFViTError(messages[0])
    if error is not None:
        raise error


def agreed(value: Any) -> Any:
    """The main process's value, in all of them: clocks differ, and what follows must not."""
    if PartialState().num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


@atexit.register
def free_gathered() -> None:
    """Give gloo's threads the interpreter's lock, under which they free what was gathered.

    A process that ends at once holds the lock and waits for them, or is aborted by them.
    """
    if PartialState._shared_state and PartialState().num_processes > 1:
        time.sleep(THREADS_PAUSE)


@contextmanager
def handle_peer_exit() -> Iterator[None]:
    """Within it, another process that was killed is an HFViTError."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in PEER_EXIT):
            raise
        raise HFViTError(
            "another rank exited; see its log for the cause. Resume with --resume_from_checkpoint true"
        ) from error
