"""Generated pictures: pre-training data of any size without a download.

    images = SyntheticImages("glyphs", classes=52, instances=600, size=24)
    images[0]                       # {"image": uint8 (24, 24, 3), "label": 0}

A picture is a pure function of (seed, family, class, instance, size): any worker, rank, resumed run or machine draws
the same one (for glyphs, where the fonts are the same), and nothing is stored. The instance fixes shape and shading as
shares of the side, so another size shows the same picture at another resolution, but for its noise. Sets are nested:
more instances, or a longer prefix, only add pictures.

Families:
    glyphs      letters in many fonts, bent and sheared, in strokes of any weight and softness, mostly bright on dark;
                what helps most within minutes on small pictures (glyphs.py)
    atoms       VisualAtom, the best of the formula-driven sets in the literature (contours.py)
    contours    RCDB, its forerunner: noisy circles on white (contours.py)
    fractals    iterated function systems (fractals.py)
Every family has a twin in colour on a coloured background: `glyphs-colour` and so on.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_vit.errors import HFViTError

from .contours import draw_atom, draw_contours
from .fractals import draw_fractal
from .glyphs import LETTERS, draw_glyph
from .randomness import IMAGE, generator


DEFAULT_SEED = 0
DEFAULT_INSTANCES = 1000
DEFAULT_SIZE = 32  # px, where neither the name nor a transform says how large
BLANK = 0.01  # mean ink below which a picture is redrawn
TRIES = 8
SMALLEST_SIZE = 8  # px
FORMULA_CLASSES = 1_000_000  # of the families whose classes are random formulas; 1000 where the name does not say

# Where the instances of a split begin: far enough apart that no training set reaches the test set.
FIRST_INSTANCE = {"train": 0, "validation": 1 << 40, "test": 1 << 41}
HELD_OUT = 10  # one held-out instance per this many training instances


@dataclass(frozen=True)
class Family:
    """A kind of picture: its number in random addresses, how many classes it has, what they are called, how to draw.

    `draw(seed, label, size, rng)` returns float32 (size, size) from 0 (background) to 1 (ink);
    `shade(ink, rng)` makes it uint8 (size, size, 3).
    """

    number: int
    classes: int
    class_name: Callable[[int], str]
    draw: Callable[[int, int, int, np.random.Generator], np.ndarray]
    shade: Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class SyntheticImages:
    """A set of generated pictures; picture i shows class `i % classes`, instance `i // classes`.

    Args:
        family: "glyphs", "atoms", "contours" or "fractals"; with the suffix "-colour" in colour.
        classes: how many of the family's classes, from the first.
        instances: pictures per class.
        size: side in pixels. seed: another seed, other pictures.
        first_instance: where the instances begin; the splits differ in it.
    """

    family: str
    classes: int
    instances: int
    size: int = DEFAULT_SIZE
    seed: int = DEFAULT_SEED
    first_instance: int = 0

    def __post_init__(self):
        family = find_family(self.family)
        if not 2 <= self.classes <= family.classes:
            raise HFViTError(f"synthetic:{self.family} has 2 to {family.classes} classes, asked for {self.classes}")
        if self.instances < 1:
            raise HFViTError(f"a synthetic set needs at least 1 instance per class, got {self.instances}")
        if self.size < SMALLEST_SIZE:
            raise HFViTError(f"synthetic pictures have at least {SMALLEST_SIZE} px a side, asked for {self.size}")

    @classmethod
    def from_name(cls, name: str, seed: int = DEFAULT_SEED) -> "SyntheticImages":
        """Read `synthetic:FAMILY[@classes,instances[,size]]`."""
        match = re.fullmatch(r"synthetic:([a-z-]+)(?:@(\d+),(\d+)(?:,(\d+))?)?", name)
        if match is None:
            raise HFViTError(f"'{name}' is not understood; write synthetic:FAMILY@classes,instances[,size], "
                             "for example synthetic:glyphs@52,600")  # fmt: skip
        family, classes, instances, size = match.groups()
        return cls(
            family,
            int(classes) if classes else min(find_family(family).classes, 1000),
            int(instances) if instances else DEFAULT_INSTANCES,
            int(size) if size else DEFAULT_SIZE,
            seed,
        )

    def split(self, split: str) -> "SyntheticImages":
        """The "train", "validation" or "test" part: other instances; the latter two are a tenth as large."""
        held_out = max(1, self.instances // HELD_OUT)
        instances = self.instances if split == "train" else held_out
        return replace(self, instances=instances, first_instance=FIRST_INSTANCE[split])

    def __len__(self) -> int:
        return self.classes * self.instances

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw picture `index`: {"image": uint8 (size, size, 3), "label": int}."""
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} is outside the {len(self)} of synthetic:{self.family}")
        instance, label = divmod(index, self.classes)
        image = draw(self.family, label, self.first_instance + instance, self.size, self.seed)
        return {"image": image, "label": label}

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,), without drawing."""
        return np.tile(np.arange(self.classes, dtype=np.int64), self.instances)

    @property
    def label_names(self) -> list[str]:
        """What the classes are called."""
        return [find_family(self.family).class_name(label) for label in range(self.classes)]

    def name(self, index: int) -> str:
        """What messages call picture `index`."""
        instance, label = divmod(index, self.classes)
        return f"{self.family}/{find_family(self.family).class_name(label)}/{self.first_instance + instance}"

    def describe(self) -> dict[str, Any]:
        """What the pictures depend on, but for their size."""
        return {"family": self.family, "classes": self.classes, "instances": self.instances, "seed": self.seed,
                "first_instance": self.first_instance}  # fmt: skip


def find_family(name: str) -> Family:
    """The family of that name; the suffix "-colour" does not change the shapes."""
    family = FAMILIES.get(name.removesuffix("-colour"))
    if family is None:
        known = ", ".join(f"{key}, {key}-colour" for key in FAMILIES)
        raise HFViTError(f"no synthetic family '{name}'; there are {known}")
    return family


def draw(family_name: str, label: int, instance: int, size: int, seed: int = DEFAULT_SEED) -> np.ndarray:
    """Draw one picture: uint8 (size, size, 3).

    Nearly blank ones are redrawn with further numbers of the same address; of classes that draw little more than
    nothing, the fullest of `TRIES` pictures counts.
    """
    family = find_family(family_name)
    rng = generator(IMAGE, seed, family.number, label, instance)
    ink = family.draw(seed, label, size, rng)
    for _ in range(TRIES - 1):
        if ink.mean() > BLANK and ink.max() > 0.5:
            break
        ink = max(ink, family.draw(seed, label, size, rng), key=np.mean)
    return shade_colour(ink, rng) if family_name.endswith("-colour") else family.shade(ink, rng)


def shade_grey(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink on a background, both grey: 3 of 4 bright on nearly black, else any that differ clearly; some noise."""
    kind, paper, contrast, noise = rng.random(4)
    if kind < 0.9:
        background, foreground = 0.12 * max(0.0, 2 * paper - 1), 1.0 - 0.35 * contrast
    else:
        background, foreground = contrasting(paper, 0.35 + 0.65 * contrast)
    grey = background + (foreground - background) * ink
    grey = add_noise(grey, noise, rng)
    return three_channels(grey)


def white_on_black(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The ink as it is."""
    return three_channels(ink)


def black_on_white(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The ink's negative."""
    return three_channels(1.0 - ink)


def three_channels(grey: np.ndarray) -> np.ndarray:
    """Grey from 0 to 1 as uint8 (size, size, 3)."""
    return np.repeat(np.rint(255 * grey).astype(np.uint8)[:, :, None], 3, axis=2)


def shade_colour(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink on a background of two colours that differ clearly in at least one channel; some noise."""
    *numbers, noise = rng.random(7)
    pairs = [contrasting(numbers[channel], numbers[3 + channel]) for channel in range(3)]
    strongest = int(np.argmax([abs(foreground - background) for background, foreground in pairs]))
    pairs[strongest] = contrasting(numbers[strongest], 0.5 + 0.5 * numbers[3 + strongest])
    background, foreground = (np.array(side, dtype=np.float32) for side in zip(*pairs))
    colour = background + (foreground - background) * ink[:, :, None]
    return np.rint(255 * add_noise(colour, noise, rng)).astype(np.uint8)


def contrasting(background: float, contrast: float) -> tuple[float, float]:
    """A background, and a foreground `contrast` away from it on the side with more room, as far as 0..1 allows."""
    if background < 0.5:
        return background * (1 - contrast), background * (1 - contrast) + contrast
    return 1 - (1 - background) * (1 - contrast), background * (1 - contrast)


def add_noise(values: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Uniform noise in a third of the pictures; result within 0..1."""
    if amount > 2 / 3:
        values = values + np.float32(0.6 * (amount - 2 / 3)) * (rng.random(values.shape, dtype=np.float32) - 0.5)
    return np.clip(values, 0.0, 1.0)


FAMILIES = {
    "glyphs": Family(1, len(LETTERS), lambda label: LETTERS[label], draw_glyph, shade_grey),
    "atoms": Family(2, FORMULA_CLASSES, lambda label: f"atom-{label}", draw_atom, white_on_black),
    "contours": Family(3, FORMULA_CLASSES, lambda label: f"contour-{label}", draw_contours, black_on_white),
    "fractals": Family(4, FORMULA_CLASSES, lambda label: f"fractal-{label}", draw_fractal, white_on_black),
}
