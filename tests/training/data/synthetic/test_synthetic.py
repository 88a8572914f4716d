"""Generated images: the same bytes at the same address, different ones everywhere else, and never a blank one."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vit.errors import HFViTError
from training.data.dataset import open_dataset
from training.data.shards.streaming import open_stream
from training.data.sources import synthetic_reader
from training.data.synthetic import FAMILIES, SyntheticImages, draw_image, find_family, fractals, lines
from training.data.synthetic.contours import draw_atom
from training.data.synthetic.families import GLYPHS, draw_letter
from training.data.synthetic.fractals import sample_singular_values, sample_system
from training.data.synthetic.glyphs import LETTERS, bend, draw_glyph
from training.data.synthetic.images import warn_of_old_spelling
from training.data.transforms import EvalTransform
from training.rng import IMAGE, generator


GOLDEN = [
    ("glyphs", 24, "2ce83acf212965a6"),
    ("glyphs", 33, "530f3ecb8b64a4a1"),
    ("glyphs-color", 24, "6d1aaba4a59ba6a1"),
    ("glyphs-color", 33, "28d943cfc07d5020"),
    ("atoms", 32, "3b648787d9a93760"),
    ("atoms", 224, "a04a974d4291398f"),
    ("contours", 32, "c921b90a5496a133"),
    ("contours", 224, "6757277a448cfdfb"),
    ("fractals", 32, "40e8a5f0a4940d0c"),
    ("fractals", 96, "5e1c704b876475eb"),
    ("fractals-clouds", 32, "dd6466173522112c"),
]
NAMES = [name + suffix for name in FAMILIES for suffix in ("", "-color", "-clouds")]


@pytest.mark.parametrize("family", NAMES)
def test_images_are_a_function_of_their_address(family):
    images = SyntheticImages(family, classes=5, instances=4, size=24, seed=3)
    again = SyntheticImages(family, classes=5, instances=4, size=24, seed=3)
    assert len(images) == 20
    drawn = [images[i]["image"] for i in range(20)]
    for index in (7, 0, 19, 7):
        item = again[index]
        np.testing.assert_array_equal(item["image"], drawn[index])
        assert item["label"] == index % 5
    assert len({image.tobytes() for image in drawn}) == 20
    other = SyntheticImages(family, classes=5, instances=4, size=24, seed=4)
    assert all(not np.array_equal(other[i]["image"], drawn[i]) for i in range(20))


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
def test_no_image_is_blank(family, size):
    images = SyntheticImages(family, classes=min(52, find_family(family).classes), instances=4, size=size)
    for index in range(0, len(images), 3):
        image = images[index]["image"]
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert image.std() > 4


def test_blank_attempts_are_drawn_again():
    """Some images' centers lie so far out that their first attempt is empty."""
    blank = 0
    for label in range(200):
        first = draw_atom(0, label, 0, 32, 0)
        image = draw_image("atoms", label, 0, 32)[:, :, 0]
        if first.mean() > 2.55 and first.max() > 127:
            np.testing.assert_array_equal(image, first)
        else:
            blank += 1
            assert image.mean() > 2.55 and image.max() > 127
    assert blank
    faint = draw_glyph(0, 35, 16, generator(IMAGE, 0, GLYPHS, 35, 275))
    assert faint.max() < 0.5 < draw_letter(0, 35, 275, 16)[0].max()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 10**6 - 1),
    st.integers(0, 2**46),
)
def test_any_address_has_an_image(family, seed, label, instance):
    image = draw_image(family, label % find_family(family).classes, instance, 32, seed)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and image.std() > 4


@pytest.mark.parametrize("family", ["glyphs", "contours", "atoms", "fractals"])
def test_another_size_shows_the_same_image(family):
    """As far as pixels that small can tell: the correlation of thumbnails is high with itself, low with others."""

    def thumbnails(size):
        images = SyntheticImages(family, classes=32, instances=1, size=size)
        gray = np.stack([images[i]["image"].mean(axis=2) for i in range(32)])
        small = gray.reshape(32, 8, size // 8, 8, size // 8).mean(axis=(2, 4)).reshape(32, 64)
        small = small - small.mean(axis=1, keepdims=True)
        return small / np.linalg.norm(small, axis=1, keepdims=True)

    likeness = thumbnails(24) @ thumbnails(48).T
    assert (likeness.argmax(axis=1) == np.arange(32)).mean() > 0.85
    assert np.diag(likeness).mean() > 0.8


def test_glyphs_are_letters_and_gray():
    images = SyntheticImages("glyphs", classes=52, instances=1, size=16)
    assert images.label_names == list(LETTERS) and not set(LETTERS) & set("0123456789")
    for index in range(52):
        image = images[index]["image"]
        assert (image == image[..., :1]).all()
    assert any(
        (p != p[..., :1]).any() for p in (SyntheticImages("glyphs-color", 52, 1, 16)[i]["image"] for i in range(9))
    )


def test_names():
    images = SyntheticImages.from_name("synthetic:glyphs@10,20,24")
    assert (images.classes, images.instances, images.size) == (10, 20, 24)
    assert SyntheticImages.from_name("synthetic:glyphs").classes == 52
    assert images.name(11) == "glyphs/b/1"
    images = SyntheticImages.from_name("synthetic:atoms+glyphs-color@60,20,zipf=1.5,objects=3,label_noise=0.1")
    assert (images.family, images.classes, images.size) == ("atoms+glyphs-color", 60, 32)
    assert (images.zipf, images.objects, images.label_noise) == (1.5, 3, 0.1)
    assert SyntheticImages.from_name("synthetic:atoms@zipf=1").classes == 1000
    for name in (
        "synthetic:", "synthetic:glyphs@", "synthetic:glyphs@10", "synthetic:glyphs@a,b", "glyphs@1,2",
        "synthetic:glyphs@1,2,3,4", "synthetic:glyphs@zipf=1,5,5", "synthetic:glyphs@5,5,zipf=1,zipf=2",
    ):  # fmt: skip
        with pytest.raises(HFViTError, match="not understood; write synthetic:FAMILY"):
            SyntheticImages.from_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthetic:runes@5,5", "no synthetic family 'runes'; there are glyphs"),
        ("synthetic:fractal@5,5", "no synthetic family 'fractal'.*did you mean fractals?"),
        ("synthetic:glyphs-colors@5,5", "no synthetic family 'glyphs-colors'.*did you mean glyphs-color?"),
        ("synthetic:glyphs@53,5", "2 to 52 classes, asked for 53"),
        ("synthetic:glyphs+glyphs-color@105,5", "2 to 104 classes, asked for 105"),
        ("synthetic:glyphs+glyphs@5,5", "names a family twice"),
        ("synthetic:glyphs@1,5", "2 to 52 classes, asked for 1"),
        ("synthetic:glyphs@5,0", "at least 1 instance"),
        ("synthetic:glyphs@5,5,15", "16 to 1024 px a side, asked for 15"),
        ("synthetic:atoms@5,5,1025", "16 to 1024 px a side, asked for 1025"),
        (
            "synthetic:atoms@5,5,zip=1",
            "unknown option 'zip'; there are objects, zipf, label_noise; did you mean zipf?",
        ),
        ("synthetic:atoms@5,5,zipf=x", "option zipf of .* is a number, got 'x'"),
        ("synthetic:atoms@5,5,objects=1.5", "option objects of .* is an integer, got '1.5'"),
        ("synthetic:atoms@5,5,zipf=-1", "zipf lies between 0"),
        ("synthetic:atoms@5,5,label_noise=1", "fraction from 0 to below 1"),
        ("synthetic:atoms@5,5,label_noise=nan", "fraction from 0 to below 1"),
        ("synthetic:atoms@5,5,objects=0", "shows 1 to 100 objects, asked for 0"),
    ],
)
def test_sets_that_do_not_exist(name, message):
    with pytest.raises(HFViTError, match=message) as caught:
        open_dataset(name, split="train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ({"label": 52}, "glyphs has classes 0 to 51, asked for 52"),
        ({"label": -1}, "asked for -1"),
        ({"instance": -1}, "instances 0 to .*, asked for -1"),
        ({"instance": 1 << 50}, "instances 0 to"),
        ({"size": 8}, "16 to 1024 px"),
        ({"objects": 0}, "at least 1 object"),
    ],
)
def test_images_that_do_not_exist(address, message):
    with pytest.raises(HFViTError, match=message):
        draw_image("glyphs", **({"label": 0, "instance": 0, "size": 16} | address))


def test_numbers_of_a_set_are_integers():
    numpys = SyntheticImages("atoms", np.int64(5), np.int32(2), size=np.uint8(16), seed=np.int64(3))
    assert json.dumps(numpys.describe()) == json.dumps(SyntheticImages("atoms", 5, 2, 16, 3).describe())
    for name in ("classes", "instances", "size", "seed"):
        with pytest.raises(HFViTError, match=f"^{name} of a synthetic set is an integer, got 32.5$"):
            SyntheticImages(**{"family": "atoms", "classes": 5, "instances": 2, name: 32.5})


def digest_of(family, size, seed=0):
    """SHA-256 over some images of a set."""
    images = SyntheticImages(family, 52, 600, size, seed)
    state = hashlib.sha256()
    for index in range(0, len(images), 613):
        state.update(images[index]["image"].tobytes())
    return state.hexdigest()[:16]


@pytest.mark.parametrize(("family", "size", "expected"), GOLDEN)
def test_bytes_never_change(family, size, expected):
    """Recipes and cards rest on these images; a family whose bytes change needs another version."""
    assert digest_of(family, size) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("glyphs-clouds", "331280bf6124575b"),
        ("atoms-color", "ecb311d81937c186"),
        ("contours-color", "3f2da3619c1484e0"),
        ("fractals-color", "1bb15a205ee71214"),
    ],
)
def test_bytes_of_another_seed_never_change(family, expected):
    """Class, image and shading each have the seed in their address."""
    assert digest_of(family, 32, seed=-5) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fractals@40,9,224", "ff241ee6fb838cea"),
        ("glyphs@40,9,224", "85b0b56edf0988e7"),
        ("atoms-color@9,9,224", "a1ff86a29f2a440f"),
        ("contours-clouds@9,9,224", "e40baf961d87549b"),
        (
            "fractals-color+glyphs-clouds+atoms@30,9,100,zipf=1,objects=3,label_noise=0.2",
            "ba4f1b94a1a352e1",
        ),
        ("atoms+contours@9,2,512", "e068fa049fffad43"),
    ],
)
def test_bytes_of_large_images_and_options_never_change(name, expected):
    """Sizes at which images are drawn in several blocks."""
    images = SyntheticImages.from_name(f"synthetic:{name}", seed=-5)
    state = hashlib.sha256()
    for index in range(0, len(images), len(images) // 6):
        state.update(images[index]["image"].tobytes())
    assert state.hexdigest()[:16] == expected


def test_blocks_change_no_byte(monkeypatch):
    whole = {name: draw_image(name, 7, 3, 64) for name in ("atoms", "contours", "fractals")}
    monkeypatch.setattr(lines, "LINES_AT_ONCE", 700)
    monkeypatch.setattr(lines, "POINTS_AT_ONCE", 100)
    monkeypatch.setattr(fractals, "STEPS_AT_ONCE", 1)
    for name, image in whole.items():
        np.testing.assert_array_equal(draw_image(name, 7, 3, 64), image)


def test_sine_of_arrays():
    angles = np.linspace(-100, 100, 20_001)
    np.testing.assert_allclose(bend(angles, 1.0, 1.0, 0.0), np.sin(angles), rtol=0, atol=4e-16)
    np.testing.assert_allclose(bend(angles, -0.3, 2.0, 1.0), -0.3 * np.sin(2 * angles + 1), rtol=0, atol=4e-16)


def test_the_old_spelling_of_color_says_the_new_one(caplog):
    warn_of_old_spelling.cache_clear()
    images = SyntheticImages.from_name("synthetic:atoms-colour+glyphs-colour")
    assert images == SyntheticImages.from_name("synthetic:atoms-color+glyphs-color")
    assert len(caplog.messages) == 1 and "-color" in caplog.text and "\n" not in caplog.messages[0]
    for spelling in ("colour", "color"):  # runs and exports of version 0.1 go on
        source = synthetic_reader(f"synthetic:atoms-{spelling}@9,9").load("train")
        assert source.fingerprint == "b13be64dc1b1f5ecdb6f4d90214e60b8"


def test_fingerprints_tell_versions_and_options_apart():
    def fingerprint(name):
        return synthetic_reader(name).load("train").fingerprint

    assert fingerprint("synthetic:glyphs@52,600") == "de6d2ce1dec7eb01c7612125c198f470"
    assert fingerprint("synthetic:glyphs@52,600,24") == "433349e52b2f391b52d3cd797ce18dba"
    names = ["glyphs@9,9", "glyphs@9,9,24", "glyphs-color@9,9", "atoms@9,9", "glyphs+atoms@9,9", "atoms+glyphs@9,9"]
    names += [f"glyphs@9,9,{option}" for option in ("zipf=1", "zipf=2", "label_noise=0.1", "objects=2")]
    assert len({fingerprint(f"synthetic:{name}") for name in names}) == len(names)
    assert SyntheticImages("atoms", 5, 5).describe()["versions"] == [2]


def test_mixtures_take_turns_and_are_nested():
    small = SyntheticImages("atoms+glyphs+glyphs-clouds", classes=10, instances=2, size=16)
    large = SyntheticImages("atoms+glyphs+glyphs-clouds", classes=200, instances=3, size=16)
    assert small.label_names[:4] == ["atoms/atom-0", "glyphs/a", "glyphs-clouds/a", "atoms/atom-1"]
    assert small.label_names == large.label_names[:10] and len(set(large.label_names)) == 200
    assert large.address(155) == ("glyphs-clouds", 51) and large.address(156) == ("atoms", 52)
    turned = SyntheticImages("glyphs+atoms+contours", classes=200, instances=1, size=16)
    assert [turned.address(label) for label in (155, 156, 157, 158)] == [
        ("contours", 51), ("atoms", 52), ("contours", 52), ("atoms", 53)
    ]  # fmt: skip
    for label in (0, 1, 2):
        family, number = small.address(label)
        alone = draw_image(family, number, 1, 16)
        np.testing.assert_array_equal(small[10 + label]["image"], alone)
        np.testing.assert_array_equal(large[200 + label]["image"], alone)


def test_long_tails():
    images = SyntheticImages("glyphs", classes=20, instances=30, size=16, zipf=1.0)
    counts = np.bincount(images.labels)
    np.testing.assert_array_equal(counts, [-(-30 // rank) for rank in range(1, 21)])
    assert len(images) == counts.sum() == len({images.name(index) for index in range(len(images))})
    assert [images[index]["label"] for index in range(len(images))] == images.labels.tolist()
    more = SyntheticImages("glyphs", classes=20, instances=45, size=16, zipf=1.0)
    assert {images.name(i) for i in range(len(images))} < {more.name(i) for i in range(len(more))}
    assert len(images.split("test")) == 60 and (np.bincount(images.split("test").labels) == 3).all()


def test_label_noise():
    clean = SyntheticImages("glyphs", classes=10, instances=400, size=16)
    noisy = SyntheticImages("glyphs", classes=10, instances=400, size=16, label_noise=0.25)
    wrong = noisy.labels != clean.labels
    many = SyntheticImages("glyphs", classes=10, instances=100_000, size=16, label_noise=0.25)
    assert (many.labels != np.arange(len(many)) % 10).mean() == pytest.approx(0.25, abs=0.001)
    matrix = np.zeros((10, 10))
    np.add.at(matrix, (clean.labels[wrong], noisy.labels[wrong]), 1)
    assert (np.diag(matrix) == 0).all() and matrix[~np.eye(10, dtype=bool)].min() > 2
    for index in (0, *np.flatnonzero(wrong)[[0, 50, -1]]):
        np.testing.assert_array_equal(noisy[index]["image"], clean[index]["image"])
        assert noisy[index]["label"] == noisy.labels[index]
    assert (noisy.split("test").labels == clean.split("test").labels).all()
    more = SyntheticImages("glyphs", classes=10, instances=800, size=16, label_noise=0.5)
    assert (more.labels[:4000][wrong] == noisy.labels[wrong]).all()  # what is wrong stays wrong


@pytest.mark.parametrize("family", ["glyphs", "atoms-color", "contours"])
def test_several_objects(family):
    one = SyntheticImages(family, classes=8, instances=3, size=64)
    several = SyntheticImages(family, classes=8, instances=3, size=64, objects=4)
    for index in range(24):
        image = several[index]["image"]
        assert image.shape == (64, 64, 3) and image.std() > 1
        assert not np.array_equal(image, one[index]["image"])
        np.testing.assert_array_equal(image, several[index]["image"])


def test_streams_show_the_same_images():
    view = EvalTransform(20)
    copy = open_dataset("synthetic:glyphs+atoms@6,100,label_noise=0.1", split="train").with_transform(view)
    stream = open_stream("synthetic:glyphs+atoms@6,100,label_noise=0.1", split="train").with_transform(view)
    assert (
        stream.label_names == copy.label_names and stream.fingerprint == copy.source.fingerprint and len(stream) == 600
    )
    seen = []
    for records in stream.order(batch_size=50, seed=0, position=0, stop=600):
        seen += [record.index for record in records]
        item, same = stream[records[0]], copy[records[0].index]
        assert item["labels"] == same["labels"] and item["name"] == same["name"]
        assert torch.equal(item["pixel_values"], same["pixel_values"])
    assert sorted(seen) == list(range(600))
    with pytest.raises(HFViTError, match="no split 'all' to stream; available: train, validation, test"):
        open_stream("synthetic:glyphs@6,100", split="all")


def test_index_outside_the_set():
    images = SyntheticImages("glyphs", classes=5, instances=2, size=16)
    for index in (-1, 10):
        with pytest.raises(IndexError, match=f"images 0 to 9 here, asked for {index}") as caught:
            images[index]
        assert isinstance(caught.value, HFViTError)
    assert len(list(images)) == 10


def test_splits_share_no_image_and_the_door_draws_at_the_transform_s_size():
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
