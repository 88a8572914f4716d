"""Checkpoints that are whole or not there: written aside, flushed, renamed. Nothing that is read back can run code.

For the Trainer. A folder `checkpoint-N` holds

    model.safetensors, config.json, ...   a folder that `from_pretrained` loads
    optimizer.safetensors, ema.safetensors  tensors by the name of their parameter
    trainer_state.json                    transformers' TrainerState: history, best metric, callbacks
    resume.json                           position in the data, schedule, sums since the last log, what data and model
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from hf_vit.errors import HFViTError


RESUME_NAME = "resume.json"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PATTERN = re.compile(r"checkpoint-(\d+)")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Give a folder to write in; on success it takes `target`'s place in one step, on failure it disappears.

    Raises:
        HFViTError: the disk is full; what stood at `target` and beside it is untouched.
    """
    aside = target.with_name(f".writing-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        if target.exists():
            replaced = target.with_name(f".replaced-{target.name}")
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(target, replaced)
            os.rename(aside, target)
            shutil.rmtree(replaced)
        else:
            os.rename(aside, target)
    except (OSError, SafetensorError) as error:
        needed = sum(f.stat().st_size for f in aside.rglob("*") if f.is_file())
        shutil.rmtree(aside, ignore_errors=True)
        if _is_full(error):
            raise HFViTError(full_disk_message(target, needed)) from error
        raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def space_needed(target: Path) -> Iterator[None]:
    """Within it, a full disk is an HFViTError that says so."""
    try:
        yield
    except OSError as error:
        if _is_full(error):
            raise HFViTError(full_disk_message(target, 0)) from error
        raise


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return any(f"os error {code}" in str(error) for code in FULL_DISK)


def full_disk_message(target: Path, written: int) -> str:
    """One line: what did not fit, what is safe, what to do."""
    free = shutil.disk_usage(target.parent).free
    return (
        f"no space left for {target} ({written / 1e6:.1f} MB written, {free / 1e6:.1f} MB free): earlier checkpoints "
        "are intact; make room (or lower --save_total_limit) and start again with --resume_from_checkpoint true"
    )


def _flush(folder: Path) -> None:
    """Bring the folder's bytes to the disk, so that a rename never outlives its contents."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish(aside: Path, target: Path) -> None:
    """Move every file of `aside` into `target`, the ones that make it loadable last."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(aside.iterdir(), key=lambda p: p.name == "config.json"):
        os.replace(path, target / path.name)
    aside.rmdir()


def sweep(output_dir: Path) -> None:
    """Remove what a killed run was writing."""
    for path in [*output_dir.glob(".writing-*"), *output_dir.glob(".replaced-*"), *output_dir.glob(".finished")]:
        shutil.rmtree(path)


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints, oldest first (by number, not by letters)."""
    if not output_dir.is_dir():
        return []
    found = [(int(m[1]), p) for p in output_dir.iterdir() if (m := PATTERN.fullmatch(p.name))]
    return [path for _, path in sorted(found) if (path / RESUME_NAME).is_file()]


def rotate(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; the one at `keep` (the best) stays and does not count."""
    best = None if keep is None else Path(keep).name
    others = [path for path in checkpoints(output_dir) if path.name != best]
    for path in others[: max(0, len(others) - limit)] if limit is not None else []:
        gone = path.with_name(f".replaced-{path.name}")  # out of sight in one step: killed here, it leaves no half
        os.rename(path, gone)
        shutil.rmtree(gone)


def find_checkpoint(output_dir: Path, wish: str | bool | None) -> Path | None:
    """The folder to resume from: None for a fresh start.

    Raises:
        HFViTError: a path that holds no complete checkpoint.
    """
    if not wish:
        return None
    if wish is True:
        found = checkpoints(output_dir)
        return found[-1] if found else None
    path = Path(wish)
    if not (path / RESUME_NAME).is_file():
        raise HFViTError(
            f"{path} is not a complete checkpoint (no {RESUME_NAME}): give a folder checkpoint-N, or true"
        )
    newest = checkpoints(output_dir)[-1:]
    if path.resolve() in [other.resolve() for other in checkpoints(output_dir)] and newest[0].name != path.name:
        raise HFViTError(
            f"{newest[0]} is newer than {path} and would be taken for this run's: go on in another --output_dir, or "
            "remove what is newer"
        )
    return path


def whole(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor:
    """The full tensor on the CPU (not a copy, if it is there); collects a sharded one's pieces from all processes.

    Args:
        keep: False on processes that only take part in the collecting.
    """
    full = local(tensor.detach())
    return full.cpu().contiguous() if keep else full.new_empty(0)


def local(value: torch.Tensor) -> torch.Tensor:
    """The tensor itself, also where a sharded computation wrapped it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value` on the parameter's device, sharded as it is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def weights_of(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """Full weights by name, on the CPU. Every process has to call it."""
    return {name: whole(value, keep) for name, value in model.state_dict().items()}


def write_model(folder: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor], image_processor) -> None:
    """Write a folder that `from_pretrained` loads: these weights, config, code, and the processor if there is one."""
    model.save_pretrained(folder, state_dict=weights)
    if image_processor is not None:
        image_processor.save_pretrained(folder)


@torch.no_grad()
def set_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Copy full weights into the model, whatever its sharding.

    Raises:
        HFViTError: names or shapes differ.
    """
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(weights)) or [n for n in own if own[n].shape != weights[n].shape]
    if wrong:
        raise HFViTError(
            f"{source} is a checkpoint of another architecture: {wrong[0]} and {len(wrong) - 1} others differ"
        )
    for name, value in own.items():
        value.copy_(like(weights[name], value))


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict, keep: bool = True) -> tuple[dict, dict]:
    """The optimizer's tensors by `parameter name/slot`, and the rest as JSON. Every process has to call it."""
    tensors, numbers = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for slot, value in optimizer.state.get(parameter, {}).items():
                key = f"{names[parameter]}/{slot}"
                if isinstance(value, torch.Tensor):
                    tensors[key] = whole(value, keep)
                elif value is not None:
                    numbers[key] = value
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return tensors, {"numbers": numbers, "groups": groups}


def set_optimizer_state(optimizer, names: dict[torch.Tensor, str], tensors: dict, rest: dict[str, Any]) -> None:
    """Undo `optimizer_state`."""
    slots: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["numbers"]}.items():
        name, slot = key.rsplit("/", 1)
        slots.setdefault(name, {})[slot] = value
    for group, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
        for parameter in group["params"]:
            if names[parameter] in slots:
                optimizer.state[parameter] = {
                    slot: _slot_on_device(slot, value, parameter, group)
                    for slot, value in slots[names[parameter]].items()
                }


def _slot_on_device(slot: str, value: Any, parameter: torch.Tensor, group: dict) -> Any:
    """Step counters stay on the CPU unless the optimizer is fused or capturable, as in torch's own loading."""
    if not isinstance(value, torch.Tensor):
        return value
    if slot == "step" and not (group.get("fused") or group.get("capturable")):
        return value
    return like(value, parameter)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that reads back to the same numbers."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, each with its own memory."""
    save_file({name: value.clone() for name, value in tensors.items()}, str(path))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(str(path))


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """`name: 3 there, 4 here` for every entry that differs; empty if none does."""
    keys = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
    return "; ".join(f"{k}: {_short(then.get(k))} there, {_short(now.get(k))} here" for k in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
