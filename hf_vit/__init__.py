"""hf_vit: the Hugging Face-compatible home of the Vision Transformer.

After importing it, transformers' Auto classes know our classes: a folder of ours loads without `trust_remote_code`.
Importing takes milliseconds: classes, and torch with them, are imported when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register, register_when_looked_for


if TYPE_CHECKING:
    from .checkpoints import load_checkpoint, save_checkpoint
    from .errors import HFViTError
    from .modeling.configuration_hf_vit import HFViTConfig
    from .modeling.modeling_hf_vit import (
        HFViTBackbone,
        HFViTForImageClassification,
        HFViTForMaskedPatchPrediction,
        HFViTModel,
    )


__version__ = "0.1.0"

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

ROOMS = {
    "HFViTBackbone": "modeling.modeling_hf_vit",
    "HFViTConfig": "modeling.configuration_hf_vit",
    "HFViTError": "errors",
    "HFViTForImageClassification": "modeling.modeling_hf_vit",
    "HFViTForMaskedPatchPrediction": "modeling.modeling_hf_vit",
    "HFViTModel": "modeling.modeling_hf_vit",
    "load_checkpoint": "checkpoints",
    "save_checkpoint": "checkpoints",
}


if not TYPE_CHECKING:  # a checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """A public name, or the room of one, when it is first used."""
        if name in ROOMS:
            register()
            return getattr(importlib.import_module(f".{ROOMS[name]}", __name__), name)
        if name in ROOMS.values():
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *ROOMS, *ROOMS.values()})


register_when_looked_for()
