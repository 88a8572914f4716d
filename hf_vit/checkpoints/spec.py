"""What a dialect found out about a file, and two questions that a file may not answer: its grid and its heads."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HFViTError
from ..modeling.configuration_hf_vit import PRESETS, HFViTConfig
from .mapping import Rule
from .tensor_file import TensorFile


# Settings of transformers' ViTImageProcessor, without the size. All of Google's files read pixels in [-1, 1].
GOOGLE_PROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2}
IMAGENET_PROCESSOR = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}

# Heads of the published widths, for files that do not store them (pytorch: q, k, v are plain matrices).
HEADS = {row[1]: row[4] for row in PRESETS.values()} | {1152: 16, 1408: 16, 1536: 16, 1664: 16, 1792: 16}


@dataclass
class Reading:
    """How a file is to be read.

    Attributes:
        dialect: one line, what was recognised.
        fields: the fields of `HFViTConfig` and `num_labels` that the file determines or implies.
        unsaid: those of `fields` that are a convention and not written in the file: a caller may contradict them.
        table: the rules for a configuration.
        left_aside: names in the file that are deliberately not used.
        notes: what the user should know. processor: settings of the image processor.
    """

    dialect: str
    fields: dict[str, Any]
    table: Callable[[HFViTConfig], list[Rule]]
    unsaid: set[str] = field(default_factory=set)
    left_aside: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    processor: dict[str, Any] = field(default_factory=dict)


def processor_of(stored: dict[str, Any] | None) -> dict[str, Any]:
    """Settings without a size from those of a ViT, DeiT or BiT image processor; Google's where there is none.

    A resize of the shorter side with a crop becomes `crop_pct`, the share of the side that is kept.
    """
    if stored is None:
        return dict(GOOGLE_PROCESSOR)
    kept = ("image_mean", "image_std", "resample", "do_rescale", "rescale_factor", "do_normalize", "do_resize")
    settings = GOOGLE_PROCESSOR | {name: stored[name] for name in kept if stored.get(name) is not None}
    size, crop = stored.get("size"), stored.get("crop_size")
    if stored.get("do_center_crop") and isinstance(size, dict) and isinstance(crop, dict) and "shortest_edge" in size:
        settings["crop_pct"] = crop["height"] / size["shortest_edge"]
    return settings


def label_names(config: HFViTConfig) -> list[str]:
    """The class names in order, as many as the classifier has outputs."""
    names: dict[Any, str] = dict(config.id2label or {})
    return [names[number] for number in range(len(names))]


def heads_of(path: Path, width: int, asked: dict[str, Any]) -> int:
    """The number of attention heads for a token width, where the file does not tell.

    Raises:
        HFViTError: neither a published width nor a multiple of 64, and `num_attention_heads` is not given.
    """
    if "num_attention_heads" in asked:
        return asked["num_attention_heads"]
    if width in HEADS:
        return HEADS[width]
    if width % 64 == 0:
        return width // 64
    raise HFViTError(
        f"{path}: the file does not store the number of attention heads and width {width} is not a published one: "
        "give num_attention_heads="
    )


def image_size_of_table(path: Path, rows: int, fields: dict[str, Any], asked: dict[str, Any]) -> int | tuple[int, int]:
    """The image size whose grid has as many cells as a position table has rows (class row not counted).

    A square number of rows is a square grid, as in every published file; `checkpoint_image_size` says otherwise. For
    any other number `image_size` is the size that the file was made for.

    Raises:
        HFViTError: the grid cannot be told, or what was asked for does not have that many cells.
    """
    config = HFViTConfig(**{k: v for k, v in fields.items() if k != "num_labels"}, image_size=2**14)

    def cells(size) -> int:
        return math.prod(config.grid_for(size))

    down, across = config.total_stride
    if "checkpoint_image_size" in asked:
        size = asked["checkpoint_image_size"]
        if cells(size) != rows:
            raise HFViTError(
                f"{path}: checkpoint_image_size={size} makes a grid of {cells(size)} cells, "
                f"the position table has {rows}"
            )
        return size
    side = math.isqrt(rows)
    if side * side == rows:
        return side * down if down == across else (side * down, side * across)
    if "image_size" in asked and cells(asked["image_size"]) == rows:
        return asked["image_size"]
    pairs = ", ".join(f"({a * down}, {rows // a * across})" for a in _divisors(rows))
    wrong = f" (image_size={asked['image_size']} makes {cells(asked['image_size'])})" if "image_size" in asked else ""
    raise HFViTError(
        f"{path}: its position table has {rows} cells, which is no square grid{wrong}: say for what "
        f"image size (height, width) the file was made with checkpoint_image_size=, or image_size= to keep it; "
        f"possible are {pairs}"
    )


def grid_of_table(rows: int, fields: dict[str, Any], size: Any) -> bool:
    """Whether an image of that size has as many cells as the table has rows."""
    config = HFViTConfig(**{k: v for k, v in fields.items() if k != "num_labels"}, image_size=2**14)
    return math.prod(config.grid_for(size)) == rows


def layers_of(file: TensorFile, pattern: str) -> int:
    """Number of blocks: one more than the highest index that `pattern` captures."""
    return 1 + max(int(m[1]) for name in file if (m := re.match(pattern, name)))


def _divisors(n: int) -> Iterable[int]:
    """Divisors, those nearest to the square root first, at most six."""
    found = [d for d in range(1, n + 1) if n % d == 0]
    return sorted(found, key=lambda d: abs(math.log(d * d / n)))[:6]
