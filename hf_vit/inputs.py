"""What people give to the commands: pictures, models, devices, numbers. Found, checked and read; imported by commands.

Bad input is an `HFViTError` or, for an option's text, an error of argparse; a picture that cannot be read is listed.
"""

import argparse
import glob
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_vit.checkpoints import Loaded, read_checkpoint
from hf_vit.errors import HFViTError


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def load(model: str, **changes: Any) -> Loaded:
    """A model of any dialect; what there is to know about it goes to stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        loaded = read_checkpoint(model, **changes)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            print(f"note: {warning.message}", file=sys.stderr)
    return loaded


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """The files that names, folders and glob patterns mean, in order, each once.

    Raises:
        HFViTError: a name that is nothing, a folder or pattern without a picture.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
        else:
            matches = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not matches:
            kinds = f"; pictures are {', '.join(PICTURES)}" if path.is_dir() else ""
            raise HFViTError(f"no picture at '{pattern}'{kinds}")
        found |= dict.fromkeys(matches)
    return list(found)


def read_pictures(
    paths: Sequence[Path], mode: str, unreadable: list[dict[str, str]]
) -> Iterator[tuple[Path, Image.Image]]:
    """Each picture upright and in the given mode; those that cannot be read go into `unreadable` with the reason."""
    for path in paths:
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert(mode)
        except UnidentifiedImageError:
            unreadable.append({"image": str(path), "reason": "not a picture, or of an unknown format"})
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unreadable.append({"image": str(path), "reason": " ".join(str(error).split())})
        else:
            yield path, picture


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is."""
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise HFViTError(f"no device '{name}' here ({str(error).splitlines()[0]}): leave --device out") from error
    return device


def image_size(arguments: argparse.Namespace) -> int | tuple[int, int] | None:
    """`--image-size 384` or `--image-size 384 512`, in pixels."""
    given = arguments.image_size
    if given is None:
        return None
    if len(given) > 2:
        raise HFViTError(f"--image-size is one number, or height and width; got {len(given)} numbers")
    return given[0] if len(given) == 1 else tuple(given)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)
