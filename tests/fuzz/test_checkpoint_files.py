"""Samples of `checkpoint_files.py` and `checkpoint_configs.py`; the whole counts with `python -m`, or under `slow`."""

import pytest

from tests.fuzz import checkpoint_configs, checkpoint_files


@pytest.mark.parametrize("count", [160, pytest.param(2000, marks=pytest.mark.slow)], ids=["sample", "all"])
def test_no_file_is_silently_wrong_a_traceback_or_a_hang(count):
    outcomes, bad = checkpoint_files.run(count)
    assert not bad, "\n".join(bad)
    kinds = {what.partition(" ")[2] for what in outcomes}
    assert "refused" in kinds and sum(outcomes.values()) == count


@pytest.mark.parametrize("count", [120, pytest.param(2700, marks=pytest.mark.slow)], ids=["sample", "all"])
def test_no_description_is_a_traceback_or_a_hang(count):
    outcomes, bad = checkpoint_configs.run(count)
    assert not bad, "\n".join(bad)
    assert outcomes["refused"] and outcomes["loads"]
