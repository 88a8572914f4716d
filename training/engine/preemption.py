"""Stopping a run from outside: SIGTERM, which cluster schedulers send, and Ctrl-C end it after the current step.

For the Trainer. A second Ctrl-C ends it at once.
"""

import atexit
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator


AGREE_EVERY = 10  # steps between two collective checks whether any rank was asked to stop
SAME_KEYPRESS = 1.0  # seconds in which a second SIGINT is the launcher's, forwarded after the terminal's own


class StopRequest:
    """Whether this process, or another of the run, was asked to stop."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._asked = False
        self._asked_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM and a first Ctrl-C in place of their usual effect.

        Raises:
            KeyboardInterrupt: a second Ctrl-C.
        """
        # Python allows signal handlers in the main thread only; elsewhere the signals keep their usual effect.
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame) -> None:
            now = time.monotonic()
            if number == signal.SIGINT and self._asked and now - self._asked_at > SAME_KEYPRESS:
                raise KeyboardInterrupt
            self._asked, self._asked_at = True, now

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request(self) -> None:
        """Ask all ranks to stop, from their next collective check on."""
        self._asked = True

    def requested(self, step: int) -> bool:
        """Whether to stop after `step` steps; the same on all ranks, which agree every AGREE_EVERY steps."""
        if self.accelerator.num_processes == 1:
            return self._asked
        if step % AGREE_EVERY:  # a collective check in every step would make the CPU wait for the GPU
            return False
        if self._asked:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()


def ignore_signals(worker: int) -> None:
    """Make a data worker ignore signals to the whole process group: the loop ends its workers itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # An error in a worker reaches the loop through its queue. What a worker's threads print when the loop closes their
    # connections (multiprocessing's resource sharer) would only follow the one line that names the cause.
    sys.excepthook = threading.excepthook = lambda *error: None


@atexit.register
def end_workers() -> None:
    """Kill data workers: Python's own exit sends them SIGTERM, which they ignore, and then waits for them."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
