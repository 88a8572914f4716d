"""Makes our classes known to transformers' Auto classes, at the moment when a program imports those.

Registering takes the Auto classes and ours, hence torch: seconds that a program may never need. So it waits, as an
import hook, for the modules that hold the Auto classes. Called by `hf_vit/__init__.py`.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType


def register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration_hf_vit import HFViTConfig

    AutoConfig.register(HFViTConfig.model_type, HFViTConfig)


def register_models() -> None:
    """Once both are there: the file of our classes may be the one that imports the Auto classes."""
    ours = sys.modules.get("hf_vit.modeling_hf_vit")
    if "transformers.models.auto.modeling_auto" not in sys.modules or (ours and "__all__" not in vars(ours)):
        return
    from transformers.models.auto import modeling_auto as auto

    from .configuration_hf_vit import HFViTConfig
    from .modeling_hf_vit import HFViTBackbone, HFViTForImageClassification, HFViTForMaskedPatchPrediction, HFViTModel

    auto.AutoModel.register(HFViTConfig, HFViTModel, exist_ok=True)
    auto.AutoModelForImageClassification.register(HFViTConfig, HFViTForImageClassification, exist_ok=True)
    auto.AutoModelForMaskedImageModeling.register(HFViTConfig, HFViTForMaskedPatchPrediction, exist_ok=True)
    auto.AutoBackbone.register(HFViTConfig, HFViTBackbone, exist_ok=True)


def register_image_processors() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.vit import ViTImageProcessorPil
    from transformers.utils import is_torchvision_available

    from .configuration_hf_vit import HFViTConfig

    processors: dict = {"pil": ViTImageProcessorPil}
    if is_torchvision_available():
        from transformers.models.vit import ViTImageProcessor

        processors["torchvision"] = ViTImageProcessor
    AutoImageProcessor.register(HFViTConfig, image_processor_classes=processors)


WAITING: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_config,
    "transformers.models.auto.modeling_auto": register_models,
    "hf_vit.modeling_hf_vit": register_models,
    "transformers.models.auto.image_processing_auto": register_image_processors,
}


class RegisteringLoader(SourceFileLoader):
    """Runs a module, then registers our classes with what it holds."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        WAITING[module.__name__]()


class RegisteringFinder(MetaPathFinder):
    """Finds those modules as Python does, and has them loaded by the loader above."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WAITING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = RegisteringLoader(fullname, spec.loader.path)
        return spec


def register_when_imported() -> None:
    """Register now where an Auto class is imported already, else when it is."""
    for name, register in WAITING.items():
        if name in sys.modules:
            register()
    sys.meta_path.insert(0, RegisteringFinder())
