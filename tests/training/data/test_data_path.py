"""The benchmark of the data path: its images are like photographs, and both ways make the same image.

pytest tests/training/data/test_data_path.py
"""

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks import data_path
from training.rng import TRANSFORM, generator


def test_images_have_the_entropy_and_spectrum_of_photographs():
    files = [data_path.drawn(400, 300, 90, number) for number in range(2)]
    assert files == [data_path.drawn(400, 300, 90, number) for number in range(2)] and files[0] != files[1]
    assert 1.4 < data_path.bits_per_pixel(files) < 3.5
    gray = np.asarray(Image.open(io.BytesIO(files[0])).convert("L"), dtype=float)
    amplitude = np.abs(np.fft.fft2(gray - gray.mean()))
    frequency = np.hypot(np.fft.fftfreq(300)[:, None] * 300, np.fft.fftfreq(400) * 400)
    rings = [(frequency >= low) & (frequency < 2 * low) for low in (2, 16)]
    (low, near), (high, far) = ((np.log(amplitude[ring].mean()), np.log(frequency[ring].mean())) for ring in rings)
    assert 0.8 < (low - high) / (far - near) < 1.6  # photographs: 1.2 on average


def test_both_ways_make_the_same_image():
    data = data_path.drawn(640, 480, 90, 0)
    for number in range(4):
        ours, plain = (way(data, generator(TRANSFORM, 0, number)) for way in (data_path.ours, data_path.plain))
        assert ours.shape == plain.shape == (224, 224, 3) and ours.dtype == plain.dtype == np.uint8
        assert np.abs(ours.astype(int) - plain).mean() < 4  # decoded at 1/2 or 1/1 and resampled from there


@pytest.mark.slow  # two new processes that import everything
def test_every_way_is_timed_in_every_worker():
    data = data_path.drawn(640, 480, 90, 0)
    seconds = data_path.at_once({"one": [data]}, rounds=1, workers=2)["one"]
    assert set(seconds) == {"ours", "plain PIL", "bits"} and all(len(values) == 2 for values in seconds.values())


@pytest.mark.parametrize("option", ["--rounds", "--workers"])
def test_no_rounds_and_no_workers_are_one_line_before_any_image_is_drawn(monkeypatch, capsys, option):
    monkeypatch.setattr(data_path, "drawn_sets", lambda: pytest.fail("it went on"))
    assert data_path.main([option, "0"]) == 2
    assert capsys.readouterr().err == f"error: {option} 0: give 1 or more\n"


def test_photographs_are_fitted_to_every_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_path, "KINDS", ((64, 48, 75), (32, 24, 90)))
    for name, size in {"large.jpg": (200, 100), "exact.jpg": (64, 48), "low.jpg": (200, 40)}.items():
        Image.new("RGB", size, "green").save(tmp_path / name)
    sets = data_path.fitted_sets(tmp_path)
    assert {name: [Image.open(io.BytesIO(data)).size for data in files] for name, files in sets.items()} == {
        "photographs, 64x48, quality 75": [(64, 48)] * 2,
        "photographs, 32x24, quality 90": [(32, 24)] * 2,
    }
    (tmp_path / "large.jpg").unlink(), (tmp_path / "exact.jpg").unlink()
    assert data_path.main(["--photographs", str(tmp_path)]) == 2
    assert "no images of at least 64x48 px" in capsys.readouterr().err
