"""Augmentations of color and shape: two RandAugments, three-augment, color jitter, random erasing.

For transforms.py, in the workers; all random numbers come from the generator of the image. Images are RGB of the final
size.

Two RandAugments, because they differ (arXiv:1909.13719 leaves much open) and published recipes mean one of them:
    `randaug(2,10)` as google-research/big_vision `pp/archive/autoaugment.py` (AugReg, plain ViT-S/16): 16 operations,
        always applied, nearest neighbor, gray 128 outside; translations and cutout in pixels, meant for about 224 px.
        Magnitudes above 10 extrapolate. Within rounding of the TensorFlow original, except that a Solarize threshold
        of 256 and more leaves the image unchanged.
    `rand-m9-mstd0.5-inc1` as timm `data/auto_augment.py` (DeiT, MAE): 15 operations, each applied half of the time,
        magnitudes drawn about m and kept within 0 and mmax (10), bilinear or bicubic at random.
    `3a` is DeiT-III's three-augment (arXiv:2204.07118): grayscale, solarize or blur, one of them.

Not timm's or torchvision's: they draw from global generators, and an exact resume needs one for each image.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log, sqrt

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from hf_vit.errors import HFViTError


MAX_OPERATIONS = 20  # published recipes take 1 to 4; more is a typing error
GRAY = (128, 128, 128)
SMOOTH = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
Operation = Callable[[Image.Image, float, Generator], Image.Image]  # (image, magnitude, rng)


# -- operations ----------------------------------------------------------------------------------------------------


def sign(rng: Generator) -> int:
    """1 or -1, equally often."""
    return 1 if rng.random() < 0.5 else -1


def remapped(image: Image.Image, table: Callable[[int], int]) -> Image.Image:
    """Map the 256 values of every channel by a function."""
    return image.point([table(value) for value in range(256)] * 3)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keep the highest bits of every channel."""
    drop = 8 - min(max(bits, 0), 8)
    return remapped(image, lambda value: value >> drop << drop)


def solarize(image: Image.Image, threshold: int) -> Image.Image:
    """Invert values at or above the threshold."""
    return remapped(image, lambda value: value if value < threshold else 255 - value)


def solarize_add(image: Image.Image, addition: int) -> Image.Image:
    """Add to values below 128."""
    return remapped(image, lambda value: min(255, value + addition) if value < 128 else value)


def enhance(kind: str, image: Image.Image, factor: float) -> Image.Image:
    """Pillow's Color, Contrast, Brightness or Sharpness; 1 leaves the image as it is."""
    return getattr(ImageEnhance, kind)(image).enhance(factor)


def contrast_from_mean(image: Image.Image, factor: float) -> Image.Image:
    """big_vision's contrast: against the mean gray, cut to a whole number."""
    mean = int(np.asarray(image.convert("L"), dtype=np.float64).mean())
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def moved(image: Image.Image, coefficients: tuple[float, ...], resample=Image.Resampling.NEAREST) -> Image.Image:
    """Pillow's AFFINE (output to input pixels), gray outside."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample=resample, fillcolor=GRAY)


def cutout(image: Image.Image, pad: int, rng: Generator) -> Image.Image:
    """A gray square of side 2 * pad around a random pixel."""
    if pad == 0:
        return image
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    image = image.copy()
    image.paste(GRAY, (max(0, x - pad), max(0, y - pad), min(image.width, x + pad), min(image.height, y + pad)))
    return image


BIG_VISION: dict[str, Operation] = {
    "AutoContrast": lambda image, m, rng: ImageOps.autocontrast(image),
    "Equalize": lambda image, m, rng: ImageOps.equalize(image),
    "Invert": lambda image, m, rng: ImageOps.invert(image),
    "Rotate": lambda image, m, rng: image.rotate(sign(rng) * 3 * m, fillcolor=GRAY),
    "Posterize": lambda image, m, rng: posterize(image, int(m / 10 * 4)),
    "Solarize": lambda image, m, rng: solarize(image, int(m / 10 * 256)),
    "Color": lambda image, m, rng: enhance("Color", image, 0.18 * m + 0.1),
    "Contrast": lambda image, m, rng: contrast_from_mean(image, 0.18 * m + 0.1),
    "Brightness": lambda image, m, rng: enhance("Brightness", image, 0.18 * m + 0.1),
    "Sharpness": lambda image, m, rng: enhance("Sharpness", image, 0.18 * m + 0.1),
    "ShearX": lambda image, m, rng: moved(image, (1, sign(rng) * 0.03 * m, 0, 0, 1, 0)),
    "ShearY": lambda image, m, rng: moved(image, (1, 0, 0, sign(rng) * 0.03 * m, 1, 0)),
    "TranslateX": lambda image, m, rng: moved(image, (1, 0, sign(rng) * 10 * m, 0, 1, 0)),
    "TranslateY": lambda image, m, rng: moved(image, (1, 0, 0, 0, 1, sign(rng) * 10 * m)),
    "Cutout": lambda image, m, rng: cutout(image, int(4 * m), rng),
    "SolarizeAdd": lambda image, m, rng: solarize_add(image, int(11 * m)),
}


def away_from_one(m: float, rng: Generator) -> float:
    """timm's increasing factor: 1 is no change."""
    return max(0.1, 1.0 + sign(rng) * 0.09 * m)


def smooth(rng: Generator) -> Image.Resampling:
    """One of timm's two filters."""
    return SMOOTH[int(rng.integers(2))]


TIMM: dict[str, Operation] = {
    "AutoContrast": BIG_VISION["AutoContrast"],
    "Equalize": BIG_VISION["Equalize"],
    "Invert": BIG_VISION["Invert"],
    "Rotate": lambda image, m, rng: image.rotate(sign(rng) * 3 * m, resample=smooth(rng), fillcolor=GRAY),
    "Posterize": BIG_VISION["Posterize"],
    "Solarize": BIG_VISION["Solarize"],
    "SolarizeAdd": BIG_VISION["SolarizeAdd"],
    "Color": lambda image, m, rng: enhance("Color", image, 0.18 * m + 0.1),
    "Contrast": lambda image, m, rng: enhance("Contrast", image, 0.18 * m + 0.1),
    "Brightness": lambda image, m, rng: enhance("Brightness", image, 0.18 * m + 0.1),
    "Sharpness": lambda image, m, rng: enhance("Sharpness", image, 0.18 * m + 0.1),
    "ShearX": lambda image, m, rng: moved(image, (1, sign(rng) * 0.03 * m, 0, 0, 1, 0), smooth(rng)),
    "ShearY": lambda image, m, rng: moved(image, (1, 0, 0, sign(rng) * 0.03 * m, 1, 0), smooth(rng)),
    "TranslateX": lambda image, m, rng: moved(
        image, (1, 0, sign(rng) * 0.045 * m * image.width, 0, 1, 0), smooth(rng)
    ),
    "TranslateY": lambda image, m, rng: moved(
        image, (1, 0, 0, 0, 1, sign(rng) * 0.045 * m * image.height), smooth(rng)
    ),
}

# inc1: the operations of timm's table whose strength does not grow with the magnitude, replaced by some where it does
TIMM_INCREASING: dict[str, Operation] = TIMM | {
    "Posterize": lambda image, m, rng: posterize(image, 4 - int(m / 10 * 4)),
    "Solarize": lambda image, m, rng: solarize(image, 256 - int(m / 10 * 256)),
    "Color": lambda image, m, rng: enhance("Color", image, away_from_one(m, rng)),
    "Contrast": lambda image, m, rng: enhance("Contrast", image, away_from_one(m, rng)),
    "Brightness": lambda image, m, rng: enhance("Brightness", image, away_from_one(m, rng)),
    "Sharpness": lambda image, m, rng: enhance("Sharpness", image, away_from_one(m, rng)),
}


# -- policies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations, each drawn from all with replacement.

    Args:
        magnitude: of every operation; the definitions are written for 10.
        google: big_vision's definition, which ignores the arguments below.
        increasing: timm's `inc1`.
        spread: standard deviation of the magnitude; above 100 it is uniform between 0 and `magnitude`.
        highest: largest magnitude.
    """

    layers: int
    magnitude: float
    google: bool
    increasing: bool = False
    spread: float = 0.0
    highest: float = 10.0

    def __post_init__(self):
        if not 0 <= self.layers <= MAX_OPERATIONS:
            raise HFViTError(f"auto_augment: {self.layers} operations on each image; give at most {MAX_OPERATIONS}")

    def __call__(self, image: Image.Image, rng: Generator) -> Image.Image:
        table = BIG_VISION if self.google else TIMM_INCREASING if self.increasing else TIMM
        operations = list(table.values())
        for _ in range(self.layers):
            operation = operations[int(rng.integers(len(operations)))]
            if self.google:
                image = operation(image, self.magnitude, rng)
            elif rng.random() < 0.5:
                image = operation(image, self._drawn(rng), rng)
        return image

    def _drawn(self, rng: Generator) -> float:
        magnitude = self.magnitude
        if self.spread > 100:
            magnitude = rng.random() * magnitude
        elif self.spread > 0:
            magnitude = rng.normal(magnitude, self.spread)
        return float(min(max(magnitude, 0.0), self.highest))


def three_augment(image: Image.Image, rng: Generator) -> Image.Image:
    """DeiT-III: grayscale, solarize at 128, or Gaussian blur of radius 0.1 to 2 px."""
    choice = int(rng.integers(3))
    if choice == 0:
        return ImageOps.grayscale(image).convert("RGB")
    if choice == 1:
        return solarize(image, 128)
    return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * rng.random()))


@lru_cache
def policy(text: str) -> Callable[[Image.Image, Generator], Image.Image]:
    """The policy of a name in its library's own notation: see the top of the file.

    Raises:
        HFViTError: a name of neither library.
    """
    if text in ("3a", "three_augment"):
        return three_augment
    if any(len(number) > 6 for number in re.findall(r"\d+", text)):
        raise HFViTError(f"auto_augment {text[:60]!r}: a number has more than six digits")
    if match := re.fullmatch(r"randaug\(\s*(\d+)\s*,\s*(\d+)\s*\)", text):
        return RandAugment(int(match[1]), float(match[2]), google=True)
    head, *sections = text.split("-")
    if head == "rand":
        matches = [re.fullmatch(r"(mstd|mmax|inc|m|n)(\d+\.?\d*)", section) for section in sections]
        values = {match[1]: float(match[2]) for match in matches if match}
        if len(values) == len(sections) and values.get("inc", 1) == 1 and values.get("n", 2.0).is_integer():
            return RandAugment(
                layers=int(values.get("n", 2.0)),
                magnitude=values.get("m", 10.0),
                google=False,
                increasing="inc" in values,
                spread=values.get("mstd", 0.0),
                highest=values.get("mmax", 10.0),
            )
    raise HFViTError(
        f"auto_augment {text!r}: give randaug(2,10) as big_vision, rand-m9-mstd0.5-inc1 as timm (m, n, mstd, mmax, "
        "inc1), or 3a"
    )


def color_jitter(image: Image.Image, strength: float, rng: Generator) -> Image.Image:
    """Brightness, contrast and saturation by factors of 1 - strength to 1 + strength, in random order."""
    for index in rng.permutation(3):
        low = max(0.0, 1.0 - strength)
        factor = low + (1.0 + strength - low) * rng.random()
        image = enhance(("Brightness", "Contrast", "Color")[index], image, factor)
    return image


def random_erasing(image: Image.Image, rng: Generator) -> Image.Image:
    """Replace a rectangle by noise: 2 to 33 % of the area, aspect 0.3 to 3.3 (arXiv:1708.04896, timm's `pixel` mode).

    The noise is normal, as timm's after normalization with mean and std 0.5, clipped to 0 and 255.
    """
    width, height = image.size
    for _ in range(10):
        area, ratio, right, down = rng.random(4)
        area = (0.02 + area * (1 / 3 - 0.02)) * width * height
        ratio = exp(log(0.3) * (1 - 2 * ratio))
        tall, wide = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < tall < height and 0 < wide < width:
            noise = np.clip(127.5 + 127.5 * rng.standard_normal((tall, wide, 3)), 0, 255).astype(np.uint8)
            image = image.copy()
            image.paste(Image.fromarray(noise), (int(right * (width - wide + 1)), int(down * (height - tall + 1))))
            return image
    return image
