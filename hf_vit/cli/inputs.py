"""Arguments that several commands share: images, models, devices, numbers; and tables on stdout.

Bad input is an `HFViTError` or, for the text of an option, an error of argparse; unreadable images are listed.
"""

import argparse
import glob
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers.models.vit import ViTImageProcessorPil

from ..checkpoints import Loaded, read_checkpoint
from ..download import download, is_address
from ..errors import HFViTError, listed, warnings_as_notes
from ..image_files import walk
from ..image_io import UnreadableImage, check_channels, open_image, printable
from ..image_tables import SUFFIXES_OF_TABLES, path_column, read_rows
from ..transformers_classifiers import load_other_classifier, num_channels, other_classifier_class


Where = TypeVar("Where", bound=Path | str)

NAME = "image"  # of an image in the decoder's errors; lists of unreadable images have a column for the path
READERS, READ_AHEAD = 4, 32  # threads; images in memory beyond those in use
MIN_OPTIMIZED_IMAGES = 128  # for fewer, choosing the fastest kernels takes longer than the tenth that it gains


def load_model(model: str, **changes: Any) -> Loaded:
    """Load a model of any format; its notes and assumptions go to stderr."""
    with warnings_as_notes():
        return read_checkpoint(model, **changes)


def load_classifier(model: str, **changes: Any) -> Loaded:
    """As `load_model`; raises HFViTError if the model has no classifier."""
    loaded = load_model(model, **changes)
    if not loaded.model.config.num_labels:
        raise HFViTError(f"{model} has no classifier: fine-tune it on images with labels first")
    return loaded


def open_model(model: str, arguments: argparse.Namespace, images: int, classes: bool) -> tuple[Any, Any]:
    """Model and image processor for `images` images: a ViT of any format, or another classifier of transformers.

    Args:
        arguments: with `device` and `image_size`. classes: whether the model must have a classifier.

    Raises:
        HFViTError: no such model, or one without a classifier.
    """
    device, size = pick_device(arguments.device), image_size(arguments)
    loaded: Any
    if other_classifier_class(model) is not None:
        loaded = load_other_classifier(model, image_size=size)
        for note in loaded.notes:
            print(f"note: {note}", file=sys.stderr)
    else:
        loaded = (load_classifier if classes else load_model)(model, **({} if size is None else {"image_size": size}))
    check_channels(num_channels(loaded.model.config))
    processor = ViTImageProcessorPil(**loaded.processor)
    network = loaded.model.to(device)
    if images >= MIN_OPTIMIZED_IMAGES and hasattr(network, "optimize_for_inference"):
        return network.optimize_for_inference(), processor
    return network.eval(), processor


def find_images(
    patterns: Sequence[str], addresses: bool = False, image_column: str | None = None, image_root: str | None = None
) -> list[Any]:
    """The images of files, folders, glob patterns and tables, in order, without repetitions.

    Tables (.csv, .tsv, .jsonl, .parquet) list images; any other file is taken as an image. Folders are searched as in
    training (hf_vit/image_files.py), and skipped files are reported on stderr.

    Args:
        addresses: whether URLs are accepted; they are returned as text.
        image_column: of tables; by default found by its name. image_root: folder of relative paths in tables; by
            default the table's.

    Raises:
        HFViTError: nothing of that name, or a folder or pattern without an image.
    """
    images: dict[Path | str, None] = {}
    tables = 0
    for pattern in patterns:
        path = Path(pattern)
        matches: list[Any]
        left_out = ""
        if is_address(pattern):
            if not addresses:
                raise HFViTError(f"'{pattern}' is an address: download the image first, and give its path")
            matches = [pattern]
        elif path.is_file() and path.suffix in (".parquet", *SUFFIXES_OF_TABLES):
            matches = images_of_table(path, addresses, image_column, image_root)
            tables += 1
        elif path.is_file():
            matches = [path]
        elif path.is_dir():
            files = walk(path)
            matches = [path / os.fsdecode(name) for name in files.images()]
            left_out = str(files.left_out)
        else:
            matches = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not matches:
            reason = f" (left out: {left_out})" if left_out else ""
            raise HFViTError(f"no image at '{printable(pattern)}'{reason}")
        if left_out:
            print(f"note: left out in {printable(pattern)}: {left_out}", file=sys.stderr)
        images |= dict.fromkeys(matches)
    for option, value in (("--image-column", image_column), ("--image-root", image_root)):
        if value is not None and not tables:
            raise HFViTError(f"{option} {value} is for a table (.csv, .tsv, .jsonl, .parquet), and none was given")
    return list(images)


def images_of_table(path: Path, addresses: bool, column: str | None, root: str | None) -> list[Any]:
    """The images of a table: paths, and URLs as text.

    Raises:
        HFViTError: no such column, cells without a path.
    """
    rows = read_rows(path)
    column = path_column(str(path), rows, column)
    cells = [cell.strip() if isinstance(cell, str) else cell for cell in rows[column]]
    wrong = [number for number, cell in enumerate(cells, start=1) if not isinstance(cell, str) or not cell]
    if wrong:
        raise HFViTError(
            f"{len(wrong)} of {len(cells)} rows of '{path}' have no path of an image in column '{column}': "
            f"row {listed(wrong)}"
        )
    folder = path.parent if root is None else Path(root)
    if not addresses and (refused := next(filter(is_address, cells), None)):
        raise HFViTError(f"'{refused}' in '{path}' is an address: download the image first, and give its path")
    return [cell if is_address(cell) else folder / Path(cell).expanduser() for cell in cells]


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for tables of images."""
    parser.add_argument("--image-column", metavar="NAME", help="column of a table with paths or addresses of images")
    parser.add_argument(
        "--image-root", metavar="FOLDER", help="folder of relative paths in a table (default: the table's)"
    )


def read_images(
    paths: Sequence[Where],
    num_channels: int,
    unreadable: list[dict[str, str]],
    then: Callable[[Image.Image], Any] = lambda image: image,
    in_memory: int = READ_AHEAD,
) -> Iterator[tuple[Where, Any]]:
    """Yield each image decoded by `open_image`, in order; unreadable ones are appended to `unreadable`.

    Threads read ahead, so that the next images are ready when the model needs them.

    Args:
        num_channels: 3 for RGB, 1 for gray.
        then: applied to each image in the threads; its result is yielded instead of the image.
        in_memory: images that are ready or being read, beyond those in use.
    """

    def read(path: Path | str) -> Any:
        result = read_image(path, num_channels)
        return result if isinstance(result, str) else then(result)

    remaining = iter(paths)
    with ThreadPoolExecutor(READERS) as pool:
        pending = deque((path, pool.submit(read, path)) for path in islice(remaining, in_memory))
        while pending:
            path, future = pending.popleft()
            pending.extend((following, pool.submit(read, following)) for following in islice(remaining, 1))
            result = future.result()
            if isinstance(result, str):
                unreadable.append({"image": printable(path), "reason": result})
            else:
                yield path, result


def read_image(path: Path | str, num_channels: int) -> Image.Image | str:
    """An image from a file or a URL, or as text the reason why it cannot be read."""
    try:
        source = download(path) if isinstance(path, str) else path
        return open_image(source, num_channels=num_channels, name=NAME)
    except UnreadableImage as error:
        return str(error).removeprefix(f"{NAME}: ")
    except OSError as error:
        return " ".join(str(error).split()) or type(error).__name__


def pick_device(name: str | None) -> torch.device:
    """The requested device, or by default an accelerator if there is one."""
    if name is None:
        # `current_accelerator` names the one that torch was built for, even on a machine without it
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return best or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # unknown name; torch built without that device
        raise HFViTError(f"no device '{name}' here ({str(error).splitlines()[0]}): leave --device out") from error
    return device


def image_size(arguments: argparse.Namespace, name: str = "image_size") -> int | tuple[int, int] | None:
    """`--image-size 384` or `--image-size 384 512`, in pixels; `name` is that of the argument."""
    size = getattr(arguments, name)
    if size is None:
        return None
    if len(size) > 2:
        option = f"--{name.replace('_', '-')}"
        raise HFViTError(f"{option} is one number, or height and width; got {len(size)} numbers")
    return size[0] if len(size) == 1 else tuple(size)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return number


def on_one_line(text: str) -> str:
    """Text with control characters and line breaks escaped, which names of files may contain."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Print columns padded to their longest entry, numbers to the right."""
    table = [[on_one_line(cell) for cell in row] for row in table]
    columns = max(map(len, table), default=0)
    widths = [max(len(row[column]) for row in table if column < len(row)) for column in range(columns)]
    are_numbers = [
        len(table) > 1 and all(row[column].replace(",", "").isdecimal() for row in table[1:] if column < len(row))
        for column in range(columns)
    ]
    for row in table:
        cells = [
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, are_numbers)
        ]
        print("  ".join(cells).rstrip())
