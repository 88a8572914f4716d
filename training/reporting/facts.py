"""facts.json: what was measured in a run, from which model cards are rendered.

For the Trainer and the commands. A value that was not measured is absent.
"""

import dataclasses
import datetime
import json
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
from hf_vit.atomic_file import atomic_write
from hf_vit.capabilities import processor_name
from hf_vit.modeling.configuration_hf_vit import HEAD_FIELDS

from ..config.arguments import MASKED_PATCHES, TrainArguments
from ..data.dataset import ImageDataset
from ..data.shards.streaming import ImageStream
from . import progress
from .flops import color_flops, counted_forward_flops, forward_flops, train_flops


FACTS_NAME = "facts.json"
BASE_FIELDS = set(transformers.PreTrainedConfig().to_dict()) | {"auto_map"}


def architecture_of(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """The fields that define the network: those that its configuration adds to transformers' own."""
    fields = {name: value for name, value in config.to_dict().items() if name not in (*BASE_FIELDS, *HEAD_FIELDS)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(fields.items())}


def model_facts(
    model: torch.nn.Module, name: str, base_model: str | None, image_size: tuple[int, int]
) -> dict[str, Any]:
    config = model.config
    return {
        "name": name,
        "model_type": config.model_type,
        "class": type(model).__name__,
        "architecture": architecture_of(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "base_model": base_model,
        "image_size": list(image_size),
        "num_labels": config.num_labels,
        **({} if config.problem_type is None else {"problem_type": config.problem_type}),
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


def commit() -> str | None:
    """The commit of the clone that holds this file, with a + if files were changed; None outside of a clone."""
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
    """The name of data or a base model in facts: a Hub id as it is, of a path only its last part."""
    return Path(name).resolve().name if Path(name).exists() else name


def metric_rows(
    metrics: dict[str, float],
    dataset: str,
    split: str,
    count: int,
    seed: int,
    intervals: dict[str, tuple[float, float]] | None = None,
) -> list[dict[str, Any]]:
    """One row per score, as cards expect them; with its 95 % interval if it has one.

    Args:
        intervals: by metric; those of accuracies are computed here.
    """
    from ..metrics.accuracy.accuracy import wilson_interval  # with it comes `evaluate`, which takes seconds to import

    rows = []
    for name, value in metrics.items():
        metric = name.removeprefix("eval_")
        row = {"dataset": dataset, "split": split, "metric": metric, "value": value, "n": count, "seed": seed}
        interval = (intervals or {}).get(metric)
        if interval is None and metric.endswith("accuracy"):
            interval = wilson_interval(value * count, count)
        rows.append(row if interval is None else row | {"interval": list(interval)})
    return rows


@dataclasses.dataclass
class RunRecord:
    """What is known of a finished run, for its facts.

    Attributes:
        about: what the Trainer does not know: stage, recipe, base_model, arguments, augmentation, data, sweep.
        image_size: (height, width) of the images that the model reads.
        precision: fp32, bf16, ... trainer_state: transformers', with steps, history and FLOPs.
        position: images seen. seconds: of the whole run. peak_flops: FLOP/s that the device can reach, or None.
        last_evaluation: step, metrics, images; or None. unreadable: images left out, over all processes.
        argument_changes: for every resume with other arguments, the step and the changes.
        intervals: 95 %, of the last evaluation's scores by name; None: only accuracies have one.
        time_plan: of a run with a time limit, in seconds and steps.
    """

    model: torch.nn.Module
    name: str
    image_size: tuple[int, int]
    args: TrainArguments
    about: dict[str, Any]
    train_dataset: Any
    eval_dataset: Any
    accelerator: accelerate.Accelerator
    precision: str
    trainer_state: transformers.TrainerState
    timer: progress.Timer
    position: int
    global_batch_size: int
    seconds: float
    peak_flops: float | None
    last_evaluation: tuple[int, dict[str, float], int] | None
    unreadable: int
    argument_changes: list[dict[str, Any]]
    intervals: dict[str, tuple[float, float]] | None = None
    time_plan: dict[str, Any] | None = None


def run_facts(run: RunRecord) -> dict[str, Any]:
    """Everything measured about a run."""
    data, masked = run.train_dataset, run.args.loss == MASKED_PATCHES
    facts = {
        "model": model_facts(run.model, run.name, run.about.get("base_model"), run.image_size),
        "task": "masked-image-modeling" if masked else "image-classification",
        "data": {**run.about.get("data", {}), "train_images": len(data), "unreadable_images": run.unreadable},
        "training": training_facts(run),
        "compute": compute_facts(run),
        "results": [],
        "environment": environment_facts(run.accelerator, run.precision),
        "history": progress.HISTORY_NAME,
        "figures": [],
    }
    if "license" in run.about:
        facts |= {"license": None} | (run.about["license"] or {})
    if isinstance(data, ImageDataset | ImageStream):
        facts["data"] |= {"name": public_name(data.name), "train_split": data.split, "label_names": data.label_names}
        facts["data"]["fingerprint"] = data.fingerprint
    if run.last_evaluation is not None:
        _, metrics, count = run.last_evaluation
        held_out = run.eval_dataset
        name, split = (
            (public_name(held_out.name), held_out.split)
            if isinstance(held_out, ImageDataset)
            else ("evaluation", "evaluation")
        )
        facts["data"] |= {"eval_split": split, "eval_images": len(held_out)}
        facts["results"] = metric_rows(metrics, name, split, count, run.args.seed, run.intervals)
        for row in facts["results"] if masked else []:  # not the accuracy of a classifier
            row["metric"] = f"masked_patch_{row['metric']}"
            row.pop("interval", None)  # an image's patches are not independent answers
    return facts


def training_facts(run: RunRecord) -> dict[str, Any]:
    """Steps, epochs, seconds, loss."""
    about, timer, state = run.about, run.timer, run.trainer_state
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    facts = {
        **{name: about[name] for name in ("stage", "recipe", "arguments", "augmentation", "sweep") if name in about},
        "seed": run.args.seed,
        "steps": state.global_step,
        "epochs": run.position / len(run.train_dataset),
        "global_batch_size": run.global_batch_size,
        "seconds": run.seconds,
        "images_per_second": timer.images / max(timer.seconds, 1e-9),
        "data_wait": timer.waiting / max(timer.seconds, 1e-9),
    }
    if run.argument_changes:  # `arguments` are the last ones: the steps before these had others
        facts["argument_changes"] = run.argument_changes
    if run.args.auto_batch_size:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            facts[name] = getattr(run.args, name)
    if run.time_plan is not None:
        facts["time_plan"] = run.time_plan
    if losses:
        facts["final_loss"] = losses[-1]
    if run.args.load_best_model_at_end:
        facts["best_step"] = state.best_global_step
    return facts


def image_flops(model: Any, args: TrainArguments, image_size: tuple[int, int]) -> int:
    """Operations of training on one image of that size."""
    if not is_hf_vit(model):  # a probe computes no gradient but its head's, which is little
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        whole = trained > sum(p.numel() for p in model.parameters()) / 2
        return counted_forward_flops(type(model), model.config, image_size) * (3 if whole else 1)
    frozen = not any(p.requires_grad for p in model.base_model.parameters())
    masked = args.loss == MASKED_PATCHES
    flops = train_flops(model.config, image_size, frozen, args.torch_compile, all_tokens=masked)
    return flops + 3 * color_flops(model.config, image_size) * masked


def compute_facts(run: RunRecord) -> dict[str, Any]:
    """Device hours, memory, operations."""
    processes = run.accelerator.num_processes
    facts = {
        "device_hours": run.seconds * processes / 3600,
        "memory_peak_bytes": progress.memory_peak(run.accelerator.device),
    }
    model: Any = run.model
    if is_hf_vit(model):
        facts["forward_flops_per_image"] = forward_flops(model.config)
    else:
        facts["forward_flops_per_image"] = counted_forward_flops(type(model), model.config, run.image_size)
    facts["train_exaflops"] = run.trainer_state.total_flos / 1e18
    if run.peak_flops is not None:
        rate = run.trainer_state.total_flos / max(run.timer.seconds, 1e-9)
        facts |= {"peak_flops": run.peak_flops, "mfu": rate / (run.peak_flops * processes)}
    return facts


def write_facts(folder: Path, facts: dict[str, Any]) -> Path:
    """Write facts.json atomically."""
    path = folder / FACTS_NAME
    atomic_write(path, json.dumps(facts, indent=2) + "\n")
    return path


def is_hf_vit(model: torch.nn.Module) -> bool:
    """Whether the model is one of hf_vit's."""
    return isinstance(model.config, HFViTConfig)
