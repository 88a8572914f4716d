"""Sets of generated images: the class, instance and label of each index.

    images = SyntheticImages("glyphs", classes=52, instances=600, size=24)
    images[0]                       # {"image": uint8 (24, 24, 3), "label": 0}

For sources.py, streaming.py and export.py.

Tests: tests/training/data/synthetic/test_synthetic.py.
"""

import difflib
import logging
import operator
import re
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from hf_vit.errors import HFViTError

from ...rng import LABEL, hashed
from .families import INSTANCES, check_synthetic_size, draw_image, find_family


DEFAULT_SEED = 0
DEFAULT_CLASSES = 1000  # or all, if a family has fewer
DEFAULT_INSTANCES = 1000
DEFAULT_SIZE = 32  # px, if neither the name nor a transform has a size

# Where the instances of a split begin: far enough apart that no training set reaches the test set.
FIRST_INSTANCE = {"train": 0, "validation": 1 << 40, "test": 1 << 41}
HELD_OUT = 10  # one held-out instance per this many training instances
INTEGERS = ("classes", "instances", "size", "seed", "first_instance", "objects")
OPTIONS = {"objects": int, "zipf": float, "label_noise": float}  # of a name, with their types
FORM = "synthetic:FAMILY[+FAMILY...][@classes,instances[,size]][,option=value...]"


class OutOfRange(HFViTError, IndexError):
    """An index out of range: an error for the user, and the end of a loop over the images."""


@dataclass(frozen=True)
class SyntheticImages:
    """A set of generated images; without a long tail, image i shows class `i % classes`, instance `i // classes`.

    Args:
        family: "glyphs", "atoms", "contours" or "fractals"; with the suffix "-color" in color, with "-clouds" also on
            a cloudy background. Several families joined by "+" alternate in providing the classes.
        classes: number of classes, from the first.
        instances: images per class.
        size: side in pixels. seed: of all images.
        first_instance: number of the first instance; splits differ in it.
        objects: if above 1, an image shows 1 to `objects` smaller ones of its class.
        zipf: a long tail: class k, from 0, has instances / (k + 1)^zipf images, at least one. 0: the same number each.
        label_noise: fraction of the images with the label of another class.

    Raises:
        HFViTError: a value out of range.
    """

    family: str
    classes: int
    instances: int
    size: int = DEFAULT_SIZE
    seed: int = DEFAULT_SEED
    first_instance: int = 0
    objects: int = 1
    zipf: float = 0.0
    label_noise: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "family", current_spelling(self.family))
        for name in INTEGERS:
            try:
                object.__setattr__(self, name, operator.index(getattr(self, name)))
            except TypeError:
                raise HFViTError(f"{name} of a synthetic set is an integer, got {getattr(self, name)!r}") from None
        if not 2 <= self.classes <= self.all_classes:
            raise HFViTError(f"synthetic:{self.family} has 2 to {self.all_classes} classes, asked for {self.classes}")
        if self.instances < 1:
            raise HFViTError(f"a synthetic set needs at least 1 instance per class, got {self.instances}")
        if not 0 <= self.first_instance <= INSTANCES - self.instances:
            raise HFViTError(
                f"every class has instances 0 to {INSTANCES - 1}, "
                f"asked for {self.instances} from {self.first_instance}"
            )
        check_synthetic_size(self.size)
        if not 1 <= self.objects <= 100:
            raise HFViTError(f"an image shows 1 to 100 objects, asked for {self.objects}")
        if not 0.0 <= self.zipf <= 10.0:
            raise HFViTError(f"the exponent zipf lies between 0 (all classes alike) and 10, got {self.zipf}")
        if not 0.0 <= self.label_noise < 1.0:
            raise HFViTError(f"label_noise is a fraction from 0 to below 1, got {self.label_noise}")

    @classmethod
    def from_name(cls, name: str, seed: int = DEFAULT_SEED) -> "SyntheticImages":
        """Read `synthetic:FAMILY[+FAMILY...][@classes,instances[,size]][,option=value...]`."""
        return parse_name(name, seed)[0]

    @cached_property
    def families(self) -> list[str]:
        """The names of the families."""
        names = self.family.split("+")
        if len(set(names)) < len(names):
            raise HFViTError(f"synthetic:{self.family} names a family twice; each gives its classes once")
        return names

    @cached_property
    def capacities(self) -> list[int]:
        """Number of classes of each family."""
        return [find_family(name).classes for name in self.families]

    @property
    def all_classes(self) -> int:
        """Number of classes of all families together."""
        return sum(self.capacities)

    def address(self, label: int) -> tuple[str, int]:
        """The family of a class, and the class's number in it; the families alternate."""
        left = list(zip(self.families, self.capacities))
        turn = 0
        while True:
            smallest = min(capacity for _, capacity in left)
            if label < (smallest - turn) * len(left):
                return left[label % len(left)][0], turn + label // len(left)
            label -= (smallest - turn) * len(left)
            turn = smallest
            left = [(name, capacity) for name, capacity in left if capacity > smallest]

    def split(self, split: str) -> "SyntheticImages":
        """The "train", "validation" or "test" part: other instances; the latter two are a tenth as large, with all
        classes alike and right labels."""
        if split == "train":
            return replace(self, first_instance=FIRST_INSTANCE[split])
        held_out = max(1, self.instances // HELD_OUT)
        first = FIRST_INSTANCE[split]
        return replace(self, instances=held_out, first_instance=first, zipf=0.0, label_noise=0.0)

    @cached_property
    def starts(self) -> np.ndarray:
        """With a long tail, where the images of each instance begin, one of every class that has so many:
        int64 (instances + 1,)."""
        ranks = np.arange(1, self.classes + 1, dtype=np.float64)
        # Rounded first, because powers differ in their last bit between processors.
        counts = np.ceil(np.round(self.instances / ranks**self.zipf, 6)).clip(1, self.instances).astype(np.int64)
        rounds = np.searchsorted(-counts, -np.arange(self.instances), side="left")
        return np.concatenate([[0], np.cumsum(rounds)])

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.zipf else self.classes * self.instances

    def place(self, index: int) -> tuple[int, int]:
        """(class, instance) of image `index`."""
        index = operator.index(index)  # numpy's integers overflow in the addresses
        if not 0 <= index < len(self):
            raise OutOfRange(f"synthetic:{self.family} has images 0 to {len(self) - 1} here, asked for {index}")
        if not self.zipf:
            return index % self.classes, self.first_instance + index // self.classes
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return index - int(self.starts[number]), self.first_instance + number

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw image `index`: {"image": uint8 (size, size, 3), "label": int}."""
        label, instance = self.place(index)
        image = draw_image(*self.address(label), instance, self.size, self.seed, self.objects)
        return {"image": image, "label": self.label(label, instance)}

    def label(self, label: int, instance: int) -> int:
        """The label of an image, wrong for a fraction `label_noise` of them."""
        if not self.label_noise:
            return label
        return int(self.noisy(np.array([label]), np.array([instance]))[0])

    def noisy(self, labels: np.ndarray, instances: np.ndarray) -> np.ndarray:
        """Labels, a fraction of them replaced by any other: int64."""
        words = hashed(LABEL, self.seed, labels, instances)
        wrong = (words >> np.uint64(32)).astype(np.float64) < self.label_noise * 2.0**32
        others = (words & np.uint64(0xFFFFFFFF)).astype(np.int64) % (self.classes - 1)
        return np.where(wrong, (labels + 1 + others) % self.classes, labels)

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,), without drawing."""
        sizes = np.diff(self.starts) if self.zipf else np.full(self.instances, self.classes)
        numbers = np.repeat(np.arange(self.instances), sizes)
        labels = np.arange(len(self), dtype=np.int64) - (np.cumsum(sizes) - sizes)[numbers]
        return self.noisy(labels, self.first_instance + numbers) if self.label_noise else labels

    @property
    def label_names(self) -> list[str]:
        """What the classes are called; in a mixture, with their family."""
        names = []
        for label in range(self.classes):
            family, number = self.address(label)
            names.append(self.class_name(family, number))
        return names

    def class_name(self, family: str, number: int) -> str:
        """What a class is called."""
        name = find_family(family).class_name(number)
        return name if len(self.families) == 1 else f"{family}/{name}"

    def name(self, index: int) -> str:
        """What messages call image `index`."""
        label, instance = self.place(index)
        family, number = self.address(label)
        return f"{family}/{find_family(family).class_name(number)}/{instance}"

    def describe(self) -> dict[str, Any]:
        """What the images depend on, but for their size; options and versions where they are not the first.

        Fingerprints and manifests are made of it, so "-color" stays "-colour" here, as in those of version 0.1.
        """
        family = "+".join(re.sub("-color$", "-colour", name) for name in self.families)
        facts = {"family": family, "classes": self.classes, "instances": self.instances, "seed": self.seed,
                 "first_instance": self.first_instance}  # fmt: skip
        facts |= {field.name: getattr(self, field.name) for field in fields(self)
                  if field.name in OPTIONS and getattr(self, field.name) != field.default}  # fmt: skip
        versions = [find_family(name).version for name in self.families]
        return facts if set(versions) == {1} else facts | {"versions": versions}


def current_spelling(family: str) -> str:
    """The family with "-color" in place of version 0.1's "-colour"."""
    if "-colour" not in family:
        return family
    warn_of_old_spelling()
    return family.replace("-colour", "-color")


@cache
def warn_of_old_spelling() -> None:
    """Warn once per process."""
    logging.getLogger(__name__).warning(
        "synthetic families with the suffix -colour are now called -color; the next release knows only that"
    )


def parse_name(name: str, seed: int = DEFAULT_SEED) -> tuple[SyntheticImages, bool]:
    """The set of a name, and whether the name has a size.

    Raises:
        HFViTError: not the form of a name, or no such set.
    """
    match = re.fullmatch(r"synthetic:([a-z+-]+)(?:@(.+))?", name)
    words = match[2].split(",") if match and match[2] else []
    numbers = [word for word in words if re.fullmatch(r"\d+", word)]
    options = [word.partition("=") for word in words[len(numbers) :]]
    options_given = {key: option_of_name(name, key, value) for key, sign, value in options if sign}
    if match is None or len(numbers) not in (0, 2, 3) or len(options_given) < len(options):
        raise HFViTError(f"'{name}' is not understood; write {FORM}, for example synthetic:glyphs@52,600")
    family = current_spelling(match[1])
    classes, instances, *size = map(int, numbers) if numbers else (None, DEFAULT_INSTANCES)
    if classes is None:
        classes = min(DEFAULT_CLASSES, sum(find_family(part).classes for part in family.split("+")))
    size = size or [DEFAULT_SIZE]
    return SyntheticImages(family, classes, instances, size[0], seed, **options_given), len(numbers) == 3


def option_of_name(name: str, key: str, value: str) -> int | float:
    """The value of an option of a name."""
    if key not in OPTIONS:
        near = difflib.get_close_matches(key, OPTIONS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise HFViTError(f"'{name}' has an unknown option '{key}'; there are {', '.join(OPTIONS)}{meant}")
    try:
        return OPTIONS[key](value)
    except ValueError:
        kind = "an integer" if OPTIONS[key] is int else "a number"
        raise HFViTError(f"option {key} of '{name}' is {kind}, got '{value}'") from None
