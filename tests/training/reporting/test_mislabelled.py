"""Wrong labels are found by confident learning, as by cleanlab where that is installed.

python -m pytest tests/training/reporting/test_mislabelled.py
"""

import numpy as np
import pytest

from training.reporting.mislabelled import find_label_issues, find_wrong_marks


def noisy(images=600, classes=5, flipped=0.1, seed=0):
    """Probabilities of a model that is mostly right, labels of which some were exchanged, and which."""
    random = np.random.default_rng(seed)
    true = random.integers(classes, size=images)
    logits = random.normal(size=(images, classes))
    logits[np.arange(images), true] += 3
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = random.random(images) < flipped
    labels = np.where(wrong, (true + random.integers(1, classes, images)) % classes, true)
    return labels, probabilities, wrong


def ranked(labels, probabilities):
    classes = np.argsort(-probabilities, axis=1, kind="stable")
    return (
        labels,
        probabilities[np.arange(len(labels)), labels],
        classes,
        np.take_along_axis(probabilities, classes, 1),
    )


def test_exchanged_labels_are_found():
    labels, probabilities, wrong = noisy()
    found = find_label_issues(*ranked(labels, probabilities))
    hits = wrong[found.places]
    assert hits.mean() > 0.9 and hits.sum() / wrong.sum() > 0.5
    assert (found.suggested != labels[found.places]).all()
    assert (np.diff(found.own) >= 0).all()


def test_the_list_is_cleanlabs():
    theirs = pytest.importorskip("cleanlab.filter", reason="compares with cleanlab: pip install cleanlab")
    for seed in range(3):
        labels, probabilities, _ = noisy(seed=seed)
        expected = theirs.find_label_issues(labels, probabilities, filter_by="confident_learning")
        found = find_label_issues(*ranked(labels, probabilities)).places
        assert sorted(found) == np.flatnonzero(expected).tolist()


def test_the_most_probable_classes_are_enough():
    labels, probabilities, _ = noisy(classes=40)
    labels, own, classes, rows = ranked(labels, probabilities)
    whole = find_label_issues(labels, own, classes, rows)
    few = find_label_issues(labels, own, classes[:, :8], rows[:, :8])
    assert np.array_equal(few.places, whole.places) and np.array_equal(few.suggested, whole.suggested)


def test_a_class_without_images_is_never_suggested():
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.1, 0.1, 0.8], [0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.1, 0.7, 0.2]])
    assert find_label_issues(*ranked(labels, probabilities)).places.tolist() == []


def test_no_image():
    empty = np.zeros(0, np.int64)
    assert len(find_label_issues(empty, np.zeros(0), empty.reshape(0, 2), np.zeros((0, 2))).places) == 0


def test_wrong_marks_of_several_labels():
    random = np.random.default_rng(0)
    true = random.random((200, 4)) < 0.4
    scores = np.clip(np.where(true, 0.85, 0.15) + random.normal(scale=0.1, size=true.shape), 0.01, 0.99)
    marks = true.copy()
    wrong = [(3, 0), (17, 2), (40, 3), (90, 1)]
    for image, label in wrong:
        scores[image, label] = 0.95 if true[image, label] else 0.05
        marks[image, label] ^= True
    images, labels = find_wrong_marks(scores, marks)
    assert set(wrong) <= set(list(zip(images.tolist(), labels.tolist()))[:6])
