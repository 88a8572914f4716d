"""Metrics as modules of `evaluate`: `evaluate.load("training/metrics/real_accuracy")` works offline, from a clone.

One folder, one metric, one file that needs nothing of this package, so that publish.py can put each on the Hub as a
Space. `predictions` are class numbers, or scores where so documented (`topk_accuracy`, `calibration`, `multilabel`).
Every module returns its value under its own name, or several under theirs, and the number of images as `n`.
metric_state.py is the running state of an evaluation, built on the same functions.
"""
