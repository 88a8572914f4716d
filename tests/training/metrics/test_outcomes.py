"""What each image of an evaluation came to, kept in a bounded number of bytes.

python -m pytest tests/training/metrics/test_outcomes.py
"""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hf_vit.problem_type import MULTI_LABEL, SINGLE_LABEL
from training.metrics.outcomes import TOP_CLASSES, Outcomes, OutcomeState, joined_outcomes


def collected(logits, labels, index, problem_type=SINGLE_LABEL, losses=None, batch=3):
    state = OutcomeState(problem_type)
    for first in range(0, len(logits), batch):
        part = slice(first, first + batch)
        state.update(logits[part], labels[part], index[part], None if losses is None else losses[part])
    return state.gather(Accelerator(cpu=True))


def test_classes_in_the_order_of_the_data():
    torch.manual_seed(0)
    logits, labels = torch.randn(10, 4), torch.randint(4, (10,))
    index = torch.randperm(10)
    found = collected(logits, labels, index)
    assert found.index.tolist() == list(range(10))
    order = torch.argsort(index)
    probabilities = logits.softmax(-1)[order]
    np.testing.assert_allclose(found.own, probabilities.gather(1, labels[order][:, None])[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found.probabilities, probabilities.sort(descending=True).values, rtol=1e-6)
    assert (found.classes[:, 0] == probabilities.argmax(1).numpy()).all()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")[order]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)


def test_memory_does_not_grow_with_the_classes():
    few, many = (
        collected(torch.randn(6, k), torch.zeros(6, dtype=torch.int64), torch.arange(6)) for k in (100, 21_841)
    )
    sizes = [
        sum(part.nbytes for part in vars(found).values() if isinstance(part, np.ndarray)) for found in (few, many)
    ]
    assert sizes[0] == sizes[1] and many.classes.shape == (6, TOP_CLASSES)


def test_outputs_that_are_not_finite_are_counted_as_nothing():
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])
    found = collected(logits, torch.tensor([0, 1]), torch.arange(2))
    assert np.isfinite(found.own).all() and found.own[1] == 0 and np.isnan(found.losses[1])


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
def test_saved_and_read_again(tmp_path, problem_type):
    labels = torch.randint(3, (5,)) if problem_type == SINGLE_LABEL else torch.rand(5, 3).round()
    found = collected(torch.randn(5, 3), labels, torch.arange(5), problem_type, torch.rand(5))
    found.save(tmp_path / "outcomes.npz")
    again = Outcomes.load(tmp_path / "outcomes.npz")
    assert again.problem_type == problem_type
    for name, value in vars(found).items():
        assert np.array_equal(getattr(again, name), value) if value is not None else getattr(again, name) is None


def test_several_data_sets_as_one():
    parts = [collected(torch.randn(n, 3), torch.zeros(n, dtype=torch.int64), torch.arange(n)) for n in (2, 3)]
    both = joined_outcomes(parts, [4, 3])  # two images of the first could not be read
    assert both.index.tolist() == [0, 1, 4, 5, 6] and len(both.own) == 5


def test_no_image():
    assert OutcomeState(SINGLE_LABEL).gather(Accelerator(cpu=True)) is None
