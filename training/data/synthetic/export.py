"""Generated pictures as files, for other programs or to draw them only once.

    python -m training.synthetic synthetic:atoms@1000,1000,224 --out atoms --workers 16
    python -m training.synthetic synthetic:glyphs@52,600,32 --out glyphs --format webdataset --splits train

Parquet with the columns `image` and `label` and the classes' names, as `datasets.load_dataset` and `--dataset` read
it, or WebDataset tar shards of N.png and N.cls (the label's number) beside a `label_names.json` of the classes' names.
A shard appears under its name when it is whole; the same command goes on where it was interrupted, and a folder with
anything else in it is refused.
"""

import argparse
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_vit.errors import HFViTError, Parser, report_error

from ..webdataset import NAMES_FILE
from .batches import check, draw_batch
from .images import DEFAULT_SEED, FIRST_INSTANCE, FORM, SyntheticImages


MANIFEST = ".synthetic.json"
SHARD_SIZE = 10_000  # pictures
ROW_GROUP = 256  # pictures that a stream reads at once
BATCH = 256  # pictures that are drawn at once on a device
Drawn = tuple[bytes, int, str]  # PNG, label, name


@dataclass(frozen=True)
class Shard:
    """One file to write: pictures `first` to `last` of a set."""

    images: SyntheticImages
    first: int
    last: int
    path: Path
    device: str | None

    def pictures(self) -> Iterator[Drawn]:
        """Draw them, one at a time or in batches."""
        numbers = range(self.first, self.last)
        if self.device is None:
            items = ((item["image"], item["label"]) for item in map(self.images.__getitem__, numbers))
        else:
            parts = (numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH))
            items = chain.from_iterable(drawn_on(self.images, part, self.device) for part in parts)
        for number, (image, label) in zip(numbers, items):
            yield encode(image), label, self.images.name(number)


def drawn_on(images: SyntheticImages, numbers: range, device: str) -> Iterable[tuple[np.ndarray, int]]:
    """Pictures (size, size, 3) and labels, drawn in one batch."""
    pixels, labels = draw_batch(images, numbers, device)
    return zip(pixels.permute(0, 2, 3, 1).cpu().numpy(), labels.tolist())


def encode(image: np.ndarray) -> bytes:
    """A picture as PNG, with one channel where all are alike."""
    grey = (image == image[:, :, :1]).all()
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image[:, :, 0]) if grey else image).save(data, "PNG", compress_level=1)
    return data.getvalue()


def write_parquet(shard: Shard, path: Path) -> None:
    """A table of pictures and labels that names its classes."""
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    label = datasets.ClassLabel(names=shard.images.label_names)
    schema = datasets.Features({"image": datasets.Image(), "label": label}).arrow_schema
    rows = [
        {"image": {"bytes": data, "path": f"{name}.png"}, "label": label} for data, label, name in shard.pictures()
    ]
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=ROW_GROUP, compression="none")


def write_webdataset(shard: Shard, path: Path) -> None:
    """A tar file of NUMBER.png and NUMBER.cls."""
    with tarfile.open(path, "w") as tar:
        for number, (data, label, _) in enumerate(shard.pictures(), start=shard.first):
            for kind, content in (("png", data), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:09d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


FORMATS = {"parquet": write_parquet, "webdataset": write_webdataset}


def write(shard: Shard, file_format: str) -> int:
    """Write one shard, under its name only when it is whole; returns its pictures."""
    aside = shard.path.with_name(f"{shard.path.name}.part")
    FORMATS[file_format](shard, aside)
    os.replace(aside, shard.path)
    return shard.last - shard.first


def plan(images: SyntheticImages, given: argparse.Namespace) -> list[Shard]:
    """All files of the set."""
    shards = []
    for split in given.splits:
        part = images.split(split)
        starts = range(0, len(part), given.shard_size)
        for number, first in enumerate(starts):
            of = f"{number:05d}-of-{len(starts):05d}.parquet" if given.format == "parquet" else f"{number:06d}.tar"
            last = min(len(part), first + given.shard_size)
            shards.append(Shard(part, first, last, given.out / f"{split}-{of}", given.device))
    return shards


def prepare(folder: Path, images: SyntheticImages, given: argparse.Namespace) -> None:
    """Make the folder, or make sure that it holds a part of just this.

    Raises:
        HFViTError: it holds anything else.
    """
    facts = {"set": images.describe(), "size": images.size, "format": given.format, "shard_size": given.shard_size}
    text = json.dumps(facts, indent=2) + "\n"
    manifest = folder / MANIFEST
    if folder.is_file():
        raise HFViTError(f"'{folder}' is a file; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()):
        if not manifest.exists() or manifest.read_text(encoding="utf-8") != text:
            raise HFViTError(f"'{folder}' holds something else than this set; give another folder, or empty it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.write_text(text, encoding="utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m training.synthetic", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("name", help=FORM)
    add("--out", type=Path, required=True, help="folder to write to; goes on where the same command was interrupted")
    add("--format", choices=tuple(FORMATS), default="parquet", help="default: parquet")
    add("--splits", nargs="+", choices=tuple(FIRST_INSTANCE), default=list(FIRST_INSTANCE), help="default: all three")
    add("--seed", type=int, default=DEFAULT_SEED, help=f"another seed, other pictures (default: {DEFAULT_SEED})")
    add("--shard_size", type=int, default=SHARD_SIZE, help=f"pictures per file (default: {SHARD_SIZE})")
    add("--workers", type=int, default=1, help="processes that draw (default: 1)")
    add("--device", help="draw in batches on this device, such as cuda; atoms and contours only")
    return parser.parse_args(argv)


def export(given: argparse.Namespace) -> int:
    """Write what is not there yet; returns how many pictures that were."""
    images = SyntheticImages.from_name(given.name, given.seed)
    if given.shard_size < 1 or given.workers < 1:
        raise HFViTError("--shard_size and --workers are at least 1")
    if given.device is not None:
        check_device(images, given)
    prepare(given.out, images, given)
    if given.format == "webdataset":
        (given.out / NAMES_FILE).write_text(json.dumps(images.label_names) + "\n", encoding="utf-8")
    shards = plan(images, given)
    missing = [shard for shard in shards if not shard.path.exists()]
    total, todo = (sum(shard.last - shard.first for shard in some) for some in (shards, missing))
    with tqdm(total=total, initial=total - todo, unit="picture", dynamic_ncols=True) as bar:
        for count in written(missing, given):
            bar.update(count)
    print(f"{todo:,} pictures in {len(missing)} files written to {given.out}, {total - todo:,} were there")
    return todo


def check_device(images: SyntheticImages, given: argparse.Namespace) -> None:
    """Raise HFViTError where this set cannot be drawn on that device."""
    check(images)
    if given.workers > 1:
        raise HFViTError("--device draws in one process: leave out --workers")
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        raise HFViTError(f"no device '{given.device}' here ({str(error).splitlines()[0]}); try cpu") from error


def written(shards: list[Shard], given: argparse.Namespace) -> Iterator[int]:
    """Pictures of each shard, as they are done."""
    work = partial(write, file_format=given.format)
    if given.workers == 1:
        yield from map(work, shards)
        return
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work, shard) for shard in shards]):
            yield done.result()


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        export(parse(argv))
    except (HFViTError, OSError) as error:
        return report_error(error)
    return 0
