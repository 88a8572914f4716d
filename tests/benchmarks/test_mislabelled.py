"""The measurement of the list of mislabelled images, on few images.

python -m pytest tests/benchmarks/test_mislabelled.py
"""

import json

import numpy as np

from benchmarks import mislabelled
from benchmarks.baselines import missing


def test_wrong_labels_are_flipped_to_another_class():
    labels = np.arange(1000) % 10
    wrong, chosen = mislabelled.flip(labels, 0.05, 10, seed=0)
    assert chosen.sum() == 50 and (wrong != labels).tolist() == chosen.tolist() and set(wrong) == set(range(10))


def test_the_whole_measurement_on_few_images(tmp_path, capsys):
    words = ["--data", "digits", "--images", "400", "--patches", "20", "--folds", "2", "--seeds", "0"]
    assert mislabelled.main([*words, "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    first = found["mean"]["report: first by probability"]
    assert first["images"] == 20 and first["precision"] == first["recall"] > 0.3  # by chance 0.05
    out, err = capsys.readouterr()
    if missing("cleanlab"):
        assert "cleanlab is not installed" in err and "cleanlab" not in out
    else:
        lists = found["mean"]
        assert lists["cleanlab: list, confident_learning"] == lists["report: list"]
        assert lists["cleanlab: first by self_confidence"] == first
