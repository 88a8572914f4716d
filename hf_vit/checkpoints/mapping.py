"""The exchange of tensors between their names and ours: every name on both sides is used exactly once, or nothing is.

A dialect lists `Rule`s; this file applies them in either direction and knows no dialect.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import HFViTError
from ..modeling.configuration_hf_vit import HFViTConfig
from ..modeling.modeling_hf_vit import HFViTForImageClassification
from .tensor_file import TensorFile


Tensors = Sequence[torch.Tensor]
LISTED = 20  # names that one error lists at most


@dataclass(frozen=True)
class Form:
    """How tensors change shape between the sides; both directions move values without arithmetic."""

    to_ours: Callable[..., Tensors]
    to_theirs: Callable[..., Tensors]


SAME = Form(lambda t: [t], lambda t: [t])
TRANSPOSED = Form(lambda t: [t.t()], lambda t: [t.t()])  # Dense (in, out) <-> Linear (out, in)
HWIO = Form(lambda t: [t.permute(3, 2, 0, 1)], lambda t: [t.permute(2, 3, 1, 0)])  # convolution kernels
CHANNELS = Form(lambda t: [t.reshape(-1)], lambda t: [t.reshape(1, 1, 1, -1)])  # GroupNorm (1, 1, 1, C) <-> (C,)


@dataclass(frozen=True)
class Rule:
    """`theirs` names on their side become `ours` names on ours by `form`, and back."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    form: Form = SAME


def rule(theirs: str, ours: str, form: Form = SAME) -> Rule:
    """One name on either side."""
    return Rule((theirs,), (ours,), form)


def both(theirs: str, ours: str) -> list[Rule]:
    """Weight and bias of one module."""
    return [rule(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]


def split(parts: int) -> Form:
    """One fused tensor on their side is `parts` equal ones on ours, along the first axis (timm's qkv)."""

    def to_ours(fused: torch.Tensor) -> Tensors:
        if fused.shape[0] % parts:
            raise ValueError(f"its first axis must hold {parts} equal parts")
        return fused.chunk(parts)

    return Form(to_ours, lambda *separate: [torch.cat(separate)])


def stacked(form: Form, depth: int) -> Form:
    """One tensor per layer on our side, one with a leading layer axis on theirs (scanned blocks)."""

    def to_ours(stack: torch.Tensor) -> Tensors:
        if stack.shape[0] != depth:
            raise ValueError(f"its first axis must hold {depth} layers")
        return [form.to_ours(layer)[0] for layer in stack]

    return Form(to_ours, lambda *layers: [torch.stack([form.to_theirs(layer)[0] for layer in layers])])


def shape(size: Iterable[int]) -> str:
    """`(3, 4)`, for messages."""
    return "(" + ", ".join(str(n) for n in size) + ")"


def _listing(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    more = f"; and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    return f"\n  {title} ({len(lines)}): " + "; ".join(lines[:LISTED]) + more


def _refuse(path, expected: str, missing: list[str], unused: list[str], mismatched: list[str]) -> None:
    """Raise one error that lists what does not fit, or return where everything does."""
    text = _listing("missing", missing) + _listing("not used", unused) + _listing("of another shape", mismatched)
    if text:
        raise HFViTError(f"{path}: not loaded, its tensors do not fit {expected}{text}")


def _check_table(rules: list[Rule], ours: Iterable[str]) -> None:
    """A table that names one of our tensors twice or not at all is a mistake in this package."""
    counts = Counter(name for r in rules for name in r.ours)
    wrong = sorted(set(ours) ^ set(counts)) + [name for name, n in counts.items() if n > 1]
    if wrong:
        raise HFViTError(f"this dialect has no place for, or no source of: {', '.join(wrong[:LISTED])}")


def assemble(
    config: HFViTConfig,
    file: TensorFile,
    rules: list[Rule],
    left_aside: Iterable[str],
    dialect: str,
    dtype: torch.dtype | None = None,
) -> HFViTForImageClassification:
    """A model that holds the file's tensors.

    The network is made without storage and takes over each tensor as it is read, so memory holds the weights once.

    Args:
        config: the architecture, already inferred. rules: the dialect's table for it.
        left_aside: names in the file that are deliberately not used. dialect: its name, for messages.
        dtype: what the weights become as they are read; the file's own where None.

    Raises:
        HFViTError: names missing or left over, or shapes that differ; up to 20 of each are listed. Nothing is loaded.
    """
    with torch.device("meta"):
        model = HFViTForImageClassification(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    _check_table(rules, expected)
    wanted = {name for r in rules for name in r.theirs}
    missing = [f"{n} (for {', '.join(r.ours)})" for r in rules for n in r.theirs if n not in file]
    unused = [f"{n} {shape(file.shapes[n])}" for n in sorted(set(file) - wanted - set(left_aside))]
    where = f"the {dialect} layout of {describe(config)}"
    _refuse(file.path, where, missing, unused, [])

    state: dict[str, torch.Tensor] = {}
    mismatched, not_finite = [], []
    for r in rules:
        sizes = ", ".join(f"{n} {shape(file.shapes[n])}" for n in r.theirs)
        tensors = [file.read(n) if dtype is None else file.read(n).to(dtype) for n in r.theirs]
        not_finite += [n for n, t in zip(r.theirs, tensors) if not is_finite(t)]
        try:
            converted = r.form.to_ours(*tensors)
        except (ValueError, RuntimeError, IndexError) as error:
            mismatched.append(f"{sizes}: {error}")
            continue
        for name, tensor in zip(r.ours, converted, strict=True):
            if tuple(tensor.shape) != expected[name]:
                mismatched.append(
                    f"{sizes}, as {name} it would be {shape(tensor.shape)} instead of {shape(expected[name])}"
                )
            state[name] = tensor.contiguous()
    _refuse(file.path, where, [], [], mismatched)
    if not_finite:
        more = f" and {len(not_finite) - LISTED} more" if len(not_finite) > LISTED else ""
        warnings.warn(f"{file.path}: NaN or infinite values in {', '.join(not_finite[:LISTED])}{more}", stacklevel=3)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def dismantle(state: dict[str, torch.Tensor], rules: list[Rule]) -> Iterator[tuple[str, torch.Tensor]]:
    """Our tensors under their names, one after the other.

    Raises:
        HFViTError: a tensor of ours has no place in the dialect.
    """
    _check_table(rules, state)
    for r in rules:
        yield from zip(r.theirs, r.form.to_theirs(*(state[name] for name in r.ours)), strict=True)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; a finite sum says so without a mask of the tensor's size."""
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def describe(config: HFViTConfig) -> str:
    """One line: depth, width, patch, grid, classes."""
    stem = "" if config.resnet_depths is None else f"ResNet {tuple(config.resnet_depths)} + "
    rows, columns = config.grid_size
    return (
        f"{stem}ViT with {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, patch {shape(config.patch_size_hw)}, grid {rows}x{columns}, "
        f"{config.num_labels} classes"
    )
