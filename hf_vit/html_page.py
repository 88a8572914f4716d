"""Self-contained HTML pages: the style and embedded images of `hf-vit inspect` and of a run's report.

A page opens without a network: images and charts are embedded, there are no scripts. Colors follow the reader's theme,
light or dark; from 360 pixels of width on, only wide tables have to be scrolled.
"""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from .atomic_file import atomic_write


if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#1f2933", "#8895a3"  # of figures; on a page they are replaced by the theme's colors
COLORS = ("#3d6fb4", "#d9822b", "#3f8f5f", "#b0413e", "#7a5195")
THEME = {INK: "var(--ink)", FAINT: "var(--faint)"} | {
    color: f"var(--color-{number})" for number, color in enumerate(COLORS, start=1)
}


def image_uri(image: Image.Image | np.ndarray, side: int) -> str:
    """An image as a data URI for an <img>, its longer side `side` pixels."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    factor = side / max(image.size)
    resample = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    buffer = io.BytesIO()
    image.convert("RGB").resize(size, resample).save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure_svg(figure: "Figure") -> Markup:
    """A figure as an <svg> in the theme's colors (INK, FAINT, COLORS), its text in the browser's fonts."""
    from matplotlib import rc_context  # here, so that pages without charts do not wait a second for it

    from .plot_text import plain_text

    buffer = io.StringIO()
    with plain_text(figure), rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in THEME.items():
        text = text.replace(color, variable)
    # several figures share a page: the ids that they refer to are unique, those of groups are not, and not used
    return Markup(text[: text.index("<metadata>")] + text[text.index("</metadata>") + len("</metadata>") :])


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Render a template that may import from html_page.html, with all values escaped, and write the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, template.parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template(template.name).render(**values)
    # names of files and folders need not be UTF-8
    atomic_write(path, text.encode("utf-8", errors="backslashreplace"))
