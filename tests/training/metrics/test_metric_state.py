"""Counts of a scoring are those of the metrics, and ReaL accuracy is big_vision's.

pytest tests/training/metrics/test_metric_state.py
"""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from training.evaluation.label_mapping import real_rows
from training.metrics.calibration.calibration import calibration
from training.metrics.confusion_matrix.confusion_matrix import confusion_matrix
from training.metrics.mean_per_class.mean_per_class import mean_per_class
from training.metrics.metric_state import Counts
from training.metrics.topk_accuracy.topk_accuracy import topk_accuracy


def test_counts_are_those_of_the_metrics(goldens):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 12)) * 4, rng.integers(11, size=200)  # one class never occurs
    counts = Counts(12, torch.device("cpu"))
    for first in range(0, 200, 64):
        counts.add(torch.from_numpy(logits[first : first + 64]), torch.from_numpy(labels[first : first + 64]))
    totals = counts.total(Accelerator(cpu=True))
    found, expected = totals.scores(), calibration(logits, labels)
    guess = logits.argmax(1)
    np.testing.assert_array_equal(totals.confusion, confusion_matrix(guess, labels, 12))
    assert found["accuracy"] == (np.mean(guess == labels), 200)
    assert found["top5_accuracy"][0] == pytest.approx(topk_accuracy(logits, labels, 5), abs=1e-12)
    assert found["mean_per_class"][0] == pytest.approx(mean_per_class(guess, labels), abs=1e-12)
    for name in ("ece", "nll", "brier"):
        assert found[name][0] == pytest.approx(expected[name], abs=1e-12)
    assert "real_accuracy" not in found


def test_real_counts_are_big_visions(goldens):
    data = np.load(goldens / "real.npz")
    expected = json.loads((goldens / "real.json").read_text())["results"]["real/softmax_xent"]
    keep = data["mask"] > 0
    lists = [np.flatnonzero(row).tolist() for row in data["labels"]]
    table = real_rows(lists, ["?"] * 24, range(24), 24)[keep]
    counts = Counts(10, torch.device("cpu"))
    originals = torch.from_numpy(data["original_label"][keep]).long()
    counts.add(torch.from_numpy(data["logits"][keep]), originals, torch.from_numpy(table))
    found = counts.total(Accelerator(cpu=True)).scores()["real_accuracy"]
    assert found == (expected["prec@1"], expected["nseen"])
