"""A sample of `config_files.py`; the whole count with `python -m tests.fuzz.config_files`, or under `slow`."""

import pytest

from tests.fuzz.config_files import run


@pytest.mark.parametrize("every", [19, pytest.param(1, marks=pytest.mark.slow)], ids=["sample", "all"])
def test_no_config_is_silently_wrong_a_traceback_or_a_hang(every):
    outcomes, bad = run(every)
    assert not bad, "\n".join(bad)
    assert outcomes["same"] and outcomes["refused"]
