"""per_class.csv: the scores of each class, and the class that it is taken for most often.

Tests: tests/training/test_score.py.
"""

import csv
import io
from pathlib import Path

import numpy as np

from hf_vit.atomic_file import atomic_write

from ..metrics.metric_state import Metrics


PER_CLASS_NAME = "per_class.csv"


def write_per_class(path: Path, metrics: Metrics, names: list[str]) -> None:
    """CSV with one line per class: images, hits, recall with 95 % interval, precision, F1, most frequent confusion.

    The accuracy within a class is its recall. A value that is not defined is empty.
    """
    from ..metrics.accuracy.accuracy import wilson_interval  # with it comes `evaluate`, which takes seconds to import

    precision, recall, f1 = metrics.precision_recall_f1()
    support, hits, confused = metrics.support, metrics.hits, metrics.most_confused()
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow(["class", "n", "correct", "recall", "recall_low", "recall_high", "precision", "f1", "taken_for"])
    for number, name in enumerate(names):
        interval = wilson_interval(hits[number], support[number]) if support[number] else (np.nan, np.nan)
        scores = (recall[number], *interval, precision[number], f1[number])
        scores = ["" if np.isnan(score) else f"{score:.6f}" for score in scores]
        taken = taken_for(confused, names, number)
        lines.writerow([name, int(support[number]), int(hits[number]), *scores, taken])
    # names of folders may not be UTF-8
    atomic_write(path, text.getvalue().encode("utf-8", errors="backslashreplace"))


def taken_for(confused: dict[int, tuple[int, int]], names: list[str], number: int) -> str:
    """The class that a class is most often taken for, with the count; `confused` is `Metrics.most_confused()`."""
    if number not in confused:
        return ""
    other, count = confused[number]
    return f"taken for {names[other]} {'once' if count == 1 else f'{count} times'}"
