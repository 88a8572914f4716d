"""Closed polygons by the hundred, drawn over one another: the rasteriser of `atoms` and `contours`.

A picture is L polygons of V vertices; polygon l is polygon l - 1 moved outward, so that with S the running sum of the
noise all vertices are `start + l * step - spread * S` (contours.py fills these in). The arithmetic is numpy's float32
multiplication, addition and division, each rounded by IEEE 754, and whole numbers: the same bytes on any machine, and
in batches.py on any device. The lines are the DDA's: from vertex to vertex in as many steps as the longer axis has
pixels, the last point left to the next line.
"""

from dataclasses import dataclass

import numpy as np


LARGEST_SIZE = 1024  # px; the vertices of larger pictures would not fit into the fixed-point numbers below
OFFSET = 4096  # px, makes every coordinate positive, so that cutting off the fraction rounds down
FRACTION = 10  # bits after the point while a line is stepped through; the lowest 8 bits of all carry its grey
HALF = 1 << 17  # half a pixel
POINTS_AT_ONCE = 30000  # at most, and one line
LINES_AT_ONCE = 16000  # lines from vertex to vertex that are drawn in one go: what stays in the processor's cache


@dataclass(frozen=True)
class Polygons:
    """What to draw, in pixels.

    `start`, `step`, `spread`: float32 (2, V + 1), x and y, the first vertex once more at the end. `noise`: uint8 (L, 2, V). `greys`: uint8 (L,).
    `every`: of the polygons, counted from the last, only every so-manieth is drawn.
    """

    start: np.ndarray
    step: np.ndarray
    spread: np.ndarray
    noise: np.ndarray
    greys: np.ndarray
    every: int


def draw_polygons(polygons: Polygons, size: int) -> np.ndarray:
    """The polygons in their greys on black, the later over the earlier: uint8 (size, size)."""
    count = len(polygons.noise)
    drawn = slice((count - 1) % polygons.every, None, polygons.every)
    sums, greys = running_sums(polygons.noise)[drawn], polygons.greys[drawn]
    numbers = np.arange(1, count + 1, dtype=np.float32)[drawn, None]
    start, step, spread = polygons.start[:, None], polygons.step[:, None], polygons.spread[:, None]
    # One column and one row too many take whatever lies outside.
    canvas = np.zeros((size + 1) * (size + 1), dtype=np.uint8)
    at_once = max(1, LINES_AT_ONCE // sums.shape[2])
    for first in range(0, len(greys), at_once):
        part = slice(first, first + at_once)
        places = numbers[part] * step
        places += start
        noise = sums[part].transpose(1, 0, 2).astype(np.float32, order="C")
        noise *= spread
        places -= noise
        corners = places.astype(np.int16)
        corners -= OFFSET
        draw_lines(corners, greys[part], size, canvas)
    return np.ascontiguousarray(canvas.reshape(size + 1, size + 1)[:size, :size])


def running_sums(noise: np.ndarray) -> np.ndarray:
    """Sums over the polygons up to each one, closed: uint16 (L, 2, V + 1) of uint8 (L, 2, V)."""
    sums = np.empty((*noise.shape[:2], noise.shape[2] + 1), dtype=np.uint16)
    sums[:, :, :-1], sums[:, :, -1] = noise, noise[:, :, 0]
    distance = 1
    while distance < len(sums):  # Hillis and Steele: whole arrays at a time, faster than row after row
        sums[distance:] += sums[:-distance]
        distance *= 2
    return sums


def draw_lines(corners: np.ndarray, greys: np.ndarray, size: int, canvas: np.ndarray) -> None:
    """Draw closed polygons into `canvas`, uint8 of (size + 1)^2.

    Args:
        corners: int16 (2, n, V + 1), x and y in pixels. greys: uint8 (n,).
    """
    # All polygons are one chain of corners; the lines from the last corner of one to the first of the next are left out.
    closed = corners.shape[2]
    chain = corners.reshape(2, -1)
    distance = chain[:, 1:] - chain[:, :-1]
    points = np.maximum(*np.abs(distance))
    points[closed - 1 :: closed] = 0
    # For each axis, is either end of a line above the lower limit, and either below the upper one?
    inside = np.stack([chain >= 0, chain < size])
    inside = inside[:, :, 1:] | inside[:, :, :-1]
    seen = np.logical_and.reduce(inside, axis=(0, 1))
    seen &= points > 0
    line = seen.nonzero()[0]
    if not len(line):
        return
    points = points.take(line)
    ratio = distance.take(line, axis=1).astype(np.float32)
    ratio *= np.float32(1 << FRACTION) / points.astype(np.float32)
    # A point is one 64-bit number: y and x as 14.10 bits above the grey. So is a step, and a line is a progression.
    packed = np.empty((2, len(line), 2), dtype="<i4")
    packed[0, :, 0], packed[0, :, 1] = chain.take(line, axis=1)
    packed[1, :, 0], packed[1, :, 1] = ratio
    packed[0] <<= 18
    packed[0] += HALF
    packed[0, :, 0] += greys.repeat(closed).take(line)
    packed[1] <<= 8
    origin, step = packed.view("<i8")[:, :, 0]
    ends = points.cumsum(dtype=np.int64)
    if ends[-1] <= POINTS_AT_ONCE:
        return draw_points(origin, step, points, size, canvas)
    cuts = np.searchsorted(ends, range(POINTS_AT_ONCE, int(ends[-1]), POINTS_AT_ONCE), side="right").tolist()
    for first, last in zip([0, *cuts], [*cuts, len(line)]):
        if first < last:
            part = slice(first, last)
            draw_points(origin[part], step[part], points[part], size, canvas)


def draw_points(origin: np.ndarray, step: np.ndarray, points: np.ndarray, size: int, canvas: np.ndarray) -> None:
    """Draw lines of at least one point each into `canvas`: all three int64 (n,), and changed."""
    # Twice the running sum: of the changes from step to step, then of the steps and the leaps from line to line.
    points = points.astype(np.int64)
    begin = points.cumsum()
    place = np.zeros(begin[-1], dtype="<i8")
    begin -= points
    points -= 1
    points *= step
    points += origin
    step[1:] -= step[:-1].copy()
    place[begin] = step
    place.cumsum(out=place)
    origin[1:] -= points[:-1]
    place[begin] = origin
    place.cumsum(out=place)
    cells = place.view("<i4") >> 18
    cells = cells.view("<u4")
    limit = np.empty_like(cells)
    limit.fill(size)
    np.minimum(cells, limit, out=cells)  # several times as fast as with one number
    # y * 2^32 + x, times 2^32 + (size + 1), has y * (size + 1) + x in its upper half.
    index = cells.view("<u8")
    index *= np.uint64((1 << 32) + size + 1)
    index >>= np.uint64(32)
    canvas[index.view(np.int64)] = place.astype(np.uint8)
