"""The running state equals the metric functions, in any batches, and costs no more than the classes that occur.

pytest tests/training/metrics/test_metric_state.py
"""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn import metrics as sklearn_metrics

from training.evaluation.label_mapping import real_rows
from training.metrics import metric_state
from training.metrics.accuracy.accuracy import accuracy, wilson_interval
from training.metrics.calibration.calibration import calibration
from training.metrics.confusion_matrix.confusion_matrix import confusion_matrix
from training.metrics.mean_per_class.mean_per_class import mean_per_class
from training.metrics.metric_state import MetricState
from training.metrics.real_accuracy.real_accuracy import real_hits
from training.metrics.topk_accuracy.topk_accuracy import topk_accuracy


CPU = torch.device("cpu")


def count(logits, labels, batch=64, real=None, **options):
    """Metrics of a set, counted in batches."""
    state = MetricState(CPU, **options)
    for first in range(0, len(labels), batch):
        rows = slice(first, first + batch)
        part = None if real is None else torch.as_tensor(real[rows])
        state.update(torch.as_tensor(logits[rows]), torch.as_tensor(labels[rows]), real=part)
    return state.reduce(Accelerator(cpu=True))


@pytest.fixture(scope="module")
def predictions():
    """Logits of 12 classes, float64, and labels, one class of which never occurs."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(200, 12)) * 4, rng.integers(11, size=200)


def test_the_running_state_is_the_metric_functions(predictions):
    logits, labels = predictions
    guess, expected = logits.argmax(1), calibration(logits, labels)
    real = np.stack([labels, (labels + 3) % 12], axis=1)
    real[::3] = -1
    metrics = count(logits, labels, real=real)
    found = metrics.scores()
    np.testing.assert_array_equal(metrics.confusion().toarray(), confusion_matrix(guess, labels, 12))
    assert found["accuracy"] == (accuracy(guess, labels), 200)
    assert found["top5_accuracy"][0] == topk_accuracy(logits, labels, 5)
    assert found["mean_per_class"][0] == pytest.approx(mean_per_class(guess, labels), abs=1e-12)
    assert found["macro_f1"][0] == pytest.approx(sklearn_metrics.f1_score(labels, guess, average="macro"), abs=1e-12)
    hits, counted = real_hits(guess, [row[row >= 0] for row in real])
    assert found["real_accuracy"] == (hits / counted, counted)
    for name in ("ece", "nll", "brier"):
        assert found[name][0] == pytest.approx(expected[name], abs=1e-12)
    assert "real_accuracy" not in count(logits, labels).scores()


def test_single_precision_counts_alike(predictions):
    logits, labels = predictions
    found, expected = count(logits.astype(np.float32), labels).scores(), count(logits, labels).scores()
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name][0] == pytest.approx(expected[name][0], abs=1e-6)


def test_batches_do_not_change_it(predictions):
    first, other = (count(*predictions, batch=batch) for batch in (1, 77))
    assert first.counts == other.counts and first.intervals() == other.intervals()
    for name in ("references", "predictions", "pair_counts"):
        np.testing.assert_array_equal(getattr(first, name), getattr(other, name))


def test_of_equal_scores_the_first_class_counts():
    metrics = count(np.zeros((8, 8), dtype=np.float32), np.arange(8))
    assert metrics.counts["hits"] == 1 and metrics.counts["top5_hits"] == 5


@pytest.mark.parametrize("k", [1, 5])
def test_the_k_largest_are_those_of_a_stable_sort(k):
    rng = np.random.default_rng(0)
    logits, labels = (
        rng.integers(0, 9, size=(300, 12)).astype(np.float32),
        rng.integers(12, size=300),
    )  # many are equal
    largest = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    scores = torch.from_numpy(logits)
    found = metric_state.topk_hits(scores, torch.from_numpy(labels), metric_state.predicted_classes(scores), k)
    np.testing.assert_array_equal(found, (largest == labels[:, None]).any(1))


def test_classes_one_by_one(predictions):
    logits, labels = predictions
    metrics, guess = count(logits, labels), logits.argmax(1)
    expected = sklearn_metrics.precision_recall_fscore_support(labels, guess, labels=range(12), zero_division=np.nan)
    for found, part in zip(metrics.precision_recall_f1()[:2], expected):
        np.testing.assert_allclose(found, part, atol=1e-12)
    np.testing.assert_array_equal(metrics.support, np.bincount(labels, minlength=12))
    confusion = metrics.confusion().toarray()
    np.fill_diagonal(confusion, 0)
    most = metrics.most_confused()
    assert set(most) == set(np.flatnonzero(confusion.sum(1)))
    assert all(most[row] == (confusion[row].argmax(), confusion[row].max()) for row in most)


def test_intervals_hold_the_value(predictions):
    metrics = count(*predictions)
    found = metrics.intervals()
    assert set(found) == {"accuracy", "top5_accuracy", "mean_per_class", "macro_f1"}
    hits = metrics.counts["hits"]
    assert found["accuracy"] == wilson_interval(hits, 200)
    for name, (low, high) in found.items():
        assert low < metrics.scores()[name][0] < high


def test_outputs_that_are_not_finite_are_counted_and_harm_no_other_sum(predictions):
    logits, labels = predictions[0].copy(), predictions[1]
    logits[[3, 50, 60], [1, 2, 3]] = np.nan, np.inf, -np.inf
    metrics = count(logits, labels)
    assert metrics.counts["not_finite"] == 3
    assert all(np.isfinite(value) for value, _ in metrics.scores().values())


def test_several_questions_to_an_image_count_as_fractions_of_it():
    rng = np.random.default_rng(0)
    logits, labels = torch.from_numpy(rng.normal(size=(6, 4, 9))), torch.from_numpy(rng.integers(9, size=(6, 4)))
    state = MetricState(CPU, calibration=False)
    for rows in (slice(0, 5), slice(5, 6)):
        state.update(logits[rows], labels[rows], losses=torch.ones(len(labels[rows])))
    metrics = state.reduce(Accelerator(cpu=True))
    assert metrics.images == 6 and metrics.sums["loss"] == 6.0 and metrics.references is None
    assert set(metrics.scores()) == {"accuracy", "top5_accuracy"}
    assert metrics.scores()["accuracy"] == ((logits.argmax(-1) == labels).double().mean().item(), 6)


def test_memory_does_not_grow_with_the_square_of_the_classes():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 21841)).astype(np.float32), rng.integers(21841, size=40)
    metrics = count(logits, labels)  # a dense matrix would take 3.8 GB
    assert len(metrics.pair_counts) <= 40 and len(metrics.support) == 21841
    tracemalloc.start()
    assert metrics.confusion().nnz == len(metrics.pair_counts)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    assert metrics.intervals()["macro_f1"][0] == 0.0


def test_real_counts_are_big_visions(goldens):
    data = np.load(goldens / "real.npz")
    expected = json.loads((goldens / "real.json").read_text())["results"]["real/softmax_xent"]
    keep = data["mask"] > 0
    lists = [np.flatnonzero(row).tolist() for row in data["labels"]]
    table = real_rows(lists, ["?"] * 24, range(24), 24)[keep]
    metrics = count(data["logits"][keep], data["original_label"][keep].astype(np.int64), real=table)
    assert metrics.scores()["real_accuracy"] == (expected["prec@1"], expected["nseen"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_predicted_class_is_that_of_torch(dtype):
    logits = torch.randint(0, 4, (50, 3, 7), generator=torch.Generator().manual_seed(0)).to(dtype)  # many are equal
    logits[3, 1, 4] = logits[3, 1, 6] = torch.nan
    logits[5, 0] = -torch.inf
    assert torch.equal(metric_state.predicted_classes(logits.requires_grad_()), logits.argmax(-1))
    assert metric_state.predicted_classes(logits[0, 0]).shape == ()
