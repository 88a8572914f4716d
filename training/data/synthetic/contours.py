"""Nested wavy and noisy circles: the families `atoms` and `contours` of families.py.

`atoms` is VisualAtom (Takashima et al., "Visual Atoms", CVPR 2023) with the ranges of its published script, `contours`
is RCDB (Kataoka et al., "Replacing Labeled Real-image Datasets with Auto-generated Contours", CVPR 2022). An image is
L closed polygons of V vertices; each grows out of the one before by noise along the radius, so all vertices are one
cumulative sum. Their "Perlin noise" is read at an independent random place per vertex, hence white noise with a
standard deviation of 0.33; here it is uniform noise of that deviation, in 256 steps.

Sines, cosines and logarithms differ in the last bit between processors, and are rounded to 2^-20 before they are used.

Tests: tests/training/data/synthetic/test_synthetic.py.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...rng import CLASS, IMAGE, generator, shares
from .lines import OFFSET, Polygons, draw_polygons


CANVAS = 512.0  # the formulas' own pixels
NOISE = 0.329 * 3**0.5  # half range of uniform noise with the standard deviation of 1-D Perlin noise
ATOMS, CONTOURS = 2, 3  # the families' numbers in random addresses
MAX_VERTICES = 1.5  # per pixel of the image's side: finer polygons look the same
MIN_DISTANCE = 1.0  # px: of polygons that are closer on average, not all are drawn
HEADER = 8  # 64-bit words with the parameters of an image: center, radius, ovals; then come grays, then the noise
ATTEMPT = 1 << 32  # blocks of random numbers from one attempt at an image to the next
EXACT = 2.0**20


@dataclass(frozen=True, eq=False)  # hashed by identity, for `outline`
class Formula:
    """The parameters of a class.

    Attributes:
        direction: (2, V), cosine and sine. move: (V,), mean move outward from polygon to polygon, canvas pixels.
        pace: largest move over the vertices. noise: half the range of the random part of a move.
    """

    family: int
    lines: int
    radius: float
    ovals: tuple[float, float]
    direction: np.ndarray
    move: np.ndarray
    pace: float
    noise: float

    @property
    def vertices(self) -> int:
        """V."""
        return len(self.move)

    @property
    def gray_words(self) -> int:
        """64-bit words of the grays: a byte per polygon, in whole blocks of four words."""
        return 4 * -(-self.lines // 32)

    def stride(self, size: int) -> int:
        """One in how many vertices is drawn."""
        return math.ceil(self.vertices / (MAX_VERTICES * size))

    def every(self, size: int) -> int:
        """One in how many polygons is drawn: their mean distance stays below `MIN_DISTANCE` everywhere."""
        return max(1, int(MIN_DISTANCE / (self.pace * size / CANVAS)))

    def noise_shape(self, size: int) -> tuple[int, int, int]:
        """Polygons, axes, drawn vertices."""
        return self.lines, 2, -(-self.vertices // self.stride(size))

    def words(self, size: int) -> int:
        """64-bit words of a whole image: header, grays, a byte of noise per polygon, axis and drawn vertex."""
        return HEADER + self.gray_words + -(-math.prod(self.noise_shape(size)) // 8)


@lru_cache(maxsize=4096)
def atom_formula(seed: int, label: int) -> Formula:
    """VisualAtom: two sine waves of different frequency around the orbit make the class."""
    rng = generator(CLASS, seed, ATOMS, label)
    vertices, lines, radius = (int(rng.integers(low, high + 1)) for low, high in ((200, 1000), (1, 200), (10, 60)))
    noise, growth = 4.0 * rng.random(), 0.1 * rng.random()
    first = int(rng.integers(0, 21))
    second = (first + 1 + int(rng.integers(0, 20))) % 21
    ovals = (1.0 + rng.random(), 1.0 + rng.random())
    angle = np.arange(vertices) * (2 * np.pi / vertices)
    wave = exact(0.5 * np.sin(first * angle) + 0.5 * np.sin(second * angle))
    # n = noise * c - c - wave, and a vertex moves out by w - n.
    move = noise + growth + wave
    return Formula(ATOMS, lines, radius, ovals, directions(angle), move, float(move.max()), noise * NOISE)


@lru_cache(maxsize=4096)
def contour_formula(seed: int, label: int) -> Formula:
    """RCDB: numbers of vertices and lines and the noise make the class; radius and ovals are the image's."""
    rng = generator(CLASS, seed, CONTOURS, label)
    vertices = 0
    while not 2 < vertices <= 200:
        vertices = int(exact(-100.0 * np.log(1.0 - rng.random())))
    lines, noise, growth = int(rng.integers(1, 201)), 4.0 * rng.random(), 0.1 * rng.random()
    angle = np.arange(vertices) * (2 * np.pi / vertices)
    # n = noise * 2c - c, and a vertex moves out by w - n.
    move = np.full(vertices, noise + growth)
    return Formula(CONTOURS, lines, 0.0, (1.0, 1.0), directions(angle), move, noise + growth, 2.0 * noise * NOISE)


def directions(angle: np.ndarray) -> np.ndarray:
    """Cosine and sine (2, V)."""
    return exact(np.stack([np.cos(angle), np.sin(angle)]))


def exact(values: np.ndarray) -> np.ndarray:
    """Round to 2^-20, where all processors agree."""
    return np.rint(values * EXACT) / EXACT


@lru_cache(maxsize=2048)
def outline(formula: Formula, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The shared part of all images of a class: directions, float64, and step and spread (lines.py), float32.

    All (2, v + 1), of one vertex in `stride`, with the first one repeated at the end.
    """
    vertices = np.append(np.arange(0, formula.vertices, formula.stride(size)), 0)
    direction, scale = formula.direction.take(vertices, axis=1), size / CANVAS
    step = (formula.move[vertices] + formula.noise) * scale * direction
    spread = 2 * formula.noise / 255 * scale * direction
    return direction, step.astype(np.float32), spread.astype(np.float32)


def start_of(formula: Formula, header: np.ndarray, direction: np.ndarray, size: int) -> np.ndarray:
    """Start of an image's polygons (lines.py): float32 (2, v + 1).

    Args:
        header: uint64 (HEADER,), the random numbers of the image's parameters.
    """
    x, y, radius, wide, high, *_ = shares(header)
    ovals = formula.ovals
    if formula.family == CONTOURS:
        reach, radius, ovals = 400.0, 100.0 * radius, (1.0 + wide, 1.0 + high)
    else:
        reach, radius = CANVAS, formula.radius
    center = np.array([[CANVAS / 2 + reach * (x - 0.5)], [CANVAS / 2 + reach * (y - 0.5)]])
    start = (np.array([[radius * ovals[0]], [radius * ovals[1]]]) * direction + center) * (size / CANVAS) + OFFSET
    return start.astype(np.float32)


def draw_formula(formula: Formula, seed: int, label: int, instance: int, size: int, attempt: int) -> np.ndarray:
    """One image, polygons in random grays on black: uint8 (size, size)."""
    rng = generator(IMAGE, seed, formula.family, label, instance, attempt * ATTEMPT)
    words = rng.bit_generator.random_raw(formula.words(size)).astype("<u8", copy=False)
    direction, step, spread = outline(formula, size)
    start = start_of(formula, words[:HEADER], direction, size)
    numbers = words[HEADER:].view(np.uint8)
    shape = formula.noise_shape(size)
    noise = numbers[8 * formula.gray_words :][: math.prod(shape)].reshape(shape)
    return draw_polygons(Polygons(start, step, spread, noise, numbers[: formula.lines], formula.every(size)), size)


def draw_atom(seed: int, label: int, instance: int, size: int, attempt: int) -> np.ndarray:
    """One VisualAtom image; center and noise differ between the images of a class."""
    return draw_formula(atom_formula(seed, label), seed, label, instance, size, attempt)


def draw_contours(seed: int, label: int, instance: int, size: int, attempt: int) -> np.ndarray:
    """One RCDB image; center, radius, ovals and noise differ between the images of a class."""
    return draw_formula(contour_formula(seed, label), seed, label, instance, size, attempt)
