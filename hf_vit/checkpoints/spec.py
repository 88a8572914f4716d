"""The interface of a format, its result for a file, and inference of facts that files lack: grid and heads.

Tests: tests/hf_vit/checkpoints/test_checkpoints.py.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import HFViTError
from ..image_processing import GOOGLE, ImageProcessing
from ..modeling.configuration_hf_vit import PRESETS, HFViTConfig
from .mapping import KeyMapping
from .tensor_file import TensorFile


# Heads of the published widths, for files that do not store them: in PyTorch q, k, v are plain matrices.
HEADS = {row[1]: row[4] for row in PRESETS.values()} | {1152: 16, 1408: 16, 1664: 16, 1792: 16}
# Widths that are published with several numbers of heads: SigLIP 2 giant has 16, DINOv2 giant 24.
SEVERAL_HEADS = {1536: "16 or 24"}

# MAE is fine-tuned with mean pooling, and the last norm after it.
MAE_HEAD = {"pooling": "gap", "final_norm": "pooled"}


class UnusableHeadError(HFViTError):
    """The head of a checkpoint is not one linear layer, and no new one was requested."""


@dataclass
class CheckpointSpec:
    """How to read a file.

    Attributes:
        format: name of the format and variant, one line.
        fields: of `HFViTConfig`, and `num_labels`, as far as the file determines or implies them.
        key_mappings: from their tensors to ours, for a configuration.
        not_specified: names of `fields` that are a convention, not stored in the file: a caller may contradict them.
        unused: names in the file that are deliberately not used.
        assumptions: about facts that the file does not store and the outputs depend on; the user is warned.
        notes: other remarks for the user. image_processing: default if no file next to the weights describes it.
        new_head: fields to change for a new classifier: the input that the family's authors give it.
    """

    format: str
    fields: dict[str, Any]
    key_mappings: Callable[[HFViTConfig], list[KeyMapping]]
    not_specified: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    assumptions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    image_processing: ImageProcessing = GOOGLE
    new_head: dict[str, Any] = field(default_factory=dict)


class CheckpointFormat(Protocol):
    """The interface of the modules in `formats/`; the first whose `matches` is true reads the file.

    `MODEL_TYPES` of transformers' config.json take precedence over the names of tensors.
    """

    MODEL_TYPES: tuple[str, ...]

    def matches(self, file: TensorFile) -> bool:
        """Whether the names of tensors are those of this format; `read` may still refuse the file."""
        ...

    def read(self, file: TensorFile, requested: dict[str, Any], sidecars: dict[str, dict]) -> CheckpointSpec:
        """Infer the architecture.

        Args:
            file: names and shapes. requested: fields of `HFViTConfig` from the caller.
            sidecars: contents of the JSON files next to the weights, by name.

        Raises:
            HFViTError: a feature that `HFViTConfig` does not have (named), or a fact that the caller must supply.
        """
        ...


def label_names(config: HFViTConfig) -> list[str]:
    """The class names in order, one for each output of the classifier."""
    names: dict[Any, str] = dict(config.id2label or {})
    return [names[number] for number in range(len(names))]


def heads_for_width(path: Path, width: int, requested: dict[str, Any]) -> tuple[int, list[str]]:
    """The number of attention heads for a token width, for a file that does not store it, and the assumption as text.

    Raises:
        HFViTError: the width is published with several numbers of heads, or is no multiple of 64, and
            `num_attention_heads` is not given.
    """
    if "num_attention_heads" in requested:
        return requested["num_attention_heads"], []
    if width in SEVERAL_HEADS:
        raise HFViTError(
            f"{path}: the file does not store the number of attention heads, and width {width} is published "
            f"with {SEVERAL_HEADS[width]}: give num_attention_heads="
        )
    if width in HEADS:
        return HEADS[width], [f"{HEADS[width]} heads, as published for width {width} (num_attention_heads=)"]
    if width % 64 == 0:
        return width // 64, [f"{width // 64} heads, one for every 64 of width {width} (num_attention_heads=)"]
    raise HFViTError(
        f"{path}: the file does not store the number of attention heads and width {width} is not a published one: "
        "give num_attention_heads="
    )


def linear_head(
    file: TensorFile, name: str, requested: dict[str, Any], pattern: str | None = None
) -> tuple[int, set[str]]:
    """(number of labels, names that are not used) of a classifier `name.weight`, `name.bias`.

    Any other head is skipped if the caller requests a new one.

    Args:
        pattern: of the names of a head; by default those below `name`.

    Raises:
        UnusableHeadError: the head is not one linear layer, and no `num_labels` was requested.
    """
    names = {key for key in file if re.match(pattern or re.escape(name) + r"(\.|$)", key)}
    if not names:
        return 0, set()
    tensors = {f"{name}.weight", f"{name}.bias"}
    if tensors <= names and len(file.shapes[f"{name}.weight"]) == 2:
        return file.shapes[f"{name}.weight"][0], names - tensors
    if "num_labels" in requested:
        return 0, names
    raise UnusableHeadError(
        f"{file.path}: its head ({', '.join(sorted(names)[:4])}) is not one linear layer with bias: num_labels= "
        "puts a new one in its place"
    )


def image_size_of_table(
    path: Path, rows: int, fields: dict[str, Any], requested: dict[str, Any]
) -> int | tuple[int, int]:
    """The image size of a position table with that many rows (without class rows).

    For a square number of rows it is square, as in every published file, unless `checkpoint_image_size` is given. For
    any other number `image_size` is taken as the size of the file.

    Raises:
        HFViTError: the grid is ambiguous, or the requested size has another number of cells.
    """
    config = HFViTConfig(**{k: v for k, v in fields.items() if k != "num_labels"}, image_size=2**14)

    def cells(size) -> int:
        return math.prod(config.grid_for(size))

    down, across = config.total_stride
    if rows < 1:
        raise HFViTError(f"{path}: its position table has no row for a patch")
    if "checkpoint_image_size" in requested:
        size = requested["checkpoint_image_size"]
        if cells(size) != rows:
            raise HFViTError(
                f"{path}: checkpoint_image_size={size} makes a grid of {cells(size)} cells, "
                f"the position table has {rows}"
            )
        return size
    side = math.isqrt(rows)
    if side * side == rows:
        return side * down if down == across else (side * down, side * across)
    if "image_size" in requested and cells(requested["image_size"]) == rows:
        return requested["image_size"]
    pairs = ", ".join(f"({a * down}, {rows // a * across})" for a in _divisors(rows))
    wrong = ""
    if "image_size" in requested:
        wrong = f" (image_size={requested['image_size']} makes {cells(requested['image_size'])})"
    raise HFViTError(
        f"{path}: its position table has {rows} cells, which is no square grid{wrong}: say for what "
        f"image size (height, width) the file was made with checkpoint_image_size=, or image_size= to keep it; "
        f"possible are {pairs}"
    )


def grid_of_table(rows: int, fields: dict[str, Any], size: Any) -> bool:
    """Whether the grid of that image size has as many cells as the table has rows."""
    config = HFViTConfig(**{k: v for k, v in fields.items() if k != "num_labels"}, image_size=2**14)
    return math.prod(config.grid_for(size)) == rows


def count_layers(file: TensorFile, pattern: str) -> int:
    """Number of blocks: one more than the highest index that `pattern` captures.

    Raises:
        HFViTError: an index beyond the number of tensors, which no complete file has.
    """
    depth = 1 + max((int(m[1]) for name in file if (m := re.match(pattern, name))), default=-1)
    if not 0 < depth <= len(file.shapes):
        raise HFViTError(f"{file.path}: incomplete, its blocks are numbered to {depth - 1}")
    return depth


def patch_size(height: int, width: int) -> int | tuple[int, int]:
    """One number for a square patch."""
    return height if height == width else (height, width)


def _divisors(n: int) -> Iterable[int]:
    """At most six divisors, those nearest to the square root first."""
    divisors = {d for low in range(1, math.isqrt(n) + 1) if n % low == 0 for d in (low, n // low)}
    return sorted(divisors, key=lambda d: abs(math.log(d * d / n)))[:6]
