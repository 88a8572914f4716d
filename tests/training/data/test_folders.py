"""Folders as people have them: which are splits, which are classes, what is left out and said.

python -m pytest tests/training/data/test_folders.py
"""

import multiprocessing
import os
import time
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_vit import image_files
from hf_vit.errors import HFViTError
from hf_vit.image_files import walk
from training.config.arguments import DataArguments
from training.data import folders
from training.data.dataset import open_dataset
from training.data.folders import cached_walk
from training.data.splits import open_splits
from training.data.strata import nested_subset, rows_by_label
from training.rng import SUBSET, generator


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def tree(root, *paths):
    """Images at `path`, or as many as `path*n` says in a folder."""
    for path in paths:
        path, _, count = path.partition("*")
        names = [f"{path}/{number}.png" for number in range(int(count))] if count else [path]
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS + np.uint8(number)).save(root / name, "PNG")
    return root


def settle(root: Path) -> None:
    """Date the folders back: their index is trusted then."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, (1e9, 1e9))


def opened(root, **options):
    said = []
    found = open_splits(DataArguments(dataset=str(root), **options), 0, said.append)
    return found.train, found.evaluation, said


SHAPES = {
    "splits": (["train/a*4", "train/b*4", "val/a*2", "val/b*2"], (8, 4, ["a", "b"])),
    "words of datasets": (
        ["training_set/a*4", "training_set/b*4", "test_set/a*2", "test_set/b*2"],
        (8, 4, ["a", "b"]),
    ),
    "with a folder beside": (
        ["training_set/a*4", "training_set/b*4", "test_set/a*2", "test_set/b*2", "single_prediction*3"],
        (8, 4, ["a", "b"]),
    ),
    "images": (["train_images/a*4", "train_images/b*4", "val_images/a*2", "val_images/b*2"], (8, 4, ["a", "b"])),
    "wrapped splits": (
        ["seg_train/seg_train/a*4", "seg_train/seg_train/b*4", "seg_test/seg_test/a*2", "seg_test/seg_test/b*2"],
        (8, 4, ["a", "b"]),
    ),
    "wrapped": (["data/train/a*4", "data/train/b*4", "data/test/a*2", "data/test/b*2"], (8, 4, ["a", "b"])),
    "wrapped classes": (["x/y/a*9", "x/y/b*11"], (18, 2, ["a", "b"])),
    "evaluation": (["train/a*4", "train/b*4", "evaluation/a*2", "evaluation/b*2"], (8, 4, ["a", "b"])),
    "years": (["train2017/a*4", "train2017/b*4", "val2017/a*2", "val2017/b*2"], (8, 4, ["a", "b"])),
    "a class of trains": (["train*10", "car*10", "bus*10"], (27, 3, ["bus", "car", "train"])),
    "two folders of a split": (["Train/a*4", "train/b*4", "val/a*2", "validation/b*2"], (8, 4, ["a", "b"])),
    "numbers": ([f"{n}*10" for n in range(12)], (108, 12, [str(n) for n in range(12)])),
    "nested": (["a/x*5", "a/y*5", "b/z/z*10"], (18, 2, ["a", "b"])),
    "macosx": (["a*10", "b*10", "__MACOSX/a*3"], (18, 2, ["a", "b"])),
    "checkpoints of notebooks": (["a*10", "b*10", "a/.ipynb_checkpoints*3"], (18, 2, ["a", "b"])),
    "one class in val": (["train/a*4", "train/b*4", "val/a/indoor*2", "val/a/outdoor*2"], (8, 4, ["a", "b"])),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(tmp_path, shape):
    paths, expected = SHAPES[shape]
    train, evaluation, _ = opened(tree(tmp_path, *paths))
    assert (len(train), len(evaluation), train.label_names) == expected


def test_what_is_left_out_is_said(tmp_path):
    root = tree(tmp_path, "train/a*4", "train/b*4", "val/a*2", "val/b*2", "train/loose.png", "extra*3")
    (root / "images.tar").write_bytes(b"x")
    (root / "train/a/notes.txt").write_text("x")
    (root / "train/a/x.png").symlink_to("/nowhere.png")
    (root / "val/c").mkdir()
    train, evaluation, said = opened(root)
    assert (len(train), len(evaluation)) == (8, 4)
    text = "\n".join(said)
    assert (
        "3 images in extra, outside of the splits" in text and "1 images beside the class folders of 'train'" in text
    )
    assert "archives beside the class folders (images.tar)" in text
    assert "links to nothing (train/a/x.png)" in text and "not images (train/a/notes.txt)" in text


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train*4", "test*4"], r"folders named after splits \(test, train\) without class folders"),
        (["0.png", "1.png"], "holds no class folders"),
        (["train/a*4", "train/b*4", "val/c*2"], "has classes that the model does not know: c"),
        (["a*4"], "only one class, a"),
    ],
)
def test_what_cannot_be_meant(tmp_path, paths, message):
    with pytest.raises(HFViTError, match=message) as error:
        opened(tree(tmp_path, *paths))
    assert "\n" not in str(error.value)


def test_an_empty_class_is_an_error_in_train_alone(tmp_path):
    root = tree(tmp_path, "train/a*4", "train/b*4", "val/a*2")
    (root / "val/b").mkdir()
    assert len(opened(root)[1]) == 2
    (root / "train/c").mkdir()
    (root / "train/c/1.heic").write_bytes(b"\x00\x00\x00\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(HFViTError, match=r"class folder 'c' .* holds no images .*HEIC, which Pillow cannot read"):
        opened(root)


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    name = "café"
    tree(tmp_path, f"train/{unicodedata.normalize('NFD', name)}*4", "train/tea*4")
    tree(tmp_path, f"val/{unicodedata.normalize('NFC', name)}*2", "val/tea*2")
    train, evaluation, _ = opened(tmp_path)
    assert train.label_names == ["café", "tea"] and len(evaluation) == 4


def test_names_that_are_not_utf8(tmp_path):
    tree(tmp_path, "a*10", "b*10")
    os.rename(tmp_path / "b/0.png", os.fsencode(tmp_path) + b"/b/caf\xe9.png")
    data = open_dataset(str(tmp_path), split="train")
    names = [data.image_name(index) for index in range(len(data))]
    odd = names.index("b/caf\\xe9.png")
    assert data.read(odd)[0].size == (7, 5) and "".join(names).encode()


def test_links_back_are_read_once(tmp_path):
    tree(tmp_path, "a*5", "b*5")
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "b/up").symlink_to("..")
    data = open_dataset(str(tmp_path), split="train")
    assert np.bincount(data.labels).tolist() == [5, 5]


@pytest.mark.parametrize(
    "link, target", [("dog/other", "cat"), ("puma", "cat"), ("cat/again", "cat/b"), ("train/puma", "train/cat")]
)
def test_a_folder_that_is_two_classes_by_a_link_is_refused(link, target, tmp_path):
    inside = "train/" if link.startswith("train") else ""
    tree(tmp_path, f"{inside}cat/a*3", f"{inside}cat/b*3", f"{inside}dog*3")
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(HFViTError, match=r"cat.* and .* are the same folder, by a link"):
        open_dataset(str(tmp_path), split="train")


def test_an_evaluation_split_may_be_a_link_to_a_class_or_split_of_another(tmp_path):
    tree(tmp_path, "train/a*5", "train/b*5", "val/a*2")
    (tmp_path / "val/b").symlink_to(tmp_path / "train/b")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    for split, counts in (("validation", [2, 5]), ("test", [5, 5])):
        assert np.bincount(open_dataset(str(tmp_path), split=split).labels).tolist() == counts


def test_the_index_of_a_large_tree_is_kept_until_a_folder_changes(tmp_path, monkeypatch):
    root, cache = tree(tmp_path / "data", "a/x*5", "a/y*5", "b*5"), tmp_path / "cache"
    settle(root)
    alone = open_dataset(str(root), split="train", cache_dir=cache)
    assert not cache.exists()  # small
    monkeypatch.setattr(folders, "LARGE", 3)
    first = open_dataset(str(root), split="train", cache_dir=cache)
    names = [first.image_name(index) for index in range(15)]
    assert names == [alone.image_name(index) for index in range(15)] and first.label_names == ["a", "b"]
    monkeypatch.setattr(folders, "walk", lambda *args, **options: pytest.fail("walked again"))
    again = open_dataset(str(root), split="train", cache_dir=cache)
    assert again.fingerprint == first.fingerprint != alone.fingerprint
    assert [again.image_name(index) for index in range(15)] == names
    monkeypatch.undo()
    monkeypatch.setattr(folders, "LARGE", 3)
    tree(root, "a/y/new.png")
    assert len(open_dataset(str(root), split="train", cache_dir=cache)) == 16
    kept = next(cache.glob("folders-*.npz"))
    good, other = kept.read_bytes(), tree(tmp_path / "other", "a*9", "b*9")
    open_dataset(str(other), split="train", cache_dir=tmp_path / "cache of another")
    of_another = next((tmp_path / "cache of another").glob("folders-*.npz")).read_bytes()
    for content in (good[:100], good[:-30], b"", b"no index", of_another):
        log = []
        kept.write_bytes(content)
        assert len(open_dataset(str(root), split="train", cache_dir=cache, log=log.append)) == 16
        assert len(log) == 1 and f"the index '{kept}' is damaged (" in log[0] and "walked through again" in log[0]
    (tmp_path / "file").write_text("x")
    assert len(cached_walk(root, tmp_path / "file").images()) == 16  # a cache that cannot be written


def test_a_fresh_folder_is_not_trusted(tmp_path, monkeypatch):
    """It may change again within the same tick of the clock."""
    monkeypatch.setattr(folders, "LARGE", 3)
    root = tree(tmp_path / "data", "a*5", "b*5")
    cached_walk(root, tmp_path / "cache")
    kept = next((tmp_path / "cache").glob("folders-*.npz"))
    assert folders.read_index(kept, os.fsencode(root)) is None


@pytest.mark.parametrize("labels", [np.random.default_rng(0).integers(0, 7, 200), np.arange(200) // 20])
def test_nested_subsets_are_what_they_were(labels):
    """A sort of all rows was replaced by a selection; the same images for the same seed."""
    place = np.empty(200)
    tie = generator(SUBSET, 3, 0).random(200)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        generator(SUBSET, 3, 1, int(label)).shuffle(rows)
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    order = np.lexsort((tie, place))
    for count in range(201):
        assert np.array_equal(nested_subset(labels, 3, count), np.sort(order[:count]))


def test_rows_of_many_classes():
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(70_000), 2))  # more than 16 bits count
    found = {label: rows.tolist() for label, rows in rows_by_label(labels[:500])}
    assert found == {int(label): np.flatnonzero(labels[:500] == label).tolist() for label in labels[:500]}
    assert sum(1 for _ in rows_by_label(labels)) == 70_000
    assert list(rows_by_label(labels[:0])) == []


def test_a_second_process_waits_for_the_index(tmp_path, monkeypatch):
    """What one has written while another waited for the lock is read; the walk of the other goes no further."""
    monkeypatch.setattr(folders, "LARGE", 3)
    root = tree(tmp_path / "data", "a*5", "b*5", "c*5")
    settle(root)
    kept = folders.index_folder(tmp_path) / f"folders-{folders.digest(os.path.realpath(os.fsencode(root)))}.npz"

    class WrittenMeanwhile:
        def __init__(self, path):
            assert path == f"{kept}.lock"

        def __enter__(self):
            folders.write_index(kept, walk(root), time.time_ns())
            self.written = kept.stat().st_mtime_ns

        def __exit__(self, *error):
            assert kept.stat().st_mtime_ns == self.written

    monkeypatch.setattr("filelock.FileLock", WrittenMeanwhile)
    scanned = []
    scan = image_files.scan
    monkeypatch.setattr(image_files, "scan", lambda *args: scanned.append(args[1]) or scan(*args))
    assert len(cached_walk(root, tmp_path).images()) == 15
    assert len(scanned) < 4 + 4  # all folders by the one that wrote, fewer by the one that waited


def scans_and_maps(root: str, cache: str, barrier) -> tuple[int, bool, str]:
    """Open a folder: how many folders were walked through, whether its file of names is mapped, the fingerprint."""
    scanned = []
    scan = image_files.scan
    image_files.scan = lambda *args: scanned.append(args[1]) or scan(*args)
    barrier.wait()
    dataset = open_dataset(root, split="train", cache_dir=cache)
    maps = Path("/proc/self/maps").read_text()
    return len(scanned), f"{cache}/files-" in maps, dataset.fingerprint


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what is mapped")
@pytest.mark.parametrize("count", [2, 4])
def test_of_several_processes_one_walks_and_all_map_the_same_file(tmp_path, monkeypatch, count):
    monkeypatch.setattr(folders, "LARGE", 3)
    root = tree(tmp_path / "data", *(f"{letter}*5" for letter in "abcdefgh"))
    settle(root)
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, ProcessPoolExecutor(count, context) as pool:
        words = (str(root), str(tmp_path / "cache"), manager.Barrier(count))
        found = [future.result() for future in [pool.submit(scans_and_maps, *words) for _ in range(count)]]
    scans = sorted(number for number, _, _ in found)
    assert scans[-1] == 1 + 8 and scans[-2] <= 1 + 1  # the others only as far as shows that the folder is large
    assert all(is_mapped for _, is_mapped, _ in found) and len({mark for _, _, mark in found}) == 1


def test_the_file_that_processes_share_is_not_trusted(tmp_path):
    numbers, names = np.arange(5), np.frombuffer(b"abcde", np.uint8)
    path = tmp_path / "cache" / "files.bin"

    def read() -> list[list[int]]:
        return [part.tolist() for part in folders.mapped([numbers, names], path)]

    wanted = [[0, 1, 2, 3, 4], [97, 98, 99, 100, 101]]
    assert read() == wanted
    good = path.read_bytes()
    for content in (good[:10], good[:-1] + b"x", b""):  # half a file, one of other images
        path.write_bytes(content)
        assert read() == wanted and path.read_bytes() == good
    assert not folders.mapped([numbers, names], path)[0].flags.writeable
    assert folders.mapped([numbers], tmp_path / "cache" / "files.bin" / "below a file")[0] is numbers
