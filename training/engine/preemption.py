"""A run that is asked to stop: SIGTERM, as schedulers of clusters send it, and Ctrl-C end it after the current step.

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


AGREE_EVERY = 10  # steps between the processes' agreeing whether one of them was asked to stop
SAME_KEYPRESS = 1.0  # seconds: a launcher passes on the signal that the terminal has sent to all processes already


class StopRequest:
    """Whether this process, or another of the run, was asked to stop."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._asked = False
        self._asked_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, SIGTERM and a first Ctrl-C are noted and nothing else; outside of the main thread nothing is.

        Raises:
            KeyboardInterrupt: a second Ctrl-C.
        """
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
        """Ask it of all processes, where they compare next."""
        self._asked = True

    def requested(self, step: int) -> bool:
        """Whether to stop after `step` steps, for all processes alike: they agree every AGREE_EVERY steps."""
        if self.accelerator.num_processes == 1:
            return self._asked
        if step % AGREE_EVERY:
            return False
        if self._asked:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()


def ignore_signals(worker: int) -> None:
    """For data workers: a signal to the whole process group is for the loop, which ends the workers itself.

    What fails in a worker reaches the loop through its queue. What its other threads print when the loop closes their
    connections (multiprocessing's resource sharer) would stand after the one line that says what happened.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = threading.excepthook = lambda *error: None


@atexit.register
def end_workers() -> None:
    """At exit Python ends daemons by the signal that they leave to the loop, and waits for them: these are killed."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
