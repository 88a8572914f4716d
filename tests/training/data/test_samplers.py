"""Order of the data: a function of (seed, position), without overlap or loss over processes and passes.

pytest tests/training/data/test_samplers.py
"""

from collections import Counter
from itertools import chain

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.samplers import EvalSampler, TrainSampler, epoch_order, seed_draw


def row(size, batch, rank=0, world=1, position=0, updates=10, seed=3):
    order = TrainSampler(size, batch, seed=seed, position=position, stop=position + updates * batch * world,
                       rank=rank, world_size=world)  # fmt: skip
    return list(order)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 40), batch=st.integers(1, 5), world=st.integers(1, 4), updates=st.integers(1, 12))
def test_processes_share_the_row_of_one_process_with_the_large_batch(size, batch, world, updates):
    large = row(size, batch * world, updates=updates)
    parts = [row(size, batch, rank, world, updates=updates) for rank in range(world)]
    assert [list(chain(*rows)) for rows in zip(*parts)] == large


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 40), batch=st.integers(1, 5), done=st.integers(0, 8))
def test_resuming_at_a_position_goes_on_where_the_row_was(size, batch, done):
    assert row(size, batch, position=done * batch, updates=10 - done) == row(size, batch)[done:]


def test_every_epoch_shows_every_picture_once_in_another_order():
    keys = list(chain(*row(7, 7, updates=3)))
    assert Counter(keys) == Counter((epoch, index) for epoch in range(3) for index in range(7))
    assert len({tuple(epoch_order(3, epoch, 7)) for epoch in range(3)}) == 3
    assert not np.array_equal(epoch_order(3, 0, 7), epoch_order(4, 0, 7))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 7), world=st.integers(1, 5))
def test_evaluation_shows_every_picture_once_and_every_process_as_many_batches(size, batch, world):
    orders = [EvalSampler(size, batch, rank=rank, world_size=world) for rank in range(world)]
    assert len({tuple(len(keys) for keys in order) for order in orders}) == 1
    seen = []
    for order in orders:
        own = [index for keys in order for _, index in keys]
        if order.filler is not None:
            assert own.pop() == order.filler and order.filler not in own
        seen += own
    assert sorted(seen) == list(range(size))


def test_a_draw_fixes_all_global_generators():
    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist()

    cpu = torch.device("cpu")
    seed_draw(1, 2, 0, cpu)
    first = draw()
    seed_draw(1, 2, 0, cpu)
    assert draw() == first
    seed_draw(1, 2, 1, cpu)
    assert draw() != first
