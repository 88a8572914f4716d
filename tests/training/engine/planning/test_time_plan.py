"""A time limit is kept on machines whose speed changes, with the whole schedule done; a resumed run keeps the plan.

pytest tests/training/engine/planning/test_time_plan.py
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vit.errors import HFViTError
from tests.helpers.training_runs import Images, arguments, history, tiny
from training.config.arguments import TrainArguments
from training.engine.planning.run_timing import RunTiming
from training.engine.planning.schedule import TrainingSchedule
from training.engine.planning.time_plan import TimePlan
from training.engine.planning.trial import Trial
from training.engine.train_step import TrainStep
from training.engine.trainer import Trainer


class Machine:
    """A clock that goes on as work is done.

    Args:
        seconds: of a step, as a function of the seconds that have gone by. evaluation, saving, finishing: of one, on
            a machine that is as fast as at the beginning.
    """

    def __init__(self, seconds, evaluation=0.0, saving=0.0, finishing=3.0):
        self.seconds, self.evaluation, self.saving, self.finishing = seconds, evaluation, saving, finishing
        self.time = 0.0

    def work(self, seconds):
        """What takes so many seconds on a machine that stays as it is at the beginning."""
        while seconds > 0:
            self.time += min(seconds, 0.1) * self.seconds(self.time) / self.seconds(0.0)
            seconds -= 0.1

    def now(self):
        return self.time

    def trial(self, wrong=1.0):
        a_step = self.seconds(0.0) * wrong
        return Trial(8, a_step / 8, self.evaluation * wrong / 100, 0.0, 0.0, 0)

    def run(self, plan, step=0, stop=None, eval_steps=None, starting=5.0, trial=None):
        """Go through a run; returns the steps done."""
        self.time += starting
        plan.expect(self.saving, self.finishing)
        plan.begin(step, trial, 100, 0, 1)
        while step < plan.schedule.max_steps and step != stop:
            self.time += self.seconds(self.time)
            step += 1
            plan.after_step(step)
            at_end = step >= plan.schedule.max_steps
            if eval_steps and (step % eval_steps == 0 or at_end) and plan.allows_evaluation(at_end):
                with plan.measuring("evaluation"):
                    self.work(self.evaluation)
            if at_end or plan.save_is_due():
                with plan.measuring("saving"):
                    self.time += self.saving
        if stop is None:
            self.time += self.finishing + self.saving
            self.work(0 if eval_steps else self.evaluation)
        return step


def plan_of(limit, machine, steps=100_000, eval_steps=None, **fields):
    schedule = TrainingSchedule(TrainArguments(max_steps=steps, per_device_train_batch_size=8, **fields), None, 400, 1)
    per_step = 1 / eval_steps if eval_steps else 0.0
    return TimePlan(limit, schedule, {None: 1.0}, evaluations_per_step=per_step, started=0.0, now=machine.now)


MACHINES = {
    "quiet": lambda now: 0.5,
    "loaded": lambda now: 0.5 * (1 + (int(now / 7) % 4)),
    "throttled": lambda now: 0.5 if now < 100 else 2.5,
    "freed": lambda now: 2.5 if now < 100 else 0.5,
    "slow steps": lambda now: 6.0,
}


@pytest.mark.parametrize("eval_steps", [None, 20])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("tried", [True, False])
def test_the_limit_is_kept_within_5_percent_or_10_seconds(machine, eval_steps, tried):
    clock = Machine(MACHINES[machine], evaluation=8.0, saving=1.0)
    plan = plan_of(300.0, clock, eval_steps=eval_steps)
    if not tried and eval_steps is None:
        plan.evaluations_after = clock.evaluation = 0
    step = clock.run(plan, eval_steps=eval_steps, trial=clock.trial(wrong=0.6) if tried else None)
    assert abs(clock.time - 300) <= 15, (clock.time, step)
    assert plan.schedule.scheduled(step) >= 0.98 * plan.schedule.length  # warm-up, decay: all of it


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.25, 3.0), min_size=1, max_size=12), st.floats(0, 10), st.floats(0, 3),
    st.sampled_from([None, 10, 100]), st.floats(0.5, 2),
)  # fmt: skip
def test_whatever_the_speed_the_schedule_is_done_and_never_goes_back(speeds, evaluation, saving, eval_steps, wrong):
    clock = Machine(lambda now: speeds[int(now / 40) % len(speeds)], evaluation, saving)
    plan = plan_of(400.0, clock, eval_steps=eval_steps)
    step = clock.run(plan, eval_steps=eval_steps, trial=clock.trial(wrong))
    course = [plan.schedule.scheduled(s) for s in range(step + 1)]
    assert course == sorted(course) and course[0] == 0 and course[-1] <= plan.schedule.length
    if max(speeds) <= 3 * min(
        speeds
    ):  # nobody can plan the end of a run whose steps suddenly take a tenth, or ten times
        assert clock.time <= 400 * 1.05 + evaluation and clock.time >= 400 * 0.9 - evaluation


def test_a_run_that_fits_is_not_changed():
    clock, said = Machine(lambda now: 0.5, evaluation=1.0), []
    plan = plan_of(300.0, clock, steps=60)
    plan.log = said.append
    assert clock.run(plan, trial=clock.trial()) == 60
    assert not plan.schedule.fitted and said == ["time limit 0:05:00 (h:mm:ss): all 60 steps asked for fit"]


def test_evaluations_that_would_eat_the_time_are_left_out_and_counted():
    clock = Machine(lambda now: 0.5, evaluation=30.0)
    plan = plan_of(600.0, clock, eval_steps=10)
    clock.run(plan, eval_steps=10, trial=clock.trial())
    assert plan.facts()["skipped_evaluations"] > 50 and plan._spent_evaluating <= 0.2 * 600 + 30
    assert abs(clock.time - 600) <= 30


def test_a_limit_below_one_step_is_refused_in_one_line():
    clock = Machine(lambda now: 40.0, evaluation=20.0)
    with pytest.raises(HFViTError, match=r"--time_limit 0:01:00 \(h:mm:ss\) is over before one step: .* take 0:01:08"):
        clock.run(plan_of(60.0, clock), trial=clock.trial())


def test_a_resumed_run_has_the_plan_and_what_is_left_of_the_time():
    clock = Machine(lambda now: 0.5, evaluation=8.0)
    whole = plan_of(300.0, clock)
    end = clock.run(whole, trial=clock.trial())
    first = Machine(lambda now: 0.5, evaluation=8.0)
    killed = plan_of(300.0, first)
    first.run(killed, stop=200, trial=first.trial())
    state = json.loads(json.dumps(killed.state_dict()))
    second = Machine(lambda now: 0.5, evaluation=8.0)
    resumed = plan_of(300.0, second)
    resumed.schedule.load_fitted(state["fitted"])
    resumed.load_state_dict(state)
    assert resumed.schedule.max_steps == killed.schedule.max_steps
    step = second.run(resumed, step=200, trial=second.trial())
    assert abs(second.time + state["used"] - 300) <= 10 and abs(step - end) <= 0.03 * end
    assert resumed.schedule.scheduled(step) == pytest.approx(100_000)


def test_stages_come_at_their_share_of_a_shorter_run():
    schedule = TrainingSchedule(
        TrainArguments(max_steps=1000, per_device_train_batch_size=8, batch_size_schedule={"50%": 16}), None, 400, 1
    )
    schedule.fit(0, 100)
    assert [(stage.start, stage.stop, stage.images) for stage in schedule.stages] == [(0, 50, 8), (50, 100, 16)]
    schedule.fit(20, 60)
    assert [(stage.start, stage.stop) for stage in schedule.stages] == [(0, 35), (35, 60)]
    assert schedule.scheduled(20) == 200 and schedule.scheduled(40) == 600 and schedule.scheduled(60) == 1000
    assert schedule.images_after(0) == 35 * 8 + 25 * 16


class Ticking:
    """A clock on which each step of the Trainer takes a second."""

    def __init__(self):
        self.time = 0.0

    def monotonic(self):
        return self.time


@pytest.fixture
def ticking(monkeypatch):
    clock = Ticking()
    monkeypatch.setattr(
        TimePlan.__init__, "__kwdefaults__", TimePlan.__init__.__kwdefaults__ | {"now": clock.monotonic}
    )
    monkeypatch.setattr("training.engine.planning.trial.measure", lambda *args: Trial(8, 1 / 8, 0.01, 0.0, 0.0, 0))
    monkeypatch.setattr("training.engine.planning.run_timing.saving_seconds", lambda *args: 0.0)
    monkeypatch.setattr(RunTiming, "finish_seconds", lambda *args: 3.0)
    step = TrainStep.__call__

    def slow(train_step, batches):
        clock.time += 1.0
        step(train_step, batches)

    monkeypatch.setattr(TrainStep, "__call__", slow)
    return clock


def limited(folder, clock, **values):
    given = {"max_steps": 1000, "time_limit": "40s", "warmup_steps": "10%", "logging_steps": 1}
    args = arguments(folder, **given | values)
    return Trainer(tiny(), args, Images(40), Images(11), started=clock.time)


def test_the_trainer_ends_in_time_and_goes_through_the_whole_schedule(tmp_path, ticking):
    trainer = limited(tmp_path / "out", ticking, eval_steps=10)
    trainer.train()
    rates = [line["learning_rate"] for line in history(tmp_path / "out") if "loss" in line]
    assert trainer.state.global_step == len(rates) == trainer.max_steps and 34 <= len(rates) <= 37
    top = rates.index(max(rates))
    assert rates[0] == 0 and 3 <= top <= 4 and rates[-1] < 1e-4 and rates[top:] == sorted(rates[top:], reverse=True)
    assert trainer.last_evaluation[0] == trainer.max_steps  # the annealed weights are measured
    plan = trainer.create_model_card()["training"]["time_plan"]
    assert plan["limit_seconds"] == 40 and plan["steps_asked"] == 1000 and plan["used_seconds"] <= 40


def test_a_killed_run_goes_on_with_the_same_plan_bit_for_bit(tmp_path, ticking):
    trainer = limited(tmp_path / "whole", ticking, save_steps=5, save_total_limit=None)
    trainer.train()
    end = trainer.max_steps
    again = limited(tmp_path / "again", ticking, save_steps=5)
    again.train(tmp_path / "whole/checkpoint-20")
    assert again.max_steps == end
    whole, resumed = history(tmp_path / "whole"), history(tmp_path / "again")
    assert resumed == whole
    freed = Trainer(tiny(), arguments(tmp_path / "freed", max_steps=1000), Images(40))
    freed.max_seen = freed.train(tmp_path / f"whole/checkpoint-{end - end % 5}").global_step
    assert freed.max_seen > end  # without a limit, the rest of the schedule goes as asked


def test_a_schedule_of_the_users_own_cannot_be_fitted(tmp_path):
    args = arguments(tmp_path / "out", time_limit=60)
    optimizer = Trainer(tiny(), arguments(tmp_path / "out"), Images(9)).optimizer.optimizer
    with pytest.raises(HFViTError, match="--time_limit fits the schedule of the arguments"):
        Trainer(tiny(), args, Images(9), optimizers=(None, torch.optim.lr_scheduler.ConstantLR(optimizer)))
