"""Validation of arguments: ranges, choices, and options that contradict each other.

For arguments.py, whose dataclasses call these when they are made. Every error names the option and the way out. Not a
schema library such as pydantic: most of the checks compare options with each other, and their errors name flags.

Tests: tests/training/config/test_arguments.py.
"""

import dataclasses
import difflib
import math
from typing import Any

from hf_vit.errors import HFViTError
from hf_vit.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL

from .durations import LENGTHS, RAMPS, check_ramps, seconds_of, steps_of


ENDING = ("cosine", "linear")  # schedules that fall to lr_end
# By problem type, the default first: losses, and metrics of an evaluation without the user's own compute_metrics.
LOSSES = {SINGLE_LABEL: ("softmax", "sigmoid"), MULTI_LABEL: ("sigmoid",), REGRESSION: ("mse", "huber")}
METRICS = {
    SINGLE_LABEL: ("accuracy", "top5_accuracy", "mean_per_class", "macro_f1", "loss"),
    MULTI_LABEL: ("mean_average_precision", "macro_f1", "micro_f1", "loss"),
    REGRESSION: ("r2", "mae", "rmse", "loss"),
}
# Options that count or mix classes: the value that switches them off, and the problem types that exclude them.
OF_CLASSES = {
    "label_smoothing_factor": (0, (MULTI_LABEL, REGRESSION)),
    "class_weights": ("none", (MULTI_LABEL, REGRESSION)),
    "logit_adjustment": (0, (MULTI_LABEL, REGRESSION)),
    "train_sampling_strategy": ("random", (MULTI_LABEL, REGRESSION)),
    "mixup_alpha": (0, (REGRESSION,)),
    "cutmix_alpha": (0, (REGRESSION,)),
    "sweep": ({}, (MULTI_LABEL, REGRESSION)),
    "card_examples": (0, (MULTI_LABEL, REGRESSION)),
    "preview": (None, (REGRESSION,)),
}
# The largest sensible values: a larger one is a typing error, which would end in no memory, or never.
MAX_COUNT = 10**8
MAX_VALUES = {
    "seed": 2**32 - 1, "image_size": 16_384, "num_train_epochs": 10**6, "per_device_train_batch_size": 10**6,
    "per_device_eval_batch_size": 10**6, "gradient_accumulation_steps": 10**6, "dataloader_num_workers": 1_000,
    "dataloader_prefetch_factor": 1_000, "card_examples": 1_000, "resize_small": 10, "scale": 100,
}  # fmt: skip
AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
    "eval_steps", "dataloader_prefetch_factor",
)  # fmt: skip
BELOW_ONE = ("label_smoothing_factor", "ema_decay", "adam_beta1", "adam_beta2", "momentum", "muon_momentum")
NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "max_grad_norm", "mixup_alpha", "cutmix_alpha", "lr_end", "adam_epsilon",
    "save_steps", "dataloader_num_workers", "card_examples", "logit_adjustment",
)  # fmt: skip


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raise HFViTError for a word that is not among the field's choices, and for numbers out of range."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        number = isinstance(item, int | float) and not isinstance(item, bool)
        most = MAX_VALUES.get(field.name, MAX_COUNT if isinstance(item, int) else math.inf)
        if number and math.isfinite(item) and item > most:
            raise HFViTError(f"--{field.name} {' '.join(map(str, items))}: give at most {most:,}")
    if not all(math.isfinite(item) for item in items if isinstance(item, float)):
        raise HFViTError(f"--{field.name} {' '.join(map(str, items))}: give finite numbers")
    choices = field.metadata["choices"]
    if choices and value is not None and value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        raise HFViTError(
            f"--{field.name} {value!r}: choose from {', '.join(choices)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )


# -- data -------------------------------------------------------------------------------------------------------------


def check_data(data) -> None:
    """Raise HFViTError for `DataArguments` that are out of range or contradict each other."""
    if data.label_separator is not None and data.problem_type not in (None, MULTI_LABEL):
        raise HFViTError(f"--label_separator is for several labels, not for --problem_type {data.problem_type}")
    if data.label_separator == "":
        raise HFViTError("--label_separator is empty: give what stands between two labels, such as '|'")
    if data.problem_type not in (None, SINGLE_LABEL) and data.samples_per_class is not None:
        raise HFViTError(f"--samples_per_class counts classes, not --problem_type {data.problem_type}: leave it out")
    if data.train_file is not None and data.dataset not in (None, data.train_file):
        raise HFViTError("give --dataset or --train_file, not both")
    if data.eval_file is not None and data.eval_split is not None:
        raise HFViTError("give --eval_split or --eval_file, not both")
    if not 0 < data.train_fraction <= 1:
        raise HFViTError(f"--train_fraction {data.train_fraction}: give a fraction above 0, up to 1")
    if data.dev_fraction is not None and not 0 < data.dev_fraction < 1:
        raise HFViTError(f"--dev_fraction {data.dev_fraction}: give a fraction between 0 and 1")
    if data.crop_pct is not None and not 0.01 <= data.crop_pct <= 1:
        raise HFViTError(f"--crop_pct {data.crop_pct}: give a fraction of at least 0.01, up to 1")
    if data.samples_per_class is not None and data.samples_per_class < 1:
        raise HFViTError(f"--samples_per_class {data.samples_per_class}: give 1 or more")


# -- training ---------------------------------------------------------------------------------------------------------


def check_training(train) -> None:
    """Raise HFViTError for `TrainArguments` that are out of range or contradict each other."""
    for name in AT_LEAST_ONE:
        if getattr(train, name) < 1:
            raise HFViTError(f"--{name} {getattr(train, name)}: give 1 or more")
    for name in BELOW_ONE:
        if not 0 <= getattr(train, name) < 1:
            raise HFViTError(f"--{name} {getattr(train, name)}: give a number from 0 up to, not including, 1")
    for name in NOT_NEGATIVE:
        if getattr(train, name) < 0:
            raise HFViTError(f"--{name} {getattr(train, name)}: give 0 or more")
    if not 0 <= train.seed < 1 << 32:
        raise HFViTError(f"--seed {train.seed}: give 0 to {(1 << 32) - 1}")
    if train.global_batch_size is not None and train.global_batch_size < 1:
        raise HFViTError(f"--global_batch_size {train.global_batch_size}: give 1 or more")
    if train.bf16 + train.fp16 + train.fp8 > 1:
        raise HFViTError("give one of --bf16, --fp16 and --fp8")
    _check_rates(train)
    _check_length(train)
    _check_loss(train)
    _check_evaluation(train)


def _check_rates(train) -> None:
    """The optimizer and its learning rates."""
    if train.lr_end > train.learning_rate:
        raise HFViTError(f"--lr_end {train.lr_end} is above --learning_rate {train.learning_rate}: lower it")
    if train.lr_end and train.lr_scheduler_type not in ENDING:
        raise HFViTError(
            f"--lr_end {train.lr_end} is only supported with --lr_scheduler_type {' or '.join(ENDING)}, not "
            f"{train.lr_scheduler_type}: give --lr_end 0"
        )
    if not all(0 < fraction < 1 for fraction in train.lr_steps):
        raise HFViTError(
            f"--lr_steps {' '.join(map(str, train.lr_steps))}: give fractions of the run, between 0 and 1"
        )
    if not 0 < train.layer_decay <= 1:
        raise HFViTError(f"--layer_decay {train.layer_decay}: give a fraction above 0, up to 1 (off)")
    if train.rsqrt_timescale <= 0:
        raise HFViTError(f"--rsqrt_timescale {train.rsqrt_timescale}: give steps above 0")
    if train.optim == "schedule_free_adamw":
        if train.lr_scheduler_type != "constant":
            raise HFViTError(
                "--optim schedule_free_adamw takes the place of a falling rate: give --lr_scheduler_type constant"
            )
        if train.ema_decay:
            raise HFViTError("--optim schedule_free_adamw averages the weights itself: leave out --ema_decay")
        if train.load_best_model_at_end:
            raise HFViTError("--optim schedule_free_adamw ends with its average: leave out --load_best_model_at_end")


def _check_length(train) -> None:
    """Steps, epochs, and what is measured in them."""
    if train.max_steps < 0 and train.max_steps != -1:
        raise HFViTError(f"--max_steps {train.max_steps}: give steps above 0, or -1 to count --num_train_epochs")
    if train.max_steps < 0 and train.num_train_epochs <= 0:
        raise HFViTError("nothing to train: give --max_steps or --num_train_epochs above 0")
    if train.step_limit is not None:
        if train.step_limit < 1:
            raise HFViTError(f"--step_limit {train.step_limit}: give 1 or more")
        if train.max_steps > 0:
            raise HFViTError("--step_limit is for --num_train_epochs: leave out it or --max_steps")
    if train.time_limit is not None:
        seconds_of("time_limit", train.time_limit)
    if train.batch_size_schedule:
        if train.max_steps <= 0:
            raise HFViTError("--batch_size_schedule needs --max_steps: epochs have no number of steps with it")
        lengths = [*train.batch_size_schedule, *train.image_size_schedule, *(getattr(train, n) for n in LENGTHS)]
        if any("epoch" in str(length) for length in lengths):
            raise HFViTError("--batch_size_schedule gives epochs no fixed length: give steps or percent")
    for name in LENGTHS:
        steps_of(name, getattr(train, name), max(train.max_steps, 0), 0.0)
    ramps = [steps_of(name, getattr(train, name), train.max_steps, 0.0) for name in RAMPS]
    check_ramps(*ramps, train.max_steps)


def _check_loss(train) -> None:
    """Losses, and options that only some of them allow."""
    if train.loss == "masked_patches":
        for name in ("mixup_alpha", "cutmix_alpha", "label_smoothing_factor", "sweep", "do_predict"):
            if getattr(train, name):
                raise HFViTError(f"--loss masked_patches has no labels for --{name}: leave out one of them")
    if train.class_weights != "none" and train.loss not in (None, "softmax"):
        raise HFViTError(f"--class_weights {train.class_weights} is for --loss softmax, not {train.loss}")
    if train.logit_adjustment and train.loss not in (None, "softmax"):
        raise HFViTError(f"--logit_adjustment {train.logit_adjustment} is for --loss softmax, not {train.loss}")
    balancing = [
        f"--{name} {getattr(train, name)}"
        for name, off in (
            ("class_weights", "none"),
            ("logit_adjustment", 0),
            ("train_sampling_strategy", "random"),
        )
        if getattr(train, name) != off
    ]
    if len(balancing) > 1:
        raise HFViTError(f"{' and '.join(balancing)} would balance the classes twice: give one of them")


def _check_evaluation(train) -> None:
    """Checkpoints, and options that choose among evaluations."""
    if train.save_total_limit is not None and train.save_total_limit < 1:
        raise HFViTError("--save_total_limit: give 1 or more, or null to keep every checkpoint")
    if train.patience is not None and train.patience < 1:
        raise HFViTError(f"--patience {train.patience}: give 1 or more evaluations")
    if train.patience is not None and train.eval_strategy == "no":
        raise HFViTError("--patience counts evaluations: give --eval_steps or --eval_strategy epoch")
    if train.load_best_model_at_end and train.eval_strategy == "no":
        raise HFViTError(
            "--load_best_model_at_end needs evaluations to choose from: give --eval_steps or --eval_strategy epoch"
        )
    if train.save_strategy == "best" and train.eval_strategy == "no":
        raise HFViTError("--save_strategy best needs evaluations: give --eval_steps or --eval_strategy epoch")


def check_problem(train, problem_type: str, loss: str, metric: str) -> None:
    """Raise HFViTError for options of `TrainArguments` that have no meaning for a problem type."""
    losses, metrics = LOSSES[problem_type], METRICS[problem_type]
    if loss not in losses:
        raise HFViTError(f"--loss {loss} is not for --problem_type {problem_type}: choose from {', '.join(losses)}")
    elsewhere = {name for names in METRICS.values() for name in names} - set(metrics)
    if metric.removeprefix("eval_") in elsewhere:
        raise HFViTError(
            f"--metric_for_best_model {metric} is not for --problem_type {problem_type}: choose from "
            f"{', '.join(metrics)}"
        )
    for name, (off, without) in OF_CLASSES.items():
        if problem_type in without and getattr(train, name) != off:
            raise HFViTError(
                f"--{name} {getattr(train, name)} has no meaning for --problem_type {problem_type}: leave it out"
            )


# -- a whole run ------------------------------------------------------------------------------------------------------


def check_run(model, data, train) -> None:
    """Raise HFViTError for arguments that contradict each other across the three groups."""
    if train.max_steps == 0 and model.head_init != "probe":
        raise HFViTError("--max_steps 0: give steps above 0, or -1 to count epochs; 0 is for --head_init probe")
    if model.head_init == "probe" and (model.preset is not None or model.set) and model.model is None:
        raise HFViTError("--head_init probe reads the features of a pre-trained --model: give one, or leave it out")
    if model.head_init == "probe" and train.loss not in (None, "softmax"):
        raise HFViTError(f"--head_init probe is for --loss softmax, not {train.loss}: leave out one of them")
    if model.head_init == "probe" and data.streaming:
        raise HFViTError("--head_init probe reads the training images twice: leave out --streaming")
    if model.freeze_backbone and train.layer_decay < 1:
        raise HFViTError("--layer_decay has no layers on a frozen backbone: leave out it or --freeze_backbone")
    if model.freeze_backbone and train.unfreeze_every not in (0, "0"):
        raise HFViTError("--unfreeze_every trains what --freeze_backbone does not: leave out one of them")
    if train.loss == "masked_patches" and model.freeze_backbone:
        raise HFViTError("--loss masked_patches trains the backbone: leave out --freeze_backbone")
    if model.keep_representation and model.model is None:
        raise HFViTError("--keep_representation is for the head of a pre-trained --model: leave it out")
    if data.problem_type is not None:
        if train.loss == "masked_patches":
            raise HFViTError("--loss masked_patches reads no labels: leave out --problem_type")
        train.for_problem(data.problem_type)
    metric = None if train.metric_for_best_model is None else train.metric_for_best_model.removeprefix("eval_")
    known = {name: None for names in METRICS.values() for name in names}
    if metric is not None and metric not in known:
        raise HFViTError(f"--metric_for_best_model {metric}: choose from {', '.join(known)}")
    if train.sweep and isinstance(train.resume_from_checkpoint, str):
        raise HFViTError(
            f"--resume_from_checkpoint {train.resume_from_checkpoint}: a sweep is many runs, which go on by "
            "--resume_from_checkpoint true"
        )
    _check_folds(data, train)
    if train.sweep and data.dev_fraction is None:
        raise HFViTError("a sweep chooses on a dev split: give --dev_fraction, such as 0.1 (carved from train)")
    if data.dev_fraction is not None and data.eval_split is not None and not train.sweep:
        raise HFViTError(
            "--dev_fraction carves evaluation images from train, --eval_split names them: leave out one of them"
        )


def _check_folds(data, train) -> None:
    if data.folds is None:
        if data.fold is not None:
            raise HFViTError(f"--fold {data.fold} is one of --folds K: give both, or leave it out")
        if train.combine_folds != "none":
            raise HFViTError(f"--combine_folds {train.combine_folds} combines --folds K: give both, or leave it out")
        return
    if data.folds < 2:
        raise HFViTError(f"--folds {data.folds}: give 2 or more")
    if data.fold is not None and not 1 <= data.fold <= data.folds:
        raise HFViTError(f"--fold {data.fold}: give 1 to {data.folds}")
    if data.fold is not None and train.combine_folds != "none":
        raise HFViTError("--combine_folds combines all folds: leave out --fold")
    if train.sweep or data.dev_fraction is not None:
        other = "--sweep" if train.sweep else "--dev_fraction"
        raise HFViTError(f"--folds and {other} both carve evaluation images from train: leave out one of them")
    if train.combine_folds == "none" and (data.eval_split is not None or data.eval_file is not None):
        other = "--eval_split" if data.eval_split is not None else "--eval_file"
        raise HFViTError(f"--folds evaluates on the part that each run holds out: leave out {other}")
    if train.loss == "masked_patches":
        raise HFViTError("--loss masked_patches has no classes to cross-validate: leave out --folds")
    if train.push_to_hub:
        raise HFViTError("--folds makes several models: leave out --push_to_hub, and push one with hf-vit push")
    if data.fold is None and isinstance(train.resume_from_checkpoint, str):
        raise HFViTError(
            f"--resume_from_checkpoint {train.resume_from_checkpoint}: --folds is many runs, which go on by "
            "--resume_from_checkpoint true"
        )
