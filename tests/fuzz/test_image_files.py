"""A sample of `image_files.py`; the whole count with `python -m tests.fuzz.image_files`, or under `slow`."""

import pytest

from tests.fuzz.image_files import run


@pytest.mark.parametrize("count", [700, pytest.param(15_000, marks=pytest.mark.slow)], ids=["sample", "all"])
def test_no_damaged_image_is_a_traceback_a_hang_or_read_in_two_ways(count, tmp_path):
    outcomes, bad = run(count, tmp_path)
    assert not bad, "\n".join(bad[:20])
    assert outcomes["decoded"] and outcomes["refused"]
