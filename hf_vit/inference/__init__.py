"""Optional speed: layers that replace a model's own and compute the same faster, in int8, or with fewer tokens.

The model does not import it: `model.optimize_for_inference()` does, if the package is installed.
"""
