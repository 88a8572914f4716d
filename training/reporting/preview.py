"""A contact sheet: one augmented batch as the network gets it, with its labels. For run.py (`--preview`)."""

from math import ceil, sqrt

import numpy as np
import torch
from PIL import Image, ImageDraw


MOST = 64  # images on a sheet
SMALLEST = 96  # px, side of a cell
CAPTION = 14  # px


def contact_sheet(
    pixel_values: torch.Tensor, labels: torch.Tensor, names: list[str], mean: list[float], std: list[float]
) -> Image.Image:
    """Draw a batch.

    Args:
        pixel_values: (B, C, H, W), normalized. labels: (B,), or soft (B, K). names: of the classes.
        mean, std: what the images were normalized with.
    """
    count = min(MOST, len(pixel_values))
    columns = ceil(sqrt(count))
    height, width = pixel_values.shape[-2:]
    zoom = max(1, ceil(SMALLEST / min(height, width)))
    cell = (width * zoom + 4, height * zoom + CAPTION + 4)
    sheet = Image.new("RGB", (columns * cell[0], ceil(count / columns) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(count):
        x, y = index % columns * cell[0], index // columns * cell[1]
        image = as_image(pixel_values[index], mean, std).resize((width * zoom, height * zoom), Image.NEAREST)
        sheet.paste(image, (x + 2, y + 2))
        draw.text((x + 3, y + height * zoom + 2), caption(labels[index], names, cell[0] // 6), fill="black")
    return sheet


def as_image(pixel_values: torch.Tensor, mean: list[float], std: list[float]) -> Image.Image:
    """A normalized (C, H, W) as RGB."""
    m, s = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
    pixels = ((pixel_values.float().cpu() * s + m) * 255).round().clamp(0, 255).byte().numpy()
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)))


def caption(label: torch.Tensor, names: list[str], letters: int) -> str:
    """A class's name, or the shares of a mixture, the largest first, cut to fit."""
    if label.ndim == 0:
        return ascii_only(names[int(label)])[:letters]
    shares = sorted(((float(share), index) for index, share in enumerate(label) if share > 0), reverse=True)[:2]
    each = max(3, letters // len(shares) - 4)
    words = [ascii_only(names[index])[:each] + (f" {share:.0%}" if share < 1 else "") for share, index in shares]
    return " + ".join(words)[: letters + 2]


def ascii_only(name: str) -> str:
    """Pillow's built-in font knows no others."""
    return name.encode("ascii", "replace").decode()
