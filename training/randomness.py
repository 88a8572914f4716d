"""Random numbers with an address: the same four words give the same numbers in any process, in any order.

For data, augmentation and synthetic, which hand every picture its own generator, so that neither the number of
workers, nor the rank, nor a resumed run changes a pixel. Philox is counter-based (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011): key and counter are the address, and nothing is carried from one picture to the
next.
"""

import numpy as np


WORD = (1 << 64) - 1

# First word of every address: what the numbers are for, so that two uses of one seed are independent.
TRANSFORM = 1  # (seed, epoch, index): crop, flip and colour of one training picture
MIXING = 2  # (seed, step): mixup and cutmix of one step
SUBSET = 3  # (seed, class): the order in which a class's pictures enter nested subsets
SPLIT = 4  # (0): the fixed order in which slices such as train[:98%] are taken from sources sorted by class
STREAM = 5  # (seed, epoch, window): the order of shards and of the records inside a window
IMAGE = 6  # (seed, family, class, instance): one generated picture
CLASS = 7  # (seed, family, class): the parameters that define a generated class


def generator(purpose: int, seed: int, first: int = 0, second: int = 0, third: int = 0) -> np.random.Generator:
    """Return the generator at the address (purpose, seed, first, second, third); words are taken modulo 2^64.

    The lowest counter word stays free: each address has 2^64 blocks of numbers before it meets another.
    """
    key = ((purpose & WORD) << 64) | (seed & WORD)
    counter = ((third & WORD) << 192) | ((second & WORD) << 128) | ((first & WORD) << 64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
