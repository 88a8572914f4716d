"""Does fine-tuning at a higher resolution help? Against the same further steps at the old one.

Tests: tests/training/test_study.py.
"""

from typing import Any

from .design import CIFAR10, Rule, Scores, Study, StudyRun, by_scale


BEFORE = "before"
MIN_GAIN = 0.005  # accuracy


def resolution_runs(settings: dict[str, Any]) -> list[StudyRun]:
    """Train at one resolution; go on for the same steps at that one and at higher ones."""
    common, low = settings["train"] | {"dataset": settings["data"]["cifar10"]}, settings["image_size"]
    runs = []
    for seed in settings["seeds"]:
        options = common | {"set": settings["model"] | settings["run"], "image_size": low, "seed": seed}
        options["max_steps"] = settings["pretrain_steps"]
        runs.append(StudyRun(f"before-{seed}", "pretrain", options, BEFORE, low, seed))
        for size in [low, *settings["higher"]]:
            options = common | {"model": f"run:before-{seed}", "set": settings["run"], "image_size": size}
            options |= {"max_steps": settings["finetune_steps"], "seed": seed}
            options["learning_rate"] = settings["finetune_rate"]
            runs.append(StudyRun(f"after-{size}-{seed}", "finetune", options, "further training", size, seed))
    return runs


def higher_helps(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    low, texts, shows = settings["image_size"], [], True
    for size in settings["higher"]:
        gain = scores.difference_of(("further training", size), ("further training", low))
        shows &= gain.above(MIN_GAIN)
        texts.append(f"{size} over {low} px: {gain}")
    return shows, "; ".join(texts)


STUDY = Study(
    name="resolution",
    question="Does fine-tuning at a higher resolution beat the same further steps at the old one?",
    source="arXiv:2010.11929, section 3.2; expected: +1.5 to 3 points from 224 to 384 px on ImageNet",
    x_label="resolution of the further training (px)",
    data=CIFAR10,
    settings=by_scale({
        "cpu": {"higher": [48], "pretrain_steps": 400, "finetune_steps": 100, "finetune_rate": 5e-4},
        "gpu": {"higher": [48, 64], "pretrain_steps": 20000, "finetune_steps": 2000, "finetune_rate": 3e-4},
        "smoke": {"higher": [24], "pretrain_steps": 2, "finetune_steps": 2, "finetune_rate": 1e-3},
    }),
    runs=resolution_runs,
    rules=(
        Rule(
            "Fine-tuning at a higher resolution beats the same further steps at the old one",
            "at every higher resolution, the gain is 0.5 points or more and above two standard errors",
            higher_helps,
        ),
    ),
    notes=(
        "All images of CIFAR-10 have 32 px: above that they are enlarged, so that a patch covers less of each. "
        "A higher resolution costs more operations for the same steps.",
    ),
)  # fmt: skip
