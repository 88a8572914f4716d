"""Wavy and noisy circles inside one another: the families `atoms` and `contours` of synthetic.py.

`atoms` is VisualAtom (Takashima et al., "Visual Atoms", CVPR 2023) with the ranges of its published script, `contours`
is RCDB (Kataoka et al., "Replacing Labeled Real-image Datasets with Auto-generated Contours", CVPR 2022). A picture is
L closed polygons of V vertices; each grows out of the one before by noise along the radius, so all vertices are one
cumulative sum. Their "Perlin noise" is read at an independent random place per vertex, hence white noise with a
standard deviation of 0.33; here it is uniform noise of that deviation.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .randomness import CLASS, generator


CANVAS = 512.0  # the formulas' own pixels
NOISE = 0.329 * 3**0.5  # half range of uniform noise with the standard deviation of 1-D Perlin noise
ATOMS, CONTOURS = 2, 3  # the families' numbers in random addresses
FEWEST_VERTICES = 3.0  # per pixel of the picture's side: finer polygons look the same


@dataclass(frozen=True)
class Formula:
    """What a class fixes. `cosine` and `sine` (V,), `wave` (V,): the radial waves of an atom, 0 for contours."""

    lines: int
    noise: float
    growth: float
    radius: float
    ovals: tuple[float, float]
    cosine: np.ndarray
    sine: np.ndarray
    wave: np.ndarray


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
    wave = 0.5 * np.sin(first * angle) + 0.5 * np.sin(second * angle)
    return Formula(lines, noise, growth, radius, ovals, *trigonometry(angle), wave.astype(np.float32))


@lru_cache(maxsize=4096)
def contour_formula(seed: int, label: int) -> Formula:
    """RCDB: numbers of vertices and lines and the noise make the class; radius and ovals are the picture's."""
    rng = generator(CLASS, seed, CONTOURS, label)
    vertices = 0
    while not 2 < vertices <= 200:
        vertices = int(-100.0 * np.log(1.0 - rng.random()))
    lines, noise, growth = int(rng.integers(1, 201)), 4.0 * rng.random(), 0.1 * rng.random()
    angle = np.arange(vertices) * (2 * np.pi / vertices)
    return Formula(lines, noise, growth, 0.0, (1.0, 1.0), *trigonometry(angle), np.zeros(vertices, dtype=np.float32))


def trigonometry(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine as float32."""
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def draw_atom(seed: int, label: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One VisualAtom picture, white lines on black; centre and noise are the picture's own: float32 (size, size)."""
    formula = atom_formula(seed, label)
    centre = 0.5 * (CANVAS + CANVAS * (2 * rng.random(2) - 1))
    # n = noise * c - c - wave, and a vertex moves out by w - n.
    steps = formula.noise + formula.growth + formula.wave
    return draw_lines(formula, size, rng, centre, formula.radius, formula.ovals, steps, formula.noise)


def draw_contours(seed: int, label: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One RCDB picture as ink; centre, radius, ovals and noise are the picture's own: float32 (size, size)."""
    formula = contour_formula(seed, label)
    centre = 0.5 * (CANVAS + 400.0 * (2 * rng.random(2) - 1))
    radius, ovals = 100.0 * rng.random(), (1.0 + rng.random(), 1.0 + rng.random())
    # n = noise * 2c - c, and a vertex moves out by w - n.
    steps = np.full(len(formula.wave), formula.noise + formula.growth, dtype=np.float32)
    return draw_lines(formula, size, rng, centre, radius, ovals, steps, 2.0 * formula.noise)


def draw_lines(
    formula: Formula, size: int, rng: np.random.Generator, centre: np.ndarray, radius: float,
    ovals: tuple[float, float], steps: np.ndarray, noise: float,
) -> np.ndarray:  # fmt: skip
    """Draw a formula's polygons in random greys, the later over the earlier.

    Args:
        steps: (V,) mean outward move from one polygon to the next, in canvas pixels. noise: what multiplies the noise.
    """
    lines, vertices = formula.lines, len(steps)
    scale = size / CANVAS
    greys = rng.integers(0, 256, size=lines, dtype=np.uint8)
    canvas = Image.new("L", (size, size))
    pen = ImageDraw.Draw(canvas)
    stride = max(1, int(vertices / (FEWEST_VERTICES * size)))
    cosine, sine, steps = formula.cosine[::stride], formula.sine[::stride], steps[::stride]
    moves = rng.random((2, lines, vertices), dtype=np.float32)[:, :, ::stride]
    moves = moves * np.float32(-2 * noise * NOISE) + (steps + np.float32(noise * NOISE))
    path = np.empty((lines, moves.shape[2] + 1, 2), dtype=np.float32)
    for axis, direction in enumerate((cosine, sine)):
        moves[axis, 0] = radius * ovals[axis]
        outward = np.cumsum(moves[axis], axis=0)
        path[:, :-1, axis] = (outward * direction + np.float32(centre[axis])) * np.float32(scale)
    path[:, -1] = path[:, 0]
    for line, grey in zip(path, greys):
        pen.line(line, fill=int(grey))
    return np.asarray(canvas, dtype=np.float32) / 255
