"""Pictures drawn in batches have the bytes of pictures drawn one at a time; lines are where they belong."""

import numpy as np
import pytest
import torch

from hf_vit.errors import HFViTError
from training.data.synthetic import SyntheticImages, batches
from training.data.synthetic.batches import draw_batch, philox, signed
from training.data.synthetic.lines import OFFSET, Polygons, draw_polygons, running_sums
from training.rng import IMAGE, generator


@pytest.mark.parametrize(("family", "size"), [("atoms", 32), ("contours", 48), ("atoms+contours", 96), ("atoms", 224)])
@pytest.mark.parametrize("way", ["draw_one_by_one", "draw_together"])
def test_batches_have_the_same_bytes(family, size, way, monkeypatch):
    """With blank pictures among them, which are drawn again, and more than are drawn in one go."""
    monkeypatch.setattr(batches, "draw_one_by_one", getattr(batches, way))  # what a CPU takes
    images = SyntheticImages(family, 40, 4, size, seed=-3, first_instance=1 << 41, zipf=0.5, label_noise=0.3)
    indices = list(range(0, len(images), 2 if size < 64 else 11))
    pixels, labels = draw_batch(images, indices)
    assert pixels.dtype == torch.uint8 and pixels.shape == (len(indices), 3, size, size)
    for row, label, index in zip(pixels.numpy(), labels.tolist(), indices):
        item = images[index]
        np.testing.assert_array_equal(row.transpose(1, 2, 0), item["image"])
        assert label == item["label"]


@pytest.mark.gpu
def test_an_accelerator_draws_the_same_bytes():
    images = SyntheticImages("atoms+contours", classes=40, instances=4, size=96)
    here, there = (draw_batch(images, range(160), device)[0].cpu() for device in ("cpu", "cuda"))
    assert torch.equal(here, there)


def test_philox_is_numpy_s():
    words = generator(IMAGE, 2**63 + 5, 7, 2**40, 11, block=2**33).bit_generator.random_raw(8)
    counter = torch.arange(1, 3) + 2**33
    drawn = philox(
        (counter, torch.tensor([7, 7]), torch.tensor([2**40] * 2), torch.tensor([11, 11])), (2**63 + 5, IMAGE)
    )
    assert torch.stack(drawn, dim=1).flatten().tolist() == [signed(int(word)) for word in words]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthetic:glyphs@5,5", "'glyphs' cannot be drawn in batches; atoms and contours can"),
        ("synthetic:atoms+contours-colour@5,5", "'contours-colour' cannot"),
        ("synthetic:atoms@5,5,objects=2", "several objects cannot"),
    ],
)
def test_what_cannot_be_drawn_in_batches(name, message):
    with pytest.raises(HFViTError, match=message):
        draw_batch(SyntheticImages.from_name(name), [0])


def polygon(corners, size, grey=200):
    """One polygon through the given pixels."""
    start = np.array(corners, dtype=np.float32).T + np.float32(OFFSET + 0.5)
    nothing = np.zeros_like(start)
    noise = np.zeros((1, 2, len(corners)), dtype=np.uint8)
    return draw_polygons(Polygons(start, nothing, nothing, noise, np.array([grey], dtype=np.uint8), 1), size)


def test_a_square_is_a_square():
    expected = np.zeros((16, 16), dtype=np.uint8)
    expected[2, 3:9] = expected[7, 3:9] = expected[2:8, 3] = expected[2:8, 8] = 200
    np.testing.assert_array_equal(polygon([(3, 2), (8, 2), (8, 7), (3, 7)], 16), expected)


def test_lines_stay_within_half_a_pixel_and_have_no_gaps():
    rng = np.random.default_rng(0)
    for _ in range(50):
        (x0, y0), (x1, y1) = ends = rng.integers(-40, 104, (2, 2))
        rows, columns = np.nonzero(polygon(ends, 64))
        longest = max(abs(x1 - x0), abs(y1 - y0))
        along = np.arange(longest + 1) / max(1, longest)
        exact = np.stack([x0 + (x1 - x0) * along, y0 + (y1 - y0) * along])
        inside = ((exact >= 0) & (exact <= 63)).all(axis=0)
        assert len(rows) >= inside.sum() - 1 or not longest
        if not len(rows):
            continue
        away = np.abs(exact[:, :, None] - np.stack([columns, rows])[:, None, :]).max(axis=0)
        assert away.min(axis=0).max() < 0.6  # every drawn pixel is on the line
        assert away[inside].min(axis=1).max(initial=0) < 0.6 + (longest == 0)  # every pixel of the line is drawn


def test_later_polygons_cover_earlier_ones():
    start = np.array([[1, 6, 6, 1], [1, 1, 6, 6]], dtype=np.float32) + np.float32(OFFSET + 0.5)
    nothing, noise = np.zeros_like(start), np.zeros((3, 2, 4), dtype=np.uint8)
    picture = draw_polygons(Polygons(start, nothing, nothing, noise, np.array([9, 250, 40], dtype=np.uint8), 1), 8)
    assert set(np.unique(picture)) == {0, 40}


@pytest.mark.parametrize("count", [1, 7, 8, 9, 200])
def test_running_sums(count):
    noise = np.random.default_rng(count).integers(0, 256, (count, 2, 5), dtype=np.uint8)
    np.testing.assert_array_equal(running_sums(noise), np.cumsum(noise, axis=0, dtype=np.uint16))
