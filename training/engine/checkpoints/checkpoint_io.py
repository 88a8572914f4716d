"""The files of a checkpoint: whole or not there, checked when read. Nothing that is read back can run code.

A folder `checkpoint-N` holds

    model.safetensors, config.json, ...     a folder that `from_pretrained` loads
    optimizer.safetensors, ema.safetensors  tensors by the name of their parameter
    trainer_state.json                      transformers' TrainerState: history, best metric, callbacks
    resume.json                             counters, schedule, and what data, model and arguments they belong to
    checksums.json                          CRC-32 of each file above that a resumed run reads

Not `accelerate.save_state`: it pickles, writes in place, and keeps generators that we compute from (seed, step).
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_vit.atomic_file import REPLACED, TEMPORARY, atomic_folder, atomic_path, atomic_write
from hf_vit.errors import HFViTError


RESUME_NAME, STATE_NAME, CHECKSUMS_NAME = "resume.json", "trainer_state.json", "checksums.json"
TENSORS = {"model": "model.safetensors", "optimizer": "optimizer.safetensors", "ema": "ema.safetensors"}
PATTERN = re.compile(r"checkpoint-(\d+)")
DAMAGED = "damaged-"  # before the name of a checkpoint that could not be read and was set aside
NEWEST_INTACT = "intact"  # --resume_from_checkpoint intact
RESUME_ADVICE = (
    "earlier checkpoints are intact; free some space (or lower --save_total_limit) and start again with "
    "--resume_from_checkpoint true"
)
START_ADVICE = "free some space, or choose an --output_dir on another disk, and start again"
START_FILES = ("history.jsonl", "speed.jsonl", "config_resolved.yaml", "duplicates.json", "held_out.txt", ".lock")


class DamagedCheckpointError(HFViTError):
    """A checkpoint whose files are not those that were written."""


# -- one checkpoint ------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, state: dict[str, Any], write_model: Callable[[Path, dict], None]) -> None:
    """Write what `TrainingState.state_dict` returned, whole or not at all.

    Args:
        write_model: `write_model(folder, weights)`, which writes what `from_pretrained` reads.

    Raises:
        HFViTError: the disk is full.
    """
    with atomic_folder(folder, advice(folder.parent)) as temporary:
        write_model(temporary, state["model"])
        for part in ("optimizer", "ema"):
            if state[part] is not None:
                write_tensors(temporary / TENSORS[part], state[part])
        write_json(temporary / STATE_NAME, state["trainer_state"])
        write_json(temporary / RESUME_NAME, state["counters"])
        names = [name for name in (*TENSORS.values(), STATE_NAME, RESUME_NAME) if (temporary / name).is_file()]
        write_json(temporary / CHECKSUMS_NAME, {name: checksum(temporary / name) for name in names})


def read_training_checkpoint(folder: Path) -> dict[str, Any]:
    """Read a checkpoint into what `TrainingState.load_state_dict` takes.

    Raises:
        DamagedCheckpointError: a file is missing, cut short or changed; the message names it and the way out.
    """
    try:
        check_files(folder)
        tensors = {part: read_tensors(folder / name) for part, name in TENSORS.items() if (folder / name).is_file()}
        state = {"ema": None, **tensors, "trainer_state": read_json(folder / STATE_NAME)}
        state["counters"] = read_json(folder / RESUME_NAME)
        if not {"model", "optimizer"} <= set(state):
            raise HFViTError("model.safetensors or optimizer.safetensors is missing")
        if not isinstance(state["counters"], dict) or not isinstance(state["trainer_state"], dict):
            raise HFViTError(f"{RESUME_NAME} or {STATE_NAME} is not what was written")
        return state
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> DamagedCheckpointError:
    """The one line about a checkpoint that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DamagedCheckpointError(
        f"{folder} is damaged ({reason}): --resume_from_checkpoint {NEWEST_INTACT} sets it aside and goes on from "
        "the newest checkpoint that is whole"
    )


def check_files(folder: Path) -> None:
    """Raise HFViTError for a file that differs from what was written; checkpoints of version 0.1.0 have no sums."""
    if not (folder / CHECKSUMS_NAME).is_file():
        return
    for name, expected in read_json(folder / CHECKSUMS_NAME).items():
        if not (folder / name).is_file():
            raise HFViTError(f"{name} is missing")
        if checksum(folder / name) != expected:
            raise HFViTError(f"{name} has changed since it was written")


def checksum(path: Path) -> str:
    """CRC-32 of a file: against damage, not against forgery, and faster than the disk."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


# -- the checkpoints of a run --------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints, oldest first (by number, not by letters)."""
    if not output_dir.is_dir():
        return []
    numbered = [(int(m[1]), p) for p in output_dir.iterdir() if (m := PATTERN.fullmatch(p.name))]
    return [path for _, path in sorted(numbered) if (path / RESUME_NAME).is_file()]


def remove_old_checkpoints(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; the one at `keep` (the best) stays and does not count."""
    best = None if keep is None else Path(keep).name
    others = [path for path in checkpoints(output_dir) if path.name != best]
    for path in others[: max(0, len(others) - limit)] if limit is not None else []:
        removed = path.with_name(REPLACED + path.name)  # out of sight in one step: killed here, it leaves no half
        os.rename(path, removed)
        shutil.rmtree(removed)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run was writing; `.finished` is version 0.1.0's name for a model that was being placed."""
    for pattern in (f"{TEMPORARY}*", f"{REPLACED}*", ".finished"):
        for path in output_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def is_unused(output_dir: Path) -> bool:
    """Whether a run may start here: nothing there, or only what a start that failed has left."""
    if not output_dir.is_dir():
        return True
    return all(path.name in START_FILES or path.name.startswith(TEMPORARY) for path in output_dir.iterdir())


def find_checkpoint(output_dir: Path, requested: str | bool | None) -> Path | None:
    """The folder to resume from: None for a fresh start.

    Raises:
        HFViTError: a path that holds no complete checkpoint.
    """
    if not requested:
        return None
    if requested is True or requested == NEWEST_INTACT:
        complete = checkpoints(output_dir)
        return complete[-1] if complete else None
    path = Path(requested)
    if not (path / RESUME_NAME).is_file():
        raise HFViTError(
            f"{path} is not a complete checkpoint (no {RESUME_NAME}): give a folder checkpoint-N, true, or "
            f"{NEWEST_INTACT}"
        )
    newest = checkpoints(output_dir)[-1:]
    if path.resolve() in [other.resolve() for other in checkpoints(output_dir)] and newest[0].name != path.name:
        raise HFViTError(
            f"{newest[0]} is newer than {path} and would be taken for this run's: go on in another --output_dir, or "
            "remove what is newer"
        )
    return path


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is no longer taken for the newest; returns its new path."""
    target = folder.with_name(DAMAGED + folder.name)
    if target.exists():
        shutil.rmtree(target)
    os.rename(folder, target)
    return target


def advice(output_dir: Path) -> str:
    """The way out of a full disk: what is safe, and how the run goes on."""
    return RESUME_ADVICE if checkpoints(output_dir) else START_ADVICE


# -- files ---------------------------------------------------------------------------------------------------------


def move_checkpoint(source: Path, target: Path) -> None:
    """Move every file of `source` into `target`, the ones that make it loadable last."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda p: p.name == "config.json"):
        os.replace(path, target / path.name)
    source.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write JSON that reads back to the same numbers; the file appears whole."""
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, in no more memory than they have."""
    with atomic_path(path, advice(path.parent)) as temporary:
        save_file(tensors, str(temporary))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(str(path))


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """`name: 3 there, 4 here` for every entry that differs; empty if none does."""
    keys = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
    return "; ".join(f"{k}: {_short_value(then.get(k))} there, {_short_value(now.get(k))} here" for k in keys)


def _short_value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
