"""Metrics as modules of `evaluate`: `evaluate.load("training/metrics/real_accuracy")` works offline, from a clone.

One folder, one metric, one file that needs nothing of this package, so that publish.py can put each on the Hub as a
Space. `predictions` are class numbers, or scores where the name says so (`topk_accuracy`, `calibration`). Every module
returns its value under its own name, and the number of pictures behind it as `n`.
"""
