"""Rasterizer for hundreds of closed polygons: draws the families `atoms` and `contours`.

An image is L polygons of V vertices. Polygon l is polygon l - 1 moved outward, so that with S the running sum of the
noise all vertices are `start + l * step - spread * S` (contours.py computes these). The arithmetic is float32
multiplication, addition and division, each rounded by IEEE 754, and integers: the same bytes on any machine. Lines are
drawn by a DDA: from vertex to vertex in as many steps as the longer axis has pixels, without the last point, which
belongs to the next line.

Not PIL's `ImageDraw.line`, whose pixels differ between versions of Pillow.

Tests: tests/training/data/synthetic/test_synthetic.py.
"""

from dataclasses import dataclass

import numpy as np


LARGEST_SIZE = 1024  # px; the vertices of larger images would not fit into the fixed-point numbers below
OFFSET = 4096  # px, makes every coordinate positive, so that truncation rounds down
FRACTION = 10  # bits after the point along a line; the lowest 8 bits of each number carry the gray
HALF = 1 << 17  # half a pixel
LINES_AT_ONCE = 16_000  # lines from vertex to vertex: few calls of numpy, and arrays that stay in the cache
POINTS_AT_ONCE = 30_000  # pixels of lines, likewise


@dataclass(frozen=True)
class Polygons:
    """The polygons of an image, in pixels.

    `start`, `step`, `spread`: float32 (2, V + 1), x and y, with the first vertex repeated at the end.
    `noise`: uint8 (L, 2, V). `grays`: uint8 (L,). `every`: draw one polygon in `every`, counted from the last.
    """

    start: np.ndarray
    step: np.ndarray
    spread: np.ndarray
    noise: np.ndarray
    grays: np.ndarray
    every: int


def draw_polygons(polygons: Polygons, size: int) -> np.ndarray:
    """The polygons in their grays on black, the later over the earlier: uint8 (size, size)."""
    count = len(polygons.noise)
    drawn = slice((count - 1) % polygons.every, None, polygons.every)
    sums, grays = running_sums(polygons.noise)[drawn], polygons.grays[drawn]
    numbers = np.arange(1, count + 1, dtype=np.float32)[drawn, None]
    start, step, spread = polygons.start[:, None], polygons.step[:, None], polygons.spread[:, None]
    # The extra column and row receive points outside of the image.
    canvas = np.zeros((size + 1) * (size + 1), dtype=np.uint8)
    at_once = max(1, LINES_AT_ONCE // sums.shape[2])
    for first in range(0, len(grays), at_once):
        part = slice(first, first + at_once)
        vertices = numbers[part] * step
        vertices += start
        noise = sums[part].transpose(1, 0, 2).astype(np.float32, order="C")
        noise *= spread
        vertices -= noise  # (2, polygons, V + 1)
        corners = vertices.astype(np.int16)
        corners -= OFFSET
        fill_polygons(corners, grays[part], size, canvas)
    return np.ascontiguousarray(canvas.reshape(size + 1, size + 1)[:size, :size])


def running_sums(noise: np.ndarray) -> np.ndarray:
    """Sums over the polygons up to each one, first vertex repeated: uint16 (L, 2, V + 1) of uint8 (L, 2, V)."""
    sums = np.empty((*noise.shape[:2], noise.shape[2] + 1), dtype=np.uint16)
    sums[:, :, :-1], sums[:, :, -1] = noise, noise[:, :, 0]
    # Hillis and Steele's prefix sum: log2(L) operations on whole arrays are faster than one a row, or np.cumsum.
    distance = 1
    while distance < len(sums):
        sums[distance:] += sums[:-distance]
        distance *= 2
    return sums


def fill_polygons(corners: np.ndarray, grays: np.ndarray, size: int, canvas: np.ndarray) -> None:
    """Draw closed polygons into `canvas`, uint8 of (size + 1)^2.

    Args:
        corners: int16 (2, n, V + 1), x and y in pixels. grays: uint8 (n,).
    """
    # All polygons are one chain of corners, without the lines from the last corner of one to the first of the next.
    closed = corners.shape[2]
    chain = corners.reshape(2, -1)
    distance = chain[:, 1:] - chain[:, :-1]
    points = np.maximum(*np.abs(distance))
    points[closed - 1 :: closed] = 0
    # On each axis: is either end not below the image, and either end not above it?
    inside = np.stack([chain >= 0, chain < size])
    inside = inside[:, :, 1:] | inside[:, :, :-1]
    visible = np.logical_and.reduce(inside, axis=(0, 1))
    visible &= points > 0
    line = visible.nonzero()[0]
    if not len(line):
        return
    points = points.take(line)
    ratio = distance.take(line, axis=1).astype(np.float32)
    ratio *= np.float32(1 << FRACTION) / points.astype(np.float32)
    # A point is one 64-bit number: y and x as 14.10 bits above the gray. So is a step, and a line is a progression.
    packed = np.empty((2, len(line), 2), dtype="<i4")
    packed[0, :, 0], packed[0, :, 1] = chain.take(line, axis=1)
    packed[1, :, 0], packed[1, :, 1] = ratio
    packed[0] <<= 18
    packed[0] += HALF
    packed[0, :, 0] += grays.repeat(closed).take(line)
    packed[1] <<= 8
    origin, step = packed.view("<i8")[:, :, 0]
    ends = points.cumsum(dtype=np.int64)
    cuts = np.searchsorted(ends, range(POINTS_AT_ONCE, int(ends[-1]), POINTS_AT_ONCE), side="right").tolist()
    for first, last in zip([0, *cuts], [*cuts, len(line)]):
        if first < last:
            part = slice(first, last)
            draw_points(origin[part], step[part], points[part].astype(np.int64), size, canvas)


def draw_points(origin: np.ndarray, step: np.ndarray, count: np.ndarray, size: int, canvas: np.ndarray) -> None:
    """Draw `count` points of each line from `origin` on, `step` apart, into `canvas`.

    Args:
        origin, step, count: int64 (n,), changed on the way; no count is 0.
    """
    # A running sum of the changes from step to step gives each point's step. A running sum of these gives the points,
    # once the first step of a line is replaced by the leap from the end of the previous line.
    begin = count.cumsum()
    points = np.zeros(begin[-1], dtype="<i8")
    begin -= count
    count -= 1
    last = count * step
    last += origin
    step[1:] -= step[:-1].copy()
    points[begin] = step
    points.cumsum(out=points)
    origin[1:] -= last[:-1]
    points[begin] = origin
    points.cumsum(out=points)
    cells = points.view("<i4") >> 18  # x, y, x, y, ...
    cells = cells.view("<u4")  # negative ones are large now
    limit = np.empty_like(cells)  # np.minimum of an array and a number is three times as slow
    limit.fill(size)
    np.minimum(cells, limit, out=cells)
    # y * 2^32 + x, times 2^32 + (size + 1), has y * (size + 1) + x in its upper half.
    index = cells.view("<u8")
    index *= np.uint64((1 << 32) + size + 1)
    index >>= np.uint64(32)
    canvas[index.view("<i8")] = points.astype(np.uint8)
