"""Does pre-training help, and where? The same fine-tuning from scratch and from a model of other classes.

Tests: tests/training/test_study.py.
"""

from typing import Any

from .design import CIFAR10, Difference, Rule, Scores, Study, StudyRun, by_scale


SCRATCH, PRETRAINED = "from scratch", "pre-trained"


def pretraining_runs(settings: dict[str, Any]) -> list[StudyRun]:
    """Pre-train on every second class, fine-tune on the others, with all and with few of their labels."""
    network, run = settings["model"] | settings["run"], settings["run"]
    common = settings["train"] | {"image_size": settings["image_size"]}
    runs = [StudyRun(f"classes-{n}", "subset", {"dataset": settings["data"]["cifar10"], "first": n}) for n in (0, 1)]
    for seed in settings["seeds"]:
        options = {"dataset": "run:classes-0", "set": network, "max_steps": settings["pretrain_steps"], "seed": seed}
        runs.append(StudyRun(f"pretrained-{seed}", "pretrain", common | options))
    for fraction in settings["fractions"]:
        for seed in settings["seeds"]:
            starts = {SCRATCH: {"set": network}, PRETRAINED: {"model": f"run:pretrained-{seed}", "set": run}}
            for number, (series, start) in enumerate(starts.items()):
                options = common | {"dataset": "run:classes-1", "train_fraction": fraction, "seed": seed, **start}
                options["max_steps"] = settings["finetune_steps"]
                name = f"finetuned-{fraction:g}-{seed}-{number}"
                runs.append(StudyRun(name, "finetune", options, series, fraction, seed))
    return runs


def gains_of_pretraining(scores: Scores, settings: dict[str, Any]) -> tuple[dict[float, Difference], str]:
    """Of pre-training, by fraction; and in words."""
    gains = {x: scores.difference(PRETRAINED, SCRATCH, x) for x in sorted(settings["fractions"])}
    return gains, "; ".join(f"{x:.0%} of the labels: {gain}" for x, gain in gains.items())


def helps(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    gains, text = gains_of_pretraining(scores, settings)
    return all(gain.above() for gain in gains.values()), text


def most_at_few(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    gains, text = gains_of_pretraining(scores, settings)
    few, middle = min(gains), sorted(gains)[len(gains) // 2]
    return gains[few].mean == max(gain.mean for gain in gains.values()) and gains[middle].above(), text


STUDY = Study(
    name="pretraining",
    question="Does fine-tuning from a pre-trained ViT beat the same fine-tuning from scratch, at equal steps?",
    source="arXiv:2010.11929, Figure 3 and Table 5",
    x_label="fraction of the labels of the fine-tuning classes",
    data=CIFAR10,
    settings=by_scale({
        "cpu": {"fractions": [0.01, 0.1, 1.0], "pretrain_steps": 500, "finetune_steps": 100},
        "gpu": {"fractions": [0.01, 0.1, 1.0], "pretrain_steps": 15000, "finetune_steps": 3000},
        "smoke": {"fractions": [0.5, 1.0], "pretrain_steps": 2, "finetune_steps": 2},
    }),
    runs=pretraining_runs,
    rules=(
        Rule(
            "Pre-training beats training from scratch at equal steps of fine-tuning",
            "at every fraction of the labels, the gain is above two standard errors",
            helps,
        ),
        Rule(
            "It helps most where labels are few",
            "the gain is largest at the smallest fraction, and clear at the middle one",
            most_at_few,
        ),
    ),
    log_x=True,
    notes=(
        "Pre-trained on the first, third, ... class, fine-tuned and tested on the others: no image and no class is "
        "in both. Its steps come on top of those of fine-tuning.",
    ),
)  # fmt: skip
