"""Small sets of labelled images: our recipes against transformers' example and timm's train.py, at equal time.

    python -m benchmarks.small_sets prepare --folder sets --cifar10 uoft-cs/cifar10 --flowers PATH
    python -m training.pretrain --config cifar10_cpu --dataset sets/base-images --no_flip --crop squash \
        --max_steps 450 --eval_strategy no --use_cpu --torch_compile false --output_dir sets/base
    python -m benchmarks.small_sets run --folder sets --methods probe finetune_foundation finetune_small
    python -m benchmarks.small_sets run --folder sets --methods transformers timm --timm pytorch-image-models/train.py
    python -m benchmarks.small_sets table

Sets, each stored as PNG of 32 px (short side): CIFAR-10 at 10, 25 and 100 images a class, drawn anew for each seed;
720 photographs of 12 flowers; scikit-learn's digits, 50 a class, drawn anew. Test images: 2,000 of CIFAR-10's, evenly
of all classes, and all of the other two. `--on dev` trains on a part of the training images and scores on others of
the training split (2,000 of CIFAR-10's): what defaults are chosen on, with `--words` for values to try.

The base is a small plain ViT that has seen none of those images and no label of their classes: it tells by how many
quarters images of CIFAR-10 are turned (30,000 training images that no set draws from) and knows generated letters.

    probe, finetune_foundation, finetune_small   our recipes, as documented, on a folder of training images alone: what
                  they hold out of it as a dev split, they do not train on
    transformers  its image classification example, as the command in its README: Trainer, AdamW 2e-5, linear decay,
                  batches of 8, random crop of 8 to 100 % of the area, flip; all images train
    timm          its own train.py with that script's defaults: SGD 0.1 per 256 images, cosine, batches of 128, random
                  crop of 8 to 100 %, flip, color jitter 0.4, smoothing 0.1; its warm-up of 5 epochs of 300 stays that
                  share; all images train. It leaves out incomplete batches, so that sets below 128 images would not
                  train at all: there the batch is half the set. train.py is not in timm's wheel: take it from a clone

Nobody flips digits. Equal time: of each set the baselines do as many epochs as fit into the training time of
finetune_small, by their time for an image, measured before. Training time is processor time of one thread, from the
first forward pass to the last update (of `probe`, to the fitted head), evaluations and features included, and
without imports. Results: benchmarks/results/small-sets-cpu.json, written after every run; what is there is not run
again.
"""

import contextlib
import csv
import importlib.metadata
import json
import os
import runpy
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from benchmarks import torchvision_operators  # noqa: F401 - before whatever imports torchvision


# isort: split
from PIL import Image

import training.train
from benchmarks.baselines import missing
from benchmarks.measure import training_clock
from hf_vit.atomic_file import atomic_write
from hf_vit.capabilities import processor_name
from hf_vit.cli.main import main as hf_vit_command
from hf_vit.errors import HFViTError, Parser, report_error
from training import finetune
from training.data.dataset import ImageDataset, open_dataset
from training.reporting.facts import commit


RESULTS = Path(__file__).parent / "results" / "small-sets-cpu.json"
SIZE = 32  # pixels
FOR_SETS, FOR_BASE = slice(0, 20_000), slice(20_000, 50_000)  # of CIFAR-10's training images
SCORED = 2_000  # images of CIFAR-10, of test or for choosing
WARM_UP = 5 / 300  # timm's default, of its default length
RECIPES = ("probe", "finetune_foundation", "finetune_small")
BASELINES = ("transformers", "timm")


@dataclass(frozen=True)
class SmallSet:
    """Where a set's images come from, and how many a class train (None: all, or four fifths on dev)."""

    source: str
    per_class: int | None
    flip: bool = True


SETS = {
    "cifar10-10": SmallSet("cifar10", 10),
    "cifar10-25": SmallSet("cifar10", 25),
    "cifar10-100": SmallSet("cifar10", 100),
    "flowers": SmallSet("flowers", None),
    "digits": SmallSet("digits", 50, flip=False),
}


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = build_parser().parse_args(argv)
        {"prepare": prepare, "run": run, "table": show}[arguments.action](arguments)
    except (HFViTError, OSError) as error:
        return report_error(error)
    return 0


def build_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.small_sets", description="Small sets: our recipes beside others.")
    actions = parser.add_subparsers(dest="action", required=True)
    lay_out = actions.add_parser("prepare", help="write the images of the sets and of the base's training")
    train = actions.add_parser("run", help="train and score; what is in the results already is left out")
    actions.add_parser("table", help="print the results")
    for one in (lay_out, train):
        one.add_argument("--folder", type=Path, required=True, help="of images and base")
    lay_out.add_argument("--cifar10", required=True, help="CIFAR-10: Hub id, folder or parquet")
    lay_out.add_argument("--flowers", required=True, help="photographs with classes, with splits train and test")
    train.add_argument("--methods", nargs="+", choices=RECIPES + BASELINES, required=True)
    train.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="default: all")
    train.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    train.add_argument("--on", choices=("dev", "test"), default="test", help="images that are scored")
    train.add_argument("--words", default="", help="more words for our recipes, to try values: on dev alone")
    train.add_argument("--timm", type=Path, help="train.py in a clone of huggingface/pytorch-image-models")
    return parser


# -- images ----------------------------------------------------------------------------------------------------------


def prepare(arguments: Namespace) -> None:
    """Write pools of images, of which sets are drawn, as PNG without loss, and the images that the base learns."""
    cifar10 = {split: open_dataset(arguments.cifar10, split=split) for split in ("train", "test")}
    check_cifar10(cifar10["train"])
    sources = {
        "cifar10": cifar10,
        "flowers": {split: open_dataset(arguments.flowers, split=split) for split in ("train", "test")},
        "digits": {split: open_dataset("digits", split=split) for split in ("train", "test")},
    }
    for name, splits in sources.items():
        for split, dataset in splits.items():
            rows = np.arange(len(dataset))
            if name == "cifar10":
                rows = rows[FOR_SETS] if split == "train" else evenly(dataset.labels, rows, SCORED // 10)
            export(dataset, rows, arguments.folder / "pools" / name / split)
            print(f"{name}, {split}: {len(rows):,} images", flush=True)
    write_base_images(cifar10["train"], arguments.folder / "base-images")


def check_cifar10(dataset: ImageDataset) -> None:
    count, size = len(dataset), dataset.read(0)[0].size
    if (count, len(dataset.label_names), size) != (50_000, 10, (32, 32)):
        raise HFViTError(f"'{dataset.name}' ({count:,} images of {size} px) is not CIFAR-10: give --cifar10 of it")


def evenly(labels: np.ndarray, rows: np.ndarray, per_class: int, seed: int | None = None) -> np.ndarray:
    """So many rows of each class: the first, or with a seed a draw of it."""
    if seed is not None:
        rows = np.random.default_rng(seed).permutation(rows)
    return np.sort(np.concatenate([rows[labels[rows] == label][:per_class] for label in np.unique(labels)]))


def export(dataset: ImageDataset, rows: np.ndarray, folder: Path) -> None:
    """Write images as CLASS/NUMBER.png, shrunk to a short side of SIZE where they are larger."""
    for row in rows:
        image, label, _ = dataset.read(int(row))
        if (short := min(image.size)) > SIZE:
            image = image.resize([round(side * SIZE / short) for side in image.size], Image.Resampling.LANCZOS)
        path = folder / dataset.label_names[label] / f"{row:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def write_base_images(cifar10: ImageDataset, folder: Path) -> None:
    """Images turned by 0 to 3 quarters, labelled with that, and generated letters, as one parquet of each split."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    letters = open_dataset(f"synthetic:glyphs-clouds@52,600,{SIZE}", split="train")
    quarters = [f"rotated {90 * count}" for count in range(4)]
    rows = [(cifar10.read(row)[0].rotate(90 * count), count)
            for row in range(len(cifar10))[FOR_BASE] for count in range(4)]  # fmt: skip
    rows += [(image.convert("RGB"), 4 + label) for image, label, _ in map(letters.read, range(len(letters)))]
    names = quarters + [f"letter {name}" for name in letters.label_names]
    order = np.random.default_rng(0).permutation(len(rows))
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=names)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("test", order[:1500]), ("train", order[1500:])):
        columns = {"image": [rows[row][0] for row in part], "label": [rows[row][1] for row in part]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def lay_out(pools: Path, name: str, seed: int, on: str, folder: Path) -> dict[str, int]:
    """Link a set's images as train/CLASS/* and scored/CLASS/*; how many there are of both.

    On "dev" the scored images are drawn from those of the training split that are left.
    """
    definition = SETS[name]
    pool = open_dataset(str(pools / definition.source / "train"), split="train")
    rows, per_class = np.arange(len(pool)), definition.per_class
    if per_class is None and on == "dev":
        per_class = round(0.8 * len(pool) / len(pool.label_names))
    train = rows if per_class is None else evenly(pool.labels, rows, per_class, seed)
    scored_pool = pool
    if on == "test":
        scored_pool = open_dataset(str(pools / definition.source / "test"), split="train")
        scored = np.arange(len(scored_pool))
    else:
        scored = evenly(pool.labels, np.setdiff1d(rows, train), SCORED // len(pool.label_names), seed)
    for split, dataset, part in (("train", pool, train), ("scored", scored_pool, scored)):
        for row in part:
            source = Path(dataset.name) / dataset.image_name(int(row))
            target = folder / split / source.parent.name / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
    return {"train": len(train), "scored": len(scored)}


# -- runs ------------------------------------------------------------------------------------------------------------


def run(arguments: Namespace) -> None:
    """Every run that is not among the results yet, seed after seed, set after set."""
    check(arguments)
    torch.set_num_threads(1)
    epoch_costs: dict[str, float] = {}
    for seed in arguments.seeds:
        for name in arguments.sets:
            for method in arguments.methods:
                words, rows = arguments.words if method in RECIPES else "", saved_rows()
                key = {"set": name, "method": method, "seed": seed, "on": arguments.on, "words": words}
                if any(all(row[field] == key[field] for field in key) for row in rows):
                    continue
                with tempfile.TemporaryDirectory() as scratch:
                    folder = Path(scratch)
                    counts = lay_out(arguments.folder / "pools", name, seed, arguments.on, folder / "images")
                    if method in BASELINES:
                        if method not in epoch_costs:
                            epoch_costs[method] = seconds_an_image(arguments, method)
                        seconds = time_of_ours(rows, name, arguments.on)
                        an_epoch = epoch_costs[method] * images_an_epoch(method, counts["train"])
                        key["epochs"] = max(1, round(seconds / an_epoch))
                    scores = train_and_score(arguments, key, folder)
                keep({**key, "images": counts["train"], "scored_images": counts["scored"], **scores})
                told = f"{scores['accuracy']:.2%}, {scores['training_seconds']:.1f} s"
                print(f"{name}, {method} {words}, seed {seed}, {arguments.on}: {told}", file=sys.stderr, flush=True)


def check(arguments: Namespace) -> None:
    """Whatever a method lacks is said before any of them starts."""
    for path in (arguments.folder / "pools", arguments.folder / "base"):
        if not path.is_dir():
            raise HFViTError(f"{path} is missing: the first commands of this file's docstring write it")
    if arguments.words and arguments.on == "test":
        raise HFViTError("--words is for choosing, --on dev; what is reported on test are the recipes")
    if "timm" in arguments.methods and not (arguments.timm and arguments.timm.is_file()):
        raise HFViTError(
            "timm's train.py is not in its wheel: --timm PATH of it in a clone, or --methods without timm"
        )
    for package in ("torchvision", "timm")[: 1 + ("timm" in arguments.methods)]:
        if set(arguments.methods) & set(BASELINES) and (reason := missing(package)):
            raise HFViTError(f"{reason}: run it in the environment of `make bench`, or with our recipes only")


def time_of_ours(rows: list[dict[str, Any]], name: str, on: str) -> float:
    """Median training seconds of finetune_small on this set, without tried words."""
    key = (name, on, "", "finetune_small")
    times = [row["training_seconds"] for row in rows if (row["set"], row["on"], row["words"], row["method"]) == key]
    if not times:
        raise HFViTError(f"baselines have the time of finetune_small on {name}: run that first")
    return statistics.median(times)


def seconds_an_image(arguments: Namespace, method: str) -> float:
    """A baseline's processor time for one image, of one epoch after another that only warms up."""
    key = {"set": "cifar10-25", "method": method, "seed": 0, "on": "dev", "words": "", "epochs": 1}
    for _ in range(2):
        with tempfile.TemporaryDirectory() as scratch:
            counts = lay_out(arguments.folder / "pools", key["set"], 0, "dev", Path(scratch) / "images")
            seconds = train_and_score(arguments, key, Path(scratch))["training_seconds"]
    return seconds / images_an_epoch(method, counts["train"])


def timm_batch(images: int) -> int:
    """train.py's default, or half of a set that is smaller than it."""
    return 128 if images >= 128 else images // 2


def images_an_epoch(method: str, images: int) -> int:
    """timm leaves out the last, incomplete batch."""
    return images if method != "timm" else images // timm_batch(images) * timm_batch(images)


def train_and_score(arguments: Namespace, key: dict[str, Any], folder: Path) -> dict[str, float]:
    settings = {**key, "folder": folder, "base": arguments.folder / "base", "timm": arguments.timm}
    method = {"transformers": example, "timm": train_script}.get(key["method"], recipe)
    whole = time.process_time()
    with clock() as moments, (folder / "log").open("w") as log, contextlib.redirect_stdout(log):
        result = method(settings)
    return {
        **result,
        "training_seconds": round(moments["last"] - moments["first"], 2),
        "whole_seconds": round(time.process_time() - whole, 2),
    }


@contextlib.contextmanager
def clock() -> Iterator[dict[str, float]]:
    """Processor seconds at the first forward pass and at the last update, or the end of fitting a head."""
    fit = training.train.init_head
    with training_clock(time.process_time) as moments:

        def fit_and_end(*args: Any, **more: Any) -> Any:
            head = fit(*args, **more)
            moments["last"] = time.process_time()
            return head

        training.train.init_head = fit_and_end
        try:
            yield moments
        finally:
            training.train.init_head = fit


def recipe(settings: dict[str, Any]) -> dict[str, float]:
    """As `python -m training.finetune WORDS` runs it; scored as whoever loads the folder does."""
    from transformers import AutoImageProcessor

    from hf_vit import HFViTForImageClassification

    out = settings["folder"] / "model"
    facts = finetune.main(recipe_words(settings, out))
    model = HFViTForImageClassification.from_pretrained(out).eval()
    processor = AutoImageProcessor.from_pretrained(out)
    test = open_dataset(str(settings["folder"] / "images" / "scored"), split="train")
    correct = 0
    with torch.no_grad():
        for start in range(0, len(test), 250):
            images, labels, _ = zip(*map(test.read, range(start, min(start + 250, len(test)))))
            logits = model(**processor(list(images), return_tensors="pt")).logits
            correct += int((logits.argmax(1).numpy() == np.array(labels)).sum())
    return {"accuracy": correct / len(test), "steps": facts["training"]["steps"]}


def recipe_words(settings: dict[str, Any], out: Path) -> list[str]:
    flip = [] if SETS[settings["set"]].flip else ["--no_flip"]
    folder = settings["folder"]  # its own cache, or features that another run left would cost no time
    return ["--config", settings["method"], "--model", str(settings["base"]), "--dataset",
            str(folder / "images" / "train"), "--cache_dir", str(folder / "cache"), "--output_dir", str(out), "--seed",
            str(settings["seed"]), "--use_cpu", "--torch_compile", "false", "--dataloader_num_workers", "0",
            "--disable_tqdm", *flip, *settings["words"].split()]  # fmt: skip


def example(settings: dict[str, Any]) -> dict[str, float]:
    """The image classification example of transformers, from the base, on images laid out as it wants them."""
    from datasets import load_dataset
    from torchvision import transforms as view_of
    from transformers import Trainer, TrainingArguments, ViTForImageClassification, ViTImageProcessor, set_seed

    set_seed(settings["seed"])
    folder, base = settings["folder"], converted(settings["base"], "transformers")
    split = {name: str(folder / "images" / name / "**") for name in ("train", "scored")}
    data = load_dataset("imagefolder", data_files=split, cache_dir=str(folder / "cache"), drop_labels=False)
    processor = ViTImageProcessor.from_pretrained(base)
    last = [view_of.ToTensor(), view_of.Normalize(processor.image_mean, processor.image_std)]
    flip = [view_of.RandomHorizontalFlip()] if SETS[settings["set"]].flip else []
    views = {
        "train": view_of.Compose([view_of.RandomResizedCrop(SIZE), *flip, *last]),
        "scored": view_of.Compose([view_of.Resize(SIZE), view_of.CenterCrop(SIZE), *last]),
    }
    for name, view in views.items():
        data[name].set_transform(
            lambda rows, view=view: {
                "pixel_values": [view(image.convert("RGB")) for image in rows["image"]],
                "labels": rows["label"],
            }
        )
    args = TrainingArguments(
        str(folder / "model"), learning_rate=2e-5, num_train_epochs=settings["epochs"], per_device_train_batch_size=8,
        per_device_eval_batch_size=8, remove_unused_columns=False, seed=settings["seed"], save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip

    def score(outputs: Any) -> dict[str, float]:
        return {"accuracy": float((outputs.predictions.argmax(1) == outputs.label_ids).mean())}

    model = ViTForImageClassification.from_pretrained(
        base, num_labels=len(data["train"].features["label"].names), ignore_mismatched_sizes=True
    )
    trainer = Trainer(model, args, train_dataset=data["train"], eval_dataset=data["scored"], compute_metrics=score)
    trainer.train()
    return {"accuracy": trainer.evaluate()["eval_accuracy"], "steps": trainer.state.global_step}


def converted(base: Path, form: str) -> Path:
    """The base in a baseline's format, written once, beside it."""
    path = base.with_name(f"{base.name}-{form}" + ".safetensors" * (form == "timm"))
    if not path.exists():
        words = ["convert", str(base), str(path), "--format", form]
        if status := hf_vit_command(words):
            raise HFViTError(f"hf-vit {' '.join(words)} ended with status {status}")
    return path


def train_script(settings: dict[str, Any]) -> dict[str, float]:
    """timm's train.py, as `python train.py WORDS` runs it."""
    argv = sys.argv
    sys.argv = [str(settings["timm"]), *script_words(settings)]
    try:
        runpy.run_path(str(settings["timm"]), run_name="__main__")
    finally:
        sys.argv = argv
    with (settings["folder"] / "run" / "summary.csv").open() as file:
        return {"accuracy": float(list(csv.DictReader(file))[-1]["eval_top1"]) / 100}


def script_words(settings: dict[str, Any]) -> list[str]:
    from transformers import AutoConfig

    images, epochs = settings["folder"] / "images", settings["epochs"]
    config = AutoConfig.from_pretrained(converted(settings["base"], "transformers"))
    classes, count = len(list((images / "train").iterdir())), sum(1 for _ in (images / "train").glob("*/*"))
    batch = ["--batch-size", str(timm_batch(count))] if count < 128 else []
    flip = [] if SETS[settings["set"]].flip else ["--hflip", "0"]
    return ["--data-dir", str(images), "--train-split", "train", "--val-split", "scored", "--model",
            "vit_small_patch16_224", "--pretrained", "--pretrained-path", str(converted(settings["base"], "timm")),
            "--num-classes", str(classes), "--input-size", "3", str(SIZE), str(SIZE), "--model-kwargs",
            f"img_size={SIZE}", f"patch_size={config.patch_size}", f"embed_dim={config.hidden_size}",
            f"depth={config.num_hidden_layers}", f"num_heads={config.num_attention_heads}", "--seed",
            str(settings["seed"]), "--output", str(settings["folder"]), "--experiment", "run", "--epochs",
            str(epochs), "--warmup-epochs", str(round(WARM_UP * epochs)), "--val-interval", str(epochs), "--workers",
            "0", "--device", "cpu", *batch, *flip]  # fmt: skip


# -- results ---------------------------------------------------------------------------------------------------------


def saved_rows() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else []


def keep(row: dict[str, Any]) -> None:
    """Add a run to the results, to which other processes may add theirs."""
    RESULTS.parent.mkdir(exist_ok=True)
    with FileLock(Path(tempfile.gettempdir()) / f"{RESULTS.name}.lock"):
        atomic_write(RESULTS, json.dumps(about([*saved_rows(), row]), indent=1) + "\n")


def about(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, and where they were measured."""
    versions = {name: importlib.metadata.version(name) for name in BASELINES if not missing(name)}
    if RESULTS.is_file():
        earlier = json.loads(RESULTS.read_text(encoding="utf-8"))["environment"]
        versions = {name: earlier[name] for name in BASELINES if name in earlier} | versions
    return {
        "what": "small sets: our recipes beside transformers' example and timm's train.py, at equal time",
        "clock": "processor",
        "rows": rows,
        "environment": {
            "hardware": processor_name(),
            "threads": 1,
            "torch": torch.__version__,
            **versions,
            "commit": commit(),
        },
    }


def show(_: Namespace) -> None:
    print("\n".join(table(saved_rows())))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each method, set and kind of images: mean and spread of the seeds, median time."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["on"], row["set"], row["method"], row["words"]), []).append(row)
    lines = [f"{'scored on':<10}{'set':<13}{'seeds':>5}{'mean':>9}{'std':>7}{'seconds':>9}   method"]
    for (on, name, method, words), runs in sorted(groups.items()):
        scores = [100 * row["accuracy"] for row in runs]
        spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        times = [row["training_seconds"] for row in runs if row["training_seconds"] is not None]
        seconds = f"{statistics.median(times):.1f}" if times else ""  # none: the features came from the cache
        lines.append(
            f"{on:<10}{name:<13}{len(runs):>5}{statistics.mean(scores):>9.2f}{spread:>7}{seconds:>9}"
            f"   {method} {words}".rstrip()
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
