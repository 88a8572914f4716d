"""Stratified choices of rows by their labels: nested subsets, the same for the same seed.

For sources.py, dataset.py and subsets.py. Not scikit-learn's `train_test_split`: its choices of different sizes are
not parts of one another.

Tests: tests/training/data/test_dataset.py.
"""

from collections.abc import Iterator

import numpy as np

from ..rng import SUBSET, generator


REGRESSION_STRATA = 10


def strata(labels: np.ndarray) -> np.ndarray:
    """The stratum of each image, int64 (n,): its class, its rarest label, or the tenth of the range of its number."""
    if labels.ndim == 1:
        return labels
    if labels.dtype == bool:
        rarity = np.argsort(labels.sum(axis=0), kind="stable")  # the rarest label first
        return np.where(labels.any(axis=1), labels[:, rarity].argmax(axis=1), labels.shape[1])
    rank = np.argsort(np.argsort(labels[:, 0], kind="stable"), kind="stable")
    return rank * REGRESSION_STRATA // max(len(labels), 1)


def nested_subset(labels: np.ndarray, seed: int, count: int) -> np.ndarray:
    """Choose rows at random, from each stratum in proportion to its size; smaller subsets are parts of larger ones.

    The r-th image of a shuffled stratum of n has rank (r + 1/2) / n, and those of the lowest ranks are taken.

    Args:
        labels: of a source. seed: of the choice. count: 0 to n.

    Returns:
        int64 (count,), ascending.
    """
    labels = strata(labels)
    order = np.empty(len(labels))
    for rows in shuffled_classes(labels, seed):
        order[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    if not 0 < count < len(labels):
        return np.arange(len(labels))[:count]
    last = np.partition(order, count - 1)[count - 1]  # no full sort, for sets of millions
    taken = order < last
    level = np.flatnonzero(order == last)  # strata of one size have equal ranks: chance decides
    tie = generator(SUBSET, seed, 0).random(len(labels))[level]
    taken[level[np.argsort(tie, kind="stable")[: count - np.count_nonzero(taken)]]] = True
    return np.flatnonzero(taken)


def shuffled_classes(labels: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The rows of each label that occurs, in a random order that depends only on seed and label."""
    for label, rows in rows_by_label(labels):
        generator(SUBSET, seed, 1, label).shuffle(rows)
        yield rows


def rows_by_label(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each label that occurs, with its rows in order, by one sort for all labels."""
    labels = labels.astype(np.min_scalar_type(labels.max(initial=0)))  # NumPy has a radix sort for 16 bits
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    first = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    for rows in np.split(order, first) if len(order) else ():
        yield int(labels[rows[0]]), rows
