"""Convert tensors between other libraries' names and ours; every name on both sides is used exactly once.

A format defines a list of `KeyMapping`s, which this file applies in either direction.

Tests: tests/hf_vit/checkpoints/test_checkpoints.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from ..errors import HFViTError
from ..modeling.configuration_hf_vit import HFViTConfig
from ..modeling.modeling_hf_vit import HFViTForImageClassification
from .tensor_file import FLOATS, TensorFile


Tensors = Sequence[torch.Tensor]
MAX_LISTED = 20  # names in an error message


@dataclass(frozen=True)
class Transform:
    """Two inverse functions between their tensors and ours; without arithmetic unless documented."""

    to_ours: Callable[..., Tensors]
    to_theirs: Callable[..., Tensors]


SAME = Transform(lambda t: [t], lambda t: [t])
TRANSPOSED = Transform(lambda t: [t.t()], lambda t: [t.t()])  # Dense (in, out) <-> Linear (out, in)
HWIO = Transform(lambda t: [t.permute(3, 2, 0, 1)], lambda t: [t.permute(2, 3, 1, 0)])  # convolution kernels
CHANNELS = Transform(lambda t: [t.reshape(-1)], lambda t: [t.reshape(1, 1, 1, -1)])  # GroupNorm (1, 1, 1, C) <-> (C,)


@dataclass(frozen=True)
class KeyMapping:
    """Tensors named `theirs` correspond to our tensors named `ours`, by `transform`."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform = SAME


def rename(theirs: str, ours: str, transform: Transform = SAME) -> KeyMapping:
    """A mapping of one tensor to one tensor."""
    return KeyMapping((theirs,), (ours,), transform)


def weight_and_bias(theirs: str, ours: str, bias: bool = True) -> list[KeyMapping]:
    """Mappings of a module's weight and bias; `bias=False`: only of the weight."""
    return [rename(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in (("weight", "bias") if bias else ("weight",))]


def split(parts: int) -> Transform:
    """Split a fused tensor into `parts` equal ones along the first axis (timm's qkv)."""

    def to_ours(fused: torch.Tensor) -> Tensors:
        if fused.ndim == 0 or fused.shape[0] % parts:
            raise ValueError(f"its first axis must hold {parts} equal parts")
        return fused.chunk(parts)

    return Transform(to_ours, lambda *separate: [torch.cat(separate)])


def stacked(transform: Transform, depth: int) -> Transform:
    """Split a tensor with a leading layer axis into one tensor per layer (scanned blocks)."""

    def to_ours(stack: torch.Tensor) -> Tensors:
        if stack.shape[0] != depth:
            raise ValueError(f"its first axis must hold {depth} layers")
        return [transform.to_ours(layer)[0] for layer in stack]

    return Transform(to_ours, lambda *layers: [torch.stack([transform.to_theirs(layer)[0] for layer in layers])])


def shape(size: Iterable[int]) -> str:
    """`(3, 4)`, for messages."""
    return "(" + ", ".join(str(n) for n in size) + ")"


def _listing(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    more = f"; and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return f"\n  {title} ({len(lines)}): " + "; ".join(lines[:MAX_LISTED]) + more


def _refuse_unmatched(path, expected: str, missing: list[str], unused: list[str], mismatched: list[str]) -> None:
    """Raise one HFViTError that lists all names that do not match; return if there are none."""
    text = _listing("missing", missing) + _listing("not used", unused) + _listing("of another shape", mismatched)
    if text:
        raise HFViTError(f"{path}: not loaded, its tensors do not fit {expected}{text}")


def _check_mappings(mappings: list[KeyMapping], ours: Iterable[str]) -> None:
    """Raise HFViTError if one of our tensors is mapped twice or not at all: the format does not have it."""
    counts = Counter(name for mapping in mappings for name in mapping.ours)
    wrong = sorted(set(ours) ^ set(counts)) + [name for name, n in counts.items() if n > 1]
    if wrong:
        raise HFViTError(f"this format has no place for, or no source of: {', '.join(wrong[:MAX_LISTED])}")


def check_sizes(fields: dict, file: TensorFile) -> None:
    """Check that no size in a configuration exceeds the file, before a network of that size is built.

    Raises:
        HFViTError: names the field and its value.
    """
    largest = max((side for size in file.shapes.values() for side in size), default=0)
    limits = {
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_labels", "num_register_tokens"), largest),
        **dict.fromkeys(("num_channels", "representation_size", "num_attention_heads"), largest),
        "num_hidden_layers": len(file.shapes),
    }
    for name, limit in limits.items():
        value = fields.get(name)
        if isinstance(value, int) and value > limit:
            raise HFViTError(f"{file.path}: {name}={value} is more than the file holds ({limit} at most)")
    if sum(fields.get("resnet_depths") or ()) > len(file.shapes):
        raise HFViTError(f"{file.path}: resnet_depths={fields['resnet_depths']} are more units than the file holds")


def from_state_dict(
    config: HFViTConfig,
    file: TensorFile,
    mappings: list[KeyMapping],
    unused: Iterable[str],
    format: str,
    dtype: torch.dtype | None = None,
) -> HFViTForImageClassification:
    """A model with the file's tensors.

    The network is made on the meta device and takes over each tensor as it is read, so the weights are in memory once.

    Args:
        config: the inferred architecture. mappings: of the format, for this architecture.
        unused: names in the file that are deliberately not used. format: its name, for messages.
        dtype: to convert weights to as they are read; None: the file's, and if it has several the widest.

    Raises:
        HFViTError: missing, additional or mismatched tensors (up to 20 of each are listed), or NaN.
    """
    try:
        with torch.device("meta"):
            model = HFViTForImageClassification(config)
    except (ValueError, TypeError, RuntimeError, OverflowError, KeyError, ZeroDivisionError) as error:
        raise HFViTError(f"{file.path}: its configuration describes no network ({error})") from error
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    _check_mappings(mappings, expected)
    mapped = {name for mapping in mappings for name in mapping.theirs}
    missing = [f"{n} (for {', '.join(m.ours)})" for m in mappings for n in m.theirs if n not in file]
    filled = {n for n in file if 0 not in file.shapes[n]}  # empty tensors: DINOv3 without registers has one
    left_over = [f"{n} {shape(file.shapes[n])}" for n in sorted(filled - mapped - set(unused))]
    where = f"the {format} layout of {describe_config(config)}"
    _refuse_unmatched(file.path, where, missing, left_over, [])
    if dtype is None:
        dtype = _common_dtype(file, mapped)

    state: dict[str, torch.Tensor] = {}
    mismatched, not_finite = [], []
    for mapping in mappings:
        sizes = ", ".join(f"{n} {shape(file.shapes[n])}" for n in mapping.theirs)
        tensors = [file.read(n) if dtype is None else file.read(n).to(dtype) for n in mapping.theirs]
        not_finite += [n for n, t in zip(mapping.theirs, tensors) if not is_finite(t)]
        try:
            converted = mapping.transform.to_ours(*tensors)
        except (ValueError, RuntimeError, IndexError) as error:
            mismatched.append(f"{sizes}: {error}")
            continue
        for name, tensor in zip(mapping.ours, converted, strict=True):
            if tuple(tensor.shape) != expected[name]:
                mismatched.append(
                    f"{sizes}, as {name} it would be {shape(tensor.shape)} instead of {shape(expected[name])}"
                )
            state[name] = tensor.contiguous()
    _refuse_unmatched(file.path, where, [], [], mismatched)
    if not_finite:
        more = f" and {len(not_finite) - MAX_LISTED} more" if len(not_finite) > MAX_LISTED else ""
        raise HFViTError(
            f"{file.path}: NaN or infinite values in {', '.join(not_finite[:MAX_LISTED])}{more}: the training "
            "diverged or the file is damaged; take an earlier checkpoint"
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _common_dtype(file: TensorFile, names: Iterable[str]) -> torch.dtype | None:
    """None if all weights have the same dtype, else the widest: a network computes in one dtype."""
    dtypes = {file.dtypes[name] for name in names}
    if len(dtypes) < 2 or not dtypes <= FLOATS.keys():
        return None  # a tensor of an unsupported dtype is refused when it is read
    widest = reduce(torch.promote_types, (FLOATS[kind] for kind in dtypes))
    file.notes.append(f"weights of {', '.join(sorted(dtypes))} all become {str(widest).removeprefix('torch.')}")
    return widest


def to_state_dict(state: dict[str, torch.Tensor], mappings: list[KeyMapping]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield our tensors, converted, under their names.

    Raises:
        HFViTError: the format does not have one of our tensors.
    """
    _check_mappings(mappings, state)
    for mapping in mappings:
        yield from zip(
            mapping.theirs, mapping.transform.to_theirs(*(state[name] for name in mapping.ours)), strict=True
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; a finite sum shows it without a mask of the tensor's size."""
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def describe_config(config: HFViTConfig) -> str:
    """One line: depth, width, patch, grid, classes."""
    stem = "" if config.resnet_depths is None else f"ResNet {tuple(config.resnet_depths)} + "
    rows, columns = config.grid_size
    return (
        f"{stem}ViT with {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, patch {shape(config.patch_size_hw)}, grid {rows}x{columns}, "
        f"{config.num_labels} classes"
    )
