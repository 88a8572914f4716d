"""Draws assets/synthetic.png, the contact sheet of README.md: python assets/draw_synthetic.py

A row per set, named as --dataset takes it: two instances of each class, side by side.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


sys.path.insert(0, str(Path(__file__).parent.parent))
from training.data.synthetic import SyntheticImages


SIZE, CLASSES, EDGE, CAPTION = 96, 5, 2, 14
NAMES = (
    "synthetic:glyphs@5,2,96",
    "synthetic:atoms@5,2,96",
    "synthetic:contours@5,2,96",
    "synthetic:fractals@5,2,96",
    "synthetic:atoms-color@5,2,96",
    "synthetic:fractals-clouds@5,2,96",
    "synthetic:glyphs-clouds+fractals@5,2,96,objects=4",
)


def main() -> None:
    cell = SIZE + EDGE
    sheet = Image.new("RGB", (2 * CLASSES * cell + EDGE, len(NAMES) * (cell + CAPTION) + EDGE), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(NAMES):
        images, top = SyntheticImages.from_name(name), row * (cell + CAPTION) + EDGE
        pen.text((EDGE, top), name, fill="black")
        for column in range(2 * CLASSES):
            label, instance = divmod(column, 2)
            image = images[instance * CLASSES + label]["image"]
            sheet.paste(Image.fromarray(np.ascontiguousarray(image)), (EDGE + column * cell, top + CAPTION))
    sheet.save(Path(__file__).with_name("synthetic.png"), optimize=True)


if __name__ == "__main__":
    main()
