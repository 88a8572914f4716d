"""ViTs and hybrids of other libraries, built as these build them; with the reason if one is missing."""

import importlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_vit import HFViTConfig


TIMM = {  # ours -> timm's name
    "vit-base-patch16-224": "vit_base_patch16_224",
    "vit-large-patch16-224": "vit_large_patch16_224",
    "vit-huge-patch14-224": "vit_huge_patch14_224",
    "r50-vit-base-patch16-224": "vit_base_r50_s16_224",
    "r26-vit-small-patch32-224": "vit_small_r26_s32_224",
}


def missing(package: str) -> str | None:
    """Why a package cannot be used, or None."""
    try:
        importlib.import_module(package)
    except Exception as error:  # whatever a baseline's import raises, the others are measured
        return f"{package} does not import: {str(error).splitlines()[0][:80]}"
    return None


def networks(preset: str, **options: Any) -> tuple[dict[str, Callable[[], nn.Module]], dict[str, str]]:
    """Constructors of each baseline's network of a preset of ours, and the reasons for those that are absent.

    Args:
        options: drop_path, patch_dropout, attention ("sdpa" or "eager", of transformers).
    """
    config = HFViTConfig.from_preset(preset, num_labels=1000)
    hybrid = config.resnet_depths is not None
    found: dict[str, Callable[[], nn.Module]] = {}
    absent = {}
    if hybrid:
        absent["transformers ViT"] = "no hybrid in transformers 5; BiT-50 stands below for scale"
    else:
        found["transformers ViT"] = lambda: transformers_vit(config, options.get("attention", "sdpa"))
    if reason := missing("timm"):
        absent["timm"] = reason
    else:
        found["timm"] = lambda: timm_model(TIMM[preset], options)
    if hybrid:
        found["transformers BiT-50 (a ResNet)"] = bit
        return found, absent
    if reason := missing("torchvision"):
        absent["torchvision"] = reason
    elif preset in ("vit-base-patch16-224", "vit-large-patch16-224") and not options:
        found["torchvision"] = lambda: torchvision_vit(preset)
    if reason := missing("vit_pytorch"):
        absent["vit-pytorch"] = reason
    elif not options:
        found["vit-pytorch"] = lambda: lucidrains_vit(config)
    return found, absent


def transformers_vit(config: HFViTConfig, attention: str) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    names = (
        "image_size",
        "patch_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    theirs = ViTConfig(**{name: getattr(config, name) for name in names}, num_labels=config.num_labels)
    return ViTForImageClassification._from_config(theirs, attn_implementation=attention)


def bit() -> nn.Module:
    from transformers import BitConfig, BitForImageClassification

    return BitForImageClassification(BitConfig(num_labels=1000))


def timm_model(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    theirs = {"drop_path": "drop_path_rate", "patch_dropout": "patch_drop_rate"}
    return timm.create_model(name, **{theirs[key]: value for key, value in options.items() if key in theirs})


def torchvision_vit(preset: str) -> nn.Module:
    from torchvision.models import vit_b_16, vit_l_16

    return vit_b_16() if preset == "vit-base-patch16-224" else vit_l_16()


def lucidrains_vit(config: HFViTConfig) -> nn.Module:
    from vit_pytorch import ViT

    return ViT(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=config.num_labels,
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_dim=config.intermediate_size,
    )


# -- runtimes --------------------------------------------------------------------------------------------------------


def onnx_file(model: nn.Module, pixels: torch.Tensor, folder: Path) -> Path:
    """The model as ONNX of this batch size, as `hf-vit export` writes it but with fixed shapes."""
    path = folder / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(LogitsOnly(model), (pixels,), path, dynamo=True, external_data=True, verbose=False)
    return path


class LogitsOnly(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def runtimes(
    model: nn.Module, pixels: torch.Tensor, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Calls of ONNX Runtime and OpenVINO on our network, with as many threads as torch; reasons for absent ones."""
    reasons = {name: missing(package) for name, package in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino"))}
    if dtype != torch.float32:
        reasons["ONNX Runtime"] = f"no {str(dtype).removeprefix('torch.')} on CPUs"
    absent = {name: reason for name, reason in reasons.items() if reason}
    found: dict[str, Callable[[], Any]] = {}
    if len(absent) == len(reasons):
        return found, absent
    data = pixels.float().numpy()
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = onnx_file(model, pixels, Path(folder))
        except Exception as error:  # the exporter's failure is no reason to lose the other rows
            return found, absent | dict.fromkeys(set(reasons) - set(absent), f"no ONNX file: {str(error)[:80]}")
        if "ONNX Runtime" not in absent:
            found["ONNX Runtime"] = onnxruntime_call(str(path), data)
        if "OpenVINO" not in absent:
            found["OpenVINO"] = openvino_call(str(path), data, dtype)
    return found, absent


def onnxruntime_call(model: str | bytes, data: Any) -> Callable[[], Any]:
    """One pass of a model, a path or its bytes, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads slow the other candidates
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: data})


def openvino_call(model: str | bytes, data: Any, dtype: torch.dtype) -> Callable[[], Any]:
    """The same by OpenVINO."""
    import openvino

    core = openvino.Core()
    network = core.read_model(io.BytesIO(model) if isinstance(model, bytes) else model)
    precision = "f32" if dtype == torch.float32 else "bf16"
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    return lambda: request.infer({0: data})
