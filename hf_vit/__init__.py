"""hf_vit: the Hugging Face-compatible home of the Vision Transformer.

Importing it registers the classes with transformers' Auto classes, which takes torch and a few seconds: a folder of
ours then loads with `AutoModelForImageClassification.from_pretrained(folder)`, without `trust_remote_code`.
"""

from .torchvision_match import check_torchvision  # isort: skip


check_torchvision()  # first: a torchvision that does not match torch breaks the imports of transformers below

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
from .errors import HFViTError
from .image_io import open_image
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
    "open_image",
    "save_checkpoint",
]

AutoConfig.register(HFViTConfig.model_type, HFViTConfig)
AutoModel.register(HFViTConfig, HFViTModel)
AutoModelForImageClassification.register(HFViTConfig, HFViTForImageClassification)
AutoModelForMaskedImageModeling.register(HFViTConfig, HFViTForMaskedPatchPrediction)
AutoBackbone.register(HFViTConfig, HFViTBackbone)

_processors: dict = {"pil": ViTImageProcessorPil}
if is_torchvision_available():  # its processor cannot be imported without torchvision, which is not required
    from transformers.models.vit import ViTImageProcessor

    _processors["torchvision"] = ViTImageProcessor
AutoImageProcessor.register(HFViTConfig, image_processor_classes=_processors)
