"""Crops, flips and distortions: right geometry, right distribution, randomness from the given place only."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from hf_vit.errors import HFViTError
from hf_vit.image_io import open_encoded
from training.data.transforms import (
    EvalTransform,
    TrainTransform,
    affine_coefficients,
    covering_window,
    inception_window,
)
from training.rng import generator


def scene(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([250 * x / width, 250 * y / height, 125 * (x / width + y / height)], axis=2).astype(np.uint8)


def rng(number=0):
    return generator(1, number)


# Geometry


def test_eval_squashes_as_google_does():
    image = Image.fromarray(scene(60, 90))
    result = EvalTransform((16, 24))(image, rng())
    assert result.shape == (16, 24, 3) and result.dtype == np.uint8
    np.testing.assert_array_equal(result, np.asarray(image.resize((24, 16), Image.Resampling.BILINEAR)))


def test_eval_central_crop_is_resize_then_cut():
    image = Image.fromarray(scene(300, 400))
    result = EvalTransform(224, crop_pct=0.875)(image, rng())
    resized = image.resize((round(400 * 256 / 300), 256), Image.Resampling.BILINEAR)
    left = (resized.width - 224) / 2
    expected = np.asarray(resized.crop((round(left), 16, round(left) + 224, 240)))
    assert np.abs(result.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("crop", ["inception", "resize_small_random", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (50, 37), (640, 480)])
@pytest.mark.parametrize("target", [17, (8, 30)])
def test_any_image_gives_the_wanted_size(crop, size, target):
    transform = TrainTransform(target, crop=crop)
    for number in range(5):
        result = transform(Image.fromarray(scene(size[1], size[0])), rng(number))
        assert result.shape == (*transform.image_size_hw, 3) and result.dtype == np.uint8


def test_crop_none_keeps_pixels_and_refuses_other_sizes():
    image = scene(16, 24)
    transform = TrainTransform((16, 24), crop="none", flip=False)
    np.testing.assert_array_equal(transform(Image.fromarray(image), rng()), image)
    with pytest.raises(HFViTError, match=r"needs images of 16x24 px .*, this one has 24x16; choose another crop"):
        transform(Image.fromarray(scene(24, 16)), rng())


def test_scaled_decoding_gives_nearly_the_same_view():
    buffer = io.BytesIO()
    Image.fromarray(scene(768, 1024)).save(buffer, "JPEG", quality=95)
    transform = TrainTransform(64)
    for number in range(10):
        opened = open_encoded(buffer.getvalue(), "x")
        scaled = transform.from_file(opened, "x", rng(number)).astype(int)
        whole = transform(Image.fromarray(scene(768, 1024)), rng(number)).astype(int)
        assert np.abs(scaled - whole).max() <= 8 and np.abs(scaled - whole).mean() < 1.5


def test_inception_windows_have_the_asked_area_and_ratio():
    shares, ratios = [], []
    for number in range(2000):
        left, upper, right, lower = inception_window(500, 375, (0.05, 1.0), (3 / 4, 4 / 3), rng(number))
        assert 0 <= left < right <= 500 and 0 <= upper < lower <= 375
        shares.append((right - left) * (lower - upper) / (500 * 375))
        ratios.append((right - left) / (lower - upper))
    assert 0.049 < min(shares) < 0.06 and 0.9 < max(shares) <= 1.0
    assert 0.74 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.35
    assert abs(np.mean(np.sqrt(shares)) - (np.sqrt(0.05) + 0.93) / 2) < 0.06  # uniform in height, hence in root area


def test_inception_window_of_a_ribbon_is_all_of_it():
    assert inception_window(1000, 4, (0.5, 1.0), (3 / 4, 4 / 3), rng()) == (0.0, 0.0, 1000.0, 4.0)


def test_covering_window():
    assert covering_window(200, 100, (50, 50), 2.0, 0.0, 1.0) == (0.0, 50.0, 50.0, 100.0)
    left, upper, right, lower = covering_window(100, 100, (30, 60), 1.0, 0.5, 0.5)
    assert (left, upper, right, lower) == (0.0, 25.0, 100.0, 75.0)


def test_affine_coefficients():
    image = Image.fromarray(scene(31, 31))

    def moved(**change):
        settings = {"degrees": 0.0, "shear": 0.0, "shift": (0.0, 0.0), "scale": 1.0, **change}
        coefficients = affine_coefficients(image.size, **settings)
        return np.asarray(image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR))

    np.testing.assert_array_equal(moved(), np.asarray(image))
    np.testing.assert_array_equal(moved(shift=(3, 0))[:, 3:], np.asarray(image)[:, :-3])
    np.testing.assert_array_equal(moved(shift=(0, 2))[2:], np.asarray(image)[:-2])
    turned = moved(degrees=90).astype(int)
    assert np.abs(turned - np.rot90(np.asarray(image))).max() <= 1  # counter-clockwise
    enlarged = moved(scale=2.0).astype(int)
    assert np.abs(enlarged[15, 15] - np.asarray(image)[15, 15]).max() <= 1
    assert (
        np.abs(np.diff(enlarged[15, :, 0]).mean() - np.diff(np.asarray(image)[15, :, 0].astype(int)).mean() / 2) < 0.2
    )


def test_flip_happens_every_other_time():
    image = scene(8, 8)
    transform = TrainTransform(8, crop="none", flip=True)
    flipped = 0
    for number in range(400):
        result = transform(Image.fromarray(image), rng(number))
        if not np.array_equal(result, image):
            np.testing.assert_array_equal(result, image[:, ::-1])
            flipped += 1
    assert 150 < flipped < 250


def test_small_distortions_stay_small_and_differ():
    image = np.zeros((24, 24, 3), np.uint8)
    image[10:14, 10:14] = 255
    transform = TrainTransform(24, crop="none", flip=False, degrees=10, translate=0.1, scale=(0.9, 1.1), shear=5)
    results = [transform(Image.fromarray(image), rng(number)) for number in range(20)]
    assert len({result.tobytes() for result in results}) == 20
    for result in results:
        ink = result[..., 0].astype(float)
        y, x = np.mgrid[0:24, 0:24] + 0.5
        assert abs((ink * x).sum() / ink.sum() - 12) < 3 and abs((ink * y).sum() / ink.sum() - 12) < 3
        assert 0.7 < ink.sum() / image[..., 0].sum() < 1.4


def test_randomness_comes_from_the_generator_alone():
    image = Image.fromarray(scene(40, 60))
    transform = TrainTransform(16, degrees=10)
    np.random.seed(1)
    first = transform(image, rng(5))
    np.random.seed(2)
    np.testing.assert_array_equal(transform(image, rng(5)), first)


def test_grayscale_models_get_one_channel():
    result = EvalTransform(8, num_channels=1)(Image.new("RGB", (9, 9), (255, 0, 0)), rng())
    assert result.shape == (8, 8, 1) and np.abs(result.astype(int) - 76).max() <= 1


def test_describe_is_json_and_complete():
    described = json.loads(json.dumps(TrainTransform((16, 24), crop_area=(0.3, 1.0), flip=False).describe()))
    assert described["transform"] == "TrainTransform"
    assert described["image_size"] == [16, 24] and described["crop_area"] == [0.3, 1.0] and described["flip"] is False
    assert EvalTransform(32, crop_pct=0.9).describe()["crop_pct"] == 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "center"}, "crop must be one of inception"),
        ({"crop_area": (0.5, 0.2)}, "crop_area"),
        ({"crop_area": (0.0, 1.0)}, "crop_area"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"resample": "cubic"}, "resample must be one of"),
        ({"num_channels": 4}, "1 or 3 channels"),
        ({"image_size": 0}, "image_size must be positive"),
        ({"resize_small": 0.5}, "resize_small"),
        ({"degrees": 200}, "degrees"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(HFViTError, match=message):
        TrainTransform(**{"image_size": 8, **settings})
