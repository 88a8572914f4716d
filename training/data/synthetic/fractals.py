"""Attractors of iterated function systems: the family `fractals` of families.py.

Classes are drawn as by Anderson and Farrell ("Improving fractal pre-training", WACV 2022): affine maps with singular
values that add up to a given "sigma factor", so that every system contracts and most are well filled. Instances differ
by one parameter, by turning and mirroring, as in FractalDB (Kataoka et al., "Pre-training without natural images",
ACCV 2020).

The chaos game runs as many chains side by side, all started in the fixed point of the first map, which lies on the
attractor. At every step the chains are shuffled by a fixed permutation, moved round by a random number of places, and
each map takes its share of neighbouring places: no random number per point, and no map short of its share.

What a picture rests on is rounded to 2^-20, where processors agree on sines and cosines; from there it is single
additions, multiplications, divisions and roots, each rounded by IEEE 754, and whole numbers.
"""

from functools import cache, lru_cache

import numpy as np

from ...rng import CLASS, IMAGE, generator, hashed, shares


FRACTALS = 4  # the family's number in random addresses
FEWEST_FILLED = 0.1  # share of the pixels of a trial picture that a class must fill
TRIAL_SIZE = 64
CHAINS = 4096  # at most
WARM_UP = 12  # steps after which a chain is anywhere on the attractor
POINTS_PER_PIXEL = 2
MARGIN = 0.03  # of the side, left free
BRIGHTEST = 19, 20  # pixels as often visited as 19 of 20 are white
ROWS = 5  # steps of the chaos game at once: what stays in the processor's cache
HEADER = 8  # 64-bit words of a picture's own, before the places by which the chains are moved
EXACT = 2.0**20
ATTEMPT = 1 << 32  # blocks of random numbers from one attempt at a picture to the next

System = tuple[np.ndarray, np.ndarray]  # matrices (n, 2, 2) and shifts (n, 2)


@lru_cache(maxsize=65536)
def fractal_system(seed: int, label: int) -> System:
    """The maps of a class; systems that fill too little are drawn again."""
    rng = generator(CLASS, seed, FRACTALS, label)
    while True:
        system = exact_system(sample_system(rng))
        words = rng.bit_generator.random_raw(moves(TRIAL_SIZE))
        if (render(system, TRIAL_SIZE, words) > 0).mean() >= FEWEST_FILLED:
            return system


def exact_system(system: System) -> System:
    """Rounded to what every processor agrees on."""
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
    """One picture, the class's system with one parameter changed by up to a fifth, turned and mirrored:
    uint8 (size, size)."""
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
    return render(exact_system((matrices, shifts)), size, words[HEADER:], turn, mirror < 0.5)


def render(system: System, size: int, words: np.ndarray, turn: float = 0.0, mirror: bool = False) -> np.ndarray:
    """Brightness by how often the chaos game comes by: uint8 (size, size).

    Args:
        words: uint64 (moves(size),). turn: of a full one.
    """
    angle = 2 * np.pi * turn
    cosine, sine = (np.float32(np.rint(value * EXACT) / EXACT) for value in (np.cos(angle), np.sin(angle)))
    points = chaos_game(system, words)
    rotate(points, cosine, sine, mirror)
    return brightness(np.bincount(pixels_of(points, size), minlength=size * size)).reshape(size, size)


def rotate(points: np.ndarray, cosine: np.float32, sine: np.float32, mirror: bool) -> None:
    """Turn points (steps, 2, CHAINS) in place, and mirror them at the vertical axis."""
    by_cosine, by_sine = (np.empty((ROWS, *points.shape[1:]), dtype=np.float32) for _ in range(2))
    for first in range(0, len(points), ROWS):
        rows = points[first : first + ROWS]
        c, s = (np.multiply(rows, factor, out=out[: len(rows)]) for factor, out in ((cosine, by_cosine), (sine, by_sine)))
        if mirror:
            np.subtract(s[:, 1], c[:, 0], out=rows[:, 0])
        else:
            np.subtract(c[:, 0], s[:, 1], out=rows[:, 0])
        np.add(s[:, 0], c[:, 1], out=rows[:, 1])


def pixels_of(points: np.ndarray, size: int) -> np.ndarray:
    """Stretch points (steps, 2, CHAINS) over the image and number the pixels that they fall in: int64 (n,), written over
    the points. A coordinate without extent goes to the middle."""
    inner, middle = np.float32((1 - 2 * MARGIN) * size), np.float32(size // 2)
    stretches = []
    for values in (points[:, 0], points[:, 1]):
        low, high = values.min(), values.max()
        scale, margin = (inner / (high - low), np.float32(MARGIN * size)) if high > low else (np.float32(0), middle)
        stretches.append((low, scale, margin))
    result = points.view(np.int64).reshape(len(points), CHAINS)
    cells = np.empty((ROWS, 2, CHAINS), dtype=np.int32)
    for first in range(0, len(points), ROWS):
        rows = points[first : first + ROWS]
        for axis, (low, scale, margin) in enumerate(stretches):
            values = rows[:, axis]
            values -= low
            values *= scale
            values += margin
        whole = cells[: len(rows)]
        np.copyto(whole, rows, casting="unsafe")
        y = whole[:, 1]
        y *= np.int32(size)
        y += whole[:, 0]
        result[first : first + ROWS] = y
    return result.ravel()


def brightness(counts: np.ndarray) -> np.ndarray:
    """Visits per pixel as grey: the root of their share of what all but the busiest pixels stay below."""
    most = int(counts.max())
    visits = counts.astype(np.min_scalar_type(most))  # one byte is counted in an eighth of the time of eight
    empty = np.count_nonzero(visits == 0)
    share, whole = BRIGHTEST
    enough = (visits.size - empty) * share
    low, white = 1, most
    while low < white:  # bisection for the lowest number of visits that `share` of the visited pixels do not exceed
        middle = (low + white) // 2
        if (np.count_nonzero(visits <= middle) - empty) * whole >= enough:
            white = middle
        else:
            low = middle + 1
    table = np.rint(255 * np.sqrt(np.minimum(np.arange(most + 1), white) / white)).astype(np.uint8)
    return table.take(counts)


def moves(size: int) -> int:
    """Steps of the chaos game, and random words that it takes."""
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
    # x' = a x + b y + e and y' = d y + c x + f: (a, d), (b, c) and (e, f) for each place, (3, 2, CHAINS).
    (a, b), (c, d) = matrices.transpose(1, 2, 0)
    table = np.stack([a, d, b, c, *shifts.T]).astype(np.float32)
    near, far, shift = np.repeat(table, np.diff(ends, prepend=0), axis=1).reshape(3, 2, CHAINS)
    order = shuffled()
    points = np.empty((len(words) - WARM_UP, 2, CHAINS), dtype=np.float32)
    moved = np.empty((3, CHAINS), dtype=np.float32)  # x, y, x: the first two rows, and the last two the other way round
    other = np.empty((2, CHAINS), dtype=np.float32)
    state = np.empty((2, CHAINS), dtype=np.float32)
    state.T[:] = fixed_point(matrices[0], shifts[0])
    xy, yx = moved[:2], moved[1:]
    for step, first in enumerate((words % np.uint64(CHAINS)).tolist(), start=-WARM_UP):
        state.take(order[first : first + CHAINS], axis=1, out=xy, mode="wrap")
        moved[2] = moved[0]
        state = points[max(step, 0)]
        np.multiply(near, xy, out=state)
        np.multiply(far, yx, out=other)
        state += other
        state += shift
    return points


def fixed_point(matrix: np.ndarray, shift: np.ndarray) -> tuple[float, float]:
    """The point that a map leaves where it is."""
    (a, b), (c, d) = matrix.tolist()
    e, f = shift.tolist()
    determinant = (1 - a) * (1 - d) - b * c
    return ((1 - d) * e + b * f) / determinant, (c * e + (1 - a) * f) / determinant
