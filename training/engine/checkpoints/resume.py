"""Resuming: restore the state of a run from a checkpoint.

For the Trainer. resume_check.py decides whether a checkpoint belongs to the run.

Tests: tests/training/engine/test_trainer.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_vit.errors import HFViTError

from ..planning.schedule import TrainingSchedule
from ..planning.time_plan import TimePlan
from . import checkpoint_io
from .resume_check import RunIdentity, changes_in_words
from .trainer_state import TrainingState


def resume_run(
    state: TrainingState,
    saved: dict[str, Any],
    folder: Path,
    output_dir: Path,
    identity: RunIdentity,
    schedule: TrainingSchedule,
    time_plan: TimePlan | None,
    log: Callable[[str], None],
) -> None:
    """Restore `state`, `schedule` and `time_plan` of this run from a checkpoint.

    Args:
        saved: content of the checkpoint `folder`. identity: of this run.

    Raises:
        HFViTError: the checkpoint belongs to another run, or to a longer one; the message says what differs.
    """
    changes = identity.check(saved["counters"], folder)
    step = saved["trainer_state"]["global_step"]
    # First, because a time limit changes the number of steps that the next check compares with.
    resume_time_plan(saved["counters"].get("time_plan"), step, schedule, time_plan)
    if step > schedule.max_steps:
        raise HFViTError(
            f"{folder} is what {step} steps made, this run has {schedule.max_steps}: raise --max_steps or "
            "--num_train_epochs, or begin anew in another --output_dir"
        )
    try:
        state.load_state_dict(saved)
    except (KeyError, TypeError, RuntimeError) as error:
        raise checkpoint_io.damaged(folder, error) from error
    except HFViTError as error:
        raise HFViTError(f"{folder} cannot be resumed: {error}, or begin anew in another --output_dir") from error
    state.find_best_again(output_dir, folder)
    if changes:
        state.argument_changes.append({"step": step, "changes": changes})
        log(f"going on with other arguments than the checkpoint's: {changes_in_words(changes)}")
    if "evaluation images" in changes:  # scores on other images cannot be compared
        best = state.trainer_state
        best.best_metric = best.best_model_checkpoint = best.best_global_step = None
        state.last_evaluation = None
    log(f"resuming from {folder}, after step {step} of {schedule.max_steps}")


def resume_time_plan(
    saved: dict[str, Any] | None, step: int, schedule: TrainingSchedule, time_plan: TimePlan | None
) -> None:
    """Restore the time plan of a checkpoint; without a time limit now, the rest of the schedule is not compressed."""
    if saved is not None:
        schedule.load_fitted(saved["fitted"])
        if time_plan is not None:
            time_plan.load_state_dict(saved)
        elif saved["fitted"]:
            schedule.fit(step, step + round(schedule.length - schedule.scheduled(step)))
