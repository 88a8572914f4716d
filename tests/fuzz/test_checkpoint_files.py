"""A sample of `checkpoint_files.py`; the whole count with `python -m tests.fuzz.checkpoint_files`, or under `slow`."""

import pytest

from tests.fuzz.checkpoint_files import run


@pytest.mark.parametrize("count", [160, pytest.param(2000, marks=pytest.mark.slow)], ids=["sample", "all"])
def test_no_file_is_silently_wrong_a_traceback_or_a_hang(count):
    outcomes, bad = run(count)
    assert not bad, "\n".join(bad)
    kinds = {what.partition(" ")[2] for what in outcomes}
    assert "refused" in kinds and sum(outcomes.values()) == count
