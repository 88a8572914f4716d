"""Optional speed: layers in the place of a model's own that compute the same faster, in int8, or with fewer tokens.

The model imports nothing of it: `model.optimize_for_inference()` finds it where the package is installed.
"""
