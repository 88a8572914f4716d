"""Accuracy against exact operations of training: ViT, ResNet and hybrid at several sizes.

Tests: tests/training/test_study.py.
"""

import itertools
import math
from typing import Any

from .data_scale import HYBRID, RESNET, VIT
from .design import CIFAR10, RIVALS, Rule, Scores, Study, StudyRun, by_scale


def networks_of_width(settings: dict[str, Any], width: float) -> dict[str, dict[str, Any]]:
    """Options of each family at a width, a multiple of the scale's."""
    base = dict(settings["model"])
    for name in ("hidden_size", "intermediate_size"):
        base[name] = round(base[name] * width)
    bit = settings["bit"] | {"embedding_size": round(settings["bit"]["embedding_size"] * width)}
    bit["hidden_sizes"] = [round(size * width) for size in bit["hidden_sizes"]]
    mixed = base | settings["hybrid"]
    halves = max(1, round(2 * mixed["resnet_width_factor"] * width))  # its GroupNorm wants multiples of 32 channels
    mixed["resnet_width_factor"] = halves / 2
    return {
        VIT: {"set": base | settings["run"]},
        RESNET: {"baseline": bit},
        HYBRID: {"set": mixed | settings["run"]},
    }


def compute_runs(settings: dict[str, Any]) -> list[StudyRun]:
    """Train every family at every width on all images, for the same steps."""
    common = settings["train"] | {"image_size": settings["image_size"], "dataset": settings["data"]["cifar10"]}
    common["max_steps"] = settings["steps"]
    return [
        StudyRun(
            f"trained-{number}-{width:g}-{seed}", "pretrain", common | network | {"seed": seed}, series, width, seed
        )
        for width in settings["widths"]
        for number, (series, network) in enumerate(networks_of_width(settings, width).items())
        for seed in settings["seeds"]
    ]


def hybrid_first(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    """The hybrid's lead by width."""
    widths = sorted(settings["widths"])
    leads = [scores.difference(HYBRID, VIT, width) for width in widths]
    shows = leads[0].mean >= 0 and leads[-1].mean < leads[0].mean
    return shows, "; ".join(f"width {width:g}: {lead}" for width, lead in zip(widths, leads))


def interpolated(scores: Scores, series: str, exaflops: float) -> float | None:
    """Mean accuracy of a family at a cost between its sizes, on a logarithmic scale; None outside of them."""
    points = sorted(
        (next(row.exaflops for row in scores.rows if (row.series, row.x) == (series, x)), scores.mean(series, x))
        for x in {row.x for row in scores.rows if row.series == series}
    )
    for (low, before), (high, after) in itertools.pairwise(points):
        if low <= exaflops <= high:
            return before + (after - before) * math.log(exaflops / low) / math.log(high / low)
    return None


def vit_cheaper(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    """ViT against the ResNet of the same cost, wherever there is one."""
    texts, shows = [], []
    for row in {row.x: row for row in scores.rows if row.series == VIT}.values():
        other = interpolated(scores, RESNET, row.exaflops)
        if other is not None:
            lead = scores.mean(VIT, row.x) - other
            shows.append(lead > 0)
            texts.append(f"at {row.exaflops:.3g} exaFLOPs: {100 * lead:+.2f} points")
    return bool(shows) and all(shows), "; ".join(texts) or "no size of one costs what lies between sizes of the other"


STUDY = Study(
    name="compute",
    question="Which family is most accurate for its operations of training?",
    source="arXiv:2010.11929, Figure 5 and Table 6",
    x_label="width",
    data=CIFAR10,
    settings=by_scale(RIVALS, {
        "cpu": {"widths": [0.5, 1.0, 2.0], "steps": 800},
        "gpu": {"widths": [0.25, 0.5, 1.0, 2.0], "steps": 10000},
        "smoke": {"widths": [0.5, 1.0], "steps": 2, "seeds": [0]},
    }),
    runs=compute_runs,
    rules=(
        Rule(
            "The hybrid is ahead of ViT at small compute, and its lead shrinks with size",
            "at the smallest width its mean is not below ViT's, and at the largest the lead is smaller than there",
            hybrid_first,
        ),
        Rule(
            "ViT is more accurate than a ResNet of the same cost",
            "at every ViT whose cost lies between two ResNets', above the line between them (logarithmic)",
            vit_cheaper,
        ),
    ),
    x_is_compute=True,
    notes=("Trained from scratch on all images. The paper's claim is about pre-training on 300 million.",),
)  # fmt: skip
