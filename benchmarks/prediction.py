"""`hf-vit predict` on a folder: against reading the same images alone, and computing alone on images in memory.

A suite of `benchmarks.run`. The images are JPEG files of 500 x 375 pixels, written for this measurement. What
happens once has its own row: loading the model, and choosing kernels in the first batch.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessor

from benchmarks.cpu_inference import CPU
from benchmarks.measure import Point, filled
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.cli.inputs import MIN_OPTIMIZED_IMAGES
from hf_vit.cli.main import main
from hf_vit.cli.predict import prepared_batches


BATCH, IMAGES = 16, 192


def points(options: argparse.Namespace) -> Iterator[Point]:
    with tempfile.TemporaryDirectory() as folder:
        yield point("vit-small-patch16-224", Path(folder), IMAGES)


def point(preset: str, folder: Path, count: int) -> Point:
    images, home = folder / "images", folder / "model"
    images.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(images / f"{number}.jpg", quality=90)
    config = HFViTConfig.from_preset(preset, num_labels=1000)
    model = filled(lambda: HFViTForImageClassification(config), CPU).eval()
    model.save_pretrained(home)
    processor = ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(home)
    assert count >= MIN_OPTIMIZED_IMAGES, "the command would take the model as loaded"
    model.optimize_for_inference()
    paths, pixels = sorted(images.iterdir()), torch.randn(BATCH, 3, 224, 224)
    words = ["predict", str(images), "--model", str(home), "--batch-size", str(BATCH), "--json"]

    def predict() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main.main(words) == 0

    def read() -> None:
        assert sum(len(names) for names, _ in prepared_batches(paths, processor, 3, BATCH, [])) == count

    def compute() -> None:
        with torch.inference_mode():
            for _ in range(0, count, BATCH):
                model(pixels)

    def start() -> None:
        with torch.inference_mode():
            HFViTForImageClassification.from_pretrained(home).optimize_for_inference()(pixels)

    return Point(
        f"hf-vit predict, {preset}, {count} images", count, {"hf-vit predict": predict},
        {"reading alone": read, "computing alone": compute, "the model and a first batch alone": start},
        note="on a CPU reading and computing share the cores: the least possible is the sum of their processor times",
    )  # fmt: skip
