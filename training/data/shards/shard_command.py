"""Write the index of tar shards, so that training from them starts at once, on any machine.

    python -m training.shards index SHARDS
    python -m training.shards index "SHARDS/train-{000..127}.tar"
    python -m training.shards index "s3://bucket/train-{0000..1023}.tar"

SHARDS is a folder of .tar files. Their headers are read, many shards at a time, and `shards.index` is written
beside them: where each image lies, its label, and which records are damaged. Run it again after shards were added or
replaced: the others are not read again. Where the shards' folder cannot be written, the index goes to the cache.
"""

# Tests: tests/training/data/shards/test_shard_index.py

import argparse
import tempfile
from pathlib import Path

from hf_vit.atomic_file import TEMPORARY
from hf_vit.errors import HFViTError, Parser, report_error
from hf_vit.image_io import one_line

from ..folders import index_folder
from .shard_files import expand_shards, file_system, folder_of, is_remote, is_shard_pattern, look_at
from .shard_index import SIDECAR, ShardIndex, build_index, indices_beside, open_index, write_shard_index
from .webdataset import shards_by_split


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        arguments = parse_command(argv)
        urls = shards_named(arguments.name)
        for folder in sorted({folder_of(url) for url in urls}):
            print(index_folder_of_shards([url for url in urls if folder_of(url) == folder], arguments.cache_dir))
    except (HFViTError, OSError) as error:
        return report_error(error)
    return 0


def parse_command(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m training.shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="write the index beside the shards")
    index.add_argument(
        "name", help="a folder of .tar files, or a pattern of paths or URLs such as train-{000..127}.tar"
    )
    index.add_argument("--cache_dir", help="where the index goes if the shards' folder cannot be written")
    return parser.parse_args(argv)


def shards_named(name: str) -> list[str]:
    """Paths or URLs of the shards.

    Raises:
        HFViTError: there are none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        urls = sorted(map(str, path.glob("*.tar")))
        if not urls:
            raise HFViTError(f"'{name}' holds no .tar files")
        return urls
    if not is_shard_pattern(name):
        raise HFViTError(f"'{name}' is neither a folder nor a pattern of .tar files, such as train-{{000..127}}.tar")
    return expand_shards(name)


def index_folder_of_shards(urls: list[str], cache_dir: str | None) -> str:
    """Write the index of the shards of one folder; returns a line for the user."""
    shards = look_at(urls)
    indices = indices_beside(shards, lambda _: None)
    known = sum(
        any(numbers) for numbers in zip(*([n is not None for n in index.numbers_of(shards)] for index in indices))
    )
    index = build_index(shards, indices, print)
    path = f"{folder_of(urls[0]) or '.'}/{SIDECAR}"
    try:
        write_beside(index, path)
    except OSError as error:
        for split in shards_by_split(urls).values():
            open_index(split, index_folder(cache_dir), print)
        path = f"the cache ({index_folder(cache_dir)}), because '{path}' cannot be written: {one_line(error)}"
    left_out = f"; left out: {text}" if (text := index.left_out()) else ""
    return (
        f"{len(index):,} records of {len(shards):,} shards ({len(shards) - known:,} read now), "
        f"{len(index.values):,} labels{left_out}; the index is in {path}"
    )


def write_beside(index: ShardIndex, path: str) -> None:
    """Write an index next to the shards.

    Raises:
        OSError: it cannot be written there.
    """
    if not is_remote(path):
        write_shard_index(index, Path(path))
        return
    files, inner = file_system(path)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        write_shard_index(index, Path(folder) / SIDECAR)
        try:
            files.put_file(str(Path(folder) / SIDECAR), inner)
        except Exception as error:  # every file system of fsspec has its own; web servers cannot be written
            raise OSError(one_line(error)) from error
