"""The outputs of a run: a model folder that anybody can load, facts, figures and the card.

For the Trainer. Every file appears whole.

Tests: tests/training/engine/test_trainer.py.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from hf_vit.atomic_file import atomic_folder, atomic_write, full_disk_is_an_error
from hf_vit.hub.model_card import write_card

from ...config.arguments import MASKED_PATCHES
from ...data.normalize import Normalize
from ...metrics.metric_state import Metrics
from ...reporting import attention_examples
from ...reporting.facts import RunRecord, is_hf_vit, run_facts, write_facts
from ...reporting.per_class import PER_CLASS_NAME, write_per_class
from ..distributed import all_ranks
from .checkpoint_io import advice, move_checkpoint
from .full_tensors import model_weights


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


def save_model(folder: Path, model: PreTrainedModel, image_processor) -> None:
    """Write the model into the folder of a run; every process has to call it, since sharded weights are gathered."""
    main = PartialState().is_main_process
    weights = model_weights(model, keep=main)
    with all_ranks():
        if main:
            place_model(folder, model, weights, image_processor)


def write_facts_and_card(
    folder: Path,
    run: RunRecord,
    entries: dict[str, Any],
    counts: Metrics | None,
    unreadable: list[str],
    normalize: Normalize,
    image_processor,
) -> dict[str, Any]:
    """Write facts.json, the figures, the card rendered from them, and per_class.csv; returns the facts.

    Every process has to call it; the main one writes.

    Args:
        run: its model holds the weights that were evaluated. entries: top-level facts to add or replace.
        counts: of the last evaluation, by class. unreadable: names of skipped images.
        normalize, image_processor: for the images of attention maps, if they are requested.
    """
    from ...reporting import run_figures  # not above: it imports matplotlib

    facts = run_facts(run) | entries
    with all_ranks(), full_disk_is_an_error(folder):
        if PartialState().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            if run_figures.draw_curve(run.trainer_state.log_history, folder / run_figures.CURVE_NAME):
                facts["figures"] = [run_figures.CURVE_NAME]
            positions = folder / run_figures.POSITIONS_NAME
            if is_hf_vit(run.model) and run_figures.draw_positions(run.model, positions):
                facts.setdefault("figures", []).append(positions.name)
            attention_examples.add(
                facts, folder, run.args.card_examples, run.model, run.eval_dataset, normalize, image_processor
            )
            write_facts(folder, facts)
            write_card(folder)
            if unreadable:
                atomic_write(folder / UNREADABLE_NAME, "\n".join(unreadable) + "\n")
            if counts is not None and counts.references is not None and run.args.loss != MASKED_PATCHES:
                names = [run.model.config.id2label[number] for number in range(counts.num_classes)]
                write_per_class(folder / PER_CLASS_NAME, counts, names)
    return facts
