"""What a run will take in time and memory: logged before its first step, and again where the first steps differ.

For the Trainer. How fast this machine is comes from the passes of trial.py, or, where there were none, from the steps.
"""

from collections.abc import Callable

import torch

from ...reporting import progress
from .schedule import TrainingSchedule


MEASURED_STEPS = 4  # of a process: the first one is left out, since it allocates memory and fills caches
SURPRISE = 1.5  # times faster or slower than estimated: worth a second line
MIN_SECONDS = 20  # a shorter run is over before its estimate is read


class RunEstimate:
    """Logs what is left of a run.

    Args:
        schedule: of the run. timer: of training proper. log: called with the line.
        probe_seconds: gives the seconds of the recipe `probe` in place of the run, None where it is no alternative.
    """

    def __init__(
        self,
        schedule: TrainingSchedule,
        timer: progress.Timer,
        device: torch.device,
        log: Callable[[str], None],
        probe_seconds: Callable[[], float | None],
    ):
        self.schedule, self.timer, self.device, self.log = schedule, timer, device, log
        self.probe_seconds = probe_seconds
        self._rate = 0.0  # images a second, as logged last
        self._steps, self._first_lap = 0, (0.0, 0)  # of this process; seconds and images

    def after_step(self, global_step: int) -> None:
        """Count a step; after a few, log what they show where the trial before them was wrong, or there was none."""
        self._steps += 1
        if self._steps == 1:
            self._first_lap = (self.timer.seconds, self.timer.images)
        elif self._steps == MEASURED_STEPS:
            seconds, images = self._first_lap
            rate = (self.timer.images - images) / max(self.timer.seconds - seconds, 1e-9)
            if not self._rate or not 1 / SURPRISE < rate / self._rate < SURPRISE:
                self.log_estimate(global_step, rate, progress.memory_peak(self.device))

    def log_estimate(self, global_step: int, images_per_second: float, memory_bytes: float) -> None:
        """Log what is left in time and memory, and the cheaper way where that is long; of a short run nothing."""
        self._rate = images_per_second
        seconds = self.schedule.images_after(global_step) / images_per_second
        if seconds >= MIN_SECONDS:
            gigabytes = memory_bytes / 2**30
            self.log(progress.estimate(images_per_second, seconds, gigabytes, self.probe_seconds()))
