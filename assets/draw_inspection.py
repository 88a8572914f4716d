"""Draws the two inspection images of README.md: python assets/draw_inspection.py (under a minute on one core)

A tiny ViT learns on generated images to tell which of eight patterns one of four bright patches has; the other three
mean nothing. So it is known where it must look, and which explanation says so. The test of this file has
three smaller ones of the same task, one of each pooling.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).parent.parent))
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.interpretability.perturbation import compare_explanations
from hf_vit.interpretability.plots import PlotView, draw_curves, draw_table, on_image, overlay, save
from hf_vit.interpretability.relevance import METHODS, explain


ASSETS = Path(__file__).parent
GRID, PATCH, CLASSES, OTHERS = (4, 6), 6, 8, 3
COLORS = torch.tensor([[0.9, 0.5, -0.3], [-0.4, 0.6, 0.9], [0.7, 0.8, -0.5], [0.8, -0.2, 0.5]])
Images = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # pixels (count, C, H, W), place and class (count,)


def bright_patches(count: int, generator: torch.Generator, grid: tuple[int, int], patch: int) -> Images:
    """Black images of one channel with a few bright patches: one has its class's pattern, the others mean nothing.

    In three of ten images the first is missing, which is a class of its own: to answer, a model must find it.
    """
    rows, columns = grid
    patterns = torch.randn(CLASSES + 1, patch, patch, generator=torch.Generator().manual_seed(5)).sign()
    patterns = torch.cat([torch.zeros(1, patch, patch), patterns])  # 0: no bright patch
    order = torch.rand(count, rows * columns, generator=generator).argsort(1)
    label = torch.randint(0, CLASSES, (count,), generator=generator)
    missing = torch.rand(count, generator=generator) < 0.3
    label = torch.where(missing, CLASSES, label)
    shown = torch.zeros(count, rows * columns, dtype=torch.long)
    shown.scatter_(1, order[:, 1 : 1 + OTHERS], CLASSES + 1)
    shown.scatter_(1, order[:, :1], torch.where(missing, 0, label + 1)[:, None])
    bright = patterns[shown].view(count, rows, columns, patch, patch).permute(0, 1, 3, 2, 4)  # (count, rows, p, ...)
    return bright.reshape(count, 1, rows * patch, columns * patch), order[:, 0], label


def images(count: int, generator: torch.Generator) -> Images:
    """Bright patches in color on noise."""
    bright, place, label = bright_patches(count, generator, GRID, PATCH)
    color = COLORS[torch.randint(0, len(COLORS), (count,), generator=generator)][:, :, None, None]
    noise = torch.randn(count, 3, *bright.shape[2:], generator=generator) * 0.15 - 0.35
    return noise + 0.9 * bright * color, place, label


def train(config: HFViTConfig, draw: Callable[[int, torch.Generator], Images], steps: int, seed: int = 0) -> Any:
    """A classifier that has learnt from `steps` batches of 64 images."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1)
    model = HFViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        pixels, _, label = draw(64, generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels).logits, label, label_smoothing=0.1).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    torch.set_num_threads(1)
    config = HFViTConfig(
        image_size=(GRID[0] * PATCH, GRID[1] * PATCH), patch_size=PATCH, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=96, num_labels=CLASSES + 1,
    )  # fmt: skip
    model = train(config, images, steps=200)
    pixels, place, label = images(400, torch.Generator().manual_seed(2))
    there = label < CLASSES
    pixels, place, label = pixels[there], place[there], label[there]
    with torch.no_grad():
        right = (model(pixels).logits.argmax(1) == label).float().mean()
    print(f"{len(pixels)} images, accuracy {right:.3f}")
    maps = {method: explain(model, pixels, method) for method in METHODS}
    for method, found in maps.items():
        hits = (found.flatten(1).argmax(1) == place).float().mean()
        print(f"{method}: the largest value is in the patch that counts in {hits:.1%}")
    height, width = pixels.shape[2:]
    scale = 8
    view = PlotView((height * scale, width * scale), (height, width), (0.0, 0.0, height * scale, width * scale))
    rows = []
    for number in range(3):
        small = ((pixels[number].permute(1, 2, 0).numpy() + 1) / 2 * 255).clip(0, 255).astype(np.uint8)
        image = small.repeat(scale, 0).repeat(scale, 1)
        marked = image.copy()
        row, column = divmod(int(place[number]), GRID[1])
        side = PATCH * scale
        box = marked[row * side : (row + 1) * side, column * side : (column + 1) * side]
        box[:3], box[-3:], box[:, :3], box[:, -3:] = 255, 255, 255, 255
        heats = [on_image(maps[method][number].numpy(), (PATCH, PATCH), view) for method in METHODS]
        rows.append([marked, *(overlay(image, heat) for heat in heats)])
    names = ("the framed patch decides", *(method.replace("_", " ") for method in METHODS))
    save(draw_table(rows, names), ASSETS / "explanations.png")
    curves = compare_explanations(model, pixels, steps=24, baseline="mean")
    means = {name: (found.deletion.mean(0).numpy(), found.insertion.mean(0).numpy()) for name, found in curves.items()}
    figure = draw_curves(curves["random"].fractions.numpy(), means, f"mean of {len(pixels)} images")
    save(figure, ASSETS / "deletion_insertion.png")


if __name__ == "__main__":
    main()
