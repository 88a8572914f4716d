"""What a run leaves, in its folder and on the Hub: weights that anybody can load, the card, its facts and figures.

For the Trainer. Every process has to call these; the main one writes.
"""

import time
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from hf_vit.errors import HFViTError
from hf_vit.hub.model_card import write_card

from ..reporting import attention_examples, progress
from ..reporting import facts as report
from . import checkpoint_io as disk
from .distributed import together


UNREADABLE_NAME = "unreadable.txt"  # the pictures that were skipped, of all processes, and why; never uploaded


def save_model(trainer, folder: Path) -> None:
    """Write weights (their average, if one is kept), config, code and processor; each file appears whole."""
    main = trainer.accelerator.is_main_process
    with trainer.averaged():
        weights = disk.weights_of(trainer.model, keep=main)
        with together():
            if main:
                with disk.written_aside(folder / ".finished") as aside:
                    disk.write_model(aside, trainer.model, weights, trainer.image_processor)
                disk.publish(folder / ".finished", folder)


def write_facts_and_card(trainer, entries: dict[str, Any]) -> dict[str, Any]:
    """Write facts.json, the figures and the card rendered from them; returns the facts."""
    names, folder = list(trainer.unreadable), trainer.output_dir
    unreadable = sorted(set(names if trainer.world_size == 1 else gather_object(names)))
    facts = report.run_facts(trainer, len(unreadable)) | entries
    with together():
        if trainer.accelerator.is_main_process:
            _draw_and_write(trainer, facts, folder)
            if unreadable:
                (folder / UNREADABLE_NAME).write_text("\n".join(unreadable) + "\n", encoding="utf-8")
    return facts


def _draw_and_write(trainer, facts: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if progress.draw_curve(trainer.state.log_history, folder / progress.CURVE_NAME):
        facts["figures"] = [progress.CURVE_NAME]
    with trainer.averaged():
        positions = folder / progress.POSITIONS_NAME
        if report.is_hf_vit(trainer.model) and progress.draw_positions(trainer.model, positions):
            facts.setdefault("figures", []).append(positions.name)
        attention_examples.add(trainer, facts)
    report.write_facts(folder, facts)
    write_card(folder)


def push_midway(trainer, checkpoint: Path | None) -> None:
    """Upload the run as it stands, whole: what anybody loads meanwhile is a model with its card.

    Args:
        checkpoint: folder that goes along, for whoever wants to train on.
    """
    trainer.seconds = time.time() - trainer.began
    trainer.save_model()
    measured = trainer.last_evaluation is not None and trainer.last_evaluation[0] == trainer.state.global_step
    trainer.create_model_card(**({} if measured else {"results": []}))
    try:
        trainer.push_to_hub(checkpoint, attempts=2)
    except HFViTError as error:  # the network is no reason to stop; the end of the run uploads again
        trainer.display.say(f"not uploaded: {error}")
