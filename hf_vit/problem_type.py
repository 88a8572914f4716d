"""`config.problem_type`, transformers' word for what the outputs of a classifier mean, and the scores of each.

Scores are those of transformers' image-classification pipeline: softmax, a sigmoid for each of several labels, or the
outputs of a regression unchanged.

Tests: tests/training/test_problem_types.py.
"""

from typing import Any

import torch


SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
THRESHOLD = 0.5  # score from which a label counts as present, by default
LABEL_JOINER = "|"  # between the labels of an image in a table


def problem_type_of(config: Any) -> str:
    """The problem type of a model's configuration, by default a single label; `config` may be of any class or None."""
    return getattr(config, "problem_type", None) or SINGLE_LABEL


def output_scores(config: Any, logits: torch.Tensor) -> torch.Tensor:
    """Scores (B, K) of logits (B, K): probabilities that sum to 1, one for each label, or numbers in their unit."""
    problem = problem_type_of(config)
    if problem == REGRESSION:
        return logits
    return logits.sigmoid() if problem == MULTI_LABEL else logits.softmax(dim=-1)


def thresholds_of(config: Any) -> list[float]:
    """Score from which each label of a multi-label model counts as present, (K,)."""
    return list(getattr(config, "label_thresholds", None) or [THRESHOLD] * config.num_labels)
