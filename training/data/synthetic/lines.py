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
BLOCK = 8
LINES_AT_ONCE = 5000  # lines from vertex to vertex that are drawn in one go: what stays in the processor's cache


@dataclass(frozen=True)
class Polygons:
    """What to draw, in pixels.

    `start`, `step`, `spread`: float32 (2, V), x and y. `noise`: uint8 (L, 2, V). `greys`: uint8 (L,).
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
    count, _, vertices = polygons.noise.shape
    drawn = slice((count - 1) % polygons.every, None, polygons.every)
    sums, greys = running_sums(polygons.noise)[drawn], polygons.greys[drawn]
    numbers = np.arange(1, count + 1, dtype=np.float32)[drawn]
    # One column and one row too many take whatever lies outside.
    canvas = np.zeros((size + 1) * (size + 1), dtype=np.uint8)
    at_once = max(1, LINES_AT_ONCE // vertices)
    for first in range(0, len(numbers), at_once):
        part = slice(first, first + at_once)
        places = numbers[part, None, None] * polygons.step
        places += polygons.start
        places -= np.multiply(sums[part], polygons.spread, dtype=np.float32)
        corners = np.empty((len(places), 2, vertices + 1), dtype=np.int16)
        corners[:, :, :-1] = places
        corners[:, :, -1] = corners[:, :, 0]
        corners -= OFFSET
        draw_lines(corners, greys[part], size, canvas)
    return canvas.reshape(size + 1, size + 1)[:size, :size]


def running_sums(noise: np.ndarray) -> np.ndarray:
    """Sums over the first axis up to each row, uint16: within blocks of rows, then the blocks' own sums on top."""
    count = len(noise)
    sums = np.zeros((-(-count // BLOCK), BLOCK, *noise.shape[1:]), dtype=np.uint16)
    flat = sums.reshape(-1, *noise.shape[1:])
    flat[:count] = noise
    for row in range(1, BLOCK):
        sums[:, row] += sums[:, row - 1]
    for block in range(1, len(sums)):
        sums[block] += sums[block - 1, -1]
    return flat[:count]


def draw_lines(corners: np.ndarray, greys: np.ndarray, size: int, canvas: np.ndarray) -> None:
    """Draw open polygons into `canvas`, uint8 of (size + 1)^2.

    Args:
        corners: int16 (n, 2, V + 1), x and y in pixels. greys: uint8 (n,).
    """
    begin, end = corners[:, :, :-1], corners[:, :, 1:]
    distance = end - begin
    points = np.abs(distance)
    points = np.maximum(points[:, 0], points[:, 1])
    seen = (np.maximum(begin, end) >= 0) & (np.minimum(begin, end) < size)
    points *= seen[:, 0] & seen[:, 1]
    # A point is one 64-bit number: y and x as 14.10 bits above the grey. So is a step, and a line is a progression.
    ratio = distance * (np.float32(1 << FRACTION) / np.maximum(points, 1))[:, None]
    origin = begin.astype(np.int32)
    origin <<= 18
    origin += HALF
    packed = np.empty((2, *points.shape, 2), dtype="<i4")
    packed[0, :, :, 0], packed[0, :, :, 1] = origin[:, 0] + greys[:, None], origin[:, 1]
    ratio = ratio.astype(np.int32)
    ratio <<= 8
    packed[1, :, :, 0], packed[1, :, :, 1] = ratio[:, 0], ratio[:, 1]
    origin, step = packed.view("<i8").reshape(2, -1)
    points = points.ravel().astype(np.int64)
    origin -= (np.cumsum(points) - points) * step
    line = np.repeat(np.arange(points.size), points)
    place = step[line]
    place *= np.arange(line.size)
    place += origin[line]
    x, y = ((place << 32) >> 50).view(np.uint64), (place >> 50).view(np.uint64)
    np.minimum(x, size, out=x)
    np.minimum(y, size, out=y)
    y *= np.uint64(size + 1)
    y += x
    canvas[y.view(np.int64)] = place.view(np.uint8)[::8]
