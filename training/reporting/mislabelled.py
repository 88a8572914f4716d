"""Images that are probably labelled wrongly, by confident learning (Northcutt et al. 2021, arXiv:1911.00068).

The probabilities must be those of a model that was not trained on the image: on a held-out split, or out of fold. Not
cleanlab: it needs all N x K probabilities and a confident joint of K x K, 3.8 GB for 21,841 classes; this needs only
the most probable classes of each image. `benchmarks/mislabelled.py` compares both.
"""

from dataclasses import dataclass

import numpy as np


THRESHOLD_TOLERANCE = 1e-6  # as in cleanlab


@dataclass(frozen=True)
class LabelIssues:
    """The images that are probably mislabelled, the most likely first.

    Attributes:
        places: int64 (n,) rows of the input. suggested: int64 (n,) classes. own: float (n,), the probability of the
            label, by which they are sorted.
    """

    places: np.ndarray
    suggested: np.ndarray
    own: np.ndarray


def find_label_issues(
    labels: np.ndarray, own: np.ndarray, classes: np.ndarray, probabilities: np.ndarray
) -> LabelIssues:
    """Images with a confident other class: at least as probable as it is, on average, for images with that label.

    Args:
        labels: int (N,). own: (N,) probabilities of the labels. classes, probabilities: (N, k), the most probable
            first. Confident classes beyond these k are not found.
    """
    if not len(labels):
        return LabelIssues(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    num_classes = int(max(labels.max(), classes.max())) + 1
    images = np.bincount(labels, minlength=num_classes)
    totals = np.bincount(labels, weights=own, minlength=num_classes)
    threshold = np.where(images > 0, totals / np.maximum(images, 1), np.inf)  # a class without images: never suggested
    confident = probabilities >= threshold[classes] - THRESHOLD_TOLERANCE
    suggested = classes[np.arange(len(labels)), confident.argmax(1)].astype(np.int64)  # the first is the most probable
    wrong = confident.any(1) & (suggested != labels) & (classes[:, 0] != labels)
    places = np.flatnonzero(wrong)
    places = places[np.argsort(own[places], kind="stable")]
    return LabelIssues(places, suggested[places], own[places])


def find_wrong_marks(scores: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for several labels per image: each label is a problem of two classes, present and absent.

    Args:
        scores: (N, K) probabilities. marks: (N, K), whether the image has the label.

    Returns:
        (images (n,), labels (n,)): labels that are probably missing or wrong, the most likely first.
    """
    marks = marks.astype(bool)
    own = np.where(marks, scores, 1.0 - scores)  # probability of the mark
    present, absent = marks.sum(0), (~marks).sum(0)
    least_present = np.where(present > 0, np.where(marks, own, 0).sum(0) / np.maximum(present, 1), np.inf)
    least_absent = np.where(absent > 0, np.where(marks, 0, own).sum(0) / np.maximum(absent, 1), np.inf)
    other, least_other = 1.0 - own, np.where(marks, least_absent, least_present)
    images, labels = np.nonzero((other >= least_other - THRESHOLD_TOLERANCE) & (other > 0.5))
    order = np.argsort(own[images, labels], kind="stable")
    return images[order], labels[order]
