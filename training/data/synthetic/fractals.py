"""Attractors of iterated function systems: the family `fractals` of families.py.

Classes are drawn as by Anderson and Farrell ("Improving fractal pre-training", WACV 2022): affine maps with singular
values that add up to a given "sigma factor", so that every system contracts and most are well filled. Instances differ
by one parameter, by rotation and mirroring, as in FractalDB (Kataoka et al., "Pre-training without natural images",
ACCV 2020).

The chaos game runs many chains at once, all started in the fixed point of the first map, which lies on the attractor.
At every step the chains are shuffled by a fixed permutation and rotated by a random number of positions, and each map
is applied to its range of positions. This takes no random number per point, and no map gets too few points.

The parameters of an image are rounded to 2^-20, where processors agree on sines and cosines. The rest is additions,
multiplications, divisions and roots, each rounded by IEEE 754, and integers: the same bytes on any machine.

Tests: tests/training/data/synthetic/test_synthetic.py.
"""

from functools import cache, lru_cache

import numpy as np

from ...rng import CLASS, IMAGE, generator, hashed, shares


FRACTALS = 4  # the family's number in random addresses
MIN_FILLED = 0.1  # fraction of the pixels of a trial image that a class must fill
TRIAL_SIZE = 64
CHAINS = 4096  # at most
WARM_UP = 12  # steps after which a chain is anywhere on the attractor
POINTS_PER_PIXEL = 2
MARGIN = 0.03  # of the side, left free
BRIGHTEST = 19, 20  # of the visited pixels, 19 of 20 are at most white, the others would be brighter
STEPS_AT_ONCE = 8  # of the chaos game, when its points are drawn: these stay in the processor's cache
HEADER = 8  # 64-bit words with the parameters of an image, before the rotations of the chains
EXACT = 2.0**20
ATTEMPT = 1 << 32  # blocks of random numbers from one attempt at an image to the next

System = tuple[np.ndarray, np.ndarray]  # matrices (n, 2, 2) and shifts (n, 2)


@lru_cache(maxsize=65536)
def fractal_system(seed: int, label: int) -> System:
    """The maps of a class; systems that fill too little are drawn again."""
    rng = generator(CLASS, seed, FRACTALS, label)
    while True:
        system = exact_system(sample_system(rng))
        words = rng.bit_generator.random_raw(moves(TRIAL_SIZE))
        if (render_fractal(system, TRIAL_SIZE, words) > 0).mean() >= MIN_FILLED:
            return system


def exact_system(system: System) -> System:
    """The system rounded to 2^-20, where all processors agree."""
    matrices, shifts = (np.rint(part * EXACT) / EXACT for part in system)
    return matrices, shifts


def sample_system(rng: np.random.Generator) -> System:
    """2 to 7 maps U diag(s1, s2) V with rotations U, V, mirrored at random."""
    count = int(rng.integers(2, 8))
    values = sample_singular_values(count, (5 + count + rng.random()) / 2, rng)
    turns = np.pi * (2 * rng.random((2, count)) - 1)
    signs = np.where(rng.random((2, count)) < 0.5, -1.0, 1.0)
    matrices = rotations(turns[0]) @ (values[:, :, None] * (rotations(turns[1]) * signs.T[:, None, :]))
    return matrices, 2 * rng.random((count, 2)) - 1


def rotations(angles: np.ndarray) -> np.ndarray:
    """Matrices (n, 2, 2)."""
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cosine, -sine], axis=1), np.stack([sine, cosine], axis=1)], axis=1)


def sample_singular_values(count: int, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Pairs s1 >= s2 below 1, (count, 2), whose s1 + 2 s2 add up to `factor`."""
    values = np.empty((count, 2))
    left, slack = factor, factor - 3 * count + 3
    for number in range(count - 1):
        first = uniform(rng, max(0.0, slack / 3), min(1.0, left))
        slack, left = slack - first, left - first
        second = uniform(rng, max(0.0, slack / 2), min(first, left / 2))
        slack, left = slack + 3 - 2 * second, left - 2 * second
        values[number] = first, second
    second = uniform(rng, max(0.0, (left - 1) / 2), left / 3)
    values[-1] = left - 2 * second, second
    return values


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One uniform number."""
    return low + (high - low) * rng.random()


def draw_fractal(seed: int, label: int, instance: int, size: int, attempt: int) -> np.ndarray:
    """One image, uint8 (size, size): the system of the class with one parameter changed by up to a fifth, rotated and
    mirrored.
    """
    rng = generator(IMAGE, seed, FRACTALS, label, instance, attempt * ATTEMPT)
    words = rng.bit_generator.random_raw(HEADER + moves(size))
    chosen, factor, turn, mirror, *_ = shares(words[:HEADER])
    matrices, shifts = (part.copy() for part in fractal_system(seed, label))
    number, parameter = divmod(int(chosen * 6 * len(matrices)), 6)
    if parameter < 4:
        matrices[number].flat[parameter] *= 0.8 + 0.4 * factor
        largest = np.linalg.norm(matrices[number], 2)
        matrices[number] *= min(1.0, 0.99 / largest)
    else:
        shifts[number, parameter - 4] *= 0.8 + 0.4 * factor
    return render_fractal(exact_system((matrices, shifts)), size, words[HEADER:], turn, mirror < 0.5)


def render_fractal(
    system: System, size: int, words: np.ndarray, turn: float = 0.0, mirror: bool = False
) -> np.ndarray:
    """Brightness by how often the chaos game visits each pixel: uint8 (size, size).

    Args:
        words: uint64 (moves(size),). turn: angle as a fraction of a full turn. mirror: swap left and right.
    """
    angle = 2 * np.pi * turn
    cosine, sine = (np.float32(np.rint(value * EXACT) / EXACT) for value in (np.cos(angle), np.sin(angle)))
    points = chaos_game(system, words)
    rotate_points(points, cosine, sine, mirror)
    return brightness(np.bincount(to_pixels(points, size), minlength=size * size)).reshape(size, size)


def rotate_points(points: np.ndarray, cosine: np.float32, sine: np.float32, mirror: bool) -> None:
    """Rotate points, float32 (steps, 2, CHAINS), in place, and mirror them at the vertical axis."""
    for first in range(0, len(points), STEPS_AT_ONCE):
        block = points[first : first + STEPS_AT_ONCE]
        by_cosine, by_sine = cosine * block, sine * block
        if mirror:
            np.subtract(by_sine[:, 1], by_cosine[:, 0], out=block[:, 0])
        else:
            np.subtract(by_cosine[:, 0], by_sine[:, 1], out=block[:, 0])
        np.add(by_sine[:, 0], by_cosine[:, 1], out=block[:, 1])


def to_pixels(points: np.ndarray, size: int) -> np.ndarray:
    """Stretch points, float32 (steps, 2, CHAINS), over the image, and return their pixels, y * size + x.

    A coordinate without extent becomes the middle.

    Returns:
        int64 (steps * CHAINS,), in the memory of the points.
    """
    stretches = []
    for low, high in zip(points.min(axis=(0, 2)), points.max(axis=(0, 2))):
        if high > low:
            stretches.append((low, np.float32((1 - 2 * MARGIN) * size) / (high - low), np.float32(MARGIN * size)))
        else:
            stretches.append((low, np.float32(0), np.float32(size // 2)))
    pixels = points.view(np.int64).reshape(len(points), CHAINS)
    for first in range(0, len(points), STEPS_AT_ONCE):
        block = points[first : first + STEPS_AT_ONCE]
        for axis, (low, scale, margin) in enumerate(stretches):
            values = block[:, axis]
            values -= low
            values *= scale
            values += margin
        cells = block.astype(np.int32)
        y = cells[:, 1]
        y *= np.int32(size)
        y += cells[:, 0]
        pixels[first : first + STEPS_AT_ONCE] = y
    return pixels.ravel()


def brightness(counts: np.ndarray) -> np.ndarray:
    """Visits per pixel as gray, uint8: the root of their ratio to the 95th percentile of the visited pixels."""
    most = int(counts.max())
    visits = counts.astype(np.min_scalar_type(most))  # bytes, in general, are compared eight times as fast as int64
    empty = np.count_nonzero(visits == 0)
    part, whole = BRIGHTEST
    enough = (visits.size - empty) * part
    low, white = 1, most
    while low < white:  # bisection for the lowest number of visits that this fraction of them does not exceed
        middle = (low + white) // 2
        if (np.count_nonzero(visits <= middle) - empty) * whole >= enough:
            white = middle
        else:
            low = middle + 1
    table = np.rint(255 * np.sqrt(np.minimum(np.arange(most + 1), white) / white)).astype(np.uint8)
    return table.take(counts)


def moves(size: int) -> int:
    """Number of steps of the chaos game, each of which takes one random word."""
    return WARM_UP + -(-POINTS_PER_PIXEL * size * size // CHAINS)


@cache
def shuffled() -> np.ndarray:
    """A fixed permutation of the chains, twice in a row."""
    order = np.argsort(hashed(IMAGE, FRACTALS, np.arange(CHAINS)), kind="stable")
    return np.concatenate([order, order])


def chaos_game(system: System, words: np.ndarray) -> np.ndarray:
    """Points on the attractor: float32 (steps after the warm-up, 2, CHAINS)."""
    matrices, shifts = system
    (a, b), (c, d) = matrices.transpose(1, 2, 0)
    weights = np.maximum(np.abs(a * d - b * c), 1e-3)
    ends = np.cumsum(weights)
    ends = np.rint(ends / ends[-1] * CHAINS).astype(np.intp)
    # x' = a x + b y + e and y' = d y + c x + f at once: (x, y) times (a, d) plus (y, x) times (b, c) plus (e, f)
    table = np.stack([a, d, b, c, *shifts.T]).astype(np.float32)
    same, other, shift = np.repeat(table, np.diff(ends, prepend=0), axis=1).reshape(3, 2, CHAINS)
    order, first_places = shuffled(), (words % np.uint64(CHAINS)).tolist()
    points = np.empty((len(words) - WARM_UP, 2, CHAINS), dtype=np.float32)
    moved = np.empty((3, CHAINS), dtype=np.float32)  # x, y, x
    product = np.empty((2, CHAINS), dtype=np.float32)
    state = np.empty((2, CHAINS), dtype=np.float32)
    state.T[:] = fixed_point(matrices[0], shifts[0])
    for step, first in enumerate(first_places, start=-WARM_UP):
        # mode="wrap" takes indices as they are; the default copies when it is given `out`
        state.take(order[first : first + CHAINS], axis=1, out=moved[:2], mode="wrap")
        moved[2] = moved[0]
        state = points[max(step, 0)]
        np.multiply(same, moved[:2], out=state)
        np.multiply(other, moved[1:], out=product)
        state += product
        state += shift
    return points


def fixed_point(matrix: np.ndarray, shift: np.ndarray) -> tuple[float, float]:
    """The fixed point of a map."""
    (a, b), (c, d) = matrix.tolist()
    e, f = shift.tolist()
    determinant = (1 - a) * (1 - d) - b * c
    return ((1 - d) * e + b * f) / determinant, (c * e + (1 - a) * f) / determinant
