"""A run with a time limit: how many of the steps asked for fit, planned before the first and followed to the end.

For the Trainer. The schedule counts steps, the limit seconds, and a machine's speed changes while others use it. So
the clock is read more often the closer the end is, and what is left of the schedule is fitted into the steps that are
left (`TrainingSchedule.fit`): warm-up, decay and every other course are always gone through to their end. What follows
the last step (evaluation, weights, card, report) has its time set aside: as long as it took when it was last done, or
was tried before the first step, and longer where the steps have become slower since. A checkpoint holds the plan and
the seconds used.
"""

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_vit.errors import HFViTError

from ...config.arguments import TrainArguments
from ...config.durations import seconds_of
from ...reporting.progress import hours_minutes_seconds as in_words
from ..distributed import agreed
from .schedule import Stage, TrainingSchedule
from .trial import Trial


FIRST_CHECKS = 4  # steps of a process after each of which the clock is read
CHECKS = 20  # readings of the clock in what is left of the run
RECENT = 4  # intervals between readings that the speed of steps is the mean of
LATELY, KEPT = 30.0, 64  # seconds, and at most intervals, that the speed of what is not a step is the mean of
TOLERANCE = 0.02  # of the steps left: a smaller change of plan is not worth one
SAID, SAID_OF_ALL = 0.1, 0.02  # of the steps left, and of all: a change of plan beyond both is logged
EVALUATIONS = 0.2  # of the time used: evaluations before the last one take no more
EVALUATED = 0.25  # of the time left for steps: an evaluation that takes more is left out, the last one is near
SAVES = 0.02  # of the time used: checkpoints beyond those asked for take no more
SAVED_EVERY, SAVED_AFTER = 0.1, 60.0  # of the limit, and seconds: a killed run loses no more than the larger
MAX_SLOWER = 2.0  # times: what one thread does (card, report) suffers less from other work than steps do
CLOSING = 0.1  # of the seconds in which Python and its libraries are loaded: so long it takes to leave them
TRIED_BYTES = 1 << 25  # written before the first step, to learn how fast the disk is


class TimePlan:
    """How a run keeps its limit.

    Args:
        limit: seconds. schedule: of the run, which is fitted. weights: work of one image at each size of a stage.
        evaluations_after: evaluations after the last step. evaluations_per_step: before it.
        log: called with what the user should know.
        saves: checkpoints after the last step. started: `now()` that the limit counts from. loading: seconds from then
            on in which Python was loaded, if it is to end within the limit too.
        now: seconds, from any origin. synchronize: waits for the device.
    """

    def __init__(
        self,
        limit: float,
        schedule: TrainingSchedule,
        weights: dict[tuple[int, int] | None, float],
        *,
        evaluations_after: int = 1,
        evaluations_per_step: float = 0.0,
        log: Callable[[str], None] = lambda text: None,
        saves: int = 1,
        started: float | None = None,
        loading: float = 0.0,
        now: Callable[[], float] = time.monotonic,
        synchronize: Callable[[], None] = lambda: None,
    ):
        self.limit, self.schedule, self.weights = limit, schedule, weights
        self.evaluations_after, self.evaluations_per_step = evaluations_after, evaluations_per_step
        self.log, self.now, self.synchronize = log, now, synchronize
        self.saves, self._closing = saves, CLOSING * loading
        self._started = now() if started is None else started
        self._used_before = 0.0  # by the processes that this one goes on from
        self.seconds: dict[str, float | None] = {"evaluation": None, "saving": None}  # of one, lately
        self._step_speeds: dict[str, float] = {}  # seconds of one unit of work at the time of each of these
        self.finishing: float | None = None  # seconds of card and report, as tried
        self.skipped_evaluations = 0
        self._spent_evaluating = self._spent_saving = 0.0
        self._intervals: deque[tuple[float, float]] = deque(maxlen=KEPT)  # work, seconds
        self._estimated: float | None = None  # seconds of one unit of work, before any was measured
        self._mark, self._work, self._first_step, self._next_check = now(), 0.0, 0, 0
        self._last_save = now()

    @classmethod
    def of_run(
        cls,
        args: TrainArguments,
        schedule: TrainingSchedule,
        flops_of: dict[tuple[int, int] | None, int],
        train_images: int,
        *,
        evaluates: bool,
        device: torch.device,
        log: Callable[[str], None],
        started: float,
        loading: float,
    ) -> "TimePlan":
        """The plan of `args.time_limit`.

        Args:
            flops_of: training on one image of each size. evaluates: whether there is a split to evaluate on.
        """
        images = schedule.stages[0].images
        a_step = {"no": 0.0, "steps": 1 / max(1, args.eval_steps), "epoch": images / train_images}
        return cls(
            seconds_of("time_limit", args.time_limit),
            schedule,
            {size: float(flops or 1) for size, flops in flops_of.items()},
            evaluations_after=(1 + args.load_best_model_at_end + args.do_predict) * evaluates,
            evaluations_per_step=a_step[args.eval_strategy],
            log=log,
            saves=int(args.save_strategy != "no"),
            started=started,
            loading=loading,
            synchronize=torch.accelerator.synchronize if device.type != "cpu" else (lambda: None),
        )

    # -- the clock ---------------------------------------------------------------------------------------------------

    def used(self) -> float:
        """Seconds since the run began, over all its processes."""
        return self._used_before + self.now() - self._started

    def left(self) -> float:
        """Seconds that are left, but for those in which the process ends."""
        return self.limit - self.used() - self._closing

    def reserve(self) -> float:
        """Seconds set aside for what follows the last step."""
        finishing = (self.finishing or 0.0) * min(self._slower("finishing"), MAX_SLOWER)
        saving = (self.saves + 1) * self._now_takes("saving")  # the weights alone, at the end, take no longer
        return self.evaluations_after * self._now_takes("evaluation") + saving + finishing + self._closing

    def _now_takes(self, name: str) -> float:
        """Seconds of an evaluation or of saving; an evaluation takes longer where steps have become slower."""
        seconds = self.seconds[name] or 0.0
        return seconds * self._slower(name) if name == "evaluation" else seconds

    def _slower(self, name: str) -> float:
        """How many times longer steps take lately than when something was measured.

        Of what is missing to LATELY seconds the trial is believed: one slow step is no slow machine.
        """
        then = self._step_speeds.get(name)
        if not then:
            return 1.0
        tried = self._estimated / then if self._estimated else 1.0
        work, seconds = self._recent(LATELY)
        missing = max(0.0, LATELY - seconds) if self._estimated or not work else 0.0
        return (seconds + missing * tried) / (work * then + missing)

    def _recent(self, lately: float = 0.0) -> tuple[float, float]:
        """Work and seconds of the last RECENT intervals, and of so many more that they have `lately` seconds."""
        work = seconds = 0.0
        for number, interval in enumerate(reversed(self._intervals)):
            if number >= RECENT and seconds >= lately:
                break
            work, seconds = work + interval[0], seconds + interval[1]
        return work, seconds

    def _seconds_of_work(self, lately: float = 0.0) -> float | None:
        """Seconds of one unit of work in the last intervals, or as it was tried; None before."""
        work, seconds = self._recent(lately)
        return seconds / work if work else self._estimated

    def _note(self, name: str, seconds: float) -> None:
        """Something has taken so long."""
        self.seconds[name] = seconds if self.seconds[name] is None else (self._now_takes(name) + seconds) / 2
        speed = self._seconds_of_work(LATELY)
        if speed:
            self._step_speeds[name] = speed

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """Within it, time goes by in an "evaluation" or in "saving", and not in training."""
        self.synchronize()
        began = self.now()
        try:
            yield
        finally:
            spent = self.now() - began
            self._note(name, spent)
            self._mark += spent
            if name == "evaluation":
                self._spent_evaluating += spent
            else:
                self._spent_saving += spent
                self._last_save = self.now()

    # -- the plan ----------------------------------------------------------------------------------------------------

    def expect(self, saving: float, finishing: float) -> None:
        """Seconds of a checkpoint, and of card and report, as tried; those that an earlier process noted stay."""
        if self.seconds["saving"] is None:
            self.seconds["saving"] = saving
        if self.finishing is None:
            self.finishing = finishing

    def begin(self, step: int, trial: Trial | None, evaluation_images: int, workers: int, devices: int) -> None:
        """Plan before the first step of this process, if a trial has told how fast it is.

        Args:
            step: steps done. evaluation_images: of one evaluation, over all devices.

        Raises:
            HFViTError: less time than one step and what follows it take.
        """
        self._first_step, self._next_check = step, step + 1
        if trial is not None:
            stage = self.schedule.stage_of(step)
            seconds = trial.step_seconds(stage.images // devices, workers)
            self._estimated = seconds / self._work_of(stage)
            if self.seconds["evaluation"] is None:
                self._note("evaluation", trial.evaluation_seconds(-(-evaluation_images // devices), workers))
            self._step_speeds.setdefault("finishing", self._estimated)
            self._check(step)
        self._mark = self._last_save = self.now()

    def after_step(self, step: int) -> bool:
        """Count a step, `step` being the number of those done; True if the stages of the schedule have changed."""
        self._work += self._work_of(self.schedule.stage_of(step - 1))
        if step < self._next_check:
            return False
        self.synchronize()
        now = self.now()
        if step > self._first_step + 1 or self._estimated is None:
            if step == self._first_step + 2 and self._estimated is None:
                self._intervals.clear()  # the first step of a process also allocates memory and fills caches
            self._intervals.append((self._work, max(now - self._mark, 1e-9)))
        self._mark, self._work = now, 0.0
        stages = self.schedule.stages
        self._check(step)
        return len(stages) > 1 and stages != self.schedule.stages

    def _check(self, step: int) -> None:
        stop, seconds_left, seconds_a_step = agreed(self._plan(step))
        first = step == 0 or (step == 1 and self._estimated is None)
        if first and not self._used_before and seconds_left < (0 if step else seconds_a_step):
            needed = in_words(self.used() + self.reserve() + seconds_a_step)
            raise HFViTError(
                f"--time_limit {in_words(self.limit)} (h:mm:ss) is over before one step: starting, one step of "
                f"{seconds_a_step:,.1f} s, evaluation and saving take {needed} on this machine: give more, or fewer "
                "evaluation images"
            )
        before, left = self.schedule.max_steps, max(1, self.schedule.max_steps - step)
        if abs(stop - before) > TOLERANCE * left or stop <= step:
            said = bool(self.schedule.fitted) and abs(stop - before) <= max(SAID * left, SAID_OF_ALL * before)
            if stop != before:
                self.schedule.fit(step, stop)
                if not said:
                    self.log(
                        f"time limit {in_words(self.limit)} (h:mm:ss): {stop:,} of the {self.schedule.length:,} steps "
                        f"asked for fit, with the whole schedule, in {in_words(max(0, seconds_left))} of training"
                    )
        elif step == self._first_step and not self.schedule.fitted:
            self.log(f"time limit {in_words(self.limit)} (h:mm:ss): all {stop:,} steps asked for fit")
        early = FIRST_CHECKS - (step - self._first_step)
        self._next_check = step + 1 if early > 0 else step + max(1, (self.schedule.max_steps - step) // CHECKS)

    def _plan(self, step: int) -> tuple[int, float, float]:
        """The step to end at, the seconds left for training, and those of the next step."""
        per_work = self._seconds_of_work() or 0.0
        seconds_a_step = per_work * self._work_of(self.schedule.stage_of(step))
        done = self.schedule.scheduled(step)
        work_left = sum(
            max(0.0, stage.stop - max(stage.start, done)) * self._work_of(stage) for stage in self.schedule.asked
        )
        evaluation = self._now_takes("evaluation") * self.evaluations_per_step
        others = min(evaluation / max(seconds_a_step, 1e-9), EVALUATIONS / (1 - EVALUATIONS))
        seconds = work_left * per_work * (1 + others + (SAVES if self.seconds["saving"] else 0.0))
        seconds_left = self.limit - self.used() - self.reserve()
        steps_left = self.schedule.length - done
        if seconds <= max(0.0, seconds_left):
            return step + round(steps_left), seconds_left, seconds_a_step
        return step + max(0, int(steps_left * seconds_left / seconds)), seconds_left, seconds_a_step

    def _work_of(self, stage: Stage) -> float:
        return stage.images * self.weights[stage.image_size]

    # -- what happens between steps ----------------------------------------------------------------------------------

    def allows_evaluation(self, last: bool) -> bool:
        """Whether there is time for an evaluation that was asked for; for the last one there is always."""
        seconds = self._now_takes("evaluation")
        fits = self._spent_evaluating + seconds <= EVALUATIONS * self.used()
        steps_go_on = seconds <= EVALUATED * (self.limit - self.used() - self.reserve())
        allowed = agreed(last or (fits and steps_go_on))
        self.skipped_evaluations += not allowed
        return allowed

    def save_is_due(self) -> bool:
        """Whether so much was trained since the last checkpoint that a killed run would lose too much."""
        cost = self._spent_saving + self._now_takes("saving")
        passed = self.now() - self._last_save >= max(SAVED_EVERY * self.limit, SAVED_AFTER)
        return agreed(passed and cost <= SAVES * self.used())

    # -- a checkpoint ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "limit": self.limit,
            "used": self.used(),
            "fitted": self.schedule.fitted,
            "seconds": dict(self.seconds),
            "step_speeds": dict(self._step_speeds),
            "finishing": self.finishing,
            "skipped_evaluations": self.skipped_evaluations,
            "spent_evaluating": self._spent_evaluating,
            "spent_saving": self._spent_saving,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the plan of the process that wrote a checkpoint; what it used of the limit stays used."""
        self._used_before = state["used"]
        self.seconds, self._step_speeds = dict(state["seconds"]), dict(state.get("step_speeds", {}))
        self.finishing = state.get("finishing")
        self.skipped_evaluations = state["skipped_evaluations"]
        self._spent_evaluating, self._spent_saving = state["spent_evaluating"], state["spent_saving"]

    def facts(self) -> dict[str, Any]:
        """For facts.json."""
        return {
            "limit_seconds": self.limit,
            "used_seconds": self.used(),
            "steps_asked": self.schedule.length,
            "skipped_evaluations": self.skipped_evaluations,
        }


def saving_seconds(folder: Path, size: int) -> float:
    """How long a checkpoint of so many bytes will take, from a smaller file written to the same disk."""
    tried = min(size, TRIED_BYTES)
    began = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(bytes(tried))
        file.flush()
        os.fsync(file.fileno())
    return (time.monotonic() - began) * size / max(1, tried)
