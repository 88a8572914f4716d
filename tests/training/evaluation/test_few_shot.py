"""Probes: big_vision's numbers, scikit-learn's neighbors, and what is refused.

pytest tests/training/evaluation/test_few_shot.py
"""

import json

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from hf_vit.errors import HFViTError
from training.evaluation.few_shot import NeighborProbe, RidgeProbe, choose_shots, few_shot


@pytest.fixture(scope="module")
def golden(goldens):
    return np.load(goldens / "fewshot.npz")


@pytest.mark.parametrize("problem", ["primal", "dual"])
@pytest.mark.parametrize("l2, tolerance", [(1024, 1e-5), (32, 5e-4), (1, 1e-2)])
def test_ridge_is_big_visions(golden, problem, l2, tolerance):
    probe = RidgeProbe(l2=float(l2)).fit(golden[f"{problem}/x_train"], golden[f"{problem}/y_train"])
    expected = {name: golden[f"{problem}/l2_{l2}/{name}"] for name in ("w", "preds", "scores", "acc")}
    np.testing.assert_allclose(probe.mean_, golden[f"{problem}/mean"][0], atol=1e-6)
    np.testing.assert_allclose(probe.std_, golden[f"{problem}/std"][0], atol=1e-6)
    np.testing.assert_allclose(probe.coef_, expected["w"], atol=tolerance)
    np.testing.assert_allclose(probe.decision_function(golden["x_test"]), expected["scores"], atol=100 * tolerance)
    np.testing.assert_array_equal(probe.predict(golden["x_test"]), expected["preds"])
    assert np.float32(probe.score(golden["x_test"], golden["y_test"])) == pytest.approx(expected["acc"], abs=1e-7)


def test_protocol_is_big_visions(golden, goldens):
    expected = json.loads((goldens / "fewshot.json").read_text())["protocol"]
    names = ("x_train", "y_train", "x_test", "y_test")
    x_train, y_train, x_test, y_test = (golden[f"protocol/{name}"] for name in names)
    for seed in expected["seeds"]:
        for shots in expected["shots"]:
            indices = golden[f"protocol/seed{seed}/shots{shots}/indices"]
            np.testing.assert_array_equal(choose_shots(y_train, seed, shots), indices)
    rows = few_shot(x_train, y_train, x_test, y_test, expected["shots"], expected["seeds"], expected["l2"])
    found = {f"seed{row['seed']}/shots{row['shots']}": row["accuracy"] for row in rows}
    assert found == pytest.approx(expected["accuracy"], abs=1e-7)
    assert all(row["n"] == 60 for row in rows)


def test_both_ways_to_solve_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    for count, width in ((30, 8), (8, 30), (9, 8)):
        x, y = rng.normal(size=(count, width)), np.arange(count) % 3
        probe = RidgeProbe(l2=7.0).fit(x, y)
        padded = np.c_[(x - x.mean(0)) / (x.std(0) + 1e-5), np.full(count, 100.0)]
        ridge = Ridge(alpha=7.0, fit_intercept=False, solver="svd").fit(padded, 2 * np.eye(3)[y] - 1)
        np.testing.assert_allclose(probe.coef_, ridge.coef_.T, atol=1e-9)


def test_labels_are_given_back_as_they_came():
    x = np.eye(4).repeat(3, axis=0)
    names = np.array(["b", "d", "a", "c"]).repeat(3)
    assert (RidgeProbe(l2=1.0).fit(x, names).predict(x) == names).all()
    assert (NeighborProbe(k=3).fit(x, names).predict(x) == names).all()


def test_neighbors_agree_with_scikit_learn():
    rng = np.random.default_rng(1)
    x, y, test = rng.normal(size=(60, 5)), rng.integers(4, size=60), rng.normal(size=(40, 5))
    theirs = KNeighborsClassifier(7, metric="cosine").fit(x, y)
    np.testing.assert_array_equal(NeighborProbe(7, temperature=None).fit(x, y).predict(test), theirs.predict(test))
    weighted = KNeighborsClassifier(7, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07)).fit(x, y)
    np.testing.assert_array_equal(NeighborProbe(7).fit(x, y).predict(test), weighted.predict(test))


def test_shots_are_nested_and_scarce_classes_shorten_the_list():
    labels = np.repeat([0, 1, 2], [4, 9, 6])
    few, more = choose_shots(labels, 3, 2), choose_shots(labels, 3, 4)
    assert set(few) <= set(more) and len(few) == 6 and len(more) == 12
    rows = few_shot(np.eye(19), labels, np.eye(19), labels, shots=(1, 4, 5))
    assert sorted({row["shots"] for row in rows}) == [1, 4]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: RidgeProbe().fit(np.zeros((3, 2)), [0, 1]), r"\(3, 2\) and \(2,\)"),
        (lambda: RidgeProbe().fit(np.zeros((0, 2)), []), "N > 0"),
        (lambda: RidgeProbe().fit(np.zeros((2, 2)), [1, 1]), "two or more classes"),
        (lambda: RidgeProbe(l2=0).fit(np.zeros((2, 2)), [0, 1]), "l2 must be positive"),
        (lambda: RidgeProbe().fit(np.full((2, 2), np.nan), [0, 1]), "2 rows of the features are not finite"),
        (lambda: NeighborProbe(k=3).fit(np.zeros((2, 2)), [0, 1]), "choose 1 to 2"),
        (lambda: few_shot(np.zeros((2, 2)), [0, 1], np.zeros((2, 2)), [0, 1], shots=(5,)), "scarcest class has 1"),
    ],
)
def test_bad_input_is_one_clear_error(call, words):
    with pytest.raises(HFViTError, match=words):
        call()
