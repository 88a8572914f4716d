"""Measure the speed of hf_vit against its baselines: one table, all candidates in turns in one process.

    make bench                                                       # every CPU suite, in the baselines' environment
    make bench ARGS="--suite cpu-inference --precision float32 --batch_size 8"
    python -m benchmarks.run --suite gpu
    python -m benchmarks.run --list

The table has medians and quartiles over rounds. Each of our columns says how many times faster it is than the row.
The row "limit" is the matmuls alone, each by the library that is fastest at it here. All rounds, versions, threads
and the commit are written to benchmarks/results/SUITE-DEVICE.json; a new measurement on the same hardware replaces
the old one. The exit status is 1 if a fast path of ours is slower than the plain code that it replaces.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers

from benchmarks import torchvision_operators  # noqa: F401 - before whatever imports torchvision


# isort: split
from benchmarks import cpu_inference, cpu_training, gpu, prediction, startup
from benchmarks.limit import machine
from benchmarks.measure import Point, environment, lines, losses, measure
from hf_vit.errors import HFViTError, Parser, report_error


RESULTS = Path(__file__).parent / "results"
SUITES: dict[str, Callable[[argparse.Namespace], Iterator[Point]]] = {
    "cpu-inference": cpu_inference.points,
    "cpu-hybrids": cpu_inference.hybrids,
    "cpu-training": cpu_training.points,
    "cpu-training-small": cpu_training.small,
    "cpu-drop-path": cpu_training.drop_path,
    "cpu-patch-dropout": cpu_training.patch_dropout,
    "startup": startup.points,
    "predict": prediction.points,
    "gpu": gpu.points,
}
INFERENCE, TRAINING = (
    ("cpu-inference", "cpu-hybrids"),
    (
        "cpu-training",
        "cpu-training-small",
        "cpu-drop-path",
        "cpu-patch-dropout",
    ),
)
SUITES_WITH = {  # option: suites that it has an effect on; for others it is an error
    "precision": (*INFERENCE, "cpu-training", "cpu-training-small"),
    "batch_size": INFERENCE + TRAINING,
    "compiled": INFERENCE,
    "preset": ("gpu",),
    "tiny": ("gpu",),
}


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse(argv)
    except HFViTError as error:
        return report_error(error)
    if arguments.list:
        for name, points in SUITES.items():
            about = (points.__doc__ or sys.modules[points.__module__].__doc__ or "").split("\n")[0]
            print(f"{name:<20}{about}")
        return 0
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    seen: set[str] = set()
    lost: list[str] = []
    for suite in arguments.suite:
        rows, losses_of_suite = run(suite, arguments)
        seen, lost = seen | rows, lost + losses_of_suite
    if unknown := sorted(set(arguments.without) - seen):
        return report_error(
            HFViTError(f"--without {' '.join(unknown)}: matches no row; the rows are {', '.join(sorted(seen))}")
        )
    for line in lost:
        print(f"slower than the plain one: {line}", file=sys.stderr)
    return 1 if lost else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; without --suite every CPU suite. An option without effect on a suite is an error."""
    arguments = build_parser().parse_args(argv)
    arguments.suite = arguments.suite or [name for name in SUITES if name != "gpu"]
    for option, suites in SUITES_WITH.items():
        others = [name for name in arguments.suite if name not in suites]
        if getattr(arguments, option) and others:
            raise HFViTError(
                f"--{option} has no effect on {', '.join(others)}: give --suite with some of {', '.join(suites)}"
            )
    arguments.precision = arguments.precision or list(cpu_inference.DTYPES)
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.run", description="Speed against baselines.")
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="suites to run (default: all for CPUs)")
    parser.add_argument("--list", action="store_true", help="list the suites and stop")
    parser.add_argument("--precision", nargs="+", choices=cpu_inference.DTYPES, help="on CPUs (default: all)")
    parser.add_argument("--batch_size", type=int, nargs="+", help="images of a call (default: the suite's)")
    parser.add_argument("--preset", nargs="+", choices=gpu.SIZES, help="of the suite gpu (default: all)")
    parser.add_argument("--without", nargs="+", default=[], metavar="BASELINE", help="leave out rows by name")
    parser.add_argument("--seconds", type=float, default=30, help="approximate time per row of work (default: 30)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--compiled", action="store_true", help="CPU inference: also torch.compile of the baselines")
    parser.add_argument("--tiny", action="store_true", help="suite gpu: one block, two images, any device")
    return parser


def run(suite: str, arguments: argparse.Namespace) -> tuple[set[str], list[str]]:
    """Measure, print and save one suite; returns the names of its baselines, and the fast paths that are slower."""
    seen: set[str] = set()
    lost: list[str] = []
    accelerator = torch.accelerator.current_accelerator() if suite == "gpu" else None
    device = accelerator or torch.device("cpu")
    limits = machine(device)
    rates = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in limits.items())
    where = ", ".join(name for name in hardware({"environment": environment(device)}) if name)
    print(f"== {suite}: {where}, {torch.get_num_threads()} threads; {rates}\n", flush=True)
    for point in SUITES[suite](arguments):
        result = measure(point, arguments.seconds, device, arguments.without) | {
            "machine": limits,
            "environment": environment(device),
        }
        seen |= {*result["baselines"], *result["absent"]}
        lost += losses(result)
        print("\n".join(lines(result)) + "\n", flush=True)
        if not arguments.tiny:
            keep(result, RESULTS / f"{suite}{f'-{device.type}' if suite == 'gpu' else ''}.json")
    return seen, lost


def keep(result: dict, path: Path) -> None:
    """Add a point to the results file; it replaces an earlier one of the same work on the same hardware."""
    points = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for times in (result["seconds"], *result["alone"].values()):
        times.update({name: [float(f"{value:.5g}") for value in values] for name, values in times.items()})
    points = [old for old in points if point_of(old) != point_of(result)] + [result]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(sorted(points, key=point_of), indent=1) + "\n", encoding="utf-8")


def point_of(result: dict) -> tuple[str, str, str]:
    """The work and the hardware of a measurement."""
    return (result["title"], *hardware(result))


def hardware(result: dict) -> tuple[str, str]:
    """The processor's name and its widest instructions, or the GPU's name."""
    return result["environment"]["hardware"], result["environment"]["instructions"] or ""


if __name__ == "__main__":
    sys.exit(main())
