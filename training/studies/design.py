"""The parts of a study: its runs, and the rules, stated beforehand, by which their scores are judged.

For study.py and the studies in this folder. A run is one execution of a stage (stages.py), in its own folder with a
facts.json; a score is one number of the table.

Tests: tests/training/test_study.py.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


MIN_STANDARD_ERRORS = 2.0  # that a mean difference must differ from zero


@dataclass(frozen=True)
class StudyRun:
    """One run.

    Attributes:
        name: of its folder. stage: a key of `stages.STAGES`.
        options: the stage's arguments; a value `run:NAME` stands for that run's folder.
        panel, series, x, seed: its position in tables and figures; without a series, only other runs use it.
        metric: the entry of its results that is the score.
    """

    name: str
    stage: str
    options: dict[str, Any]
    series: str | None = None
    x: float | str = ""
    seed: int = 0
    panel: str = ""
    metric: str = "accuracy"


@dataclass(frozen=True)
class Score:
    """One measured number and its cost: the exaFLOPs of its run and of those that it starts from."""

    panel: str
    series: str
    x: float | str
    seed: int
    value: float
    n: int
    exaflops: float


@dataclass(frozen=True)
class Difference:
    """Differences of scores, paired by seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite for one seed."""
        count = len(self.values)
        return statistics.stdev(self.values) / math.sqrt(count) if count > 1 else math.inf

    def above(self, margin: float = 0.0) -> bool:
        """Whether the mean is at least `margin`, and more than two standard errors above zero."""
        return self.mean >= margin and self.mean > MIN_STANDARD_ERRORS * self.error

    def below(self) -> bool:
        """Whether the mean is more than two standard errors below zero."""
        return self.mean < -MIN_STANDARD_ERRORS * self.error

    def tied(self, margin: float) -> bool:
        """Whether the mean is within `margin` of zero, or within two standard errors."""
        return abs(self.mean) <= max(margin, MIN_STANDARD_ERRORS * self.error if len(self.values) > 1 else 0.0)

    def __str__(self) -> str:
        error = f" ± {100 * self.error:.2f}" if len(self.values) > 1 else ""
        return f"{100 * self.mean:+.2f}{error} points"


class Scores:
    """The scores of a study, by series, x and panel."""

    def __init__(self, rows: Iterable[Score]):
        self.rows = list(rows)

    def at(self, series: str, x: float | str = "", panel: str = "") -> dict[int, float]:
        """Values by seed."""
        return {row.seed: row.value for row in self.rows if (row.panel, row.series, row.x) == (panel, series, x)}

    def mean(self, series: str, x: float | str = "", panel: str = "") -> float:
        return statistics.fmean(self.at(series, x, panel).values())

    def difference(self, a: str, b: str, x: float | str = "", panel: str = "") -> Difference:
        """Of series `a` over series `b`, at the same x and panel."""
        return self.difference_of((a, x, panel), (b, x, panel))

    def difference_of(self, a: tuple, b: tuple) -> Difference:
        """Of one position over another, each (series, x[, panel]), for the seeds that both have."""
        first, second = self.at(*a), self.at(*b)
        return Difference(tuple(first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())))

    def panels(self) -> list[str]:
        return list(dict.fromkeys(row.panel for row in self.rows))

    def series(self, panel: str) -> list[str]:
        return list(dict.fromkeys(row.series for row in self.rows if row.panel == panel))

    def places(self, panel: str) -> list[float | str]:
        return list(dict.fromkeys(row.x for row in self.rows if row.panel == panel))


@dataclass(frozen=True)
class Rule:
    """A claim and when it counts as shown.

    `judge(scores, settings)` returns the answer (None: not asked) and the numbers behind it.
    """

    claim: str
    accept: str
    judge: Callable[[Scores, dict[str, Any]], tuple[bool | None, str]]


@dataclass(frozen=True)
class Study:
    """One question.

    Attributes:
        name: of the command and the file. question, source: for the report.
        x_label: of the figure. data: the data sets it reads, by the name that `--data NAME=PATH` replaces.
        settings: by scale; `runs(settings)` with the data's names and `seeds` among them.
    """

    name: str
    question: str
    source: str
    x_label: str
    data: dict[str, str]
    settings: dict[str, dict[str, Any]]
    runs: Callable[[dict[str, Any]], list[StudyRun]]
    rules: tuple[Rule, ...]
    log_x: bool = False
    x_is_compute: bool = False  # the figure's x is the exaFLOPs of each score
    notes: tuple[str, ...] = field(default=())


CIFAR10 = {"cifar10": "uoft-cs/cifar10"}

# Common settings by scale: small plain ViTs, their training, seeds, image size.
EVERY: dict[str, dict[str, Any]] = {
    "cpu": {
        "seeds": [0, 1, 2], "image_size": 32,
        "model": {
            "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 256,
            "patch_size": 8, "pooling": "gap", "use_class_token": False,
        },
        # Fields that a config does not keep. The fused CPU kernel's backward pass is slower in bfloat16 than eager.
        "run": {"attn_implementation": "eager"},
        "train": {
            "per_device_train_batch_size": 64, "per_device_eval_batch_size": 250, "bf16": True,
            "dataloader_num_workers": 1, "learning_rate": 1e-3, "weight_decay": 0.05, "warmup_steps": 0.1,
            "crop": "resize_small_random", "resize_small": 1.25, "logging_steps": 100,
        },
    },
    "gpu": {
        "seeds": [0, 1, 2], "image_size": 32,
        "model": {
            "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536,
            "patch_size": 4, "pooling": "gap", "use_class_token": False, "drop_path_rate": 0.1,
        },
        "run": {},
        "train": {
            "per_device_train_batch_size": 256, "per_device_eval_batch_size": 1000, "bf16": True,
            "dataloader_num_workers": 12, "learning_rate": 1e-3, "weight_decay": 0.05, "warmup_steps": 0.1,
            "crop": "resize_small_random", "resize_small": 1.25, "auto_augment": "rand-m9-mstd0.5-inc1",
        },
    },
    "smoke": {
        "data": {"cifar10": "digits"}, "seeds": [0, 1], "image_size": 16, "run": {},
        "model": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
            "patch_size": 8,
        },
        "train": {"per_device_train_batch_size": 8, "crop": "squash", "logging_steps": 1, "warmup_steps": 1},
    },
}  # fmt: skip
SCALES = tuple(EVERY)

# The other two families of the paper; at 32 px, with the ViT's number of tokens, or a ResNet of similar cost.
BIT = {
    "model_type": "bit", "embedding_size": 32, "hidden_sizes": [64, 128, 256], "depths": [2, 2, 2], "num_groups": 8,
    "layer_type": "preactivation",
}  # fmt: skip
LARGE_BIT = {"embedding_size": 64, "hidden_sizes": [256, 512, 1024], "depths": [3, 4, 6], "num_groups": 32}
SMOKE_BIT = {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "num_groups": 4}
HYBRID = {"resnet_depths": [1], "resnet_width_factor": 0.5, "patch_size": 2}
RIVALS = {
    "cpu": {"bit": BIT, "hybrid": HYBRID},
    "gpu": {"bit": BIT | LARGE_BIT, "hybrid": HYBRID},
    "smoke": {"bit": BIT | SMOKE_BIT, "hybrid": HYBRID},
}


def by_scale(*layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A study's settings: the common ones, and what each layer adds or replaces at a scale."""
    settings = {scale: dict(common) for scale, common in EVERY.items()}
    for layer in layers:
        for scale, values in layer.items():
            settings[scale] |= values
    return settings
