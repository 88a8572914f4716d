"""All that a run has to remember, and how it becomes that run again: what goes into `checkpoint-N` and comes out.

For the Trainer; the files themselves are checkpointing.py's. Order of pictures, dropout and mixing are functions of
(seed, position), so no generator's state is kept.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.trainer_callback import ExportableState, TrainerState

from hf_vit.errors import HFViTError

from ..config.arguments import OF_THE_LAUNCH
from ..data.dataset import ImageDataset
from ..data.streaming import ImageStream
from ..reporting.facts import architecture_of
from . import checkpoint_io as disk
from .distributed import together


# Arguments that change neither weights nor history.
WITHOUT_EFFECT = (*OF_THE_LAUNCH, "dataloader_num_workers", "dataloader_prefetch_factor", "disable_tqdm", "output_dir")


def save(trainer, folder: Path) -> None:
    """Write a checkpoint; every process has to call it, the main one writes."""
    main = trainer.accelerator.is_main_process
    weights = disk.weights_of(trainer.model, keep=main)
    tensors, rest = disk.optimizer_state(trainer.optimizer.optimizer, _names(trainer), keep=main)
    average = trainer.average
    averaged = (
        {n: disk.whole(v, main) for n, v in zip(average.names, average.average)} if average is not None else None
    )
    memory = _memory(trainer, rest)
    with together():
        if main:
            with disk.written_aside(folder) as aside:
                disk.write_model(aside, trainer.model, weights, trainer.image_processor)
                disk.write_tensors(aside / "optimizer.safetensors", tensors)
                if averaged is not None:
                    disk.write_tensors(aside / "ema.safetensors", averaged)
                trainer.state.save_to_json(str(aside / "trainer_state.json"))
                disk.write_json(aside / disk.RESUME_NAME, memory)


def refuse_different(trainer, folder: Path | None) -> None:
    """Raise HFViTError where processes, on machines without a common disk, found different checkpoints."""
    if trainer.world_size > 1:
        found = sorted(set(gather_object(["none" if folder is None else folder.name])))
        if len(found) > 1:
            raise HFViTError(
                f"the processes see different checkpoints ({', '.join(found)}): give an --output_dir on a disk "
                "that all machines share"
            )


def load(trainer, folder: Path) -> None:
    """Become the run that wrote `folder`.

    Raises:
        HFViTError: another architecture or other data; the message says what differs.
    """
    memory = disk.read_json(folder / disk.RESUME_NAME)
    for what, now in (
        ("architecture", architecture_of(trainer.model.config)),
        ("data", data_identity(trainer.train_dataset)),
    ):
        changed = disk.differences(memory[what], now)
        if changed:
            raise HFViTError(
                f"{folder} cannot be resumed, the {what} changed ({changed}): restore it, or begin anew in another "
                "--output_dir"
            )
    load_weights(trainer, folder)
    tensors = disk.read_tensors(folder / "optimizer.safetensors")
    disk.set_optimizer_state(trainer.optimizer.optimizer, _names(trainer), tensors, memory["optimizer"])
    trainer.lr_scheduler.load_state_dict(memory["scheduler"])
    if memory["scaler"] is not None and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(memory["scaler"])
    _recall(trainer, folder, memory)
    changed = disk.differences(memory["arguments"], _arguments(trainer))
    if changed:
        trainer.display.say(f"going on with other arguments than the checkpoint's: {changed}")


def load_weights(trainer, folder: Path) -> None:
    """The weights of a checkpoint, and their average."""
    disk.set_weights(trainer.model, disk.read_tensors(folder / "model.safetensors"), folder)
    average = trainer.average
    if average is not None:
        saved = disk.read_tensors(folder / "ema.safetensors") if (folder / "ema.safetensors").is_file() else {}
        if set(saved) != set(average.names):
            raise HFViTError(
                f"{folder} holds no average of these weights: resume with the --ema_decay it was trained with"
            )
        average.average = [disk.like(saved[name], p) for name, p in zip(average.names, average.weights)]


def data_identity(dataset) -> dict[str, Any]:
    """What a resumed run has to find again."""
    if not isinstance(dataset, ImageDataset | ImageStream):
        return {"images": len(dataset)}
    return {
        "name": dataset.name,
        "split": dataset.split,
        "images": len(dataset),
        "fingerprint": dataset.fingerprint,
        "label_names": dataset.label_names,
    }


def stateful(trainer) -> list[ExportableState]:
    """The callbacks that remember something, and the control flags."""
    return [c for c in [*trainer.callback_handler.callbacks, trainer.control] if isinstance(c, ExportableState)]


def _memory(trainer, optimizer: dict) -> dict[str, Any]:
    """resume.json: everything but tensors and transformers' state. Every process has to call it."""
    accelerator, watch = trainer.accelerator, trainer.watch
    unreadable = list(trainer.unreadable)
    trainer.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful(trainer)).stateful_callbacks
    return {
        "position": trainer.position,
        "global_batch_size": trainer.global_batch_size,
        "sums": accelerator.gather(trainer.meter.sums[None]).tolist(),
        "last_evaluation": trainer.last_evaluation,
        "clock": {"seconds": watch.seconds, "waiting": watch.waiting, "images": watch.images},
        "wall_seconds": time.time() - trainer.began,
        "data": data_identity(trainer.train_dataset),
        "architecture": architecture_of(trainer.model.config),
        "arguments": _arguments(trainer),
        "unreadable": unreadable if trainer.world_size == 1 else sorted(set(gather_object(unreadable))),
        "optimizer": optimizer,
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
    }


def _recall(trainer, folder: Path, memory: dict[str, Any]) -> None:
    """Undo `_memory`."""
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    if state.global_step > trainer.max_steps:
        raise HFViTError(
            f"{folder} is what {state.global_step} updates made, this run has {trainer.max_steps}: raise --max_steps "
            "or --num_train_epochs, or begin anew in another --output_dir"
        )
    state.is_local_process_zero = trainer.accelerator.is_local_main_process
    state.is_world_process_zero = trainer.accelerator.is_main_process
    if state.best_model_checkpoint is not None:  # the folder may have moved, or the run goes on in another
        kept = Path(state.best_model_checkpoint)
        places = (trainer.output_dir / kept.name, folder.parent / kept.name, kept)
        state.best_model_checkpoint = str(next((place for place in places if place.is_dir()), places[0]))
    trainer.state, trainer.position = state, memory["position"]
    rows = torch.tensor(memory["sums"], dtype=trainer.meter.sums.dtype, device=trainer.accelerator.device)
    if len(rows) == trainer.world_size:
        trainer.meter.sums.copy_(rows[trainer.rank])
    else:  # another number of processes: the first one carries what all had
        trainer.meter.sums.copy_(rows.sum(0) if trainer.rank == 0 else torch.zeros_like(rows[0]))
    last = memory["last_evaluation"]
    trainer.last_evaluation = None if last is None else tuple(last)
    trainer.watch.recall(**memory["clock"])
    trainer.began -= memory["wall_seconds"]
    trainer.unreadable = dict.fromkeys(memory["unreadable"]) if trainer.rank == 0 else {}
    _recall_callbacks(trainer, state.stateful_callbacks)
    trainer.control.should_training_stop = False


def _recall_callbacks(trainer, saved: dict[str, Any]) -> None:
    """Give each callback what it remembered; several of one class in their order."""
    waiting = {name: list(entry) if isinstance(entry, list) else [entry] for name, entry in saved.items()}
    for callback in stateful(trainer):
        entries = waiting.get(type(callback).__name__)
        if entries:
            entry = entries.pop(0)
            for name, value in {**entry["args"], **entry["attributes"]}.items():
                setattr(callback, name, value)


def _arguments(trainer) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(trainer.args).items() if name not in WITHOUT_EFFECT}


def _names(trainer) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in trainer.model.named_parameters()}
