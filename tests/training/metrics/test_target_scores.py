"""Scores of several labels and of numbers agree with scikit-learn, and thresholds with a search through all of them.

pytest tests/training/metrics/test_target_scores.py
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn import metrics as sklearn_metrics

from hf_vit.errors import HFViTError
from hf_vit.problem_type import MULTI_LABEL, REGRESSION
from training.metrics.multilabel.multilabel import best_thresholds
from training.metrics.target_scores import sigmoid, target_scores


EXACT = 1e-9
quietly = settings(max_examples=40, deadline=None)
sizes = (st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 6))


def several(seed, count, labels, coarse=False):
    """Logits and 0 or 1, both (N, K); coarse logits have equals among them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(count, labels))
    return np.round(logits) if coarse else logits, rng.random((count, labels)) < rng.random(labels)


@quietly
@given(*sizes)
def test_scores_of_several_labels_are_scikit_learns(seed, count, labels):
    logits, there = several(seed, count, labels)
    assume(there.any())
    thresholds = np.random.default_rng(seed + 1).uniform(0.1, 0.9, size=labels)
    found = target_scores(MULTI_LABEL, logits, there.astype(np.float32), ["x"] * labels, thresholds)
    scores, occurs = expit(logits), there.any(axis=0)
    average = sklearn_metrics.average_precision_score(there[:, occurs], scores[:, occurs], average="macro")
    assert found["mean_average_precision"] == pytest.approx(average, abs=EXACT)
    for name, least in (("", 0.5), ("_at_thresholds", thresholds)):
        for kind in ("macro", "micro"):
            f1 = sklearn_metrics.f1_score(there, scores >= least, average=kind, zero_division=0)
            assert found[f"{kind}_f1{name}"] == pytest.approx(f1, abs=EXACT)


@quietly
@given(*sizes)
def test_scores_of_numbers_are_scikit_learns(seed, count, numbers):
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(count, numbers)) * 10 ** rng.uniform(-3, 3, size=numbers)
    values = labels + rng.normal(size=labels.shape)
    names = [f"n{place}" for place in range(numbers)]
    found = target_scores(REGRESSION, values, labels, names)
    mae = sklearn_metrics.mean_absolute_error(labels, values, multioutput="raw_values")
    r2 = sklearn_metrics.r2_score(labels, values, multioutput="raw_values")
    assert found["mae"] == pytest.approx(mae.mean()) and found["r2"] == pytest.approx(r2.mean())
    rmse = sklearn_metrics.root_mean_squared_error(labels, values, multioutput="raw_values").mean()
    assert found["rmse"] == pytest.approx(rmse)
    if numbers == 1:
        assert set(found) == {"mae", "rmse", "r2"}
    else:
        assert [found[f"mae_{name}"] for name in names] == pytest.approx(mae.tolist())
        assert [found[f"r2_{name}"] for name in names] == pytest.approx(r2.tolist())


def test_r2_of_a_number_that_is_the_same_for_all_is_left_out():
    labels, values = np.array([[1.0, 5.0], [2.0, 5.0]]), np.array([[1.0, 4.0], [2.0, 6.0]])
    found = target_scores(REGRESSION, values, labels, ["a", "b"])
    assert found["r2"] == found["r2_a"] == 1 and "r2_b" not in found and found["mae_b"] == 1
    assert "r2" not in target_scores(REGRESSION, values[:, 1:], labels[:, 1:], ["b"])


@quietly
@given(*sizes, st.booleans())
def test_no_threshold_has_a_higher_f1_than_the_best_one(seed, count, labels, coarse):
    logits, there = several(seed, count, labels, coarse)
    scores = expit(logits)
    best = best_thresholds(scores, there)
    for label, threshold in enumerate(best):
        own, truth = scores[:, label], there[:, label]
        if not 0 < truth.sum() < count:
            assert threshold == 0.5
            continue
        found = sklearn_metrics.f1_score(truth, own >= threshold)
        every = [sklearn_metrics.f1_score(truth, own >= least) for least in np.unique(own)]
        assert found == pytest.approx(max(every), abs=EXACT)
        assert not np.isin(threshold, own) or threshold == own.min()  # between two scores


def test_of_equally_good_thresholds_the_one_nearest_the_default_is_taken():
    scores, there = np.array([[0.9], [0.2], [0.1]]), np.array([[1], [0], [0]])
    assert best_thresholds(scores, there) == pytest.approx([0.55])
    # F1 2/3 at both cuts: at 0.9 alone, and at all four
    scores, there = np.array([[0.9], [0.6], [0.4], [0.1]]), np.array([[1], [0], [0], [1]])
    assert best_thresholds(scores, there) == pytest.approx([0.75])


@quietly
@given(st.floats(-1e6, 1e6))
def test_scores_are_the_logistic_function_without_overflow(logit):
    with np.errstate(all="raise", under="ignore"):
        assert sigmoid(np.array([logit]))[0] == pytest.approx(expit(logit), rel=1e-12)


@pytest.mark.parametrize("problem", [MULTI_LABEL, REGRESSION])
def test_outputs_that_are_not_finite_are_counted(problem):
    logits = np.array([[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]])
    with pytest.raises(HFViTError, match="not finite for 2 of 3 images"):
        target_scores(problem, logits, np.array([[0, 1], [1, 0], [1, 1]]), ["a", "b"])


def test_labels_that_no_image_has_are_one_line():
    with pytest.raises(HFViTError, match="cannot be scored: no image has any label"):
        target_scores(MULTI_LABEL, np.zeros((2, 2)), np.zeros((2, 2)), ["a", "b"])
