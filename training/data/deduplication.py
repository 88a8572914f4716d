"""Images that two data sets share: found by a perceptual hash, so that training images are not tested on.

The ViT paper de-duplicates its pre-training data against the test sets (section 4.1; the method is of Kolesnikov et
al., "Big Transfer", appendix). Here each image is shrunk to a 17 x 16 thumbnail, whose 256 bits say where brightness
rises from left to right (a "difference hash"). Pairs whose hashes nearly agree are compared by their thumbnails'
colors, which separates plain images, whose hashes mean nothing. It finds copies, also re-encoded or resized ones;
crops and mirrored copies it does not. Not imagehash: it compares pair by pair, here a matrix product compares blocks.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from hf_vit.atomic_file import atomic_path
from hf_vit.capabilities import native_bfloat16
from hf_vit.errors import HFViTError

from .dataset import ImageDataset, collate
from .sources import digest
from .transforms import TrainTransform


WIDTH, HEIGHT = 17, 16  # of the thumbnail: 16 x 16 differences
BITS = (WIDTH - 1) * HEIGHT
MAX_BITS_APART = 32
MAX_COLORS_APART = 6.0  # mean difference of the thumbnails, of 255
BLOCK_ELEMENTS = 2**24  # of the product of two blocks of hashes: 64 MB
BLOCK_IMAGES = 4096  # of which one block has, at most
MIN_IMAGES_FOR_WORKERS = 4096  # below, starting processes takes longer than they save
THUMBNAIL = np.dtype([("index", np.int64), ("pixels", np.uint8, (3, HEIGHT, WIDTH))])


@dataclass(frozen=True)
class Duplicate:
    """An image of one data set that is also in another."""

    index: int
    name: str
    other_index: int
    other_name: str
    bits_apart: int
    colors_apart: float


def deduplicate(
    dataset: ImageDataset, against: ImageDataset, *, num_workers: int | None = None, cache_dir: Path | None = None
) -> tuple[ImageDataset, list[Duplicate]]:
    """Leave out the images that are also in `against`; arguments as in `find_duplicates`.

    Returns:
        the remaining data set (the same object where nothing is shared), and what was left out.
    """
    duplicates = find_duplicates(dataset, against, num_workers=num_workers, cache_dir=cache_dir)
    if not duplicates:
        return dataset, []
    left_out = np.array([duplicate.index for duplicate in duplicates])
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), left_out)), duplicates


def find_duplicates(
    dataset: ImageDataset,
    against: ImageDataset,
    *,
    num_workers: int | None = None,
    cache_dir: Path | None = None,
    bits_apart: int = MAX_BITS_APART,
    colors_apart: float = MAX_COLORS_APART,
) -> list[Duplicate]:
    """Images of `dataset` that are in `against`, each with its nearest match, by index. Unreadable ones match none.

    Memory is about 1 kB for each image of `against`, whatever the size of `dataset` where thumbnails are cached.

    Args:
        num_workers: processes that decode; by default one a core for large data sets.
        cache_dir: where thumbnails are kept by the data's fingerprint, and read by other processes and later runs.
        bits_apart: of 256 hash bits, how many may differ. colors_apart: mean difference of thumbnails, 0 to 255.
    """
    ours, theirs = (read_thumbnails(data, num_workers, cache_dir) for data in (dataset, against))
    if not len(ours) or not len(theirs):
        return []
    other_signs = difference_signs(theirs["pixels"]).T.contiguous()  # (256, M)
    step = min(BLOCK_IMAGES, max(1, BLOCK_ELEMENTS // len(theirs)))
    least = BITS - 2 * bits_apart  # the product of +1/-1 vectors is the bits that agree less those that differ
    duplicates = []
    for first in range(0, len(ours), step):
        block = ours[first : first + step]
        agreement = difference_signs(block["pixels"]) @ other_signs
        for row in torch.nonzero(agreement.amax(1) >= least)[:, 0].tolist():
            near = torch.nonzero(agreement[row] >= least)[:, 0].numpy()
            apart = theirs["pixels"][near].astype(np.int16) - block["pixels"][row].astype(np.int16)
            difference = np.abs(apart).mean(axis=(1, 2, 3))
            best = int(difference.argmin())
            if difference[best] <= colors_apart:
                index, other = int(block["index"][row]), int(theirs["index"][near[best]])
                names = dataset.image_name(index), against.image_name(other)
                bits = int(BITS - agreement[row, near[best]]) // 2
                duplicates.append(Duplicate(index, names[0], other, names[1], bits, float(difference[best])))
    return duplicates


def read_thumbnails(
    dataset: ImageDataset, num_workers: int | None = None, cache_dir: Path | None = None
) -> np.ndarray:
    """Thumbnails of the readable images, THUMBNAIL (n,), by index; mapped from the cache where there is one.

    Of several processes that share the cache, one computes and the others wait for it and read.
    """
    if cache_dir is None:
        return compute_thumbnails(dataset, num_workers)
    path = Path(cache_dir) / f"thumbnails-{digest(dataset.fingerprint, HEIGHT, WIDTH)}.npy"
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:  # a cache that cannot be written costs time, not the run
        return compute_thumbnails(dataset, num_workers)
    try:
        thumbnails = load_thumbnails(path)
        if thumbnails is None:
            thumbnails = compute_thumbnails(dataset, num_workers)
            try:
                with atomic_path(path) as temporary:
                    np.save(temporary, thumbnails)
            except (OSError, HFViTError):  # as above: a full disk, say
                return thumbnails
            mapped = load_thumbnails(path)
            thumbnails = thumbnails if mapped is None else mapped
        return thumbnails
    finally:
        lock.release()


def load_thumbnails(path: Path) -> np.ndarray | None:
    """Thumbnails mapped from a file; None where there is none, or one that is damaged."""
    try:
        thumbnails = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return thumbnails if thumbnails.dtype == THUMBNAIL and thumbnails.ndim == 1 else None


def compute_thumbnails(dataset: ImageDataset, num_workers: int | None = None) -> np.ndarray:
    """Decode and shrink every image."""
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = num_workers if num_workers > 1 and len(dataset) >= MIN_IMAGES_FOR_WORKERS else 0
    # Of the training kind, which decodes a JPEG at an eighth of its size where that is enough
    shrunk = dataset.with_transform(TrainTransform((HEIGHT, WIDTH), crop="squash", flip=False))
    loader = torch.utils.data.DataLoader(shrunk, batch_size=256, collate_fn=collate, num_workers=num_workers)
    thumbnails, count = np.empty(len(dataset), dtype=THUMBNAIL), 0
    for batch in loader:
        rows = thumbnails[count : count + len(batch["index"])]
        if len(rows):
            rows["index"], rows["pixels"] = batch["index"].numpy(), batch["pixel_values"].numpy()
        count += len(rows)
    return thumbnails[:count]


def difference_signs(pixels: np.ndarray) -> torch.Tensor:
    """The bits of the hash as +1 (brighter to the right) and -1, (n, 256), of uint8 (n, 3, HEIGHT, WIDTH).

    bfloat16 where the processor has it, four times as fast, else float32: even numbers up to 256 are exact in both.
    """
    gray = pixels.astype(np.int16).sum(axis=1, dtype=np.int16)
    rises = gray[:, :, 1:] > gray[:, :, :-1]
    signs = torch.from_numpy(np.where(rises, np.float32(1), np.float32(-1)).reshape(len(pixels), -1))
    return signs.bfloat16() if native_bfloat16() else signs
