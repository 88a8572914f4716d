"""Rendered letters: the family `glyphs` of families.py.

The letters a-z and A-Z, without digits, which the quickstart learns afterwards, in the 22 text fonts that come with
matplotlib (DejaVu Sans, Mono and Serif, STIX, Computer Modern; free licenses). Other versions of the fonts draw other
images.

A letter is stored as a signed distance field (Green, "Improved alpha-tested magnification", SIGGRAPH 2007 courses):
one small table per letter and font gives any stroke weight, softness and resolution.

Tests: tests/training/data/synthetic/test_synthetic.py.
"""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hf_vit.errors import HFViTError


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf",
    "cmr10.ttf", "cmb10.ttf", "cmti10.ttf", "cmmi10.ttf", "cmss10.ttf", "cmtt10.ttf",
)  # fmt: skip

CELL = 64  # side of a distance field
GLYPH = 40  # longer side of the letter inside it
OVERSAMPLING = 2  # the field is measured on a bitmap this much finer
PI = 3.1415926534682512, 1.2154201013012385e-10  # in two parts; the first has so few bits that its multiples are exact
SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(1, 11)]
MAX_DISTANCE = 20.0  # cells, beyond which distances are clipped


@lru_cache(maxsize=len(LETTERS) * len(FONTS))
def distance_field(letter: str, font: str) -> tuple[np.ndarray, float, float]:
    """Signed distance to a letter's outline, positive inside.

    Returns:
        float32 (CELL, CELL) in cells, the largest distance inside (half the heaviest stroke),
        and the letter's longer side as a fraction of its font's size.
    """
    import matplotlib
    from scipy import ndimage

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font
    if not path.is_file():
        raise HFViTError(
            f"matplotlib {matplotlib.__version__} comes without {font}, which letters are drawn with: "
            "pip install 'matplotlib>=3.11'"
        )
    fine = CELL * OVERSAMPLING
    em = fine
    left, upper, right, lower = ImageFont.truetype(str(path), em).getbbox(letter)
    extent = max(right - left, lower - upper)
    em_fitting = round(em * GLYPH * OVERSAMPLING / extent)
    face = ImageFont.truetype(str(path), em_fitting)
    left, upper, right, lower = face.getbbox(letter)
    canvas = Image.new("L", (fine, fine))
    ImageDraw.Draw(canvas).text(((fine - left - right) / 2, (fine - upper - lower) / 2), letter, fill=255, font=face)
    inside = np.asarray(canvas) > 127
    distance = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    distance = distance.reshape(CELL, OVERSAMPLING, CELL, OVERSAMPLING).mean(axis=(1, 3)) / OVERSAMPLING
    return np.clip(distance, -MAX_DISTANCE, MAX_DISTANCE).astype(np.float32), float(distance.max()), extent / em


@lru_cache(maxsize=16)
def pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Centers of pixels from -1 to 1: x (1, size) and y (size, 1)."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    return line[None, :], line[:, None]


def draw_glyph(seed: int, label: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One letter, float32 (size, size): font, pose, bend, stroke weight and softness are random."""
    (font, angle, slant, fill, narrow, x0, y0, bend_x, bend_y, phase_x, phase_y, wave_x, wave_y, weight, softness,
     coarse) = rng.random(16)  # fmt: skip
    field, half_stroke, extent = distance_field(LETTERS[label], FONTS[int(font * len(FONTS))])

    # Half of the images are drawn coarsely and enlarged, as a small scan would be.
    side = size if coarse < 0.5 else max(8, round(size * coarse))
    x, y = pixel_grid(side)

    # Pixels to cells: turn, slant, and stretch so that the letter covers 70 to 100 % of the side; small letters less.
    height = (0.7 + 0.3 * fill) * min(1.0, (extent / 0.75) ** 0.5)
    width = height * 2.0 ** (0.8 * (narrow - 0.5))
    radians, shear = np.radians(24 * (angle - 0.5)), 0.5 * (slant - 0.5)
    turn_cos, turn_sin = np.cos(radians), np.sin(radians)
    room = 1.0 - height
    x = (x - np.float32((2 * x0 - 1) * (0.7 * room + 0.05))).astype(np.float64)
    y = (y - np.float32((2 * y0 - 1) * (0.7 * room + 0.05))).astype(np.float64)
    along, down = turn_cos * x - turn_sin * y, turn_sin * x + turn_cos * y
    along += shear * down
    along += bend(down, 0.07 * (2 * bend_x - 1), 1 + 2.5 * wave_x, 2 * np.pi * phase_x)
    down += bend(along, 0.07 * (2 * bend_y - 1), 1 + 2.5 * wave_y, 2 * np.pi * phase_y)
    along *= GLYPH / 2 / width
    along += (CELL - 1) / 2
    down *= GLYPH / 2 / height
    down += (CELL - 1) / 2
    distance = bilinear(field, down, along)

    # Cells to fractions of the side; the stroke's half width moves towards the drawn one, whatever the font's weight.
    cell = height / GLYPH
    half_width = 0.04 + 0.07 * weight
    edge = max(1.0 / side, 0.03 + 0.09 * softness)
    ink = distance
    ink *= cell
    ink += 0.7 * (half_width - cell * half_stroke)
    ink /= edge
    ink += 0.5
    ink = ink.clip(0.0, 1.0, out=ink).astype(np.float32)
    if side == size:
        return ink
    enlarged = Image.fromarray(ink).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(enlarged)


def bend(values: np.ndarray, amplitude: float, frequency: float, phase: float) -> np.ndarray:
    """amplitude * sin(frequency * values + phase), float64, by additions and multiplications only.

    Not np.sin: for float64 it calls the C library for each number, which takes three quarters of a letter's time. This
    Taylor series around the nearest multiple of pi is within 4e-16 for angles up to 100, and the same on every
    machine.
    """
    angle = values * frequency
    angle += phase
    turns = np.rint(angle * (1 / np.pi))
    for part in PI:
        angle -= turns * part
    square = angle * angle
    result = square * SINE[-1]
    for coefficient in SINE[-2::-1]:
        result += coefficient
        result *= square
    result += 1.0
    result *= angle
    turns *= 0.5
    turns -= np.floor(turns)  # 0.5 where the sign turns
    turns *= -4 * amplitude
    turns += amplitude
    result *= turns
    return result


def bilinear(field: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear interpolation in a field, with its border extended; float64. Overwrites `rows` and `columns`."""
    side = field.shape[0]
    rows.clip(0.0, side - 1.001, out=rows)
    columns.clip(0.0, side - 1.001, out=columns)
    top, left = np.floor(rows), np.floor(columns)
    rows -= top
    columns -= left
    top *= side
    top += left
    index = top.astype(np.intp)
    flat = field.ravel().astype(np.float64)
    right, stay = columns, 1 - columns
    upper, lower = (flat[start:].take(index) * stay + flat[start + 1 :].take(index) * right for start in (0, side))
    upper *= 1 - rows
    lower *= rows
    upper += lower
    return upper
