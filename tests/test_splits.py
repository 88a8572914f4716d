"""Which pictures train and which evaluate.

pytest tests/test_splits.py
"""

import numpy as np
import pytest
from PIL import Image

from hf_vit import HFViTConfig
from hf_vit.errors import HFViTError
from training.arguments import DataArguments
from training.splits import open_splits, transforms


def write(folder, split, seeds):
    """Pictures of two classes; equal seeds are equal pictures."""
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


def test_pictures_of_the_evaluation_split_leave_the_training_split(tmp_path):
    write(tmp_path, "train", range(20))
    write(tmp_path, "test", [3, 7, 90])
    said = []
    found = open_splits(DataArguments(dataset=str(tmp_path), deduplicate_against="eval"), 0, said.append)
    assert len(found.train) == 36 and len(found.duplicates) == 4
    assert "4 training pictures are also in" in said[0] and "3.png" in said[0]


@pytest.mark.parametrize("values", [{"samples_per_class": 3}, {"dev_fraction": 0.1}, {"deduplicate_against": "eval"}])
def test_what_has_to_look_at_every_picture_cannot_be_streamed(tmp_path, values):
    with pytest.raises(HFViTError, match="leave out --streaming"):
        open_splits(DataArguments(dataset=str(tmp_path), streaming=True, **values), 0)


def test_transforms_carry_the_arguments():
    data = DataArguments(dataset="digits", crop="squash", flip=False, degrees=5.0, crop_pct=0.9, resample="bicubic")
    train, evaluation = transforms(data, HFViTConfig(image_size=[8, 16], patch_size=4))
    assert train.image_size_hw == evaluation.image_size_hw == (8, 16)
    assert (train.crop, train.flip, train.degrees, train.resample) == ("squash", False, 5.0, "bicubic")
    assert evaluation.crop_pct == 0.9
