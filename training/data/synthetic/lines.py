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
POINTS_AT_ONCE = 30000  # at most, and one line
LINES_AT_ONCE = 16000  # lines from vertex to vertex that are drawn in one go: what stays in the processor's cache


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
    count = len(polygons.noise)
    drawn = slice((count - 1) % polygons.every, None, polygons.every)
    sums, greys = running_sums(polygons.noise)[:, drawn], polygons.greys[drawn]
    numbers = np.arange(1, count + 1, dtype=np.float32)[drawn, None]
    start, step, spread = (closed(part)[:, None] for part in (polygons.start, polygons.step, polygons.spread))
    # One column and one row too many take whatever lies outside.
    canvas = np.zeros((size + 1) * (size + 1), dtype=np.uint8)
    at_once = max(1, LINES_AT_ONCE // sums.shape[2])
    for first in range(0, len(greys), at_once):
        part = slice(first, first + at_once)
        places = numbers[part] * step
        places += start
        noise = sums[:, part].astype(np.float32)
        noise *= spread
        places -= noise
        corners = places.astype(np.int16)
        corners -= OFFSET
        draw_lines(corners, greys[part], size, canvas)
    return np.ascontiguousarray(canvas.reshape(size + 1, size + 1)[:size, :size])


def closed(values: np.ndarray) -> np.ndarray:
    """Values of vertices (..., V) with the first of them once more at the end: (..., V + 1)."""
    return np.concatenate([values, values[..., :1]], axis=-1)


def running_sums(noise: np.ndarray) -> np.ndarray:
    """Sums over the polygons up to each one, closed: uint16 (2, L, V + 1) of uint8 (L, 2, V).

    Within blocks of polygons first, then the blocks' own sums on top."""
    count, _, vertices = noise.shape
    sums = np.zeros((2, -(-count // BLOCK), BLOCK, vertices + 1), dtype=np.uint16)
    flat = sums.reshape(2, -1, vertices + 1)
    flat[:, :count, :-1] = noise.transpose(1, 0, 2)
    flat[:, :count, -1] = noise[:, :, 0].T
    for row in range(1, BLOCK):
        sums[:, :, row] += sums[:, :, row - 1]
    for block in range(1, sums.shape[1]):
        sums[:, block] += sums[:, block - 1, -1:]
    return flat[:, :count]


def draw_lines(corners: np.ndarray, greys: np.ndarray, size: int, canvas: np.ndarray) -> None:
    """Draw open polygons into `canvas`, uint8 of (size + 1)^2.

    Args:
        corners: int16 (2, n, V + 1), x and y in pixels. greys: uint8 (n,).
    """
    # All polygons are one chain of corners; the lines from the last corner of one to the first of the next are left out.
    chain = corners.reshape(2, -1)
    distance = np.empty_like(chain)
    np.subtract(chain[:, 1:], chain[:, :-1], out=distance[:, :-1])
    points = np.abs(distance)
    points = np.maximum(points[0], points[1])
    points.reshape(corners.shape[1:])[:, -1] = 0
    before, after = chain < 0, chain >= size
    hidden = before[:, :-1] & before[:, 1:]
    hidden |= after[:, :-1] & after[:, 1:]
    shown = points > 0
    shown[:-1] &= ~(hidden[0] | hidden[1])
    line = np.flatnonzero(shown)
    if not len(line):
        return
    points = points.take(line).astype(np.float32)
    # A point is one 64-bit number: y and x as 14.10 bits above the grey. So is a step, and a line is a progression.
    ratio = distance.take(line, axis=1).astype(np.float32)
    ratio *= np.float32(1 << FRACTION) / points
    ratio = ratio.astype(np.int32)
    ratio <<= 8
    origin = chain.take(line, axis=1).astype(np.int32)
    origin <<= 18
    origin += HALF
    origin[0] += np.repeat(greys, corners.shape[2]).take(line)
    origin, step = pack(origin), pack(ratio)
    points = points.astype(np.int64)
    begin = np.cumsum(points)
    cuts = np.searchsorted(begin, range(POINTS_AT_ONCE, int(begin[-1]), POINTS_AT_ONCE), side="right").tolist()
    for first, last in zip([0, *cuts], [*cuts, len(line)]):
        if first < last:
            part = slice(first, last)
            draw_points(origin[part], step[part], points[part], size, canvas)


def draw_points(origin: np.ndarray, step: np.ndarray, points: np.ndarray, size: int, canvas: np.ndarray) -> None:
    """Draw lines of at least one point each into `canvas`: all three int64 (n,), and changed."""
    # Twice the running sum: of the changes from step to step, then of the steps and the leaps from line to line.
    begin = np.cumsum(points)
    place = np.zeros(begin[-1], dtype="<i8")
    begin -= points
    points -= 1
    points *= step
    points += origin
    step[1:] -= step[:-1].copy()
    place[begin] = step
    np.cumsum(place, out=place)
    origin[1:] -= points[:-1]
    place[begin] = origin
    np.cumsum(place, out=place)
    cells = (place.view("<i4") >> 18).view("<u4")
    np.minimum(cells, np.full_like(cells, size), out=cells)  # several times as fast as with one number
    # y * 2^32 + x, times 2^32 + (size + 1), has y * (size + 1) + x in its upper half.
    index = cells.view("<u8")
    index *= np.uint64((1 << 32) + size + 1)
    index >>= np.uint64(32)
    canvas[index.view(np.int64)] = place.astype(np.uint8)


def pack(pairs: np.ndarray) -> np.ndarray:
    """int32 (2, n) as int64 (n,), the first row in the lower halves."""
    packed = np.empty((pairs.shape[1], 2), dtype="<i4")
    packed[:, 0], packed[:, 1] = pairs
    return packed.view("<i8")[:, 0]
