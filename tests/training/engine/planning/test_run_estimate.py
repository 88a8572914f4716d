"""What a run will take is logged once, and again where its first steps are much faster or slower.

pytest tests/training/engine/planning/test_run_estimate.py
"""

from types import SimpleNamespace

import pytest
import torch

from training.engine.planning.run_estimate import RunEstimate


@pytest.fixture
def lines():
    return []


@pytest.fixture
def estimate(lines):
    """Of a run of 8000 images."""
    schedule = SimpleNamespace(images_after=lambda step: 8000 - 8 * step)
    timer = SimpleNamespace(seconds=0.0, images=0)
    return RunEstimate(schedule, timer, torch.device("cpu"), lines.append)


def steps(estimate, seconds, count=6):
    for step in range(1, count + 1):
        estimate.timer.seconds += 100.0 if step == 1 else seconds  # the first one allocates memory
        estimate.timer.images += 8
        estimate.after_step(step)


def test_steps_as_fast_as_the_trial_are_not_named_again(estimate, lines):
    estimate.log_estimate(0, 8.0, 2**30)
    steps(estimate, seconds=0.9)
    assert len(lines) == 1 and "about 8.0 images/s: 0:16:40" in lines[0] and "1.0 GiB" in lines[0]


def test_slower_steps_are_named(estimate, lines):
    estimate.log_estimate(0, 8.0, 2**30)
    steps(estimate, seconds=2.0)
    assert len(lines) == 2 and "about 4.0 images/s: 0:33:12" in lines[1]


def test_without_a_trial_the_first_steps_tell(estimate, lines):
    steps(estimate, seconds=0.5)
    assert len(lines) == 1 and "about 16.0 images/s" in lines[0]


def test_nothing_is_said_of_a_short_run(estimate, lines):
    estimate.log_estimate(0, 8000.0, 2**30)
    steps(estimate, seconds=0.001)
    assert lines == []
