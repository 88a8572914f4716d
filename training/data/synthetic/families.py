"""The families of generated images, and how one image is drawn.

    glyphs      letters in many fonts, bent and sheared, in strokes of any weight and softness, mostly bright on dark;
                what helps most within minutes on small images (glyphs.py)
    atoms       VisualAtom, the best of the formula-driven sets in the literature (contours.py)
    contours    RCDB, its forerunner: noisy circles on white (contours.py)
    fractals    iterated function systems (fractals.py)
Each also in color on a colored background, `glyphs-color`, and in color on clouds of two colors, `glyphs-clouds`.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from hf_vit.errors import HFViTError

from ...rng import IMAGE, generator
from .contours import ATOMS, CONTOURS, draw_atom, draw_contours
from .fractals import FRACTALS, draw_fractal
from .glyphs import LETTERS, draw_glyph
from .lines import LARGEST_SIZE
from .shading import black_on_white, shade_clouds, shade_color, shade_gray, white_on_black


GLYPHS = 1  # the family's number in random addresses
BLANK = 100  # an image is drawn again where its ink would not fill one pixel in this many
TRIES = 8
SMALLEST_SIZE = 16  # px
FORMULA_CLASSES = 1_000_000  # of the families whose classes are random formulas
INSTANCES = 1 << 47  # of every class
SHADING = 1 << 48  # block of the random numbers for shading, far from those for drawing
SEVERAL = 1 << 49  # and of those that place several objects
OBJECT = 1 << 48  # from the instance that an image shows first to that of its next object
KEPT_BYTES = 16 << 20  # freed blocks up to this size stay in the process
OBJECT_SIDE = 0.3, 0.6  # of the image's side, for each of several objects

Drawn = tuple[np.ndarray, Callable[[], np.random.Generator]]  # ink, and what gives the generator of its shading
Shade = Callable[[np.ndarray, Callable[[], np.random.Generator]], np.ndarray]


@dataclass(frozen=True)
class Family:
    """A kind of image.

    `number`: its own in random addresses. `version` counts the changes to what it draws.
    `draw(seed, label, instance, size)` gives ink;
    `shade(ink, source of a generator)` makes it uint8 (size, size, 3).
    """

    number: int
    version: int
    classes: int
    class_name: Callable[[int], str]
    draw: Callable[[int, int, int, int], Drawn]
    shade: Shade


def fullest(tries: Iterable[np.ndarray]) -> np.ndarray:
    """The first that is not nearly blank; of classes that draw little more than nothing, the fullest."""
    best, most = None, -1
    for ink in tries:
        total = int(ink.sum(dtype=np.uint32))
        if total * BLANK > 255 * ink.size and ink.max() > 127:
            return ink
        if total > most:
            best, most = ink, total
    return best


def formula(number: int, draw_attempt: Callable[[int, int, int, int, int], np.ndarray]):
    """`Family.draw` of a family whose images are addressed by attempt."""

    def draw_formula(seed: int, label: int, instance: int, size: int) -> Drawn:
        ink = fullest(draw_attempt(seed, label, instance, size, attempt) for attempt in range(TRIES))
        return ink, lambda: generator(IMAGE, seed, number, label, instance, SHADING)

    return draw_formula


def draw_letter(seed: int, label: int, instance: int, size: int) -> Drawn:
    """`Family.draw` of glyphs: all attempts and the shading read one generator."""
    rng = generator(IMAGE, seed, GLYPHS, label, instance)
    ink = draw_glyph(seed, label, size, rng)
    for _ in range(TRIES - 1):
        if ink.mean() > 1 / BLANK and ink.max() > 0.5:
            break
        ink = max(ink, draw_glyph(seed, label, size, rng), key=np.mean)
    return ink, lambda: rng


FAMILIES = {
    "glyphs": Family(GLYPHS, 1, len(LETTERS), lambda label: LETTERS[label], draw_letter, shade_gray),
    "atoms": Family(
        ATOMS, 2, FORMULA_CLASSES, lambda label: f"atom-{label}", formula(ATOMS, draw_atom), white_on_black
    ),
    "contours": Family(
        CONTOURS, 2, FORMULA_CLASSES, lambda label: f"contour-{label}", formula(CONTOURS, draw_contours),
        black_on_white,
    ),
    "fractals": Family(
        FRACTALS, 2, FORMULA_CLASSES, lambda label: f"fractal-{label}", formula(FRACTALS, draw_fractal),
        white_on_black,
    ),
}  # fmt: skip
COLORS = {"color": shade_color, "clouds": shade_clouds}


def find_family(name: str) -> Family:
    """The family of that name; the suffixes "-color" and "-clouds" do not change the shapes.

    Raises:
        HFViTError: there is none.
    """
    base, _, suffix = name.partition("-")
    if base in FAMILIES and (not suffix or suffix in COLORS):
        return FAMILIES[base]
    known = [key + end for key in FAMILIES for end in ("", *(f"-{color}" for color in COLORS))]
    near = difflib.get_close_matches(name, known, n=1)
    raise HFViTError(
        f"no synthetic family '{name}'; there are {', '.join(FAMILIES)}, each also with -color or -clouds"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def draw_image(family_name: str, label: int, instance: int, size: int, seed: int = 0, objects: int = 1) -> np.ndarray:
    """Draw one image: uint8 (size, size, 3).

    Args:
        label: class of the family, from 0. instance: which of its images, from 0.
        size: side in pixels. objects: if above 1, draw 1 to `objects` smaller images of the class over one another.

    Raises:
        HFViTError: any of them out of range.
    """
    keep_freed_memory()
    family = find_family(family_name)
    if not 0 <= label < family.classes:
        raise HFViTError(f"{family_name} has classes 0 to {family.classes - 1}, asked for {label}")
    if not 0 <= instance < INSTANCES:
        raise HFViTError(f"every class has instances 0 to {INSTANCES - 1}, asked for {instance}")
    check_synthetic_size(size)
    if objects < 1:
        raise HFViTError(f"an image shows at least 1 object, got {objects}")
    if objects == 1:
        drawn = family.draw(seed, label, instance, size)
    else:
        drawn = several(family, seed, label, instance, size, objects)
    suffix = family_name.partition("-")[2]
    return (COLORS[suffix] if suffix else family.shade)(*drawn)


def several(family: Family, seed: int, label: int, instance: int, size: int, objects: int) -> Drawn:
    """1 to `objects` small images of one class anywhere in a large one; where they meet, the stronger ink counts."""
    rng = generator(IMAGE, seed, family.number, label, instance, SEVERAL)
    canvas = None
    for number in range(1 + int(rng.integers(objects))):
        extent, x, y = rng.random(3)
        low, high = OBJECT_SIDE
        side = max(8, int(size * (low + (high - low) * extent)))
        ink, _ = family.draw(seed, label, instance + number * OBJECT, side)
        canvas = np.zeros((size, size), dtype=ink.dtype) if canvas is None else canvas
        left, upper = int(x * (size - side + 1)), int(y * (size - side + 1))
        tile = canvas[upper : upper + side, left : left + side]
        np.maximum(tile, ink, out=tile)
    return canvas, lambda: rng


@cache
def keep_freed_memory() -> None:
    """Make glibc keep freed blocks of up to `KEPT_BYTES` for the next arrays, once a process.

    By default it returns blocks from 128 KiB on to the system, and each comes back as page faults: half of the time of
    an image of 224 px. Freeing one large block raises that limit (`man mallopt`, M_MMAP_THRESHOLD). Nothing changes
    with other allocators.
    """
    np.empty(KEPT_BYTES, dtype=np.uint8)


def check_synthetic_size(size: int) -> None:
    """Raise HFViTError if `size` is outside the supported range."""
    if not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise HFViTError(f"synthetic images have {SMALLEST_SIZE} to {LARGEST_SIZE} px a side, asked for {size}")
