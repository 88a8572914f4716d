"""The fuzzers' clock rings for what computes and for what waits, through code that catches every Exception."""

import contextlib
import time

import pytest

from tests.fuzz import time_limit
from tests.fuzz.time_limit import Hang, start_clock, stop_clock


def compute():
    while True:
        with contextlib.suppress(Exception):
            sum(range(1000))


@pytest.mark.parametrize("hang", [compute, lambda: time.sleep(60)], ids=["computes", "waits"])
def test_it_rings(hang, monkeypatch):
    monkeypatch.setattr(time_limit, "WAITING", 5)
    start_clock(0.1)
    try:
        with pytest.raises(Hang):
            hang()
    finally:
        stop_clock()


def test_it_is_silent_once_stopped():
    start_clock(0.1)
    stop_clock()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
