"""A limit for one input, in processor time: on a loaded machine a slow answer is no hang.

Whoever waits without computing, such as for a FIFO, is stopped after `WAITING` times as many seconds of the clock.
"""

import signal
from typing import NoReturn


WAITING = 20


class Hang(BaseException):
    """Not an Exception: code that turns any of them into an error of its own must not catch it."""


def _ring(*_: object) -> NoReturn:
    raise Hang


def start_clock(seconds: float) -> None:
    """Raise `Hang` in the main thread after so many seconds of processor time of the process."""
    signal.signal(signal.SIGPROF, _ring)
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)


def stop_clock() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
