"""ONNX and torch.export models for machines without transformers, checked against the model; int8 for CPUs.

`export_model` writes a file and checks it: onnxruntime (or torch) runs it on random images and must agree with the
model to 1e-4. `quantize` makes the int8 version, `compare_int8` measures the difference. Needs the packages of `pip
install "hf-vit[export]"`. The command is `hf_vit/cli/export.py`. Not Optimum: it exports a fixed list of model types,
and none with its own code.
"""

import contextlib
import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers.models.vit import ViTImageProcessorPil

from .atomic_file import is_full_disk
from .checkpoints import Loaded
from .checkpoints.save import save_processor
from .errors import HFViTError
from .image_io import processor_pixels
from .modeling.configuration_hf_vit import HFViTConfig
from .modeling.modeling_hf_vit import HFViTForImageClassification
from .modeling.position_embedding import INTERPOLATIONS
from .modeling.resnet_stem import StdConv2d
from .problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, output_scores, problem_type_of, thresholds_of


FORMATS = {"onnx": "model.onnx", "torch-export": "model.pt2"}
INT8_FILE = "model.int8.onnx"
TOLERANCE = 1e-4  # relative to the largest logit, or absolute if all are below 1
MIN_INT8_WEIGHT = 1024  # elements; int8 saves nothing for smaller weights


def need(packages: Sequence[str]) -> None:
    """Raise HFViTError that names the missing packages."""
    missing = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise HFViTError(f'export to ONNX needs {", ".join(missing)}: pip install "hf-vit[export]"')


# -- writing -----------------------------------------------------------------------------------------------------


class ExportedClassifier(nn.Module):
    """A classifier with one tensor in and one out.

    Args:
        dynamic_size: export for any image size: without the model's checks, which would fix the size; positions are
            always resized (to their own grid that is the identity), and a ResNet is padded as for sizes that its
            strides divide.
    """

    def __init__(self, model: HFViTForImageClassification, dynamic_size: bool = False):
        super().__init__()
        self.model = model
        if dynamic_size:
            self.model = copy.deepcopy(model)  # methods are replaced on instances: the caller's model keeps its own
            embeddings: Any = self.model.vit.embeddings
            embeddings.patch_embeddings.forward = lambda pixels: _project(embeddings.patch_embeddings, pixels)
            if embeddings.position_embeddings is not None:
                embeddings.patch_positions = lambda grid: _positions(embeddings, grid)
            if (stem := embeddings.patch_embeddings.backbone) is not None:
                stem.forward = partial(_stem, stem)
                for module in stem.modules():
                    if isinstance(module, StdConv2d):
                        module.forward = partial(_convolve, module)  # type: ignore[method-assign]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` -> `(B, K)`."""
        return self.model(pixel_values=pixel_values).logits


def _project(patches: Any, pixels: torch.Tensor) -> torch.Tensor:
    return patches.projection(pixels if patches.backbone is None else patches.backbone(pixels))


def _stem(stem: Any, pixels: torch.Tensor) -> torch.Tensor:
    x = F.relu(stem.gn_root(stem.conv_root(pixels)))  # (B, width, H/2, W/2)
    x = F.max_pool2d(_pad(x, 3, 2, float("-inf")), 3, stride=2)  # (B, width, H/4, W/4)
    for stage in stem.stages:
        x = stage(x)
    return x


def _convolve(convolution: StdConv2d, x: torch.Tensor) -> torch.Tensor:
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    return F.conv2d(_pad(x, kernel, stride), convolution.standardized_weight(), stride=stride)


def _pad(x: torch.Tensor, kernel: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """`same_padding` for sizes that the stride divides, which does not depend on the size."""
    total = max(kernel - stride, 0)
    return F.pad(x, (total // 2, total - total // 2) * 2, value=value) if total else x


def _positions(embeddings: Any, grid: tuple[int, int]) -> torch.Tensor:
    """`HFViTEmbeddings.patch_positions` for a symbolic grid: `(1, rows * columns, D)`."""
    config = embeddings.config
    table = embeddings.position_embeddings[:, config.num_class_rows :]
    if config.position_embedding_type == "learned1d":
        line = F.interpolate(table.transpose(1, 2), size=grid[0] * grid[1], mode="linear", align_corners=True)
        return line.transpose(1, 2)
    square = table.reshape(1, *embeddings.grid_size, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=grid, **INTERPOLATIONS[config.position_interpolation])
    return square.flatten(2).transpose(1, 2)


def check_any_size(config: HFViTConfig) -> None:
    """Raise HFViTError for positions that can only be exported for one image size."""
    fixed = None
    if config.relative_position_bias is not None:
        fixed = f'relative_position_bias="{config.relative_position_bias}"'
    elif config.has_position_table and config.position_interpolation not in INTERPOLATIONS:
        fixed = f'position_interpolation="{config.position_interpolation}"'
    if fixed:
        raise HFViTError(
            f"{fixed} cannot be exported for any image size: leave --dynamic-size out, or give --image-size"
        )


def export_model(loaded: Loaded, folder: Path, format: str, dynamic_size: bool) -> dict[str, Any]:
    """Write a model with its config and image processor to a folder, and check it; returns the checks.

    Raises:
        HFViTError: the exporter fails, or the exported model disagrees with ours.
    """
    model = loaded.model.float().eval()
    if dynamic_size:
        check_any_size(model.config)
    height, width = model.config.image_size_hw
    down, across = model.config.total_stride
    batch, sizes = torch.export.Dim("batch", min=1, max=65536), {}
    example = torch.zeros(2, model.config.num_channels, height, width)
    multiples = model.config.resnet_depths is not None  # with padding for any size the exporter takes minutes
    if dynamic_size and multiples:
        sizes = {2: down * torch.export.Dim("rows", min=1), 3: across * torch.export.Dim("columns", min=1)}
    elif dynamic_size:
        sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    if dynamic_size:  # not the native size, at which the exporter would specialize
        example = torch.zeros(2, model.config.num_channels, height + 2 * down, width + 3 * across)
    path = folder / FORMATS[format]
    with quiet():
        try:
            program = torch.export.export(
                ExportedClassifier(model, dynamic_size),
                (example,),
                dynamic_shapes={"pixel_values": {0: batch, **sizes}},
            )
            if format == "torch-export":
                content = io.BytesIO()  # torch.save to a file on a full disk aborts the process
                torch.export.save(program, content)
                path.write_bytes(content.getbuffer())
            else:
                _write_onnx(program, path, dynamic_size, description(model.config))
        except Exception as error:  # the exporters' passes raise many kinds
            if is_full_disk(error):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise HFViTError(
                f"this model cannot be exported to {format}{' with any image size' * dynamic_size} ({reason.strip()})"
            ) from error
    model.config.save_pretrained(folder)
    save_processor(folder, loaded.processor)
    shapes = [(1, height, width), (3, height, width)]
    if dynamic_size:
        shapes += [(2, height + down, width), (1, height, width + 2 * across)]
    run = runner(path)
    checked = [difference(model, run, shape) for shape in shapes]
    account = {
        "format": format,
        "problem_type": problem_type_of(model.config),
        "dynamic_size": dynamic_size,
        "tolerance": TOLERANCE,
        "checked": checked,
    }
    return account | ({"size_multiple_of": [down, across]} if dynamic_size and multiples else {})


def description(config: HFViTConfig) -> dict[str, str]:
    """Metadata of the ONNX file for its outputs: names as a JSON list, the problem type, thresholds."""
    names: dict[Any, str] = config.id2label or {}
    fields = {
        "labels": json.dumps([names[number] for number in range(len(names))], ensure_ascii=False),
        "problem_type": problem_type_of(config),
    }
    if problem_type_of(config) == MULTI_LABEL:
        fields["label_thresholds"] = json.dumps(thresholds_of(config))
    return fields


def _write_onnx(program: Any, path: Path, dynamic_size: bool, metadata: dict[str, str]) -> None:
    names = {0: "batch", **({2: "height", 3: "width"} if dynamic_size else {})}
    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": names},
        verbose=False,
    )
    assert written is not None
    written.model.metadata_props.update(metadata)
    written.save(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' progress and their remarks on missing packages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- checking ----------------------------------------------------------------------------------------------------


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function from pixels `(B, C, H, W)` to logits `(B, K)`, numpy float32, that runs a written model."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda pixels: program(torch.from_numpy(pixels)).detach().numpy()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels})[0]


def difference(
    model: HFViTForImageClassification, run: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Largest difference between the logits of model and `run`, on random images of one shape (batch, height, width).

    Raises:
        HFViTError: the difference is above the tolerance.
    """
    batch, height, width = shape
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(batch, model.config.num_channels, height, width, generator=generator) * 2 - 1
    with torch.no_grad():
        expected = model(pixels).logits.numpy()
    logits = run(pixels.numpy())
    largest = float(np.abs(logits - expected).max())
    if not largest <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise HFViTError(
            f"the exported model differs from the model by {largest:.2g} on images of {height} x {width}, more than "
            f"{TOLERANCE:g}: nothing was kept"
        )
    return {"batch": batch, "height": height, "width": width, "largest_difference": largest}


# -- int8 --------------------------------------------------------------------------------------------------------


def quantize(path: Path, target: Path, kind: str) -> None:
    """Write an int8 version of an ONNX model for CPUs.

    Args:
        kind: "dynamic" (7-bit weights of matmuls, activations quantized to 8 bits at run time) or "weights" (weights
            of matmuls and convolutions stored as int8, one scale per output channel, and computed in float32).
    """
    import onnx

    if kind == "weights":
        onnx.save(int8_weights(onnx.load(path)), target)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    del model.graph.value_info[:]  # the exporter's shapes contradict the quantizer's
    with quiet():
        # 7-bit weights: processors without VNNI sum u8 x s8 products in 16 bits, which 8 bits overflow, and the file
        # may run on any processor
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )


def int8_weights(model: Any) -> Any:
    """Replace the large weights of an ONNX model by int8 with a DequantizeLinear each; returns the model."""
    from onnx import helper, numpy_helper

    axes: dict[str, int] = {}  # initializer -> its axis of output channels
    for node in model.graph.node:
        if node.op_type == "Conv":
            axes[node.input[1]] = 0
        elif node.op_type == "MatMul":
            axes[node.input[1]] = 1
        elif node.op_type == "Gemm":
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            axes[node.input[1]] = 0 if transposed else 1
    initializers, nodes = [], []
    for tensor in model.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if tensor.name not in axes or weight.size < MIN_INT8_WEIGHT or weight.dtype != np.float32:
            initializers.append(tensor)
            continue
        axis = axes[tensor.name]
        others = tuple(other for other in range(weight.ndim) if other != axis)
        scale = np.maximum(np.abs(weight).max(axis=others), 1e-12) / 127
        shape = [-1 if other == axis else 1 for other in range(weight.ndim)]
        stored = np.round(weight / scale.reshape(shape)).astype(np.int8)
        names = [f"{tensor.name}.int8", f"{tensor.name}.scale"]
        initializers += [
            numpy_helper.from_array(stored, names[0]),
            numpy_helper.from_array(scale.astype(np.float32), names[1]),
        ]
        nodes.append(helper.make_node("DequantizeLinear", names, [tensor.name], axis=axis))
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)
    everything = nodes + list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(everything)
    return model


def compare_int8(loaded: Loaded, folder: Path, images: Iterable[tuple[Path, Image.Image]]) -> dict[str, Any]:
    """Compare int8 and float32 outputs on images: unchanged labels, and accuracy if folders are named like labels.

    Of several labels all must be unchanged. For a regression, the largest change of each number in its unit.

    Args:
        folder: of the ONNX model and its int8 version.
        images: path and decoded image of each.

    Returns:
        `n` images; if there are any, `same_label` (fraction) and `largest_probability_change`; if folders name labels,
        also `labelled` images, `accuracy_float32` and `accuracy_int8`. For a regression `n` and `largest_change` by
        name.
    """
    run_float32, run_int8 = runner(folder / FORMATS["onnx"]), runner(folder / INT8_FILE)
    processor = ViTImageProcessorPil(**loaded.processor)
    config = loaded.model.config
    problem, thresholds = problem_type_of(config), torch.tensor(thresholds_of(config))
    numbers = {name: number for number, name in (config.id2label or {}).items()} if problem == SINGLE_LABEL else {}
    same, probability_changes, correct, changes = [], [], [], []
    for path, image in images:
        pixels = processor_pixels(processor, image).numpy()
        float32, int8 = run_float32(pixels)[0], run_int8(pixels)[0]
        scores, int8_scores = (output_scores(config, torch.from_numpy(logits)) for logits in (float32, int8))
        if problem == MULTI_LABEL:
            same.append(bool(((scores >= thresholds) == (int8_scores >= thresholds)).all()))
        else:
            same.append(float32.argmax() == int8.argmax())
        probability_changes.append(float((scores - int8_scores).abs().max()))
        changes.append(np.abs(float32 - int8))
        label = numbers.get(path.parent.name)
        if label is not None:
            correct.append((float32.argmax() == label, int8.argmax() == label))
    if not same:
        return {"n": 0}
    if problem == REGRESSION:
        names: dict[Any, str] = config.id2label or {}
        largest = np.max(changes, axis=0).tolist()
        return {"n": len(same), "largest_change": {names[number]: value for number, value in enumerate(largest)}}
    result = {"n": len(same), "same_label": float(np.mean(same))}
    result["largest_probability_change"] = float(max(probability_changes))
    if correct:
        accuracy = np.mean(correct, axis=0)
        result |= {
            "labelled": len(correct),
            "accuracy_float32": float(accuracy[0]),
            "accuracy_int8": float(accuracy[1]),
        }
    return result
