"""Attractors of iterated function systems: the family `fractals` of synthetic.py.

Classes are drawn as by Anderson and Farrell ("Improving fractal pre-training", WACV 2022): affine maps with singular
values that add up to a given "sigma factor", so that every system contracts and most are well filled. Instances differ
by one parameter, by turning and mirroring, as in FractalDB (Kataoka et al., "Pre-training without natural images",
ACCV 2020). The chaos game runs as many short chains side by side, all started in the fixed point of the first map,
which lies on the attractor.
"""

from functools import lru_cache

import numpy as np

from .randomness import CLASS, generator


FRACTALS = 4  # the family's number in random addresses
FEWEST_FILLED = 0.1  # share of the pixels of a trial picture that a class must fill
TRIAL_SIZE = 64
WARM_UP = 12  # steps after which a chain is anywhere on the attractor
STEPS = 16  # points that each chain then gives
POINTS_PER_PIXEL = 2.0
DRAWS = 4096  # resolution of the maps' probabilities
MARGIN = 0.03  # of the side, left free

System = tuple[np.ndarray, np.ndarray]  # matrices (n, 2, 2) and shifts (n, 2)


@lru_cache(maxsize=65536)
def fractal_system(seed: int, label: int) -> System:
    """The maps of a class; systems that fill too little are drawn again."""
    rng = generator(CLASS, seed, FRACTALS, label)
    while True:
        system = sample_system(rng)
        picture = render(system, TRIAL_SIZE, rng)
        if (picture > 0).mean() >= FEWEST_FILLED:
            return system


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


def draw_fractal(seed: int, label: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture: the class's system with one parameter changed by up to a fifth, turned and mirrored."""
    matrices, shifts = (part.copy() for part in fractal_system(seed, label))
    chosen, factor, turn, mirror = rng.random(4)
    place = int(chosen * 6 * len(matrices))
    number, parameter = divmod(place, 6)
    if parameter < 4:
        matrices[number].flat[parameter] *= 0.8 + 0.4 * factor
        largest = np.linalg.norm(matrices[number], 2)
        matrices[number] *= min(1.0, 0.99 / largest)
    else:
        shifts[number, parameter - 4] *= 0.8 + 0.4 * factor
    return render((matrices, shifts), size, rng, 2 * np.pi * turn, mirror < 0.5)


def render(system: System, size: int, rng: np.random.Generator, turn: float = 0.0, mirror: bool = False) -> np.ndarray:
    """Brightness by how often the chaos game comes by: float32 (size, size) from 0 to 1."""
    points = chaos_game(system, int(POINTS_PER_PIXEL * size * size / STEPS) + 1, rng)
    cosine, sine = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    x, y = cosine * points[0] - sine * points[1], sine * points[0] + cosine * points[1]
    columns, rows = (to_pixels(-x if mirror else x, size), to_pixels(y, size))
    counts = np.bincount(rows * size + columns, minlength=size * size).reshape(size, size).astype(np.float32)
    return np.sqrt(counts / max(1.0, np.quantile(counts[counts > 0], 0.95))).clip(0.0, 1.0)


def to_pixels(values: np.ndarray, size: int) -> np.ndarray:
    """Stretch one coordinate over the side; a coordinate without extent goes to the middle."""
    low, high = values.min(), values.max()
    inner = (1 - 2 * MARGIN) * size
    stretch = inner / (high - low) if high > low else 0.0
    return (np.float32(MARGIN * size) + (values - low) * np.float32(stretch)).astype(np.intp).clip(0, size - 1)


def chaos_game(system: System, chains: int, rng: np.random.Generator) -> np.ndarray:
    """Points on the attractor: float32 (2, STEPS * chains)."""
    matrices, shifts = (part.astype(np.float32) for part in system)
    weights = np.maximum(np.abs(np.linalg.det(matrices)), 1e-3)
    maps = np.searchsorted(np.cumsum(weights / weights.sum())[:-1], (np.arange(DRAWS) + 0.5) / DRAWS)
    start = np.linalg.solve(np.eye(2, dtype=np.float32) - matrices[0], shifts[0])
    x, y = (np.full(chains, value, dtype=np.float32) for value in start)
    # a, b, c, d, e, f of x' = a x + b y + e, y' = c x + d y + f for each of the equally likely draws: (6, DRAWS).
    table = np.concatenate([matrices.reshape(-1, 4), shifts], axis=1).T[:, maps].copy()
    points = np.empty((2, STEPS, chains), dtype=np.float32)
    for step in range(WARM_UP + STEPS):
        chosen = rng.integers(0, DRAWS, size=chains, dtype=np.uint16)
        a, b, c, d, e, f = (row[chosen] for row in table)
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= WARM_UP:
            points[0, step - WARM_UP], points[1, step - WARM_UP] = x, y
    return points.reshape(2, -1)
