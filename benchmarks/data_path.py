"""The way of a JPEG to a training picture: ours against the same steps in plain PIL, in turns, on one core.

    python -m benchmarks.data_path
    python -m benchmarks.data_path --pictures FOLDER --rounds 12

Decode, random window of 5 to 100 % of the area, resize to 224 px, flip, uint8 array. The peer does them as the image
classification example of transformers does (torchvision's RandomResizedCrop and RandomHorizontalFlip on a PIL picture:
decode all, crop, resize, transpose). Both draw the same windows from the same random numbers. Medians of processor
time.

Without --pictures the JPEGs are drawn here with the statistics of photographs: amplitudes fall with frequency as
f^-1.2 (Tolhurst, Tadmor and Chao 1992, doi:10.1111/j.1475-1313.1992.tb00296.x), with edges of polygons. They have as
many bits per pixel as photographs of the same quality (90: 2.2; scikit-learn's two sample photographs: 1.4 and 2.9).

A JPEG's bits can only be read from the start, so `bound` is how much faster than the peer a path would be that did
nothing but read the bits of the rows down to the window's lower edge (timed as decoding these rows at 1/8).
"""

import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFilter

from hf_vit.errors import HFViTError, Parser, report_error
from training.augmentation import TrainTransform, inception_window
from training.facts import commit, processor_name
from training.pictures import EXTENSIONS, open_picture, without_rows_below
from training.randomness import TRANSFORM, generator


RESULTS = Path(__file__).parent / "results"
KINDS = ((2048, 1536, 75), (2048, 1536, 90), (500, 375, 90))  # width, height, quality
AREA, RATIO, TARGET = (0.05, 1.0), (3 / 4, 4 / 3), 224
DRAWN, SEED = 12, 0  # pictures of each kind
SLOPE = 1.2
BRIGHTNESS, COLOUR = 50.0, 18.0  # standard deviations, of 255
BLUR = 0.7  # of the lens, in pixels


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.data_path", description="Our data path against PIL.")
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs to use instead of drawn ones")
    parser.add_argument("--rounds", type=int, default=8, help="counted rounds of each (default: 8)")
    try:
        arguments = parser.parse_args(argv)
        sets = from_folder(arguments.pictures) if arguments.pictures else drawn_sets()
    except HFViTError as error:
        return report_error(error)
    rows = {name: compare(files, arguments.rounds) for name, files in sets.items()}
    report(sets, rows, arguments.rounds)
    return 0


def drawn_sets() -> dict[str, list[bytes]]:
    """JPEGs of every kind, by its name."""
    return {f"{w}x{h}, quality {q}": [drawn(w, h, q, number) for number in range(DRAWN)] for w, h, q in KINDS}


def drawn(width: int, height: int, quality: int, number: int) -> bytes:
    """A JPEG with the spectrum of photographs, and edges."""
    rng = np.random.default_rng((SEED, number))
    grey = 128 + BRIGHTNESS * layer(rng, width, height)
    colours = np.stack([grey + COLOUR * layer(rng, width, height) for _ in range(3)], axis=-1)
    image = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(30):
        x, y, side = rng.random() * width, rng.random() * height, rng.random() * height / 4
        pen.polygon([(x, y), (x + side, y + side / 3), (x + side / 2, y + side)], tuple(rng.integers(0, 256, 3)))
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(BLUR)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def layer(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Random phases, amplitudes f^-SLOPE: float (height, width) of mean 0, standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = np.inf
    waves = np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency**SLOPE
    values = np.fft.irfft2(waves, s=(height, width))
    return values / values.std()


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


def bits(data: bytes, rng: np.random.Generator) -> None:
    """Read the bits of the rows that the window needs, and make as little of them as libjpeg can."""
    image = open_picture(data, "picture")
    window = inception_window(*image.size, AREA, RATIO, rng)
    shorter = without_rows_below(data, math.ceil(window[3]))
    image = image if shorter is None else open_picture(shorter[0], "picture")
    image.draft(None, (image.width // 8, image.height // 8))
    image.load()


def compare(files: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time a picture of each way, round by round; one more round warms up."""
    ways: dict[str, Callable] = {"ours": ours, "plain PIL": plain, "bits": bits}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            began = time.process_time()
            for index, data in enumerate(files):
                ways[name](data, generator(TRANSFORM, SEED, number, index))
            if number:
                seconds[name].append((time.process_time() - began) / len(files))
    return seconds


def bits_per_pixel(files: list[bytes]) -> float:
    """Of all pictures together."""
    pixels = sum(math.prod(open_picture(data, "picture").size) for data in files)
    return 8 * sum(map(len, files)) / pixels


def report(sets: dict[str, list[bytes]], rows: dict[str, dict[str, list[float]]], rounds: int) -> None:
    print(f"{'pictures':<24}{'bits/px':>8}{'ours/s':>9}{'plain PIL/s':>13}{'ratio':>7}   rounds from .. to   bound")
    for name, seconds in rows.items():
        ratios = [other / own for own, other in zip(seconds["ours"], seconds["plain PIL"])]
        speeds = {way: 1 / statistics.median(values) for way, values in seconds.items()}
        print(
            f"{name:<24}{bits_per_pixel(sets[name]):>8.2f}{speeds['ours']:>9.1f}{speeds['plain PIL']:>13.1f}"
            f"{statistics.median(ratios):>7.2f}   {min(ratios):.2f} .. {max(ratios):.2f}"
            f"{speeds['bits'] / speeds['plain PIL']:>16.2f}"
        )
    result = {
        "what": "data path",
        "target": TARGET,
        "bits_per_pixel": {name: bits_per_pixel(files) for name, files in sets.items()},
        "rounds": rounds,
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
