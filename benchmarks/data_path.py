"""The way of a JPEG to a training image: ours against the same steps in plain PIL, in turns, on every core at once.

    python -m benchmarks.data_path
    python -m benchmarks.data_path --photographs FOLDER --rounds 12

Decode, random window of 8 to 100 % of the area, resize to 224 px, flip, uint8 array. The baseline does them as the
image classification example of transformers does (torchvision's RandomResizedCrop and RandomHorizontalFlip on a PIL
image: decode all, crop, resize, transpose). Both draw the same windows from the same random numbers. A process per
core, as the workers of a data loader; medians of processor time, so images a second are those of one core.

Photographs are fitted to each kind of size and quality: shrunk, the middle cut out, encoded. Those in the results are
all images of at least 2048 x 1536 px in lomiri-wallpapers-16.04, lomiri-wallpapers-20.04 and the nature of
mate-backgrounds (`apt-get download NAME`, `dpkg -x`; Debian 12; CC BY and CC BY-SA).

Harder images are drawn here and need no download: the amplitudes of photographs, falling with frequency as f^-1.2
(Tolhurst, Tadmor and Chao 1992, doi:10.1111/j.1475-1313.1992.tb00296.x), with edges of polygons, in focus everywhere.
They have about twice as many bits per pixel as the photographs of the same kind.

A JPEG's bits can only be read from the start, so `bound` is how much faster than the baseline a path would be that did
nothing but read the bits of the rows down to the window's lower edge (timed as decoding these rows at 1/8).
"""

import io
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from hf_vit.capabilities import processor_name
from hf_vit.errors import HFViTError, Parser, report_error
from hf_vit.image_io import SUFFIXES, decode, open_encoded, without_rows_below
from training.data.transforms import TrainTransform, inception_window
from training.reporting.facts import commit
from training.rng import TRANSFORM, generator


RESULTS = Path(__file__).parent / "results"
KINDS = ((2048, 1536, 75), (2048, 1536, 90), (500, 375, 90))  # width, height, quality
AREA, RATIO, TARGET = (0.08, 1.0), (3 / 4, 4 / 3), 224  # defaults of RandomResizedCrop, which the example leaves
DRAWN, SEED = 12, 0  # images of each kind
SLOPE = 1.2
BRIGHTNESS, COLOR = 50.0, 18.0  # standard deviations, of 255
BLUR = 0.7  # of the lens, in pixels


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.data_path", description="Our data path against PIL.")
    parser.add_argument("--photographs", type=Path, help="folder of photographs to use beside drawn images")
    parser.add_argument("--rounds", type=int, default=8, help="counted rounds of each (default: 8)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes at once (default: one per core)"
    )
    try:
        arguments = parser.parse_args(argv)
        for option in ("rounds", "workers"):
            if getattr(arguments, option) < 1:
                raise HFViTError(f"--{option} {getattr(arguments, option)}: give 1 or more")
        sets = fitted_sets(arguments.photographs) if arguments.photographs else {}
        sets |= drawn_sets()
        report(sets, at_once(sets, arguments.rounds, arguments.workers), arguments.rounds, arguments.workers)
    except (HFViTError, OSError) as error:
        return report_error(error)
    return 0


def drawn_sets() -> dict[str, list[bytes]]:
    """JPEGs of every kind, by its name."""
    return {f"drawn, {w}x{h}, quality {q}": [drawn(w, h, q, n) for n in range(DRAWN)] for w, h, q in KINDS}


def drawn(width: int, height: int, quality: int, number: int) -> bytes:
    """A JPEG with the spectrum of photographs, and edges."""
    rng = np.random.default_rng((SEED, number))
    gray = 128 + BRIGHTNESS * layer(rng, width, height)
    colors = np.stack([gray + COLOR * layer(rng, width, height) for _ in range(3)], axis=-1)
    image = Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(30):
        x, y, side = rng.random() * width, rng.random() * height, rng.random() * height / 4
        pen.polygon([(x, y), (x + side, y + side / 3), (x + side / 2, y + side)], tuple(rng.integers(0, 256, 3)))
    return encoded(image.filter(ImageFilter.GaussianBlur(BLUR)), quality)


def layer(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Random phases, amplitudes f^-SLOPE: float (height, width) of mean 0, standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = np.inf
    waves = np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency**SLOPE
    values = np.fft.irfft2(waves, s=(height, width))
    return values / values.std()


def fitted_sets(folder: Path) -> dict[str, list[bytes]]:
    """JPEGs of every kind, by its name, from the images of a folder that are large enough for each."""
    files_of: dict[str, list[bytes]] = {f"photographs, {w}x{h}, quality {q}": [] for w, h, q in KINDS}
    width, height = max(w for w, _, _ in KINDS), max(h for _, h, _ in KINDS)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.is_symlink():
            continue
        opened = open_encoded(path, path.name)
        if opened.width < width or opened.height < height:
            continue
        image = decode(opened, path.name)
        for files, (w, h, quality) in zip(files_of.values(), KINDS):
            files.append(encoded(ImageOps.fit(image, (w, h), Image.Resampling.LANCZOS), quality))
    if not all(files_of.values()):
        raise HFViTError(f"{folder} holds no images of at least {width}x{height} px: give a folder of photographs")
    return files_of


def encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def ours(data: bytes, rng: np.random.Generator) -> np.ndarray:
    transform = TrainTransform(TARGET, crop="inception", crop_area=AREA, crop_ratio=RATIO)
    return transform.from_file(open_encoded(data, "image"), "image", rng)


def plain(data: bytes, rng: np.random.Generator) -> np.ndarray:
    """Image.open(...).convert("RGB"), then torchvision's resized_crop and hflip on PIL images."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, upper, right, lower = inception_window(*image.size, AREA, RATIO, rng)
    image = image.crop((round(left), round(upper), round(right), round(lower)))
    image = image.resize((TARGET, TARGET), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def bits(data: bytes, rng: np.random.Generator) -> None:
    """Read the bits of the rows that the window needs, and make as little of them as libjpeg can."""
    image = open_encoded(data, "image")
    window = inception_window(*image.size, AREA, RATIO, rng)
    shorter = without_rows_below(data, math.ceil(window[3]))
    image = image if shorter is None else open_encoded(shorter[0], "image")
    image.draft(None, (image.width // 8, image.height // 8))
    image.load()


WAYS: dict[str, Callable] = {"ours": ours, "plain PIL": plain, "bits": bits}


def at_once(sets: dict[str, list[bytes]], rounds: int, workers: int) -> dict[str, dict[str, list[float]]]:
    """`compare` of every set in as many processes, their rounds one after another."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = {name: [pool.submit(compare, files, rounds) for _ in range(workers)] for name, files in sets.items()}
        return {
            name: {way: [s for run in runs for s in run.result()[way]] for way in WAYS}
            for name, runs in running.items()
        }


def compare(files: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time an image of each way, round by round; one more round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name in list(WAYS)[:: 1 if number % 2 else -1]:
            began = time.process_time()
            for index, data in enumerate(files):
                WAYS[name](data, generator(TRANSFORM, SEED, number, index))
            if number:
                seconds[name].append((time.process_time() - began) / len(files))
    return seconds


def bits_per_pixel(files: list[bytes]) -> float:
    """Of all images together."""
    pixels = sum(math.prod(open_encoded(data, "image").size) for data in files)
    return 8 * sum(map(len, files)) / pixels


def report(sets: dict[str, list[bytes]], rows: dict[str, dict[str, list[float]]], rounds: int, workers: int) -> None:
    print(f"{'images':<36}{'bits/px':>8}{'ours/s':>9}{'plain PIL/s':>13}{'ratio':>7}   rounds from .. to   bound")
    for name, seconds in rows.items():
        ratios = [other / own for own, other in zip(seconds["ours"], seconds["plain PIL"])]
        speeds = {way: 1 / statistics.median(values) for way, values in seconds.items()}
        print(
            f"{name:<36}{bits_per_pixel(sets[name]):>8.2f}{speeds['ours']:>9.1f}{speeds['plain PIL']:>13.1f}"
            f"{statistics.median(ratios):>7.2f}   {min(ratios):.2f} .. {max(ratios):.2f}"
            f"{speeds['bits'] / speeds['plain PIL']:>16.2f}"
        )
    result = {
        "what": "data path",
        "target": TARGET,
        "images": {name: len(files) for name, files in sets.items()},
        "bits_per_pixel": {name: bits_per_pixel(files) for name, files in sets.items()},
        "rounds": rounds,
        "workers": workers,
        "clock": "processor time, one thread a worker",
        "seconds_per_image": rows,
        "environment": {"hardware": processor_name(), "pillow": PIL.__version__, "commit": commit()},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "data-path-cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.name}")


if __name__ == "__main__":
    sys.exit(main())
