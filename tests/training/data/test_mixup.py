"""Mixup and CutMix: labels follow the pixels, draws follow (seed, step)."""

import pytest
import torch

from hf_vit.errors import HFViTError
from training.data.mixup import MixupCutmix


def batch(count=4):
    pixel_values = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, 16, 16).clone()
    return pixel_values, torch.arange(count)


def test_mixup_mixes_images_and_labels_alike():
    pixel_values, labels = batch()
    mixed, soft = MixupCutmix(0.2, 0.0, num_labels=4, seed=1)(pixel_values, labels, step=3)
    weight = soft[1, 1].item()
    assert 0.5 <= weight <= 1.0 and soft[1, 0].item() == pytest.approx(1 - weight)
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    torch.testing.assert_close(mixed, weight * pixel_values + (1 - weight) * pixel_values.roll(1, 0))


def test_cutmix_labels_count_the_pixels_that_are_left():
    pixel_values, labels = batch()
    mixup = MixupCutmix(0.0, 1.0, num_labels=4, seed=1)
    cut = 0
    for step in range(20):
        mixed, soft = mixup(pixel_values, labels, step)
        for i in range(4):
            own = (mixed[i, 0] == i).float().mean().item()
            assert soft[i, i].item() == pytest.approx(own, abs=1e-6)
            assert soft[i, (i - 1) % 4].item() == pytest.approx(1 - own, abs=1e-6)
        cut += 0 < soft[0, 3].item() < 1
    assert cut > 10
    assert (pixel_values == batch()[0]).all()  # the given batch is left alone


def test_it_is_a_function_of_seed_and_step():
    pixel_values, labels = batch()
    mixup = MixupCutmix(0.8, 1.0, num_labels=4, seed=1)
    for step in range(5):
        first, again = mixup(pixel_values, labels, step), mixup(pixel_values, labels, step)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert len({mixup(pixel_values, labels, step)[1][0].numpy().tobytes() for step in range(8)}) > 6
    other = MixupCutmix(0.8, 1.0, num_labels=4, seed=2)
    assert any(not torch.equal(mixup(pixel_values, labels, s)[1], other(pixel_values, labels, s)[1]) for s in range(8))


def test_switched_off_it_is_one_hot_and_soft_labels_pass():
    pixel_values, labels = batch()
    same, soft = MixupCutmix(0.0, 0.0, num_labels=5)(pixel_values, labels, 0)
    assert torch.equal(same, pixel_values) and torch.equal(soft, torch.eye(5)[:4])
    given = torch.full((4, 5), 0.2)
    assert torch.allclose(MixupCutmix(0.5, 0.0, num_labels=5)(pixel_values, given, 0)[1], given)
    with pytest.raises(HFViTError, match="mixup"):
        MixupCutmix(-1.0, 0.0, num_labels=5)
