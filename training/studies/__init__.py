"""The paper's studies at any scale: one module per question, run by `python -m training.study NAME`."""

from . import ablations, compute, data_scale, generated, noisy_student, pretraining, resolution
from .design import Study


STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (data_scale, compute, resolution, pretraining, generated, ablations, noisy_student)
}
