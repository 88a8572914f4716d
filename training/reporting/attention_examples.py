"""Attention maps over some evaluation images, as one figure for the model card (`--card_examples N`).

For the Trainer. A card is as public as its model, so images are shown only on request. They are not selected by hand:
the first image of each class, in the order of classes and data, then the second ones. Unreadable images are left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_vit import HFViTForImageClassification
from hf_vit.atomic_file import atomic_path
from hf_vit.errors import HFViTError
from hf_vit.interpretability.attention import uncompiled
from hf_vit.interpretability.relevance import explain

from ..data.dataset import ImageDataset, collate
from ..data.normalize import Normalize


EXAMPLES_NAME = "attention_examples.png"
LONGER_SIDE = 320  # px; enough for a card, so that the original images are not published


def check_attention_examples(count: int, model: PreTrainedModel, dataset: Any, processor: Any) -> None:
    """Raise HFViTError before training if the requested examples could not be drawn."""
    if not count:
        return
    uncompiled(model)
    if not isinstance(dataset, ImageDataset) or processor is None:
        raise HFViTError(
            "--card_examples shows original images: it needs an image_processor and an eval_dataset that "
            "training.data.open_dataset opened; set it to 0"
        )


def add(
    facts: dict[str, Any],
    folder: Path,
    count: int,
    model: PreTrainedModel,
    dataset: ImageDataset,
    normalize: Normalize,
    processor: Any,
) -> None:
    """Draw `count` evaluation images into a folder, and add the figure with its caption to the facts.

    No figure if none is requested, the weights are sharded over processes, or no image is readable.
    """
    if count and not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        shown = readable_examples(dataset, count)
        if shown:
            caption = draw_attention_examples(folder / EXAMPLES_NAME, shown, model, dataset, normalize, processor)
            facts["captions"] = {EXAMPLES_NAME: caption}
            facts["figures"] = [*facts.get("figures", []), EXAMPLES_NAME]


def draw_attention_examples(
    path: Path,
    shown: list[int],
    model: PreTrainedModel,
    dataset: ImageDataset,
    normalize: Normalize,
    processor: Any,
) -> str:
    """Draw images with attention rollout and relevance for the predicted class; returns the caption."""
    # not above: it imports matplotlib, and --help need not wait for that
    from hf_vit.interpretability.plots import draw_examples, save

    names = [dataset.label_names[dataset.labels[index]] for index in shown]
    columns, guesses, methods = attention_columns(shown, model, dataset, normalize, processor)
    names = [_title(name, dataset.label_names[guess]) for name, guess in zip(names, guesses)] if guesses else names
    with atomic_path(path) as temporary:
        save(draw_examples(columns, names, ["image", *methods]), temporary)
    return _caption(len(shown), dataset.split, methods)


def attention_columns(
    shown: list[int], model: PreTrainedModel, dataset: ImageDataset, normalize: Normalize, processor: Any
) -> tuple[list[list[np.ndarray]], list[int], list[str]]:
    """Images of a data set with attention maps over them.

    Returns:
        for each image, the image and one map per method, uint8 (H, W, 3) in its proportions; the predicted classes,
        empty without a classifier; the methods.
    """
    from hf_vit.interpretability.plots import on_image, overlay, view_of

    pixels = normalize(collate([dataset[index] for index in shown])["pixel_values"].to(model.device))
    methods, guesses = ["rollout"], []
    if isinstance(model, HFViTForImageClassification):
        methods.append("relevance")
        guesses = _predicted(model, pixels)
    maps = [explain(model, pixels, method).cpu().numpy() for method in methods]
    columns = []
    for row, index in enumerate(shown):
        image = _sized(dataset.read(index)[0])
        view = view_of(processor.to_dict(), image.shape[:2])
        heats = [on_image(heat[row], model.config.total_stride, view) for heat in maps]
        columns.append([image, *(overlay(image, heat) for heat in heats)])
    return columns, guesses, methods


def _spread(labels: np.ndarray) -> Iterator[int]:
    """All indices: the first image of each class, then the second ones, and so on; in order without classes."""
    if labels.ndim > 1:
        yield from range(len(labels))
        return
    order = np.argsort(labels, kind="stable")
    _, starts = np.unique(labels[order], return_index=True)
    rank = np.arange(len(labels)) - np.repeat(starts, np.diff([*starts, len(labels)]))
    yield from order[np.lexsort((labels[order], rank))].tolist()


def readable_examples(dataset: ImageDataset, count: int) -> list[int]:
    shown: list[int] = []
    for index in _spread(dataset.labels):
        if len(shown) == count:
            break
        try:
            dataset.read(index)
        except HFViTError:
            continue
        shown.append(index)
    return shown


@torch.no_grad()
def _predicted(model: HFViTForImageClassification, pixels: torch.Tensor) -> list[int]:
    model.eval()
    return model(pixels).logits.argmax(dim=1).tolist()


def _title(label: str, guess: str) -> str:
    return label if guess == label else f"{label}, taken for {guess}"


def _sized(image: Image.Image) -> np.ndarray:
    """The image with LONGER_SIDE pixels on its longer side, in its original proportions."""
    factor = LONGER_SIDE / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST))


def _caption(count: int, split: str, methods: list[str]) -> str:
    text = "what the pooled vector is made of (attention rollout)"
    if "relevance" in methods:
        text += ", and what speaks for the predicted class (relevance)"
    return f"The first images of each class in split {split}, {count} in all, not picked by hand: {text}."
