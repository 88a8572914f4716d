"""Shading: turns ink into images in gray or color, on backgrounds. For families.py.

Ink is float32 (size, size) from 0 (background) to 1, or uint8 from 0 to 255.

Tests: tests/training/data/synthetic/test_synthetic.py.
"""

from collections.abc import Callable

import numpy as np


Source = Callable[[], np.random.Generator]  # called only if shading is random
OCTAVES = 3  # of a cloudy background: 2, 4 and 8 cells a side


def white_on_black(ink: np.ndarray, source: Source) -> np.ndarray:
    """uint8 ink as it is."""
    return three_channels(ink)


def black_on_white(ink: np.ndarray, source: Source) -> np.ndarray:
    """The negative of uint8 ink."""
    return three_channels(255 - ink)


def shade_gray(ink: np.ndarray, source: Source) -> np.ndarray:
    """Float ink on a background, both gray: 9 of 10 bright on nearly black, others with less contrast; some noise."""
    rng = source()
    kind, paper, contrast, noise = rng.random(4)
    if kind < 0.9:
        background, foreground = 0.12 * max(0.0, 2 * paper - 1), 1.0 - 0.35 * contrast
    else:
        background, foreground = contrasting(paper, 0.35 + 0.65 * contrast)
    gray = (foreground - background) * ink.astype(np.float64)
    gray += background
    grain = grain_of(noise, gray.shape, rng)
    if grain is not None:
        gray += grain
    return three_channels(to_bytes(gray))


def three_channels(gray: np.ndarray) -> np.ndarray:
    """Gray as uint8 (size, size, 3)."""
    image = np.empty((*gray.shape, 3), dtype=np.uint8)
    for channel in range(3):  # faster than broadcasting or repeating
        image[:, :, channel] = gray
    return image


def shade_color(ink: np.ndarray, source: Source) -> np.ndarray:
    """Ink on a background of two colors that differ clearly in at least one channel; some noise."""
    rng = source()
    background, foreground, noise = two_colors(rng)
    return three_colors(list(background), foreground, ink, noise, rng)


def shade_clouds(ink: np.ndarray, source: Source) -> np.ndarray:
    """Ink in one color on clouds, which go from a second color up to halfway to a third."""
    rng = source()
    background, foreground, noise = two_colors(rng)
    third = rng.random(3, dtype=np.float32)
    clouds = np.float32(0.5) * cloudy(len(ink), rng)
    backgrounds = [low + (high - low) * clouds for low, high in zip(background, third)]
    return three_colors(backgrounds, foreground, ink, noise, rng)


def three_colors(
    background: list[np.ndarray], foreground: np.ndarray, ink: np.ndarray, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Ink of one color on a background, with noise: uint8 (size, size, 3).

    Args:
        background: of each channel float32, a number or (size, size). foreground: float32 (3,).
    """
    ink, image = ink_fraction(ink), np.empty((*ink.shape, 3), dtype=np.uint8)
    grain = grain_of(noise, image.shape, rng)
    for channel in range(3):  # four times as fast as all channels at once, for numpy's inner loop would have length 3
        values = (foreground[channel] - background[channel]) * ink
        values += background[channel]
        if grain is not None:
            values += grain[:, :, channel]
        image[:, :, channel] = to_bytes(values)
    return image


def ink_fraction(ink: np.ndarray) -> np.ndarray:
    """Ink from 0 to 1."""
    return ink if ink.dtype == np.float32 else ink.astype(np.float32) / 255


def two_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Background and foreground, float32 (3,), that differ by half at least in one channel; and a number for noise."""
    *numbers, noise = rng.random(7)
    pairs = [contrasting(numbers[channel], numbers[3 + channel]) for channel in range(3)]
    strongest = int(np.argmax([abs(foreground - background) for background, foreground in pairs]))
    pairs[strongest] = contrasting(numbers[strongest], 0.5 + 0.5 * numbers[3 + strongest])
    background, foreground = (np.array(side, dtype=np.float32) for side in zip(*pairs))
    return background, foreground, noise


def contrasting(background: float, contrast: float) -> tuple[float, float]:
    """A background, and a foreground that differs by `contrast` on the side with more room, both within 0..1."""
    if background < 0.5:
        return background * (1 - contrast), background * (1 - contrast) + contrast
    return 1 - (1 - background) * (1 - contrast), background * (1 - contrast)


def cloudy(size: int, rng: np.random.Generator) -> np.ndarray:
    """Random values between ever finer grids of points, each half as strong: float32 (size, size) from 0 to 1."""
    clouds = np.zeros((size, size), dtype=np.float32)
    for octave in range(OCTAVES):
        cells = 2 << octave
        grid = rng.random((cells + 1, cells + 1), dtype=np.float32)
        positions = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / size)
        below = positions.astype(np.intp)
        above = positions - below
        rows = grid[below] * (1 - above)[:, None] + grid[below + 1] * above[:, None]
        values = rows.take(below, axis=1)
        values *= 1 - above
        right = rows.take(below + 1, axis=1)
        right *= above
        values += right
        values *= 0.5**octave
        clouds += values
    return clouds / np.float32(2 - 0.5 ** (OCTAVES - 1))


def grain_of(amount: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | None:
    """Uniform noise, float32 of that shape, for a third of the images."""
    if amount <= 2 / 3:
        return None
    grain = rng.random(shape, dtype=np.float32)
    grain -= np.float32(0.5)
    grain *= np.float32(0.6 * (amount - 2 / 3))
    return grain


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as uint8; others are clipped. Overwrites `values`."""
    values.clip(0.0, 1.0, out=values)
    values *= 255
    return np.rint(values, out=values).astype(np.uint8)
