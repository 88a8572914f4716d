"""Probes on frozen features: ridge regression from a few images per class, and nearest neighbors.

    probe = RidgeProbe(l2=1024.0).fit(features, labels)
    accuracy = probe.score(test_features, test_labels)

The ridge probe and its protocol are big_vision's `evaluators/fewshot_lsr.py` (few-shot linear accuracy of
arXiv:2010.11929, section 4.1): features standardized on the few training images, a bias feature of 100, targets -1 and
1, `l2` absolute and on the bias as well, solved in closed form. Neighbors vote as in Wu et al. 2018
(arXiv:1805.01978). features.py computes the features. Not scikit-learn's `Ridge`, which gives the same (a test
compares them): solving is one call of NumPy here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vit.errors import HFViTError


L2 = 1024.0
SEEDS = (0, 1, 2)
BIAS = 100.0  # so large that l2 hardly reaches its weight
STD_OFFSET = 1e-5  # added to each, as big_vision does
VOTING_BATCH = 1024  # test images whose votes are counted at once


@dataclass
class RidgeProbe:
    """Linear classifier by ridge regression, with scikit-learn's interface.

    Attributes:
        l2: weight of the squared norm, not scaled by the number of images.
        classes_: (K,) labels in order. mean_, std_: (D,) of the training features. coef_: (D + 1, K), bias last.
    """

    l2: float = L2

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "RidgeProbe":
        """Solve for features (N, D) and labels (N,); in float64, of whichever of N and D + 1 is smaller.

        Raises:
            HFViTError: shapes that do not fit, features that are not finite, fewer than two classes.
        """
        features, labels = checked_features(features, labels)
        if self.l2 <= 0:
            raise HFViTError(f"l2 must be positive, got {self.l2}")
        self.classes_, index = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise HFViTError(f"a probe needs two or more classes, got {len(self.classes_)}")
        self.mean_, self.std_ = features.mean(0), features.std(0) + STD_OFFSET
        x = self._standardized(features)  # (N, D + 1)
        y = 2.0 * np.eye(len(self.classes_))[index] - 1.0  # (N, K)
        count, width = x.shape
        if count >= width:
            self.coef_ = np.linalg.solve(x.T @ x + self.l2 * np.eye(width), x.T @ y)
        else:
            self.coef_ = x.T @ np.linalg.solve(x @ x.T + self.l2 * np.eye(count), y)
        return self

    def _standardized(self, features: np.ndarray) -> np.ndarray:
        x = (np.asarray(features, dtype=np.float64) - self.mean_) / self.std_
        return np.concatenate([x, np.full((len(x), 1), BIAS)], axis=1)

    def decision_function(self, features: np.ndarray) -> np.ndarray:
        """Scores (N, K) of features (N, D); about 1 for the right class, -1 for the others."""
        return self._standardized(features) @ self.coef_

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Labels (N,) of features (N, D)."""
        return self.classes_[self.decision_function(features).argmax(1)]

    def score(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Accuracy on features (N, D) with labels (N,)."""
        return score(self, features, labels)


@dataclass
class NeighborProbe:
    """k nearest neighbors by cosine similarity s; each votes with exp(s / temperature), or 1 where it is None."""

    k: int = 20
    temperature: float | None = 0.07

    def fit(self, features: np.ndarray, labels: np.ndarray) -> "NeighborProbe":
        """Keep features (N, D) and labels (N,).

        Raises:
            HFViTError: shapes that do not fit, features that are not finite, k outside 1..N.
        """
        from sklearn.neighbors import NearestNeighbors

        features, labels = checked_features(features, labels)
        if not 1 <= self.k <= len(labels):
            raise HFViTError(f"k = {self.k} neighbors of {len(labels)} training images: choose 1 to {len(labels)}")
        self.classes_, self._class = np.unique(labels, return_inverse=True)
        # Of unit vectors |a - b|^2 = 2 - 2 cos, and scikit-learn searches Euclidean neighbors alone in parallel
        self._search = NearestNeighbors(n_neighbors=self.k, algorithm="brute").fit(unit(features))
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Labels (N,) of features (N, D); if classes have equal votes, the first."""
        distance, nearest = self._search.kneighbors(unit(features))  # (N, k) each
        weights = np.ones_like(distance)
        if self.temperature is not None:
            weights = np.exp(-(distance**2) / 2 / self.temperature)  # exp((s - 1) / temperature)
        winners = np.empty(len(features), dtype=np.int64)
        for start in range(0, len(features), VOTING_BATCH):
            rows = slice(start, start + VOTING_BATCH)
            votes = np.zeros((len(nearest[rows]), len(self.classes_)))
            np.add.at(votes, (np.arange(len(votes))[:, None], self._class[nearest[rows]]), weights[rows])
            winners[rows] = votes.argmax(1)
        return self.classes_[winners]

    def score(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Accuracy on features (N, D) with labels (N,)."""
        return score(self, features, labels)


def score(probe: "RidgeProbe | NeighborProbe", features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of a fitted probe on features (N, D) with labels (N,)."""
    from ..metrics.accuracy.accuracy import accuracy  # with it comes `evaluate`, which takes seconds to import

    features, labels = checked_features(features, labels)
    return accuracy(probe.predict(features), labels)


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def checked_features(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features as float64 (N, D) and labels (N,), or HFViTError."""
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise HFViTError(
            f"a probe takes features (N, D) and labels (N,), N > 0; got {features.shape} and {labels.shape}"
        )
    if not np.isfinite(features).all():
        raise HFViTError(f"{int((~np.isfinite(features)).any(1).sum())} rows of the features are not finite")
    return features, labels


def choose_shots(labels: np.ndarray, seed: int, shots: int) -> np.ndarray:
    """Rows of `shots` images per class, in big_vision's order for this seed; smaller sets lie within larger ones."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)])


def few_shot(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    shots: Sequence[int],
    seeds: Sequence[int] = SEEDS,
    l2: float = L2,
) -> list[dict[str, Any]]:
    """The official protocol: one probe per seed and number of images per class.

    Args:
        shots: images per class, such as 1, 5, 10, 25; numbers that some class does not have are left out.

    Returns:
        {"shots", "seed", "accuracy", "n"} of each probe.

    Raises:
        HFViTError: a class has fewer images than any of `shots`; invalid features.
    """
    train_features, train_labels = checked_features(train_features, train_labels)
    test_features, test_labels = checked_features(test_features, test_labels)
    scarcest = int(np.unique(train_labels, return_counts=True)[1].min())
    usable = [count for count in shots if 1 <= count <= scarcest]
    if not usable:
        raise HFViTError(
            f"few-shot with {', '.join(map(str, shots))} images per class: the scarcest class has {scarcest}"
        )
    rows = []
    for seed in seeds:
        for count in usable:
            sample = choose_shots(train_labels, seed, count)
            probe = RidgeProbe(l2).fit(train_features[sample], train_labels[sample])
            value = probe.score(test_features, test_labels)
            rows.append({"shots": count, "seed": seed, "accuracy": value, "n": len(test_labels)})
    return rows
