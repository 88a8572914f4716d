"""Which images train and which evaluate.

pytest tests/training/data/test_splits.py
"""

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_vit import HFViTConfig
from hf_vit.errors import HFViTError
from training.config.arguments import DataArguments
from training.data.splits import open_splits, transforms


def write(folder, split, seeds):
    """Images of two classes; equal seeds are equal images."""
    for label, name in enumerate(("cat", "dog")):
        (folder / split / name).mkdir(parents=True)
        for seed in seeds:
            pixels = np.random.default_rng([label, seed]).integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(
                folder / split / name / f"{seed}.png"
            )


def test_the_evaluation_split_is_found_named_or_carved(tmp_path):
    write(tmp_path, "train", range(20))
    said = []
    found = open_splits(DataArguments(dataset=str(tmp_path)), 0, said.append)
    assert (len(found.train), len(found.evaluation)) == (36, 4) and "10%, stratified" in said[0]
    assert sorted(found.evaluation.labels) == [0, 0, 1, 1]
    write(tmp_path, "test", range(50, 53))
    write(tmp_path, "validation", range(60, 62))
    assert open_splits(DataArguments(dataset=str(tmp_path)), 0).evaluation.split == "validation"
    assert len(open_splits(DataArguments(dataset=str(tmp_path), eval_split="test"), 0).evaluation) == 6
    carved = open_splits(DataArguments(dataset=str(tmp_path), dev_fraction=0.25), 0, said.append)
    assert (len(carved.train), len(carved.evaluation)) == (30, 10)


@pytest.mark.parametrize(
    "train_split, evaluation",
    [("train", "validation"), ("val", "test"), ("train+validation", "test"), ("train[:50%] + val[50%:]", "test")],
)
def test_no_evaluation_split_is_found_among_the_images_trained_on(tmp_path, train_split, evaluation):
    for split in ("train", "validation", "test"):
        write(tmp_path, split, range(4))
    found = open_splits(DataArguments(dataset=str(tmp_path), train_split=train_split), 0)
    assert found.evaluation.split == evaluation


@pytest.mark.parametrize(
    "train_split, eval_split, shared", [("train", "train[:30%]", 6), ("train[:50%]", "train[50%:]", 0)]
)
def test_an_evaluation_on_images_trained_on_is_said(tmp_path, train_split, eval_split, shared):
    write(tmp_path, "train", range(10))
    said = []
    open_splits(DataArguments(dataset=str(tmp_path), train_split=train_split, eval_split=eval_split), 0, said.append)
    assert said == ([f"{shared} of 6 evaluation images are trained on: their score is no test's"] if shared else [])


def test_images_of_all_splits_leave_a_part_for_evaluation(tmp_path):
    for split in ("train", "test"):
        write(tmp_path, split, range(10 * (split == "test"), 20))
    found = open_splits(DataArguments(dataset=str(tmp_path), train_split="train+test"), 0)
    assert "carved" in found.evaluation.split and (len(found.train), len(found.evaluation)) == (54, 6)


def test_shares_are_nested_and_few_labels_balanced(tmp_path):
    write(tmp_path, "train", range(20))
    write(tmp_path, "test", range(50, 53))
    rows = [
        set(open_splits(DataArguments(dataset=str(tmp_path), train_fraction=share), 0).train.rows)
        for share in (0.2, 0.5)
    ]
    assert rows[0] < rows[1] and len(rows[1]) == 20
    few = open_splits(DataArguments(dataset=str(tmp_path), samples_per_class=3), 0).train
    assert np.bincount(few.labels).tolist() == [3, 3]


def test_images_of_the_evaluation_split_leave_the_training_split(tmp_path):
    write(tmp_path, "train", range(20))
    write(tmp_path, "test", [3, 7, 90])
    said = []
    found = open_splits(DataArguments(dataset=str(tmp_path), deduplicate_against="eval"), 0, said.append)
    assert len(found.train) == 36 and len(found.duplicates) == 4
    assert "4 training images are also in" in said[0] and "3.png" in said[0]


def test_images_of_another_data_set_leave_the_training_split(tmp_path):
    """Its test split is meant unless another is named, whatever the own evaluation split is; labels do not matter."""
    for split, seeds in (("train", range(20)), ("validation", (90, 91))):
        write(tmp_path / "own", split, seeds)
    for split, seeds in (("train", (3, 4, 5)), ("test", (7, 95))):
        write(tmp_path / "other", split, seeds)
    own, other = str(tmp_path / "own"), str(tmp_path / "other")
    said = []
    found = open_splits(DataArguments(dataset=own, deduplicate_against=other), 0, said.append)
    assert {twin.other_name for twin in found.duplicates} == {"test/cat/7.png", "test/dog/7.png"}
    assert "(test)" in said[0] and found.evaluation.split == "validation"
    both = DataArguments(dataset=own, deduplicate_against=other, deduplicate_split="train+test")
    assert len(open_splits(both, 0, said.append).duplicates) == 8
    file = tmp_path / "table-test.parquet"
    twin = {"bytes": (tmp_path / "own" / "train" / "cat" / "2.png").read_bytes(), "path": None}
    datasets.Dataset.from_dict({"image": [twin], "fine_label": [5], "coarse_label": [1]}).to_parquet(file)
    unlabelled = DataArguments(dataset=own, deduplicate_against=str(file), cache_dir=str(tmp_path / "cache"))
    (left_out,) = open_splits(unlabelled, 0, said.append).duplicates
    assert left_out.name == "train/cat/2.png"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"deduplicate_against": "{own}"}, "has no test split; choose with --deduplicate_split: train"),
        ({"deduplicate_against": "eval", "deduplicate_split": "test"}, "--deduplicate_split is a split of"),
        ({"deduplicate_split": "test"}, "--deduplicate_split is a split of"),
    ],
)
def test_a_split_to_compare_with_that_is_not_there(tmp_path, values, message):
    write(tmp_path, "train", range(20))
    values = {name: value.replace("{own}", str(tmp_path)) for name, value in values.items()}
    with pytest.raises(HFViTError, match=message):
        open_splits(DataArguments(dataset=str(tmp_path), **values), 0, str)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_config_name": "small"}, "leave out --dataset_config_name"),
        ({"label_column": "kind"}, "leave out --label_column|need no --streaming"),
    ],
)
def test_wishes_that_would_be_ignored_are_refused(tmp_path, values, message, streaming):
    write(tmp_path, "train", range(20))
    write(tmp_path, "test", range(4))
    for name in (str(tmp_path), "synthetic:glyphs@2,20"):
        with pytest.raises(HFViTError, match=message):
            open_splits(DataArguments(dataset=name, streaming=streaming, **values), 0, str)


def test_digits_and_folders_have_no_columns_and_digits_no_stream(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / name / "0.png")
    for values in ({"image_column": "img"}, {"label_column": "label"}, {"dataset_config_name": "x"}):
        for name in ("digits", str(tmp_path)):
            with pytest.raises(HFViTError, match=f"leave out --{next(iter(values))}"):
                open_splits(DataArguments(dataset=name, **values), 0, str)
    with pytest.raises(HFViTError, match="digits are all in memory: leave out --streaming"):
        open_splits(DataArguments(dataset="digits", streaming=True), 0, str)


@pytest.mark.parametrize("values", [{"samples_per_class": 3}, {"dev_fraction": 0.1}, {"deduplicate_against": "eval"},
                                    {"deduplicate_split": "test"}])  # fmt: skip
def test_what_has_to_look_at_every_image_cannot_be_streamed(tmp_path, values):
    with pytest.raises(HFViTError, match="leave out --streaming"):
        open_splits(DataArguments(dataset=str(tmp_path), streaming=True, **values), 0)


def test_transforms_carry_the_arguments():
    data = DataArguments(dataset="digits", crop="squash", flip=False, degrees=5.0, crop_pct=0.9, resample="bicubic")
    train, evaluation = transforms(data, HFViTConfig(image_size=[8, 16], patch_size=4))
    assert train.image_size_hw == evaluation.image_size_hw == (8, 16)
    assert (train.crop, train.flip, train.degrees, train.resample) == ("squash", False, 5.0, "bicubic")
    assert (evaluation.steps.resize_to, evaluation.steps.crop_to) == ((9, 18), (8, 16))


def test_a_sum_takes_no_image_twice(tmp_path):
    for split in ("train+train", "train[:60%]+train[40%:]"):
        with pytest.raises(HFViTError, match=r"takes [0-9,]+ images twice; name each part once"):
            open_splits(DataArguments(dataset="digits", train_split=split), 0, str)
    assert (
        len(open_splits(DataArguments(dataset="digits", train_split="train[:40%]+train[40%:]"), 0, str).train) == 1437
    )
