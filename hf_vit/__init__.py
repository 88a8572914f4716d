"""hf_vit: the Hugging Face-compatible home of the Vision Transformer.

Importing it registers the classes with transformers' Auto classes: a folder of ours then loads without
`trust_remote_code`.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)
from transformers.models.vit import ViTImageProcessorPil
from transformers.utils import is_torchvision_available

from .checkpoints import load_checkpoint, save_checkpoint
from .configuration_hf_vit import HFViTConfig
from .errors import HFViTError
from .modeling_hf_vit import HFViTBackbone, HFViTForImageClassification, HFViTForMaskedPatchPrediction, HFViTModel


__version__ = "0.1.0"

AutoConfig.register(HFViTConfig.model_type, HFViTConfig)
AutoModel.register(HFViTConfig, HFViTModel)
AutoModelForImageClassification.register(HFViTConfig, HFViTForImageClassification)
AutoModelForMaskedImageModeling.register(HFViTConfig, HFViTForMaskedPatchPrediction)
AutoBackbone.register(HFViTConfig, HFViTBackbone)
processors: dict = {"pil": ViTImageProcessorPil}
if is_torchvision_available():
    from transformers.models.vit import ViTImageProcessor

    processors["torchvision"] = ViTImageProcessor
AutoImageProcessor.register(HFViTConfig, image_processor_classes=processors)

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
