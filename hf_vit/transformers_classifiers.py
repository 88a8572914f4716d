"""Image classifiers of transformers other than plain ViTs: BiT, ResNet, EfficientNet, Swin, ConvNeXt and others.

All that `AutoModelForImageClassification` supports and `hf_vit.checkpoints` does not read as a ViT. The model keeps
its own class and format. Images are preprocessed as its own image processor does (`hf_vit/image_processing.py`). Code
in its repository is never run.

Tests: tests/training/test_other_classifiers.py.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import cached_file, is_timm_available, logging

from .checkpoints.formats.timm_architectures import entry_point_of, is_plain
from .checkpoints.license import License, read_license
from .checkpoints.load import FORMATS_READ
from .errors import HFViTError
from .image_processing import FILES, GOOGLE, ImageProcessing, input_size, read_settings


WRAPPER = "TimmWrapperForImageClassification"
OURS = {"hf_vit", *(model_type for reader in FORMATS_READ for model_type in reader.MODEL_TYPES)}
# Errors of transformers for a folder that is damaged, incomplete or of another version.
LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError),
    *(StrictDataclassError, SafetensorError),
)


@dataclass
class OtherClassifier:
    """A classifier of transformers with its own class.

    Attributes:
        model: float32, in eval mode. image_processing: of its images, at `image_size`.
        image_size: (height, width) of its input. license: of its model card, or None.
        notes: remarks for the user.
    """

    model: PreTrainedModel
    image_processing: ImageProcessing
    image_size: tuple[int, int]
    license: License | None
    notes: list[str]

    @property
    def processor(self) -> dict[str, Any]:
        """Settings of an equivalent `ViTImageProcessor`."""
        return self.image_processing.to_transformers(num_channels(self.model.config))


def num_channels(config: PreTrainedConfig) -> int:
    """Input channels of a model, by default 3."""
    return getattr(config, "num_channels", 3)


def other_classifier_class(name: str) -> str | None:
    """Name of transformers' class for a folder or Hub model that hf_vit does not read as a plain ViT.

    None for plain ViTs, for weights without a config.json, and if transformers has no such classifier.
    """
    if Path(name).is_file():
        return None
    try:
        config = _config_json(name)
    except HFViTError:  # not JSON, no such model, no network: the error comes when the checkpoint is read
        return None
    architecture, model_type = entry_point_of(config), config.get("model_type")
    if architecture is not None and not is_plain(architecture):
        model_type = "timm_wrapper"
    elif model_type is None or model_type in OURS:
        return None
    names: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    return names[0] if isinstance(names, tuple) else names


def load_other_classifier(
    name: str,
    labels: Mapping[int, str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    problem_type: str = "single_label_classification",
) -> OtherClassifier:
    """Load a classifier of transformers with its own class.

    Args:
        name: folder or Hub id.
        labels: names of the classes by number. If they are not the model's own, it gets a new head, initialized by its
            class. None: the head stays.
        image_size: pixels or (height, width); default: that of its image processor.
        problem_type: of the labels, in transformers' words; a head for another problem type is replaced.

    Raises:
        HFViTError: it cannot be loaded, lacks weights, has an unsupported image processor, or does not accept images
            of that size.
    """
    if (architecture := entry_point_of(_config_json(name))) is not None and not is_timm_available():
        raise HFViTError(
            f"{name}: this is timm's {architecture}, not a plain ViT; its class in transformers, {WRAPPER}, "
            "needs timm (pip install timm)"
        )
    notes = []
    processing = _image_processing(name)
    if processing is None:
        processing = GOOGLE
        notes.append(f"{name} comes without an image processor: mean and std 0.5 are taken for every channel")
    model, unexpected = _load(name, labels, problem_type)
    if unexpected:
        notes.append(f"{name}: {len(unexpected)} tensors are no part of {type(model).__name__} ({unexpected[0]}, ...)")
    size = input_size(model.config, processing) if image_size is None else _pair(image_size)
    processing = processing.at_size(size)
    _check_image_size(model, size)
    card = _file_of(name, "README.md")
    license = None if card is None else read_license(card.parent)
    if license is not None and license.is_non_commercial():
        notes.append(f"the license of these weights ({license.name or license.id}) is non-commercial")
    return OtherClassifier(model, processing, size, license, notes)


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the classifier's parameters: those whose shape depends on the number of classes."""
    shapes = []  # of two models that differ only in that number
    for labels in (2, 3):
        config = copy.deepcopy(model.config)
        config.num_labels = labels
        with torch.device("meta"):
            other = type(model)._from_config(config)
        shapes.append({name: parameter.shape for name, parameter in other.named_parameters()})
    return [name for name, shape in shapes[0].items() if shape != shapes[1].get(name)]


def freeze_backbone(model: PreTrainedModel) -> None:
    """Freeze all parameters except the classifier's."""
    head = set(head_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)


def classifier_features(model: PreTrainedModel, pixel_values: torch.Tensor, **options: Any) -> torch.Tensor:
    """Input of the classifier's last linear layer, float32 (B, D).

    Args:
        pixel_values: normalized images (B, C, H, W). options: of the model's forward.

    Raises:
        HFViTError: the model has no linear classifier.
    """
    classes = model.config.num_labels
    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes]
    if not heads:
        raise HFViTError(f"{type(model).__name__} has no linear classifier of {classes} outputs whose input to take")
    inputs: list[torch.Tensor] = []
    hook = heads[-1].register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    try:
        model(pixel_values, **options)
    finally:
        hook.remove()
    return inputs[-1].flatten(1).float()


# -- loading ----------------------------------------------------------------------------------------------------------


def _load(name: str, labels: Mapping[int, str] | None, problem_type: str) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of tensors that are not part of it."""
    try:
        with _without_reports():
            model, info = AutoModelForImageClassification.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
            head = head_names(model)
            if missing := sorted(set(info["missing_keys"]) - set(head)):
                raise HFViTError(
                    f"{name}: {len(missing)} tensors of {type(model).__name__} are missing ({missing[0]})"
                )
            names = model.config.id2label or {}
            label_names = [names.get(number) for number in range(len(names))]
            same_problem = (model.config.problem_type or "single_label_classification") == problem_type
            headless = bool(set(info["missing_keys"]) & set(head))
            if headless and labels is None:
                raise HFViTError(f"{name} has no classifier: fine-tune it on images with labels first")
            if labels is not None and (headless or label_names != list(labels.values()) or not same_problem):
                model = _with_new_head(model, head, labels)
    except LOADING_ERRORS as error:
        if isinstance(error, HFViTError):
            raise
        raise HFViTError(f"cannot load --model {name} with transformers: {_first_line(error)}") from error
    return model.eval(), sorted(info["unexpected_keys"])


@contextmanager
def _without_reports() -> Iterator[None]:
    """Silence transformers' table of missing, unexpected and newly initialized weights."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _with_new_head(model: PreTrainedModel, head: list[str], labels: Mapping[int, str]) -> PreTrainedModel:
    """The same model with a new head, which transformers initializes as its class does."""
    config = copy.deepcopy(model.config)
    config.id2label, config.label2id = dict(labels), {name: number for number, name in labels.items()}
    config.num_labels = len(labels)
    if hasattr(config, "label_names"):  # of the wrapper of timm
        config.label_names = list(labels.values())
    weights = {name: value for name, value in model.state_dict().items() if name not in head}
    return type(model).from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)


@torch.no_grad()
def _check_image_size(model: PreTrainedModel, size: tuple[int, int]) -> None:
    """Classify one blank image.

    Raises:
        HFViTError: the model does not accept images of that size, or is not a classifier of pixels.
    """
    class_name, shape = type(model).__name__, (1, num_channels(model.config), *size)
    try:
        logits = model(torch.zeros(shape)).logits
    except Exception as error:  # its layers raise many kinds for shapes that do not match
        raise HFViTError(
            f"{class_name} does not read images of {size[0]} x {size[1]} px ({_first_line(error)}): give another "
            "--image_size; positions are fitted to other sizes in hf_vit's ViTs only"
        ) from error
    if logits.shape != (1, model.config.num_labels):
        raise HFViTError(f"{class_name} gives {list(logits.shape)} numbers for one image, not one for each class")


def _image_processing(name: str) -> ImageProcessing | None:
    """From the files of a folder or Hub model; None if it has none."""
    files = {file: path for file in FILES if (path := _file_of(name, file)) is not None}
    return ImageProcessing.from_files({file: read_settings(path) for file, path in files.items()}, name)


def _config_json(name: str) -> dict[str, Any]:
    path = _file_of(name, "config.json")
    return {} if path is None else read_settings(path)


def _file_of(name: str, file: str) -> Path | None:
    """A file of a folder or Hub model; None if it has none, or if it is not in the cache in offline mode.

    Raises:
        HFViTError: the Hub cannot be reached.
    """
    if Path(name).exists():
        return Path(name) / file if (Path(name) / file).is_file() else None
    try:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        if is_offline_mode():
            return None
        raise HFViTError(f"{name}: {file} could not be downloaded from the Hub: {_first_line(error)}") from error
    return None if path is None else Path(path)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
