"""The limit of this machine: a model's matmuls by the fastest library for each, and the processor's peak.

Candidates are PyTorch (MKL or OpenBLAS), oneDNN and MKL with packed weights, and ONNX Runtime and OpenVINO where they
are installed. The peak is measured by a loop of multiply-adds that reads no memory (`peak.cpp`).
"""

import ctypes
import functools
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import baselines
from benchmarks.measure import interleaved
from hf_vit import capabilities
from hf_vit.inference import build, kernels


PEAK_SOURCE = Path(__file__).parent / "peak.cpp"
PEAK_SECONDS = 0.2
TRIALS = 3  # of each candidate for a shape, of which the best counts

Candidates = dict[str, Callable[[], Callable[[], Any]]]  # library -> what prepares a call, which is then timed


class Choices:
    """The fastest library for each shape, measured once over all layers of that shape, as a model calls them.

    Calls are grouped by library, because the threads of two libraries would wait for each other.
    """

    def __init__(self) -> None:
        self.layers: dict[tuple, list[Candidates]] = {}

    def add(self, key: tuple, candidates: Candidates) -> None:
        """One more layer of the shape `key`."""
        self.layers.setdefault(key, []).append(candidates)

    def calls(self) -> list[Callable[[], Any]]:
        """A call for each layer."""
        fastest = [self.fastest(key, layers) for key, layers in self.layers.items()]
        return [call for _, calls in sorted(fastest, key=lambda choice: choice[0]) for call in calls]

    def fastest(self, key: tuple, layers: list[Candidates]) -> tuple[str, list[Callable[[], Any]]]:
        """Name and calls of the library that is the fastest for these layers; one that fails here does not count."""
        best: tuple[float, str, list[Callable[[], Any]]] | None = None
        for name in layers[0]:
            try:
                calls = [candidates[name]() for candidates in layers]
                taken = min(_seconds(calls) for _ in range(TRIALS + 1))
            except Exception:  # a library without this operation, precision or device
                continue
            if best is None or taken < best[0]:
                best = taken, name, calls
        assert best is not None, f"no library does {key}"
        return best[1:]


def _seconds(calls: list[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


# -- a model's matmuls


def products(model: nn.Module, pixels: torch.Tensor, dtype: torch.dtype, training: bool = False) -> Callable[[], None]:
    """A call that does a model's matmuls and convolutions alone, each at its own shape, by the fastest library for it.

    The last block's are of all tokens, as others compute it. What is left of the time of the model is norms,
    activations, softmax, casts and Python. In training each linear layer has three, as in backward passes; attention's
    two come as six.
    """
    choices = Choices()

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = torch.randn(inputs[0].shape, device=pixels.device).to(dtype)
        weight = module.weight.detach().to(dtype)
        if isinstance(module, nn.Linear):
            x = x.reshape(-1, x.shape[-1])
            choices.add(("linear", *x.shape, len(weight)), linear_candidates(x, weight))
            if training:
                result = x @ weight.t()
                for a, b in ((result, weight), (result.t(), x)):  # gradients of the input and of the weight
                    choices.add(("matmul", *a.shape, *a.stride(), b.shape[1]), matmul_candidates(a, b))
        elif training:
            leaves = x.requires_grad_(module.in_channels > 3), weight.requires_grad_()
            stride = module.stride
            gradient = torch.ones_like(F.conv2d(*leaves, stride=stride))
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            differentiate = functools.partial(torch.autograd.grad, inputs=wanted, grad_outputs=gradient)
            key = ("convolution and gradients", *x.shape, *weight.shape, *stride)
            choices.add(key, {"PyTorch": lambda: lambda: differentiate(F.conv2d(*leaves, stride=stride))})
        else:
            key = ("convolution", *x.shape, *weight.shape, *module.stride)
            choices.add(key, convolution_candidates(x, weight, module.stride))

    def attend(module: nn.Module, inputs: tuple[torch.Tensor, ...], kwargs: dict) -> None:
        batch, tokens, width = (inputs[0] if inputs else kwargs["hidden_states"]).shape
        heads = model.config.num_attention_heads
        query = torch.randn(batch, heads, tokens, width // heads, device=pixels.device).to(dtype)
        for _ in range(3 if training else 1):
            choices.add(("attention", *query.shape), attention_candidates(query, fused=not training))

    hooks = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    hooks += [
        module.register_forward_pre_hook(attend, with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith("attention") and hasattr(module, "q_proj")
    ]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    calls = choices.calls()

    def run() -> None:
        with torch.set_grad_enabled(training):
            for call in calls:
                call()

    return run


def linear_candidates(x: torch.Tensor, weight: torch.Tensor) -> Candidates:
    """x W^T, `(rows, in)` and `(out, in)`; the weight may be packed before, as in inference."""
    candidates = matmul_candidates(x, weight.t())
    if x.device.type == "cpu" and capabilities.packs_linear(x.dtype):

        def by_onednn() -> Callable[[], Any]:
            packed = kernels.pack_linear(weight)
            return lambda: kernels.packed_linear(x, packed, None)

        candidates["oneDNN"] = by_onednn
    if x.device.type == "cpu" and x.dtype == torch.float32:
        if capabilities.packs_linear_by_mkl():

            def by_mkl() -> Callable[[], Any]:
                packed = kernels.pack_linear_by_mkl(weight, len(x))
                return lambda: kernels.packed_linear_by_mkl(x, packed, weight, None)

            candidates["MKL"] = by_mkl
        if not baselines.missing("onnxruntime") and not baselines.missing("onnx"):
            candidates["ONNX Runtime"] = lambda: _by_onnxruntime(x, weight)
    if x.device.type == "cpu" and not baselines.missing("openvino") and not baselines.missing("onnx"):
        candidates["OpenVINO"] = lambda: _by_openvino(x, weight)
    return candidates


def matmul_candidates(a: torch.Tensor, b: torch.Tensor) -> Candidates:
    """a b, `(rows, in)` and `(in, out)`; nothing is packed before, as in training."""

    def by_torch() -> Callable[[], Any]:
        result = a @ b
        return lambda: torch.mm(a, b, out=result)

    candidates: Candidates = {"PyTorch": by_torch}
    if a.device.type == "cpu" and capabilities.packs_linear(a.dtype):
        candidates["oneDNN, packing included"] = lambda: (
            lambda: kernels.packed_linear(a, kernels.pack_linear(b.t()), None)
        )
    return candidates


def attention_candidates(heads: torch.Tensor, fused: bool) -> Candidates:
    """The two matmuls of attention of `(B, k, N, d)`; `fused` also with the softmax between them, where faster."""

    def by_torch() -> Callable[[], Any]:
        query = heads.flatten(0, 1)
        scores, result = torch.bmm(query, query.transpose(1, 2)), torch.empty_like(query)

        def call() -> None:
            torch.bmm(query, query.transpose(1, 2), out=scores)
            torch.bmm(scores, query, out=result)

        return call

    candidates: Candidates = {"PyTorch": by_torch}
    if fused:
        candidates["PyTorch, fused"] = lambda: lambda: F.scaled_dot_product_attention(heads, heads, heads)
    return candidates


def convolution_candidates(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int]) -> Candidates:
    """A convolution without padding, in either order of memory."""
    last = torch.channels_last

    def channels_last() -> Callable[[], Any]:
        y, kernel = x.contiguous(memory_format=last), weight.contiguous(memory_format=last)
        return lambda: F.conv2d(y, kernel, stride=stride)

    def by_onednn(memory: torch.memory_format) -> Callable[[], Any]:
        y = x.contiguous(memory_format=memory)
        packed = kernels.pack_convolution(weight, (0, 0), stride, y.shape)
        return lambda: kernels.packed_convolution(y, packed, (0, 0), stride)

    candidates: Candidates = {
        "PyTorch": lambda: lambda: F.conv2d(x, weight, stride=stride),
        "PyTorch, channels last": channels_last,
    }
    if x.device.type == "cpu" and capabilities.packs_convolution(x.dtype):
        candidates["oneDNN"] = lambda: by_onednn(torch.contiguous_format)
        candidates["oneDNN, channels last"] = lambda: by_onednn(last)
    if tuple(weight.shape[2:]) == tuple(stride) and stride != (1, 1):  # patches side by side are a matmul
        rows = x.new_ones(x.shape[0] * (x.shape[2] // stride[0]) * (x.shape[3] // stride[1]), weight[0].numel())
        candidates |= {f"{name}, matmul": make for name, make in linear_candidates(rows, weight.flatten(1)).items()}
    return candidates


def _matmul_onnx(x: torch.Tensor, weight: torch.Tensor) -> bytes:
    """An ONNX model of one matmul with a constant weight."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shapes = {"x": list(x.shape), "y": [len(x), len(weight)]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    constant = numpy_helper.from_array(weight.t().contiguous().numpy(), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "matmul", [values["x"]], [values["y"]], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    buffer = io.BytesIO()
    onnx.save(model, buffer)
    return buffer.getvalue()


def _by_onnxruntime(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], Any]:
    return baselines.onnxruntime_call(_matmul_onnx(x, weight), x.numpy())


def _by_openvino(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], Any]:
    return baselines.openvino_call(_matmul_onnx(x.float(), weight.float()), x.float().numpy(), x.dtype)


# -- the machine


def machine(device: torch.device) -> dict[str, float]:
    """Rates of this machine now: a ViT-B's widest layer by the best library and the processor's peak, FLOP/s; copying
    memory, bytes/s.
    """
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (torch.randn(*shape, device=device).to(dtype) for shape in ((1576, 768), (3072, 768)))
        (call,) = Choices().fastest(("widest",), [linear_candidates(x, weight)])[1]
        rates[f"{dtype}".removeprefix("torch.") + "_flops_per_second"] = 2 * 1576 * 768 * 3072 / _best(call, device)
    if device.type == "cpu" and (peak := peak_flops()) is not None:
        rates["float32_peak_flops_per_second"] = peak
    big = torch.ones(1 << 26, device=device)
    target = torch.empty_like(big)
    rates["memory_bytes_per_second"] = 2 * 4 * big.numel() / _best(lambda: target.copy_(big), device)
    return rates


def peak_flops() -> float | None:
    """Float32 operations a second of all of torch's threads, registers alone; None where there is no compiler."""
    library = build.library(PEAK_SOURCE, {"run": [ctypes.c_int64, ctypes.c_int]})
    if library is None:
        return None
    library.run.restype = ctypes.c_double
    threads, rounds, best = torch.get_num_threads(), 1 << 20, 0.0
    for _ in range(8):
        start = time.perf_counter()
        done = library.run(rounds, threads)
        taken = time.perf_counter() - start
        best = max(best, done / taken)
        if taken < PEAK_SECONDS:
            rounds *= 2
    return best


def _best(call: Callable[[], Any], device: torch.device, rounds: int = 10) -> float:
    return min(interleaved({"": call}, 0.0, device)[""] + interleaved({"": call}, 0.02 * rounds, device)[""])
