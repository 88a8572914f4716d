"""The charts of report.html, from arrays: learning curves, reliability, predictions against true values.

They are small, to be readable on a phone, and hold a bounded number of points, whatever the length of the run.

Tests: tests/training/reporting/test_report_page.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_vit.html_page import COLORS, FAINT, INK


MAX_POINTS = 400  # of a curve; of more, evenly spaced ones are shown
MAX_DOTS = 1500  # of a scatter plot
CONFIDENCE_BINS = 10


def chart(title: str, x: str, y: str, height: float = 2.5) -> tuple[Figure, Any]:
    """An empty chart, in colors that the page replaces by those of its theme."""
    figure = Figure(figsize=(3.6, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, size=9.5, color=INK)
    axes.set_xlabel(x, size=8.5, color=INK)
    axes.set_ylabel(y, size=8.5, color=INK)
    axes.tick_params(labelsize=8, labelcolor=INK, color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color=FAINT, alpha=0.3, linewidth=0.6)
    return figure, axes


def thinned(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly spaced, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def draw_history(history: Sequence[dict[str, Any]], names: Sequence[str], title: str) -> Figure | None:
    """Values of a run over its steps, one line per name; None if there are no values."""
    figure, axes = chart(title, "step", "")
    for number, name in enumerate(names):
        points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
        points = [points[place] for place in thinned(len(points), MAX_POINTS)] if points else []
        if points:
            marked = "o" if len(points) <= 30 and name.startswith("eval_") else None
            label = "evaluation" if name.startswith("eval_") else "training"
            axes.plot(*zip(*points), color=COLORS[number], linewidth=1.5, marker=marked, markersize=3, label=label)
    if not axes.lines:
        return None
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def draw_reliability(confidence: np.ndarray, right: np.ndarray, x: str, y: str) -> Figure:
    """Fraction of right answers (N,) over confidence (N,), in bins of equal width; dots grow with the bin."""
    figure, axes = chart("reliability", x, y, 3.3)
    index = np.clip(np.ceil(confidence * CONFIDENCE_BINS).astype(int) - 1, 0, CONFIDENCE_BINS - 1)
    count = np.bincount(index, minlength=CONFIDENCE_BINS)
    filled = count > 0
    means = [np.bincount(index, values, CONFIDENCE_BINS)[filled] / count[filled] for values in (confidence, right)]
    axes.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1)
    axes.plot(*means, color=COLORS[0], linewidth=1.5)
    axes.scatter(*means, s=8 + 80 * count[filled] / count.max(), color=COLORS[0])
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return figure


def draw_confidence(confidence: np.ndarray, right: np.ndarray, x: str) -> Figure:
    """Histogram of confidence (N,), for right (N,) and wrong answers."""
    figure, axes = chart("how often", x, "", 3.3)
    parts = [confidence[right], confidence[~right]]
    axes.hist(parts, bins=20, range=(0, 1), stacked=True, color=[COLORS[2], COLORS[3]], label=["true", "false"])
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def draw_scatter(true: np.ndarray, predicted: np.ndarray, name: str) -> Figure:
    """Predicted over true values (N,); on the dashed line they are equal."""
    figure, axes = chart(name, "true", "predicted", 3.3)
    shown = thinned(len(true), MAX_DOTS)
    low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    axes.plot([low, high], [low, high], color=FAINT, linestyle="--", linewidth=1)
    axes.scatter(true[shown], predicted[shown], s=9, color=COLORS[0], alpha=0.6, linewidths=0)
    return figure


def draw_residuals(residuals: np.ndarray, name: str) -> Figure:
    """Histogram of the residuals (N,), predicted minus true."""
    figure, axes = chart(name, "predicted - true", "images", 3.3)
    axes.hist(residuals, bins=min(30, max(5, len(residuals) // 5)), color=COLORS[0])
    axes.axvline(0, color=FAINT, linewidth=1)
    return figure
