"""How much time and memory a run will take: logged before its first step, and again if the first steps disagree.

For the Trainer. The speed of this machine comes from the passes of trial.py, or without these from the first steps.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ...config.arguments import MASKED_PATCHES, TrainArguments
from ...reporting import progress
from ...reporting.facts import is_hf_vit
from ..distributed import agreed
from .schedule import TrainingSchedule
from .trial import Trial


MEASURED_STEPS = 4  # of a process; the first is not timed, since it allocates memory and fills caches
TOLERATED_FACTOR = 1.5  # faster or slower than estimated: beyond it a second line is logged
MIN_SECONDS = 20  # a shorter run is over before its estimate is read
OPTIMIZER_COPIES = 2  # of the trained weights: AdamW's moments, the most that an optimizer here keeps
CHECKPOINT_COPIES = 1 + OPTIMIZER_COPIES  # of the weights


class RunEstimate:
    """Logs the time that is left of a run, and its memory.

    Args:
        timer: of the training steps. log: called with the line.
    """

    def __init__(
        self,
        schedule: TrainingSchedule,
        timer: progress.Timer,
        device: torch.device,
        log: Callable[[str], None],
    ):
        self.schedule, self.timer, self.device, self.log = schedule, timer, device, log
        self._probe_seconds: float | None = None
        self._rate = 0.0  # images per second, as last logged
        self._steps, self._first_lap = 0, (0.0, 0)  # of this process; seconds and images

    def begin(
        self, global_step: int, trial: Trial, devices: int, workers: int, trained_bytes: int, probe_images: int | None
    ) -> None:
        """Log what a trial predicts.

        Args:
            devices: processes of the run. workers: data workers of each. trained_bytes: size of the trained weights.
            probe_images: images of which the recipe `probe` would compute features; None if it is no alternative.
        """
        if probe_images is not None:
            self._probe_seconds = trial.evaluation_seconds(-(-probe_images // devices), workers)
        images = self.schedule.stage_of(global_step).images
        rate = images / agreed(trial.step_seconds(images // devices, workers))
        self.log_estimate(global_step, rate, trial.peak_bytes + OPTIMIZER_COPIES * trained_bytes)

    def after_step(self, global_step: int) -> None:
        """Count a step; after a few, log their speed if it differs from the estimate, or if there is none."""
        self._steps += 1
        if self._steps == 1:
            self._first_lap = (self.timer.seconds, self.timer.images)
        elif self._steps == MEASURED_STEPS:
            seconds, images = self._first_lap
            rate = (self.timer.images - images) / max(self.timer.seconds - seconds, 1e-9)
            if not self._rate or not 1 / TOLERATED_FACTOR < rate / self._rate < TOLERATED_FACTOR:
                self.log_estimate(global_step, rate, progress.memory_peak(self.device))

    def log_estimate(self, global_step: int, images_per_second: float, memory_bytes: float) -> None:
        """Log the time left and the memory, and for a long run the cheaper alternative; a short run logs nothing."""
        self._rate = images_per_second
        seconds = self.schedule.images_after(global_step) / images_per_second
        if seconds >= MIN_SECONDS:
            gigabytes = memory_bytes / 2**30
            self.log(progress.estimate(images_per_second, seconds, gigabytes, self._probe_seconds))


def probe_is_alternative(model: PreTrainedModel, args: TrainArguments, base_model: str | None) -> bool:
    """Whether the recipe `probe` answers the same question: it fits the head of a pre-trained ViT to labels.

    False if nothing but the head is trained anyway.
    """
    if args.loss == MASKED_PATCHES or base_model is None or not is_hf_vit(model):
        return False
    return any(p.requires_grad for p in model.base_model.parameters())
