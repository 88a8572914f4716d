"""The network of a run, loaded or initialized for the labels and the image size of its data.

Tests: tests/training/test_finetune.py, tests/training/test_recipes.py.
"""

import difflib
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.checkpoints import Loaded, UnusableHeadError, read_checkpoint
from hf_vit.errors import HFViTError
from hf_vit.hub.access import check_hub_access
from hf_vit.image_io import check_channels
from hf_vit.image_processing import ImageProcessing
from hf_vit.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, problem_type_of
from hf_vit.transformers_classifiers import (
    freeze_backbone,
    load_other_classifier,
    num_channels,
    other_classifier_class,
)

from .config.arguments import MASKED_PATCHES, Arguments, DataArguments
from .config.vit_only import check_vit_only
from .data.dataset import ImageDataset
from .data.shards.streaming import ImageStream
from .data.splits import ModelInput, image_processing_for
from .data.tables.targets import target_scale
from .engine.masked_patch_prediction import masked_model
from .reporting.facts import public_name


MAX_LAYERS, MAX_WIDTH = 1_000, 1_000_000  # a larger network would exhaust the memory while it is built


def build_model(arguments: Arguments, label_names: list[str], log=print, problem_type: str = SINGLE_LABEL):
    """Load or initialize the model for these labels and the requested image size.

    Args:
        label_names: of the classes, labels or numbers. log: called with lines for the user.
        problem_type: of the data; a head for another one is replaced.

    Returns:
        (model, image processor, name of the base model or None).

    Raises:
        HFViTError: no model or two are named; a field or value of the configuration that does not exist.
    """
    requested, data = arguments.model, arguments.data
    transformers.set_seed(arguments.train.seed)
    masked = arguments.train.loss == MASKED_PATCHES
    base = None
    labels = {} if masked else dict(enumerate(label_names))
    if requested.model is not None and requested.preset is not None:
        raise HFViTError("give --model (pre-trained) or --preset (from scratch), not both")
    if requested.model is None and requested.preset is None and not requested.set:
        raise HFViTError(
            "which model? Give --model PATH_OR_HUB_ID, or --preset NAME / --set field=value to train from scratch"
        )
    if requested.model is not None and (other := other_classifier_class(requested.model)):
        check_vit_only(arguments, other)
        return build_other_classifier(arguments, labels, log, problem_type)
    check_config_fields(requested.set)
    try:
        if requested.model is not None:
            model, base = load_pretrained(requested, labels, problem_type)
            model = masked_model(model) if masked else model
        else:
            config = scratch_config(requested, labels)
            model = masked_model(config) if masked else HFViTForImageClassification(config)
    except HFViTError:
        raise
    except KeyError as error:  # a name that transformers looks up in a table, such as hidden_act
        chosen = next((f"{name}={value}" for name, value in requested.set.items() if value == error.args[0]), error)
        raise HFViTError(f"--set {chosen}: there is no such value; see HFViTConfig") from None
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise HFViTError(" ".join(str(error).split())) from None
    if min(model.config.grid_size) < 1:
        (height, width), (down, across) = model.config.image_size_hw, model.config.total_stride
        raise HFViTError(
            f"an image of {height} x {width} px is smaller than one patch of {down} x {across} px: raise --image_size"
        )
    if requested.freeze_backbone:
        model.freeze_backbone()
    name = requested.model and public_name(requested.model)
    return model, image_processor_for(model.config, data, base), name


def build_other_classifier(arguments: Arguments, labels: dict[int, str], log, problem_type: str):
    """As `build_model`, for a classifier of transformers that is not a plain ViT; it keeps its own class."""
    requested = arguments.model
    size = None if requested.image_size is None else pixels(requested.image_size)
    size = tuple(size) if isinstance(size, list) else size
    loaded = load_other_classifier(requested.model, labels, size, problem_type)
    model: Any = loaded.model
    for note in loaded.notes:
        log(f"note: {note}")
    if arguments.train.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise HFViTError(f"--activation_checkpointing: {type(model).__name__} does not support it; leave it out")
    if requested.freeze_backbone:
        freeze_backbone(model)
    model.source_license = loaded.license.metadata() if loaded.license is not None else None
    view = ModelInput(loaded.image_size, num_channels(model.config))
    return model, image_processor_for(view, arguments.data, loaded.image_processing), public_name(requested.model)


def set_problem(model: transformers.PreTrainedModel, train: ImageDataset | ImageStream, chosen: str | None) -> None:
    """Set `config.problem_type`, and for a regression the mean and standard deviation of the training targets.

    A head that is kept, because it is for the same numbers, keeps its mean and standard deviation. Thresholds of
    labels are reset.

    Raises:
        HFViTError: a regression with a model that cannot scale its outputs to the unit of the targets.
    """
    config: Any = model.config
    problem = train.problem_type if isinstance(train, ImageDataset) else SINGLE_LABEL
    before = problem_type_of(config)
    # A single label that nobody chose stays unspecified, as in configurations before this field was used.
    config.problem_type = problem if problem != SINGLE_LABEL or (chosen and config.num_labels > 1) else None
    if problem == MULTI_LABEL or getattr(config, "label_thresholds", None) is not None:
        config.label_thresholds = None
    if not isinstance(config, HFViTConfig):
        if problem == REGRESSION:
            raise HFViTError(
                f"{type(model).__name__} has no place for the mean and standard deviation of a regression's numbers: "
                "start from a ViT that hf_vit reads"
            )
    elif problem == REGRESSION and (before != REGRESSION or config.target_std is None):
        config.target_mean, config.target_std = target_scale(train)
    elif problem != REGRESSION:
        config.target_mean = config.target_std = None


def check_config_fields(fields: dict[str, Any]) -> None:
    """Raise HFViTError for unknown fields of HFViTConfig, and for a network that no machine can hold."""
    known = HFViTConfig().to_dict()
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise HFViTError(
                f"--set {name}: HFViTConfig has no such field" + (f"; did you mean {near[0]}?" if near else "")
            )
        most = MAX_LAYERS if name == "num_hidden_layers" else MAX_WIDTH
        if any(
            isinstance(number, int) and number > most for number in (value if isinstance(value, list) else [value])
        ):
            raise HFViTError(f"--set {name}={value}: give at most {most:,}")


def scratch_config(requested, labels: dict[int, str]) -> HFViTConfig:
    fields = dict(requested.set)
    if requested.image_size is not None:
        fields["image_size"] = pixels(requested.image_size)
    fields |= {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    config = (
        HFViTConfig.from_preset(requested.preset, **fields) if requested.preset is not None else HFViTConfig(**fields)
    )
    if (
        "hidden_size" in fields
        and "intermediate_size" not in fields
        and config.intermediate_size != 4 * config.hidden_size
    ):
        warnings.warn(
            f"--set hidden_size={config.hidden_size} leaves the MLP at intermediate_size={config.intermediate_size}; "
            f"four times the width, as usual, is --set intermediate_size={4 * config.hidden_size}",
            stacklevel=2,
        )
    return config


def load_pretrained(
    requested, labels: dict[int, str], problem: str
) -> tuple[HFViTForImageClassification, ImageProcessing]:
    """The pre-trained model at the requested size, with a new head unless its labels are those of the data.

    Returns:
        (model, its image processing).
    """
    fields = dict(requested.set)
    if requested.image_size is not None:
        fields["image_size"] = pixels(requested.image_size)
    if not Path(requested.model).exists():
        check_hub_access(requested.model)
    try:
        loaded = read_checkpoint(requested.model, dtype=torch.float32, **fields)
    except UnusableHeadError:  # no linear head: it is replaced
        loaded = read_checkpoint(requested.model, dtype=torch.float32, id2label=labels, **fields)
        return with_license(loaded), loaded.image_processing
    model = with_license(loaded)
    label_names = model.config.id2label if model.config.num_labels else {}
    same_labels = [label_names.get(index) for index in range(len(label_names))] == list(labels.values())
    if not same_labels or problem_type_of(model.config) != problem:
        for name, value in loaded.new_head.items():
            if name not in requested.set:
                setattr(model.config, name, value)
        model.replace_head(len(labels), labels, keep_representation=requested.keep_representation)
    return model, ImageProcessing.from_transformers(loaded.processor)


def with_license(loaded: Loaded) -> HFViTForImageClassification:
    """The model with its license, from its card, as attributes."""
    model: Any = loaded.model
    model.source_license = loaded.license.metadata() if loaded.license is not None else None
    model.non_commercial = loaded.license is not None and loaded.license.is_non_commercial()
    return model


def pixels(size: list[int]) -> int | list[int]:
    """`--image_size` as one number, or height and width."""
    if len(size) not in (1, 2) or min(size) < 1:
        raise HFViTError(f"--image_size {' '.join(map(str, size))}: give one number, or height and width")
    return size[0] if len(size) == 1 else list(size)


def image_processor_for(model, data: DataArguments, base: ImageProcessing | None) -> ViTImageProcessorPil:
    """transformers' ViT processor for this size with the settings of the base model, or Google's without one.

    Args:
        model: `ModelInput`, or the configuration of one of hf_vit's models.
    """
    check_channels(model.num_channels)
    return ViTImageProcessorPil(**image_processing_for(data, model, base).to_transformers(model.num_channels))
