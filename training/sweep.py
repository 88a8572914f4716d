"""A grid search on a dev split, then a run with the best values, as for Table 4 of arXiv:2010.11929.

For train.py and suites.py. Each trial trains on the training split without `dev_fraction` of it, and is scored on that
part; the final run trains on all of it and is scored on the evaluation split. Trials are in
OUTPUT_DIR/sweep/NAME=VALUE. A finished trial is not repeated, so the same command with --resume_from_checkpoint
continues after an interruption. Not
Optuna or Ray Tune: the paper's grids have a few values, and a trial is an ordinary run that resumes exactly.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_vit.errors import HFViTError

from .config.arguments import GROUPS, OF_THE_LAUNCH, RESOLVED_NAME, Arguments
from .config.durations import seconds_of
from .config.parser import parse
from .engine.accelerator import on_cpu
from .engine.checkpoints.checkpoint_io import read_json, write_json
from .reporting.facts import FACTS_NAME


FOLDER, TABLE = "sweep", "sweep.json"
NOT_COMPARED = (*OF_THE_LAUNCH, "output_dir")  # a finished run stays finished if its folder is moved


def grid(sweep: dict[str, list]) -> list[dict[str, Any]]:
    """Every combination of the values, the last name changing fastest."""
    return [dict(zip(sweep, values)) for values in itertools.product(*sweep.values())]


def with_values(arguments: Arguments, values: dict[str, Any]) -> Arguments:
    """The arguments with other values for some options, by name."""
    changed = {
        key: dataclasses.replace(
            getattr(arguments, key), **{f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values}
        )
        for key, group in GROUPS.items()
    }
    return dataclasses.replace(arguments, **changed)


def with_part_of_time(arguments: Arguments, runs: int) -> Arguments:
    """The arguments of one of `runs` runs, which share a time limit equally."""
    limit = arguments.train.time_limit
    if limit is None:
        return arguments
    return with_values(arguments, {"time_limit": seconds_of("time_limit", limit) / runs})


def trial_of(arguments: Arguments, values: dict[str, Any]) -> Arguments:
    """The arguments of the run that tries these values on the dev split."""
    name = ",".join(f"{key}={value}" for key, value in values.items())
    folder = Path(str(arguments.train.output_dir)) / FOLDER / name
    fixed = {
        "sweep": {},
        "eval_split": None,
        "push_to_hub": False,
        "do_predict": False,
        "resume_from_checkpoint": True,
    }
    return with_values(arguments, values | fixed | {"output_dir": str(folder)})


def sweep(
    arguments: Arguments, stage: str, run: Callable[..., dict[str, Any]], more_follow: bool = False
) -> dict[str, Any]:
    """Run the grid, then the final run, and return its facts; empty if a signal ended a run.

    Args:
        run: `run(arguments, stage, more_follow=..., swept=...) -> facts`. more_follow: the process makes further runs.

    Raises:
        HFViTError: an output folder with other content; an error of a trial, with its name.
    """
    check_output_folder(arguments)
    folder = Path(str(arguments.train.output_dir))
    main = PartialState(cpu=on_cpu(arguments.train)).is_main_process
    arguments = with_part_of_time(arguments, len(grid(arguments.train.sweep)) + 1)
    trials = [
        (values, trial_of(arguments, values)) for values in grid(arguments.train.sweep)
    ]  # all are validated before the first
    rows = []
    for values, trial in trials:
        try:
            facts = finished(trial) or run(trial, stage, more_follow=True)
        except HFViTError as error:
            raise HFViTError(f"{Path(str(trial.train.output_dir)).name}: {error}") from error
        if not facts:
            return {}
        score = next((row for row in facts["results"] if row["metric"] == "accuracy"), None)
        if score is None:
            raise HFViTError("--sweep chooses by accuracy, which several labels and numbers do not have: leave it out")
        rows.append({"values": values, "dev_accuracy": score["value"], "n": score["n"]})
        if main:
            print(f"sweep: {trial.train.output_dir}: {score['value']:.2%} on {score['n']:,} dev images")
    final = with_values(arguments, best(rows) | {"sweep": {}, "dev_fraction": None, "resume_from_checkpoint": True})
    facts = run(final, stage, more_follow=more_follow, swept=rows)
    if facts and main:
        write_json(folder / TABLE, rows)
    return facts


def check_output_folder(arguments: Arguments) -> None:
    """Raise HFViTError for several runs without an output folder, or new ones in a folder that is not empty."""
    if arguments.train.output_dir is None:
        raise HFViTError("--output_dir is missing: give the folder for the results")
    folder = Path(arguments.train.output_dir)
    if not arguments.train.resume_from_checkpoint and folder.is_dir() and any(folder.iterdir()):
        raise HFViTError(
            f"{folder} is not empty: give another --output_dir, or --resume_from_checkpoint true to go on with it"
        )


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of the trial with the highest accuracy; of several the first."""
    return max(rows, key=lambda row: row["dev_accuracy"])["values"]


def finished(trial: Arguments) -> dict[str, Any] | None:
    """The facts of a run that has already finished; None if it has not.

    Raises:
        HFViTError: it was trained with other arguments.
    """
    folder = Path(str(trial.train.output_dir))
    if not (folder / FACTS_NAME).is_file():
        return None
    # parsed again, so that 0 and 0.0 are equal
    saved = parse(["--config", str(folder / RESOLVED_NAME)], "finetune").as_dict()
    changed = [name for name, value in trial.as_dict().items() if name not in NOT_COMPARED and value != saved[name]]
    if changed:
        differences = "; ".join(f"--{name} was {saved[name]}, is {trial.as_dict()[name]}" for name in changed)
        raise HFViTError(
            f"{folder} was trained with other arguments ({differences}): restore them, or give another --output_dir"
        )
    return read_json(folder / FACTS_NAME)
