"""Any image classifier behind one interface: ours, in any format, and transformers' (ViT, BiT, EfficientNet, ...).

For score_model.py and features.py. The model's own image processor says how images are prepared.
"""

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTForImageClassification
from hf_vit.checkpoints import read_checkpoint
from hf_vit.checkpoints.download import hub_file
from hf_vit.errors import HFViTError
from hf_vit.hub.access import check_hub_access
from hf_vit.image_processing import ImageProcessing, read_settings
from hf_vit.transformers_classifiers import classifier_features

from ..data.normalize import Normalize
from ..data.transforms import MIN_CROP_PCT, EvalTransform, ImageTransform, ProcessorTransform, evaluation_steps


@dataclass
class Classifier:
    """A classifier and the images it expects.

    Attributes:
        name: as requested. model: in evaluation mode, float32.
        transform: the processor's resize and crop. normalize: its mean and std, applied on the device.
    """

    name: str
    model: PreTrainedModel
    transform: ImageTransform
    normalize: Normalize

    def __post_init__(self):
        interpolates = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if interpolates else {}  # to accept other image sizes

    @property
    def label_names(self) -> list[str]:
        """Names of the outputs, in order; empty for a model without a head."""
        names = self.model.config.id2label or {}
        return [str(names.get(number, number)) for number in range(self.model.config.num_labels)]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Float32 (B, K) of normalized images (B, C, H, W)."""
        return self.model(pixel_values, **self._options).logits.float()

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Float32 (B, D): the input of the head, big_vision's `pre_logits`."""
        if isinstance(self.model, HFViTForImageClassification):
            return self.model.base_model(pixel_values).pooler_output.float()
        return classifier_features(self.model, pixel_values, **self._options)


def open_classifier(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    crop_pct: float | None = None,
    squash: bool = False,
    resample: str | None = None,
) -> Classifier:
    """Load a classifier and its preprocessing.

    Args:
        name: folder, checkpoint file or Hub id.
        image_size: in pixels, in place of the model's own; position embeddings are resized.
        crop_pct: resize the short side to size / crop_pct and crop the center, in place of the processor's steps.
        squash: resize to height and width, in place of the processor's steps.
        resample: filter of the resize, in place of the processor's.

    Raises:
        HFViTError: nothing found, or not an image classifier.
    """
    if squash and crop_pct is not None:
        raise HFViTError("give --squash or --crop_pct, not both")
    if crop_pct is not None and not MIN_CROP_PCT <= crop_pct <= 1.0:
        raise HFViTError(f"crop_pct must lie in [{MIN_CROP_PCT}, 1], got {crop_pct}")
    model, processor = load_with_processor(name, image_size)
    channels = getattr(model.config, "num_channels", 3)
    try:
        processing = ImageProcessing.from_transformers(processor.to_dict())
    except HFViTError as error:  # it does more than resize, crop and normalize: use its output as it is
        if image_size is not None or crop_pct is not None or squash or resample is not None:
            raise HFViTError(
                f"{name}: {error}; leave out --image_size, --crop_pct, --squash and --resample to use it unchanged"
            ) from error
        height, width = output_size(processor, channels)
        view: ImageTransform = ProcessorTransform((height, width), num_channels=channels, processor=processor)
        return Classifier(name, model.eval(), view, Normalize.of(None, channels))
    processing = processing if image_size is None else processing.at_size(image_size)
    if squash or crop_pct is not None:
        size = processing.output_size or EvalTransform.of(processing, model.config.image_size, channels).image_size_hw
        steps = evaluation_steps(size, crop_pct, processing.resample)
        processing = replace(processing, resize_to=steps.resize_to, crop_to=steps.crop_to)
    processing = processing if resample is None else replace(processing, resample=resample)
    view = EvalTransform.of(processing, getattr(model.config, "image_size", 224), channels)
    return Classifier(name, model.eval(), view, Normalize.of(processor, channels))


def output_size(processor: Any, channels: int) -> tuple[int, int]:
    """Height and width of an image processor's output."""
    gray = Image.new("L" if channels == 1 else "RGB", (64, 64))
    return tuple(processor(gray, return_tensors="np")["pixel_values"].shape[-2:])


def load_with_processor(name: str, image_size: int | tuple[int, int] | None) -> tuple[PreTrainedModel, Any]:
    """Model and image processor: by transformers' Auto classes if its config.json allows it, else as a checkpoint."""
    size = {} if image_size is None else {"image_size": image_size}
    path = Path(name)
    if not path.exists():
        check_hub_access(name)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return load_from_checkpoint(name, size)
    if path.is_dir() and "model_type" not in read_settings(path / "config.json"):  # timm's, also with timm installed
        try:
            return load_from_checkpoint(name, size)
        except HFViTError:
            pass  # not a plain ViT: transformers' wrapper of timm may know it
    try:
        model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError, TypeError, RecursionError) as error:
        try:  # layouts that transformers does not know, such as timm's
            return load_from_checkpoint(name, size)
        except HFViTError as other:
            code = "trust_remote_code" in str(error)  # transformers suggests to allow it, but nothing here does
            reason = "it needs code of its own repository, which is never run here" if code else first_line(error)
            raise HFViTError(
                f"cannot load --model {name}: no classifier of transformers ({reason}), no checkpoint that "
                f"hf_vit knows ({first_line(other)})"
            ) from None
    if size and isinstance(model, HFViTForImageClassification):
        model.resize_position_embeddings(image_size)
    return model, load_processor(name, model.config)


def load_processor(name: str, config: PreTrainedConfig) -> Any:
    """The model's own image processor; Google's settings for weights without one.

    Raises:
        HFViTError: the processor cannot be used. Other preprocessing would give a wrong score.
    """
    path = processor_file(name)
    if path is None:
        return ViTImageProcessorPil(**fallback(config))
    settings = read_settings(path)
    settings = settings.get("image_processor", settings)  # processor_config.json holds several
    auto_map = (settings.get("auto_map") or {}).get("AutoImageProcessor") or ()
    named = [entry for entry in ([auto_map] if isinstance(auto_map, str) else auto_map) if entry]
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        reason = own_code(named) if named else f"transformers cannot use this image processor ({first_line(error)})"
        raise HFViTError(f"{path}: {reason}") from error
    if named and bare(type(processor).__name__) not in {bare(entry.rpartition(".")[2]) for entry in named}:
        raise HFViTError(f"{path}: {own_code(named)}")
    return processor


def processor_file(name: str) -> Path | None:
    """The image processor's file of a folder or Hub model; None if it has none.

    Raises:
        HFViTError: the Hub cannot be reached.
    """
    for file in ("processor_config.json", "preprocessor_config.json"):
        local = Path(name, file)
        path = hub_file(name, file) if not Path(name).exists() else local if local.is_file() else None
        if path is not None:
            return path
    return None


def own_code(named: list[str]) -> str:
    return (
        f"its images are prepared by code of its own ({', '.join(named)}), which is never run here; score a copy "
        "whose file names a processor of transformers, such as ViTImageProcessor, with the same settings"
    )


def bare(class_name: str) -> str:
    """The class name of an image processor without its backend."""
    return class_name.removesuffix("Pil").removesuffix("Fast")


def load_from_checkpoint(name: str, size: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Model and image processor of a checkpoint in any format that hf_vit reads."""
    loaded = read_checkpoint(name, **size)
    return loaded.model.float(), ViTImageProcessorPil(**loaded.processor)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fallback(config) -> dict[str, Any]:
    """Processor settings for a model without any: squash, mean and std 0.5."""
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    half = [0.5] * getattr(config, "num_channels", 3)
    bilinear = int(Image.Resampling.BILINEAR)
    return {"size": {"height": height, "width": width}, "image_mean": half, "image_std": half, "resample": bilinear}
