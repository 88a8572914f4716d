"""Generated pictures: pre-training data of any size without a download.

    images = SyntheticImages("glyphs", classes=52, instances=600, size=24)
    images[0]                       # {"image": uint8 (24, 24, 3), "label": 0}

A picture is a pure function of (seed, family, class, instance, size): any worker, rank, resumed run or machine draws
the same one (for glyphs, where the fonts are the same), and nothing is stored. The instance fixes shape and shading as
shares of the side, so another size shows the same picture at another resolution. Sets are nested: more instances, or a
longer prefix, only add pictures.

Families:
    glyphs    the letters a-z and A-Z (never digits, which the quickstart learns afterwards) in the 22 text fonts that
              come with matplotlib (DejaVu Sans, Mono and Serif, STIX, Computer Modern; free licences), bent and
              sheared, in strokes of any weight and softness, mostly bright on dark.
Every family has a twin in colour, `glyphs-colour`.

Glyphs are kept as signed distance fields (Green, "Improved alpha-tested magnification", SIGGRAPH 2007 courses): one
small table per letter and font gives any stroke weight, softness and resolution.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hf_vit.errors import HFViTError

from .randomness import IMAGE, generator


DEFAULT_SEED = 0
DEFAULT_INSTANCES = 1000
DEFAULT_SIZE = 32  # px, where neither the name nor a transform says how large
SMALLEST_SIZE = 8  # px

# Where the instances of a split begin: far enough apart that no training set reaches the test set.
FIRST_INSTANCE = {"train": 0, "validation": 1 << 40, "test": 1 << 41}
HELD_OUT = 10  # one held-out instance per this many training instances

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSansMono-Oblique.ttf", "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf",
    "cmr10.ttf", "cmb10.ttf", "cmti10.ttf", "cmmi10.ttf", "cmss10.ttf", "cmtt10.ttf",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A kind of picture: its number in random addresses, how many classes it has, what they are called, how to draw.

    `draw(seed, label, size, rng)` returns float32 (size, size) from 0 (background) to 1 (ink).
    """

    number: int
    classes: int
    class_name: Callable[[int], str]
    draw: Callable[[int, int, int, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class SyntheticImages:
    """A set of generated pictures; picture i shows class `i % classes`, instance `i // classes`.

    Args:
        family: "glyphs", or with the suffix "-colour" in colour.
        classes: how many of the family's classes, from the first.
        instances: pictures per class.
        size: side in pixels. seed: another seed, other pictures.
        first_instance: where the instances begin; the splits differ in it.
    """

    family: str
    classes: int
    instances: int
    size: int = DEFAULT_SIZE
    seed: int = DEFAULT_SEED
    first_instance: int = 0

    def __post_init__(self):
        family = find_family(self.family)
        if not 2 <= self.classes <= family.classes:
            raise HFViTError(f"synthetic:{self.family} has 2 to {family.classes} classes, asked for {self.classes}")
        if self.instances < 1:
            raise HFViTError(f"a synthetic set needs at least 1 instance per class, got {self.instances}")
        if self.size < SMALLEST_SIZE:
            raise HFViTError(f"synthetic pictures have at least {SMALLEST_SIZE} px a side, asked for {self.size}")

    @classmethod
    def from_name(cls, name: str, seed: int = DEFAULT_SEED) -> "SyntheticImages":
        """Read `synthetic:FAMILY[@classes,instances[,size]]`."""
        match = re.fullmatch(r"synthetic:([a-z-]+)(?:@(\d+),(\d+)(?:,(\d+))?)?", name)
        if match is None:
            raise HFViTError(f"'{name}' is not understood; write synthetic:FAMILY@classes,instances[,size], "
                             "for example synthetic:glyphs@52,600")  # fmt: skip
        family, classes, instances, size = match.groups()
        return cls(
            family,
            int(classes) if classes else min(find_family(family).classes, 1000),
            int(instances) if instances else DEFAULT_INSTANCES,
            int(size) if size else DEFAULT_SIZE,
            seed,
        )

    def split(self, split: str) -> "SyntheticImages":
        """The "train", "validation" or "test" part: other instances; the latter two are a tenth as large."""
        held_out = max(1, self.instances // HELD_OUT)
        instances = self.instances if split == "train" else held_out
        return replace(self, instances=instances, first_instance=FIRST_INSTANCE[split])

    def __len__(self) -> int:
        return self.classes * self.instances

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw picture `index`: {"image": uint8 (size, size, 3), "label": int}."""
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} is outside the {len(self)} of synthetic:{self.family}")
        instance, label = divmod(index, self.classes)
        image = draw(self.family, label, self.first_instance + instance, self.size, self.seed)
        return {"image": image, "label": label}

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,), without drawing."""
        return np.tile(np.arange(self.classes, dtype=np.int64), self.instances)

    @property
    def label_names(self) -> list[str]:
        """What the classes are called."""
        return [find_family(self.family).class_name(label) for label in range(self.classes)]

    def name(self, index: int) -> str:
        """What messages call picture `index`."""
        instance, label = divmod(index, self.classes)
        return f"{self.family}/{find_family(self.family).class_name(label)}/{self.first_instance + instance}"

    def describe(self) -> dict[str, Any]:
        """What the pictures depend on, but for their size."""
        return {"family": self.family, "classes": self.classes, "instances": self.instances, "seed": self.seed,
                "first_instance": self.first_instance}  # fmt: skip


def find_family(name: str) -> Family:
    """The family of that name; the suffix "-colour" does not change the shapes."""
    family = FAMILIES.get(name.removesuffix("-colour"))
    if family is None:
        known = ", ".join(f"{key}, {key}-colour" for key in FAMILIES)
        raise HFViTError(f"no synthetic family '{name}'; there are {known}")
    return family


def draw(family_name: str, label: int, instance: int, size: int, seed: int = DEFAULT_SEED) -> np.ndarray:
    """Draw one picture: uint8 (size, size, 3). Blank ones are redrawn with further numbers of the same address."""
    family = find_family(family_name)
    rng = generator(IMAGE, seed, family.number, label, instance)
    while True:
        ink = family.draw(seed, label, size, rng)
        if ink.max() > 0.5 and ink.mean() > 0.01:
            break
    if family_name.endswith("-colour"):
        return shade_colour(ink, rng)
    return shade_grey(ink, rng)


def shade_grey(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink on a background, both grey: 3 of 4 bright on nearly black, else any that differ clearly; some noise."""
    kind, paper, contrast, noise = rng.random(4)
    if kind < 0.9:
        background, foreground = 0.12 * max(0.0, 2 * paper - 1), 1.0 - 0.35 * contrast
    else:
        background, foreground = contrasting(paper, 0.35 + 0.65 * contrast)
    grey = background + (foreground - background) * ink
    grey = add_noise(grey, noise, rng)
    return np.repeat(np.rint(255 * grey).astype(np.uint8)[:, :, None], 3, axis=2)


def shade_colour(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink on a background of two colours that differ clearly in at least one channel; some noise."""
    *numbers, noise = rng.random(7)
    pairs = [contrasting(numbers[channel], numbers[3 + channel]) for channel in range(3)]
    strongest = int(np.argmax([abs(foreground - background) for background, foreground in pairs]))
    pairs[strongest] = contrasting(numbers[strongest], 0.5 + 0.5 * numbers[3 + strongest])
    background, foreground = (np.array(side, dtype=np.float32) for side in zip(*pairs))
    colour = background + (foreground - background) * ink[:, :, None]
    return np.rint(255 * add_noise(colour, noise, rng)).astype(np.uint8)


def contrasting(background: float, contrast: float) -> tuple[float, float]:
    """A background, and a foreground `contrast` away from it on the side with more room, as far as 0..1 allows."""
    if background < 0.5:
        return background * (1 - contrast), background * (1 - contrast) + contrast
    return 1 - (1 - background) * (1 - contrast), background * (1 - contrast)


def add_noise(values: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Uniform noise in a third of the pictures; result within 0..1."""
    if amount > 2 / 3:
        values = values + np.float32(0.6 * (amount - 2 / 3)) * (rng.random(values.shape, dtype=np.float32) - 0.5)
    return np.clip(values, 0.0, 1.0)


# Glyphs

CELL = 64  # side of a distance field
GLYPH = 40  # longer side of the letter inside it
OVERSAMPLING = 2  # the field is measured on a bitmap this much finer
FAR = 20.0  # where distances are cut off, in cells


@lru_cache(maxsize=len(LETTERS) * len(FONTS))
def distance_field(letter: str, font: str) -> tuple[np.ndarray, float, float]:
    """Signed distance to a letter's outline, positive inside.

    Returns:
        float32 (CELL, CELL) in cells, the largest distance inside (half the heaviest stroke),
        and the letter's longer side as a share of its font's size.
    """
    import matplotlib
    from scipy import ndimage

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font
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
    return np.clip(distance, -FAR, FAR).astype(np.float32), float(distance.max()), extent / em


@lru_cache(maxsize=16)
def pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of pixels from -1 to 1: x (1, size) and y (size, 1)."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    return line[None, :], line[:, None]


def draw_glyph(seed: int, label: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One letter: font, pose, bend, stroke weight and softness at random."""
    (font, angle, slant, fill, narrow, x0, y0, bend_x, bend_y, phase_x, phase_y, wave_x, wave_y, weight, softness,
     coarse) = rng.random(16)  # fmt: skip
    field, half_stroke, extent = distance_field(LETTERS[label], FONTS[int(font * len(FONTS))])

    # Half of the pictures are drawn coarsely and enlarged, as a small scan would be.
    side = size if coarse < 0.5 else max(8, round(size * coarse))
    x, y = pixel_grid(side)

    # Pixels to cells: turn, slant, and stretch so that the letter covers 70 to 100 % of the side; small letters less.
    height = (0.7 + 0.3 * fill) * min(1.0, (extent / 0.75) ** 0.5)
    width = height * 2.0 ** (0.8 * (narrow - 0.5))
    radians, shear = np.radians(24 * (angle - 0.5)), 0.5 * (slant - 0.5)
    turn_cos, turn_sin = np.cos(radians), np.sin(radians)
    room = 1.0 - height
    x = x - np.float32((2 * x0 - 1) * (0.7 * room + 0.05))
    y = y - np.float32((2 * y0 - 1) * (0.7 * room + 0.05))
    along, down = turn_cos * x - turn_sin * y, turn_sin * x + turn_cos * y
    along = along + shear * down
    along = along + 0.07 * (2 * bend_x - 1) * np.sin((1 + 2.5 * wave_x) * down + 2 * np.pi * phase_x)
    down = down + 0.07 * (2 * bend_y - 1) * np.sin((1 + 2.5 * wave_y) * along + 2 * np.pi * phase_y)
    columns = (CELL - 1) / 2 + (GLYPH / 2 / width) * along
    rows = (CELL - 1) / 2 + (GLYPH / 2 / height) * down
    distance = bilinear(field, rows, columns)

    # Cells to shares of the side; the stroke's half width moves towards the drawn one, whatever the font's weight.
    cell = height / GLYPH
    half_width = 0.04 + 0.07 * weight
    edge = max(1.0 / side, 0.03 + 0.09 * softness)
    shifted = cell * distance + 0.7 * (half_width - cell * half_stroke)
    ink = np.clip(0.5 + shifted / edge, 0.0, 1.0).astype(np.float32)
    if side == size:
        return ink
    enlarged = Image.fromarray(ink).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(enlarged)


def bilinear(field: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Look a field up between its cells; outside, the nearest cell counts."""
    last = field.shape[0] - 1.001
    rows, columns = np.clip(rows, 0.0, last), np.clip(columns, 0.0, last)
    top, left = rows.astype(np.intp), columns.astype(np.intp)
    down, right = rows - top, columns - left
    flat, place = field.ravel(), top * field.shape[1] + left
    upper = flat[place] * (1 - right) + flat[place + 1] * right
    lower = flat[place + field.shape[1]] * (1 - right) + flat[place + field.shape[1] + 1] * right
    return upper * (1 - down) + lower * down


FAMILIES = {
    "glyphs": Family(1, len(LETTERS), lambda label: LETTERS[label], draw_glyph),
}
