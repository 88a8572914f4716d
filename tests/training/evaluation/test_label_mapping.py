"""Which output means which class: by name, by number, in a subset, and ReaL's lists by image.

pytest tests/training/evaluation/test_label_mapping.py
"""

import json

import pytest

from hf_vit.errors import HFViTError
from training.evaluation.label_mapping import imagenet, match_labels, real_rows


def test_names_match_whatever_the_spelling():
    head = ["tench, Tinca tinca", "golden_retriever", "Maine Coon"]
    match = match_labels(["maine-coon", "Golden Retriever", "tench"], head)
    assert match.places.tolist() == [2, 1, 0] and match.columns is None


def test_names_that_two_outputs_share_are_not_guessed():
    with pytest.raises(HFViTError, match="1 of the data's 2 classes"):
        match_labels(["tench", "crane"], ["crane", "tench", "crane"])
    assert match_labels(["crane", "Tench", "crane"], ["crane", "tench", "crane"]).places.tolist() == [0, 1, 2]
    imagenets = [name.replace(" ", "_") for name in imagenet()["names"]]
    assert match_labels(imagenets, imagenet()["names"]).places.tolist() == list(range(1000))


def test_subsets_of_imagenet():
    names, wnids = imagenet()["names"], imagenet()["wnids"]
    numbers = imagenet()["subsets"]["imagenet_r"]
    assert len(wnids) == len(names) == 1000 and wnids == sorted(wnids) and len(numbers) == 200
    by_number = match_labels([str(i) for i in range(200)], names, label_subset="imagenet_r")
    assert by_number.columns.tolist() == numbers and by_number.places.tolist() == list(range(200))
    by_id = match_labels([wnids[number] for number in reversed(numbers)], names, label_subset="data")
    assert sorted(by_id.columns) == numbers and by_id.places.tolist() == list(range(199, -1, -1))
    full = match_labels([wnids[number] for number in numbers], names)
    assert full.columns is None and full.places.tolist() == numbers


def test_labels_of_imagenet_classes_are_those_of_the_labels_folder(shared):
    classes = json.loads((shared / "data" / "imagenet_real" / "imagenet_classes.json").read_text())
    assert [row["wnid"] for row in classes] == imagenet()["wnids"]
    assert [row["name"] for row in classes] == imagenet()["names"]


def test_real_labels_by_file_name_and_by_order():
    lists = [[], [4, 2], [7]]
    by_name = real_rows(lists, ["n1/ILSVRC2012_val_00000003.JPEG", "x_ILSVRC2012_val_00000002.JPEG"], [0, 1], 2)
    assert by_name.tolist() == [[7, -1], [4, 2]]
    assert real_rows(lists, ["a", "b"], [1, 0], 3).tolist() == [[4, 2], [-1, -1]]


FOLDERS = sorted(str(number) for number in range(12))  # 0, 1, 10, 11, 2, ...: the order of a file listing


@pytest.mark.parametrize(
    "head",
    [
        [str(number) for number in range(12)],
        [f"LABEL_{number}" for number in range(12)],
        [f"kind {'abcdefghijkl'[number]}" for number in range(12)],
    ],
    ids=["numbers", "LABEL_n", "names"],
)
@pytest.mark.parametrize("label_map", [None, "number"])
def test_folders_called_by_numbers_are_matched_by_number_not_by_place(head, label_map):
    match = match_labels(FOLDERS, head, label_map)
    assert match.places.tolist() == [int(name) for name in FOLDERS]


def test_equal_sets_of_names_match_by_name_in_any_order():
    assert match_labels(["2", "10", "7"], ["10", "7", "2"]).places.tolist() == [2, 0, 1]
    assert match_labels(["007", "002"], ["2", "7"]).places.tolist() == [1, 0]


def test_what_could_only_match_by_place_is_an_error_that_offers_the_map():
    with pytest.raises(HFViTError, match=r"have no names .*--label_map number .*--label_map FILE"):
        match_labels(["cat", "dog"], ["LABEL_0", "LABEL_1"])
    assert match_labels(["cat", "dog"], ["LABEL_0", "LABEL_1"], "number").places.tolist() == [0, 1]
    with pytest.raises(HFViTError, match=r"classes 3 of the data are not among the numbers .*--label_map FILE"):
        match_labels(["1", "3"], ["1", "2"])


@pytest.mark.parametrize("place", ["-1", "2", "true", "1.5"])
def test_a_map_to_what_is_no_class_of_the_model_is_refused(place, tmp_path):
    (tmp_path / "map.json").write_text(f'{{"cat": 0, "dog": {place}}}')
    with pytest.raises(HFViTError, match="names outputs that the model does not have: "):
        match_labels(["cat", "dog"], ["a", "b"], str(tmp_path / "map.json"))
