"""Maps land on the right pixels of the original image, and every figure is drawn, also without a display.

python -m pytest tests/hf_vit/interpretability/test_plots.py
"""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTError
from hf_vit.interpretability.plots import (
    PlotView,
    colors_on_image,
    draw_attention_distance,
    draw_attention_heads,
    draw_curves,
    draw_examples,
    draw_filters,
    draw_norms,
    draw_position_similarity,
    draw_table,
    enlarged,
    on_image,
    overlay,
    save,
    scaled,
    view_of,
)
from tests.conftest import ROOT


def one_hot(rows, columns, row, column):
    heat = np.zeros((rows, columns))
    heat[row, column] = 1
    return heat


def center(heat):
    """Center of mass of a map over pixels, in pixels from the upper left corner."""
    heat = np.nan_to_num(heat)
    y, x = np.mgrid[: heat.shape[0], : heat.shape[1]] + 0.5
    return (heat * y).sum() / heat.sum(), (heat * x).sum() / heat.sum()


@pytest.mark.parametrize("size", [(64, 96), (300, 120), (31, 57)])
def test_a_patch_lands_where_it_was_cut(size):
    """Squashed from any size and shape to 32 x 48 px with patches of 8."""
    view = view_of({"size": {"height": 32, "width": 48}}, size)
    found = on_image(one_hot(4, 6, 2, 1), (8, 8), view)
    assert found.shape == size and np.isfinite(found).all()
    expected = 2.5 / 4 * size[0], 1.5 / 6 * size[1]
    assert center(found) == pytest.approx(expected, abs=0.02 * max(size))
    assert found.max() == pytest.approx(1, abs=0.2)


def test_what_the_patches_do_not_cover_is_not_a_number():
    view = view_of({"size": {"height": 20, "width": 16}}, (40, 32))
    found = on_image(np.ones((2, 2)), (8, 8), view)
    assert np.isfinite(found[:32]).all() and np.isnan(found[32:]).all()
    hybrid = on_image(np.ones((3, 2)), (8, 8), view)  # SAME padding: its last row reaches over the edge
    assert np.isfinite(hybrid).all()


@pytest.mark.parametrize("size", [(50, 80), (90, 40)])
def test_the_window_is_the_one_that_the_processor_crops(size):
    """A bright square in the original is found in the processor's output, where the view says."""
    settings = {
        "size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32},
        "do_normalize": False, "resample": 0,
    }  # fmt: skip
    view = view_of(settings, size)
    pixels = np.zeros((*size, 3), np.uint8)
    y, x = round(view.window[0] + 0.3 * view.window[2]), round(view.window[1] + 0.6 * view.window[3])
    pixels[y - 3 : y + 3, x - 3 : x + 3] = 255
    seen = ViTImageProcessorPil(**settings)(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0, 0]
    assert seen.shape == view.model_size
    assert center(seen) == pytest.approx((0.3 * 32, 0.6 * 32), abs=1.2)
    outside = on_image(np.ones((4, 4)), (8, 8), view)
    assert np.isnan(outside).any() and np.isfinite(outside).sum() == pytest.approx(
        view.window[2] * view.window[3], rel=0.1
    )


def test_a_image_that_the_processor_does_not_resize_keeps_its_pixels():
    settings = {"size": {"height": 32, "width": 32}, "do_resize": False}
    assert view_of(settings, (50, 80)) == PlotView((50, 80), (50, 80), (0, 0, 50, 80))
    cropped = settings | {"do_center_crop": True, "crop_size": {"height": 32, "width": 40}}
    assert view_of(cropped, (50, 80)) == PlotView((50, 80), (32, 40), (9, 20, 32, 40))


def test_colors_are_those_of_the_patches():
    colors = np.zeros((2, 3, 3))
    colors[1, 2] = 1, 0.5, 0
    view = PlotView((50, 60), (16, 24), (0.0, 10.0, 50.0, 40.0))  # what the model sees: the middle 40 columns
    found = colors_on_image(colors, (8, 8), view)
    assert found.shape == (50, 60, 3) and found.dtype == np.uint8
    assert (
        (found[30:, 40:49] == [255, 128, 0]).all() and (found[:24, 11:49] == 0).all() and (found[:, 50:] == 255).all()
    )
    assert enlarged(found, 200).shape == (150, 180, 3) and enlarged(found, 20).shape == found.shape


def test_maps_have_the_proportions_of_the_image():
    square = {0: np.random.default_rng(0).random((2, 6, 6))}
    for proportion in (0.5, 1.0, 3.0):
        for figure in (
            draw_attention_heads(square, proportion=proportion),
            draw_norms({0: square[0][0]}, proportion=proportion),
        ):
            figure.canvas.draw()
            box = figure.axes[0].get_window_extent()
            assert box.height / box.width == pytest.approx(proportion, rel=0.02)


def test_linear_ramps_stay_linear():
    view = PlotView((64, 64), (64, 64), (0.0, 0.0, 64.0, 64.0))
    found = on_image(np.arange(8.0)[:, None].repeat(8, 1), (8, 8), view)
    np.testing.assert_allclose(found[4:60, 5], (np.arange(4, 60) + 0.5) / 8 - 0.5)


def test_overlay_keeps_size_and_marks_the_hottest_place():
    image = np.full((30, 50, 3), 128, np.uint8)
    heat = np.zeros((30, 50))
    heat[10:20, 30:40] = 1
    heat[:, :5] = np.nan
    seen = overlay(image, heat)
    assert seen.shape == image.shape and seen.dtype == np.uint8
    assert seen[15, 35].astype(int).sum() > seen[15, 10].astype(int).sum()
    assert (seen[15, 0] == seen[15, 0, 0]).all() and seen[15, 0, 0] > 128  # faded
    with pytest.raises(HFViTError, match="use on_image first"):
        overlay(image, heat[:10])


def test_scaled():
    assert scaled(np.array([[2.0, 4.0], [np.nan, 3.0]]))[0].tolist() == [0, 1]
    assert scaled(np.ones((2, 2))).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(HFViTError, match="no finite value"):
        scaled(np.full((2, 2), np.nan))


def test_every_figure_is_drawn(tmp_path):
    random = np.random.default_rng(0)
    steps = np.linspace(0, 1, 5)
    drawn = {
        "table": draw_table([[random.random((8, 12, 3))] * 2] * 2, ["a", "b"], ["x", "y"], "title"),
        "examples": draw_examples(
            [[random.random((8, 4 + n, 3))] * 2 for n in range(8)], list("abcdefgh"), ["x", "y"]
        ),
        "heads": draw_attention_heads({0: random.random((3, 4, 6)), -1: random.random((3, 4, 6))}, numbers=[0, 2, 5]),
        "filters": draw_filters(random.random((10, 3, 4, 4)), np.full(10, 0.1)),
        "gray filters": draw_filters(random.random((2, 1, 4, 8)), np.full(2, 0.1)),
        "positions": draw_position_similarity(random.random((3, 5, 3, 5))),
        "many positions": draw_position_similarity(random.random((20, 6, 20, 6)), most=4),
        "distance": draw_attention_distance({"a": random.random((4, 3)), "b": random.random((2, 6))}),
        "curves": draw_curves(steps, {"rollout": (1 - steps, steps), "random": (steps, steps)}),
        "norms": draw_norms({0: random.random((4, 6)), 3: random.random((4, 6))}),
    }
    for name, figure in drawn.items():
        save(figure, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 100 and len(np.unique(np.asarray(image.convert("L")))) > 10, name
    assert len(drawn["many positions"].axes[0].get_xticks()) == 4
    assert drawn["heads"].axes[2].get_title() == "head 5"
    legend = drawn["curves"].axes[1].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["rollout  0.500", "random  0.500"]


def test_no_display_is_needed():
    """A fresh process without DISPLAY and with a backend that needs one set in the environment."""
    code = (
        "import sys, numpy as np, hf_vit.interpretability.plots as f; f.draw_norms({0: np.ones((2, 2))});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"MPLBACKEND": "TkAgg", "PATH": "", "HOME": "/tmp"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_names_in_letters_that_no_font_has_warn_of_nothing(tmp_path):
    figure = Figure()
    figure.suptitle("\U0001f700 $x_1$ \u65e5\u672c\u8a9e")  # an alchemist's sign, no mathematics, Japanese
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figure, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 100
