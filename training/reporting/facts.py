"""The facts of a run, measured and nothing else: facts.json, from which model cards are rendered.

For the Trainer and the scripts. An entry whose value was not measured is absent.
"""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

import hf_vit
from hf_vit import HFViTConfig

from ..config.arguments import TrainArguments
from ..data.dataset import ImageDataset
from ..data.streaming import ImageStream
from ..engine.checkpoint_io import write_json
from ..engine.masked_patch_prediction import MASKED_PATCHES, colour_flops
from . import progress
from .flops import forward_flops, train_flops


FACTS_NAME = "facts.json"
BASE_FIELDS = set(transformers.PreTrainedConfig().to_dict()) | {"auto_map"}


def architecture_of(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """The fields that define the network: those that its class adds to transformers' own."""
    fields = {name: value for name, value in config.to_dict().items() if name not in BASE_FIELDS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(fields.items())}


def model_facts(model: torch.nn.Module, name: str, base_model: str | None) -> dict[str, Any]:
    config = model.config
    size = config.image_size
    return {
        "name": name,
        "model_type": config.model_type,
        "architecture": architecture_of(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "base_model": base_model,
        "image_size": [size, size] if isinstance(size, int) else list(size),
        "num_labels": config.num_labels,
    }


def environment_facts(accelerator: accelerate.Accelerator, precision: str) -> dict[str, Any]:
    """Hardware, versions and commit."""
    device = accelerator.device
    gpu = device.type == "cuda"
    return {
        "hardware": torch.cuda.get_device_name(device) if gpu else processor_name(),
        "device": str(device),
        **({} if gpu else {"cores": os.cpu_count(), "threads": torch.get_num_threads()}),
        "num_processes": accelerator.num_processes,
        "precision": precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "hf_vit": hf_vit.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def processor_name() -> str:
    """The CPU's model name, or its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the clone this file lies in, with a + if files differ from it; None outside of one."""
    here = Path(__file__).parent
    try:
        head, status, tracked = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10)
            for words in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
                ["ls-files", "--error-unmatch", __file__],
            )
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode or tracked.returncode:
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def public_name(name: str) -> str:
    """What facts call data or a base model: a Hub id as it is; of a path only its end, which has no slash."""
    return Path(name).resolve().name if Path(name).exists() else name


def result_rows(metrics: dict[str, float], dataset: str, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """One row for each score, as cards want them."""
    return [
        {
            "dataset": dataset,
            "split": split,
            "metric": name.removeprefix("eval_"),
            "value": value,
            "n": count,
            "seed": seed,
        }
        for name, value in metrics.items()
    ]


def run_facts(trainer, unreadable: int = 0) -> dict[str, Any]:
    """Everything measured about a run.

    Args:
        trainer: after `train`. unreadable: pictures left out, over all processes.
    """
    about, data, masked = trainer.about, trainer.train_dataset, trainer.args.loss == MASKED_PATCHES
    facts = {
        "model": model_facts(trainer.model, trainer.name, about.get("base_model")),
        "task": "masked-image-modeling" if masked else "image-classification",
        "data": {**about.get("data", {}), "train_images": len(data), "unreadable_images": unreadable},
        "training": training_facts(trainer),
        "compute": compute_facts(trainer),
        "results": [],
        "environment": environment_facts(trainer.accelerator, trainer.precision),
        "history": progress.HISTORY_NAME,
        "figures": [],
    }
    if isinstance(data, ImageDataset | ImageStream):
        facts["data"] |= {"name": public_name(data.name), "train_split": data.split, "label_names": data.label_names}
        facts["data"]["fingerprint"] = data.fingerprint
    if trainer.last_evaluation is not None:
        _, metrics, count = trainer.last_evaluation
        held_out = trainer.eval_dataset
        where, split = (
            (public_name(held_out.name), held_out.split)
            if isinstance(held_out, ImageDataset)
            else ("evaluation", "evaluation")
        )
        facts["data"] |= {"eval_split": split, "eval_images": len(held_out)}
        facts["results"] = result_rows(metrics, where, split, count, trainer.args.seed)
        for row in facts["results"] if masked else []:  # not the accuracy of a classifier
            row["metric"] = f"masked_patch_{row['metric']}"
    return facts


def training_facts(trainer) -> dict[str, Any]:
    """How it went: updates, epochs, seconds, loss."""
    about, watch, state = trainer.about, trainer.watch, trainer.state
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    facts = {
        **{name: about[name] for name in ("stage", "recipe", "arguments", "augmentation", "sweep") if name in about},
        "seed": trainer.args.seed,
        "steps": state.global_step,
        "epochs": trainer.position / len(trainer.train_dataset),
        "global_batch_size": trainer.global_batch_size,
        "seconds": trainer.seconds,
        "images_per_second": watch.images / max(watch.seconds, 1e-9),
        "data_wait": watch.waiting / max(watch.seconds, 1e-9),
    }
    if losses:
        facts["final_loss"] = losses[-1]
    if trainer.args.load_best_model_at_end:
        facts["best_step"] = state.best_global_step
    return facts


def picture_flops(model: torch.nn.Module, args: TrainArguments, image_size: tuple[int, int] | None) -> int:
    """Operations of training on one picture of that size; 0 for a network that the account does not know."""
    if not is_hf_vit(model):
        return 0
    frozen = not any(p.requires_grad for p in model.base_model.parameters())
    masked = args.loss == MASKED_PATCHES
    found = train_flops(model.config, image_size, frozen, args.torch_compile, all_tokens=masked)
    return found + 3 * colour_flops(model.config, image_size) * masked


def compute_facts(trainer) -> dict[str, Any]:
    """The compute account."""
    facts = {
        "device_hours": trainer.seconds * trainer.world_size / 3600,
        "memory_peak_bytes": progress.memory_peak(trainer.accelerator.device),
    }
    if is_hf_vit(trainer.model):
        facts["forward_flops_per_image"] = forward_flops(trainer.model.config)
        facts["train_exaflops"] = trainer.state.total_flos / 1e18
    if trainer.peak is not None:
        rate = trainer.state.total_flos / max(trainer.watch.seconds, 1e-9)
        facts |= {"peak_flops": trainer.peak, "mfu": rate / (trainer.peak * trainer.world_size)}
    return facts


def write_facts(folder: Path, facts: dict[str, Any]) -> Path:
    """Write facts.json in one step."""
    aside, path = folder / f".{FACTS_NAME}", folder / FACTS_NAME
    write_json(aside, facts)
    os.replace(aside, path)
    return path


def is_hf_vit(model: torch.nn.Module) -> bool:
    """Whether the compute account knows this network."""
    return isinstance(model.config, HFViTConfig)
