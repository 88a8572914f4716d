"""Find images that two data sets share, by a perceptual hash, so that training images are not tested on.

The ViT paper de-duplicates its pre-training data against the test sets (section 4.1; the method is of Kolesnikov et
al., "Big Transfer", appendix). Here each image is shrunk to a 17 x 16 thumbnail; 256 bits tell where its brightness
rises from left to right (a "difference hash"). Pairs of nearly equal hashes are then compared by the colors of their
thumbnails, which separates plain images, whose hashes are random. It finds copies, also re-encoded or resized ones,
but no crops or mirrored copies. Not imagehash: it compares pair by pair, while here a matrix product compares blocks.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from hf_vit.atomic_file import atomic_path
from hf_vit.capabilities import native_bfloat16, usable_cores
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
SMALL_FILE = 1 << 16  # bytes up to which a file is read and not mapped: an empty array cannot be mapped
PAIR = np.dtype([("index", np.int64), ("other", np.int64), ("bits", np.int64), ("colors", np.float64)])
SAMPLED = 500  # images of each set that `sampled_duplicates` compares
_SAMPLED: dict[tuple[str, str], tuple[list["Duplicate"], str]] = {}  # by the fingerprints of both
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
        The remaining data set (the same object without duplicates), and the duplicates.
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

    Memory is about 1 kB for each image of `against`, whatever the size of `dataset` if thumbnails are cached. A
    billion pairs take six seconds of processor time (AMD EPYC with bfloat16), on all cores.

    Args:
        num_workers: processes that decode; by default one per core for large data sets.
        cache_dir: for thumbnails and pairs, by the data's fingerprints, for other processes and later runs.
        bits_apart: how many of the 256 bits may differ. colors_apart: mean difference of thumbnails, 0 to 255.
    """

    def compute() -> np.ndarray:
        ours, theirs = (read_thumbnails(data, num_workers, cache_dir) for data in (dataset, against))
        return match(ours, theirs, bits_apart, colors_apart)

    key = digest(dataset.fingerprint, against.fingerprint, HEIGHT, WIDTH, bits_apart, colors_apart)
    pairs = cached(f"duplicates-{key}.npy", PAIR, compute, cache_dir).tolist()
    return [
        Duplicate(index, dataset.image_name(index), other, against.image_name(other), bits, colors)
        for index, other, bits, colors in pairs
    ]


def match(ours: np.ndarray, theirs: np.ndarray, bits_apart: int, colors_apart: float) -> np.ndarray:
    """The nearest match of each thumbnail that has one, PAIR (n,); arguments as in `find_duplicates`."""
    pairs: list[tuple] = []
    if not len(ours) or not len(theirs):
        return np.array(pairs, dtype=PAIR)
    other_signs = difference_signs(theirs["pixels"]).T.contiguous()  # (256, M)
    step = min(BLOCK_IMAGES, max(1, BLOCK_ELEMENTS // len(theirs)))
    least = BITS - 2 * bits_apart  # the product of +1/-1 vectors is the bits that agree less those that differ
    for first in range(0, len(ours), step):
        block = ours[first : first + step]
        with all_cores():
            agreement = difference_signs(block["pixels"]) @ other_signs
        for row in torch.nonzero(agreement.amax(1) >= least)[:, 0].tolist():
            near = torch.nonzero(agreement[row] >= least)[:, 0].numpy()
            apart = theirs["pixels"][near].astype(np.int16) - block["pixels"][row].astype(np.int16)
            difference = np.abs(apart).mean(axis=(1, 2, 3))
            best = int(difference.argmin())
            if difference[best] <= colors_apart:
                index, other = int(block["index"][row]), int(theirs["index"][near[best]])
                bits = int(BITS - agreement[row, near[best]]) // 2
                pairs.append((index, other, bits, float(difference[best])))
    return np.array(pairs, dtype=PAIR)


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Use all cores: torchrun gives each process one thread, and here the other processes wait for this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sampled_duplicates(dataset: ImageDataset, against: ImageDataset) -> tuple[list[Duplicate], str]:
    """`find_duplicates` among at most SAMPLED images of each set, evenly spread, so that large sets take seconds.

    Returns:
        The duplicates, and a phrase with the numbers of images.
    """
    key = (dataset.fingerprint, against.fingerprint)
    if key not in _SAMPLED:
        rows = [np.unique(np.linspace(0, len(data) - 1, min(SAMPLED, len(data)), dtype=np.int64))
                  for data in (dataset, against)]  # fmt: skip
        parts = [replace(data.select(where), on_unreadable="skip") for data, where in zip((dataset, against), rows)]
        duplicates = [
            replace(match, index=int(rows[0][match.index]), other_index=int(rows[1][match.other_index]))
            for match in find_duplicates(*parts, num_workers=0)
        ]
        sampled = " (a sample)" if len(parts[0]) < len(dataset) or len(parts[1]) < len(against) else ""
        among = f"{len(parts[0]):,} evaluation and {len(parts[1]):,} training images{sampled}"
        _SAMPLED.clear()  # only the last pair: a run asks before training, and again for its report
        _SAMPLED[key] = (duplicates, among)
    return _SAMPLED[key]


def read_thumbnails(
    dataset: ImageDataset, num_workers: int | None = None, cache_dir: Path | None = None
) -> np.ndarray:
    """Thumbnails of the readable images, THUMBNAIL (n,), by index; mapped from the cache if there is one."""
    name = f"thumbnails-{digest(dataset.fingerprint, HEIGHT, WIDTH)}.npy"
    return cached(name, THUMBNAIL, lambda: compute_thumbnails(dataset, num_workers), cache_dir)


def cached(name: str, kind: np.dtype, compute: Callable[[], np.ndarray], cache_dir: Path | None) -> np.ndarray:
    """A cached array, mapped from its file.

    Of several processes that share the cache, one computes it while the others wait.
    """
    if cache_dir is None:
        return compute()
    path = Path(cache_dir) / name
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:  # the run goes on without a cache that cannot be written
        return compute()
    try:
        array = load_cached(path, kind)
        if array is None:
            computed = compute()
            try:
                with atomic_path(path) as temporary:
                    np.save(temporary, computed)
            except (OSError, HFViTError):  # as above: a full disk, say
                return computed
            array = load_cached(path, kind)
            array = computed if array is None else array
        return array
    finally:
        lock.release()


def load_cached(path: Path, kind: np.dtype) -> np.ndarray | None:
    """An array mapped from a file; None if the file is missing or damaged."""
    try:
        array = np.load(path, mmap_mode="r" if path.stat().st_size > SMALL_FILE else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == kind and array.ndim == 1 else None


def compute_thumbnails(dataset: ImageDataset, num_workers: int | None = None) -> np.ndarray:
    """Decode and shrink every image."""
    if num_workers is None:
        num_workers = usable_cores()
        num_workers = num_workers if num_workers > 1 and len(dataset) >= MIN_IMAGES_FOR_WORKERS else 0
    # A training transform, which may decode a JPEG at an eighth of its size.
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
