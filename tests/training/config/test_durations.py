"""Lengths of training: steps, shares, epochs, percent.

pytest tests/training/config/test_durations.py
"""

import pytest

from hf_vit.errors import HFViTError
from training.config.durations import steps_of


@pytest.mark.parametrize(
    ("value", "steps"),
    [(0.1, 6), (10, 10), (0, 0), ("10", 10), ("10%", 6), ("10 percent", 6), ("2 epochs", 9), ("0.5 epoch", 2)],
)
def test_lengths_are_updates_shares_epochs_or_percent(value, steps):
    assert steps_of("warmup_steps", value, 55, 4.5) == steps


@pytest.mark.parametrize("value", ["soon", "-3", "5 weeks", "1e3 epochs", ""])
def test_what_is_no_length_is_named(value):
    with pytest.raises(HFViTError, match=r"--warmup_steps .*: give steps, a fraction below 1, or a length such as"):
        steps_of("warmup_steps", value, 55, 4.5)
