"""Several processes end as one: what stops one of them, all of them say.

For run.py, the Trainer and what it calls. A process that ended alone would leave the others waiting in their next
collective operation, until a time limit or the launcher kills them.
"""

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.utils import gather_object

from hf_vit.errors import HFViTError


LET_GO = 0.1  # seconds
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # as gloo says it


@contextmanager
def together() -> Iterator[None]:
    """Within it, processes do not wait for each other; what one cannot do, all raise when they come out."""
    error: Exception | None = None
    try:
        yield
    except (HFViTError, OSError) as found:
        error = found
    raise_together(error)


def raise_together(error: Exception | None) -> None:
    """Raise the error of this process, or that of another; every process has to call it."""
    if PartialState().num_processes > 1:
        said = gather_object([] if error is None else [str(error)])
        let_go()
        if said and error is None:
            error = HFViTError(said[0])
    if error is not None:
        raise error


@atexit.register
def let_go() -> None:
    """Give gloo's threads the interpreter's lock, under which they free what was gathered.

    A process that ends at once holds the lock and waits for them, or is aborted by them.
    """
    if PartialState._shared_state and PartialState().num_processes > 1:
        time.sleep(LET_GO)


@contextmanager
def peers_may_vanish() -> Iterator[None]:
    """Within it, another process that was killed is an HFViTError."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in PEER_IS_GONE):
            raise
        raise HFViTError(
            "another process of this run has ended, and what it said tells why; "
            "go on with --resume_from_checkpoint true"
        ) from error
