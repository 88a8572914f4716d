"""The files of a checkpoint: complete or absent, verified when read, and without pickles, which could run code.

A folder `checkpoint-N` holds

    model.safetensors, config.json, ...     a folder that `from_pretrained` loads
    optimizer.safetensors, ema.safetensors  tensors by parameter name
    trainer_state.json                      transformers' TrainerState: history, best metric, callbacks
    resume.json                             counters, schedule, and the identity of data, model and arguments
    checksums.json                          CRC-32 of each file above that a resumed run reads

Not `accelerate.save_state`: it pickles, writes in place, and saves generators that we compute from (seed, step).
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
DAMAGED = "damaged-"  # prefix of a checkpoint that could not be read and was set aside
NEWEST_INTACT = "intact"  # --resume_from_checkpoint intact
RESUME_ADVICE = (
    "earlier checkpoints are intact; free some space (or lower --save_total_limit) and start again with "
    "--resume_from_checkpoint true"
)
START_ADVICE = "free some space, or choose an --output_dir on another disk, and start again"
START_FILES = ("history.jsonl", "speed.jsonl", "config_resolved.yaml", "duplicates.json", "held_out.txt", ".lock")


class DamagedCheckpointError(HFViTError):
    """A file of a checkpoint is missing, or differs from what was written."""


# -- one checkpoint ------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, state: dict[str, Any], write_model: Callable[[Path, dict], None]) -> None:
    """Write what `TrainingState.state_dict` returned, completely or not at all.

    Args:
        write_model: `write_model(folder, weights)`, writes the files for `from_pretrained`.

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
    """The error for a checkpoint that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DamagedCheckpointError(
        f"{folder} is damaged ({reason}): --resume_from_checkpoint {NEWEST_INTACT} sets it aside and goes on from "
        "the newest checkpoint that is whole"
    )


def check_files(folder: Path) -> None:
    """Raise HFViTError for a file that differs from what was written."""
    # checkpoints of version 0.1.0 have no checksums
    if not (folder / CHECKSUMS_NAME).is_file():
        return
    for name, expected in read_json(folder / CHECKSUMS_NAME).items():
        if not (folder / name).is_file():
            raise HFViTError(f"{name} is missing")
        if checksum(folder / name) != expected:
            raise HFViTError(f"{name} has changed since it was written")


def checksum(path: Path) -> str:
    """CRC-32 of a file: detects damage, not forgery, and is faster than the disk."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


# -- the checkpoints of a run --------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints, by step."""
    if not output_dir.is_dir():
        return []
    numbered = [(int(m[1]), p) for p in output_dir.iterdir() if (m := PATTERN.fullmatch(p.name))]
    return [path for _, path in sorted(numbered) if (path / RESUME_NAME).is_file()]


def remove_old_checkpoints(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; `keep` (the best) stays and does not count."""
    best = None if keep is None else Path(keep).name
    others = [path for path in checkpoints(output_dir) if path.name != best]
    for path in others[: max(0, len(others) - limit)] if limit is not None else []:
        # Renamed first: a run that is killed while files are removed must not leave half a checkpoint.
        removed = path.with_name(REPLACED + path.name)
        os.rename(path, removed)
        shutil.rmtree(removed)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run was writing."""
    # `.finished` is version 0.1.0's name of a model that was being moved into place
    for pattern in (f"{TEMPORARY}*", f"{REPLACED}*", ".finished"):
        for path in output_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def is_unused(output_dir: Path) -> bool:
    """Whether a new run may use the folder: it is empty, or holds only files of a failed start."""
    if not output_dir.is_dir():
        return True
    return all(path.name in START_FILES or path.name.startswith(TEMPORARY) for path in output_dir.iterdir())


def find_checkpoint(output_dir: Path, requested: str | bool | None) -> Path | None:
    """The checkpoint to resume from; None for a fresh start.

    Args:
        requested: True or "intact" for the newest one, or a path.

    Raises:
        HFViTError: the path is no complete checkpoint, or not the newest of its run.
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
    """What to do about a full disk."""
    return RESUME_ADVICE if checkpoints(output_dir) else START_ADVICE


# -- files ---------------------------------------------------------------------------------------------------------


def move_checkpoint(source: Path, target: Path) -> None:
    """Move every file of `source` into `target`, config.json last: with it the folder can be loaded."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda p: p.name == "config.json"):
        os.replace(path, target / path.name)
    source.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write JSON; numbers read back exactly, and the file appears whole."""
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file, without a copy of the tensors in memory."""
    with atomic_path(path, advice(path.parent)) as temporary:
        save_file(tensors, str(temporary))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(str(path))


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """`name: 3 there, 4 here` for every entry that differs, separated by semicolons."""
    keys = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
    return "; ".join(f"{k}: {_short_value(then.get(k))} there, {_short_value(now.get(k))} here" for k in keys)


def _short_value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
