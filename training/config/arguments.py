"""Every option of a training run: name, default, unit and source.

For pretrain, finetune and the Trainer. Names are those of transformers' TrainingArguments where the meaning is the
same. parser.py reads recipes and flags into these dataclasses, argument_checks.py validates them.

Sources: Dosovitskiy et al. 2020 (arXiv:2010.11929), Tables 3 and 4, appendix B.1; google-research/vision_transformer,
`vit_jax/configs`; Steiner et al. 2021 (AugReg, arXiv:2106.10270); transformers TrainingArguments.
"""

# ruff: noqa: RUF009  (`option` returns a dataclass field)

import dataclasses
from typing import Any

import yaml

from hf_vit.problem_type import PROBLEM_TYPES

from .argument_checks import LOSSES, METRICS, check_data, check_problem, check_run, check_training, check_value
from .recipes import ORIGIN


RESOLVED_NAME = "config_resolved.yaml"
MASKED_PATCHES = "masked_patches"  # the `loss` that reads no labels
SMALLER_IS_BETTER = ("loss", "mae", "rmse")
# Options of version 0.1.0 under another name; the old spelling is understood for one release.
RENAMED = {"mixing_off": "mixup_off_steps", "on_unreadable": "on_decode_error"}
OF_THE_LAUNCH = ("resume_from_checkpoint", "preview")  # given anew at each launch, so not part of a resolved config


def option(default: Any, text: str, unit: str = "", source: str = "", choices: tuple = (), nargs: str | None = None):
    """A dataclass field with a default, and text, unit and source for `--help`."""
    metadata = {"help": text, "unit": unit, "source": source, "choices": choices, "nargs": nargs}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class ModelArguments:
    """What is trained: a published checkpoint, or a size from scratch."""

    model: str | None = option(None, "folder or Hub id of pre-trained weights", "", "any format that hf_vit loads")
    preset: str | None = option(None, "size to train from scratch, such as vit-base-patch16-224", "", "Table 1")
    set: dict[str, Any] = option({}, "fields of HFViTConfig, as field=value", "", "HFViTConfig", nargs="+")
    image_size: list[int] | None = option(
        None,
        "N, or H W; default: the model's own; position embeddings are resized",
        "pixels",
        "section 3.2",
        nargs="+",
    )
    keep_representation: bool = option(
        False, "keep the tanh layer before the head when the head is replaced", "", "section 3.2 drops it"
    )
    freeze_backbone: bool = option(False, "train the head only", "", "linear probe")
    head_init: str = option(
        "zero",
        "what a new head begins from; probe: logistic regression on features of the frozen backbone, computed once",
        "",
        "section 3.2: zero; arXiv:2202.10054: probing before fine-tuning",
        ("zero", "probe"),
    )


@dataclasses.dataclass
class DataArguments:
    """Which images, and how they are cut for training and evaluation."""

    dataset: str | None = option(
        None,
        "Hub id, image folder, parquet file or folder, shards, `digits`, or `synthetic:FAMILY[@classes,instances]`",
    )
    dataset_config_name: str | None = option(None, "configuration of a Hub dataset")
    train_split: str = option("train", "split to train on, such as train[:98%]", "", "datasets")
    eval_split: str | None = option(
        None, "split to evaluate on; default: the first of validation, val, dev, test; else carved from train"
    )
    image_column: str | None = option(None, "column with the images; default: found by type and name")
    label_column: str | list[str] | None = option(
        None,
        "column with the labels; default: found by type and name; several: one a label (0 or 1), or one a number",
        nargs="+",
    )
    problem_type: str | None = option(
        None,
        "one class an image, several labels or none, or numbers; default: as the labels say, if there is no doubt",
        "",
        "transformers",
        PROBLEM_TYPES,
    )
    label_separator: str | None = option(None, "what separates the labels of a cell of text, such as '|'")
    streaming: bool = option(False, "read in order through a shuffle buffer, without a local copy", "", "datasets")
    shuffle_buffer_size: int = option(4096, "streaming: images that are read ahead and shuffled", "images", "datasets")
    shuffle_run_length: int | None = option(
        None, "streaming: neighbors in a shard that are read at once; default: 8, 1 if sorted by class", "images"
    )
    shuffle_shards: int | None = option(
        None,
        "streaming: tar shards that are indexed and mixed at a time, to begin before all are indexed; default: all",
        "shards",
    )
    read_threads: int = option(16, "streaming: reads of shards or row groups that one process makes at once")
    train_fraction: float = option(1.0, "fraction of the training images; 0.01 lies inside 0.1", "0 to 1", "Figure 4")
    samples_per_class: int | None = option(None, "training images of each class, for few labels", "images")
    dev_fraction: float | None = option(
        None,
        "fraction of train carved out for evaluation, stratified; 0.1 where no evaluation split exists",
        "0 to 1",
        "B.1.1: 10 % Pets, Flowers; 2 % CIFAR; 1 % ImageNet",
    )
    split_column: str | None = option(
        None, "column that says which split a row belongs to; default: `split`, `subset` or `partition`"
    )
    group_column: str | None = option(
        None,
        "column of a table whose equal values belong together (a patient, an animal): --folds and carved evaluation "
        "images never split such images; an empty cell is a group of its own",
    )
    image_root: str | None = option(None, "folder that image paths in a table count from; default: the table's")
    train_file: str | None = option(None, "table of the training images, in place of dataset")
    eval_file: str | None = option(None, "table of the evaluation images, in place of eval_split")
    folds: int | None = option(
        None,
        "cross-validation: so many runs, each trained without one stratified part of train and evaluated on it",
        "runs",
        "Stone 1974",
    )
    fold: int | None = option(None, "of --folds, only the run that holds out this part; default: all", "1 to folds")
    deduplicate_against: str | None = option(
        None,
        "data set whose images are removed from train, by perceptual hash; `eval`: the evaluation split",
        "",
        "section 4.1",
    )
    deduplicate_split: str | None = option(
        None, "split of deduplicate_against, such as train+test; default: test", "", "datasets"
    )
    on_decode_error: str = option("skip", "what an image that cannot be read does", "", "", ("skip", "stop"))
    cache_dir: str | None = option(None, "where `datasets` keeps its copies", "folder", "datasets")
    crop: str = option(
        "inception",
        "training crop",
        "",
        "vit_jax/input_pipeline.py: inception; big_vision transfer.py: resize_small_random",
        ("inception", "resize_small_random", "squash", "none"),
    )
    crop_area: list[float] = option(
        [0.05, 1.0], "inception crop: range of the area", "fraction", "sample_distorted_bounding_box", nargs=2
    )
    crop_ratio: list[float] = option(
        [0.75, 4 / 3], "inception crop: range of width / height", "ratio", "sample_distorted_bounding_box", nargs=2
    )
    flip: bool = option(True, "mirror half of the training images", "", "vit_jax/input_pipeline.py")
    resize_small: float = option(
        448 / 384, "resize_small_random: resized side over window side", "ratio", "big_vision transfer.py"
    )
    degrees: float = option(0.0, "random rotation, to either side", "degrees")
    translate: float = option(0.0, "random shift, to either side", "fraction of the side")
    scale: list[float] = option([1.0, 1.0], "random magnification, smallest and largest", "factor", nargs=2)
    shear: float = option(0.0, "random horizontal shear, to either side", "degrees")
    auto_augment: str | None = option(
        None,
        "randaug(2,10): RandAugment as big_vision; rand-m9-mstd0.5-inc1: as timm; 3a: three-augment",
        "",
        "arXiv:1909.13719; AugReg; DeiT; DeiT-III",
    )
    color_jitter: float = option(
        0.0, "brightness, contrast, saturation by factors 1 -+ this, after auto_augment", "fraction", "DeiT-III: 0.3"
    )
    random_erasing: float = option(
        0.0, "how often a rectangle of a training image becomes noise", "0 to 1", "arXiv:1708.04896; DeiT: 0.25"
    )
    resample: str | None = option(
        None,
        "filter of every resize; default: that of the pre-trained model's processor, else bilinear",
        "",
        "vit_jax/input_pipeline.py",
        ("nearest", "bilinear", "bicubic", "lanczos"),
    )
    crop_pct: float | None = option(
        None,
        "evaluation: resize the short side to size / crop_pct, crop the center; default: as the base model, or squash",
        "fraction",
        "timm; squash: vit_jax/input_pipeline.py",
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if isinstance(self.label_column, list) and len(self.label_column) == 1:
            self.label_column = self.label_column[0]
        check_data(self)
        if self.train_file is not None:
            self.dataset = self.train_file


@dataclasses.dataclass
class TrainArguments:
    """How it is trained, measured, shown and kept."""

    output_dir: str | None = option(None, "where weights, processor, card, facts and checkpoints go", "folder")
    max_steps: int = option(-1, "steps; -1: from num_train_epochs", "steps", "Table 4: 500 to 20,000")
    num_train_epochs: float = option(10.0, "passes over the training images", "epochs", "Table 3: 7 to 300")
    step_limit: int | None = option(
        None, "at most so many steps, where num_train_epochs gives the length", "steps", "large data sets end sooner"
    )
    time_limit: str | float | None = option(
        None,
        "end within this time, counted from the start of the command (of the call, from Python) to its end: loading, "
        "evaluation, card and report included. As many of the steps asked for as fit are done, with the whole "
        "schedule (warm-up, decay); a resumed run has what is left",
        "such as 20m, 1h30m, 90s; or seconds",
        "Ultralytics time, AutoGluon time_limit",
    )
    per_device_train_batch_size: int = option(64, "images of one forward pass on one device", "images")
    per_device_eval_batch_size: int = option(128, "the same for evaluation", "images")
    gradient_accumulation_steps: int = option(1, "forward passes for one step", "passes", "vit_jax accum_steps")
    global_batch_size: int | None = option(
        None,
        "images of one step over all devices: sets gradient_accumulation_steps for the devices there are",
        "images",
        "Table 3: 4096; Table 4: 512",
    )
    auto_batch_size: bool = option(
        False,
        "before the first step, find the largest per_device_train_batch_size that fits in memory; images of one step "
        "stay as asked for, and with them the learning rate: gradient_accumulation_steps follows",
        "",
        "accelerate's find_executable_batch_size",
    )
    image_size_schedule: dict[str, Any] = option(
        {},
        "train at other sizes, as BEGIN=SIZE: 0=128 30%=160 80%=224; before the first, and in evaluation, image_size",
        "steps, '30%' or '5 epochs' = pixels or [height,width]",
        "progressive resolution: arXiv:2104.00298",
        nargs="+",
    )
    batch_size_schedule: dict[str, Any] = option(
        {},
        "images of one step, as BEGIN=IMAGES: 50%=2048; in passes of at most per_device_train_batch_size",
        "steps or '50%' = images",
        "arXiv:1711.00489",
        nargs="+",
    )
    sweep: dict[str, Any] = option(
        {},
        "values to choose from by accuracy on dev_fraction, as name=[value,value]; then one run with the best",
        "",
        "Table 4: learning rates; B.1.1: dev splits",
        nargs="+",
    )
    combine_folds: str = option(
        "none",
        "after --folds: one model of the average of their weights, or the ensemble's logits of the evaluation images",
        "",
        "arXiv:2203.05482",
        ("none", "average", "ensemble"),
    )
    optim: str = option(
        "adamw_torch_fused",
        "optimizer",
        "",
        "Table 3: Adam; Table 4: SGD; muon: torch.optim.Muon for the blocks' matrices, AdamW for the rest; "
        "lamb: arXiv:1904.00962 (DeiT-III); schedule_free_adamw: arXiv:2405.15682, pip install 'hf-vit[schedulefree]'",
        ("adamw_torch_fused", "adamw_torch", "sgd", "muon", "lamb", "schedule_free_adamw"),
    )
    learning_rate: float = option(
        1e-4, "peak of the schedule", "", "Table 3: 2e-4 to 3e-3; Table 4: 0.001 to 0.06 (sgd)"
    )
    weight_decay: float = option(
        0.0,
        "decay of kernels, relative to the learning rate (never norms, biases, positions, tokens)",
        "",
        "Table 3: 0.03 to 0.3; Table 4: 0",
    )
    adam_beta1: float = option(0.9, "AdamW", "", "Table 3")
    adam_beta2: float = option(0.999, "AdamW", "", "Table 3")
    adam_epsilon: float = option(1e-8, "AdamW", "", "optax.scale_by_adam")
    momentum: float = option(0.9, "SGD", "", "Table 4")
    muon_momentum: float = option(
        0.95, "Muon", "", "torch.optim.Muon; its rate and decay are AdamW's (arXiv:2502.16982)"
    )
    layer_decay: float = option(
        1.0,
        "each layer's rate is this fraction of the next one's above it; the head has learning_rate, a hybrid's ResNet "
        "stages are layers; 1: off",
        "fraction",
        "BEiT, MAE: 0.65 (B), 0.75 (L)",
    )
    unfreeze_every: float | str = option(
        0,
        "head first, then from so many steps on the layer below it, and so on down; 0: all train from the start",
        "steps, or '2 epochs', '5%'",
        "arXiv:1801.06146",
    )
    lr_scheduler_type: str = option(
        "cosine",
        "shape after the warm-up",
        "",
        "Table 4: cosine; Table 3: linear; arXiv:2106.04560: rsqrt; BiT: step",
        ("cosine", "linear", "rsqrt", "step", "constant"),
    )
    lr_steps: list[float] = option(
        [0.3, 0.6, 0.9], "step: where the rate is divided by 10", "fraction of the run", "BiT-HyperRule", nargs="+"
    )
    rsqrt_timescale: float = option(
        10_000, "rsqrt: rate falls as 1 / sqrt(1 + steps since warm-up / this)", "steps", "big_vision utils.py"
    )
    lr_end: float = option(0.0, "rate that the schedule ends at", "", "vit_jax/utils.py linear_end: 1e-5")
    warmup_steps: float | str = option(
        0.05,
        "linear warm-up from 0; below 1: fraction of all steps",
        "steps, or '5 epochs', '10%'",
        "Table 3: 10,000; vit_jax: 500",
    )
    cooldown_steps: float | str = option(
        0,
        "linear fall to 0 at the end, on top of the schedule; below 1: fraction of all steps",
        "steps, or '5 epochs', '10%'",
        "arXiv:2106.04560: 50,000",
    )
    max_grad_norm: float = option(1.0, "clip the global norm of the gradient; 0: off", "", "Table 4")
    loss: str | None = option(
        None,
        "cross-entropy over classes (softmax; default of one label), one sigmoid each (default of several labels), "
        "squared error of standardized numbers (mse; default of a regression) or huber, whose errors above one "
        "standard deviation count linearly; without labels the colors of masked patches (pre-training)",
        "",
        "Table 3 pre-trains with sigmoid (vision_transformer issue 34); B.1.2: masked_patches",
        ("softmax", "sigmoid", "mse", "huber", MASKED_PATCHES),
    )
    class_weights: str = option(
        "none",
        "balanced: each class weighs in the loss by the inverse of its training images; evaluation is not weighted",
        "",
        "scikit-learn's class_weight",
        ("none", "balanced"),
    )
    logit_adjustment: float = option(
        0.0,
        "tau: in the loss of training, each logit gets tau x log of its class's fraction of the images; 0: off",
        "",
        "Menon et al. 2020, arXiv:2007.07314: 1",
    )
    train_sampling_strategy: str = option(
        "random",
        "random: each epoch shows every image once; balanced: all classes come equally often, an epoch is as long",
        "",
        "transformers",
        ("random", "balanced"),
    )
    label_smoothing_factor: float = option(0.0, "label smoothing", "0 to 1", "transformers")
    mixup_alpha: float = option(0.0, "Beta parameter of mixup; 0: off", "", "arXiv:1710.09412; AugReg: 0.2 to 0.8")
    cutmix_alpha: float = option(0.0, "Beta parameter of cutmix; 0: off", "", "arXiv:1905.04899")
    mixup_off_steps: float | str = option(
        0,
        "the last so many steps are trained without mixup and cutmix; below 1: fraction of all steps",
        "steps, or '10 epochs', '5%'",
        "timm mixup_off_epoch",
    )
    ema_decay: float = option(
        0.0, "average of the weights, which is what is evaluated and saved; 0: off", "per step", "Table 2: 0.9999"
    )
    seed: int = option(42, "of every random draw", "", "transformers")
    bf16: bool = option(False, "bfloat16 autocast", "", "transformers")
    fp16: bool = option(False, "float16 autocast with loss scaling", "", "transformers")
    fp8: bool = option(False, "float8 matrix products through torchao", "", "accelerate")
    torch_compile: bool = option(False, "compile network and loss as one graph", "", "torch.compile")
    torch_compile_backend: str = option("inductor", "backend of torch.compile", "", "torch.compile")
    torch_compile_mode: str | None = option(None, "mode of torch.compile, such as max-autotune", "", "torch.compile")
    cpu_kernels: bool = option(
        True,
        "on CPUs, kernels that were measured faster than PyTorch's own on this machine; they agree to rounding",
        "",
        "measured",
    )
    activation_checkpointing: bool = option(
        False, "recompute activations: less memory, a third more work", "", "arXiv:1604.06174"
    )
    use_cpu: bool = option(False, "train on the CPU although there is an accelerator", "", "transformers")
    dataloader_num_workers: int = option(
        0, "processes that read images, per device; results do not depend on it", "processes"
    )
    dataloader_prefetch_factor: int = option(2, "batches that each such process reads ahead", "batches", "torch")
    logging_steps: int = option(50, "a line of history every so many steps", "steps", "transformers")
    logging_strategy: str = option("steps", "when to log", "", "transformers", ("steps", "epoch", "no"))
    logging_first_step: bool = option(False, "also log the first step", "", "transformers")
    eval_strategy: str | None = option(
        None,
        "when to evaluate; default: steps if eval_steps is given, else only at the end",
        "",
        "transformers",
        ("steps", "epoch", "no"),
    )
    eval_steps: int | None = option(None, "evaluate every so many steps", "steps", "vit_jax eval_every: 100")
    eval_on_start: bool = option(False, "evaluate before the first step too", "", "transformers")
    eval_delay: float = option(0, "no evaluation before", "steps or epochs", "transformers")
    do_predict: bool = option(
        False, "at the end, write logits and labels of every evaluation image to predictions.npz", "", "transformers"
    )
    card_examples: int = option(
        0,
        "evaluation images shown on the card with what the model looks at; who sees the card sees these images",
        "images",
    )
    report: bool = option(
        False,
        "at the end, write report.html: curves, mistakes, likely wrong labels, with images; it stays on this machine "
        "unless --card_examples shows images on the card, which then links it",
    )
    save_strategy: str = option(
        "steps", "when to write a checkpoint", "", "transformers", ("steps", "epoch", "best", "no")
    )
    save_steps: int = option(500, "checkpoint every so many steps, and after the last", "steps", "transformers")
    save_total_limit: int | None = option(2, "checkpoints kept, besides the best", "checkpoints", "transformers")
    async_save: bool = option(
        False, "write checkpoints while training goes on; takes the memory of a copy of weights and optimizer state"
    )
    load_best_model_at_end: bool = option(False, "end with the best evaluated weights", "", "transformers")
    metric_for_best_model: str | None = option(
        None,
        "what `best` means; default: accuracy, mean_average_precision of several labels, r2 of a regression, or loss "
        "with masked_patches",
        "",
        "transformers",
    )
    patience: int | None = option(
        None, "stop after so many evaluations without a better metric_for_best_model", "evaluations", "Prechelt 1998"
    )
    greater_is_better: bool | None = option(None, "default: unless the metric is a loss or error", "", "transformers")
    resume_from_checkpoint: str | bool | None = option(
        None,
        "true: the newest complete checkpoint of output_dir, from the start if there is none; or its path",
        "",
        "transformers",
        nargs="?",
    )
    preview: str | bool | None = option(
        None,
        "write one augmented batch with its labels as a PNG (default OUTPUT_DIR_preview.png), and stop",
        "file",
        nargs="?",
    )
    report_to: list[str] = option(
        ["none"], "trackers: tensorboard, wandb, trackio, csv, ...", "", "accelerate", nargs="+"
    )
    run_name: str | None = option(None, "name in the trackers", "", "transformers")
    disable_tqdm: bool = option(False, "no progress bar", "", "transformers")
    push_to_hub: bool = option(False, "upload the finished folder", "", "transformers")
    hub_model_id: str | None = option(None, "repository to upload to; default: name of output_dir", "", "transformers")
    hub_strategy: str = option(
        "end",
        "when to upload: at the end, with every checkpoint, or then also the checkpoint itself, as last-checkpoint",
        "",
        "transformers",
        ("end", "every_save", "checkpoint"),
    )
    hub_private_repo: bool = option(False, "create the repository as private", "", "transformers")

    def __post_init__(self):
        if self.eval_strategy is None:
            self.eval_strategy = "steps" if self.eval_steps else "no"
        if self.eval_steps is None:
            self.eval_steps = self.logging_steps
        if self.metric_for_best_model is None and self.loss == MASKED_PATCHES:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            metric = self.metric_for_best_model.removeprefix("eval_")
            self.greater_is_better = not metric.endswith(SMALLER_IS_BETTER)
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        check_training(self)

    def for_problem(self, problem_type: str) -> "TrainArguments":
        """These arguments with the loss and the metric of the best model that the problem type needs.

        Raises:
            HFViTError: options that have no meaning for such labels.
        """
        if self.loss == MASKED_PATCHES:
            return self
        losses, metrics = LOSSES[problem_type], METRICS[problem_type]
        loss, metric = self.loss or losses[0], self.metric_for_best_model or metrics[0]
        check_problem(self, problem_type, loss, metric)
        return dataclasses.replace(self, loss=loss, metric_for_best_model=metric)


@dataclasses.dataclass
class Arguments:
    """The arguments of one run: the three groups, and the recipe and variant that they came from."""

    model: ModelArguments
    data: DataArguments
    train: TrainArguments
    recipe: str | None = None
    variant: str | None = None
    # Names of the options that the user gave, on the command line or from Python.
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)

    def __post_init__(self):
        check_run(self.model, self.data, self.train)

    @property
    def origin(self) -> str | None:
        """The recipe and its variant, as given to `--config`; None without a recipe."""
        return f"{self.recipe} --variant {self.variant}" if self.variant else self.recipe

    def as_dict(self) -> dict[str, Any]:
        """Every field of the three groups by its name."""
        flat: dict[str, Any] = {}
        for group in (self.model, self.data, self.train):
            flat |= dataclasses.asdict(group)
        return flat

    def non_default(self) -> dict[str, Any]:
        """The fields that differ from their defaults, by name."""
        defaults = Arguments(ModelArguments(), DataArguments(), TrainArguments()).as_dict()
        return {name: value for name, value in self.as_dict().items() if value != defaults[name]}

    def to_yaml(self) -> str:
        """The resolved config as YAML: with `--config` it gives the same run again."""
        lines = ["# Every argument of this run, resolved. Give it back with --config; flags override it.\n"]
        lines.append(yaml.safe_dump({ORIGIN: {"recipe": self.recipe, "variant": self.variant}}))
        for title, group in (("Model", self.model), ("Data", self.data), ("Training", self.train)):
            values = {k: v for k, v in dataclasses.asdict(group).items() if k not in OF_THE_LAUNCH}
            lines.append(f"\n# {title}\n" + yaml.safe_dump(values, sort_keys=False, default_flow_style=None))
        return "".join(lines)


GROUPS: dict[str, type] = {"model": ModelArguments, "data": DataArguments, "train": TrainArguments}
FIELDS: dict[str, dataclasses.Field] = {f.name: f for group in GROUPS.values() for f in dataclasses.fields(group)}
