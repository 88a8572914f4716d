"""What the outputs of a classifier mean: `config.problem_type`, in transformers' words.

Scores are those of transformers' image-classification pipeline: softmax, a sigmoid for each of several labels, or the
numbers of a regression as they are.

Tests: tests/training/test_problem_types.py.
"""

from typing import Any

import torch


SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
THRESHOLD = 0.5  # from which a label counts, where the model has no thresholds of its own
LABEL_JOINER = "|"  # between the labels of an image, in files


def problem_type_of(config: Any) -> str:
    """That of a model's configuration, one label where it does not say; `config` may be any, also None."""
    return getattr(config, "problem_type", None) or SINGLE_LABEL


def output_scores(config: Any, logits: torch.Tensor) -> torch.Tensor:
    """Scores (B, K) of logits (B, K): probabilities that sum to 1, one for each label, or numbers in their unit."""
    problem = problem_type_of(config)
    if problem == REGRESSION:
        return logits
    return logits.sigmoid() if problem == MULTI_LABEL else logits.softmax(dim=-1)


def thresholds_of(config: Any) -> list[float]:
    """The score from which each label of a multi-label model counts as present, (K,)."""
    return list(getattr(config, "label_thresholds", None) or [THRESHOLD] * config.num_labels)
