"""The main job in one command: pre-train, fine-tune with a new head at a higher resolution, check, report.

    make quickstart
    python -m training.quickstart --output_dir quickstart --seeds 0 1 2

A small ViT is pre-trained on generated letters and fine-tuned on scikit-learn's handwritten digits, with all labels
and with ten per class; for comparison, the same is trained from scratch. Every stage is a documented command, `python
-m training.pretrain|finetune --config ...`: its `main` is called with the arguments that are printed, in this
process, so that modules are imported once. There is no training code here. At the end, a process that cannot import
hf_vit loads the result and must reproduce the trainer's predictions.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from hf_vit.capabilities import usable_cores
from hf_vit.errors import HFViTError, Parser, report_error
from hf_vit.hub.model_card import load_facts
from hf_vit.hub.upload import push_folder

from . import finetune, pretrain
from .config.recipes import recipe_path
from .data.dataset import open_dataset
from .engine.checkpoints.checkpoint_io import write_json
from .engine.checkpoints.save_outputs import PREDICTIONS_NAME


REPORT_NAME = "report.json"  # also marks a folder that an earlier quickstart wrote, which may be overwritten
PRETRAIN, FINETUNE = "quickstart_pretrain", "quickstart"
FEW, FEW_STEPS, FEW_RATE = 10, 100, 1e-3  # of the second comparison: labels per class, steps, learning rate
LOGIT_TOLERANCE = 1e-4  # two processes may sum in different order
STAGE_COMMANDS = {"pretrain": pretrain.main, "finetune": finetune.main}

# Runs with `python -I` in an empty folder: neither the clone nor an installed hf_vit can be imported.
EXTERNAL = """
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_vit", "training"):
            raise ModuleNotFoundError(f"{name} is hidden from this process")


sys.meta_path.insert(0, Hidden())
import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
folder, images, out = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder)
images = [Image.fromarray(pixels) for pixels in np.load(images)["images"]]
logits = []
with torch.no_grad():
    for start in range(0, len(images), 64):
        logits.append(model(**processor(images[start : start + 64], return_tensors="pt")).logits.float())
np.save(out, torch.cat(logits).numpy())
"""


@dataclass(frozen=True)
class Variant:
    """One of the four fine-tunings that are compared."""

    pretrained: bool
    few: bool

    def folder(self, root: Path, seed: int, main: bool) -> Path:
        if main and self.pretrained and not self.few:
            return root / "digits"
        start = "pretrained" if self.pretrained else "scratch"
        return root / "comparison" / f"{start}-{FEW if self.few else 'all'}-per-class-seed{seed}"


VARIANTS = [Variant(pretrained, few) for few in (False, True) for pretrained in (True, False)]


def main(argv: list[str] | None = None) -> int:
    """Run everything; the exit status is 0 only if every stage and the check succeeded."""
    try:
        arguments = build_parser().parse_args(argv)
        seeds = [arguments.seed] if arguments.seeds is None else arguments.seeds
        return run(Path(arguments.output_dir), list(dict.fromkeys(seeds)), arguments.push_to_hub)
    except (HFViTError, OSError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("\nstopped; the next run starts from the beginning", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m training.quickstart",
        description="The main job in one command: pre-train, fine-tune at a higher resolution, check, report.",
    )
    parser.add_argument("--output_dir", default="quickstart", help="folder of the results (default: quickstart)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every stage (default: 0)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="repeat the fine-tuning with each seed; the model of the first is kept"
    )
    parser.add_argument("--push_to_hub", metavar="NAME", help="upload the result to this Hub repository")
    return parser


def run(root: Path, seeds: Sequence[int], push_to: str | None = None, extra: Sequence[str] = ()) -> int:
    """All stages, the check and the report.

    Args:
        root: folder of the results. seeds: of the fine-tunings; pre-training takes the first.
        push_to: Hub repository for the result. extra: options appended to every training command.

    Raises:
        HFViTError: a stage fails, or `root` holds something else. KeyboardInterrupt: a signal ended a stage.
    """
    began = time.time()
    clear(root)
    stages = list(commands(root, seeds, extra))
    # one core is left for the worker that draws or decodes images
    with thread_count(max(1, usable_cores() - 1)) as threads:
        for number, (title, name, words) in enumerate(stages, start=1):
            line = f"python -m {__package__ or 'training'}.{name} {' '.join(words)}"
            print(f"\n== {number}/{len(stages)} {title} (OMP_NUM_THREADS={threads})\n   {line}\n", flush=True)
            run_stage(title, name, words)
    print("\n== check: the folder is loaded by a process that cannot import hf_vit", flush=True)
    agreement = check_saved_folder(root / "digits")
    report = gather(root, seeds) | {"check": agreement, "seconds": time.time() - began}
    if push_to is not None:
        report["address"] = push_folder(root / "digits", push_to)
    write_json(root / REPORT_NAME, report)
    print(report_text(report, root))
    return 0 if agreement["agrees"] else 1


def clear(root: Path) -> None:
    """Empty `root` if an earlier quickstart wrote it; any other content is an error."""
    if root.is_dir() and any(root.iterdir()):
        if not (root / REPORT_NAME).is_file():
            raise HFViTError(f"{root} is not empty and no quickstart wrote it: give another --output_dir")
        for name in ("pretrained", "digits", "comparison"):
            shutil.rmtree(root / name, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / REPORT_NAME, {})


# -- stages ------------------------------------------------------------------------------------------------------


def commands(root: Path, seeds: Sequence[int], extra: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(title, command, arguments) of every stage, in order; the options that matter are written out."""
    pretrained = root / "pretrained"
    options = ["--config", PRETRAIN, "--seed", str(seeds[0]), "--output_dir", str(pretrained)]
    yield "pre-training on generated letters", "pretrain", [*options, *extra]
    size = [f"{name}={value}" for name, value in recipe(PRETRAIN)["set"].items()]
    for seed in seeds:
        for variant in VARIANTS:
            folder = variant.folder(root, seed, main=seed == seeds[0])
            options = ["--config", FINETUNE, "--seed", str(seed), "--output_dir", str(folder)]
            options += ["--model", str(pretrained)] if variant.pretrained else ["--set", *size]
            options += few_options() if variant.few else []
            options += ["--do_predict"] if folder == root / "digits" else ["--save_strategy", "no"]
            title = f"fine-tuning on digits, {name_of(variant)}" + (f", seed {seed}" if len(seeds) > 1 else "")
            yield title, "finetune", [*options, *extra]


def few_options() -> list[str]:
    return ["--samples_per_class", str(FEW), "--max_steps", str(FEW_STEPS), "--learning_rate", str(FEW_RATE)]


def name_of(variant: Variant) -> str:
    start = "pre-trained" if variant.pretrained else "from scratch"
    return f"{start}, {f'{FEW} labels per class' if variant.few else 'all labels'}"


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))


@contextmanager
def thread_count(threads: int) -> Iterator[int]:
    """Within it, PyTorch uses this number of threads, as in a process started with OMP_NUM_THREADS."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def run_stage(title: str, name: str, words: list[str]) -> None:
    """Run one command in this process.

    Raises:
        HFViTError: it failed. KeyboardInterrupt: a signal ended it.
    """
    try:
        facts = STAGE_COMMANDS[name](words)
    except SystemExit as end:  # the command has printed its error
        raise HFViTError(f"{title} ended with status {end.code}; its message is above") from None
    if not facts:  # a first Ctrl-C lets the command finish its step and return normally
        raise KeyboardInterrupt


# -- check -------------------------------------------------------------------------------------------------------


def check_saved_folder(folder: Path) -> dict[str, Any]:
    """Load the folder without hf_vit and compare with the predictions that the trainer wrote."""
    test = open_dataset("digits", split="test")
    images = np.stack([np.asarray(test.read(index)[0].convert("RGB")) for index in range(len(test))])
    return compare_predictions(external_logits(folder, images), np.load(folder / PREDICTIONS_NAME)["logits"])


def external_logits(folder: Path, images: np.ndarray) -> np.ndarray:
    """Logits (N, K) of images (N, H, W, 3), uint8, from a process that has only the folder.

    Raises:
        HFViTError: it does not load or run there.
    """
    with tempfile.TemporaryDirectory() as empty:
        saved, out = Path(empty) / "images.npz", Path(empty) / "logits.npy"
        np.savez(saved, images=images)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {"HF_MODULES_CACHE": str(Path(empty) / "modules"), "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, "-I", "-c", EXTERNAL, str(folder.resolve()), str(saved), str(out)]
        done = subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
            raise HFViTError(f"{folder} does not load in a process without hf_vit: {last[0]}")
        return np.load(out)


def compare_predictions(logits: np.ndarray, trainers: np.ndarray) -> dict[str, Any]:
    """`n` images, `equal` predictions, `largest_difference` of logits, and whether all of it `agrees`."""
    if logits.shape != trainers.shape:
        raise HFViTError(f"the folder gives logits {logits.shape}, the trainer wrote {trainers.shape}")
    equal = int((logits.argmax(-1) == trainers.argmax(-1)).sum())
    difference = float(np.abs(logits - trainers).max())
    agrees = equal == len(logits) and difference <= LOGIT_TOLERANCE
    return {"n": len(logits), "equal": equal, "largest_difference": difference, "agrees": agrees}


# -- report ------------------------------------------------------------------------------------------------------


def gather(root: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The measurements of the stages, from their facts."""
    pretraining = load_facts(root / "pretrained")
    stages = [{"stage": "pre-training", "seed": seeds[0], **measured(pretraining)}]
    for seed in seeds:
        for variant in VARIANTS:
            facts = load_facts(variant.folder(root, seed, seed == seeds[0]))
            about = {"stage": name_of(variant), "pretrained": variant.pretrained, "few": variant.few, "seed": seed}
            stages.append(about | measured(facts))
    facts = load_facts(root / "digits")
    size = [facts["model"]["image_size"][0] for facts in (pretraining, facts)]
    environment = facts["environment"]
    return {"stages": stages, "image_sizes": size, "environment": environment}


def measured(facts: dict[str, Any]) -> dict[str, Any]:
    row = next(row for row in facts["results"] if row["metric"] == "accuracy")
    training = facts["training"]
    return {
        "accuracy": row["value"], "n": row["n"], "train_images": facts["data"]["train_images"],
        "steps": training["steps"], "seconds": training["seconds"], "images_per_second": training["images_per_second"],
    }  # fmt: skip


def report_text(report: dict[str, Any], root: Path) -> str:
    """The report as text."""
    stages, check, environment = report["stages"], report["check"], report["environment"]
    main, folder = stages[1], root / "digits"
    where = f"{environment['threads']} threads" if "threads" in environment else environment["device"]
    word = "equal" if check["agrees"] else "NOT EQUAL"
    lines = [
        "",
        f"== accuracy {main['accuracy']:.2%} on {main['n']} held-out handwritten digits, seed {main['seed']}",
        "",
        f"   {'test accuracy':<42}{'pre-trained':<16}from scratch",
    ]
    for few in (False, True):
        rows = [[s for s in stages[1:] if s["few"] == few and s["pretrained"] == p] for p in (True, False)]
        title = f"{rows[0][0]['train_images']:,} labels, {rows[0][0]['steps']} steps"
        lines.append(f"   {title:<42}{spread_of_stages(rows[0]):<16}{spread_of_stages(rows[1])}")
    seeds = sorted({stage["seed"] for stage in stages[1:]})
    lines += [f"   (n = {main['n']}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})", ""]
    lines.append(f"   {'stage':<42}{'time':<16}images/s")
    for stage in [stage for stage in stages if stage["seed"] == main["seed"]]:
        low, high = report["image_sizes"]
        title = f"{stage['stage']}, {high if 'few' in stage else low} px"
        lines.append(f"   {title:<42}{minutes_and_seconds(stage['seconds']):<16}{stage['images_per_second']:,.0f}")
    lines += [
        f"   {'everything':<42}{minutes_and_seconds(report['seconds'])}",
        "   (a stage's time is its training; everything adds evaluation, figures, cards and the check, and begins",
        "   with the first line of output, after Python and its imports)",
        "",
        f"   check     {check['equal']} of {check['n']} predictions {word} in a process that cannot import hf_vit;",
        f"             largest difference of a logit {check['largest_difference']:.1e}",
        f"   machine   {environment['hardware']}, {where}, "
        f"torch {environment['torch']}, transformers {environment['transformers']}",
        f"   folder    {folder}: weights, image processor, code, card (README.md), facts.json",
        *([f"   uploaded  {report['address']}"] if "address" in report else []),
        "",
        "   Load it anywhere:",
        "",
        "      from transformers import AutoImageProcessor, AutoModelForImageClassification",
        f'      processor = AutoImageProcessor.from_pretrained("{folder}")',
        f'      model = AutoModelForImageClassification.from_pretrained("{folder}", trust_remote_code=True)',
        "",
        "   The same with your own images (folders train/CLASS/*.jpg) or a data set of the Hub:",
        "",
        f"      python -m {__package__ or 'training'}.finetune --config finetune_small \\",
        "          --model PATH_OR_HUB_ID --dataset PATH_OR_HUB_ID --image_size 384 --output_dir out",
        "",
    ]
    return "\n".join(lines)


def minutes_and_seconds(seconds: float) -> str:
    """98.2 as `1 min 38 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:2d} s" if minutes else f"{rest} s"


def spread_of_stages(stages: list[dict[str, Any]]) -> str:
    """The accuracy of one seed, or mean and standard deviation of several."""
    values = [stage["accuracy"] for stage in stages]
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.1%}"
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.1%} ± {100 * std:.1f}"


if __name__ == "__main__":
    sys.exit(main())
