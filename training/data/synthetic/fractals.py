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
    points = chaos_game(system, words)
    angle = 2 * np.pi * turn
    cosine, sine = (np.float32(np.rint(value * EXACT) / EXACT) for value in (np.cos(angle), np.sin(angle)))
    x, y = cosine * points[0] - sine * points[1], sine * points[0] + cosine * points[1]
    place = to_pixels(y, size) * np.int32(size) + to_pixels(-x if mirror else x, size)
    return brightness(np.bincount(place.ravel(), minlength=size * size)).reshape(size, size)


def brightness(counts: np.ndarray) -> np.ndarray:
    """Visits per pixel as grey: the root of their share of what all but the busiest pixels stay below."""
    pixels = np.bincount(counts)
    pixels[0] = 0
    share, whole = BRIGHTEST
    white = max(1, int(np.searchsorted(np.cumsum(pixels) * whole, pixels.sum() * share)))
    table = np.rint(255 * np.sqrt(np.minimum(np.arange(len(pixels)), white) / white)).astype(np.uint8)
    return table[counts]


def to_pixels(values: np.ndarray, size: int) -> np.ndarray:
    """Stretch one coordinate over the side; a coordinate without extent goes to the middle. int32."""
    low, high = values.min(), values.max()
    inner = np.float32((1 - 2 * MARGIN) * size)
    if not high > low:
        return np.full(values.shape, size // 2, dtype=np.int32)
    values = (values - low) * (inner / (high - low))
    values += np.float32(MARGIN * size)
    return np.minimum(values.astype(np.int32), size - 1)


def moves(size: int) -> int:
    """Steps of the chaos game, and random words that it takes."""
    return WARM_UP + -(-POINTS_PER_PIXEL * size * size // CHAINS)


@cache
def shuffled() -> np.ndarray:
    """A fixed permutation of the chains, twice in a row."""
    order = np.argsort(hashed(IMAGE, FRACTALS, np.arange(CHAINS)), kind="stable")
    return np.concatenate([order, order])


def chaos_game(system: System, words: np.ndarray) -> np.ndarray:
    """Points on the attractor: float32 (2, steps after the warm-up, CHAINS)."""
    matrices, shifts = system
    (a, b), (c, d) = matrices.transpose(1, 2, 0)
    weights = np.maximum(np.abs(a * d - b * c), 1e-3)
    ends = np.cumsum(weights)
    ends = np.rint(ends / ends[-1] * CHAINS).astype(np.intp)
    # a, b, c, d, e, f of x' = a x + b y + e, y' = c x + d y + f for each place: (6, CHAINS).
    table = np.concatenate([matrices.reshape(-1, 4), shifts], axis=1).T.astype(np.float32)
    a, b, c, d, e, f = np.repeat(table, np.diff(ends, prepend=0), axis=1)
    x, y = (np.full(CHAINS, value, dtype=np.float32) for value in fixed_point(matrices[0], shifts[0]))
    points = np.empty((2, len(words) - WARM_UP, CHAINS), dtype=np.float32)
    for step, word in enumerate(words):
        first = int(word) % CHAINS
        order = shuffled()[first : first + CHAINS]
        x, y = x[order], y[order]
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= WARM_UP:
            points[0, step - WARM_UP], points[1, step - WARM_UP] = x, y
    return points


def fixed_point(matrix: np.ndarray, shift: np.ndarray) -> tuple[float, float]:
    """The point that a map leaves where it is."""
    (a, b), (c, d) = matrix.tolist()
    e, f = shift.tolist()
    determinant = (1 - a) * (1 - d) - b * c
    return ((1 - d) * e + b * f) / determinant, (c * e + (1 - a) * f) / determinant
