"""What the parts of ViT are worth: positions, pooling and its rate, head, optimizer, masked patches.

Tests: tests/training/test_study.py.
"""

from typing import Any

from .design import CIFAR10, EVERY, Rule, Scores, Study, StudyRun, by_scale


POSITIONS, POOLING, HEAD, OPTIMIZER, MASKED = (
    "position embeddings", "pooling and its rate", "head", "optimizer", "masked patches, few labels",
)  # fmt: skip
LEARNED = "1-D, learned"  # the paper's; "learned1d" is the same until the resolution changes
LOW, HIGH = "low rate", "high rate"
TIED = 0.003


def variants(settings: dict[str, Any]) -> list[tuple[str, str, str, dict[str, Any], dict[str, Any]]]:
    """(panel, series, x, fields of the model, arguments of the run), one change at a time."""
    rate, rates = settings["train"]["learning_rate"], settings["rates"]
    width = settings["model"]["hidden_size"]
    token = {"pooling": "token", "use_class_token": True}
    mean = {"pooling": "gap", "use_class_token": False}
    variants = [
        (POSITIONS, name, "", {"position_embedding_type": kind}, {})
        for name, kind in {"none": "none", LEARNED: "learned", "2-D, sines and cosines": "sincos2d"}.items()
    ]
    for name, fields in {"class token": token, "mean of the tokens": mean}.items():
        variants += [(POOLING, name, which, fields, {"learning_rate": rates[which]}) for which in (LOW, HIGH)]
    variants.append((HEAD, "linear", "", {}, {}))
    variants.append((HEAD, "one hidden layer", "", {"representation_size": width}, {}))
    variants.append((OPTIMIZER, "Adam", "", {}, {"learning_rate": rate}))
    variants.append((OPTIMIZER, "SGD", "", {}, {"optim": "sgd", "learning_rate": settings["sgd_rate"]}))
    return variants


def ablation_runs(settings: dict[str, Any]) -> list[StudyRun]:
    """Every variant from scratch, at equal steps; then masked patches on all images, labels on few."""
    common = settings["train"] | {"image_size": settings["image_size"], "dataset": settings["data"]["cifar10"]}
    network, run, runs = settings["model"], settings["run"], []
    for number, (panel, series, x, fields, changed) in enumerate(variants(settings)):
        for seed in settings["seeds"]:
            options = common | {"max_steps": settings["steps"], "set": network | fields | run, "seed": seed} | changed
            runs.append(StudyRun(f"variant-{number}-{seed}", "pretrain", options, series, x, seed, panel))
    for seed in settings["seeds"]:
        options = common | {"max_steps": settings["masked_steps"], "set": network | run, "seed": seed}
        runs.append(StudyRun(f"masked-{seed}", "pretrain", options | {"loss": "masked_patches"}))
        few = common | {"max_steps": settings["finetune_steps"], "train_fraction": settings["few"], "seed": seed}
        starts = {
            "from scratch": {"set": network | run},
            "masked patches first": {"model": f"run:masked-{seed}", "set": run},
        }
        for number, (series, start) in enumerate(starts.items()):
            runs.append(StudyRun(f"few-{number}-{seed}", "finetune", few | start, series, "", seed, MASKED))
    return runs


def positions_needed(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    leads = {
        name: scores.difference(name, "none", "", POSITIONS) for name in scores.series(POSITIONS) if name != "none"
    }
    return all(lead.above() for lead in leads.values()), "; ".join(f"{name}: {lead}" for name, lead in leads.items())


def positions_alike(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    names = [name for name in scores.series(POSITIONS) if name not in ("none", LEARNED)]
    leads = {name: scores.difference(name, LEARNED, "", POSITIONS) for name in names}
    return all(lead.tied(TIED) for lead in leads.values()), "; ".join(
        f"{name}: {lead}" for name, lead in leads.items()
    )


def pooling_pattern(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    tuned = scores.difference_of(("mean of the tokens", LOW, POOLING), ("class token", HIGH, POOLING))
    wrong = scores.difference_of(("mean of the tokens", HIGH, POOLING), ("mean of the tokens", LOW, POOLING))
    text = f"mean at the low rate over class token at the high: {tuned}; mean, high over low rate: {wrong}"
    return tuned.tied(TIED) and wrong.below(), text


def head_alike(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    lead = scores.difference("one hidden layer", "linear", "", HEAD)
    return lead.tied(TIED), str(lead)


def adam_better(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    lead = scores.difference("Adam", "SGD", "", OPTIMIZER)
    return lead.above(), str(lead)


def masked_helps(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    lead = scores.difference("masked patches first", "from scratch", "", MASKED)
    return lead.above(), str(lead)


STUDY = Study(
    name="ablations",
    question="What are the parts of ViT worth?",
    source="arXiv:2010.11929, Tables 7 and 8, Figure 9, B.1.2; SimpleViT (arXiv:2205.01580) for the head",
    x_label="variant",
    data=CIFAR10,
    settings=by_scale({
        "cpu": {
            "rates": {LOW: 3e-4, HIGH: 8e-4}, "sgd_rate": 0.03, "steps": 600, "masked_steps": 600,
            "finetune_steps": 200, "few": 0.1,
        },
        "gpu": {
            "rates": {LOW: 3e-4, HIGH: 8e-4}, "sgd_rate": 0.03, "steps": 20000, "masked_steps": 20000,
            "finetune_steps": 2000, "few": 0.1,
        },
        "smoke": {
            "train": EVERY["smoke"]["train"] | {"learning_rate": 1e-3}, "rates": {LOW: 3e-4, HIGH: 8e-4},
            "sgd_rate": 0.03, "steps": 2, "masked_steps": 2, "finetune_steps": 2, "few": 1.0, "seeds": [0],
        },
    }),
    runs=ablation_runs,
    rules=(
        Rule(
            "Without position embeddings ViT is clearly worse",
            "every kind of position embedding is above none by more than two standard errors",
            positions_needed,
        ),
        Rule(
            "The kinds of position embeddings hardly differ",
            "each is within 0.3 points of learned ones, or within two standard errors",
            positions_alike,
        ),
        Rule(
            "Class token and mean of the tokens are equal, each at its own learning rate (8e-4 and 3e-4)",
            "the difference is within 0.3 points or two standard errors, and the mean is clearly worse at 8e-4",
            pooling_pattern,
        ),
        Rule(
            "A head with a hidden layer is worth no more than a linear one",
            "the difference is within 0.3 points or two standard errors",
            head_alike,
        ),
        Rule("Adam trains better than SGD", "the gain is above two standard errors", adam_better),
        Rule(
            "Masked patch prediction helps where labels are few",
            "the gain over training from scratch at equal steps with labels is above two standard errors",
            masked_helps,
        ),
    ),
)  # fmt: skip
