"""The metrics agree with scikit-learn and with Google's evaluator, and refuse what they cannot score.

pytest tests/training/metrics/test_metrics.py
"""

import json
import subprocess
import sys
import tracemalloc

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn import metrics as sklearn_metrics

from hf_vit.errors import HFViTError
from tests.conftest import ROOT
from tests.helpers.hub_server import HubServer
from training.metrics import publish
from training.metrics.accuracy.accuracy import accuracy, wilson_interval
from training.metrics.calibration.calibration import (
    BOUNDS,
    calibration,
    expected_calibration_error,
    fit_temperature,
)
from training.metrics.confusion_matrix.confusion_matrix import confusion_matrix
from training.metrics.mean_per_class.mean_per_class import mean_per_class
from training.metrics.multilabel.multilabel import mean_average_precision, multilabel_f1
from training.metrics.precision_recall_f1.precision_recall_f1 import (
    bootstrap_intervals,
    count_pairs,
    macro_f1,
    precision_recall_f1,
)
from training.metrics.real_accuracy.real_accuracy import real_hits
from training.metrics.regression.regression import regression
from training.metrics.topk_accuracy.topk_accuracy import topk_accuracy


NAMES = sorted(path.name for path in (ROOT / "training" / "metrics").iterdir() if (path / f"{path.name}.py").is_file())
EXACT = 1e-12


def draw(seed: int, classes: int, count: int):
    """Scores (N, K) and class numbers (N,), every class among them."""
    rng = np.random.default_rng(seed)
    references = np.concatenate([np.arange(classes), rng.integers(classes, size=count)])
    return rng.normal(size=(len(references), classes)) * 3, references


problems = given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(0, 200))
quietly = settings(max_examples=30, deadline=None)


@quietly
@problems
def test_accuracies_agree_with_scikit_learn(seed, classes, count):
    scores, references = draw(seed, classes, count)
    predictions = scores.argmax(1)
    assert accuracy(predictions, references) == pytest.approx(
        sklearn_metrics.accuracy_score(references, predictions), abs=EXACT
    )
    assert mean_per_class(predictions, references) == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(references, predictions), abs=EXACT
    )
    np.testing.assert_array_equal(
        confusion_matrix(predictions, references, classes),
        sklearn_metrics.confusion_matrix(references, predictions, labels=np.arange(classes)),
    )
    if classes > 2:
        for k in range(1, classes):
            theirs = sklearn_metrics.top_k_accuracy_score(references, scores, k=k, labels=np.arange(classes))
            assert topk_accuracy(scores, references, k) == pytest.approx(theirs, abs=EXACT)


@quietly
@problems
def test_calibration_agrees_with_scikit_learn(seed, classes, count):
    scores, references = draw(seed, classes, count)
    found = calibration(scores, references)
    probabilities = np.exp(scores - scores.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    onehot = np.eye(classes)[references]
    assert found["nll"] == pytest.approx(
        sklearn_metrics.log_loss(references, probabilities, labels=np.arange(classes)), abs=EXACT
    )
    assert found["brier"] == pytest.approx(((probabilities - onehot) ** 2).sum(1).mean(), abs=EXACT)


def test_ece_by_hand():
    confidence, right = np.array([0.2, 0.9, 0.9, 1.0]), np.array([True, True, False, True])
    # bins of width 0.1: |1 - 0.2| / 4, then |1 - 1.8| / 4 and |1 - 1| / 4
    assert expected_calibration_error(confidence, right, bins=10) == pytest.approx(0.4)
    assert expected_calibration_error(np.array([0.5, 0.5]), np.array([True, False]), bins=2) == 0.0


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.sampled_from([60, 400]), st.sampled_from([0.2, 1, 5]))
def test_temperature_has_the_least_nll(seed, classes, count, temperature):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(count, classes))
    logits = truth * temperature
    references = np.array([rng.choice(classes, p=row) for row in softmax(truth, axis=1)])

    def nll(log_temperature):
        return -log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(count), references].mean()

    best = minimize_scalar(nll, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-10}).x
    assert np.log(fit_temperature(logits, references)) == pytest.approx(best, abs=1e-4)


def test_ece_is_that_of_the_usual_loop_over_bins():
    rng = np.random.default_rng(0)
    logits, references = rng.normal(size=(500, 6)) * 3, rng.integers(6, size=500)
    probabilities = softmax(logits, axis=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == references
    gaps = 0.0
    for lower in np.arange(15) / 15:
        inside = (confidence > lower) & (confidence <= lower + 1 / 15)
        if inside.any():
            gaps += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration(logits, references)["ece"] == pytest.approx(gaps, abs=EXACT)


@pytest.mark.parametrize("mistakes", [0, 1, 9, 24])
def test_few_mistakes_do_not_make_a_temperature_run_away(mistakes):
    rng = np.random.default_rng(5)
    references = rng.integers(10, size=360)
    logits = rng.normal(size=(360, 10))
    logits[np.arange(360), references] += 9
    logits[np.arange(mistakes), (references[:mistakes] + 1) % 10] += 10
    found = calibration(logits, references)
    assert (found["temperature"] == 1.0) == (mistakes < 10) and 0.1 < found["temperature"] < 3
    assert found["nll_after_temperature"] <= found["nll"] + 0.02
    assert found["brier_after_temperature"] <= found["brier"] + 0.005


def test_temperature_mends_overconfidence_on_the_images_it_was_not_fitted_on():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(4000, 5)) * 2
    odds = np.exp(truth) / np.exp(truth).sum(1, keepdims=True)
    references = np.array([rng.choice(5, p=row) for row in odds])
    found = calibration(truth * 4, references)
    assert found["temperature"] == pytest.approx(4, rel=0.1)
    assert found["ece"] > 0.1 and found["ece_after_temperature"] < 0.03
    assert found["nll_after_temperature"] < found["nll"]


def test_a_temperature_is_measured_on_images_that_it_was_not_fitted_on():
    rng = np.random.default_rng(0)
    logits, references = rng.normal(size=(300, 6)) * 3, rng.integers(6, size=300)
    right = logits.argmax(1) == references
    order = np.argsort(right, kind="stable")
    halves, expected = (np.sort(order[::2]), np.sort(order[1::2])), np.empty(300)
    for half, other in (halves, halves[::-1]):
        scaled = log_softmax(logits[half] / fit_temperature(logits[other], references[other]), axis=1)
        expected[half] = -scaled[np.arange(len(half)), references[half]]
    assert calibration(logits, references)["nll_after_temperature"] == pytest.approx(expected.mean(), abs=1e-9)


def test_calibration_in_single_precision_makes_no_copy_of_the_logits():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(3000, 400)) * 3).astype(np.float32)
    references = (logits + rng.normal(size=logits.shape) * 2).argmax(1)
    tracemalloc.start()
    found = calibration(logits, references)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < logits.nbytes / 3
    expected = calibration(logits.astype(np.float64), references)
    assert found == pytest.approx(expected, abs=2e-4)


def test_logits_so_large_that_all_is_certain_stay_finite():
    assert fit_temperature(np.zeros((40, 4)), np.arange(40) % 4) > 0
    logits = np.eye(4)[np.arange(80) % 4] * 1e6
    assert np.isfinite(list(calibration(logits, np.arange(80) % 3).values())).all()


# -- precision, recall, F1, multi-label, regression ------------------------------------------------------------------


@quietly
@problems
def test_f1_agrees_with_scikit_learn(seed, classes, count):
    scores, references = draw(seed, classes, count)
    references = references % max(1, classes - 1)  # the last class has no image
    predictions = scores.argmax(1)
    support, predicted = (np.bincount(part, minlength=classes) for part in (references, predictions))
    hits = np.bincount(references[references == predictions], minlength=classes)
    theirs = sklearn_metrics.precision_recall_fscore_support(
        references, predictions, labels=np.arange(classes), zero_division=0
    )
    for ours, other in zip(precision_recall_f1(hits, predicted, support), theirs):
        np.testing.assert_allclose(ours, other, atol=EXACT)
    expected = sklearn_metrics.f1_score(references, predictions, average="macro", zero_division=0)
    assert macro_f1(hits, predicted, support) == pytest.approx(expected, abs=EXACT)


def test_intervals_are_those_of_resampled_images():
    rng = np.random.default_rng(0)
    references = rng.integers(3, size=90)
    predictions = np.where(rng.random(90) < 0.7, references, rng.integers(3, size=90))
    balanced, f1 = bootstrap_intervals(*count_pairs(predictions, references))
    drawn = [rng.integers(90, size=90) for _ in range(1000)]
    for found, score in (
        (balanced, sklearn_metrics.balanced_accuracy_score),
        (f1, lambda right, guess: sklearn_metrics.f1_score(right, guess, average="macro")),
    ):
        expected = np.percentile([score(references[rows], predictions[rows]) for rows in drawn], [2.5, 97.5])
        assert found == pytest.approx(expected, abs=0.02)
    assert bootstrap_intervals(*count_pairs(predictions, references)) == (balanced, f1)


def test_wilson_interval_is_the_published_one():
    # Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8), Table I, method 3
    for correct, count, interval in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611))):
        assert wilson_interval(correct, count) == pytest.approx(interval, abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_labels_without_a_positive_image_do_not_count_in_the_mean():
    scores, references = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.4]]), np.array([[1, 0, 0], [0, 1, 0]])
    assert mean_average_precision(scores, references) == 1.0
    assert multilabel_f1(scores, references) == (pytest.approx(2 / 3), 1.0)


def test_r2_is_one_less_what_is_not_explained():
    found = regression([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert found == {"mae": pytest.approx(1 / 3), "rmse": pytest.approx(3**-0.5), "r2": pytest.approx(0.5)}
    assert np.isnan(regression([1.0], [1.0])["r2"])


def test_real_accuracy_equals_big_vision(goldens):
    found, expected = np.load(goldens / "real.npz"), json.loads((goldens / "real.json").read_text())["results"]
    counted = found["mask"] > 0
    predictions = found["logits"].argmax(1)
    lists = [np.flatnonzero(row) for row in found["labels"]]
    hits, count = real_hits(predictions[counted], [labels for labels, keep in zip(lists, counted) if keep])
    assert (hits, count) == (expected["real/softmax_xent"]["ncorrect"], expected["real/softmax_xent"]["nseen"])
    assert hits / count == expected["real/softmax_xent"]["prec@1"]
    plain = accuracy(predictions[counted], found["original_label"][counted])
    assert plain == expected["single/softmax_xent"]["prec@1"]


def test_real_labels_of_imagenet_have_46837_images(shared):
    labels = json.loads((shared / "data" / "imagenet_real" / "real.json").read_text())
    assert real_hits([row[0] if row else 0 for row in labels], labels) == (46837, 46837)


INPUTS = {
    "accuracy": ([0, 1, 1], [0, 1, 0], 2 / 3),
    "mean_per_class": ([0, 1, 1], [0, 1, 0], 3 / 4),
    "real_accuracy": ([0, 1, 1, 2], [[0, 2], [1], [0], []], 2 / 3),
    "topk_accuracy": ([[3.0, 2.0, 1.0], [0.0, 1.0, 2.0]], [1, 0], 1 / 2),
    "confusion_matrix": ([0, 1, 1], [0, 1, 0], [[1, 1], [0, 1]]),
    "calibration": ([[2.0, 0.0], [0.0, 2.0]], [0, 1], None),
    "precision_recall_f1": ([0, 1, 1], [0, 1, 0], None),
    "multilabel": ([[0.9, 0.1], [0.2, 0.8]], [[1, 0], [0, 1]], None),
    "regression": ([1.0, 2.0, 4.0], [1.0, 2.0, 3.0], None),
}


SEVERAL_VALUES = {
    "calibration": ("ece", "nll", "brier", "temperature", "ece_after_temperature", "nll_after_temperature"),
    "precision_recall_f1": ("macro_f1", "low", "high", "precision", "recall", "f1"),
    "multilabel": ("mean_average_precision", "macro_f1", "micro_f1"),
    "regression": ("mae", "rmse", "r2"),
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    return lambda name: evaluate.load(str(ROOT / "training" / "metrics" / name), cache_dir=str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_loads_and_computes_it_offline(name, load):
    predictions, references, expected = INPUTS[name]
    options = {"k": 2} if name == "topk_accuracy" else {}
    found = load(name).compute(predictions=predictions, references=references, **options)
    assert found["n"] == (3 if name == "real_accuracy" else len(references))
    if expected is not None:
        assert found[name] == expected
    else:
        assert set(SEVERAL_VALUES[name]) <= set(found)


def test_evaluate_adds_batches_and_combines(load):
    metric = load("real_accuracy")
    metric.add_batch(predictions=np.array([0, 1]), references=[[0], [2, 3]])
    metric.add_batch(predictions=np.array([3]), references=[[3]])
    assert metric.compute()["real_accuracy"] == 2 / 3
    both = evaluate.combine([load("accuracy"), load("mean_per_class")])
    assert {"accuracy", "mean_per_class"} <= set(both.compute(predictions=[0, 1], references=[0, 0]))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_stands_alone_with_one_import_a_line(name):
    text = (ROOT / "training" / "metrics" / name / f"{name}.py").read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert {"import datasets", "import evaluate", "import numpy as np"} <= set(imports)
    assert all(line.split()[1].split(".")[0] in ("math", "datasets", "evaluate", "numpy", "scipy", "sklearn")
               for line in imports)  # fmt: skip


PUSH_AND_LOAD = """
import json, sys
import evaluate
from training.metrics.publish import publish
address = publish("real_accuracy", "alice")
found = evaluate.load("alice/real_accuracy").compute(predictions=[1, 2], references=[[1], [3, 4]])
print(json.dumps([address, found["real_accuracy"]]))
"""


@pytest.mark.slow
def test_a_metric_goes_to_the_hub_and_comes_back(tmp_path):
    with HubServer(users={"hf_secret": "alice"}) as hub:
        environment = hub.environment(home=tmp_path, token="hf_secret")
        line = [sys.executable, "-c", PUSH_AND_LOAD]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        address, value = json.loads(done.stdout.splitlines()[-1])
        assert address.endswith("/spaces/alice/real_accuracy") and value == 0.5
        _, files = hub.repositories["spaces/alice/real_accuracy"].files("main")
    assert set(files) == {"real_accuracy.py", "README.md", "app.py", "requirements.txt"}
    assert 'evaluate.load("alice/real_accuracy")' in files["README.md"].decode()


def test_only_metrics_are_published():
    assert publish.METRIC_FOLDERS == NAMES
    with pytest.raises(HFViTError, match="no metric 'f1'; there are accuracy, "):
        publish.space_files("f1")


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: accuracy([], []), "no images"),
        (lambda: mean_per_class([], []), "no images"),
        (lambda: topk_accuracy([[0.0, 1.0]], [2], 1), "2 is outside the 2 classes"),
        (lambda: topk_accuracy([[0.0, 1.0]], [1], 3), "k = 3"),
        (lambda: topk_accuracy([[0.0, np.nan]], [1], 1), "not finite"),
        (lambda: confusion_matrix([3], [0], 3), "class number 3 is outside 0..2"),
        (lambda: calibration([[0.0, 1.0]] * 2, [0, -1]), "-1 is outside"),
        (lambda: calibration([[0.0, 1.0]], [0]), "two or more"),
        (lambda: real_hits([1, 2], [[1]]), "2 predictions, but ReaL labels of 1"),
        (lambda: multilabel_f1([[0.1]], [[2]]), "are 0 or 1"),
        (lambda: mean_average_precision([[0.1]], [[0]]), "no image has any label"),
        (lambda: regression([0.0], [0.0, 1.0]), r"got \(1,\) and \(2,\)"),
    ],
)
def test_bad_input_is_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_equal_scores_count_the_lower_class_first():
    assert topk_accuracy([[1.0, 1.0, 1.0]], [0], 1) == 1.0
    assert topk_accuracy([[1.0, 1.0, 1.0]], [1], 1) == 0.0


@pytest.mark.parametrize("classes", [1, 10])
def test_an_interval_has_a_width_where_all_or_no_answers_are_right(classes):
    references = np.arange(60) % classes
    for predictions, value in ((references, 1.0), (references + 1, 0.0)):
        expected = wilson_interval(60 * value, 60)
        for interval in bootstrap_intervals(*count_pairs(predictions, references)):
            assert interval == pytest.approx(expected)


def test_the_fewer_errors_the_higher_the_interval():
    references, lows = np.arange(300) % 10, []
    for errors in range(10):
        predictions = references.copy()
        predictions[:errors] = (references[:errors] + 1) % 10
        balanced, f1 = bootstrap_intervals(*count_pairs(predictions, references))
        assert balanced[0] < 1 - errors / 300 <= balanced[1] and f1[0] < f1[1]
        lows.append(balanced[0])
    assert lows[:5] == sorted(lows[:5], reverse=True)
    assert max(lows[5:]) < lows[3]  # where resampling takes over


def test_a_rare_class_leaves_the_mean_over_classes_uncertain():
    references = np.array([0] * 96 + [1] * 4)
    (low, _), _ = bootstrap_intervals(*count_pairs(references, references))
    assert low == pytest.approx(wilson_interval(15, 15)[0])  # 2**2 / (1 / 96 + 1 / 4) = 15.4
    assert wilson_interval(100, 100)[0] > 0.96 > 0.8 > low


def test_a_model_that_knows_one_class_has_an_interval():
    references = np.arange(240) % 12
    (low, high), _ = bootstrap_intervals(*count_pairs(np.zeros_like(references), references))
    assert (low, high) == pytest.approx(wilson_interval(20, 240)) and low < 1 / 12 < high
