"""A sample of `hub_faults.py`; the whole count with `python -m tests.fuzz.hub_faults`, or under `slow`."""

import pytest

from tests.fuzz.hub_faults import run


@pytest.mark.parametrize("count", [12, pytest.param(75, marks=pytest.mark.slow)], ids=["sample", "all"])
def test_nothing_is_published_in_part_lost_or_shown(count):
    outcomes, bad = run(count)
    assert not bad, "\n".join(bad)
    assert outcomes["requests that failed"] > count
    assert outcomes["push complete"] and outcomes["load complete"] and outcomes["train complete"]
