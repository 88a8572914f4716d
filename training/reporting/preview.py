"""A contact sheet: one augmented batch as the network sees it, with its labels. For train.py (`--preview`)."""

from functools import cache
from math import ceil, sqrt

import numpy as np
import torch
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont

from hf_vit.plot_text import families_for


MAX_IMAGES = 64  # on a sheet
MIN_SIDE = 96  # px, of an image
CAPTION_HEIGHT = 14  # px
FONT_SIZE = 10  # px, fits CAPTION_HEIGHT


def contact_sheet(
    pixel_values: torch.Tensor, labels: torch.Tensor, names: list[str], mean: list[float], std: list[float]
) -> Image.Image:
    """Draw a batch.

    Args:
        pixel_values: (B, C, H, W), normalized. labels: (B,), or soft (B, K). names: of the classes.
        mean, std: of the normalization.
    """
    count = min(MAX_IMAGES, len(pixel_values))
    columns = ceil(sqrt(count))
    height, width = pixel_values.shape[-2:]
    zoom = max(1, ceil(MIN_SIDE / min(height, width)))
    cell = (width * zoom + 4, height * zoom + CAPTION_HEIGHT + 4)
    sheet = Image.new("RGB", (columns * cell[0], ceil(count / columns) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(count):
        x, y = index % columns * cell[0], index // columns * cell[1]
        image = as_image(pixel_values[index], mean, std).resize((width * zoom, height * zoom), Image.NEAREST)
        sheet.paste(image, (x + 2, y + 2))
        draw_caption(
            draw, (x + 3, y + height * zoom + 2), preview_caption(labels[index], names, cell[0] // 6), cell[0] - 4
        )
    return sheet


def draw_caption(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int) -> None:
    """Write text from its upper left corner, each letter in a font that has it, cut off at `width` px."""
    x, y = corner
    end = x + width
    for letter in text:
        font = font_for(letter)
        advance = font.getlength(letter)
        if x + advance > end:
            break
        # anchored at the baseline: the ascent differs between fonts
        draw.text((x, y + FONT_SIZE), letter, fill="black", font=font, anchor="ls")
        x += advance


@cache
def font_for(letter: str) -> ImageFont.FreeTypeFont:
    """The font for a letter: matplotlib's own, else an installed one that has it, as in all figures."""
    families, _ = families_for([letter])
    return ImageFont.truetype(findfont(FontProperties(family=families[-1:])), FONT_SIZE)


def undrawable(names: list[str]) -> list[str]:
    """The names with letters that no installed font has, which are drawn as boxes."""
    _, missing = families_for(names)
    return [name for name in names if missing & set(name)]


def as_image(pixel_values: torch.Tensor, mean: list[float], std: list[float]) -> Image.Image:
    """A normalized (C, H, W) as RGB."""
    m, s = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
    pixels = ((pixel_values.float().cpu() * s + m) * 255).round().clamp(0, 255).byte().numpy()
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)))


def preview_caption(label: torch.Tensor, names: list[str], letters: int) -> str:
    """The name of the class, or the two largest fractions of a mixture, cut to fit."""
    if label.ndim == 0:
        return names[int(label)][:letters]
    fractions = sorted(
        ((float(fraction), index) for index, fraction in enumerate(label) if fraction > 0), reverse=True
    )[:2]
    if not fractions:  # of several labels none
        return "(no label)"[:letters]
    each = max(3, letters // len(fractions) - 4)
    words = [names[index][:each] + (f" {fraction:.0%}" if fraction < 1 else "") for fraction, index in fractions]
    return " + ".join(words)[: letters + 2]
