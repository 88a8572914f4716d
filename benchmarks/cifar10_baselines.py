"""CIFAR-10 from scratch by three recipes, side by side: accuracy on all test images, and the time of training.

    make bench-cifar10 ARGS="--scale cpu --data uoft-cs/cifar10 --timm pytorch-image-models/train.py --seeds 0 1 2"
    python -m benchmarks.cifar10_baselines --scale cpu --data uoft-cs/cifar10 --only ours

All train one network, a plain ViT with class token and learned positions, each library in its own classes, on the
same 50,000 images, for the same number of epochs, and score all 10,000 test images once, at the end. The rest is
each recipe's own, as published (rate, batch, schedule, augmentation, regularization, initialization, precision):

    ours          training/recipes/measured/cifar10_cpu.yaml or cifar10_timed.yaml, by the scale (or --recipe)
    transformers  its image classification example, as the command in its README: Trainer, AdamW 2e-5, batches of 8,
                  random crop of 8 to 100 % of the area, flip, float32; evaluation by resize and center crop
    timm          its own train.py with that script's defaults: SGD 0.1 per 256 images, cosine, batches of 128,
                  random crop of 8 to 100 %, flip, color jitter 0.4, smoothing 0.1, float32; its warm-up of 5 epochs
                  of 300 stays that share. train.py is not in timm's wheel: take it from a clone of timm

--scale cpu is for one core (--threads), without worker processes, in processor time, which other programs on the
machine disturb less than wall time; its recipe of ours was written for so few epochs, the baselines have one set of
defaults. --scale gpu is the network and the epochs of cifar10_timed, with its number of workers for all, in wall time.
Each candidate is a process of its own, seed after seed in turns. `training` is the time from the first forward pass
to the last step, `in all` that of the process from its start to its score, with imports.
Results: benchmarks/results/cifar10-baselines-SCALE.json, written after every process. Tables: this file prints them.
"""

import csv
import importlib.metadata
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import torchvision_operators  # noqa: F401 - before whatever imports torchvision


# isort: split
from benchmarks.baselines import missing
from benchmarks.measure import training_clock
from hf_vit.capabilities import processor_name
from hf_vit.errors import HFViTError, Parser, report_error
from training import pretrain
from training.config.parser import parse
from training.data.dataset import ImageDataset, open_dataset
from training.reporting.facts import commit


RESULTS = Path(__file__).parent / "results"
SPLITS = {"train": "train", "validation": "test"}  # folder as the baselines expect it -> split of the data
CIFAR10 = {"train": 50_000, "test": 10_000}  # images of each split
WARM_UP = 5 / 300  # timm's default, of its default length


@dataclass(frozen=True)
class Scale:
    """One network and one amount of training for all; `ours`: what the machine asks of our recipe."""

    recipe: str
    width: int
    blocks: int
    heads: int
    patch: int
    epochs: int
    workers: int
    images: int | None = None  # of each split; None: all
    ours: tuple[str, ...] = ()


ON_CPU = ("--use_cpu", "--torch_compile", "false")
SCALES = {
    "cpu": Scale("cifar10_cpu", 128, 6, 4, 8, epochs=2, workers=0, ours=ON_CPU),
    "gpu": Scale("cifar10_timed", 384, 12, 6, 4, epochs=100, workers=15),
    "tiny": Scale("cifar10_cpu", 32, 2, 2, 8, epochs=1, workers=0, images=160, ours=ON_CPU),
}


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = build_parser().parse_args(argv)
        arguments.recipe = arguments.recipe or SCALES[arguments.scale].recipe
        check(arguments)
        with tempfile.TemporaryDirectory() as folder:
            run(arguments, Path(folder))
    except (HFViTError, OSError) as error:
        return report_error(error)
    return 0


def build_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.cifar10_baselines", description="CIFAR-10 from scratch: three recipes.")
    parser.add_argument("--scale", choices=SCALES, required=True, help="tiny: 160 images, only to try it; no result")
    parser.add_argument("--data", required=True, help="CIFAR-10: Hub id, folder or parquet")
    parser.add_argument("--timm", type=Path, help="train.py in a clone of huggingface/pytorch-image-models")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="default: all")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="a run of each candidate a seed (default: 0)"
    )
    parser.add_argument("--recipe", help="ours (default: the scale's)")
    parser.add_argument("--epochs", type=int, help="of all candidates (default: the scale's)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on CPUs (default: 1)")
    return parser


def check(arguments: Namespace) -> None:
    """Whatever a candidate lacks is said before any of them starts."""
    if arguments.scale == "gpu" and not torch.cuda.is_available():
        raise HFViTError("--scale gpu needs a CUDA device, and there is none: --scale cpu")
    for option in ("epochs", "threads"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise HFViTError(f"--{option} {value}: give 1 or more")
    for option in ("seeds", "only"):
        values = getattr(arguments, option)
        if len(set(values)) < len(values):
            raise HFViTError(f"--{option} {' '.join(map(str, values))}: give each once")
    for seed in arguments.seeds:
        parse(["--config", arguments.recipe, "--seed", str(seed)], "pretrain")
    if "timm" in arguments.only and not (arguments.timm and arguments.timm.is_file()):
        raise HFViTError("timm's train.py is not in its wheel: --timm PATH of it in a clone, or --only without timm")
    for package in ("torchvision", *(["timm"] if "timm" in arguments.only else [])):
        if arguments.only != ["ours"] and (reason := missing(package)):
            raise HFViTError(f"{reason}: run it in the environment of `make bench`, or with --only ours")


def run(arguments: Namespace, folder: Path) -> None:
    """Lay out the images, then run seed after seed, candidate after candidate; print and keep."""
    scale, rows, counts = SCALES[arguments.scale], [], {}
    for name, split in SPLITS.items():
        dataset = open_dataset(arguments.data, split=split)
        if scale.images is None:
            check_cifar10(dataset)
        counts[name] = export(dataset, folder / "images" / name, scale.images)
    for seed in arguments.seeds:
        for name in arguments.only:
            settings = {
                "data": str(folder / "images"), "out": str(folder / f"{name}-{seed}"), "seed": seed,
                "scale": arguments.scale, "epochs": arguments.epochs or scale.epochs, "recipe": arguments.recipe,
                "script": str(arguments.timm and arguments.timm.resolve()),
            }  # fmt: skip
            rows.append({"candidate": name, "seed": seed, **measured(name, settings, arguments.threads)})
            last = rows[-1]
            print(f"{name}, seed {seed}: {last['accuracy']:.2%}, {last['training_seconds']:.0f} s", flush=True)
            if scale.images is None:
                keep(arguments, counts, rows)
    print("\n" + "\n".join(table(rows)))


def check_cifar10(dataset: ImageDataset) -> None:
    """Raise HFViTError for other images, of which no result is kept."""
    count, classes, (width, height) = len(dataset), len(dataset.label_names), dataset.read(0)[0].size
    if (count, classes, width, height) != (CIFAR10[dataset.split], 10, 32, 32):
        raise HFViTError(
            f"'{dataset.name}' ({dataset.split}: {count:,} images of {width} x {height} px, {classes} classes) is "
            "not CIFAR-10: give --data uoft-cs/cifar10 or a copy, or --scale tiny to only try it"
        )


def export(dataset: ImageDataset, folder: Path, limit: int | None) -> int:
    """Write images as CLASS/NUMBER.png, without loss: what all three read; how many. `limit`: an even choice."""
    for label in dataset.label_names:
        (folder / label).mkdir(parents=True)
    rows = np.argsort(dataset.labels, kind="stable")
    if limit:
        rows = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
    for index in rows:
        image, label, _ = dataset.read(int(index))
        image.save(folder / dataset.label_names[label] / f"{index}.png")
    return len(rows)


def measured(name: str, settings: dict[str, Any], threads: int) -> dict[str, float]:
    """Run a candidate in a process of its own: accuracy and seconds."""
    out = Path(settings["out"])
    out.mkdir()
    words = [sys.executable, "-m", "benchmarks.cifar10_baselines", "--candidate", name, json.dumps(settings)]
    began = clocks()
    with (out / "log").open("w") as log:
        limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if is_cpu(settings) else {}
        # from the clone's root, whose package this is
        done = subprocess.run(words, cwd=Path(__file__).parents[1], env=os.environ | limits, stdout=log, stderr=log)
    ended = clocks()
    if done.returncode:
        last = (out / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise HFViTError(f"{name} ended with status {done.returncode}: {''.join(last)}")
    return {
        "accuracy": json.loads((out / "score.json").read_text()),
        **{key: round(value, 2) for key, value in json.loads((out / "clock.json").read_text()).items()},
        "process_seconds": round(ended[is_cpu(settings)] - began[is_cpu(settings)], 2),
    }


def clocks() -> tuple[float, float]:
    """Wall time, and the processor time of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def is_cpu(settings: dict[str, Any]) -> bool:
    return settings["scale"] != "gpu"


def keep(arguments: Namespace, counts: dict[str, int], rows: list[dict[str, Any]]) -> None:
    """Write what is known so far; an earlier result of this scale is replaced."""
    scale = SCALES[arguments.scale]
    on_cpu = arguments.scale != "gpu"
    baselines = {name: importlib.metadata.version(name) for name in arguments.only if name != "ours"}
    result = {
        "what": "CIFAR-10 from scratch by three recipes",
        "network": {"width": scale.width, "blocks": scale.blocks, "heads": scale.heads, "patch": scale.patch},
        "images": counts,
        "epochs": arguments.epochs or scale.epochs,
        "recipe": arguments.recipe,
        "clock": "processor" if on_cpu else "wall",
        "rows": rows,
        "environment": {
            "hardware": processor_name() if on_cpu else torch.cuda.get_device_name(),
            "threads": arguments.threads if on_cpu else None,
            "torch": torch.__version__,
            **baselines,
            "commit": commit(),
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"cifar10-baselines-{arguments.scale}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each candidate: accuracies of all seeds, medians of the times."""
    lines = [f"{'':<14}{'training s':>11}{'in all s':>10}{'mean':>9}   accuracy of each seed"]
    for name in dict.fromkeys(row["candidate"] for row in rows):
        runs = [row for row in rows if row["candidate"] == name]
        training, whole = (
            statistics.median(row[key] for row in runs) for key in ("training_seconds", "process_seconds")
        )
        scores = [row["accuracy"] for row in runs]
        each = "  ".join(f"{value:.2%}" for value in scores)
        lines.append(f"{name:<14}{training:>11.0f}{whole:>10.0f}{statistics.mean(scores):>9.2%}   {each}")
    return lines


# -- in a candidate's own process ------------------------------------------------------------------------------------


def candidate(name: str, settings: dict[str, Any]) -> None:
    """Train, and leave score.json and clock.json in settings["out"]."""
    with training_clock(time.process_time if is_cpu(settings) else time.perf_counter) as moments:
        accuracy = CANDIDATES[name](settings)
    out = Path(settings["out"])
    (out / "score.json").write_text(json.dumps(accuracy))
    (out / "clock.json").write_text(json.dumps({"training_seconds": moments["last"] - moments["first"]}))


def ours(settings: dict[str, Any]) -> float:
    """As `python -m training.pretrain WORDS` runs it."""
    results = pretrain.main(recipe_words(settings))["results"]
    return next(row["value"] for row in results if row["metric"] == "accuracy")


def recipe_words(settings: dict[str, Any]) -> list[str]:
    scale = SCALES[settings["scale"]]
    network = {"hidden_size": scale.width, "num_hidden_layers": scale.blocks, "num_attention_heads": scale.heads,
               "intermediate_size": 4 * scale.width, "patch_size": scale.patch, "pooling": "token",
               "use_class_token": "true", "position_embedding_type": "learned"}  # fmt: skip
    return ["--config", settings["recipe"], "--dataset", settings["data"], "--seed", str(settings["seed"]),
            "--output_dir", settings["out"] + "/model", "--num_train_epochs", str(settings["epochs"]),
            "--dataloader_num_workers", str(scale.workers), "--eval_strategy", "no", "--disable_tqdm", *scale.ours,
            "--set", *(f"{key}={value}" for key, value in network.items())]  # fmt: skip


def example(settings: dict[str, Any]) -> float:
    """The image classification example of transformers, from scratch, on images laid out as it wants them."""
    from datasets import load_dataset
    from torchvision import transforms as view_of
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(settings["seed"])
    scale = SCALES[settings["scale"]]
    data = load_dataset("imagefolder", data_dir=settings["data"], cache_dir=settings["out"] + "/cache")
    last = [view_of.ToTensor(), view_of.Normalize([0.5] * 3, [0.5] * 3)]
    views = {
        "train": view_of.Compose([view_of.RandomResizedCrop(32), view_of.RandomHorizontalFlip(), *last]),
        "validation": view_of.Compose([view_of.Resize(32), view_of.CenterCrop(32), *last]),
    }
    for split, view in views.items():
        data[split].set_transform(
            lambda rows, view=view: {
                "pixel_values": [view(image.convert("RGB")) for image in rows["image"]],
                "labels": rows["label"],
            }
        )
    args = TrainingArguments(
        settings["out"], learning_rate=2e-5, num_train_epochs=settings["epochs"], per_device_train_batch_size=8,
        per_device_eval_batch_size=8, remove_unused_columns=False, seed=settings["seed"], save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=is_cpu(settings), dataloader_num_workers=scale.workers,
    )  # fmt: skip

    def score(outputs: Any) -> dict[str, float]:
        return {"accuracy": float((outputs.predictions.argmax(1) == outputs.label_ids).mean())}

    model = stock_network(scale, num_labels=len(data["train"].features["label"].names))
    trainer = Trainer(model, args, train_dataset=data["train"], eval_dataset=data["validation"], compute_metrics=score)
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def stock_network(scale: Scale, num_labels: int) -> torch.nn.Module:
    """transformers' own class, with its own initialization."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": scale.width, "num_hidden_layers": scale.blocks, "num_attention_heads": scale.heads,
             "intermediate_size": 4 * scale.width, "patch_size": scale.patch}  # fmt: skip
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, num_labels=num_labels))


def train_script(settings: dict[str, Any]) -> float:
    """timm's train.py, as `python train.py WORDS` runs it."""
    sys.argv = [settings["script"], *script_words(settings)]
    runpy.run_path(settings["script"], run_name="__main__")
    with (Path(settings["out"]) / "run" / "summary.csv").open() as file:
        return float(list(csv.DictReader(file))[-1]["eval_top1"]) / 100


def script_words(settings: dict[str, Any]) -> list[str]:
    scale = SCALES[settings["scale"]]
    epochs = settings["epochs"]
    return ["--data-dir", settings["data"], "--model", "vit_small_patch16_224", "--num-classes", "10",
            "--input-size", "3", "32", "32", "--model-kwargs", "img_size=32", f"patch_size={scale.patch}",
            f"embed_dim={scale.width}", f"depth={scale.blocks}", f"num_heads={scale.heads}", "--seed",
            str(settings["seed"]), "--output", settings["out"], "--experiment", "run", "--epochs", str(epochs),
            "--warmup-epochs", str(round(WARM_UP * epochs)), "--val-interval", str(epochs), "--workers",
            str(scale.workers), "--device", "cpu" if is_cpu(settings) else "cuda"]  # fmt: skip


CANDIDATES = {"ours": ours, "transformers": example, "timm": train_script}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--candidate"]:
        candidate(sys.argv[2], json.loads(sys.argv[3]))
    else:
        sys.exit(main())
