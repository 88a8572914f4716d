"""Generated images: pre-training data of any size without a download.

    images = SyntheticImages("glyphs", classes=52, instances=600, size=24)
    images[0]                       # {"image": uint8 (24, 24, 3), "label": 0}

An image is a pure function of (seed, family, class, instance, size): any worker, rank, resumed run or machine draws
the same bytes (glyphs need the same fonts), and nothing is stored. The instance fixes shape and shading relative to
the side, so that another size shows the same image at another resolution, except for its noise. Sets are nested: more
instances or more classes only add images.

    images.py       sets: labels, mixtures, long tails, wrong labels, splits, names such as synthetic:atoms@1000,1000
    families.py     the kinds of images: glyphs.py, contours.py and lines.py, fractals.py; shading.py
    export.py       `python -m training.synthetic NAME --out DIR`: parquet or WebDataset shards
"""

from .families import FAMILIES, SMALLEST_SIZE, draw_image, find_family
from .images import FORM, OutOfRange, SyntheticImages, parse_name


__all__ = [
    "FAMILIES",
    "FORM",
    "SMALLEST_SIZE",
    "OutOfRange",
    "SyntheticImages",
    "draw_image",
    "find_family",
    "parse_name",
]
