"""One run, from arguments to a finished folder: open the data, build the model, train, evaluate, report.

For pretrain and finetune, which differ in their defaults and in what they may start from.
"""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.checkpoints import read_checkpoint
from hf_vit.errors import HFViTError, report_error
from hf_vit.image_io import check_channels
from hf_vit.image_processing import ImageProcessing

from .config.arguments import RESOLVED_NAME, Arguments, DataArguments
from .config.parser import parse
from .data.dataset import ImageDataset
from .data.deduplication import Duplicate
from .data.splits import image_processing_for, open_splits, transforms
from .data.streaming import ImageStream
from .engine.accelerator import on_cpu
from .engine.checkpoint_io import checkpoints, write_json
from .engine.distributed import peers_may_vanish, together
from .engine.masked_patch_prediction import MASKED_PATCHES, masked_model
from .engine.trainer import Trainer
from .evaluation.classifier import knock
from .reporting import progress
from .reporting.facts import public_name
from .reporting.preview import contact_sheet
from .sweep import sweep


PREDICTIONS_NAME, DUPLICATES_NAME = "predictions.npz", "duplicates.json"


def command(stage: str, argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, train, report; bad input is one line on stderr and exit status 2."""
    try:
        with peers_may_vanish():
            arguments = parse(argv, stage)
            if arguments.train.sweep and not arguments.train.preview:
                return sweep(arguments, stage, run)
            return run(arguments, stage)
    except (HFViTError, OSError) as error:
        raise SystemExit(report_error(error)) from None


def run(
    arguments: Arguments, stage: str, more_follow: bool = False, swept: list[dict] | None = None
) -> dict[str, Any]:
    """Train and evaluate as the arguments say, and return the facts (empty if a signal ended the run early).

    Args:
        more_follow: other runs of this process come after. swept: what earlier ones found, for the facts.
    """
    if arguments.train.output_dir is None:
        raise HFViTError("where should the result go? Give --output_dir FOLDER")
    main = accelerate.PartialState(cpu=on_cpu(arguments.train)).is_main_process
    transformers.logging.set_verbosity(logging.WARNING if main else logging.ERROR)
    transformers.logging.disable_progress_bar()
    say = print if main else _silent
    with together():
        splits = open_splits(arguments.data, arguments.train.seed, say)
        train, evaluation = splits.train, splits.evaluation
        model, processor, base = build_model(arguments, train.label_names)
    processing = ImageProcessing.from_transformers(processor.to_dict())  # what is saved is what is trained with
    train_transform, eval_transform = transforms(arguments.data, model.config, processing)
    about = {
        "stage": stage,
        "recipe": arguments.recipe,
        "base_model": base,
        "arguments": arguments.non_default(),
        "augmentation": train_transform.describe(),
        "data": {"config_name": arguments.data.dataset_config_name, "train_fraction": arguments.data.train_fraction},
    }
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
        callbacks=[KeepConfig(arguments, splits.duplicates)],
    )
    if arguments.train.preview:
        return preview(trainer, train.label_names, say)
    say(describe(trainer, train, evaluation))
    train_or_leave_nothing(trainer)
    facts = finish(trainer, say)
    if more_follow:  # ending the training would end the processes' group
        for tracker in trainer.accelerator.trackers:
            tracker.finish()
    else:
        trainer.accelerator.end_training()
    return facts


def preview(trainer: Trainer, names: list[str], say) -> dict[str, Any]:
    """Write the first batch as a PNG, and train nothing."""
    wish, normalise = trainer.args.preview, trainer.normalise
    folder = trainer.output_dir
    path = Path(wish) if isinstance(wish, str) else folder.with_name(f"{folder.name}_preview.png")
    sheet = contact_sheet(*trainer.first_batch(), names, normalise.mean, normalise.std)
    if trainer.accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
        say(f"the first batch: {path}")
    return {}


def train_or_leave_nothing(trainer: Trainer) -> None:
    """Train; bad input found on the way takes an output folder that has no checkpoint yet with it."""
    folder = trainer.output_dir
    fresh = not folder.is_dir() or not any(folder.iterdir())
    try:
        trainer.train()
    except HFViTError:
        if fresh and trainer.accelerator.is_main_process and not checkpoints(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


class KeepConfig(transformers.TrainerCallback):
    """Lays the resolved config, and the list of duplicates, into the output folder once training begins."""

    def __init__(self, arguments: Arguments, duplicates: list[Duplicate]):
        self.arguments, self.duplicates = arguments, duplicates

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        (folder / RESOLVED_NAME).write_text(self.arguments.to_yaml(), encoding="utf-8")
        if self.arguments.data.deduplicate_against is not None:
            write_json(folder / DUPLICATES_NAME, [dataclasses.asdict(twin) for twin in self.duplicates])


def _silent(*words) -> None:
    """Only the first process speaks."""


def describe(trainer: Trainer, train: ImageDataset | ImageStream, evaluation: ImageDataset) -> str:
    """What is about to happen."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    height, width = trainer.model.config.image_size_hw
    rows = [
        (
            "model",
            f"{parameters:,} parameters"
            + (f" ({trainable:,} trained)" if trainable < parameters else "")
            + f", {height} x {width} px",
        ),
        ("training", f"{len(train):,} pictures of {len(train.label_names)} classes ({train.name}, {train.split})"),
        ("evaluation", f"{len(evaluation):,} pictures ({evaluation.split})"),
        (
            "updates",
            f"{trainer.max_steps:,} of {trainer.global_batch_size} pictures, {trainer.precision}, "
            f"{trainer.world_size} x {trainer.accelerator.device}",
        ),
    ]
    if len(trainer.plan.stages) > 1:
        rows.append(("stages", "; ".join(map(str, trainer.plan.stages))))
    return progress.table(rows)


# -- model ---------------------------------------------------------------------------------------------------------


def build_model(arguments: Arguments, label_names: list[str]):
    """Load or initialise the model for these classes and this image size.

    Returns:
        (model, image processor, name of the base model or None).
    """
    wish, data = arguments.model, arguments.data
    transformers.set_seed(arguments.train.seed)
    masked = arguments.train.loss == MASKED_PATCHES
    base = None
    labels = {} if masked else dict(enumerate(label_names))
    if wish.model is not None and wish.preset is not None:
        raise HFViTError("give --model (pre-trained) or --preset (from scratch), not both")
    if wish.model is None and wish.preset is None and not wish.set:
        raise HFViTError(
            "which model? Give --model PATH_OR_HUB_ID, or --preset NAME / --set field=value to train from scratch"
        )
    try:
        if wish.model is not None:
            model, base = load_pretrained(wish, labels)
            model = masked_model(model) if masked else model
        else:
            config = scratch_config(wish, labels)
            model = masked_model(config) if masked else HFViTForImageClassification(config)
    except HFViTError:
        raise
    except (ValueError, StrictDataclassError) as error:
        raise HFViTError(" ".join(str(error).split())) from None
    if min(model.config.grid_size) < 1:
        (height, width), (down, across) = model.config.image_size_hw, model.config.total_stride
        raise HFViTError(
            f"an image of {height} x {width} px is smaller than one patch of {down} x {across} px: raise --image_size"
        )
    if wish.freeze_backbone:
        model.freeze_backbone()
    return model, image_processor_for(model.config, data, base), wish.model and public_name(wish.model)


def scratch_config(wish, labels: dict[int, str]) -> HFViTConfig:
    fields = dict(wish.set)
    if wish.image_size is not None:
        fields["image_size"] = pixels(wish.image_size)
    fields |= {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    return HFViTConfig.from_preset(wish.preset, **fields) if wish.preset is not None else HFViTConfig(**fields)


def load_pretrained(wish, labels: dict[int, str]) -> tuple[HFViTForImageClassification, ImageProcessing]:
    """The pre-trained model at the wanted size, a new head unless its labels are the data's; and its processor."""
    fields = dict(wish.set)
    if wish.image_size is not None:
        fields["image_size"] = pixels(wish.image_size)
    if not Path(wish.model).exists():
        knock(wish.model)
    loaded = read_checkpoint(wish.model, dtype=torch.float32, **fields)
    model = loaded.model
    own = model.config.id2label if model.config.num_labels else {}
    if [own.get(index) for index in range(len(own))] != list(labels.values()):
        model.replace_head(len(labels), labels, keep_representation=wish.keep_representation)
    return model, ImageProcessing.from_transformers(loaded.processor)


def pixels(size: list[int]) -> int | list[int]:
    """One number, or height and width."""
    if len(size) not in (1, 2) or min(size) < 1:
        raise HFViTError(f"--image_size {' '.join(map(str, size))}: give one number, or height and width")
    return size[0] if len(size) == 1 else list(size)


def image_processor_for(config, data: DataArguments, base: ImageProcessing | None) -> ViTImageProcessorPil:
    """transformers' ViT processor for this size, every setting stated: the base model's, or Google's without one."""
    check_channels(config.num_channels)
    return ViTImageProcessorPil(**image_processing_for(data, config, base).to_transformers(config.num_channels))


# -- report --------------------------------------------------------------------------------------------------------


def finish(trainer: Trainer, say=print) -> dict[str, Any]:
    """Evaluate, save and report; after a signal only say how to go on."""
    if trainer.interrupted:
        say(
            f"stopped by a signal after update {trainer.state.global_step}; see {trainer.output_dir}: "
            "go on with --resume_from_checkpoint true"
        )
        return {}
    if trainer.last_evaluation is None or trainer.last_evaluation[0] != trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model()
    if trainer.args.do_predict:
        save_predictions(trainer)
    facts = trainer.create_model_card()
    say(summary(facts, trainer.output_dir))
    if trainer.args.push_to_hub:
        try:
            say(f"uploaded to {trainer.push_to_hub()}")
        except HFViTError as error:
            say(f"not uploaded: {error}\nthe folder is whole; later: hf-vit push {trainer.output_dir} {trainer.name}")
    return facts


def save_predictions(trainer: Trainer) -> None:
    """Write predictions.npz: `logits` (N, K) and `labels` (N,) of the evaluation pictures, in the data's order."""
    found = trainer.predict(trainer.eval_dataset, "eval")
    if trainer.accelerator.is_main_process:
        np.savez(trainer.output_dir / PREDICTIONS_NAME, logits=found.predictions, labels=found.label_ids)


def summary(facts: dict[str, Any], folder: Path) -> str:
    """The run in a table."""
    training, compute = facts["training"], facts["compute"]
    rows = []
    for row in facts["results"]:
        value = f"{row['value']:.2%}" if "accuracy" in row["metric"] else f"{row['value']:.4f}"
        rows.append(
            (row["metric"].replace("_", " "), f"{value} on {row['n']:,} pictures ({row['dataset']}, {row['split']})")
        )
    rows += [
        (
            "training loss",
            f"{training['final_loss']:.4f} after {training['steps']:,} updates ({training['epochs']:.1f} epochs)",
        ),
        (
            "time",
            f"{progress.clock(training['seconds'])}, {training['images_per_second']:,.0f} images/s, "
            f"waiting for data {training['data_wait']:.0%}",
        ),
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
    return "\n" + progress.table(rows)
