"""Repeat one of the paper's studies at a chosen scale: runs, a table, a figure, and a verdict.

    python -m training.study pretraining --out studies/pretraining --data cifar10=copies/cifar10
    python -m training.study resolution --scale gpu --out studies/resolution

Studies: data_scale, compute, resolution, pretraining, generated, ablations, noisy_student (training/studies/). The
claims, and when each counts as shown, are written to plan.md before the first run; results.json, figure.png and
report.md after the last. The same command continues an interrupted study. A folder with other settings, or started by
code with other runs or rules, is refused.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch

from hf_vit.atomic_file import atomic_write
from hf_vit.errors import HFViTError, Parser, report_error

from .config.parser import as_number
from .config.strict_yaml import yaml_value
from .data.dataset import open_dataset
from .engine.checkpoints.checkpoint_io import differences, read_json, write_json
from .studies import STUDIES
from .studies.design import SCALES, Study, StudyRun
from .studies.report import RESULTS_NAME, read_scores, results, study_plan, write_report
from .studies.stages import RUN_DEFAULTS, TRAINED, execute_run, run_arguments


STUDY_SETTINGS_NAME, PLAN_NAME, RUNS_NAME = "study.json", "plan.md", "runs"
RENAMED_SETTINGS = {"peer": "baseline", "probe_pictures": "probe_images", "shares": "fractions"}  # since version 0.1
NOT_CHOSEN = (*RUN_DEFAULTS, "output_dir", "sweep", "dev_fraction", "preview")  # arguments that a study sets itself


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m training.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", metavar="NAME", help=", ".join(STUDIES))
    add("--out", required=True, help="folder of the study; an unfinished one with the same settings continues")
    add("--scale", default="cpu", help=f"{', '.join(SCALES)} (default: cpu)")
    add("--seeds", type=int, nargs="+", help="seeds of the runs (default: those of the scale)")
    add("--data", nargs="+", default=[], metavar="NAME=PATH", help="path or Hub id of a data set of the study")
    add(
        "--settings",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the study, such as pretrain_steps=500",
    )
    add("--train", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of every run, such as bf16=false")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run with these arguments (None: the command line's) and return the results."""
    try:
        args = build_parser().parse_args(argv)
        study = find(args.study)
        return run_study(study, settings_of(study, args), Path(args.out))
    except (HFViTError, OSError) as error:
        raise SystemExit(report_error(error)) from None
    finally:
        if accelerate.PartialState._shared_state:
            accelerate.PartialState().destroy_process_group()


def find(name: str) -> Study:
    """The study of that name."""
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, 1, cutoff=0.4)
        raise HFViTError(
            f"unknown study {name!r}: choose from {', '.join(STUDIES)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return STUDIES[name]


def settings_of(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """The scale's settings with what the command line changes; `scale` and `data` among them."""
    if args.scale not in SCALES:
        raise HFViTError(f"--scale {args.scale}: choose from {', '.join(SCALES)}")
    settings = {"scale": args.scale, **study.settings[args.scale]}
    settings["data"] = study.data | settings.get("data", {})
    settings["data"] |= pairs("data", args.data, settings["data"])
    settings |= pairs("settings", args.settings, {k: v for k, v in settings.items() if k not in ("data", "scale")})
    settings["train"] = settings["train"] | pairs("train", args.train, None)
    if args.seeds is not None:
        settings["seeds"] = args.seeds
    if len(set(settings["seeds"])) != len(settings["seeds"]) or not settings["seeds"]:
        raise HFViTError(f"--seeds {' '.join(map(str, settings['seeds']))}: give each seed once")
    return settings


def pairs(option: str, texts: list[str], known: dict[str, Any] | None) -> dict[str, Any]:
    """`NAME=VALUE` words with YAML's types; names among `known`, if given."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise HFViTError(f"--{option} {text}: give NAME=VALUE")
        if option == "settings" and RENAMED_SETTINGS.get(name) in known:
            old, name = name, RENAMED_SETTINGS[name]
            print(f"--settings {old} is now called {name}; the next release knows only that", file=sys.stderr)
        if known is not None and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise HFViTError(
                f"--{option} {name}: the study has {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")
            )
        values[name] = value if option == "data" else yaml_value(f"--{option} {text}", value)
        if isinstance(values[name], list):
            values[name] = [as_number(item) for item in values[name]]
        elif option == "settings":
            values[name] = as_number(values[name])
        if option == "settings" and not alike(values[name], known[name]):
            raise HFViTError(f"--settings {text}: give a value like {json.dumps(known[name])}")
    return values


def alike(value: Any, known: Any) -> bool:
    """Whether a value has the type and range of the setting it replaces."""
    if known is None or value is None:
        return known is None or isinstance(known, dict)
    if isinstance(known, list):
        return isinstance(value, list) and bool(value) and all(alike(item, known[0]) for item in value)
    if isinstance(known, bool | str | dict):
        return isinstance(value, type(known))
    if isinstance(value, bool) or not isinstance(value, int if isinstance(known, int) else int | float):
        return False
    return min(1, known) <= value if isinstance(known, int) else 0 <= value < math.inf


def run_study(study: Study, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Execute every unfinished run, then write the results."""
    state = accelerate.PartialState(cpu=not torch.accelerator.is_available())
    runs = runs_of(study, settings)
    chosen = json.loads(json.dumps({"study": study.name, **settings, "definition": definition(study, runs)}))
    check_study_folder(study, chosen, folder, runs)
    state.wait_for_everyone()
    if state.is_main_process:  # the claims are written down before anything runs
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STUDY_SETTINGS_NAME, chosen)
        text = study_plan(study, settings, len(runs))
        atomic_write(folder / PLAN_NAME, text)
        print(text)
    for number, run in enumerate(runs, 1):
        if state.is_main_process:
            print(f"\n[{number}/{len(runs)}] {study.name}: {run.name}", flush=True)
        execute_run(resolved(run, folder), folder / RUNS_NAME / run.name)
    scores = read_scores(runs, folder / RUNS_NAME)
    results_of = results(study, settings, scores, runs, folder / RUNS_NAME)
    if state.is_main_process:
        write_json(folder / RESULTS_NAME, results_of)
        print(f"\n{write_report(study, results_of, folder)}\nwritten to {folder}")
    state.wait_for_everyone()
    return results_of


def runs_of(study: Study, settings: dict[str, Any]) -> list[StudyRun]:
    """The study's runs, with valid arguments.

    Raises:
        HFViTError: invalid settings or arguments, or an argument that no run uses.
    """
    try:
        runs = study.runs(settings)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, HFViTError):
            raise
        raise HFViTError(f"--settings: these do not make a study ({type(error).__name__}: {error})") from None
    trained = [run for run in runs if run.stage in TRAINED]
    for name, value in settings["train"].items():
        if name in NOT_CHOSEN or all(run.options.get(name) != value for run in trained):
            raise HFViTError(f"--train {name}: the study sets this itself; see --settings for what can be changed")
    for run in trained:
        run_arguments(run.stage, Path("OUT"), run.options)
    return runs


def definition(study: Study, runs: list[StudyRun]) -> dict[str, Any]:
    """The rules and runs that the code derives from the settings, by name."""
    identity: dict[str, Any] = {f"rule {rule.claim!r}": rule.accept for rule in study.rules}
    for run in runs:
        entries = vars(run) | run.options
        del entries["name"], entries["options"]
        identity |= {f"{run.name}: {entry}": value for entry, value in entries.items()}
    return identity


def check_study_folder(study: Study, chosen: dict[str, Any], folder: Path, runs: list[StudyRun]) -> None:
    """Raise HFViTError for a folder with something else, naming the difference, and for data that cannot be opened."""
    path = folder / STUDY_SETTINGS_NAME
    if path.is_file():
        saved = read_json(path)
        written, now = saved.pop("definition", {}), {k: v for k, v in chosen.items() if k != "definition"}
        differs = differences(saved, now)
        if differs:
            raise HFViTError(f"{folder} holds another study ({differs}): restore its settings, or give another --out")
        here = chosen["definition"]
        changed = [entry for entry in {**here, **written} if written.get(entry) != here.get(entry)]
        if changed:
            first = differences(*({changed[0]: side.get(changed[0])} for side in (written, here)))
            raise HFViTError(
                f"{folder} holds this study by an older definition ({first}; {len(changed)} in all): go on with the "
                "code that started it, or give another --out"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HFViTError(f"{folder} is not empty and holds no study: give another --out")
    for name, where in chosen["data"].items():
        if all(run.options.get("dataset") != where for run in runs):
            continue
        try:
            for split in ("train", "test"):
                open_dataset(where, split=split)
        except (HFViTError, OSError) as error:
            raise HFViTError(f"data '{name}': {error}; another place: --data {name}=PATH") from None


def resolved(run: StudyRun, folder: Path) -> StudyRun:
    """The run with `run:NAME` replaced by that run's folder."""
    options = {
        name: str(folder / RUNS_NAME / value.removeprefix("run:"))
        if isinstance(value, str) and value.startswith("run:")
        else value
        for name, value in run.options.items()
    }
    return dataclasses.replace(run, options=options)


if __name__ == "__main__":
    main(sys.argv[1:])
