"""Who gains more from more pre-training pictures: ViT, ResNet or hybrid? Nested subsets, equal updates."""

import itertools
from typing import Any

from .design import CIFAR10, RIVALS, Cell, Rule, Scores, Study, by_scale


VIT, RESNET, HYBRID = "ViT", "ResNet (BiT)", "hybrid"
FEW, TUNED = "few-shot, frozen", "fine-tuned"


def networks(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of a start from scratch, by family."""
    return {
        VIT: {"set": settings["model"] | settings["run"]},
        RESNET: {"peer": settings["bit"]},
        HYBRID: {"set": settings["model"] | settings["hybrid"] | settings["run"]},
    }


def cells(settings: dict[str, Any]) -> list[Cell]:
    """Pre-train on parts of every second class, each inside the next; probe and fine-tune on the other classes."""
    common = settings["train"] | {"image_size": settings["image_size"]}
    found = [Cell(f"classes-{n}", "subset", {"dataset": settings["data"]["cifar10"], "first": n}) for n in (0, 1)]
    for number, (series, network) in enumerate(networks(settings).items()):
        for share in settings["shares"]:
            for seed in settings["seeds"]:
                name = f"pretrained-{number}-{share:g}-{seed}"
                options = common | {"dataset": "cell:classes-0", "train_fraction": share, "seed": seed} | network
                found.append(Cell(name, "pretrain", options | {"max_steps": settings["pretrain_steps"]}))
                options = {"model": f"cell:{name}", "dataset": "cell:classes-1"}
                probe = options | {"shots": settings["shots"], "pictures": settings["probe_pictures"]}
                probed = Cell(
                    f"probed-{number}-{share:g}-{seed}", "probe", probe, series, share, seed, FEW, "few_shot_accuracy"
                )
                found.append(probed)
                options |= common | {"max_steps": settings["finetune_steps"], "seed": seed}
                options |= {"train_fraction": settings["finetune_fraction"]}
                options |= {"peer": settings["bit"]} if series == RESNET else {"set": settings["run"]}
                found.append(Cell(f"tuned-{number}-{share:g}-{seed}", "finetune", options, series, share, seed, TUNED))
    return found


def gap_closes(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    """ResNet minus ViT, from the smallest share to the largest."""
    texts, shows = [], True
    for panel in (FEW, TUNED):
        gaps = [scores.difference(RESNET, VIT, share, panel) for share in sorted(settings["shares"])]
        shows &= all(after.mean < before.mean for before, after in itertools.pairwise(gaps))
        texts.append(f"{panel}: {', '.join(str(gap) for gap in gaps)}")
    return shows, "ResNet over ViT, " + "; ".join(texts)


def crossing(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    few, many = min(settings["shares"]), max(settings["shares"])
    gaps = {share: scores.difference(VIT, RESNET, share, FEW) for share in (few, many)}
    return -gaps[few].mean > 0 and gaps[many].above(), f"ViT over ResNet, few-shot: {gaps[few]} and {gaps[many]}"


STUDY = Study(
    name="data_scale",
    question="Who gains more from more pre-training pictures: ViT, ResNet or hybrid?",
    source="arXiv:2010.11929, Figures 3 and 4",
    x_label="share of the pre-training pictures",
    data=CIFAR10,
    settings=by_scale(RIVALS, {
        "cpu": {
            "shares": [0.01, 0.1, 1.0], "shots": 10, "probe_pictures": 500, "pretrain_steps": 500,
            "finetune_steps": 150, "finetune_fraction": 0.1,
        },
        "gpu": {
            "shares": [0.01, 0.1, 1.0], "shots": 10, "probe_pictures": 500, "pretrain_steps": 20000,
            "finetune_steps": 2000, "finetune_fraction": 0.1,
        },
        "smoke": {
            "shares": [0.5, 1.0], "shots": 2, "probe_pictures": 20, "pretrain_steps": 2, "finetune_steps": 2,
            "finetune_fraction": 1.0, "seeds": [0],
        },
    }),
    cells=cells,
    rules=(
        Rule(
            "ViT gains more from data than ResNet",
            "the lead of the ResNet falls with every step in the number of pictures, few-shot and fine-tuned",
            gap_closes,
        ),
        Rule(
            "ViT overtakes ResNet",
            "few-shot, the ResNet leads at the fewest pictures, and ViT clearly (two standard errors) at the most",
            crossing,
        ),
    ),
    log_x=True,
    notes=(
        "All networks get the same updates on pictures of every second class, smaller sets more often; the same "
        "settings for all, no early stopping. Few-shot: ridge regression on frozen features of the other classes, "
        "mean of three draws.",
    ),
)  # fmt: skip
