"""How many generated images one core draws in a second, by family and size, in turns.

    python -m benchmarks.synthetic_speed
    python -m benchmarks.synthetic_speed --against ../other     # and another checkout's, in the same rounds

The same images in every round, of different classes that are known already ("class" is what the first image of one
takes more, in milliseconds). Medians and quartiles of processor time in one thread; with another checkout, the ratio
of its median to ours, and an error where it draws other bytes. For comparison: the published scripts take 145 ms
(VisualAtom) and 25 ms (RCDB) an image of 512 px, on another machine.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from hf_vit.capabilities import processor_name
from hf_vit.errors import HFViTError, Parser, report_error
from training.data.synthetic import FAMILIES
from training.reporting.facts import commit


RESULTS = Path(__file__).parent / "results"
HERE = Path(__file__).parent.parent
SIZES = (224, 64, 32)
IMAGES = 50  # of each family and size
Seconds = dict[str, list[float]]

# Runs in a process for each checkout: a line "FAMILY SIZE" in, "SECONDS DIGEST" out. It keeps no images, since what
# else is allocated changes what glibc does with freed memory, and with it the figures.
WORKER = f"""
import hashlib, sys, time
try:
    from training.data.synthetic import FAMILIES, SyntheticImages
except ImportError:  # as version 0.1 had it
    from training.synthetic import FAMILIES, SyntheticImages

for line in sys.stdin:
    family, size = line.split()
    images = SyntheticImages(family, min(FAMILIES[family].classes, {IMAGES}), 1000, int(size))
    began = time.process_time()
    for index in range({IMAGES}):
        images[index]
    seconds = (time.process_time() - began) / {IMAGES}
    digest = hashlib.sha256()
    for index in range({IMAGES}):
        digest.update(images[index]["image"].tobytes())
    print(seconds, digest.hexdigest(), flush=True)
"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.synthetic_speed", description="Images per second.")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds of each (default: 15)")
    parser.add_argument("--against", type=Path, help="another checkout of this repository, measured in turns with it")
    try:
        given = parser.parse_args(argv)
        checkouts = [HERE] if given.against is None else [HERE, given.against]
        if not all((folder / "training").is_dir() for folder in checkouts):
            raise HFViTError(f"'{given.against}' is no checkout of this repository")
        seconds, first = measure(checkouts, given.rounds)
    except (HFViTError, OSError) as error:
        return report_error(error)
    report(seconds, first, given)
    return 0


def measure(checkouts: list[Path], rounds: int) -> tuple[list[Seconds], dict[str, float]]:
    """Seconds of processor time an image, round by round, of each checkout; and how much more a class takes once."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": "1"}, cwd=folder,
        )
        for folder in checkouts
    ]  # fmt: skip
    names = [(family, size) for family in FAMILIES for size in SIZES]
    seconds: list[Seconds] = [{f"{family} {size}": [] for family, size in names} for _ in checkouts]
    for number in range(rounds + 2):  # the first meets the classes, the second warms up
        turn = 1 if number % 2 else -1
        for family, size in names[::turn]:
            digests = set()
            for worker, values in list(zip(workers, seconds))[::turn]:
                worker.stdin.write(f"{family} {size}\n")
                worker.stdin.flush()
                answer = worker.stdout.readline().split()
                if not answer:
                    raise HFViTError(f"the process that draws {family} ended; see its error above")
                values[f"{family} {size}"].append(float(answer[0]))
                digests.add(answer[1])
            if len(digests) > 1:
                raise HFViTError(f"the checkouts draw different bytes: {family}, {size} px")
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    # In the first round the smallest size came first.
    smallest = {family: seconds[0][f"{family} {SIZES[-1]}"] for family in FAMILIES}
    first = {family: max(0.0, values[0] - float(np.median(values[2:]))) for family, values in smallest.items()}
    return [{name: values[2:] for name, values in part.items()} for part in seconds], first


def report(seconds: list[Seconds], first: dict[str, float], given: argparse.Namespace) -> None:
    """Print a table; write all values to results/synthetic-speed-cpu.json, unless another checkout was measured."""
    print(f"{'images/s, one core':<20}" + "".join(f"{f'{size} px':>23}" for size in SIZES) + f"{'class, ms':>12}")
    for family in FAMILIES:
        print(f"{family:<20}" + "".join(cell(seconds[0][f"{family} {size}"]) for size in SIZES)
              + f"{1000 * first[family]:>12.2f}")  # fmt: skip
        for other in seconds[1:]:
            print(f"{'  other checkout':<20}" + "".join(cell(other[f"{family} {size}"]) for size in SIZES))
            ratios = (float(np.median(other[name]) / np.median(seconds[0][name])) for name in
                      (f"{family} {size}" for size in SIZES))  # fmt: skip
            print(f"{'  faster by':<20}" + "".join(f"{ratio:>22.2f}x" for ratio in ratios))
    if given.against is not None:
        return
    result = {
        "what": "generated images, seconds an image",
        "rounds": given.rounds,
        "images": IMAGES,
        "clock": "processor time, one thread",
        "seconds_per_image": seconds[0],
        "seconds_per_class": first,
        "environment": {"hardware": processor_name(), "numpy": np.__version__, "commit": commit()},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "synthetic-speed-cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.name}")


def cell(values: list[float]) -> str:
    """Median and quartiles of images per second."""
    low, middle, high = (1 / value for value in np.quantile(values, (0.75, 0.5, 0.25)))
    return f"{middle:>10,.0f} ({low:,.0f}-{high:,.0f})".rjust(23)


if __name__ == "__main__":
    sys.exit(main())
