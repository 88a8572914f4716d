"""Shared images are found also when re-encoded or resized, and only they."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from training.data import deduplication
from training.data.dataset import open_dataset
from training.data.deduplication import deduplicate, find_duplicates


def blobs(seed, size=48):
    """A smooth random image."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def reencoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return Image.open(buffer)


@pytest.fixture
def sets(tmp_path):
    """A train folder of 10 blobs per class, and a test folder that shares five images with it in other shapes."""
    for number, name in enumerate(("a", "b")):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
        for i in range(10):
            blobs(100 * number + i).save(tmp_path / "train" / name / f"{i}.png")
            blobs(1000 + 100 * number + i).save(tmp_path / "test" / name / f"{i}.png")
    shared = {"copy": blobs(3), "jpeg": reencoded(blobs(4)), "small": blobs(105).resize((32, 32)),
              "soft": blobs(106).filter(ImageFilter.GaussianBlur(1)), "wide": blobs(7).resize((96, 48))}  # fmt: skip
    for name, image in shared.items():
        image.save(tmp_path / "test" / "a" / f"{name}.png")
    for split in ("train", "test"):  # plain images: equal hashes, other colors
        Image.new("RGB", (32, 32), "navy" if split == "train" else "olive").save(tmp_path / split / "b" / "plain.png")
    return open_dataset(str(tmp_path), split="train"), open_dataset(str(tmp_path), split="test")


def test_shared_images_are_found_and_left_out(sets):
    train, test = sets
    remaining, found = deduplicate(train, test)
    pairs = {(duplicate.name, duplicate.other_name) for duplicate in found}
    assert pairs == {
        ("train/a/3.png", "test/a/copy.png"), ("train/a/4.png", "test/a/jpeg.png"),
        ("train/b/5.png", "test/a/small.png"), ("train/b/6.png", "test/a/soft.png"),
        ("train/a/7.png", "test/a/wide.png"),
    }  # fmt: skip
    copy = next(duplicate for duplicate in found if duplicate.other_name == "test/a/copy.png")
    assert (copy.bits_apart, copy.colors_apart) == (0, 0.0)
    assert len(remaining) == len(train) - 5
    names = {remaining.image_name(index) for index in range(len(remaining))}
    assert not names & {name for name, _ in pairs}
    assert remaining.fingerprint != train.fingerprint


def test_nothing_shared_leaves_the_data_alone(sets):
    train, test = sets
    other = test.select([index for index in range(len(test)) if test.image_name(index)[7:8].isdigit()])
    remaining, found = deduplicate(train, other)
    assert remaining is train and found == []


def test_unreadable_images_match_nothing(sets, tmp_path):
    train, test = sets
    (tmp_path / "train" / "a" / "3.png").write_bytes(b"broken")
    assert len(find_duplicates(train, test)) == 4
    broken = train.select([3])
    assert find_duplicates(broken, test) == find_duplicates(test, broken) == []
    assert [find_duplicates(broken, test, cache_dir=tmp_path / "cache") for _ in range(2)] == [[], []]


def test_thumbnails_are_computed_once_and_a_damaged_cache_again(sets, tmp_path, monkeypatch):
    train, test = sets
    expected = find_duplicates(train, test)
    cache = tmp_path / "cache"
    assert find_duplicates(train, test, cache_dir=cache) == expected
    monkeypatch.setattr(deduplication, "compute_thumbnails", lambda *args: pytest.fail("computed a second time"))
    with monkeypatch.context() as patched:
        patched.setattr(deduplication, "match", lambda *args: pytest.fail("compared a second time"))
        assert find_duplicates(train, test, cache_dir=cache) == expected
    assert len(find_duplicates(train, test, cache_dir=cache, bits_apart=0)) < len(expected)
    assert find_duplicates(test, train, cache_dir=cache)  # of either side
    monkeypatch.undo()
    pairs, kept = sorted(cache.glob("duplicates-*.npy")), sorted(cache.glob("thumbnails-*.npy"))
    for file in pairs:
        file.write_bytes(file.read_bytes()[:-5])
    kept[0].write_bytes(kept[0].read_bytes()[:200])
    kept[1].write_bytes(b"")
    assert find_duplicates(train, test, cache_dir=cache) == expected
    assert len(pairs) == 3 and len(kept) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(sets, tmp_path):
    (tmp_path / "file").write_text("")
    assert find_duplicates(*sets, cache_dir=tmp_path / "file" / "below") == find_duplicates(*sets)


def test_blocks_workers_and_precision_do_not_change_what_is_found(sets, monkeypatch):
    expected = find_duplicates(*sets)
    monkeypatch.setattr(deduplication, "BLOCK_ELEMENTS", 50)
    assert find_duplicates(*sets, num_workers=1) == expected
    for native in (False, True):  # float32, bfloat16
        monkeypatch.setattr(deduplication, "native_bfloat16", lambda native=native: native)
        assert find_duplicates(*sets) == expected


def test_cifar10_shares_no_copies(shared):
    train = open_dataset(str(shared / "data" / "cifar10"), split="train[:2000]")
    test = open_dataset(str(shared / "data" / "cifar10"), split="test[:1000]")
    assert find_duplicates(train, test) == []
    assert len(find_duplicates(test, test.select(range(50)))) == 50
