"""What a trained model looks at in some evaluation pictures, as one figure for its card (`--card_examples N`).

For the Trainer. A card is as public as its model, so pictures are shown only when asked for. They are not picked by
what they show: the first one of each class, in the order of classes and data, then the second ones. Unreadable ones
are left out.
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
from hf_vit.errors import HFViTError
from hf_vit.interpretability.attention import plain
from hf_vit.interpretability.plots import draw_examples, on_picture, overlay, save, view_of
from hf_vit.interpretability.relevance import explain

from ..data.dataset import ImageDataset, collate


EXAMPLES_NAME = "attention_examples.png"
SIDE = 320  # pixels of a picture's longer side, enough for a card: originals stay where they are


def check(count: int, model: PreTrainedModel, dataset: Any, processor: Any) -> None:
    """Raise HFViTError, before training, where examples were asked for that could not be drawn."""
    if not count:
        return
    plain(model)
    if not isinstance(dataset, ImageDataset) or processor is None:
        raise HFViTError(
            "--card_examples shows original pictures: it needs an image_processor and an eval_dataset that "
            "training.data.open_dataset opened; set it to 0"
        )


def add(trainer: Any, facts: dict[str, Any]) -> None:
    """Draw what `card_examples` asks for into the output folder, and name the figure, with a caption, in the facts.

    No figure where none is asked for, weights are spread over processes, or no picture is readable.
    """
    count, path = trainer.args.card_examples, trainer.output_dir / EXAMPLES_NAME
    if count and not any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()):
        shown = _readable(trainer.eval_dataset, count)
        if shown:
            facts["captions"] = {EXAMPLES_NAME: draw(trainer, shown, path)}
            facts["figures"] = [*facts.get("figures", []), EXAMPLES_NAME]


def draw(trainer: Any, shown: list[int], path: Path) -> str:
    """Draw evaluation pictures with rollout, and relevance for the predicted class; returns the figure's caption."""
    model, dataset = trainer.model, trainer.eval_dataset
    pixels = trainer.normalise(collate([dataset[index] for index in shown])["pixel_values"].to(model.device))
    names = [dataset.label_names[dataset.labels[index]] for index in shown]
    methods = ["rollout"]
    if isinstance(model, HFViTForImageClassification):
        methods.append("relevance")
        names = [_title(name, dataset.label_names[guess]) for name, guess in zip(names, _predicted(model, pixels))]
    maps = [explain(model, pixels, method).cpu().numpy() for method in methods]
    columns = []
    for place, index in enumerate(shown):
        picture = _sized(dataset.read(index)[0])
        view = view_of(trainer.image_processor.to_dict(), picture.shape[:2])
        heats = [on_picture(heat[place], model.config.total_stride, view) for heat in maps]
        columns.append([picture, *(overlay(picture, heat) for heat in heats)])
    save(draw_examples(columns, names, ["picture", *methods]), path)
    return _caption(len(shown), dataset.split, methods)


def _spread(labels: np.ndarray) -> Iterator[int]:
    """All indices: the first picture of each class, then the second ones, and so on."""
    order = np.argsort(labels, kind="stable")
    _, starts = np.unique(labels[order], return_index=True)
    rank = np.arange(len(labels)) - np.repeat(starts, np.diff([*starts, len(labels)]))
    yield from order[np.lexsort((labels[order], rank))].tolist()


def _readable(dataset: ImageDataset, count: int) -> list[int]:
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


def _sized(picture: Image.Image) -> np.ndarray:
    """The picture, its longer side SIDE pixels: its proportions are the original's, not the model's input's."""
    factor = SIDE / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST))


def _caption(count: int, split: str, methods: list[str]) -> str:
    text = "what the pooled vector is made of (attention rollout)"
    if "relevance" in methods:
        text += ", and what speaks for the predicted class (relevance)"
    return f"The first pictures of each class in split {split}, {count} in all, not picked by hand: {text}."
