"""Pages of one file: nothing is asked for from outside, colors follow the theme, a phone need not scroll sideways.

python -m pytest tests/hf_vit/test_html_page.py
"""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_vit.html_page import COLORS, INK, figure_svg, image_uri, write_page


CONTENT = """{% from "html_page.html" import layout, charts, tiles, table %}
{% call layout(title, "a test") %}
<h1>{{ title }}</h1>
{{ charts(svgs) }}
{{ tiles(found) }}
{{ table(["name", "value"], rows) }}
{% endcall %}"""


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def drawn(title="loss"):
    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([0, 1], [1, 0], color=COLORS[0])
    axes.set_title(title, color=INK)
    return figure


def page(folder, **values):
    template = folder / "own.html"
    template.write_text(CONTENT, encoding="utf-8")
    tile = {"source": image_uri(np.zeros((8, 8, 3), np.uint8), 80), "title": "a <b>", "lines": ["$x$ & y"]}
    default = {
        "title": "<i>猫</i> $1",
        "svgs": [figure_svg(drawn())] * 3,
        "found": [tile] * 5,
        "rows": [["long " * 40, 1]],
    }
    write_page(folder / "page.html", template, **default | values)
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("shape", "size"), [((8, 4), (40, 80)), ((300, 600), (80, 40)), ((1, 500), (80, 1))])
def test_images_keep_their_proportions(shape, size):
    assert opened(image_uri(np.zeros((*shape, 3), np.uint8), 80)).size == size


def test_small_images_become_larger_pixels():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0] = 255
    large = np.asarray(opened(image_uri(pixels, 64)))
    assert large[8, 8].min() > 240 and large[48, 48].max() < 15


def test_a_chart_has_the_colors_of_the_theme_and_its_text_as_text():
    svg = figure_svg(drawn("<loss> $5 猫"))
    assert svg.startswith("<svg") and "var(--ink)" in svg and "var(--color-1)" in svg
    assert INK not in svg and COLORS[0] not in svg and "metadata" not in svg
    assert "&lt;loss&gt; $5 猫" in svg


def test_charts_do_not_refer_to_each_others_parts():
    first, second = (figure_svg(drawn(title)) for title in ("one", "two"))
    assert set(re.findall(r"url\(#([^)]+)\)", first)).isdisjoint(re.findall(r"url\(#([^)]+)\)", second))


def test_words_are_escaped(tmp_path):
    text = page(tmp_path)
    assert "<i>猫" not in text and "&lt;i&gt;猫&lt;/i&gt; $1" in text
    assert "a &lt;b&gt;" in text and "$x$ &amp; y" in text


def test_a_page_asks_for_nothing_from_outside(tmp_path):
    text = page(tmp_path)
    assert "<script" not in text and "<link" not in text and "@import" not in text
    sources = re.findall(r'(?:src|href)="([^"#][^"]*)"', text)
    assert sources and all(source.startswith("data:") for source in sources if not source.startswith("#"))


def test_names_that_are_not_utf8_are_shown(tmp_path):
    assert "caf\\udce9" in page(tmp_path, title="caf\udce9")


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_the_screen(tmp_path, width):
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_file = next(
        (path for path in map(Path, ["/usr/bin/chromium", "/usr/bin/google-chrome"]) if path.exists()), None
    )
    with sync_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        if not own.exists() and browser_file is None:
            pytest.skip("the page is opened in Chromium: python -m playwright install chromium")
        options = {} if own.exists() else {"executable_path": str(browser_file)}
        browser = playwright.chromium.launch(args=["--no-sandbox"], **options)
        for scheme, dark in (("light", False), ("dark", True)):
            view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page(tmp_path)
            view.goto((tmp_path / "page.html").as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            color = view.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", color)[:3])) < 60) == dark
            letters = view.evaluate(
                "Array.from(document.querySelectorAll('svg text'), t => t.getBoundingClientRect().height)"
            )
            assert min(letters) > 7  # pixels on the screen: legends stay readable
            rows = view.evaluate("Array.from(document.querySelectorAll('.charts figure'), f => f.offsetTop)")
            assert len(set(rows)) == (1 if width > 1000 else 3)  # three in one row, none alone in a second
        browser.close()
