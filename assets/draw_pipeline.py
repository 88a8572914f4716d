"""Draws assets/pipeline.svg, the image of README.md: python assets/draw_pipeline.py

The digit is one of scikit-learn's, the letter one of training.synthetic's; the rest is boxes and arrows.
"""

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from sklearn.datasets import load_digits


sys.path.insert(0, str(Path(__file__).parent.parent))
from training.data.synthetic import SyntheticImages


INK, FAINT, BLUE, ORANGE, GREEN, PAPER = "#1f2933", "#8895a3", "#3d6fb4", "#d9822b", "#3f8f5f", "#ffffff"
matplotlib.rcParams.update(
    {"font.family": "DejaVu Sans", "font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "hf_vit"}
)


def box(axes, x, y, width, height, text="", color=BLUE, filled=False, size=10.0, **options):
    """A rounded box with text in its middle."""
    rounded = "round,pad=0,rounding_size=0.09"
    style = FancyBboxPatch(
        (x, y), width, height, boxstyle=rounded, lw=1.4, ec=color, fc=color if filled else PAPER,
        **options,
    )  # fmt: skip
    axes.add_patch(style)
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", color=PAPER if filled else INK, size=size,
        linespacing=1.35,
    )  # fmt: skip


def arrow(axes, start, end, color=INK, **options):
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, lw=1.3, color=color, shrinkA=0, shrinkB=0, **options
        )
    )


def image(axes, pixels, x, y, side, grid, color=INK):
    """An image with the grid of its patches over it."""
    axes.imshow(
        pixels, extent=(x, x + side, y, y + side), cmap="gray_r", interpolation="nearest", zorder=1, aspect="auto"
    )
    for step in range(grid + 1):
        at = step * side / grid
        axes.plot([x + at, x + at], [y, y + side], color=color, lw=0.8, zorder=2)
        axes.plot([x, x + side], [y + at, y + at], color=color, lw=0.8, zorder=2)


def digit_at(pixels, size):
    """A digit enlarged, without smoothing."""
    return np.kron(pixels, np.ones((size // 8, size // 8)))


def network(axes, digit):
    """Upper half: the equations of the paper from left to right."""
    axes.text(0.1, 5.62, "The network", weight="bold", size=12.5, color=INK)
    image(axes, digit, 0.15, 3.55, 1.5, 3, BLUE)
    axes.text(0.9, 3.3, "image, cut into patches", ha="center", size=9, color=FAINT)
    arrow(axes, (1.75, 4.5), (2.2, 4.5))
    box(axes, 2.25, 4.15, 1.35, 0.7, "linear\nprojection")
    box(axes, 2.25, 2.95, 1.35, 0.7, "hybrid: ResNet,\nthen projection", ORANGE, size=8.6, linestyle=(0, (4, 2)))
    arrow(axes, (1.75, 4.1), (2.22, 3.4), ORANGE, linestyle=(0, (4, 2)))
    arrow(axes, (3.6, 4.5), (4.05, 4.5))
    arrow(axes, (3.6, 3.4), (4.05, 4.1), ORANGE, linestyle=(0, (4, 2)))
    cells = digit.reshape(3, 8, 3, 8).transpose(0, 2, 1, 3).reshape(9, 8, 8)
    for number in range(10):
        y = 5.25 - number * 0.252
        if number == 0:
            box(axes, 4.12, y, 0.22, 0.22, "*", GREEN, filled=True, size=10)
        else:
            axes.imshow(
                cells[number - 1],
                extent=(4.12, 4.34, y, y + 0.22),
                cmap="gray_r",
                vmin=0,
                vmax=16,
                aspect="auto",
                zorder=1,
            )
            axes.add_patch(Rectangle((4.12, y), 0.22, 0.22, fill=False, ec=BLUE, lw=1))
        axes.text(4.43, y + 0.1, f"+ {number}", size=8, va="center", color=GREEN if number == 0 else BLUE)
    axes.text(
        4.42, 2.72, "class token and patches,\neach with its position", ha="center", va="top", size=9, color=FAINT
    )
    arrow(axes, (4.85, 4.5), (5.3, 4.5))
    axes.add_patch(
        FancyBboxPatch(
            (5.35, 3.1), 3.6, 2.35, boxstyle="round,pad=0,rounding_size=0.12", fc="#f3f6fa", ec=FAINT, lw=1.1
        )
    )
    axes.text(8.8, 5.2, "L blocks", ha="right", size=9.5, color=FAINT)
    for x, name, color in ((5.6, "norm", FAINT), (6.3, "attention", BLUE), (7.35, "norm", FAINT), (8.05, "MLP", BLUE)):
        width = {"norm": 0.55, "attention": 0.9, "MLP": 0.65}[name]
        box(axes, x, 4.2, width, 0.6, name, color, filled=name != "norm", size=9.5)
    for start, end in (
        ((5.38, 4.5), (5.6, 4.5)),
        ((6.15, 4.5), (6.3, 4.5)),
        ((7.2, 4.5), (7.35, 4.5)),
        ((7.9, 4.5), (8.05, 4.5)),
    ):
        arrow(axes, start, end)
    for start, end in ((5.48, 7.28), (7.28, 8.85)):
        axes.plot([start, start, end, end], [4.5, 3.6, 3.6, 4.44], color=INK, lw=1.2)
        axes.plot([end], [4.5], marker="o", ms=7.5, mfc=PAPER, mec=INK, mew=1.1, zorder=5)
        axes.text(end, 4.492, "+", ha="center", va="center", size=7.5, zorder=6)
    axes.text(7.15, 3.32, "each adds to what came in", ha="center", size=9, color=FAINT)
    axes.plot([8.7, 8.8], [4.5, 4.5], color=INK, lw=1.3)
    arrow(axes, (8.9, 4.5), (9.35, 4.5))
    box(axes, 9.4, 4.15, 0.95, 0.7, "norm,\npooling", GREEN)
    arrow(axes, (10.35, 4.5), (10.7, 4.5))
    box(axes, 10.75, 4.15, 0.7, 0.7, "head", ORANGE, filled=True)
    arrow(axes, (11.45, 4.5), (11.75, 4.5))
    for number, share in enumerate((0.06, 0.09, 0.75, 0.12, 0.05)):
        y = 5.02 - number * 0.24
        axes.add_patch(Rectangle((11.85, y), share, 0.17, color=ORANGE if share > 0.5 else "#e8c9a8"))
    axes.text(12.2, 3.6, "classes", ha="center", size=9, color=FAINT)


def job(axes, letter, digit):
    """Lower half: what `make quickstart` does."""
    axes.text(0.1, 2.08, "The main job", weight="bold", size=12.5, color=INK)
    image(axes, letter, 0.15, 0.55, 0.95, 4, BLUE)
    axes.text(0.62, 0.28, "letters, 16 px", ha="center", size=9, color=FAINT)
    arrow(axes, (1.2, 1.02), (1.6, 1.02))
    box(axes, 1.65, 0.67, 1.45, 0.7, "pre-train")
    arrow(axes, (3.1, 1.02), (3.5, 1.02))
    ramp = np.add.outer(np.cos(np.linspace(0, 3, 4)), np.sin(np.linspace(0, 3, 4)))
    fine = np.add.outer(np.cos(np.linspace(0, 3, 6)), np.sin(np.linspace(0, 3, 6)))
    for x, table, name in ((3.55, ramp, "4 x 4"), (4.75, fine, "6 x 6")):
        axes.imshow(table, extent=(x, x + 0.8, 0.62, 1.42), cmap="Blues", aspect="auto", interpolation="nearest")
        axes.add_patch(Rectangle((x, 0.62), 0.8, 0.8, fill=False, ec=BLUE, lw=1.1))
        axes.text(x + 0.4, 1.5, name, ha="center", size=8.5, color=BLUE)
    arrow(axes, (4.37, 1.02), (4.72, 1.02), BLUE)
    axes.text(4.55, 0.28, "positions re-fitted, head replaced", ha="center", size=9, color=FAINT)
    arrow(axes, (5.58, 1.02), (5.95, 1.02))
    box(axes, 6.0, 0.67, 1.45, 0.7, "fine-tune", ORANGE, filled=True)
    image(axes, digit, 6.25, 1.5, 0.62, 6, ORANGE)
    axes.text(6.95, 1.8, "digits,\n24 px", va="center", size=9, color=FAINT)
    arrow(axes, (7.45, 1.02), (7.85, 1.02))
    box(axes, 7.9, 0.42, 2.05, 1.2, "one folder\nweights, code, image\nprocessor, card, facts", GREEN, size=9)
    arrow(axes, (9.95, 1.02), (10.35, 1.02))
    box(axes, 10.4, 0.42, 2.1, 1.2, "loads anywhere\nAutoModel..., pipeline,\nthe Hub", INK, size=9)


def main() -> None:
    figure, axes = plt.subplots(figsize=(12.7, 5.9))
    digit = load_digits().images[3]
    letter = np.asarray(SyntheticImages("glyphs", 52, 4, 16, 0)[0]["image"]).mean(-1)
    network(axes, digit_at(digit, 24))
    axes.plot([0.1, 12.55], [2.36, 2.36], color="#d5dbe1", lw=1)
    job(axes, letter, digit)
    axes.set(xlim=(0, 12.7), ylim=(0.1, 5.95))
    axes.axis("off")
    figure.subplots_adjust(left=0, right=1, top=1, bottom=0)
    figure.patch.set_facecolor(PAPER)
    figure.savefig(Path(__file__).with_name("pipeline.svg"), dpi=110, metadata={"Date": None})


if __name__ == "__main__":
    main()
