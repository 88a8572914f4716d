"""One run, from arguments to a finished folder: open the data, build the model, train, evaluate, report.

For pretrain and finetune, which differ in their defaults.

Tests: tests/training/test_finetune.py.
"""

import atexit
import contextlib
import dataclasses
import gc
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import psutil
import transformers

from hf_vit.atomic_file import atomic_path, atomic_write, check_folder, full_disk_is_an_error
from hf_vit.checkpoints import ZeroHeadWarning
from hf_vit.errors import HFViTError, error_in_one_line, listed, report_error, warnings_as_notes
from hf_vit.image_processing import ImageProcessing
from hf_vit.problem_type import MULTI_LABEL, SINGLE_LABEL

from .build_model import build_model, set_problem
from .config.arguments import MASKED_PATCHES, RESOLVED_NAME, Arguments
from .config.parser import parse
from .data.dataset import ImageDataset
from .data.deduplication import Duplicate
from .data.normalize import Normalize
from .data.shards.streaming import ImageStream
from .data.sources import SPLIT_NAMES, own_cache
from .data.splits import ModelInput, open_splits, transforms
from .engine.accelerator import on_cpu
from .engine.checkpoints.checkpoint_io import START_FILES, advice, checkpoints, is_unused, write_json
from .engine.checkpoints.run_lock import LOCK_NAME
from .engine.checkpoints.save_outputs import PREDICTIONS_NAME
from .engine.distributed import all_ranks, handle_peer_exit
from .engine.head_probe import init_head
from .engine.planning.schedule import with_batch_of
from .engine.trainer import Trainer
from .folds import cross_validate, data_arguments
from .reporting import progress
from .reporting.run_page import write_run_page
from .run_report import gain_of_training, run_description, run_summary
from .sweep import sweep


DUPLICATES_NAME, HELD_OUT_NAME = "duplicates.json", "held_out.txt"
MAX_LOADING = 600.0  # seconds: a process that is older was not started for this run
INTERRUPTED = 130  # exit status of a command that Ctrl-C ended


def command(stage: str, argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, train, report; bad input is one line on stderr and exit status 2.

    Args:
        argv: None reads sys.argv, and `--time_limit` counts from the start of the process.
    """
    # Python looks through all objects several times when it ends, 1.2 s for those of torch and transformers.
    atexit.register(gc.freeze)
    loading = seconds_of_process() if argv is None else 0.0
    starts = iter([time.monotonic() - loading])  # the first of several runs also has the time before it
    arguments: Arguments | None = None

    def one_run(arguments: Arguments, stage: str, **more: Any) -> dict[str, Any]:
        return run(arguments, stage, started=next(starts, None), loading=loading, **more)

    try:
        with handle_peer_exit():
            arguments = parse(argv, stage)
            folder = Path(arguments.train.output_dir or ".")
            with full_disk_is_an_error(folder, advice(folder)):
                if arguments.train.sweep and not arguments.train.preview:
                    return sweep(arguments, stage, one_run)
                if is_cross_validation(arguments):
                    return cross_validate(arguments, stage, one_run)
                return one_run(arguments, stage)
    except KeyboardInterrupt:
        last = checkpoints(Path(arguments.train.output_dir)) if arguments and arguments.train.output_dir else []
        go_on = f"the last checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        print(f"interrupted; {go_on}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (HFViTError, OSError) as error:
        raise SystemExit(report_launch_error(error)) from None


def seconds_of_process() -> float:
    """Seconds since this process began, in which Python and its libraries were loaded."""
    seconds = time.time() - psutil.Process().create_time()
    return seconds if 0 < seconds < MAX_LOADING else 0.0  # the clock of the day may have been set meanwhile


def is_cross_validation(arguments: Arguments) -> bool:
    """Whether the arguments ask for one run per fold."""
    return arguments.data.folds is not None and arguments.data.fold is None and not arguments.train.preview


def run(arguments: Arguments, stage: str, **more: Any) -> dict[str, Any]:
    """`run_trainer`, returning only the facts."""
    return run_trainer(arguments, stage, **more)[1]


def run_trainer(
    arguments: Arguments,
    stage: str,
    more_follow: bool = False,
    swept: list[dict] | None = None,
    data: Any = None,
    started: float | None = None,
    loading: float = 0.0,
) -> tuple[Trainer, dict[str, Any]]:
    """Train and evaluate as the arguments say; the facts are empty if a signal ended the run early.

    Args:
        more_follow: other runs of this process come after. swept: results of earlier ones, for the facts.
        data: images and labels that Python holds, in place of the named data set.
        started: `time.monotonic()` from which the time limit counts; None: now. loading: see `Trainer`.
    """
    started = time.monotonic() if started is None else started
    if arguments.train.output_dir is None:
        raise HFViTError("--output_dir is missing: give the folder for the results")
    check_folder(arguments.train.output_dir)
    main = accelerate.PartialState(cpu=on_cpu(arguments.train)).is_main_process
    transformers.logging.set_verbosity(logging.WARNING if main else logging.ERROR)
    transformers.logging.disable_progress_bar()
    log = print if main else _silent
    sign = progress.SignOfLife(main and (arguments.train.disable_tqdm or not sys.stderr.isatty()))
    with sign, all_ranks():
        sign.activity = lambda: f"opening {arguments.data.dataset}"
        splits = open_splits(data_arguments(arguments, data), arguments.train.seed, log)
        train, evaluation = splits.train, splits.evaluation
        sign.activity = lambda: f"loading {arguments.model.model or 'the model'}"
        if arguments.train.loss != MASKED_PATCHES and isinstance(train, ImageDataset):
            arguments.train.for_problem(train.problem_type)  # raises before a model is loaded
            if arguments.model.head_init == "probe" and train.problem_type != SINGLE_LABEL:
                raise HFViTError(
                    f"--head_init probe fits classes, and these labels are for {train.problem_type}: leave it out"
                )
        with warnings_as_notes(log, leave_out=(ZeroHeadWarning,)):  # training starts from a head of zeros on purpose
            problem = getattr(train, "problem_type", SINGLE_LABEL)
            model, processor, base = build_model(arguments, train.label_names, log, problem)
        if arguments.train.loss != MASKED_PATCHES:
            set_problem(model, train, arguments.data.problem_type)
    processing = ImageProcessing.from_transformers(processor.to_dict())  # trained with what will be saved
    train_transform, eval_transform = transforms(arguments.data, ModelInput.of(model.config, processing), processing)
    fitting = with_batch_of(arguments.train, len(train), arguments.given)
    if fitting is not arguments.train:
        arguments = dataclasses.replace(arguments, train=fitting)
        batch = f"steps of {fitting.per_device_train_batch_size} on each device"
        log(f"note: the {len(train):,} training images are fewer than the default batch: {batch}")
    folder = Path(str(arguments.train.output_dir))
    resumes = arguments.train.resume_from_checkpoint and (
        isinstance(arguments.train.resume_from_checkpoint, str) or checkpoints(folder)
    )
    if arguments.model.head_init == "probe" and not resumes and not arguments.train.preview:
        fit_head(arguments, model, train.with_transform(eval_transform, arguments.train.seed), processor, sign, log)
    about = {
        "stage": stage,
        "recipe": arguments.origin,
        "base_model": base,
        "arguments": arguments.non_default(),
        "augmentation": train_transform.describe(),
        "data": {"config_name": arguments.data.dataset_config_name, "train_fraction": arguments.data.train_fraction},
    }
    if base is not None:  # the license of the base model's weights; None if unknown
        about["license"] = getattr(model, "source_license", None)
        if getattr(model, "non_commercial", False):
            log(f"note: the license of {base}, {', '.join(about['license'].values())}, is non-commercial")
    if swept:
        about["sweep"] = swept
    if arguments.data.deduplicate_against is not None:
        about["data"]["duplicates_left_out"] = len(splits.duplicates)
    trainer = Trainer(
        model,
        arguments.train,
        train.with_transform(train_transform, arguments.train.seed),
        evaluation.with_transform(eval_transform, arguments.train.seed),
        processor,
        about=about,
        callbacks=[KeepConfig(arguments, splits.duplicates, held_out_images(train, evaluation))],
        started=started,
        loading=loading,
    )
    if arguments.train.preview:
        return trainer, preview(trainer, train.label_names, log)
    if main:  # it opens some images, which the other processes need not do
        log(run_description(trainer, train, evaluation))
    with trainer.output_folder_lock():
        train_or_leave_nothing(trainer)
        facts = finish_training(trainer, log)
    if more_follow:  # end_training would also destroy the process group, which the next run needs
        for tracker in trainer.accelerator.trackers:
            tracker.finish()
    else:
        trainer.accelerator.end_training()
    return trainer, facts


def fit_head(arguments: Arguments, model, train, processor, sign: progress.SignOfLife, log) -> None:
    """Fit the new head to features of the frozen backbone, and log its accuracy on held-out training images."""

    def on_batch(done: int, total: int) -> None:
        sign.activity = lambda: f"computing features, batch {done} of {total}"

    normalize = Normalize.of(processor, model.config.num_channels)
    with sign:
        choice = init_head(
            model, train, normalize, arguments.train, own_cache(arguments.data.cache_dir), on_batch=on_batch
        )
    on_held_out = f", {choice['accuracy']:.2%} on {choice['n']:,} training images held out for the choice" * (
        choice["n"] > 0
    )
    log(f"head: logistic regression on frozen features of {len(train):,} images (C = {choice['C']:g}{on_held_out})")


def report_launch_error(error: Exception) -> int:
    """Print the error as one line; under torchrun, also write it to the file that torchrun reports from.

    `torchrun` and `accelerate launch` print tracebacks of their own after a process has failed. torchrun ends with the
    content of the file that it names to its processes; accelerate's single process has no such file.
    """
    text = f"error: {error_in_one_line(error)}"
    summary = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if summary:
        details = {"message": text, "extraInfo": {"timestamp": str(int(time.time())), "py_callstack": ""}}
        with contextlib.suppress(OSError):
            Path(summary).write_text(json.dumps({"message": details}), encoding="utf-8")
    elif "ACCELERATE_MIXED_PRECISION" in os.environ:
        note = "note: a traceback of the launcher follows; accelerate launch --quiet has none, nor has python -m"
        print(note, file=sys.stderr)
    return report_error(error)


def held_out_images(train: ImageDataset | ImageStream, evaluation: ImageDataset) -> list[str] | None:
    """Names of the images that were carved out of the training split; None if the data have an evaluation split.

    A later evaluation needs them, since all other images of the data were trained on.
    """
    if isinstance(train, ImageStream) or train.source.fingerprint != evaluation.source.fingerprint:
        return None
    return [evaluation.image_name(index) for index in range(len(evaluation))]


def preview(trainer: Trainer, names: list[str], log) -> dict[str, Any]:
    """Write the first batch as a PNG, without training."""
    from .reporting.preview import contact_sheet, undrawable  # not above: it imports matplotlib

    requested, normalize = trainer.args.preview, trainer.normalize
    folder = trainer.output_dir
    path = Path(requested) if isinstance(requested, str) else folder.with_name(f"{folder.name}_preview.png")
    sheet = contact_sheet(*trainer.first_batch(), names, normalize.mean, normalize.std)
    if trainer.accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            sheet.save(temporary, format="PNG")
        log(f"the first batch: {path}")
        if boxes := undrawable(names):
            log(f"note: no installed font draws {listed(boxes)}; install one that does, such as Noto Sans CJK")
    return {}


def train_or_leave_nothing(trainer: Trainer) -> None:
    """Train; on an error, remove the files of the start if there is no checkpoint yet."""
    folder = trainer.output_dir
    fresh = is_unused(folder)
    try:
        trainer.train()
    except HFViTError:
        if fresh and trainer.accelerator.is_main_process and not checkpoints(folder):
            for path in folder.iterdir():
                if path.name in START_FILES and path.name != LOCK_NAME:
                    path.unlink()
        raise


class KeepConfig(transformers.TrainerCallback):
    """Writes the resolved config, the duplicates and the held-out images into the output folder at the start."""

    def __init__(self, arguments: Arguments, duplicates: list[Duplicate], held_out: list[str] | None):
        self.arguments, self.duplicates, self.held_out = arguments, duplicates, held_out

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        atomic_write(folder / RESOLVED_NAME, self.arguments.to_yaml(), advice(folder))
        if self.held_out is not None:
            atomic_write(folder / HELD_OUT_NAME, "".join(f"{name}\n" for name in self.held_out), advice(folder))
        if self.arguments.data.deduplicate_against is not None:
            write_json(folder / DUPLICATES_NAME, [dataclasses.asdict(match) for match in self.duplicates])


def _silent(*words) -> None:
    """The `log` of processes other than the main one."""


# -- report --------------------------------------------------------------------------------------------------------


def finish_training(trainer: Trainer, log=print) -> dict[str, Any]:
    """Evaluate, save and report; after a signal only log how to resume."""
    if trainer.interrupted:
        log(
            f"stopped by a signal after step {trainer.state.global_step}; see {trainer.output_dir}: "
            "go on with --resume_from_checkpoint true"
        )
        return {}
    with full_disk_is_an_error(trainer.output_dir, advice(trainer.output_dir)), trainer.display:
        if trainer.last_evaluation is None or trainer.last_evaluation[0] != trainer.state.global_step:
            trainer.evaluate()
        tuned = tune_thresholds(trainer, log) if trainer.problem_type == MULTI_LABEL else {}
        if text := gain_of_training(trainer):
            log(text)
        trainer.save_model()
        if trainer.args.do_predict:
            save_predictions(trainer)
        facts = trainer.create_model_card(**tuned)
        write_run_page(trainer, facts, log)
    log(run_summary(facts, trainer.output_dir))
    if trainer.args.push_to_hub:
        try:
            log(f"uploaded to {trainer.push_to_hub()}")
        except HFViTError as error:
            log(
                f"not uploaded: {error}\n"
                f"the folder is complete; later: hf-vit push {trainer.output_dir} {trainer.name}"
            )
    return facts


def tune_thresholds(trainer: Trainer, log) -> dict[str, Any]:
    """Tune the labels' thresholds on the evaluation images, unless these are a test split, whose scores would rise.

    Returns:
        Entries for the facts.
    """
    split = str(getattr(trainer.eval_dataset, "split", "")).split("[")[0].strip().lower()
    if SPLIT_NAMES.get(split) == "test":
        log("labels count from 0.5 on: thresholds are not tuned on a test split; give --dev_fraction 0.1 to tune them")
        return {}
    count = trainer.tune_thresholds()
    lowest, highest = min(trainer.model.config.label_thresholds), max(trainer.model.config.label_thresholds)
    log(f"thresholds of the labels, with the highest F1 on {count:,} images: {lowest:.3f} to {highest:.3f}")
    return {"thresholds": {"split": getattr(trainer.eval_dataset, "split", "evaluation"), "n": count}}


def save_predictions(trainer: Trainer) -> None:
    """Write predictions.npz: `logits` (N, K), `labels` (N,) or (N, K), and `names` (N,), in the order of the data.

    Evaluation images that cannot be read are left out.
    """
    dataset = trainer.eval_dataset
    evaluated = trainer.evaluator.run(dataset, keep_outputs=True)
    if trainer.accelerator.is_main_process:
        names = np.array([dataset.image_name(index) for index in evaluated.index.tolist()])
        with atomic_path(trainer.output_dir / PREDICTIONS_NAME) as temporary:
            np.savez(temporary, logits=evaluated.logits, labels=evaluated.labels, names=names)
