"""A run with a time limit: how many of the steps asked for fit, planned before the first and followed to the end.

For the Trainer. The schedule counts steps, the limit seconds, and a machine's speed changes while others use it. So
the clock is read more often the closer the end is, and what is left of the schedule is fitted into the steps that are
left (`TrainingSchedule.fit`): warm-up, decay and every other course are always gone through to their end. What follows
the last step (evaluation, weights, card) has its time set aside. A checkpoint holds the plan and the seconds used.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
RECENT = 4  # intervals between readings that the speed is the mean of
TOLERANCE = 0.02  # of the steps left: a smaller change of plan is not worth one
SAID = 0.1  # of the steps left: a change of plan that is logged
EVALUATIONS = 0.2  # of the time used: evaluations before the last one take no more
SAVES = 0.02  # of the time used: checkpoints beyond those asked for take no more
SAVED_EVERY, SAVED_AFTER = 0.1, 60.0  # of the limit, and seconds: a killed run loses no more than the larger
FINISHING = 3.0  # seconds for figures, card and facts
DISK = 2e8  # bytes a second, until a checkpoint was written


class TimePlan:
    """How a run keeps its limit.

    Args:
        limit: seconds. schedule: of the run, which is fitted. weights: work of one image at each size of a stage.
        evaluations_after: evaluations after the last step. evaluations_per_step: before it.
        log: called with what the user should know.
        started: `now()` at which the run began. now: seconds, from any origin. synchronize: waits for the device.
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
        started: float | None = None,
        now: Callable[[], float] = time.monotonic,
        synchronize: Callable[[], None] = lambda: None,
    ):
        self.limit, self.schedule, self.weights = limit, schedule, weights
        self.evaluations_after, self.evaluations_per_step = evaluations_after, evaluations_per_step
        self.log, self.now, self.synchronize = log, now, synchronize
        self._started = now() if started is None else started
        self._used_before = 0.0  # by the processes that this one goes on from
        self.seconds: dict[str, float | None] = {"evaluation": None, "saving": None}  # of one, lately
        self._bytes = 0
        self.skipped_evaluations = 0
        self._spent_evaluating = self._spent_saving = 0.0
        self._intervals: deque[tuple[float, float]] = deque(maxlen=RECENT)  # work, seconds
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
            started=started,
            synchronize=torch.accelerator.synchronize if device.type != "cpu" else (lambda: None),
        )

    # -- the clock ---------------------------------------------------------------------------------------------------

    def used(self) -> float:
        """Seconds since the run began, over all its processes."""
        return self._used_before + self.now() - self._started

    def reserve(self) -> float:
        """Seconds set aside for what follows the last step."""
        return self.evaluations_after * (self.seconds["evaluation"] or 0.0) + 2 * self._saving() + FINISHING

    def _saving(self) -> float:
        """Seconds of writing a checkpoint; the weights alone, at the end, take no longer."""
        measured = self.seconds["saving"]
        return self._bytes / DISK if measured is None else measured

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """Within it, time goes by in an "evaluation" or in "saving", and not in training."""
        self.synchronize()
        began = self.now()
        try:
            yield
        finally:
            spent = self.now() - began
            before = self.seconds[name]
            self.seconds[name] = spent if before is None else (before + spent) / 2
            self._mark += spent
            if name == "evaluation":
                self._spent_evaluating += spent
            else:
                self._spent_saving += spent
                self._last_save = self.now()

    # -- the plan ----------------------------------------------------------------------------------------------------

    def begin(
        self, step: int, trial: Trial | None, evaluation_images: int, workers: int, devices: int, weights_bytes: int
    ) -> None:
        """Plan before the first step of this process, if a trial has told how fast it is.

        Args:
            step: steps done. evaluation_images: of one evaluation, over all devices. weights_bytes: of a checkpoint.

        Raises:
            HFViTError: less time than one step and what follows it take.
        """
        self._first_step, self._next_check, self._bytes = step, step + 1, weights_bytes
        if trial is not None:
            stage = self.schedule.stage_of(step)
            seconds = trial.step_seconds(stage.images // devices, workers)
            self._estimated = seconds / self._work_of(stage)
            if self.seconds["evaluation"] is None:
                self.seconds["evaluation"] = trial.evaluation_seconds(-(-evaluation_images // devices), workers)
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
            said = bool(self.schedule.fitted) and abs(stop - before) <= SAID * left
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
        per_work = self._estimated or 0.0
        if self._intervals:
            per_work = sum(seconds for _, seconds in self._intervals) / sum(work for work, _ in self._intervals)
        seconds_a_step = per_work * self._work_of(self.schedule.stage_of(step))
        done = self.schedule.scheduled(step)
        work_left = sum(
            max(0.0, stage.stop - max(stage.start, done)) * self._work_of(stage) for stage in self.schedule.asked
        )
        evaluation = (self.seconds["evaluation"] or 0.0) * self.evaluations_per_step
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
        spent = self._spent_evaluating + (self.seconds["evaluation"] or 0.0)
        allowed = agreed(last or spent <= EVALUATIONS * self.used())
        self.skipped_evaluations += not allowed
        return allowed

    def save_is_due(self) -> bool:
        """Whether so much was trained since the last checkpoint that a killed run would lose too much."""
        cost = self._spent_saving + self._saving()
        passed = self.now() - self._last_save >= max(SAVED_EVERY * self.limit, SAVED_AFTER)
        return agreed(passed and cost <= SAVES * self.used())

    # -- a checkpoint ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "limit": self.limit,
            "used": self.used(),
            "fitted": self.schedule.fitted,
            "seconds": dict(self.seconds),
            "skipped_evaluations": self.skipped_evaluations,
            "spent_evaluating": self._spent_evaluating,
            "spent_saving": self._spent_saving,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the plan of the process that wrote a checkpoint; what it used of the limit stays used."""
        self._used_before = state["used"]
        self.seconds = dict(state["seconds"])
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
