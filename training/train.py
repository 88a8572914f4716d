"""One run, from arguments to a finished folder: open the data, build the model, train, evaluate, report.

For pretrain and finetune, which differ in their defaults and in what they may start from.

Tests: tests/training/test_finetune.py.
"""

import contextlib
import dataclasses
import difflib
import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.atomic_file import atomic_path, atomic_write, check_folder, full_disk_is_an_error
from hf_vit.checkpoints import Loaded, UnusableHeadError, ZeroHeadWarning, read_checkpoint
from hf_vit.errors import HFViTError, error_in_one_line, listed, report_error, warnings_as_notes
from hf_vit.hub.access import check_hub_access
from hf_vit.image_io import check_channels, open_image
from hf_vit.image_processing import ImageProcessing
from hf_vit.problem_type import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    output_scores,
    problem_type_of,
    thresholds_of,
)
from hf_vit.transformers_classifiers import (
    freeze_backbone,
    load_other_classifier,
    num_channels,
    other_classifier_class,
)

from .config.arguments import RESOLVED_NAME, Arguments, DataArguments
from .config.parser import arguments_of, parse
from .config.vit_only import check_vit_only
from .data.dataset import ImageDataset, holds_classes
from .data.deduplication import Duplicate, find_duplicates
from .data.normalize import Normalize
from .data.sources import SPLIT_NAMES, SyntheticSource, own_cache
from .data.splits import ModelInput, image_processing_for, open_splits, transforms
from .data.statistics import labels_in_words, sample_of_sizes
from .data.streaming import ImageStream
from .data.targets import target_scale
from .engine.accelerator import on_cpu
from .engine.checkpoint_io import START_FILES, advice, checkpoints, is_unused, write_json
from .engine.distributed import all_ranks, handle_peer_exit
from .engine.head_probe import init_head
from .engine.masked_patch_prediction import MASKED_PATCHES, masked_model
from .engine.run_lock import LOCK_NAME
from .engine.schedule import with_batch_of
from .engine.trainer import Trainer
from .folds import AVERAGE, cross_validate
from .reporting import progress
from .reporting.facts import public_name
from .sweep import sweep


PREDICTIONS_NAME, DUPLICATES_NAME, HELD_OUT_NAME = "predictions.npz", "duplicates.json", "held_out.txt"
MAX_LAYERS, MAX_WIDTH = 1_000, 1_000_000  # of a network that is built before its memory is known
LABELS_IN_WORDS = {SINGLE_LABEL: "classes", MULTI_LABEL: "labels", REGRESSION: "numbers"}
UNEQUAL = 10  # times as many images in the largest class as in the smallest
COMPARED = 500  # images of each split that are looked through for duplicates before training
IN_MEMORY = "in memory"  # what arguments and facts call data that Python holds
INTERRUPTED = 130  # exit status of a command that Ctrl-C ended


def command(stage: str, argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, train, report; bad input is one line on stderr and exit status 2."""
    arguments: Arguments | None = None
    try:
        with handle_peer_exit():
            arguments = parse(argv, stage)
            folder = Path(arguments.train.output_dir or ".")
            with full_disk_is_an_error(folder, advice(folder)):
                if arguments.train.sweep and not arguments.train.preview:
                    return sweep(arguments, stage, run)
                if is_cross_validation(arguments):
                    return cross_validate(arguments, stage, run)
                return run(arguments, stage)
    except KeyboardInterrupt:
        last = checkpoints(Path(arguments.train.output_dir)) if arguments and arguments.train.output_dir else []
        go_on = f"the last checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        print(f"interrupted; {go_on}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (HFViTError, OSError) as error:
        raise SystemExit(report_launch_error(error)) from None


def is_cross_validation(arguments: Arguments) -> bool:
    """Whether the arguments mean a run for each fold."""
    return arguments.data.folds is not None and arguments.data.fold is None and not arguments.train.preview


@dataclasses.dataclass
class TrainingResult:
    """What a run from Python returns.

    Attributes:
        metrics: of the evaluation at the end, by name; empty if Ctrl-C or SIGTERM ended the run early.
        model: with the weights that were saved, in evaluation mode. processor: its image processor.
        output_dir: weights, processor, card, facts and checkpoints. facts: the content of facts.json.
    """

    metrics: dict[str, float]
    model: transformers.PreTrainedModel
    processor: Any
    output_dir: Path
    facts: dict[str, Any]

    @torch.no_grad()
    def predict(self, images: Sequence[Any], batch_size: int = 32):
        """Classify images.

        Args:
            images: paths, or PIL images.

        Returns:
            DataFrame with one row an image: `image`, `label`, `score`, and the probability of each class by name. Of
            several labels `label` is a list, those at or above their threshold, and each score is by itself. Of a
            regression `image` and each number by name, in the unit of the training targets.

        Raises:
            HFViTError: an image cannot be read.
        """
        import pandas  # with `datasets`; nothing else here needs it

        device, names = next(self.model.parameters()).device, self.model.config.id2label
        config, rows = self.model.config, []
        problem, channels = problem_type_of(config), num_channels(config)
        least_scores = thresholds_of(config)
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            opened = [open_image(image, num_channels=channels) for image in batch]
            pixels = self.processor(images=opened, return_tensors="pt")["pixel_values"].to(device)
            for image, scores in zip(batch, output_scores(config, self.model(pixels).logits.float()).tolist()):
                by_class = {names[index]: score for index, score in enumerate(scores)}
                row = {"image": image}
                if problem == MULTI_LABEL:
                    there = [name for name, least in zip(by_class, least_scores) if by_class[name] >= least]
                    row |= {"label": there, "score": max(scores)}
                elif problem == SINGLE_LABEL:
                    label = max(by_class, key=by_class.__getitem__)
                    row |= {"label": label, "score": by_class[label]}
                rows.append(row | by_class)
        return pandas.DataFrame(rows)


def train_from_python(stage: str, options: dict[str, Any]) -> TrainingResult:
    """The run that a command line with these options would be; `finetune(...)` and `pretrain(...)` of `training`.

    Args:
        options: by the names of the command line. `dataset` may also be a DataFrame, a list of (path or image, label),
            a `datasets.Dataset` or DatasetDict. Without `output_dir`, a new folder in `runs/`. With `folds`, the
            metrics are means over the folds (and `NAME_std` their deviations), and the model is that of
            `combine_folds="average"`, else the last fold's; `facts` is the summary.

    Raises:
        HFViTError: bad input.
    """
    options = dict(options)
    data = options.get("dataset")
    if data is not None and not isinstance(data, str | Path):
        options["dataset"] = IN_MEMORY
    if isinstance(options.get("model"), Path):
        options["model"] = str(options["model"])
    if isinstance(options.get("dataset"), Path):
        options["dataset"] = str(options["dataset"])
    options["output_dir"] = str(options.get("output_dir") or unused_folder(stage))
    arguments = arguments_of(options, stage)
    trainers: list[Trainer] = []
    held = data if options.get("dataset") == IN_MEMORY else None

    def one_run(arguments: Arguments, stage: str, **more: Any) -> dict[str, Any]:
        trainer, facts = run_trainer(arguments, stage, data=held, **more)
        trainers.append(trainer)
        return facts

    with handle_peer_exit():
        if is_cross_validation(arguments):
            return result_of_folds(arguments, cross_validate(arguments, stage, one_run, held))
        facts = sweep(arguments, stage, one_run) if arguments.train.sweep else one_run(arguments, stage)
    trainer = trainers[-1]
    model = trainer.model
    if facts:  # what was saved, which is the average of the weights where one is kept
        model = type(model).from_pretrained(trainer.output_dir).to(trainer.accelerator.device)
    metrics = {row["metric"]: row["value"] for row in facts.get("results", [])}
    return TrainingResult(metrics, model.eval(), trainer.image_processor, trainer.output_dir, facts)


def result_of_folds(arguments: Arguments, summary: dict[str, Any]) -> TrainingResult:
    """What a cross-validation from Python returns: means of the metrics; the averaged model, or the last fold's."""
    folder = Path(str(arguments.train.output_dir))
    if not summary:
        last = next(iter(sorted(folder.glob("fold-*"), key=lambda path: int(path.name[5:]), reverse=True)), folder)
        raise HFViTError(f"stopped by a signal in {last}: go on with resume_from_checkpoint=True")
    own = folder if arguments.train.combine_folds == AVERAGE else folder / f"fold-{summary['folds']}"
    model = transformers.AutoModelForImageClassification.from_pretrained(own).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(own)
    metrics = {name: found["mean"] for name, found in summary["metrics"].items()}
    metrics |= {f"{name}_std": found["std"] for name, found in summary["metrics"].items()}
    return TrainingResult(metrics, model, processor, folder, summary)


def unused_folder(stage: str) -> Path:
    """The first of runs/finetune-1, runs/finetune-2, ... that is not there."""
    return next(path for n in itertools.count(1) if not (path := Path("runs") / f"{stage}-{n}").exists())


def run(arguments: Arguments, stage: str, **more: Any) -> dict[str, Any]:
    """`run_trainer` for who needs the facts alone."""
    return run_trainer(arguments, stage, **more)[1]


def run_trainer(
    arguments: Arguments,
    stage: str,
    more_follow: bool = False,
    swept: list[dict] | None = None,
    data: Any = None,
) -> tuple[Trainer, dict[str, Any]]:
    """Train and evaluate as the arguments say; the facts are empty if a signal ended the run early.

    Args:
        more_follow: other runs of this process come after. swept: results of earlier ones, for the facts.
        data: images and labels that Python holds, in place of the named data set.
    """
    started = time.monotonic()
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
        named = arguments.data if data is None else dataclasses.replace(arguments.data, dataset=data)
        splits = open_splits(named, arguments.train.seed, log)
        train, evaluation = splits.train, splits.evaluation
        sign.activity = lambda: f"loading {arguments.model.model or 'the model'}"
        if arguments.train.loss != MASKED_PATCHES and isinstance(train, ImageDataset):
            arguments.train.for_problem(train.problem_type)  # what cannot be is said before a model is loaded
            if arguments.model.head_init == "probe" and train.problem_type != SINGLE_LABEL:
                raise HFViTError(
                    f"--head_init probe fits classes, and these labels are for {train.problem_type}: leave it out"
                )
        with warnings_as_notes(log, leave_out=(ZeroHeadWarning,)):  # training makes a head of zeros its own
            problem = getattr(train, "problem_type", SINGLE_LABEL)
            model, processor, base = build_model(arguments, train.label_names, log, problem)
        if arguments.train.loss != MASKED_PATCHES:
            set_problem(model, train, arguments.data.problem_type)
    processing = ImageProcessing.from_transformers(processor.to_dict())  # what is saved is what is trained with
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
    if base is not None:  # the license of the weights that it starts from, or none where that is not known
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
    )
    if arguments.train.preview:
        return trainer, preview(trainer, train.label_names, log)
    if main:  # which looks at images
        log(run_description(trainer, train, evaluation))
    with trainer.output_folder_lock():
        train_or_leave_nothing(trainer)
        facts = finish_training(trainer, log)
    if more_follow:  # ending the training would end the processes' group
        for tracker in trainer.accelerator.trackers:
            tracker.finish()
    else:
        trainer.accelerator.end_training()
    return trainer, facts


def fit_head(arguments: Arguments, model, train, processor, sign: progress.SignOfLife, log) -> None:
    """Fit the new head to features of the frozen backbone, and say how good it is on images that it did not see."""

    def on_batch(done: int, total: int) -> None:
        sign.activity = lambda: f"computing features, batch {done} of {total}"

    normalize = Normalize.of(processor, model.config.num_channels)
    with sign:
        found = init_head(
            model, train, normalize, arguments.train, own_cache(arguments.data.cache_dir), on_batch=on_batch
        )
    on_held_out = f", {found['accuracy']:.2%} on {found['n']:,} training images held out for the choice" * (
        found["n"] > 0
    )
    log(f"head: logistic regression on frozen features of {len(train):,} images (C = {found['C']:g}{on_held_out})")


def report_launch_error(error: Exception) -> int:
    """Print the error as one line; under a launcher, also where it looks for a process's last words.

    `torchrun` and `accelerate launch` print tracebacks of their own after a process has failed. torchrun ends with
    what stands in the file that it names to its processes; accelerate's single process has no such file.
    """
    text = f"error: {error_in_one_line(error)}"
    summary = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if summary:
        details = {"message": text, "extraInfo": {"timestamp": str(int(time.time())), "py_callstack": ""}}
        with contextlib.suppress(OSError):
            Path(summary).write_text(json.dumps({"message": details}), encoding="utf-8")
    elif "ACCELERATE_MIXED_PRECISION" in os.environ:
        note = "note: the launcher adds a traceback of its own; one process needs no launcher: python -m"
        print(note, file=sys.stderr)
    return report_error(error)


def held_out_images(train: ImageDataset | ImageStream, evaluation: ImageDataset) -> list[str] | None:
    """Names of the images that were carved out of the training split; None where the data have a split of their own.

    Whoever measures the model later needs them: every other image of the data was trained on.
    """
    if isinstance(train, ImageStream) or train.source.fingerprint != evaluation.source.fingerprint:
        return None
    return [evaluation.image_name(index) for index in range(len(evaluation))]


def preview(trainer: Trainer, names: list[str], log) -> dict[str, Any]:
    """Write the first batch as a PNG, and train nothing."""
    from .reporting.preview import contact_sheet, undrawable  # not above: with it comes matplotlib

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
    """Train; on invalid input, remove what the start wrote if there is no checkpoint yet."""
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
    """Only the first process speaks."""


def data_facts(train: ImageDataset | ImageStream, evaluation: ImageDataset) -> list[tuple[str, str]]:
    """Classes, sizes and duplicates of the images; of a stream, which has not been read, the classes."""
    if not isinstance(train, ImageDataset):
        return [("classes", listed(train.label_names))]
    rows = [(LABELS_IN_WORDS[train.problem_type], labels_in_words(train)), *class_balance(train)]
    generated = isinstance(train.source, SyntheticSource)
    return rows if generated else [*rows, ("images", sample_of_sizes(train)), *duplicate_facts(train, evaluation)]


def class_balance(train: ImageDataset) -> list[tuple[str, str]]:
    """The smallest and the largest class, where they differ; and what is there for classes that differ much."""
    if not holds_classes(train):
        return []
    counts = np.bincount(train.labels, minlength=len(train.label_names))
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[least] == counts[most]:
        return []
    smallest, largest = (f"{train.label_names[label]} ({counts[label]:,})" for label in (least, most))
    text = f"smallest {smallest}, largest {largest}"
    if counts[most] >= UNEQUAL * counts[least]:
        text += "; see mean_per_class and macro_f1 beside accuracy, and --class_weights balanced"
    return [("class sizes", text)]


def duplicate_facts(train: ImageDataset, evaluation: ImageDataset) -> list[tuple[str, str]]:
    """Evaluation images that are also trained on, by perceptual hash; of large sets, among a sample."""
    parts = [
        data.select(np.unique(np.linspace(0, len(data) - 1, num=min(COMPARED, len(data)), dtype=np.int64)))
        for data in (evaluation, train)
    ]
    parts = [dataclasses.replace(part, on_unreadable="skip") for part in parts]
    found = find_duplicates(*parts, num_workers=0)
    sampled = " (a sample)" if len(parts[0]) < len(evaluation) or len(parts[1]) < len(train) else ""
    among = f"{len(parts[0]):,} evaluation and {len(parts[1]):,} training images{sampled}"
    if not found:
        return [("duplicates", f"none between {among}")]
    names = listed([f"{match.name} = {match.other_name}" for match in found[:3]])
    text = f"{len(found):,} between {among}: {names}{', ...' if len(found) > 3 else ''}"
    return [("duplicates", f"{text}; --deduplicate_against eval trains without them")]


def run_description(trainer: Trainer, train: ImageDataset | ImageStream, evaluation: ImageDataset) -> str:
    """What is about to happen."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    height, width = trainer.image_size
    count, word = len(train.label_names), LABELS_IN_WORDS[trainer.problem_type]
    labels = f"{count} {word if count > 1 else word.removesuffix('s')}"
    rows = [
        (
            "model",
            f"{parameters:,} parameters"
            + (f" ({trainable:,} trained)" if trainable < parameters else "")
            + f", {height} x {width} px",
        ),
        ("training", f"{len(train):,} images, {labels} ({train.name}, {train.split})"),
        ("evaluation", f"{len(evaluation):,} images ({evaluation.split})"),
        *data_facts(train, evaluation),
        (
            "steps",
            f"{trainer.max_steps:,} of {trainer.global_batch_size} images, {trainer.precision}, "
            f"{trainer.world_size} x {trainer.accelerator.device}",
        ),
    ]
    if len(trainer.schedule.stages) > 1:
        rows.append(("stages", "; ".join(map(str, trainer.schedule.stages))))
    return progress.two_columns(rows)


# -- model ---------------------------------------------------------------------------------------------------------


def build_model(arguments: Arguments, label_names: list[str], log=print, problem_type: str = SINGLE_LABEL):
    """Load or initialize the model for these classes, labels or numbers and this image size.

    Args:
        log: called with what the user should know. problem_type: a head of another one is replaced.

    Returns:
        (model, image processor, name of the base model or None).
    """
    requested, data = arguments.model, arguments.data
    transformers.set_seed(arguments.train.seed)
    masked = arguments.train.loss == MASKED_PATCHES
    base = None
    labels = {} if masked else dict(enumerate(label_names))
    if requested.model is not None and requested.preset is not None:
        raise HFViTError("give --model (pre-trained) or --preset (from scratch), not both")
    if requested.model is None and requested.preset is None and not requested.set:
        raise HFViTError(
            "which model? Give --model PATH_OR_HUB_ID, or --preset NAME / --set field=value to train from scratch"
        )
    if requested.model is not None and (other := other_classifier_class(requested.model)):
        check_vit_only(arguments, other)
        return build_other_classifier(arguments, labels, log, problem_type)
    check_config_fields(requested.set)
    try:
        if requested.model is not None:
            model, base = load_pretrained(requested, labels, problem_type)
            model = masked_model(model) if masked else model
        else:
            config = scratch_config(requested, labels)
            model = masked_model(config) if masked else HFViTForImageClassification(config)
    except HFViTError:
        raise
    except KeyError as error:  # a word that transformers looks up, such as hidden_act
        chosen = next((f"{name}={value}" for name, value in requested.set.items() if value == error.args[0]), error)
        raise HFViTError(f"--set {chosen}: there is no such value; see HFViTConfig") from None
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise HFViTError(" ".join(str(error).split())) from None
    if min(model.config.grid_size) < 1:
        (height, width), (down, across) = model.config.image_size_hw, model.config.total_stride
        raise HFViTError(
            f"an image of {height} x {width} px is smaller than one patch of {down} x {across} px: raise --image_size"
        )
    if requested.freeze_backbone:
        model.freeze_backbone()
    name = requested.model and public_name(requested.model)
    return model, image_processor_for(model.config, data, base), name


def build_other_classifier(arguments: Arguments, labels: dict[int, str], log, problem_type: str):
    """As `build_model`, for a classifier of transformers that is no plain ViT: it keeps its own class."""
    requested = arguments.model
    size = None if requested.image_size is None else pixels(requested.image_size)
    size = tuple(size) if isinstance(size, list) else size
    loaded = load_other_classifier(requested.model, labels, size, problem_type)
    model: Any = loaded.model
    for note in loaded.notes:
        log(f"note: {note}")
    if arguments.train.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise HFViTError(f"--activation_checkpointing: {type(model).__name__} does not support it; leave it out")
    if requested.freeze_backbone:
        freeze_backbone(model)
    model.source_license = loaded.license.metadata() if loaded.license is not None else None
    view = ModelInput(loaded.image_size, num_channels(model.config))
    return model, image_processor_for(view, arguments.data, loaded.image_processing), public_name(requested.model)


def set_problem(model: transformers.PreTrainedModel, train: ImageDataset | ImageStream, chosen: str | None) -> None:
    """Tell the model what its labels are, and for numbers their mean and standard deviation.

    A head that stays, since it is for the same numbers, keeps its own; thresholds are those of the new training.

    Raises:
        HFViTError: numbers, for a model that does not scale its outputs to their unit.
    """
    config: Any = model.config
    problem = train.problem_type if isinstance(train, ImageDataset) else SINGLE_LABEL
    before = problem_type_of(config)
    # where nobody chose, one label stays unsaid, as in configurations before this field was used
    config.problem_type = problem if problem != SINGLE_LABEL or (chosen and config.num_labels > 1) else None
    if problem == MULTI_LABEL or getattr(config, "label_thresholds", None) is not None:
        config.label_thresholds = None
    if not isinstance(config, HFViTConfig):
        if problem == REGRESSION:
            raise HFViTError(
                f"{type(model).__name__} has no place for the mean and standard deviation of a regression's numbers: "
                "start from a ViT that hf_vit reads"
            )
    elif problem == REGRESSION and (before != REGRESSION or config.target_std is None):
        config.target_mean, config.target_std = target_scale(train)
    elif problem != REGRESSION:
        config.target_mean = config.target_std = None


def check_config_fields(fields: dict[str, Any]) -> None:
    """Raise HFViTError for a field that HFViTConfig does not have, and for a network that no machine holds."""
    known = HFViTConfig().to_dict()
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise HFViTError(
                f"--set {name}: HFViTConfig has no such field" + (f"; did you mean {near[0]}?" if near else "")
            )
        most = MAX_LAYERS if name == "num_hidden_layers" else MAX_WIDTH
        if any(
            isinstance(number, int) and number > most for number in (value if isinstance(value, list) else [value])
        ):
            raise HFViTError(f"--set {name}={value}: give at most {most:,}")


def scratch_config(requested, labels: dict[int, str]) -> HFViTConfig:
    fields = dict(requested.set)
    if requested.image_size is not None:
        fields["image_size"] = pixels(requested.image_size)
    fields |= {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    config = (
        HFViTConfig.from_preset(requested.preset, **fields) if requested.preset is not None else HFViTConfig(**fields)
    )
    if (
        "hidden_size" in fields
        and "intermediate_size" not in fields
        and config.intermediate_size != 4 * config.hidden_size
    ):
        warnings.warn(
            f"--set hidden_size={config.hidden_size} leaves the MLP at intermediate_size={config.intermediate_size}; "
            f"four times the width, as usual, is --set intermediate_size={4 * config.hidden_size}",
            stacklevel=2,
        )
    return config


def load_pretrained(
    requested, labels: dict[int, str], problem: str
) -> tuple[HFViTForImageClassification, ImageProcessing]:
    """The pre-trained model at the wanted size, a new head unless its labels are the data's; and its processor."""
    fields = dict(requested.set)
    if requested.image_size is not None:
        fields["image_size"] = pixels(requested.image_size)
    if not Path(requested.model).exists():
        check_hub_access(requested.model)
    try:
        loaded = read_checkpoint(requested.model, dtype=torch.float32, **fields)
    except UnusableHeadError:  # a head made by hand goes: these classes get a new one
        loaded = read_checkpoint(requested.model, dtype=torch.float32, id2label=labels, **fields)
        return with_license(loaded), loaded.image_processing
    model = with_license(loaded)
    own = model.config.id2label if model.config.num_labels else {}
    same_labels = [own.get(index) for index in range(len(own))] == list(labels.values())
    if not same_labels or problem_type_of(model.config) != problem:
        for name, value in loaded.new_head.items():
            if name not in requested.set:
                setattr(model.config, name, value)
        model.replace_head(len(labels), labels, keep_representation=requested.keep_representation)
    return model, ImageProcessing.from_transformers(loaded.processor)


def with_license(loaded: Loaded) -> HFViTForImageClassification:
    """The model, which knows the license of the card that it came with."""
    model: Any = loaded.model
    model.source_license = loaded.license.metadata() if loaded.license is not None else None
    model.non_commercial = loaded.license is not None and loaded.license.is_non_commercial()
    return model


def pixels(size: list[int]) -> int | list[int]:
    """One number, or height and width."""
    if len(size) not in (1, 2) or min(size) < 1:
        raise HFViTError(f"--image_size {' '.join(map(str, size))}: give one number, or height and width")
    return size[0] if len(size) == 1 else list(size)


def image_processor_for(model, data: DataArguments, base: ImageProcessing | None) -> ViTImageProcessorPil:
    """transformers' ViT processor for this size, every setting stated: the base model's, or Google's without one.

    Args:
        model: `ModelInput`, or the configuration of one of hf_vit's models.
    """
    check_channels(model.num_channels)
    return ViTImageProcessorPil(**image_processing_for(data, model, base).to_transformers(model.num_channels))


# -- report --------------------------------------------------------------------------------------------------------


def finish_training(trainer: Trainer, log=print) -> dict[str, Any]:
    """Evaluate, save and report; after a signal only say how to go on."""
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
    """Tune the labels' thresholds on the evaluation images, unless these are a test split, whose scores would gain.

    Returns:
        What facts say of it.
    """
    split = str(getattr(trainer.eval_dataset, "split", "")).split("[")[0].strip().lower()
    if SPLIT_NAMES.get(split) == "test":
        log("labels count from 0.5 on: thresholds are not tuned on a test split; give --dev_fraction 0.1 to tune them")
        return {}
    count = trainer.tune_thresholds()
    found = trainer.model.config.label_thresholds
    log(f"thresholds of the labels, with the highest F1 on {count:,} images: {min(found):.3f} to {max(found):.3f}")
    return {"thresholds": {"split": getattr(trainer.eval_dataset, "split", "evaluation"), "n": count}}


def gain_of_training(trainer: Trainer) -> str | None:
    """What the evaluation before the first step gave, and what the weights that are kept gave; None without one."""
    name = f"eval_{trainer.args.metric_for_best_model.removeprefix('eval_')}"
    scores = {line["step"]: line[name] for line in trainer.state.log_history if name in line}
    if 0 not in scores or len(scores) < 2:
        return None
    last = max(scores)
    step = trainer.state.best_global_step if trainer.args.load_best_model_at_end else last
    higher = trainer.args.greater_is_better
    best = (max if higher else min)((step for step in scores if step), key=scores.__getitem__)
    words = [f"before training {progress.format_number(name, scores[0])}"]
    words.append(f"best of training {progress.format_number(name, scores[best])} (step {best})")
    kept = "those before training" if step == 0 else f"those of step {step}"
    return f"{name.removeprefix('eval_')} on {trainer.eval_dataset.split}: {', '.join(words)}; kept: {kept}"


def save_predictions(trainer: Trainer) -> None:
    """Write predictions.npz: `logits` (N, K) and `labels` (N,) of the evaluation images, in the data's order."""
    outputs = trainer.predict(trainer.eval_dataset, "eval")
    if trainer.accelerator.is_main_process:
        with atomic_path(trainer.output_dir / PREDICTIONS_NAME) as temporary:
            np.savez(temporary, logits=outputs.predictions, labels=outputs.label_ids)


def run_summary(facts: dict[str, Any], folder: Path) -> str:
    """The run in a table."""
    training, compute = facts["training"], facts["compute"]
    rows = []
    for row in facts["results"]:
        value = progress.format_number(row["metric"], row["value"])
        if "interval" in row:
            low, high = (progress.format_number(row["metric"], end) for end in row["interval"])
            value += f" (95 %: {low} to {high})"
        rows.append(
            (row["metric"].replace("_", " "), f"{value} on {row['n']:,} images ({row['dataset']}, {row['split']})")
        )
    if "final_loss" in training:
        steps = f"after {training['steps']:,} steps ({training['epochs']:.1f} epochs)"
        rows.append(("training loss", f"{training['final_loss']:.4f} {steps}"))
    speed = f", {training['images_per_second']:,.0f} images/s, waiting for data {training['data_wait']:.0%}"
    rows += [
        ("time", progress.hours_minutes_seconds(training["seconds"]) + speed * (training["steps"] > 0)),
        ("memory peak", f"{compute['memory_peak_bytes'] / 2**30:.2f} GiB"),
    ]
    if "train_exaflops" in compute:
        rows.append(
            (
                "compute",
                f"{compute['train_exaflops']:.3g} exaFLOPs"
                + (f", {compute['mfu']:.0%} of the peak" if "mfu" in compute else ""),
            )
        )
    rows.append(("folder", str(folder)))
    return "\n" + progress.two_columns(rows)
