"""Importing it registers our classes with transformers' Auto classes. `registration.py` does, when it has to."""

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

from .modeling.configuration_hf_vit import HFViTConfig
from .modeling.modeling_hf_vit import (
    HFViTBackbone,
    HFViTForImageClassification,
    HFViTForMaskedPatchPrediction,
    HFViTModel,
)


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
