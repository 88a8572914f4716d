"""Class names in figures: drawn as they stand, from whichever font has their letters.

pytest tests/hf_vit/test_plot_text.py
"""

import warnings

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_vit import plot_text
from hf_vit.plot_text import families_for, plain_text


def draw(*names):
    """Pixels of a figure whose ticks are called so, and the letters that could not be drawn."""
    figure = Figure(figsize=(3, 3))
    canvas = FigureCanvasAgg(figure)
    figure.add_subplot().set_xticks(range(len(names)), names)
    with plain_text(figure) as missing:
        canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy(), missing


def test_a_dollar_is_a_dollar():
    pixels, missing = draw("$\\frac{$", "a$b$c")  # matplotlib's own mathtext raises for the first
    assert not missing
    assert not np.array_equal(pixels, draw("\\frac{", "abc")[0])


def test_accents_need_no_other_font():
    assert families_for(["é ü ß Ω ж"]) == (plot_text.matplotlib.rcParams["font.family"], set())


def test_letters_that_no_font_has_are_named_without_a_warning(monkeypatch):
    monkeypatch.setattr(plot_text, "_installed", list)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw("犬", "cat")[1] == {"犬"}


def test_a_font_that_has_the_letters_is_found(monkeypatch):
    own = font_manager.findfont("DejaVu Sans")
    letters = {own: frozenset(map(ord, "act")), "wide.ttc": frozenset(map(ord, "犬猫")), "other.ttf": frozenset()}
    monkeypatch.setattr(plot_text, "_letters", letters.__getitem__)
    monkeypatch.setattr(plot_text, "_installed", lambda: [("Other", "other.ttf"), ("Wide", "wide.ttc")])
    families, missing = families_for(["cat 犬", "猫鳥"])
    assert families[-1] == "Wide" and "Other" not in families and missing == {"鳥"}


def test_a_font_of_placeholders_draws_nothing():
    plot_text._installed.cache_clear()
    assert not [family for family, _ in plot_text._installed() if family.startswith("Last Resort")]


def test_fonts_with_many_scripts_come_first():
    plot_text._installed.cache_clear()
    names = [family for family, _ in plot_text._installed()]
    wide = [name.startswith(plot_text.WIDE_FAMILIES) for name in names]
    assert names and wide == sorted(wide, reverse=True)


@pytest.mark.skipif(
    not any("CJK" in font.name for font in font_manager.fontManager.ttflist), reason="no CJK font is installed"
)
def test_japanese_is_drawn_where_a_font_is_installed():
    pixels, missing = draw("犬")
    assert not missing and not np.array_equal(pixels, draw("猫")[0])
