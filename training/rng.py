"""Counter-based random numbers: each has an address, and the same address gives the same numbers in any process.

For data and synthetic, which give every image its own generator, so that neither the number of workers, nor the rank,
nor a resumed run changes a pixel. Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011): key and counter are the address, and no state is carried from one image to the next.
"""

import numpy as np


WORD = (1 << 64) - 1

# First word of every address: the purpose of the numbers, so that two uses of one seed are independent.
TRANSFORM = 1  # (seed, epoch, index): crop, flip and color of one training image
MIXING = 2  # (seed, step): mixup and cutmix of one step
SUBSET = 3  # (seed, class): the order in which a class's images enter nested subsets
SPLIT = 4  # (0): the fixed order in which slices such as train[:98%] are taken from sources sorted by class
STREAM = 5  # (seed, epoch, window): the order of shards and of the records inside a window
IMAGE = 6  # (seed, family, class, instance): one generated image
CLASS = 7  # (seed, family, class): the parameters that define a generated class
LABEL = 8  # (seed, class, instance): a generated image's wrong label, with label noise
FOLDS = 9  # (seed, class): which images of a class are in which fold

# The constants of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
GOLDEN, FIRST_MIX, SECOND_MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def generator(
    purpose: int, seed: int, first: int = 0, second: int = 0, third: int = 0, block: int = 0
) -> np.random.Generator:
    """Return the generator at the address (purpose, seed, first, second, third); words are taken modulo 2^64.

    The lowest counter word is free: each address has 2^64 blocks of four 64-bit numbers before the next one begins.

    Args:
        block: number of blocks to skip, for several independent streams at one address.
    """
    key = np.array([seed & WORD, purpose & WORD], dtype=np.uint64)
    counter = np.array([block & WORD, first & WORD, second & WORD, third & WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def shares(words: np.ndarray) -> list[float]:
    """64-bit words as numbers in [0, 1) with 53 bits."""
    return [(int(word) >> 11) * 2.0**-53 for word in words]


def hashed(purpose: int, seed: int, first: np.ndarray, second: np.ndarray | int = 0) -> np.ndarray:
    """One random 64-bit word per address, for many addresses at once: uint64, in the shape of `first` and `second`."""
    # splitmix64 on whole arrays: a Philox generator has to be made for each address in Python
    state = np.uint64(mixed((seed + mixed(purpose)) & WORD))
    for part in (first, second):
        state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(GOLDEN)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(FIRST_MIX)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(SECOND_MIX)
        state = state ^ (state >> np.uint64(31))
    return state


def mixed(word: int) -> int:
    """splitmix64's mix of a single word, as a Python int."""
    word = (word + GOLDEN) & WORD
    word = ((word ^ (word >> 30)) * FIRST_MIX) & WORD
    word = ((word ^ (word >> 27)) * SECOND_MIX) & WORD
    return word ^ (word >> 31)
