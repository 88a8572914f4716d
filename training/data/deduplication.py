"""Pictures that two data sets share: found by a perceptual hash, so that training pictures are not tested on.

The ViT paper de-duplicates its pre-training data against the test sets (section 4.1; the method is of Kolesnikov et
al., "Big Transfer", appendix). Here each picture is shrunk to a 17 x 16 thumbnail, whose 256 bits say where brightness
rises from left to right (a "difference hash"). Pairs whose hashes nearly agree are compared by their thumbnails'
colours, which separates plain pictures, whose hashes mean nothing. It finds copies, also re-encoded or resized ones;
crops and mirrored copies it does not. Comparing costs one product of matrices: 50,000 with 10,000 in seconds.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .dataset import ImageDataset, collate
from .transforms import TrainTransform


WIDTH, HEIGHT = 17, 16  # of the thumbnail: 16 x 16 differences
BITS_APART = 32  # of 256, at most
COLOURS_APART = 6.0  # mean difference of the thumbnails, of 255, at most
BLOCK = 2048  # pictures that are compared with all others at once


@dataclass(frozen=True)
class Duplicate:
    """A picture of one data set that is also in another."""

    index: int
    name: str
    other_index: int
    other_name: str
    bits_apart: int
    colours_apart: float


def deduplicate(
    dataset: ImageDataset, against: ImageDataset, *, num_workers: int = 0
) -> tuple[ImageDataset, list[Duplicate]]:
    """Leave out the pictures that are also in `against`.

    Returns:
        the remaining data set (the same object where nothing is shared), and what was left out.
    """
    found = find_duplicates(dataset, against, num_workers=num_workers)
    if not found:
        return dataset, []
    left_out = np.array([duplicate.index for duplicate in found])
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), left_out)), found


def find_duplicates(
    dataset: ImageDataset,
    against: ImageDataset,
    *,
    num_workers: int = 0,
    bits_apart: int = BITS_APART,
    colours_apart: float = COLOURS_APART,
) -> list[Duplicate]:
    """Pictures of `dataset` that are in `against`, each with its nearest twin, by index. Unreadable ones match none.

    Args:
        num_workers: processes that decode.
        bits_apart: of 256 hash bits, how many may differ. colours_apart: mean difference of thumbnails, 0 to 255.
    """
    rows, thumbnails = read_thumbnails(dataset, num_workers)
    other_rows, other_thumbnails = read_thumbnails(against, num_workers)
    if not len(rows) or not len(other_rows):
        return []
    signs, other_signs = difference_signs(thumbnails), difference_signs(other_thumbnails)
    found = []
    for begin in range(0, len(rows), BLOCK):
        # Bits that differ, from the product of +1/-1 vectors: one matrix product, exact in float32.
        apart = (signs.shape[1] - signs[begin : begin + BLOCK] @ other_signs.T) / 2
        for row in np.flatnonzero((apart <= bits_apart).any(axis=1)):
            twins = np.flatnonzero(apart[row] <= bits_apart)
            difference = other_thumbnails[twins].astype(np.int16) - thumbnails[begin + row].astype(np.int16)
            colours = np.abs(difference).mean(axis=(1, 2, 3))
            best = int(colours.argmin())
            if colours[best] <= colours_apart:
                index, other = int(rows[begin + row]), int(other_rows[twins[best]])
                names = dataset.picture_name(index), against.picture_name(other)
                bits = int(apart[row, twins[best]])
                found.append(Duplicate(index, names[0], other, names[1], bits, float(colours[best])))
    return found


def read_thumbnails(dataset: ImageDataset, num_workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the readable pictures, int64 (n,), and their thumbnails, uint8 (n, 3, HEIGHT, WIDTH)."""
    # Of the training kind, which decodes a JPEG at an eighth of its size where that is enough
    shrunk = dataset.with_transform(TrainTransform((HEIGHT, WIDTH), crop="squash", flip=False))
    loader = torch.utils.data.DataLoader(shrunk, batch_size=256, collate_fn=collate, num_workers=num_workers)
    batches = [(batch["index"].numpy(), batch["pixel_values"].numpy()) for batch in loader if len(batch["index"])]
    if not batches:
        return np.empty(0, dtype=np.int64), np.empty((0, 3, HEIGHT, WIDTH), dtype=np.uint8)
    indices, thumbnails = zip(*batches)
    return np.concatenate(indices), np.concatenate(thumbnails)


def difference_signs(thumbnails: np.ndarray) -> np.ndarray:
    """The 256 bits of the hash as float32 +1 (brighter to the right) and -1, (n, 256)."""
    grey = thumbnails.astype(np.int16).sum(axis=1)
    rises = grey[:, :, 1:] > grey[:, :, :-1]
    return np.where(rises, np.float32(1), np.float32(-1)).reshape(len(thumbnails), -1)
