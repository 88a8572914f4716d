"""Who gains more from more pre-training images: ViT, ResNet or hybrid? Nested subsets, equal steps.

Tests: tests/training/test_study.py.
"""

import itertools
from typing import Any

from .design import CIFAR10, RIVALS, Rule, Scores, Study, StudyRun, by_scale


VIT, RESNET, HYBRID = "ViT", "ResNet (BiT)", "hybrid"
FEW, TUNED = "few-shot, frozen", "fine-tuned"


def networks_from_scratch(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of a start from scratch, by family."""
    return {
        VIT: {"set": settings["model"] | settings["run"]},
        RESNET: {"baseline": settings["bit"]},
        HYBRID: {"set": settings["model"] | settings["hybrid"] | settings["run"]},
    }


def data_scale_runs(settings: dict[str, Any]) -> list[StudyRun]:
    """Pre-train on parts of every second class, each inside the next; probe and fine-tune on the other classes."""
    common = settings["train"] | {"image_size": settings["image_size"]}
    runs = [StudyRun(f"classes-{n}", "subset", {"dataset": settings["data"]["cifar10"], "first": n}) for n in (0, 1)]
    for number, (series, network) in enumerate(networks_from_scratch(settings).items()):
        for fraction in settings["fractions"]:
            for seed in settings["seeds"]:
                name = f"pretrained-{number}-{fraction:g}-{seed}"
                options = common | {"dataset": "run:classes-0", "train_fraction": fraction, "seed": seed} | network
                runs.append(StudyRun(name, "pretrain", options | {"max_steps": settings["pretrain_steps"]}))
                options = {"model": f"run:{name}", "dataset": "run:classes-1"}
                probe = options | {"shots": settings["shots"], "images": settings["probe_images"]}
                probed = StudyRun(
                    f"probed-{number}-{fraction:g}-{seed}",
                    "probe",
                    probe,
                    series,
                    fraction,
                    seed,
                    FEW,
                    "few_shot_accuracy",
                )
                runs.append(probed)
                options |= common | {"max_steps": settings["finetune_steps"], "seed": seed}
                options |= {"train_fraction": settings["finetune_fraction"]}
                options |= {"baseline": settings["bit"]} if series == RESNET else {"set": settings["run"]}
                runs.append(
                    StudyRun(f"tuned-{number}-{fraction:g}-{seed}", "finetune", options, series, fraction, seed, TUNED)
                )
    return runs


def gap_closes(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    """ResNet minus ViT, from the smallest fraction to the largest."""
    texts, shows = [], True
    for panel in (FEW, TUNED):
        gaps = [scores.difference(RESNET, VIT, fraction, panel) for fraction in sorted(settings["fractions"])]
        shows &= all(after.mean < before.mean for before, after in itertools.pairwise(gaps))
        texts.append(f"{panel}: {', '.join(str(gap) for gap in gaps)}")
    return shows, "ResNet over ViT, " + "; ".join(texts)


def crossing(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    few, many = min(settings["fractions"]), max(settings["fractions"])
    gaps = {fraction: scores.difference(VIT, RESNET, fraction, FEW) for fraction in (few, many)}
    return -gaps[few].mean > 0 and gaps[many].above(), f"ViT over ResNet, few-shot: {gaps[few]} and {gaps[many]}"


STUDY = Study(
    name="data_scale",
    question="Who gains more from more pre-training images: ViT, ResNet or hybrid?",
    source="arXiv:2010.11929, Figures 3 and 4",
    x_label="fraction of the pre-training images",
    data=CIFAR10,
    settings=by_scale(RIVALS, {
        "cpu": {
            "fractions": [0.01, 0.1, 1.0], "shots": 10, "probe_images": 500, "pretrain_steps": 500,
            "finetune_steps": 150, "finetune_fraction": 0.1,
        },
        "gpu": {
            "fractions": [0.01, 0.1, 1.0], "shots": 10, "probe_images": 500, "pretrain_steps": 20000,
            "finetune_steps": 2000, "finetune_fraction": 0.1,
        },
        "smoke": {
            "fractions": [0.5, 1.0], "shots": 2, "probe_images": 20, "pretrain_steps": 2, "finetune_steps": 2,
            "finetune_fraction": 1.0, "seeds": [0],
        },
    }),
    runs=data_scale_runs,
    rules=(
        Rule(
            "ViT gains more from data than ResNet",
            "the lead of the ResNet falls with every step in the number of images, few-shot and fine-tuned",
            gap_closes,
        ),
        Rule(
            "ViT overtakes ResNet",
            "few-shot, the ResNet leads at the fewest images, and ViT clearly (two standard errors) at the most",
            crossing,
        ),
    ),
    log_x=True,
    notes=(
        "All networks get the same steps on images of every second class, smaller sets more often; the same "
        "settings for all, no early stopping. Few-shot: ridge regression on frozen features of the other classes, "
        "mean of three draws.",
    ),
)  # fmt: skip
