"""The stages of a study: what a run executes in its folder, by the functions behind the commands.

For study.py. Every stage writes a facts.json at its end: a folder that has one is finished.

Tests: tests/training/test_study.py.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.errors import HFViTError

from ..config.arguments import Arguments
from ..config.parser import parse
from ..data.dataset import ImageDataset, open_dataset, take_fraction
from ..engine.checkpoints.checkpoint_io import checkpoints, read_json
from ..evaluation.classifier import open_classifier
from ..evaluation.evaluate_classifier import create_context, score_dataset
from ..evaluation.features import compute_features
from ..evaluation.few_shot import few_shot
from ..evaluation.label_mapping import match_labels
from ..reporting.facts import FACTS_NAME, write_facts
from ..train import run
from .baselines import run_baseline
from .design import StudyRun
from .initialization.dyck import warm_up
from .initialization.mimetic import mimetic_


RUN_DEFAULTS = {
    "eval_split": "test",
    "resume_from_checkpoint": "true",
    "save_total_limit": 1,
    "disable_tqdm": True,
}
TRAINED = ("pretrain", "finetune")


def execute_run(study_run: StudyRun, folder: Path) -> dict[str, Any]:
    """The facts of a run: read if it is finished, else run or continued.

    Raises:
        HFViTError: the stage's errors; a signal stopped the run.
    """
    state = accelerate.PartialState()
    finished = (folder / FACTS_NAME).is_file()
    state.wait_for_everyone()  # all have looked before the first one writes
    if finished:
        return read_json(folder / FACTS_NAME)
    facts = STAGES[study_run.stage](folder, dict(study_run.options))
    if not facts:
        raise HFViTError("stopped by a signal: run the same command again to continue")
    if state.is_main_process:
        for checkpoint in checkpoints(folder):  # a finished run needs none
            shutil.rmtree(checkpoint)
    state.wait_for_everyone()
    return facts


def words(options: dict[str, Any]) -> list[str]:
    """A stage's options as the arguments of a training command."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, dict):
            words += [f"--{name}", *(f"{key}={item}" for key, item in value.items())] if value else []
        elif value is not None:
            words += [f"--{name}", *(str(item) for item in (value if isinstance(value, list | tuple) else [value]))]
    return words


def train(stage: str) -> Callable[[Path, dict[str, Any]], dict[str, Any]]:
    """`training.pretrain` or `training.finetune`; `baseline: {model_type: ...}` trains that instead of ours."""

    def stage_of(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
        arguments = run_arguments(stage, folder, options)
        if options.get("baseline") is not None:
            return run_baseline(arguments, stage, options["baseline"])
        return run(arguments, stage, more_follow=True)

    return stage_of


def run_arguments(stage: str, folder: Path, options: dict[str, Any]) -> Arguments:
    """The arguments of a training run; it is always scored on the test split, even if there is a validation split.

    Raises:
        HFViTError: an option that is out of range.
    """
    own_options = {name: value for name, value in options.items() if name != "baseline"}
    return parse(words(own_options | RUN_DEFAULTS | {"output_dir": folder}), stage)


def probe_run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Few-shot accuracy of a model's frozen features: ridge regression, the mean of three draws of images."""
    classifier = open_classifier(str(options["model"]))
    context = create_context(False, batch_size=128)
    train = open_dataset(options["dataset"], split="train")
    test = open_dataset(options["dataset"], split="test", label_names=train.label_names)
    if len(train) > options["images"]:
        train = train.per_class(max(1, options["images"] // len(train.label_names)), seed=0)
    learned, scored = (compute_features(classifier, part, context, folder / "features") for part in (train, test))
    rows = few_shot(learned.features, learned.labels, scored.features, scored.labels, shots=[options["shots"]])
    value = float(np.mean([row["accuracy"] for row in rows]))
    shutil.rmtree(folder / "features", ignore_errors=True)
    result = {"metric": "few_shot_accuracy", "value": value, "n": len(scored.labels), "shots": options["shots"]}
    return finish_run(folder, {"results": [result]})


def start(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A model that fine-tuning starts from: `how` is mimetic, or dyck with its `steps` and `batch`."""
    facts: dict[str, Any] = {"start": options["how"]}
    if accelerate.PartialState().is_main_process:
        seed = options["seed"]
        torch.manual_seed(seed)
        config = HFViTConfig(image_size=options["image_size"], num_labels=0, **options["set"])
        model = HFViTForImageClassification(config)
        if options["how"] == "mimetic":
            mimetic_(model, seed)
        else:
            losses = warm_up(model, seed, options["steps"], options["batch"])
            facts |= {"first_loss": losses[0], "last_loss": losses[-1], "steps": len(losses)}
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
    return finish_run(folder, facts)


def subset(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Every second class of a data set, from the first or from the second, as parquet files of train and test."""
    if accelerate.PartialState().is_main_process:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        names = None
        for split in ("train", "test"):
            whole = open_dataset(options["dataset"], split=split, label_names=names)
            names = whole.label_names
            classes = list(range(options["first"], len(names), 2))
            rows = np.flatnonzero(np.isin(whole.labels, classes))
            number_of = {label: number for number, label in enumerate(classes)}
            write_images(folder, split, whole, rows, [number_of[int(whole.labels[row])] for row in rows],
                           [names[label] for label in classes])  # fmt: skip
    return finish_run(folder, {"classes": "every second"})


def pseudo_labels(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A teacher's labels for the images outside the labelled part, as parquet: both parts in train, and the test.

    Noisy Student (arXiv:1911.04252): of every class the images with the highest confidence, at least `confidence`;
    `keep` in all. If a class has fewer, its images are repeated.
    """
    whole = open_dataset(options["dataset"], split="train")
    names = whole.label_names
    test = open_dataset(options["dataset"], split="test", label_names=names)
    labelled = np.isin(whole.rows, take_fraction(whole, options["labelled"]).rows)
    known, others = np.flatnonzero(labelled), np.flatnonzero(~labelled)
    if not len(others):
        raise HFViTError("pseudo-labels are for images outside the labelled part: lower `labelled` below 1")
    classifier, context = open_classifier(str(options["model"])), create_context(False, batch_size=250)
    match = match_labels(names, classifier.label_names)
    logits = score_dataset(classifier, whole.select(others), match, context).logits
    facts: dict[str, Any] = {}
    if context.accelerator.is_main_process:
        if logits is None:
            raise HFViTError(f"{len(others):,} images are too many for pseudo-labels at once: give fewer")
        probabilities = torch.from_numpy(logits).softmax(1).numpy()[:, match.places]
        rows, labels = surest(probabilities, options["keep"], options["confidence"])
        (folder / "data").mkdir(parents=True, exist_ok=True)
        train = np.concatenate([whole.labels[known], labels])
        write_images(folder, "train", whole, np.concatenate([known, others[rows]]), train.tolist(), names)
        write_images(folder, "test", test, np.arange(len(test)), test.labels.tolist(), names)
        right = float((whole.labels[others[rows]] == labels).mean()) if len(rows) else None
        facts = {"pseudo_labels": len(rows), "pseudo_labels_right": right}
    return finish_run(folder, facts)


def surest(probabilities: np.ndarray, keep: int, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels of the images with the highest confidence, the same number for each class.

    Args:
        probabilities: (N, K). keep: images of all classes together. confidence: least probability.
    """
    rows, labels, per_class = [], [], max(1, keep // probabilities.shape[1])
    for label in range(probabilities.shape[1]):
        candidates = np.flatnonzero((probabilities.argmax(1) == label) & (probabilities[:, label] >= confidence))
        candidates = candidates[np.argsort(-probabilities[candidates, label], kind="stable")][:per_class]
        if len(candidates):
            candidates = np.resize(candidates, per_class)
        rows.append(candidates)
        labels.append(np.full(len(candidates), label))
    return np.concatenate(rows), np.concatenate(labels)


def write_images(
    folder: Path, split: str, dataset: ImageDataset, rows: np.ndarray, labels: list[int], names: list[str]
) -> None:
    """Write the images of these rows, lossless, with these labels, as one parquet file in `folder`/data."""
    import datasets  # not above: --help need not wait for it

    images = []
    for row in rows:
        file = io.BytesIO()
        dataset.read(int(row))[0].save(file, format="PNG", compress_level=1)
        images.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))


def finish_run(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write facts.json: the run is done."""
    if accelerate.PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_facts(folder, facts)
    accelerate.PartialState().wait_for_everyone()
    return read_json(folder / FACTS_NAME)


STAGES: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "pretrain": train("pretrain"),
    "finetune": train("finetune"),
    "probe": probe_run,
    "start": start,
    "subset": subset,
    "pseudo_labels": pseudo_labels,
}
