"""Generated pictures: the same bytes at the same address, different ones everywhere else, and never a blank one."""

import numpy as np
import pytest

from hf_vit.errors import HFViTError
from training.augmentation import EvalTransform
from training.data import open_dataset
from training.randomness import generator
from training.synthetic import FAMILIES, SyntheticImages, find_family
from training.synthetic.fractals import sample_singular_values, sample_system
from training.synthetic.glyphs import LETTERS


NAMES = [name + suffix for name in FAMILIES for suffix in ("", "-colour", "-clouds")]


@pytest.mark.parametrize("family", NAMES)
def test_pictures_are_a_function_of_their_address(family):
    images = SyntheticImages(family, classes=5, instances=4, size=24, seed=3)
    again = SyntheticImages(family, classes=5, instances=4, size=24, seed=3)
    assert len(images) == 20
    pictures = [images[i]["image"] for i in range(20)]
    for index in (7, 0, 19, 7):
        item = again[index]
        np.testing.assert_array_equal(item["image"], pictures[index])
        assert item["label"] == index % 5
    assert len({picture.tobytes() for picture in pictures}) == 20
    other = SyntheticImages(family, classes=5, instances=4, size=24, seed=4)
    assert all(not np.array_equal(other[i]["image"], pictures[i]) for i in range(20))


@pytest.mark.parametrize("family", NAMES)
def test_sets_are_nested(family):
    small = SyntheticImages(family, classes=4, instances=2, size=16)
    large = SyntheticImages(family, classes=4, instances=9, size=16)
    more_classes = SyntheticImages(family, classes=9, instances=2, size=16)
    for index in range(len(small)):
        np.testing.assert_array_equal(small[index]["image"], large[index]["image"])
        instance, label = divmod(index, 4)
        np.testing.assert_array_equal(small[index]["image"], more_classes[9 * instance + label]["image"])


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("size", [16, 33])
def test_no_picture_is_blank(family, size):
    images = SyntheticImages(family, classes=min(52, find_family(family).classes), instances=4, size=size)
    for index in range(0, len(images), 3):
        picture = images[index]["image"]
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
        assert picture.std() > 4


@pytest.mark.parametrize("family", ["glyphs", "contours", "atoms", "fractals"])
def test_another_size_shows_the_same_picture(family):
    """As far as pixels that small can tell: the correlation of thumbnails is high with itself, low with others."""

    def thumbnails(size):
        images = SyntheticImages(family, classes=32, instances=1, size=size)
        grey = np.stack([images[i]["image"].mean(axis=2) for i in range(32)])
        small = grey.reshape(32, 8, size // 8, 8, size // 8).mean(axis=(2, 4)).reshape(32, 64)
        small = small - small.mean(axis=1, keepdims=True)
        return small / np.linalg.norm(small, axis=1, keepdims=True)

    likeness = thumbnails(24) @ thumbnails(48).T
    assert (likeness.argmax(axis=1) == np.arange(32)).mean() > 0.85
    assert np.diag(likeness).mean() > 0.8


def test_glyphs_are_letters_and_grey():
    images = SyntheticImages("glyphs", classes=52, instances=1, size=16)
    assert images.label_names == list(LETTERS) and not set(LETTERS) & set("0123456789")
    for index in range(52):
        picture = images[index]["image"]
        assert (picture == picture[..., :1]).all()
    assert any(
        (p != p[..., :1]).any() for p in (SyntheticImages("glyphs-colour", 52, 1, 16)[i]["image"] for i in range(9))
    )


def test_names():
    images = SyntheticImages.from_name("synthetic:glyphs@10,20,24")
    assert (images.classes, images.instances, images.size) == (10, 20, 24)
    assert SyntheticImages.from_name("synthetic:glyphs").classes == 52
    assert images.name(11) == "glyphs/b/1"
    for name in ("synthetic:", "synthetic:glyphs@", "synthetic:glyphs@10", "synthetic:glyphs@a,b", "glyphs@1,2"):
        with pytest.raises(HFViTError, match="not understood"):
            SyntheticImages.from_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthetic:runes@5,5", "no synthetic family 'runes'; there are glyphs"),
        ("synthetic:glyphs@53,5", "2 to 52 classes, asked for 53"),
        ("synthetic:glyphs@1,5", "2 to 52 classes, asked for 1"),
        ("synthetic:glyphs@5,0", "at least 1 instance"),
        ("synthetic:glyphs@5,5,4", "16 to 1024 px a side, asked for 4"),
    ],
)
def test_sets_that_do_not_exist(name, message):
    with pytest.raises(HFViTError, match=message):
        open_dataset(name, split="train")


def test_index_outside_the_set():
    images = SyntheticImages("glyphs", classes=5, instances=2, size=16)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            images[index]


def test_splits_share_no_picture_and_the_door_draws_at_the_transform_s_size():
    train = open_dataset("synthetic:glyphs@6,20", split="train").with_transform(EvalTransform(20))
    test = open_dataset("synthetic:glyphs@6,20", split="test").with_transform(EvalTransform(20))
    validation = open_dataset("synthetic:glyphs@6,20", split="validation").with_transform(EvalTransform(20))
    assert (len(train), len(test), len(validation)) == (120, 12, 12)
    assert train.label_names == test.label_names == list("abcdef")
    seen = [
        {part[i]["pixel_values"].numpy().tobytes() for i in range(len(part))} for part in (train, test, validation)
    ]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 144
    drawn = SyntheticImages("glyphs", classes=6, instances=20, size=20)
    np.testing.assert_array_equal(train[7]["pixel_values"].numpy().transpose(1, 2, 0), drawn[7]["image"])
    np.testing.assert_array_equal(train.labels, np.arange(120) % 6)
    fixed = open_dataset("synthetic:glyphs@6,20,16", split="train").with_transform(EvalTransform(20))
    assert fixed[0]["pixel_values"].shape == (3, 20, 20) and fixed.source.images.size == 16


def test_fractal_maps_contract_and_have_the_asked_sum():
    for number in range(50):
        rng = generator(1, number)
        count = 2 + number % 6
        factor = (5 + count + rng.random()) / 2
        values = sample_singular_values(count, factor, rng)
        assert (values[:, 0] >= values[:, 1] - 1e-12).all() and (values >= 0).all() and (values <= 1).all()
        assert (values[:, 0] + 2 * values[:, 1]).sum() == pytest.approx(factor)
        matrices, shifts = sample_system(rng)
        assert np.linalg.norm(matrices, 2, axis=(1, 2)).max() <= 1 + 1e-9 and np.abs(shifts).max() <= 1


def test_classes_of_a_formula_resemble_themselves_more_than_each_other():
    images = SyntheticImages("contours", classes=12, instances=8, size=32)
    ink = np.stack([255 - images[i]["image"][..., 0] for i in range(96)]).reshape(8, 12, -1).mean(axis=2)
    assert ink.mean(axis=0).std() > ink.std(axis=0).mean() / 2
