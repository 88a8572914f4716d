"""Parts of a data set that are held out: a dev split, a fold of a cross-validation.

For splits.py. All are stratified, and the same for the same data and seed.

Tests: tests/training/data/test_dataset.py.
"""

import warnings
from dataclasses import replace

import numpy as np

from hf_vit.errors import HFViTError

from ..rng import FOLDS, generator
from .dataset import ImageDataset, holds_classes
from .strata import nested_subset, rows_by_label, strata


def carve_dev_split(dataset: ImageDataset, fraction: float = 0.1, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
    """Split off a stratified dev set, the same for the same data and seed.

    The only image of a class stays in train. (scikit-learn's `train_test_split` refuses such a class.)

    Returns:
        (train, dev), disjoint; together they are `dataset`.

    Raises:
        HFViTError: too few images to leave one on each side.
    """
    if not 0.0 < fraction < 1.0:
        raise HFViTError(f"the dev split's fraction must lie in (0, 1), got {fraction}")
    count = max(1, round(fraction * len(dataset)))
    if count >= len(dataset):
        raise HFViTError(f"'{dataset.name}' has {len(dataset)} images, too few to carve a dev split out of them")
    held_out = np.zeros(len(dataset), dtype=bool)
    if dataset.groups is None:
        held_out[nested_subset(dataset.labels, ~seed, count)] = True  # ~seed: another choice than take_fraction's
    else:
        smaller = min(fraction, 1 - fraction)
        numbers = group_fold_numbers(dataset, max(2, round(1 / smaller)), seed, exactly=False)
        held_out = numbers == 1 if fraction <= 0.5 else numbers > 1
    if holds_classes(dataset):
        held_out &= np.bincount(dataset.labels)[dataset.labels] > 1
    if not held_out.any():
        raise HFViTError(f"'{dataset.name}' has one image in each class, too few to carve a dev split out of them")
    train, dev = dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))
    text = f"{100 * fraction:g}% carved with seed {seed}"
    return replace(train, split=f"{dataset.split} without {text}"), replace(dev, split=f"{dataset.split}, {text}")


def take_fold(dataset: ImageDataset, folds: int, fold: int, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
    """Hold out one of `folds` stratified parts, the same for the same data and seed; the parts are disjoint.

    The only image of a class is in no part, and always trained on.

    Args:
        fold: 1 to `folds`.

    Returns:
        (train, held out); together they are `dataset`.

    Raises:
        HFViTError: a class with fewer images than folds.
    """
    numbers = fold_numbers(dataset, folds, seed)
    train, held_out = (dataset.select(np.flatnonzero(part)) for part in (numbers != fold, numbers == fold))
    if not len(held_out):
        raise HFViTError(f"'{dataset.name}' has {len(dataset)} images, too few for --folds {folds}")
    which = f"fold {fold} of {folds}"
    return replace(train, split=f"{dataset.split} without {which}"), replace(
        held_out, split=f"{dataset.split}, {which}"
    )


def fold_numbers(dataset: ImageDataset, folds: int, seed: int = 0) -> np.ndarray:
    """The fold (1 to `folds`) that each image is held out in, int64 (n,); 0 for the only image of a class.

    Not scikit-learn's StratifiedKFold, which holds out single images with a warning. Labels that are not classes are
    not stratified.

    Raises:
        HFViTError: a class with more than one image, and fewer images than folds.
    """
    if dataset.groups is not None:
        return group_fold_numbers(dataset, folds, seed)
    labels = dataset.labels if holds_classes(dataset) else np.zeros(len(dataset), dtype=np.int64)
    numbers, dealt = np.zeros(len(dataset), dtype=np.int64), 0
    for label, rows in rows_by_label(labels):
        if len(rows) == 1:
            continue
        if len(rows) < folds:
            raise HFViTError(
                f"--folds {folds} is above the {len(rows)} images of class '{dataset.label_names[label]}' of "
                f"'{dataset.name}': give --folds {len(rows)} or less, or leave the class out"
            )
        shuffled = generator(FOLDS, seed, label).permutation(rows)
        numbers[shuffled] = (
            dealt + np.arange(len(rows))
        ) % folds + 1  # continued from class to class, so that folds are equally large
        dealt += len(rows)
    return numbers


def group_fold_numbers(dataset: ImageDataset, folds: int, seed: int, exactly: bool = True) -> np.ndarray:
    """As `fold_numbers`, with all images of a group in one fold, and stratified as far as possible.

    By scikit-learn's StratifiedGroupKFold. 0 for groups that hold all images of a class, which are always trained on.

    Args:
        exactly: False allows fewer folds, for data of few groups.

    Raises:
        HFViTError: fewer groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    assert dataset.groups is not None
    _, groups = np.unique(dataset.groups, return_inverse=True)
    classes = strata(dataset.labels)
    free = np.ones(len(dataset), dtype=bool)
    for _, rows in rows_by_label(classes) if holds_classes(dataset) else ():
        if len(np.unique(groups[rows])) == 1:
            free &= groups != groups[rows[0]]
    count = len(np.unique(groups[free]))
    option = f"--folds {folds}" if exactly else "--group_column"
    folds = folds if exactly else min(folds, count)  # of few groups a larger part is held out
    if folds < 2 or count < folds:
        raise HFViTError(
            f"{option} divides groups, and '{dataset.name}' has {count:,} that can be held out (each class has to be "
            "in two groups): give fewer folds or another --group_column"
        )
    numbers = np.zeros(len(dataset), dtype=np.int64)
    rows = np.flatnonzero(free)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class in fewer groups than folds, which the summary names
        for number, (_, held_out) in enumerate(splitter.split(rows, classes[rows], groups[rows]), start=1):
            numbers[rows[held_out]] = number
    return numbers
