"""The data reader: same image for the same address, every kind of source, and one clear line for every mistake."""

import io
import os
import warnings

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_vit.errors import HFViTError
from hf_vit.image_io import readable_formats
from training.data import folders
from training.data.dataset import UnreadableImage, collate, open_dataset, take_fraction
from training.data.shards.streaming import open_stream
from training.data.strata import nested_subset
from training.data.subsets import carve_dev_split
from training.data.transforms import EvalTransform, TrainTransform


def noise_image(seed, size=(20, 16)):
    """A noise image of (width, height)."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """train/{cat,dog,owl} with 8 images each, test/ with 2."""
    root = tmp_path / "pets"
    for split, count in (("train", 8), ("test", 2)):
        for number, name in enumerate(("cat", "dog", "owl")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise_image(100 * number + i).save(root / split / name / f"{i}.png")
    return root


def write_parquet(path, columns, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def encoded(count, seed=0):
    return [{"bytes": png(noise_image(seed + i)), "path": None} for i in range(count)]


def open_table(path, tmp_path, **options):
    return open_dataset(str(path), **{"split": "train", "cache_dir": tmp_path / "cache", **options})


# Sources


def test_digits_are_the_real_ones_in_a_fixed_stratified_split():
    train, test = open_dataset("digits", split="train"), open_dataset("digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.label_names == [str(n) for n in range(10)]
    assert np.bincount(test.labels).min() >= 34
    names = {train.read(i)[2] for i in range(len(train))} | {test.read(i)[2] for i in range(len(test))}
    assert len(names) == 1797
    image, label, name = test.read(0)
    from sklearn.datasets import load_digits

    digits = load_digits()
    row = int(name.split("/")[1])
    assert label == digits.target[row]
    assert image.size == (8, 8) and image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[..., 0], np.rint(digits.images[row] * 255 / 16))


def test_image_folder_with_splits(folder):
    train = open_dataset(str(folder), split="train")
    test = open_dataset(str(folder), split="test", label_names=train.label_names)
    assert train.label_names == ["cat", "dog", "owl"]
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert len(test) == 6
    image, label, name = train.read(9)
    assert (label, name) == (1, "train/dog/1.png")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(noise_image(101)))


def test_image_folder_without_splits_is_all_train(folder):
    dataset = open_dataset(str(folder / "train"), split="train")
    assert len(dataset) == 24
    with pytest.raises(HFViTError, match=r"no split 'test'; available: train"):
        open_dataset(str(folder / "train"), split="test")


def test_folder_split_takes_its_classes_from_train(folder):
    """A test folder that lacks a class must not shift the numbers of the others."""
    for file in (folder / "test" / "cat").iterdir():
        file.unlink()
    (folder / "test" / "cat").rmdir()
    test = open_dataset(str(folder), split="test")
    assert test.label_names == ["cat", "dog", "owl"]
    assert test.labels.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("alias", ["validation", "val", "valid", "dev"])
def test_validation_folder_by_any_usual_name(folder, alias):
    (folder / "test").rename(folder / "val")
    assert len(open_dataset(str(folder), split=alias)) == 6


def test_parquet_file_and_folder(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    root = tmp_path / "set"
    write_parquet(
        root / "data" / "train-00000-of-00001.parquet", {"image": encoded(4), "label": [0, 1, 1, 0]}, features
    )
    write_parquet(root / "data" / "test-00000-of-00001.parquet", {"image": encoded(2, 9), "label": [1, 0]}, features)
    train, test = open_table(root, tmp_path), open_table(root, tmp_path, split="test")
    assert train.label_names == ["b", "a"] and train.labels.tolist() == [0, 1, 1, 0]
    assert test.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(np.asarray(test.read(1)[0]), np.asarray(noise_image(10)))
    file = open_table(root / "data" / "test-00000-of-00001.parquet", tmp_path, split="test")
    assert file.labels.tolist() == [1, 0]


def test_folders_of_one_name_and_replaced_files_are_never_confused(tmp_path):
    """`datasets.load_dataset(folder)` returns stale rows here when the folder's README has a `configs:` block."""
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    labels = {"one": [0, 1], "two": [1, 0, 1]}
    for place, values in labels.items():
        write_parquet(tmp_path / place / "pets" / "data" / "train-0.parquet",
                      {"image": encoded(len(values)), "label": values})  # fmt: skip
        (tmp_path / place / "pets" / "README.md").write_text(readme)
    for place, values in labels.items():
        assert open_table(tmp_path / place / "pets", tmp_path).labels.tolist() == values
    file = tmp_path / "one" / "pets" / "data" / "train-0.parquet"
    before = file.stat().st_mtime_ns
    write_parquet(file, {"image": encoded(4), "label": [1, 1, 0, 0]})
    os.utime(file, ns=(before, before))  # as a copy that keeps its times
    assert open_table(tmp_path / "one" / "pets", tmp_path).labels.tolist() == [1, 1, 0, 0]


def test_real_photographs(shared):
    flowers = shared / "data" / "oxford_flowers12"
    train = open_dataset(str(flowers), split="train[:98%]")
    assert len(train) == 706 and len(train.label_names) == 12 and train.label_names[0] == "bluebell"
    item = train.with_transform(TrainTransform(32), seed=0)[0, 5]
    assert item["pixel_values"].shape == (3, 32, 32) and item["pixel_values"].dtype == torch.uint8
    test = open_dataset(str(shared / "data" / "cifar10"), split="test", label_names=None)
    assert len(test) == 10_000 and test.label_names[:2] == ["airplane", "automobile"]


# Columns and labels


def test_string_labels_become_sorted_classes_in_every_split(tmp_path):
    root = tmp_path / "set"
    write_parquet(root / "train.parquet", {"img": encoded(3), "label": ["owl", "cat", "owl"]})
    write_parquet(root / "validation.parquet", {"img": encoded(1), "label": ["owl"]})
    assert open_table(root, tmp_path).label_names == ["cat", "owl"]
    assert open_table(root, tmp_path).labels.tolist() == [1, 0, 1]
    assert open_table(root, tmp_path, split="validation").labels.tolist() == [1]


def test_neighboring_numbers_as_one_class(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "angle": datasets.Value("int64"),
                                  "named": datasets.ClassLabel(num_classes=40)})  # fmt: skip
    numbers = list(range(40)) * 2
    columns = {"image": encoded(80), "angle": numbers, "named": numbers}
    path = write_parquet(tmp_path / "angles.parquet", columns, features)
    for column in ("angle", "named"):
        data = open_table(path, tmp_path, label_column=f"{column}//2.5")
        assert data.label_names == [str(number) for number in range(16)]
        assert data.labels.tolist() == [int(number / 2.5) for number in numbers]  # VTAB's floor(label / (40 / 16))
    with pytest.raises(HFViTError, match="no column 'angle//0'"):
        open_table(path, tmp_path, label_column="angle//0")


def test_slices_of_tables_that_come_class_by_class_keep_every_class(tmp_path):
    sorted_rows = write_parquet(tmp_path / "sorted.parquet", {"image": encoded(40), "label": [0] * 20 + [1] * 20})
    data = open_table(sorted_rows, tmp_path, split="train[:50%]")
    assert len(data) == 20 and set(data.labels) == {0, 1}
    mixed = write_parquet(tmp_path / "mixed.parquet", {"image": encoded(40), "label": [0, 1, 1, 0] * 10})
    assert open_table(mixed, tmp_path, split="train[:4]").rows.tolist() == [0, 1, 2, 3]


def test_what_datasets_refuses_is_one_line(tmp_path, monkeypatch):
    def no_scripts(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found sketch.py")

    monkeypatch.setattr("datasets.load_dataset_builder", no_scripts)
    with pytest.raises(HFViTError, match=r"'owner/sketch' cannot be read \(Dataset scripts are"):
        open_dataset("owner/sketch", split="test")


def test_two_columns_that_could_be_the_label(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", {"img": encoded(2), "fine_label": [0, 1], "coarse_label": [1, 0]})
    with pytest.raises(HFViTError, match=r"fine_label, coarse_label; choose with --label_column"):
        open_table(path, tmp_path)
    assert open_table(path, tmp_path, label_column="coarse_label").labels.tolist() == [1, 0]


def test_a_table_of_paths_is_found_by_the_names_that_csv_files_have(tmp_path):
    for number in range(2):
        noise_image(number).save(tmp_path / f"{number}.png")
    path = write_parquet(tmp_path / "t.parquet", {"path": ["0.png", "1.png"], "label": ["a", "b"]})
    assert open_table(path, tmp_path).read(1)[1] == 1


def test_a_column_of_splits_divides_a_parquet_file_too(tmp_path):
    """Rows that are called test must never be trained on because nobody named the column."""
    words = ["train", "test", "train", "test"]
    path = write_parquet(tmp_path / "t.parquet", {"img": encoded(4), "label": [0, 0, 1, 1], "split": words})
    notes: list[str] = []
    assert len(open_table(path, tmp_path, log=notes.append)) == 2
    assert open_table(path, tmp_path, split="test").labels.tolist() == [0, 1]
    assert notes == ["splits by the column 'split': train (2), test (2)"]
    path = write_parquet(tmp_path / "u.parquet", {"img": encoded(2), "label": [0, 1], "split": ["left", "right"]})
    assert len(open_table(path, tmp_path)) == 2  # other words: a column like any other


ONE_CLASS = {"problem_type": "single_label_classification"}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"img": encoded(2), "label": [0, -1]}, {}, r"1 of 2 rows .* no label \(-1"),
        ({"img": encoded(2), "label": [0, None]}, {}, r"1 of 2 rows .* no label"),
        ({"img": encoded(2), "label": [0.5, 1.0]}, ONE_CLASS, r"holds fractions, which are no classes"),
        ({"img": encoded(2), "label": [["a"], ["b"]]}, ONE_CLASS, r"holds list, but each image needs one label"),
        ({"img": [encoded(1), encoded(1)], "label": ["a", "b"]}, {}, r"column 'img' .* holds lists: expected"),
        ({"img": encoded(2), "label": ["a", None]}, {}, r"1 of 2 rows .* no label"),
        ({"img": encoded(2), "label": ["a", "a"]}, {}, r"only one class, a"),
        ({"img": encoded(2)}, {}, r"no column of labels among none at all"),
        ({"label": [0, 1], "x": [1, 2]}, {}, r"no column of images among label, x"),
        ({"img": encoded(2), "label": [0, 1]}, {"image_column": "photo"}, r"no column 'photo'.* img, label"),
        ({"img": encoded(2), "label": [0, 1]}, {"label_column": "kind"}, r"no column 'kind'.* img, label"),
        ({"img": encoded(2), "image": encoded(2), "label": [0, 1]}, {}, r"choose one with --image_column"),
        ({"img": encoded(2), "label": ["cat", "emu"]}, {"label_names": ["cat", "dog"]}, r"does not know: emu"),
        ({"img": encoded(2), "label": [0, 2]}, {"label_names": ["cat", "dog"]}, r"label 2, but only 2 classes"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, options, message):
    path = write_parquet(tmp_path / "t.parquet", columns)
    with pytest.raises(HFViTError, match=message) as error:
        open_table(path, tmp_path, **options)
    assert "\n" not in str(error.value)


# Names that lead nowhere


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", r"no file or folder '/no/such/folder'; give a folder of train/CLASS"),
        ("./nothing.parquet", r"no file or folder"),
        ("someone/some-data", r"'someone/some-data' is neither a local path nor a Hub dataset that can be reached"),
        ("synthetic:clouds", r"no synthetic family 'clouds'; there are glyphs"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(HFViTError, match=message) as error:
        open_dataset(name, split="train")
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(HFViTError, match="holds no class folders"):
        open_dataset(str(tmp_path), split="train")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "dog").mkdir()
    noise_image(0).save(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(HFViTError, match=r"class folder 'dog' of .* holds no images"):
        open_dataset(str(tmp_path), split="train")
    (tmp_path / "train" / "dog").rmdir()
    with pytest.raises(HFViTError, match="only one class, cat"):
        open_dataset(str(tmp_path), split="train")


# Splits, slices, fractions


def test_slices_partition_a_split():
    whole = open_dataset("digits", split="train")
    parts = [open_dataset("digits", split=f"train[{part}]") for part in (":33%", "33%:98%", "98%:")]
    assert np.concatenate([part.rows for part in parts]).tolist() == list(range(len(whole)))
    assert open_dataset("digits", split="train[10:15]").rows.tolist() == [10, 11, 12, 13, 14]
    assert len(open_dataset("digits", split="train[-7:]")) == 7
    both = open_dataset("digits", split="train[:800]+test[:200]")
    assert len(both) == 1000
    assert both.read(900)[2] == open_dataset("digits", split="test").read(100)[2]


def test_slices_of_folders_keep_every_class(folder):
    """Rows of a folder are sorted by class: the first half of them would have no owls."""
    head, tail = (open_dataset(str(folder), split=f"train[{part}]") for part in (":50%", "50%:"))
    assert set(head.labels) == set(tail.labels) == {0, 1, 2}
    assert sorted([*head.rows, *tail.rows]) == list(range(24))


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train[5]", ""])
def test_splits_that_are_not_understood(split):
    with pytest.raises(HFViTError, match="not understood"):
        open_dataset("digits", split=split)


def test_unknown_and_empty_splits():
    with pytest.raises(HFViTError, match=r"no split 'holdout'; available: train, test"):
        open_dataset("digits", split="holdout")
    with pytest.raises(HFViTError, match="holds none of the 1437"):
        open_dataset("digits", split="train[5:5]")


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    sizes=st.tuples(st.integers(0, 200), st.integers(0, 200)),
    seed=st.integers(0, 2**64 - 1),
)
def test_nested_subsets_are_stratified(labels, sizes, seed):
    labels = np.array(labels)
    small, large = sorted(min(size, len(labels)) for size in sizes)
    chosen, more = nested_subset(labels, seed, small), nested_subset(labels, seed, large)
    assert len(chosen) == small and (np.diff(chosen) > 0).all() and set(chosen) <= set(more)
    for label in np.unique(labels):
        share = small / len(labels) * (labels == label).sum()
        assert abs((labels[chosen] == label).sum() - share) <= 5  # at most one per class away from exact


def test_fractions_are_nested_and_per_class_counts_exact():
    whole = open_dataset("digits", split="train")
    one, ten = take_fraction(whole, 0.01), take_fraction(whole, 0.1)
    assert (len(one), len(ten)) == (14, 144)
    assert set(one.rows) < set(ten.rows) < set(whole.rows)
    assert set(one.labels) == set(range(10))
    assert len({one.fingerprint, ten.fingerprint, whole.fingerprint}) == 3
    assert np.bincount(whole.per_class(10).labels).tolist() == [10] * 10
    assert set(whole.per_class(5).rows) < set(whole.per_class(10).rows)
    with pytest.raises(HFViTError, match="fewer than 500 images of 0, 1"):
        whole.per_class(500)
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(HFViTError, match="fraction"):
            take_fraction(whole, fraction)
    with pytest.raises(HFViTError, match="selects no images of"):
        take_fraction(whole, 1e-6)


def test_dev_split_is_disjoint_stratified_and_fixed():
    whole = open_dataset("digits", split="train")
    train, dev = carve_dev_split(whole, 0.1, seed=3)
    assert sorted([*train.rows, *dev.rows]) == list(range(1437)) and len(dev) == 144
    assert np.bincount(dev.labels).min() >= 13
    np.testing.assert_array_equal(dev.rows, carve_dev_split(whole, 0.1, seed=3)[1].rows)
    assert dev.fingerprint != carve_dev_split(whole, 0.1, seed=4)[1].fingerprint
    shared = set(carve_dev_split(whole, 0.1)[1].rows) & set(take_fraction(whole, 0.1).rows)
    assert len(shared) < 40  # 14 by chance: what is kept to choose on says nothing of what a fraction keeps


# Items


def test_an_item_depends_on_seed_epoch_and_index_alone(folder):
    dataset = open_dataset(str(folder), split="train").with_transform(TrainTransform(16), seed=7)
    first = dataset[2, 5]["pixel_values"]
    for index in (9, 5, 0):
        dataset[2, index]
    assert torch.equal(dataset[2, 5]["pixel_values"], first)
    assert not torch.equal(dataset[3, 5]["pixel_values"], first)
    assert not torch.equal(dataset.with_transform(TrainTransform(16), seed=8)[2, 5]["pixel_values"], first)
    assert torch.equal(dataset[5]["pixel_values"], dataset[0, 5]["pixel_values"])


def test_workers_change_nothing(folder):
    dataset = open_dataset(str(folder), split="train").with_transform(TrainTransform(16), seed=7)
    keys = [[(1, i) for i in range(start, start + 6)] for start in (12, 0, 6, 18)]
    batches = [
        list(torch.utils.data.DataLoader(dataset, batch_sampler=keys, collate_fn=collate, num_workers=workers))
        for workers in (0, 2)
    ]
    for alone, together in zip(*batches):
        assert torch.equal(alone["pixel_values"], together["pixel_values"])
        assert torch.equal(alone["labels"], together["labels"])
        assert torch.equal(alone["index"], together["index"])


def test_a_plain_function_is_a_transform_too(folder):
    dataset = open_dataset(str(folder), split="train")
    dataset = dataset.with_transform(lambda image, rng: np.full((4, 5, 3), int(rng.integers(256)), np.uint8), seed=1)
    assert dataset[0]["pixel_values"].shape == (3, 4, 5)
    assert set(dataset[0]) == {"pixel_values", "labels", "index", "name"}


def test_index_outside_the_data(folder):
    dataset = open_dataset(str(folder), split="train")
    for index in (-1, 24):
        with pytest.raises(IndexError):
            dataset[index]


def collate_and_look(items):
    batch = collate(items)
    return batch | {"shared": batch["pixel_values"].is_shared()}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_collates_into_shared_memory(folder, workers):
    """A copy of its own would grow to many batches in a worker, as its allocator keeps what it has once had."""
    dataset = open_dataset(str(folder), split="train").with_transform(TrainTransform(8), seed=0)
    words = {"batch_size": 4, "num_workers": workers, "collate_fn": collate_and_look}
    batch = next(iter(torch.utils.data.DataLoader(dataset, **words)))
    assert batch["shared"] == bool(workers)
    assert torch.equal(batch["pixel_values"], collate([dataset[i] for i in range(4)])["pixel_values"])


@pytest.mark.parametrize("open_images", [open_dataset, open_stream])
def test_plugins_of_pillow_are_loaded_before_workers_start(open_images):
    """Each worker would load them for itself, 5 MB."""
    images = open_images("synthetic:glyphs@2,4,16", split="train")
    readable_formats.cache_clear()
    images.with_transform(TrainTransform(8), seed=0)
    assert readable_formats.cache_info().currsize == 1


def test_collate_refuses_mixed_sizes(folder):
    dataset = open_dataset(str(folder), split="train")
    items = [dataset[0], dataset.with_transform(EvalTransform(8))[1]]
    with pytest.raises(HFViTError, match="different sizes"):
        collate(items)


# Unreadable images


def test_unreadable_images_are_skipped_by_name_or_stop(folder):
    (folder / "train" / "cat" / "0.png").write_bytes(b"this is no image")
    (folder / "train" / "cat" / "1.png").write_bytes(png(noise_image(1))[:60])
    (folder / "train" / "cat" / "2.png").write_bytes(b"")
    skipping = open_dataset(str(folder), split="train").with_transform(EvalTransform(8))
    batch = collate([skipping[i] for i in range(5)])
    assert batch["index"].tolist() == [3, 4] and batch["pixel_values"].shape == (2, 3, 8, 8)
    assert [entry.split(":")[0] for entry in batch["unreadable"]] == [f"train/cat/{i}.png" for i in range(3)]
    nothing = collate([skipping[0]])
    assert len(nothing["labels"]) == 0 and len(nothing["unreadable"]) == 1
    stopping = open_dataset(str(folder), split="train", on_unreadable="stop").with_transform(EvalTransform(8))
    for index in range(3):
        with pytest.raises(UnreadableImage, match=rf"^train/cat/{index}\.png: "):
            stopping[index]
    with pytest.raises(HFViTError, match="on_unreadable"):
        open_dataset(str(folder), split="train", on_unreadable="ignore")


def test_decompression_bombs_are_refused_by_name(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image.new("1", (20_000, 20_000)).save(folder / "train" / "cat" / "0.png")
        Image.new("1", (13_000, 13_000)).save(folder / "train" / "cat" / "1.png")
        dataset = open_dataset(str(folder), split="train", on_unreadable="stop")
        with pytest.raises(UnreadableImage, match=r"train/cat/0\.png: refused"):
            dataset.read(0)
        dataset.source.open(1).close()  # large, but within the limit: no warning either


def test_rows_without_an_image(tmp_path):
    rows = [*encoded(2), None, {"bytes": b"", "path": None}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    path = write_parquet(tmp_path / "t.parquet", {"image": rows, "label": [0, 1, 0, 1]}, features)
    dataset = open_table(path, tmp_path).with_transform(EvalTransform(8))
    batch = collate([dataset[i] for i in range(4)])
    assert batch["index"].tolist() == [0, 1]
    assert batch["unreadable"][0] == "t.parquet:train[2]: the row holds no image"
    assert batch["unreadable"][1].startswith("t.parquet:train[3]: ")


def test_fingerprint_sees_what_changes(folder):
    before = open_dataset(str(folder), split="train").fingerprint
    assert before == open_dataset(str(folder), split="train").fingerprint
    noise_image(1, size=(21, 16)).save(folder / "train" / "cat" / "0.png")
    changed = open_dataset(str(folder), split="train").fingerprint
    (folder / "train" / "cat" / "1.png").rename(folder / "train" / "dog" / "x.png")
    assert len({before, changed, open_dataset(str(folder), split="train").fingerprint}) == 3


def test_fingerprint_of_a_folder_sees_another_image_of_as_many_bytes(folder, monkeypatch):
    marks = set()
    for color in ("red", "blue"):
        Image.new("RGB", (5, 5), color).save(folder / "train" / "cat" / "0.bmp")
        marks.add(open_dataset(str(folder), split="train").fingerprint)
    monkeypatch.setattr(folders, "READ_WHOLE", 10)
    assert len(marks) == 2 and open_dataset(str(folder), split="train").fingerprint not in marks


def test_fingerprint_of_a_table_sees_every_row(tmp_path):
    """Also the rows between those whose bytes are looked at."""
    rows, marks = [encoded(1)[0]] * 200, set()
    for number in (None, 1, 100):
        changed = [
            {"bytes": png(noise_image(2, (9, 9))), "path": None} if row == number else rows[row] for row in range(200)
        ]
        path = write_parquet(tmp_path / "t.parquet", {"image": changed, "label": [0, 1] * 100})
        marks.add(open_table(path, tmp_path).fingerprint)
    assert len(marks) == 3
