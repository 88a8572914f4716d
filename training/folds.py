"""Cross-validation: each of K stratified parts of the training images is held out once, in a run of its own.

For train.py. Run k is that of `--folds K --fold k`, in OUTPUT_DIR/fold-k. A finished run is not repeated, so the same
command with --resume_from_checkpoint continues after an interruption. folds.json is the summary. On request the models
are combined, by averaging their weights (Wortsman et al. 2022, arXiv:2203.05482) or their logits.
"""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from hf_vit.atomic_file import atomic_path
from hf_vit.errors import HFViTError
from hf_vit.hub.model_card import write_card
from hf_vit.image_processing import ImageProcessing
from hf_vit.transformers_classifiers import num_channels

from .config.arguments import Arguments, DataArguments, TrainArguments
from .data.dataset import ImageDataset, holds_classes
from .data.splits import open_splits, open_test_split, open_train
from .data.transforms import EvalTransform
from .engine.accelerator import create_accelerator, on_cpu
from .engine.checkpoints.checkpoint_io import advice, write_json
from .engine.checkpoints.save_outputs import PREDICTIONS_NAME, place_model
from .engine.trainer import Trainer
from .metrics.metric_state import FRACTIONS, MetricState
from .reporting import progress
from .reporting.facts import metric_rows, write_facts
from .reporting.run_page import write_folds_page
from .sweep import check_output_folder, finished, with_part_of_time, with_values


SUMMARY_NAME, LOGITS_NAME, OUT_OF_FOLD_NAME = "folds.json", "ensemble.npz", "out_of_fold.npz"
AVERAGE, ENSEMBLE = "average", "ensemble"


def fold_arguments(arguments: Arguments, fold: int) -> Arguments:
    """The arguments of the run that holds out one part."""
    folder = Path(str(arguments.train.output_dir)) / f"fold-{fold}"
    fixed = {"combine_folds": "none", "eval_split": None, "eval_file": None, "resume_from_checkpoint": True}
    fixed |= {"do_predict": True}  # the predictions become those of out_of_fold.npz
    arguments = with_part_of_time(arguments, arguments.data.folds)
    return with_values(arguments, fixed | {"fold": fold, "output_dir": str(folder)})


def cross_validate(
    arguments: Arguments, stage: str, run: Callable[..., dict[str, Any]], data: Any = None
) -> dict[str, Any]:
    """Run every fold and return the summary; an empty one if a signal ended a run.

    Args:
        run: `run(arguments, stage, more_follow=...) -> facts`. data: images and labels in memory.

    Raises:
        HFViTError: an output folder with other content; an error of a run, with its fold.
    """
    check_output_folder(arguments)
    folder, count = Path(str(arguments.train.output_dir)), arguments.data.folds
    main = PartialState(cpu=on_cpu(arguments.train)).is_main_process
    combine = arguments.train.combine_folds
    named = data_arguments(arguments, data)
    if combine == ENSEMBLE:  # checked before hours are spent
        evaluation = open_test_split(named)
        if evaluation is None:
            raise HFViTError(
                "--combine_folds ensemble needs images that no fold trains on: give --eval_split or --eval_file"
            )
        if not holds_classes(evaluation):
            raise HFViTError("--combine_folds ensemble is for one class an image: give --combine_folds average")
    runs = [fold_arguments(arguments, fold) for fold in range(1, count + 1)]
    measured: list[dict[str, Any]] = []
    folders = [Path(str(fold_run.train.output_dir)) for fold_run in runs]
    for fold, fold_run in enumerate(runs, start=1):
        if main:
            print(f"fold {fold} of {count}: {fold_run.train.output_dir}")
        try:
            facts = finished(fold_run)
            if facts is not None:
                check_same_images(facts, fold_run, data)
            else:
                facts = run(fold_run, stage, more_follow=fold < count or combine != "none")
        except HFViTError as error:
            raise HFViTError(f"fold {fold} of {count}: {error}") from error
        if not facts:
            return {}
        measured.append(facts)
    summary = summary_of(measured)
    if combine != "none":
        summary["combined"] = combined(arguments, folders, named)
    if main:
        write_out_of_fold(folder, folders, measured)
        write_json(folder / SUMMARY_NAME, summary)
        if combine == AVERAGE:
            write_facts(folder, facts_of_average(arguments, measured, summary, named))
            write_card(folder)
        if arguments.train.report:
            write_folds_page(folder, folders, lambda: [images_of_fold(fold_run, data) for fold_run in runs], summary)
        print(in_words(summary, folder))
    return summary


def data_arguments(arguments: Arguments, data: Any) -> DataArguments:
    """The data arguments; `data`, images and labels in memory, takes the place of a data set's name."""
    return arguments.data if data is None else dataclasses.replace(arguments.data, dataset=data)


def images_of_fold(arguments: Arguments, data: Any) -> ImageDataset:
    """The images that a fold is evaluated on."""
    return open_splits(data_arguments(arguments, data), arguments.train.seed, lambda text: None).evaluation


def check_same_images(facts: dict[str, Any], arguments: Arguments, data: Any) -> None:
    """Raise HFViTError if a finished fold was trained on other images than it would be now."""
    train = open_splits(data_arguments(arguments, data), arguments.train.seed, lambda text: None).train
    if train.fingerprint != facts["data"]["fingerprint"]:
        raise HFViTError(
            f"{arguments.train.output_dir} was trained on other images: restore them, or give another --output_dir"
        )


def summary_of(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each score over the folds, and the folds one by one."""
    names = [row["metric"] for row in measured[0]["results"]]
    runs = [
        {"fold": fold, "n": facts["results"][0]["n"], **{row["metric"]: row["value"] for row in facts["results"]}}
        for fold, facts in enumerate(measured, start=1)
    ]
    scores = {}
    for name in names:
        values = [run[name] for run in runs if name in run]
        scores[name] = {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
    return {"folds": len(runs), "n": sum(run["n"] for run in runs), "metrics": scores, "runs": runs}


def write_out_of_fold(folder: Path, runs: list[Path], measured: list[dict[str, Any]]) -> None:
    """Write out_of_fold.npz: the logits of each image from the run that was not trained on it, fold after fold.

    `names` (N,), `logits` (N, K), `labels` (N,) or (N, K), `fold` (N,) from 1, `label_names` (K,). Unreadable images
    are left out.
    """
    parts = []
    for run in runs:
        with np.load(run / PREDICTIONS_NAME) as saved:
            parts.append({name: saved[name] for name in ("names", "logits", "labels")})
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays["fold"] = np.repeat(np.arange(1, len(parts) + 1), [len(part["labels"]) for part in parts])
    arrays["label_names"] = np.array(measured[0]["data"]["label_names"])
    with atomic_path(folder / OUT_OF_FOLD_NAME, advice(folder)) as temporary:
        np.savez(temporary, **arrays)


def combined(arguments: Arguments, folders: list[Path], data: Any) -> dict[str, Any]:
    """Combine the folds' models, and score the result on images that none of them was trained on, if there are any.

    Returns:
        {"kind": "average" or "ensemble", "results": rows as in facts.json}.
    """
    kind, folder = arguments.train.combine_folds, Path(str(arguments.train.output_dir))
    evaluation = open_test_split(data)
    if kind == AVERAGE:
        model = averaged(folders)
        if PartialState().is_main_process:
            place_model(folder, model, model.state_dict(), AutoImageProcessor.from_pretrained(folders[0]))
        PartialState().wait_for_everyone()
        scores, count = {}, 0
        if evaluation is not None:
            scores, (logits, _) = predict(arguments.train, model, folders[0], evaluation)
            count = len(logits)
    else:
        assert evaluation is not None  # cross_validate has checked
        outputs = []
        for folder_of_fold in folders:
            model = AutoModelForImageClassification.from_pretrained(folder_of_fold)
            outputs.append(predict(arguments.train, model, folder_of_fold, evaluation)[1])
        logits, labels = np.mean([logits for logits, _ in outputs], axis=0), outputs[0][1]
        accelerator = create_accelerator(arguments.train)
        state = MetricState(accelerator.device, calibration=False)
        state.update(*(torch.from_numpy(part).to(accelerator.device) for part in (logits, labels)))
        scores = {name: value for name, (value, _) in state.reduce(accelerator).scores().items()}
        count = len(logits)
        if PartialState().is_main_process:
            with atomic_path(folder / LOGITS_NAME, advice(folder)) as temporary:
                np.savez(temporary, logits=logits, labels=labels)
    rows = []
    if evaluation is not None:
        rows = metric_rows(scores, evaluation.name, evaluation.split, count, arguments.train.seed)
    PartialState().destroy_process_group()
    return {"kind": kind, "results": rows}


def facts_of_average(
    arguments: Arguments, measured: list[dict[str, Any]], summary: dict[str, Any], data: Any
) -> dict[str, Any]:
    """facts.json of the averaged model: what all folds share, the sum of their times, and the model's own scores."""
    first, results, folder = measured[0], summary["combined"]["results"], Path(str(arguments.train.output_dir))
    train = open_train(data)[1]
    about = {name: first["data"][name] for name in ("name", "config_name", "label_names") if name in first["data"]}
    about |= {"train_split": train.split, "train_images": len(train), "fingerprint": train.fingerprint}
    about["unreadable_images"] = max(facts["data"]["unreadable_images"] for facts in measured)
    training = {
        name: first["training"][name]
        for name in ("stage", "recipe", "augmentation", "seed", "steps", "epochs", "global_batch_size")
        if name in first["training"]
    }
    training["arguments"] = arguments.non_default()
    training["seconds"] = sum(facts["training"]["seconds"] for facts in measured)
    same = ("task", "environment", "license", "license_name", "license_link")
    compute = {
        name: sum(facts["compute"][name] for facts in measured)
        for name in ("device_hours", "train_exaflops")
        if name in first["compute"]
    }
    return {
        **{name: first[name] for name in same if name in first},
        "model": first["model"] | {"name": folder.resolve().name},
        "data": about,
        "training": training,
        "compute": compute,
        "results": results,
        "cross_validation": {name: summary[name] for name in ("folds", "n", "metrics")},
        "figures": [],
    }


def averaged(folders: list[Path]) -> PreTrainedModel:
    """The model whose weights are the mean of those in the folders; integer buffers are the first model's."""
    model = AutoModelForImageClassification.from_pretrained(folders[0])
    total = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for folder in folders[1:]:
        state = AutoModelForImageClassification.from_pretrained(folder).state_dict()
        for name in total:
            total[name] += state[name].double()
    model.load_state_dict({name: tensor / len(folders) for name, tensor in total.items()}, strict=False)
    return model.eval()


def predict(
    args: TrainArguments, model: PreTrainedModel, folder: Path, dataset: ImageDataset
) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray]]:
    """Scores and (logits (N, K), labels (N,)) of a model, on images prepared by the processor in its folder."""
    processor = AutoImageProcessor.from_pretrained(folder)
    processing = ImageProcessing.from_transformers(processor.to_dict())
    view = EvalTransform.of(processing, processing.output_size, num_channels(model.config))
    # Only devices, precision and batch sizes matter; the rest would be checked against a training that is not run.
    args = dataclasses.replace(
        args, max_steps=1, step_limit=None, warmup_steps=0, cooldown_steps=0, unfreeze_every=0, mixup_off_steps=0,
        image_size_schedule={}, batch_size_schedule={}, card_examples=0, report_to=["none"],
    )  # fmt: skip
    trainer = Trainer(model, args, None, None, processor)
    outputs = trainer.predict(dataset.with_transform(view, args.seed), "eval")
    return outputs.metrics, (outputs.predictions, outputs.label_ids)


def in_words(summary: dict[str, Any], folder: Path) -> str:
    """The summary as a table."""
    count = summary["folds"]

    def score(name: str, value: float) -> str:
        return f"{value:.2%}" if name in FRACTIONS else f"{value:.4f}"

    rows = []
    for name, metric in summary["metrics"].items():
        values = ", ".join(score(name, run[name]) for run in summary["runs"] if name in run)
        rows.append(
            (name.replace("_", " "), f"{score(name, metric['mean'])} ± {score(name, metric['std'])} ({values})")
        )
    for row in summary.get("combined", {}).get("results", []):
        name = f"{row['metric'].replace('_', ' ')} of the {summary['combined']['kind']}"
        where = f"on {row['n']:,} images ({row['dataset']}, {row['split']})"
        rows.append((name, f"{score(row['metric'], row['value'])} {where}"))
    rows.append(("folder", str(folder)))
    head = f"\n{count} folds, {summary['n']:,} images held out once: mean ± standard deviation over folds (each)\n"
    return head + progress.two_columns(rows)
