"""Metrics for the library `evaluate`: `evaluate.load("training/metrics/real_accuracy")` works offline, from a clone.

Each metric is a folder with one file that imports nothing from this package, so that publish.py can upload it as a
Space. `predictions` are class numbers, or scores for `topk_accuracy`, `calibration` and `multilabel`. A metric has
its value under its own name, or several under theirs, and the image count as `n`. metric_state.py counts during
an evaluation, with the same functions.
"""
