"""A sample of `data_shapes.py`; the whole count with `python -m tests.fuzz.data_shapes`, or under `slow`."""

import pytest

from tests.fuzz.data_shapes import run


@pytest.mark.parametrize("count", [20, pytest.param(60, marks=pytest.mark.slow)], ids=["sample", "all"])
def test_no_data_are_silently_wrong_or_a_traceback(count, tmp_path):
    outcomes, bad = run(count, tmp_path)
    assert not bad, "\n".join(bad[:20])
    for kind in ("folder", "table", "shards"):
        assert outcomes[f"{kind} read"]
