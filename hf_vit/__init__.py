"""hf_vit: the Hugging Face-compatible home of the Vision Transformer.

Importing it makes the classes known to transformers' Auto classes: a folder of ours then loads without
`trust_remote_code`. Nothing heavy is imported before it is used: torch, for one, comes with the first class.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_when_imported


if TYPE_CHECKING:
    from .checkpoints import load_checkpoint, save_checkpoint
    from .configuration_hf_vit import HFViTConfig
    from .errors import HFViTError
    from .modeling_hf_vit import HFViTBackbone, HFViTForImageClassification, HFViTForMaskedPatchPrediction, HFViTModel

__version__ = "0.1.0"

_ROOMS = {
    "HFViTBackbone": "modeling_hf_vit",
    "HFViTConfig": "configuration_hf_vit",
    "HFViTError": "errors",
    "HFViTForImageClassification": "modeling_hf_vit",
    "HFViTForMaskedPatchPrediction": "modeling_hf_vit",
    "HFViTModel": "modeling_hf_vit",
    "load_checkpoint": "checkpoints",
    "save_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'hf_vit' has no attribute '{name}'")
    globals()[name] = getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})


register_when_imported()

__all__ = [
    "HFViTBackbone",
    "HFViTConfig",
    "HFViTError",
    "HFViTForImageClassification",
    "HFViTForMaskedPatchPrediction",
    "HFViTModel",
    "__version__",
    "load_checkpoint",
    "save_checkpoint",
]
