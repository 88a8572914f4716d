"""RandAugment twice, three-augment, jitter, erasing: values, shares, and that only the generator decides.

pytest tests/training/data/test_auto_augment.py
"""

import numpy as np
import pytest
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from hf_vit.errors import HFViTError
from training.data import auto_augment
from training.data.auto_augment import BIG_VISION, TIMM, TIMM_INCREASING, RandAugment, policy, random_erasing
from training.data.dataset import collate, open_dataset
from training.data.transforms import TrainTransform


def smooth_image(size=40, seed=0):
    """A smooth colored image with some noise."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(20, 220, size)
    pixels = np.stack(
        [ramp[None, :] + 0 * ramp[:, None], ramp[:, None] + 0 * ramp[None, :], 0 * ramp[None] + ramp[:, None] / 2], -1
    )
    return Image.fromarray((pixels + random.integers(0, 20, pixels.shape)).astype(np.uint8))


class Always:
    """A generator that says the same each time."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value

    def integers(self, high):
        return int(self.value * high)


def values(image):
    return np.asarray(image).astype(int)


def test_big_vision_has_its_sixteen_operations_and_timm_its_fifteen():
    assert len(BIG_VISION) == 16 and len(TIMM) == len(TIMM_INCREASING) == 15
    assert set(BIG_VISION) - set(TIMM) == {"Cutout"}


@pytest.mark.parametrize(
    ("table", "name", "magnitude", "expected"),
    [
        (BIG_VISION, "Posterize", 10, lambda x: x // 16 * 16),
        (BIG_VISION, "Posterize", 0, lambda x: 0 * x),  # "Actually not nothing!", big_vision's config says of (2,0)
        (BIG_VISION, "Posterize", 20, lambda x: x),
        (BIG_VISION, "Solarize", 5, lambda x: np.where(x < 128, x, 255 - x)),
        (BIG_VISION, "Solarize", 15, lambda x: x),
        (BIG_VISION, "SolarizeAdd", 10, lambda x: np.where(x < 128, np.minimum(x + 110, 255), x)),
        (BIG_VISION, "Invert", 10, lambda x: 255 - x),
        (BIG_VISION, "Brightness", 5, lambda x: x),
        (BIG_VISION, "Brightness", 0, lambda x: (x * 0.1).astype(int)),
        (TIMM_INCREASING, "Posterize", 0, lambda x: x // 16 * 16),
        (TIMM_INCREASING, "Solarize", 5, lambda x: np.where(x < 128, x, 255 - x)),
        (TIMM_INCREASING, "Solarize", 10, lambda x: 255 - x),
        (TIMM_INCREASING, "Brightness", 0, lambda x: x),
        (TIMM, "Posterize", 10, lambda x: x // 16 * 16),
    ],
)
def test_values(table, name, magnitude, expected):
    image = smooth_image()
    found = values(table[name](image, magnitude, Always(0.0)))
    assert np.abs(found - expected(values(image))).max() <= (1 if "Brightness" in name else 0)


@pytest.mark.parametrize("table", [BIG_VISION, TIMM])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_what_moves_leaves_gray_behind_and_goes_both_ways(table, name):
    image = Image.new("RGB", (40, 40), (200, 10, 10))
    one, other = (values(table[name](smooth_image(), 3, Always(sign))) for sign in (0.0, 0.9))
    assert (one == 128).all(-1).any() and (one != other).any()
    far = values(BIG_VISION["TranslateX"](image, 1, Always(0.0)))
    assert (far == 128).all(-1).sum() == 10 * 40 and (far[:, -10:] == 128).all()
    relative = values(TIMM["TranslateX"](image, 5, Always(0.0)))
    assert (relative[:, 0] == (200, 10, 10)).all() and (relative[:, -8:] == 128).all()  # 0.225 * 40 px


def test_big_visions_contrast_is_about_the_mean_gray():
    image = smooth_image()
    mean = int(np.asarray(image.convert("L"), float).mean())
    found = values(BIG_VISION["Contrast"](image, 0, Always(0.0)))
    assert np.abs(found - (mean + 0.1 * (values(image) - mean))).max() <= 1


def test_cutout_is_a_square_of_two_pads():
    found = values(BIG_VISION["Cutout"](smooth_image(), 2, Always(0.5)))
    assert (found[12:28, 12:28] == 128).all() and not (found[11, 12:28] == 128).all()


def test_policies_are_named_in_their_libraries_words():
    assert policy("randaug(2,10)") == RandAugment(2, 10.0, google=True)
    assert policy("rand-m9-mstd0.5-inc1") == RandAugment(2, 9.0, google=False, increasing=True, spread=0.5)
    assert policy("rand-n3-m5-mmax20").layers == 3 and policy("rand-n3-m5-mmax20").highest == 20
    for wrong in ("randaug(2)", "rand-x9", "rand-m9-inc0", "autoaugment", ""):
        with pytest.raises(HFViTError, match=r"give randaug\(2,10\)"):
            policy(wrong)
    with pytest.raises(HFViTError, match="auto_augment"):
        TrainTransform(8, auto_augment="rnad-m9")


def test_google_applies_every_layer_and_timm_half_of_them(monkeypatch):
    seen = []
    for name in ("BIG_VISION", "TIMM"):
        monkeypatch.setattr(
            auto_augment, name, {str(i): lambda image, m, rng: seen.append(m) or image for i in range(4)}
        )
    rng = np.random.default_rng(0)
    for _ in range(500):
        RandAugment(2, 14.0, google=True)(None, rng)
    assert seen == [14.0] * 1000
    seen.clear()
    for _ in range(1000):
        RandAugment(2, 9.0, google=False, spread=0.5)(None, rng)
    assert 930 < len(seen) < 1070 and max(seen) == 10.0
    assert abs(np.mean([m for m in seen if m < 10]) - 9) < 0.1


def test_three_augment_does_each_of_its_three():
    image, rng = smooth_image(), np.random.default_rng(0)
    gray = values(ImageOps.grayscale(image).convert("RGB"))
    kinds = {"gray": 0, "solarised": 0, "blurred": 0}
    for _ in range(60):
        found = values(policy("3a")(image, rng))
        if (found == gray).all():
            kinds["gray"] += 1
        elif (found == np.where(values(image) < 128, values(image), 255 - values(image))).all():
            kinds["solarised"] += 1
        else:
            kinds["blurred"] += 1
    assert min(kinds.values()) > 8


def test_erasing_covers_two_to_thirty_three_percent():
    image, rng, shares = Image.new("RGB", (60, 60), (1, 2, 3)), np.random.default_rng(0), []
    for _ in range(200):
        changed = (values(random_erasing(image, rng)) != (1, 2, 3)).any(-1)
        shares.append(changed.mean())
    assert min(shares) > 0.015 and max(shares) < 0.345 and abs(np.mean(shares) - 0.177) < 0.02
    assert (values(image) == (1, 2, 3)).all()


@pytest.mark.parametrize("name", ["randaug(2,15)", "rand-m9-mstd0.5-inc1", "3a"])
def test_results_depend_on_seed_epoch_and_index_not_on_workers(name):
    view = TrainTransform(12, auto_augment=name, color_jitter=0.3, random_erasing=0.5)
    data = open_dataset("digits", split="test").select(np.arange(16)).with_transform(view, seed=3)
    batches = []
    for workers in (0, 2):
        np.random.seed(workers)  # global generators must not matter
        loader = DataLoader(data, 8, num_workers=workers, collate_fn=collate)
        batches.append(np.concatenate([batch["pixel_values"].numpy() for batch in loader]))
    assert (batches[0] == batches[1]).all()
    assert (data[1, 3]["pixel_values"] != data[0, 3]["pixel_values"]).any()
