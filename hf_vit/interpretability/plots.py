"""Draw the results of `attention`, `relevance` and `perturbation`: arrays in, images and matplotlib figures out.

With the Agg canvas, not pyplot: no display is needed and no global state changes. Needs matplotlib (`pip install
"hf-vit[inspect]"`).
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import HFViTError
from ..html_page import COLORS, FAINT, INK
from ..plot_text import plain_text


HEAT, NORMS = "inferno", "viridis"  # colormaps


# -- from the grid of patches to the original image ---------------------------------------------------------------


@dataclass(frozen=True)
class PlotView:
    """The part of an image that a model sees: a window, resized to the model's input.

    Attributes:
        image_size: (height, width) of the original. model_size: (height, width) of the model's input.
        window: (top, left, height, width) in pixels of the original, as real numbers.
    """

    image_size: tuple[int, int]
    model_size: tuple[int, int]
    window: tuple[float, float, float, float]


def view_of(settings: Mapping[str, Any], image_size: tuple[int, int]) -> PlotView:
    """The window of an image processor with these settings, in an image of (height, width).

    `size` is {"height", "width"} (the whole image, squashed) or {"shortest_edge"}; then a center crop of `crop_size`.
    """
    height, width = image_size
    size = settings["size"]
    if settings.get("do_resize") is False:
        resized = height, width
    elif "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        long = int(edge * max(height, width) / min(height, width))
        resized = (edge, long) if height <= width else (long, edge)
    else:
        resized = int(size["height"]), int(size["width"])
    if not settings.get("do_center_crop"):
        return PlotView(image_size, resized, (0.0, 0.0, float(height), float(width)))
    crop = int(settings["crop_size"]["height"]), int(settings["crop_size"]["width"])
    down, across = height / resized[0], width / resized[1]
    top, left = (resized[0] - crop[0]) // 2 * down, (resized[1] - crop[1]) // 2 * across
    return PlotView(image_size, crop, (top, left, crop[0] * down, crop[1] * across))


def on_image(heat: np.ndarray, stride: tuple[int, int], view: PlotView, smooth: bool = True) -> np.ndarray:
    """Resample a map over patches `(rows, columns)` to the pixels of the original image, `(height, width)`.

    Interpolated linearly between the patches' centers, constant beyond the outermost; NaN outside the window, and at
    the right and the bottom where there is no whole patch.

    Args:
        stride: pixels of the model's input from patch to patch, (down, across).
        smooth: False draws each patch in one value.
    """
    top, left, height, width = view.window
    sides = []
    for axis, (start, length) in enumerate(((top, height), (left, width))):
        positions = (np.arange(view.image_size[axis]) + 0.5 - start) * view.model_size[axis] / length
        covered = min(heat.shape[axis] * stride[axis], view.model_size[axis])
        patches = positions / stride[axis] - 0.5
        weights = _linear(patches if smooth else patches.round(), heat.shape[axis])
        sides.append((weights, (positions >= 0) & (positions < covered)))
    (vertical, inside_rows), (horizontal, inside_columns) = sides
    resampled = vertical @ np.asarray(heat, dtype=np.float64) @ horizontal.T
    return np.where(inside_rows[:, None] & inside_columns, resampled, np.nan)


def _linear(positions: np.ndarray, cells: int) -> np.ndarray:
    """Weights `(positions, cells)` of linear interpolation at positions in units of cells."""
    positions = positions.clip(0, cells - 1)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(cells)))


def colors_on_image(colors: np.ndarray, stride: tuple[int, int], view: PlotView) -> np.ndarray:
    """Colors of patches `(rows, columns, 3)` in [0, 1] -> `(height, width, 3)` uint8, white outside the window."""
    channels = [on_image(colors[..., channel], stride, view, smooth=False) for channel in range(3)]
    return (np.nan_to_num(np.stack(channels, axis=-1), nan=1.0) * 255).round().astype(np.uint8)


def enlarged(image: np.ndarray, least: int) -> np.ndarray:
    """An image `(H, W, C)`, enlarged by a whole factor if its longer side is below `least` pixels."""
    factor = max(1, round(least / max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def scaled(heat: np.ndarray) -> np.ndarray:
    """Scale to [0, 1] by the smallest and largest finite value; a constant map becomes 0."""
    finite = heat[np.isfinite(heat)]
    if not finite.size:
        raise HFViTError("the map has no finite value")
    return (heat - finite.min()) / max(finite.max() - finite.min(), 1e-12)


def overlay(image: np.ndarray, heat: np.ndarray, strength: float = 0.75) -> np.ndarray:
    """Blend a heat map with an image of the same size: `(H, W, 3)` uint8 and `(H, W)` -> `(H, W, 3)` uint8.

    The image is faded where the map is NaN.
    """
    if image.shape[:2] != heat.shape:
        raise HFViTError(f"the image has {image.shape[:2]} pixels, the map {heat.shape}: use on_image first")
    gray = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    level = scaled(heat)
    inside = np.isfinite(level)[..., None]
    level = np.nan_to_num(level)
    color = matplotlib.colormaps[HEAT](level)[..., :3] * 255
    opacity = strength * (0.4 + 0.6 * level[..., None])  # lower where the map is low, so that the image shows
    mixed = (1 - opacity) * (0.5 * image + 0.5 * gray) + opacity * color
    return np.where(inside, mixed, 0.35 * gray + 0.65 * 255).round().clip(0, 255).astype(np.uint8)


def colored(values: np.ndarray, colors: str, proportion: float, side: int = 160) -> np.ndarray:
    """A map `(rows, columns)` in a colormap over its own range: uint8 `(H, W, 3)`, `side` pixels wide.

    Args:
        proportion: height over width of the result.
    """
    height, width = max(1, round(side * proportion)), side
    down, across = (np.arange(size) * cells // size for size, cells in zip((height, width), values.shape))
    return (matplotlib.colormaps[colors](scaled(values))[..., :3] * 255).round().astype(np.uint8)[down][:, across]


# -- pages ----------------------------------------------------------------------------------------------------------


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the file's suffix (png, svg, pdf)."""
    with plain_text(figure):
        figure.savefig(path, facecolor="white")


def _page(width: float, height: float, **options: Any) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def _cell(side: float, proportion: float) -> tuple[float, float]:
    """Width and height in inches of a map of that height over width: the longer side is `side`, or half more."""
    long = side * min(max(proportion, 1 / proportion), 1.5)
    return (long / proportion, long) if proportion > 1 else (long, max(long * proportion, 0.25 * side))


def _bare(axes: Any, image: np.ndarray, title: str = "", size: float = 9.0, **options: Any) -> None:
    axes.imshow(image, interpolation=options.pop("interpolation", "nearest"), **options)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, size=size, color=INK)


def draw_table(
    rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str], names: Sequence[str] = (), title: str = ""
) -> Figure:
    """Images in rows and columns, each with its own shape; names at the left, column titles at the top."""
    shapes = [max(row[0].shape[0] / row[0].shape[1], 0.3) for row in rows]
    side = 2.1
    figure = _page(side * len(columns), sum(side * shape + 0.15 for shape in shapes) + 0.4)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, gridspec_kw={"height_ratios": shapes})
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            _bare(grid[number, column], image, columns[column] if number == 0 else "")
        if names:
            grid[number, 0].set_ylabel(names[number], size=8, color=INK)
    if title:
        figure.suptitle(title, size=11, color=INK)
    return figure


def draw_examples(
    columns: Sequence[Sequence[np.ndarray]], titles: Sequence[str], names: Sequence[str], most: int = 6
) -> Figure:
    """A column for each image, its title above and its maps below, wrapped after `most` columns.

    Args:
        columns: each image and its maps, `(H, W, 3)`; images may differ in proportions.
        names: of the rows, at the left.
    """
    bands = [range(start, min(start + most, len(columns))) for start in range(0, len(columns), most)]
    tall = [max(columns[index][0].shape[0] / columns[index][0].shape[1] for index in band) for band in bands]
    ratios = [min(max(shape, 0.3), 2.0) for shape in tall for _ in names]
    across, side = len(bands[0]), 1.6
    figure = _page(side * across + 0.3, side * sum(ratios) + 0.3 * len(bands))
    grid = figure.subplots(len(ratios), across, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for axes in grid.flat:
        axes.axis("off")
    for number, band in enumerate(bands):
        for column, index in enumerate(band):
            for row, image in enumerate(columns[index]):
                axes = grid[number * len(names) + row, column]
                axes.axis("on")
                axes.set_anchor("N")
                _bare(axes, image, textwrap.fill(titles[index], 18) if row == 0 else "", 9)
                if column == 0:
                    axes.set_ylabel(names[row], size=9, color=INK)
    return figure


def draw_attention_heads(
    maps: Mapping[int, np.ndarray],
    title: str = "",
    numbers: Sequence[int] | None = None,
    proportion: float | None = None,
) -> Figure:
    """One map for each block (rows) and head (columns); `{layer: (heads, rows, columns)}`, each with its own scale.

    Args:
        numbers: of the heads; default: from 0.
        proportion: height over width of the window of the image; default: that of the grid of patches.
    """
    layers = list(maps)
    heads, rows, columns = maps[layers[0]].shape
    numbers = range(heads) if numbers is None else numbers
    proportion = rows / columns if proportion is None else proportion
    wide, tall = _cell(1.15, proportion)
    figure = _page(wide * heads + 0.6, tall * len(layers) + 0.7)
    grid = figure.subplots(len(layers), heads, squeeze=False)
    options = {"cmap": HEAT, "aspect": proportion * columns / rows}
    for number, layer in enumerate(layers):
        for head in range(heads):
            _bare(grid[number, head], maps[layer][head], f"head {numbers[head]}" if number == 0 else "", 8, **options)
        grid[number, 0].set_ylabel(f"block {layer}", size=8, color=INK)
    if title:
        figure.suptitle(title, size=10, color=INK)
    return figure


def draw_filters(components: np.ndarray, explained: np.ndarray, title: str = "") -> Figure:
    """Principal components of the embedding filters, `(n, C, height, width)` in [0, 1]; color for three channels."""
    count, channels = components.shape[:2]
    columns = min(7, count)
    lines = -(-count // columns)
    figure = _page(0.62 * columns, 0.62 * lines + 0.5)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for number, component in enumerate(components):
        tile = component.transpose(1, 2, 0) if channels == 3 else component.mean(axis=0)
        _bare(grid.flat[number], tile, cmap="gray")
    figure.suptitle(
        f"{title}RGB embedding filters: {count} principal components, {explained.sum():.0%} of variance"
        if channels == 3
        else f"{title}embedding filters: {count} principal components, {explained.sum():.0%} of variance",
        size=8, color=INK,
    )  # fmt: skip
    return figure


def draw_position_similarity(similarity: np.ndarray, title: str = "", most: int = 14) -> Figure:
    """A tile for every position: its embedding's cosine similarity with all others, `(rows, columns, rows, columns)`.

    At most `most` positions per side are drawn, evenly spaced.
    """
    rows, columns = similarity.shape[:2]
    down = np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(int))
    across = np.unique(np.linspace(0, columns - 1, min(columns, most)).round().astype(int))
    gap = max(1, round(0.12 * max(rows, columns)))  # one image of all tiles: a hundred axes take minutes to lay out
    sheet = np.full((len(down) * (rows + gap) - gap, len(across) * (columns + gap) - gap), np.nan)
    for line, row in enumerate(down):
        for index, column in enumerate(across):
            top, left = line * (rows + gap), index * (columns + gap)
            sheet[top : top + rows, left : left + columns] = similarity[row, column]
    figure = _page(4.4, max(3.6 * sheet.shape[0] / sheet.shape[1], 1.4) + 0.4)
    axes = figure.subplots()
    _bare(axes, sheet, f"{title}position embedding similarity, {rows} x {columns}", 9.5, vmin=-1, vmax=1, cmap=NORMS)
    axes.set_xticks(np.arange(len(across)) * (columns + gap) + (columns - 1) / 2, [str(n + 1) for n in across])
    axes.set_yticks(np.arange(len(down)) * (rows + gap) + (rows - 1) / 2, [str(n + 1) for n in down])
    axes.tick_params(length=0, labelsize=7, labelcolor=FAINT)
    bar = figure.colorbar(axes.images[0], ax=axes, shrink=0.7)
    bar.set_label("cosine similarity", size=8, color=INK)
    bar.ax.tick_params(labelsize=7.5, labelcolor=INK, color=FAINT)
    return figure


def draw_attention_distance(distances: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """Mean attention distance of every head by depth: `{model: (layers, heads)}`, pixels."""
    figure = _page(4.4, 3.5)
    axes = figure.subplots()
    for number, (name, table) in enumerate(distances.items()):
        depth = np.repeat(np.arange(len(table))[:, None], table.shape[1], axis=1)
        shift = 0.16 * (number - (len(distances) - 1) / 2)
        color = COLORS[number % len(COLORS)]
        axes.scatter(depth + shift, table, s=14, color=color, alpha=0.75, linewidths=0, label=name)
        axes.plot(depth[:, 0] + shift, table.mean(axis=1), color=color, lw=1)
    axes.set_ylim(0, 1.06 * max(table.max() for table in distances.values()))
    longest = max(len(table) for table in distances.values())
    _quiet(axes, "block (a point for each head, the line is their mean)", "mean attention distance (pixels)")
    axes.set_xticks(range(0, longest, max(1, longest // 12)))
    if len(distances) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    axes.set_title(title or "attention distance", size=9.5, color=INK)
    return figure


def _quiet(axes: Any, x: str, y: str) -> None:
    """Labels and axes in the colors that a page replaces by those of its theme."""
    axes.set_xlabel(x, size=8.5, color=INK)
    axes.set_ylabel(y, size=8.5, color=INK)
    axes.tick_params(labelsize=8, labelcolor=INK, color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def draw_curves(fractions: np.ndarray, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str = "") -> Figure:
    """Deletion and insertion side by side: `{method: (deletion, insertion)}`, each `(S + 1,)`; areas in the legend."""
    figure = _page(8.4, 3.3 + 0.17 * len(curves))
    for which, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        _draw_curve(axes, which, fractions, curves)
    if title:
        figure.suptitle(title, size=10, color=INK)
    return figure


def draw_curve_of(which: int, fractions: np.ndarray, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Only deletion (0) or insertion (1), in a figure of its own; arguments as in `draw_curves`."""
    figure = _page(4.0, 3.0 + 0.17 * len(curves))
    _draw_curve(figure.subplots(), which, fractions, curves)
    return figure


def _draw_curve(axes: Any, which: int, fractions: np.ndarray, curves: Mapping[str, tuple]) -> None:
    for number, (method, pair) in enumerate(curves.items()):
        width = 1.2 + 0.7 * max(0, 3 - number)  # equal curves overlap: the wider one below stays visible
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "lw": width}
        if method == "random":
            style = {"color": FAINT, "lw": 1.2, "ls": "--"}
        area = np.trapezoid(pair[which], fractions)
        axes.plot(fractions, pair[which], label=f"{method.replace('_', ' ')}  {area:.3f}", **style)
    name, better, verb = (("deletion", "smaller", "taken out"), ("insertion", "larger", "put in"))[which]
    _quiet(axes, f"fraction of patches {verb}", "probability of the class")
    axes.set_ylim(0, 1.02)
    axes.set_title(f"{name}: area, {better} is better", size=9, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), labelcolor=INK)


def draw_norms(norms: Mapping[int, np.ndarray], title: str = "", proportion: float | None = None) -> Figure:
    """Lengths of the patch tokens after chosen blocks, `{layer: (rows, columns)}`, one color scale each.

    `proportion`: as in `draw_attention_heads`.
    """
    rows, columns = next(iter(norms.values())).shape
    proportion = rows / columns if proportion is None else proportion
    wide, tall = _cell(1.9, proportion)
    figure = _page((max(wide, 1.6) + 0.6) * len(norms) + 0.3, tall + 0.8)
    options = {"cmap": NORMS, "aspect": proportion * columns / rows}
    for axes, (layer, values) in zip(figure.subplots(1, len(norms), squeeze=False)[0], norms.items()):
        _bare(axes, values, f"block {layer}\nlargest / median {values.max() / np.median(values):.1f}", 8, **options)
        figure.colorbar(axes.images[0], ax=axes, shrink=0.75).ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, size=10, color=INK)
    return figure
