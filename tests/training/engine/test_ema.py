"""The average of the weights, against its formula.

pytest tests/training/engine/test_ema.py
"""

import pytest
import torch

from training.engine.ema import WeightAverage


def test_average_follows_the_formula_and_swaps_back():
    layer = torch.nn.Linear(2, 2)
    expected, average = layer.weight.detach().clone(), WeightAverage(layer, 0.5)
    for step in (1, 2, 30):
        with torch.no_grad():
            layer.weight.add_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    raw = layer.weight.detach().clone()
    with pytest.raises(RuntimeError), average.applied():
        torch.testing.assert_close(layer.weight.detach(), expected)
        raise RuntimeError
    assert torch.equal(layer.weight, raw)


def test_frozen_weights_are_not_averaged():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    assert WeightAverage(layer, 0.9).names == ["weight"]
