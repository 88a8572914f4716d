"""The outputs of a run: a model folder that anybody can load, facts, figures and the card.

For the Trainer; only the main process calls these. Every file appears whole.

Tests: tests/training/engine/test_trainer.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_vit.atomic_file import atomic_folder, atomic_write
from hf_vit.hub.model_card import write_card

from ...metrics.metric_state import Metrics
from ...reporting.facts import is_hf_vit, write_facts
from ...reporting.per_class import PER_CLASS_NAME, write_per_class
from .checkpoint_io import advice, move_checkpoint


FINISHED_NAME = ".finished"  # folder in which a model is written before its files are moved into place
PREDICTIONS_NAME = "predictions.npz"  # of the evaluation images, with --do_predict
UNREADABLE_NAME = "unreadable.txt"  # skipped images of all processes, with the reason; never uploaded


def write_model(
    folder: Path,
    weights: dict[str, torch.Tensor],
    model: PreTrainedModel,
    image_processor,
    to_resume: bool = False,
) -> None:
    """Write a folder for `from_pretrained`: weights, config, code, and the image processor if there is one.

    Args:
        to_resume: keep the weights' names in memory. transformers writes some classes (Swin) under the names of its
            earlier versions, and a resumed run reads the file directly.
    """
    model.save_pretrained(folder, state_dict=weights, **({"save_original_format": False} if to_resume else {}))
    if image_processor is not None:
        image_processor.save_pretrained(folder)


def place_model(folder: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor], image_processor) -> None:
    """Write the model among a run's other files, config.json last: only with it can the folder be loaded."""
    # Written completely next to the old files first, so that a kill leaves the one model or the other.
    with atomic_folder(folder / FINISHED_NAME, advice(folder)) as temporary:
        write_model(temporary, weights, model, image_processor)
    move_checkpoint(folder / FINISHED_NAME, folder)


def write_facts_and_card(
    folder: Path,
    facts: dict[str, Any],
    model: PreTrainedModel,
    history: list[dict[str, Any]],
    add_examples: Callable[[dict[str, Any]], None],
    unreadable: list[str],
) -> None:
    """Write facts.json, the figures, and the card rendered from them.

    Args:
        facts: figures are added to it. model: holds the weights that were evaluated. history: lines of the log.
        add_examples: draws the requested attention maps, and names them in the facts.
        unreadable: names of skipped images.
    """
    from ...reporting import run_figures  # not above: it imports matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    if run_figures.draw_curve(history, folder / run_figures.CURVE_NAME):
        facts["figures"] = [run_figures.CURVE_NAME]
    positions = folder / run_figures.POSITIONS_NAME
    if is_hf_vit(model) and run_figures.draw_positions(model, positions):
        facts.setdefault("figures", []).append(positions.name)
    add_examples(facts)
    write_facts(folder, facts)
    write_card(folder)
    if unreadable:
        atomic_write(folder / UNREADABLE_NAME, "\n".join(unreadable) + "\n")


def write_classes(folder: Path, counts: Metrics, names: dict[int, str]) -> None:
    """Write per_class.csv, if each image has one class."""
    if counts.references is not None:
        write_per_class(folder / PER_CLASS_NAME, counts, [names[number] for number in range(counts.num_classes)])
