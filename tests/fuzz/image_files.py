"""Damaged image files through every decoder: what becomes of each.

    python -m tests.fuzz.image_files [--count 15000]

Bytes of small files of every format are changed, cut, doubled and exchanged. A file may decode, to the same pixels by
every reader (training's window aside), or be refused as UnreadableImage in one line that begins with its name. It must
never end in another exception, decode otherwise by another reader, or take longer than `SECONDS` of processor time.
"""

import contextlib
import ctypes
import io
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from hf_vit.cli.inputs import read_image
from hf_vit.image_io import UnreadableImage, open_encoded, open_image
from tests.fuzz.command import report
from tests.fuzz.time_limit import Hang, start_clock, stop_clock
from training.data.transforms import EvalTransform, TrainTransform
from training.rng import generator


SECONDS = 20
M_PERTURB = -6
EXIF = Image.Exif()
EXIF[0x0112] = 6
SEEDS = [
    ("JPEG", "RGB", {}), ("JPEG", "L", {"progressive": True}), ("JPEG", "CMYK", {"exif": EXIF}), ("PNG", "RGB", {}),
    ("PNG", "RGBA", {"exif": EXIF}), ("PNG", "P", {}), ("PNG", "I;16", {}), ("GIF", "P", {}), ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}), ("BMP", "RGB", {}), ("TIFF", "RGB", {"exif": EXIF}),
    ("TIFF", "F", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "L", {"compression": "jpeg"}),
    ("TIFF", "RGB", {"compression": "jpeg", "tiffinfo": {278: 8}}), ("TIFF", "RGBA", {"compression": "packbits"}),
    ("TIFF", "RGB", {"compression": "tiff_adobe_deflate", "tiffinfo": {278: 8}}),
    ("TIFF", "L", {"tiffinfo": {278: 8}}), ("TIFF", "1", {"compression": "group4"}),
    ("PPM", "RGB", {}), ("JPEG2000", "RGB", {}), ("TGA", "RGBA", {}), ("QOI", "RGB", {}), ("ICO", "RGB", {}),
    ("DDS", "RGB", {}), ("SGI", "RGB", {}), ("AVIF", "RGB", {}),
]  # fmt: skip


def originals() -> list[bytes]:
    """A small file of each kind that this Pillow writes."""
    files = []
    pixels = np.random.default_rng(0).integers(0, 256, (24, 34, 3), dtype=np.uint8)
    for format, mode, options in SEEDS:
        image = Image.fromarray(pixels)
        if mode in ("I;16", "F"):
            image = Image.fromarray(pixels[..., 0].astype(np.uint16 if mode == "I;16" else np.float32))
        else:
            image = image.convert(mode)
        buffer = io.BytesIO()
        try:
            image.save(buffer, format, **options)
        except (OSError, KeyError):  # Pillow without that library
            continue
        files.append(buffer.getvalue())
    return files


def damaged(files: list[bytes], number: int) -> bytes:
    """The file of that number: a function of it alone."""
    rng = random.Random(number)
    data = bytearray(files[number % len(files)])
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        kind, place = rng.randrange(7), min(rng.randrange(len(data)), rng.randrange(len(data)))
        if kind <= 2:
            data[place] = rng.randrange(256)
        elif kind == 3:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 4:
            size = rng.choice((2, 4))
            data[place : place + size] = rng.choice((b"\xff" * size, b"\0" * size, b"\x7f" + b"\xff" * (size - 1)))
        elif kind == 5:
            del data[place : place + rng.randrange(1, 40)]
        else:
            other = files[rng.randrange(len(files))]
            data[place:] = other[rng.randrange(len(other)) :]
        if not data:
            break
    return bytes(data[: rng.randrange(len(data))] if data and rng.random() < 0.15 else data)


@contextlib.contextmanager
def memory_of(byte: int) -> Iterator[None]:
    """New memory is filled with it: mallopt(3), M_PERTURB. Where that is missing nothing changes."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(M_PERTURB, byte)
    try:
        yield
    finally:
        set_option(M_PERTURB, 0)


def outcome(data: bytes, tmp_path) -> str:
    """What becomes of a file by every reader."""
    path = tmp_path / "cat.png"
    path.write_bytes(data)
    start_clock(SECONDS)
    try:
        try:
            with memory_of(0x11):
                image = open_image(data, name="cat")
        except UnreadableImage as error:
            refused = str(error)
            if not refused.startswith("cat: ") or "\n" in refused:
                return f"refused badly: {refused!r}"
            return "refused" if isinstance(read_image(path, 3), str) else "decoded by predict alone"
        if image.mode != "RGB":
            return f"decoded to {image.mode}"
        with memory_of(0xEE):
            again = read_image(path, 3)
        if isinstance(again, str) or not np.array_equal(np.asarray(again), np.asarray(image)):
            return "otherwise by predict"
        if max(image.size) < 2000:
            view = EvalTransform((16, 16)).from_file(open_encoded(data, "cat"), "cat", generator(1, 0))
            if not np.array_equal(view, EvalTransform((16, 16))(image, generator(1, 0))):
                return "otherwise by evaluation"
        TrainTransform(16).from_file(open_encoded(data, "cat"), "cat", generator(1, 0))
        return "decoded"
    except UnreadableImage:  # by training's window, which decodes another part
        return "decoded"
    except Hang:
        return "hang"
    except Exception as error:
        return f"traceback {type(error).__name__}: {error}"[:200]
    finally:
        stop_clock()


def run(count: int, tmp_path) -> tuple[Counter, list[str]]:
    """Outcomes of so many files, and a line for each that must not be."""
    files, outcomes, bad = originals(), Counter(), []
    for number in range(count):
        found = outcome(damaged(files, number), tmp_path)
        outcomes[found.partition(":")[0]] += 1
        if found not in ("decoded", "refused"):
            bad.append(f"file {number}: {found}")
    return outcomes, bad


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        report(__doc__, partial(run, tmp_path=Path(folder)), count=15_000)
