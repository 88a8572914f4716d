"""Export generated images to files, for other programs or to draw them only once.

    python -m training.synthetic synthetic:atoms@1000,1000,224 --out atoms --workers 16
    python -m training.synthetic synthetic:glyphs@52,600,32 --out glyphs --format webdataset --splits train

Parquet with the columns `image` and `label` and the classes' names, as `datasets.load_dataset` and `--dataset` read
it, or WebDataset tar shards of N.png and N.cls (the label's number) beside a `label_names.json` of the classes' names.
A shard appears under its name when it is complete; the same command goes on where it was interrupted, and a folder
with anything else in it is refused.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from hf_vit.atomic_file import TEMPORARY, atomic_path, atomic_write
from hf_vit.errors import HFViTError, Parser, report_error

from ..shards.webdataset import NAMES_FILE
from .images import DEFAULT_SEED, FIRST_INSTANCE, FORM, SyntheticImages


MANIFEST = ".synthetic.json"
SHARD_SIZE = 10_000  # images
ROW_GROUP = 256  # images that a stream reads at once
Drawn = tuple[bytes, int, str]  # PNG, label, name


@dataclass(frozen=True)
class Shard:
    """One file to write: images `first` to `last` of a set."""

    images: SyntheticImages
    first: int
    last: int
    path: Path

    def drawn(self) -> Iterator[Drawn]:
        """Draw the images."""
        for number in range(self.first, self.last):
            item = self.images[number]
            yield encode(item["image"]), item["label"], self.images.name(number)


def encode(image: np.ndarray) -> bytes:
    """An image as PNG, with one channel if all three are equal."""
    gray = (image == image[:, :, :1]).all()
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image[:, :, 0]) if gray else image).save(data, "PNG", compress_level=1)
    return data.getvalue()


def write_parquet(shard: Shard, path: Path) -> None:
    """Write a table of images and labels, with the class names in its schema."""
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    label = datasets.ClassLabel(names=shard.images.label_names)
    schema = datasets.Features({"image": datasets.Image(), "label": label}).arrow_schema
    rows = [{"image": {"bytes": data, "path": f"{name}.png"}, "label": label} for data, label, name in shard.drawn()]
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=ROW_GROUP, compression="none")


def write_webdataset(shard: Shard, path: Path) -> None:
    """Write a tar file of NUMBER.png and NUMBER.cls."""
    with tarfile.open(path, "w") as tar:
        for number, (data, label, _) in enumerate(shard.drawn(), start=shard.first):
            for kind, content in (("png", data), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:09d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


FORMATS = {"parquet": write_parquet, "webdataset": write_webdataset}


def write_dataset_files(shard: Shard, file_format: str) -> int:
    """Write one shard, under its name only when it is complete; returns the number of its images."""
    with atomic_path(shard.path) as temporary:
        FORMATS[file_format](shard, temporary)
    return shard.last - shard.first


def planned_files(images: SyntheticImages, arguments: argparse.Namespace) -> list[Shard]:
    """All files of the set."""
    shards = []
    for split in arguments.splits:
        part = images.split(split)
        starts = range(0, len(part), arguments.shard_size)
        for number, first in enumerate(starts):
            of = f"{number:05d}-of-{len(starts):05d}.parquet" if arguments.format == "parquet" else f"{number:06d}.tar"
            last = min(len(part), first + arguments.shard_size)
            shards.append(Shard(part, first, last, arguments.out / f"{split}-{of}"))
    return shards


def prepare(folder: Path, images: SyntheticImages, arguments: argparse.Namespace) -> None:
    """Create the folder, or check that it holds an unfinished export of this set.

    Raises:
        HFViTError: it holds anything else.
    """
    facts = {
        "set": images.describe(),
        "size": images.size,
        "format": arguments.format,
        "shard_size": arguments.shard_size,
    }
    text = json.dumps(facts, indent=2) + "\n"
    manifest = folder / MANIFEST
    if folder.is_file():
        raise HFViTError(f"'{folder}' is a file; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()):
        if not manifest.exists() or manifest.read_text(encoding="utf-8") != text:
            raise HFViTError(f"'{folder}' holds something else than this set; give another folder, or empty it")
        for leftover in folder.glob(f"{TEMPORARY}*"):  # of an export that was killed
            leftover.unlink()
    else:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(manifest, text)


def parse_export(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m training.synthetic", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("name", help=FORM)
    add("--out", type=Path, required=True, help="folder to write to; goes on where the same command was interrupted")
    add("--format", choices=tuple(FORMATS), default="parquet", help="default: parquet")
    add("--splits", nargs="+", choices=tuple(FIRST_INSTANCE), default=list(FIRST_INSTANCE), help="default: all three")
    add("--seed", type=int, default=DEFAULT_SEED, help=f"another seed, other images (default: {DEFAULT_SEED})")
    add("--shard_size", type=int, default=SHARD_SIZE, help=f"images per file (default: {SHARD_SIZE})")
    add("--workers", type=int, default=1, help="processes that draw (default: 1)")
    return parser.parse_args(argv)


def export_images(arguments: argparse.Namespace) -> int:
    """Write the missing files; returns the number of images written."""
    images = SyntheticImages.from_name(arguments.name, arguments.seed)
    if arguments.shard_size < 1 or arguments.workers < 1:
        raise HFViTError("--shard_size and --workers are at least 1")
    prepare(arguments.out, images, arguments)
    if arguments.format == "webdataset":
        atomic_write(arguments.out / NAMES_FILE, json.dumps(images.label_names) + "\n")
    shards = planned_files(images, arguments)
    missing = [shard for shard in shards if not shard.path.exists()]
    total, todo = (sum(shard.last - shard.first for shard in some) for some in (shards, missing))
    with tqdm(total=total, initial=total - todo, unit="image", dynamic_ncols=True) as bar:
        for count in written(missing, arguments):
            bar.update(count)
    print(f"{todo:,} images in {len(missing)} files written to {arguments.out}, {total - todo:,} were there")
    return todo


def written(shards: list[Shard], arguments: argparse.Namespace) -> Iterator[int]:
    """Images of each shard, as they are done."""
    work = partial(write_dataset_files, file_format=arguments.format)
    if arguments.workers == 1:
        yield from map(work, shards)
        return
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work, shard) for shard in shards]):
            yield done.result()


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        export_images(parse_export(argv))
    except (HFViTError, OSError) as error:
        return report_error(error)
    return 0
