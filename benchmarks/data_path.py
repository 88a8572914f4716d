"""The way of a JPEG to a training picture: ours against the same steps in plain PIL, in turns, on one core.

    python -m benchmarks.data_path
    python -m benchmarks.data_path --pictures FOLDER --rounds 12

Decode, random window of 5 to 100 % of the area, resize to 224 px, flip, uint8 array. The peer does them as the image
classification example of transformers does (torchvision's RandomResizedCrop and RandomHorizontalFlip on a PIL picture:
decode all, crop, resize, transpose). Both draw the same windows from the same random numbers. Without --pictures the
JPEGs are drawn here: blurred noise with edges, quality 90, 2048x1536 and 500x375 px. Medians of processor time.
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFilter

from hf_vit.errors import HFViTError
from training.augmentation import TrainTransform, inception_window
from training.facts import commit, processor_name
from training.pictures import EXTENSIONS, open_picture
from training.randomness import TRANSFORM, generator


RESULTS = Path(__file__).parent / "results"
SIZES = ((2048, 1536), (500, 375))
AREA, RATIO, TARGET = (0.05, 1.0), (3 / 4, 4 / 3), 224
DRAWN, SEED = 24, 0  # pictures of each size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_path", description="Our data path against PIL.")
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs to use instead of drawn ones")
    parser.add_argument("--rounds", type=int, default=8, help="counted rounds of each (default: 8)")
    arguments = parser.parse_args(argv)
    try:
        sets = from_folder(arguments.pictures) if arguments.pictures else {f"{w}x{h}": drawn(w, h) for w, h in SIZES}
    except HFViTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = {name: compare(files, arguments.rounds) for name, files in sets.items()}
    report(rows, arguments)
    return 0


def drawn(width: int, height: int) -> list[bytes]:
    """JPEGs with the detail of photographs: smooth colour, texture at several scales, sharp edges."""
    files = []
    for number in range(DRAWN):
        rng = np.random.default_rng((SEED, number))
        layers = np.zeros((height, width, 3), np.float32)
        for cells in (4, 16, 64, 256):
            noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            layers += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) / cells**0.5
        layers *= 255 / layers.max()
        image = Image.fromarray(layers.astype(np.uint8))
        pen = ImageDraw.Draw(image)
        for _ in range(30):
            x, y, side = rng.random() * width, rng.random() * height, rng.random() * height / 4
            pen.polygon([(x, y), (x + side, y + side / 3), (x + side / 2, y + side)], tuple(rng.integers(0, 256, 3)))
        buffer = io.BytesIO()
        image.filter(ImageFilter.GaussianBlur(0.7)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def from_folder(folder: Path) -> dict[str, list[bytes]]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in EXTENSIONS]
    if not files:
        raise HFViTError(f"{folder} holds no pictures: give a folder of JPEGs")
    return {str(folder.name): [path.read_bytes() for path in files]}


def ours(data: bytes, rng: np.random.Generator) -> np.ndarray:
    transform = TrainTransform(TARGET, crop="inception", crop_area=AREA, crop_ratio=RATIO)
    return transform.from_file(open_picture(data, "picture"), "picture", rng)


def plain(data: bytes, rng: np.random.Generator) -> np.ndarray:
    """Image.open(...).convert("RGB"), then torchvision's resized_crop and hflip on PIL pictures."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, upper, right, lower = inception_window(*image.size, AREA, RATIO, rng)
    image = image.crop((round(left), round(upper), round(right), round(lower)))
    image = image.resize((TARGET, TARGET), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def compare(files: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time a picture of each, round by round; one more round warms up."""
    ways: dict[str, Callable] = {"ours": ours, "plain PIL": plain}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            began = time.process_time()
            for index, data in enumerate(files):
                ways[name](data, generator(TRANSFORM, SEED, number, index))
            if number:
                seconds[name].append((time.process_time() - began) / len(files))
    return seconds


def report(rows: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> None:
    print(f"{'pictures':<16}{'ours/s':>10}{'plain PIL/s':>14}{'ratio':>8}   rounds from .. to")
    for name, seconds in rows.items():
        ratios = [other / own for own, other in zip(seconds["ours"], seconds["plain PIL"])]
        speeds = {way: 1 / statistics.median(values) for way, values in seconds.items()}
        print(
            f"{name:<16}{speeds['ours']:>10.1f}{speeds['plain PIL']:>14.1f}{statistics.median(ratios):>8.2f}"
            f"   {min(ratios):.2f} .. {max(ratios):.2f}"
        )
    result = {
        "what": "data path",
        "target": TARGET,
        "pictures": "drawn" if arguments.pictures is None else arguments.pictures.name,
        "rounds": arguments.rounds,
        "clock": "processor time, one thread",
        "seconds_per_picture": rows,
        "environment": {"hardware": processor_name(), "pillow": PIL.__version__, "commit": commit()},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "data-path-cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.name}")


if __name__ == "__main__":
    sys.exit(main())
