"""Noisy Student: a teacher labels images, a larger student learns them under noise and is the next teacher.

Tests: tests/training/test_study.py.
"""

from typing import Any

from .design import CIFAR10, Rule, Scores, Study, StudyRun, by_scale


TEACHER, STUDENT, CONTROL = "teacher", "student", "student's network and noise, labels only"


def noisy_student_runs(settings: dict[str, Any]) -> list[StudyRun]:
    """Teacher on the labelled part; then in turn pseudo-labels for the rest, and a student on both."""
    data = settings["data"]["cifar10"]
    common, noise = settings["train"] | {"image_size": settings["image_size"]}, settings["noise"]
    labelled, runs = settings["labelled"], []
    larger = {"set": settings["model"] | settings["student"] | settings["run"]}
    base, baseline = {"set": settings["model"] | settings["run"]}, settings["baseline"]
    network = {"baseline": baseline} if baseline else base
    for seed in settings["seeds"]:
        options = common | {"dataset": data, "train_fraction": labelled, "seed": seed}
        steps = {"max_steps": settings["steps"]}
        teacher, external = f"teacher-{seed}", settings["teacher"]
        if external is None:
            runs.append(StudyRun(teacher, "pretrain", options | steps | network, TEACHER, 0, seed))
        for turn in range(1, settings["turns"] + 1):
            labels = {
                "dataset": data,
                "labelled": labelled,
                "keep": settings["keep"],
                "confidence": settings["confidence"],
            }
            labels["model"] = external if turn == 1 and external is not None else f"run:{teacher}"
            runs.append(StudyRun(f"labels-{turn}-{seed}", "pseudo_labels", labels))
            teacher = f"student-{turn}-{seed}"
            student = common | noise | larger | {"dataset": f"run:labels-{turn}-{seed}", "seed": seed}
            runs.append(StudyRun(teacher, "pretrain", student | steps, STUDENT, turn, seed))
        runs.append(StudyRun(f"control-{seed}", "pretrain", options | noise | larger | steps, CONTROL, 0, seed))
    return runs


def student_better(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    if settings["teacher"] is not None:
        lead = scores.difference_of((STUDENT, settings["turns"]), (CONTROL, 0))
        return lead.above(), f"over the same training without pseudo-labels: {lead}"
    leads = {turn: scores.difference_of((STUDENT, turn), (TEACHER, 0)) for turn in range(1, settings["turns"] + 1)}
    return leads[settings["turns"]].above(), "; ".join(f"after {turn}: {lead}" for turn, lead in leads.items())


def labels_matter(scores: Scores, settings: dict[str, Any]) -> tuple[bool, str]:
    lead = scores.difference_of((STUDENT, settings["turns"]), (CONTROL, 0))
    return lead.above(), str(lead)


STUDENT_NOISE = {"auto_augment": "rand-m9-mstd0.5-inc1"}

STUDY = Study(
    name="noisy_student",
    question="Does a student that learns its teacher's labels under noise become better than the teacher?",
    source="arXiv:1911.04252; the Noisy Student column of arXiv:2010.11929, Table 2",
    x_label="turns of teacher and student",
    data=CIFAR10,
    settings=by_scale({
        "cpu": {
            "teacher": None, "baseline": None, "student": {"hidden_size": 192, "intermediate_size": 384},
            "noise": STUDENT_NOISE, "labelled": 0.1, "keep": 20000, "confidence": 0.3, "steps": 800, "turns": 2,
        },
        "gpu": {
            "teacher": None,
            "baseline": {"model_type": "efficientnet", "width_coefficient": 1.0, "depth_coefficient": 1.0},
            "student": {"drop_path_rate": 0.2}, "noise": STUDENT_NOISE | {"random_erasing": 0.25}, "labelled": 0.1,
            "keep": 45000, "confidence": 0.3, "steps": 20000, "turns": 3,
        },
        "smoke": {
            "teacher": None, "baseline": None, "student": {"hidden_size": 24}, "noise": {}, "labelled": 0.2,
            "keep": 20, "confidence": 0.0, "steps": 2, "turns": 2, "seeds": [0],
        },
    }),
    runs=noisy_student_runs,
    rules=(
        Rule("The last student beats the teacher", "the gain is above two standard errors", student_better),
        Rule(
            "It owes that to the teacher's labels, not to its size and noise",
            "the gain over the same network and noise on the labelled part alone, at equal steps, is above two "
            "standard errors",
            labels_matter,
        ),
    ),
    notes=(
        "The labelled part keeps its labels; those of the rest are never read. Kept is the teacher's choice where its "
        "confidence is high enough, the surest first, as many of each class; scarce classes repeat theirs. `teacher` "
        "takes any classifier with the labels of the data, `baseline` trains another network (EfficientNet).",
    ),
)  # fmt: skip
