"""Faster kernels on CPUs, forward and backward, in place of some of PyTorch's functions while a model trains.

    with CPUKernels():
        loss = ...
        loss.backward()

For the Trainer, with any model; the model's code stays as it is. Each function has candidates:

    linear                         each of its three matmuls (output, gradient of the input, gradient of the weight) by
                                   oneDNN, which uses AVX-512 on processors where MKL does not
    scaled_dot_product_attention   matmuls and a softmax: PyTorch's is slower in bfloat16, and with few tokens
    conv2d of patches              a matmul: the gradient of the convolution's weight takes longer
    gelu (tanh)                    our own; in bfloat16 the erf form, at most 4.8e-4 apart
    linear, attention, conv2d      computed in float32 if the processor emulates bfloat16

A candidate is used only if it was measured faster than PyTorch's own function on this machine, for this dtype and
about this size (kernel_choice.py). The measurement runs when a shape comes for the first time (half a minute in all
for a ViT-B), and is logged at level INFO. If its table cannot be written, PyTorch's own functions are used. Results
agree to rounding. What was tried is in benchmarks/LOG.md.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from hf_vit import kernel_table
from hf_vit.capabilities import native_bfloat16, packs_linear
from hf_vit.inference import kernels

from .kernel_choice import (
    Implementations,
    fastest,
    fastest_here,
    fastest_of,
    in_own_thread,
    no_autocast,
    random_tensor,
)


logger = logging.get_logger(__name__)

# Less work than this is left to PyTorch: a few microseconds of Python per call would outweigh any gain.
MIN_OPERATIONS = 1 << 20  # multiply-adds of a linear layer
MIN_KEYS = 1 << 13  # elements of the keys of attention
MIN_ELEMENTS = 1 << 14  # of the input of other functions
MAX_TOKENS = 1024  # of attention as matmuls, which keeps the (M, N) weights; more need flash attention's memory

# Sizes are measured at the next lower power of four, so that there are few of them, and none larger than this.
MAX_ROWS = 1 << 12  # of the input of a linear layer
MAX_ELEMENTS = 1 << 22  # of the input of other functions
MAX_EMULATED_OPERATIONS = 1 << 28  # multiply-adds in emulated bfloat16, which may take 50 times as long

MIN_LINEAR_SPEEDUP = 1.03  # of a linear layer and of each of its matmuls
MIN_SHORT_SPEEDUP = 1.5  # of short matmuls: at 1.2 to 1.4, steps of 4 blocks of width 96 took 1.07 times as long

# FLOPs of a forward and backward pass up to which the pass as a whole is measured too: every function call of a model
# passes through the mode, about 1 ms in a pass of 4 blocks. In larger ones that does not show.
MAX_SMALL_PASS = 2e10

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that autocast casts: float64 stays
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


class CPUKernels(TorchFunctionMode):
    """Context in which the functions above use the fastest measured kernels, for CPU tensors that need a gradient.

    Forward and backward belong into the same `with`: activation checkpointing repeats the forward pass during the
    backward pass, and has to find the same kernels. It may be entered any number of times.

    A function mode rather than replaced modules, because attention, GELU and many linear layers are function calls
    inside other libraries' modules.

    Attributes:
        enabled: False: the context does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def __enter__(self) -> "CPUKernels":
        return super().__enter__() if self.enabled else self

    def __exit__(self, *error) -> None:
        if self.enabled:
            super().__exit__(*error)

    def disable_if_slower(self, key: tuple, plain: Callable[[], object], fast: Callable[[], object]) -> None:
        """Do nothing from now on if a small pass takes longer with the kernels on this machine.

        Args:
            key: of the pass in the table of times. plain, fast: run it without and with this context.
        """
        fast()  # chooses the kernels
        self.enabled = fastest_here(("training, pass", *key), {"plain": plain, "kernels": fast}) == "kernels"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.backward and len(args) == 1 and args[0].numel() == 1:
            options = [value for value in kwargs.values() if value is not None and value is not False]
            if not options:  # with a gradient, retain_graph and so on it is PyTorch's
                return self._backward(*args)
        replacement = REPLACEMENTS.get(func)
        if replacement is not None and torch.is_grad_enabled() and _on_cpu(args) and not _transformed():
            result = replacement(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)

    def _backward(self, loss: torch.Tensor) -> None:
        """`loss.backward()` with the mode on."""
        # PyTorch leaves a mode while it handles a function, and would call it again for torch.autograd.backward: so
        # the mode is entered again, and the engine called as that function calls it.
        with self:
            torch.autograd.Variable._execution_engine.run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )


def kernels_for(device: torch.device, requested: bool, compiled: bool) -> AbstractContextManager:
    """Context for training steps on a device: `CPUKernels`, or nothing on GPUs and under torch.compile."""
    return CPUKernels() if requested and device.type == "cpu" and not compiled else nullcontext()


def _on_cpu(args: tuple) -> bool:
    """Whether the tensors among the positional arguments are ordinary CPU tensors, no DTensors or other subclasses."""
    tensors = [x for x in args[:3] if torch.is_tensor(x)]  # input, weight and bias, or query, key and value
    return bool(tensors) and all(type(x) in PLAIN_TYPES and x.device.type == "cpu" for x in tensors)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which the functions below do not know."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _compute_dtype(*tensors: torch.Tensor) -> torch.dtype | None:
    """The dtype that PyTorch would compute in; None if the tensors differ in it."""
    autocast = torch.is_autocast_enabled("cpu")
    dtypes = {torch.get_autocast_dtype("cpu") if autocast and x.dtype in AUTOCAST_DTYPES else x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else None


def _round_down(size: int, most: int) -> int:
    """The largest power of four that is neither above `size` nor above `most`."""
    size = max(1, min(size, most))
    return 1 << ((size.bit_length() - 1) // 2 * 2)


def forget_measurements() -> None:
    """Clear the choices that this process has cached; the table on disk stays."""
    for function in (_linear_for, _attention_for, _convolution_for, _gelu_for, bfloat16_slowdown):
        function.cache_clear()
    kernel_table.forget_table()


# -- linear layers ----------------------------------------------------------------------------------------------------


def linear(x, weight, bias=None) -> torch.Tensor | None:
    """`F.linear`; None if PyTorch's own is to be used."""
    out, width = weight.shape if weight.ndim == 2 else (0, 0)  # F.linear also takes a vector
    if x.numel() * out < MIN_OPERATIONS or not (x.requires_grad or weight.requires_grad):
        return None
    if x.shape[-1] != width or (bias is not None and bias.shape != (out,)):  # PyTorch's to add, or to refuse
        return None
    dtype = _compute_dtype(x, weight) if bias is None else _compute_dtype(x, weight, bias)
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    rows = _round_down(x.numel() // width, MAX_ROWS)
    function = _linear_for(dtype, rows, width, out, torch.get_num_threads())
    return None if function is None else function(x, weight, bias)


@functools.cache
def _linear_for(dtype: torch.dtype, rows: int, width: int, out: int, threads: int) -> Callable | None:
    """The replacement of `F.linear` for about this number of rows, or None."""
    # `threads` is only a key of the cache: another number of threads may make another kernel the fastest.
    if dtype == torch.bfloat16 and not native_bfloat16():  # at full size the emulation takes too long to measure
        rows = min(rows, _round_down(MAX_EMULATED_OPERATIONS // (width * out), MAX_ROWS))
    functions: Implementations = {"torch": _autocast(F.linear, dtype)}
    if packs_linear(dtype):
        matmuls = _fastest_matmuls(dtype, rows, width, out)
        if matmuls is not None:
            functions["matmuls"] = functools.partial(_linear_by, matmuls, dtype)
    if dtype == torch.bfloat16 and not native_bfloat16():
        functions["float32"] = _linear_in_float32
    inputs = random_tensor(rows, width, dtype=dtype), random_tensor(out, width), random_tensor(out)
    key = ("training, linear", dtype, rows, width, out)
    name = fastest(key, functions, *inputs, min_speedup=MIN_LINEAR_SPEEDUP, min_short_speedup=MIN_SHORT_SPEEDUP)
    return None if name == "torch" else functions[name]


def _autocast(function: Callable, dtype: torch.dtype) -> Callable:
    """For bfloat16, the function under autocast, as in a training step; for float32 the function itself."""

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        # Without autocast's cache of cast weights, since a training step casts each weight once.
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
            return function(*inputs)

    return run


class Matmuls(NamedTuple):
    """Kernels of the three matmuls of a linear layer: x (T, in), W (out, in), gradient of the output g (T, out)."""

    output: Callable  # (x, W, b) -> x W^T + b, (T, out)
    input_gradient: Callable  # (g, W) -> g W, (T, in)
    weight_gradient: Callable  # (g, x) -> g^T x, (out, in)


class Linear(torch.autograd.Function):
    """x W^T + b in the precision of x, (..., in) to (..., out); the parameters may have another precision."""

    @staticmethod
    def forward(ctx, x, weight, bias, matmuls):
        rows, cast_weight = x.reshape(-1, x.shape[-1]), weight.detach().to(x.dtype)
        ctx.save_for_backward(rows, cast_weight)  # the cast weight: the backward pass would have to cast it again
        ctx.matmuls, ctx.shape = matmuls, x.shape
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        result = matmuls.output(rows, cast_weight, None if bias is None else bias.detach().to(x.dtype))
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        weight_dtype, bias_dtype = ctx.dtypes
        # An expanded gradient, such as that of a mean, has strides of 0.
        gradient = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        of_input = ctx.matmuls.input_gradient(gradient, weight).view(ctx.shape) if needs_input else None
        of_weight = ctx.matmuls.weight_gradient(gradient, rows).to(weight_dtype) if needs_weight else None
        return of_input, of_weight, gradient.sum(0).to(bias_dtype) if needs_bias else None, None


def _linear_by(matmuls: Matmuls, dtype: torch.dtype, x, weight, bias=None) -> torch.Tensor:
    with no_autocast():
        return Linear.apply(x.to(dtype), weight, bias, matmuls)


def _linear_in_float32(x, weight, bias=None) -> torch.Tensor:
    # Rounded once at the end, as by oneDNN's bfloat16 matmuls, which also add in float32.
    with no_autocast():
        x, weight = x.float(), weight.float()
        bias = None if bias is None else bias.float()
        result = linear(x, weight, bias)
        return (F.linear(x, weight, bias) if result is None else result).bfloat16()


def _fastest_matmuls(dtype: torch.dtype, rows: int, width: int, out: int) -> Matmuls | None:
    """The fastest kernel of each matmul of a linear layer; None if PyTorch's own are the fastest for all three."""
    x, gradient = random_tensor(rows, width, dtype=dtype), random_tensor(rows, out, dtype=dtype)
    weight, bias = random_tensor(out, width, dtype=dtype), random_tensor(out, dtype=dtype)
    inputs = {"output": (x, weight, bias), "input gradient": (gradient, weight), "weight gradient": (gradient, x)}
    chosen: dict[str, str] = {}
    candidates = matmul_candidates(dtype)
    for matmul, functions in candidates.items():
        key, tensors = (f"training, linear, {matmul}", dtype, rows, width, out), inputs[matmul]

        def measure(key=key, functions=functions, tensors=tensors) -> kernel_table.Times:
            with torch.no_grad(), no_autocast():
                return kernel_table.seconds(key, functions, *tensors, cold=False)

        chosen[matmul] = fastest_of(in_own_thread(measure), MIN_LINEAR_SPEEDUP)
        logger.info(f"{key}: {chosen[matmul]}")
    if set(chosen.values()) == {"torch"}:
        return None
    return Matmuls(*(functions[chosen[matmul]] for matmul, functions in candidates.items()))


def matmul_candidates(dtype: torch.dtype) -> dict[str, Implementations]:
    """Kernels of each matmul by name, PyTorch's public operation first; needs `packs_linear(dtype)`."""
    output: Implementations = {
        "torch": F.linear,
        "onednn": _onednn,  # in bfloat16 adds the bias inside the matmul, where PyTorch writes it first
    }
    input_gradient: Implementations = {"torch": torch.mm}
    weight_gradient: Implementations = {
        "torch": lambda g, x: g.t() @ x,
        "of the transpose": lambda g, x: (x.t() @ g).t().contiguous(),
        "copied transpose": lambda g, x: _copied_transpose(g) @ x,
    }
    if dtype == torch.float32:
        output["onednn, packed"] = _onednn_packed
        input_gradient |= {
            "onednn": lambda g, weight: _onednn(g, weight.t()),
            "onednn, copied": lambda g, weight: _onednn(g, weight.t().contiguous()),
            "onednn, packed": lambda g, weight: _onednn_packed(g, weight.t()),
        }
        weight_gradient |= {
            "onednn": lambda g, x: _onednn(g.t(), x.t()),
            "onednn, of the transpose": lambda g, x: _onednn(x.t(), g.t()).t().contiguous(),
            "onednn, backward": _onednn_weight_gradient,
        }
    return {"output": output, "input gradient": input_gradient, "weight gradient": weight_gradient}


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b; W (out, in) in any memory layout."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_packed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same, with W copied into the blocked layout that oneDNN's kernel reads."""
    return _onednn(x, torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0]), bias)


def _onednn_weight_gradient(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """g^T x by oneDNN's backward operation, which takes float32 only."""
    backward = torch.ops.aten.mkldnn_linear_backward_weights
    like_weight = x.new_empty(gradient.shape[1], x.shape[1])
    return backward(gradient.to_mkldnn(), x.contiguous().to_mkldnn(), like_weight, False)[0].to_dense()


def _copied_transpose(matrix: torch.Tensor, rows: int = 64) -> torch.Tensor:
    """A contiguous transpose, in blocks that stay in the cache."""
    result = matrix.new_empty(matrix.shape[::-1])
    for part, block in zip(result.split(rows, dim=1), matrix.split(rows)):
        part.copy_(block.t())
    return result


# -- attention --------------------------------------------------------------------------------------------------------


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor | None:
    """`F.scaled_dot_product_attention` of (B, k, M, d) and twice (B, k, N, d); None if PyTorch's own is to be used."""
    unmasked = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if not unmasked or query.ndim != 4 or query.shape[:2] != key.shape[:2] or key.shape != value.shape:
        return None
    dtype = _compute_dtype(query, key, value)
    if dtype not in (torch.float32, torch.bfloat16) or key.numel() < MIN_KEYS or not query.requires_grad:
        return None
    (batch, heads, queries, depth), keys = query.shape, key.shape[2]
    # Each head is a problem of its own: the fastest kernel for some of them is taken for all.
    heads = _round_down(batch * heads, MAX_ELEMENTS // (max(queries, keys) * depth))
    function = _attention_for(dtype, heads, queries, keys, depth, torch.get_num_threads())
    if function is None:
        return None
    with no_autocast():
        return function(query.to(dtype), key.to(dtype), value.to(dtype), scale)


@functools.cache
def _attention_for(
    dtype: torch.dtype, heads: int, queries: int, keys: int, depth: int, threads: int
) -> Callable | None:
    """The replacement of PyTorch's attention for about this number of heads over all images, or None."""
    functions: Implementations = {"torch": F.scaled_dot_product_attention}
    if keys <= MAX_TOKENS:
        functions["matmuls"] = _attention_by_matmuls
    if dtype == torch.bfloat16:
        functions["float32"] = _attention_in_float32
    tensors = [random_tensor(heads, 1, count, depth, dtype=dtype) for count in (queries, keys, keys)]
    name = fastest(("training, attention", dtype, heads, queries, keys, depth), functions, *tensors)
    return None if name == "torch" else functions[name]


def _attention_by_matmuls(query, key, value, scale=None) -> torch.Tensor:
    """softmax(scale q k^T) v."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # (B * k, M, d), twice (B * k, N, d)
    # baddbmm applies the scale before the scores are rounded to bfloat16, and beta=0 ignores the first argument
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)  # (B * k, M, N)
    return torch.bmm(scores.softmax(-1), v).view(query.shape)


def _attention_in_float32(query, key, value, scale=None) -> torch.Tensor:
    q, k, v = query.float(), key.float(), value.float()
    with no_autocast():
        result = attention(q, k, v, scale=scale)
        result = F.scaled_dot_product_attention(q, k, v, scale=scale) if result is None else result
    return result.to(query.dtype)


# -- convolutions -----------------------------------------------------------------------------------------------------


def convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> torch.Tensor | None:
    """`F.conv2d` of windows side by side, as in a patch embedding, or in emulated bfloat16; None: PyTorch's own."""
    if x.ndim != 4 or isinstance(padding, str) or x.numel() < MIN_ELEMENTS or not weight.requires_grad:
        return None
    dtype, kernel = _compute_dtype(x, weight), tuple(weight.shape[2:])
    emulated = dtype == torch.bfloat16 and not native_bfloat16()
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    patches = padding == (0, 0) and dilation == (1, 1) and groups == 1 and stride == kernel != (1, 1)
    if not (patches or emulated) or dtype not in (torch.float32, torch.bfloat16):
        return None
    # One image in emulated bfloat16, in which a measurement of more would take too long.
    images = 1 if emulated else _round_down(len(x), max(1, MAX_ELEMENTS // x[0].numel()))
    shapes = (images, *x.shape[1:]), tuple(weight.shape)
    gradient = x.requires_grad
    numbers = stride, padding, dilation, groups
    function = _convolution_for(dtype, *shapes, *numbers, patches, gradient, torch.get_num_threads())
    return None if function is None else function(x, weight, bias)


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


@functools.cache
def _convolution_for(
    dtype, shape, kernel, stride, padding, dilation, groups, patches: bool, gradient: bool, threads: int
) -> Callable | None:
    """The replacement of `F.conv2d`, or None."""

    def original(x, weight, bias) -> torch.Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def in_float32(x, weight, bias) -> torch.Tensor:
        with no_autocast():
            bias = None if bias is None else bias.float()
            return original(x.float(), weight.float(), bias).bfloat16()

    functions: Implementations = {"torch": original}
    if patches:
        functions["matmul"] = _convolution_by_matmul
    if dtype == torch.bfloat16 and not native_bfloat16():
        functions["float32"] = in_float32
    x = random_tensor(*shape)

    def first_layer(function: Callable) -> Callable:
        # the input is an image, which needs no gradient: that gradient must not be timed
        return _autocast(lambda weight, bias: function(x, weight, bias), dtype)

    tensors = (random_tensor(*kernel), random_tensor(kernel[0]))
    measured = {
        name: _autocast(function, dtype) if gradient else first_layer(function) for name, function in functions.items()
    }
    key = ("training, conv2d", dtype, shape, kernel, stride, padding, dilation, groups, gradient)
    inputs = (x, *tensors) if gradient else tensors
    name = fastest(key, measured, *inputs, min_short_speedup=MIN_SHORT_SPEEDUP)
    return None if name == "torch" else functions[name]


def _convolution_by_matmul(x, weight, bias) -> torch.Tensor:
    """A matmul of the flattened windows with the kernels; (B, C, H, W) to (B, out, H / h, W / w)."""
    (batch, channels, *size), (down, across) = x.shape, weight.shape[2:]
    rows, columns = size[0] // down, size[1] // across
    x = x[..., : rows * down, : columns * across].reshape(batch, channels, rows, down, columns, across)
    x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, -1)
    weight = weight.flatten(1)
    result = linear(x, weight, bias)
    return (F.linear(x, weight, bias) if result is None else result).permute(0, 3, 1, 2)


# -- GELU -------------------------------------------------------------------------------------------------------------


class TanhGELU(torch.autograd.Function):
    """`F.gelu(x, approximate="tanh")` in float32 by our own kernel."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return kernels.gelu_tanh(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return kernels.gelu_tanh(*ctx.saved_tensors, gradient=gradient)


def gelu(x, approximate="none") -> torch.Tensor | None:
    """`F.gelu` in its tanh form: by our own kernel in float32, the erf form in bfloat16, if that is faster."""
    if approximate != "tanh" or x.numel() < MIN_ELEMENTS or not x.requires_grad:
        return None
    if x.dtype not in (torch.float32, torch.bfloat16):
        return None
    function = _gelu_for(x.dtype, _round_down(x.numel(), MAX_ELEMENTS), torch.get_num_threads())
    return None if function is None else function(x)


@functools.cache
def _gelu_for(dtype: torch.dtype, elements: int, threads: int) -> Callable | None:
    """The replacement of `F.gelu` in its tanh form, or None."""
    functions: Implementations = {"torch": lambda x: F.gelu(x, approximate="tanh")}
    if dtype == torch.bfloat16:
        functions["erf"] = F.gelu
    elif kernels.float32_library() is not None:
        functions["C++"] = TanhGELU.apply
    key = ("training, gelu", dtype, elements)
    name = fastest(key, functions, random_tensor(elements, dtype=dtype), min_short_speedup=MIN_SHORT_SPEEDUP)
    return None if name == "torch" else functions[name]


REPLACEMENTS: dict[Callable, Callable[..., torch.Tensor | None]] = {
    F.linear: linear,
    F.scaled_dot_product_attention: attention,
    F.conv2d: convolution,
    F.gelu: gelu,
}


# -- emulated bfloat16 ------------------------------------------------------------------------------------------------


def bfloat16_note(kernels: bool) -> str | None:
    """Note for a run in bfloat16 on a processor without instructions for it, else None."""
    if native_bfloat16():
        return None
    factor = bfloat16_slowdown(kernels)
    longer = "more time" if factor is None else f"{factor:.2f} times the time of"
    than = "than float32" if factor is None else "float32 (measured on one encoder block)"
    advice = "; leave --bf16 out for speed" if factor is None or factor > 1 else ""
    return f"this processor emulates bfloat16: training takes {longer} {than}{advice}"


@functools.cache
def bfloat16_slowdown(kernels: bool = True) -> float | None:
    """Time of a training step in emulated bfloat16 divided by that in float32, for one encoder block of width 384.

    None if the processor has bfloat16 instructions, or nothing can be measured.

    Args:
        kernels: use the kernels of this file.
    """
    if native_bfloat16():
        return None
    width, tokens = 384, random_tensor(4, 197, 384)
    weights = [random_tensor(rows, width) for rows in (width, width, width, width)] + [random_tensor(4 * width, width)]
    leaves = [x.mul_(0.1).requires_grad_() for x in weights]

    def step(dtype: torch.dtype) -> Callable:
        def run(*_: torch.Tensor) -> None:
            context = CPUKernels() if kernels else nullcontext()
            with context, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                x = F.layer_norm(tokens, (width,))
                q, k, v = (F.linear(x, w).view(4, 197, 6, 64).transpose(1, 2) for w in leaves[:3])
                x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                x = F.gelu(F.linear(F.linear(x, leaves[3]), leaves[4]), approximate="tanh")
            torch.autograd.grad(x.float().sum(), leaves)

        return run

    steps = {"float32": step(torch.float32), "bfloat16": step(torch.bfloat16)}

    def measure() -> kernel_table.Times:
        for run in steps.values():
            run()  # chooses kernels, which must not be timed
        return kernel_table.seconds(("training, step", kernels), steps, tokens, cold=False)

    times = in_own_thread(measure)
    low, high = times.get("bfloat16"), times.get("float32")
    return low / high if low and high else None
