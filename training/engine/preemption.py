"""A run that is asked to stop: SIGTERM, as schedulers of clusters send it, ends it after the current update.

For the Trainer.
"""

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator


AGREE_EVERY = 10  # updates between the processes' agreeing whether one of them was asked to stop


class StopRequest:
    """Whether this process, or another of the run, was asked to stop."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, SIGTERM is noted and nothing else; outside of the main thread it stays as it is."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame) -> None:
            self._asked = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def make(self) -> None:
        """Ask it of all processes, at their next agreement."""
        self._asked = True

    def made(self, step: int) -> bool:
        """Whether to stop after `step` updates, for all processes alike: they agree every AGREE_EVERY updates."""
        if self.accelerator.num_processes == 1:
            return self._asked
        if step % AGREE_EVERY:
            return False
        if self._asked:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()


def leave_to_the_loop(worker: int) -> None:
    """For data workers: a signal to the whole process group is for the loop, which ends the workers itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """At exit Python ends daemons by the signal that they leave to the loop, and waits for them: these are killed."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
