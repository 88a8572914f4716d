"""The paper's studies at any scale: one module per question, run by `python -m training.study NAME`."""

from . import generated, pretraining, resolution
from .design import Study


STUDIES: dict[str, Study] = {module.STUDY.name: module.STUDY for module in (resolution, pretraining, generated)}
