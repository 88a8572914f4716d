"""How many generated pictures one core draws in a second, by family and size, in turns.

    python -m benchmarks.synthetic_speed
    python -m benchmarks.synthetic_speed --device cuda      # and atoms and contours in batches there

The same pictures in every round, of different classes that are known already ("class" is what the first picture of one
takes more, in milliseconds). Medians and quartiles of processor time in one thread; of the clock on a device. For
comparison: the published scripts take 145 ms (VisualAtom) and 25 ms (RCDB) a picture of 512 px, on another machine.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from hf_vit.errors import HFViTError, Parser, report_error
from training.data.synthetic import FAMILIES, SyntheticImages
from training.data.synthetic.batches import FORMULAS, draw_batch
from training.reporting.facts import commit, processor_name


RESULTS = Path(__file__).parent / "results"
SIZES = (224, 64, 32)
PICTURES = 50  # of each family and size
BATCH = 256  # pictures on a device
Seconds = dict[str, list[float]]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.synthetic_speed", description="Pictures per second.")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds of each (default: 15)")
    parser.add_argument("--device", help="also draw batches on this device, such as cuda")
    torch.set_num_threads(1)
    try:
        given = parser.parse_args(argv)
        seconds, first = one_by_one(given.rounds)
        batches = in_batches(given.rounds, given.device) if given.device else {}
    except (HFViTError, RuntimeError) as error:
        return report_error(error)
    report(seconds, first, batches, given)
    return 0


def one_by_one(rounds: int) -> tuple[Seconds, dict[str, float]]:
    """Seconds of processor time a picture, round by round; and how much more in the round that met the classes."""
    sets = {
        f"{family} {size}": SyntheticImages(family, min(FAMILIES[family].classes, PICTURES), 1000, size)
        for family in FAMILIES
        for size in SIZES
    }
    seconds: Seconds = {name: [] for name in sets}
    for number in range(rounds + 2):  # the first meets the classes, the second warms up
        for name in list(sets)[:: 1 if number % 2 else -1]:
            began = time.process_time()
            for index in range(PICTURES):
                sets[name][index]
            seconds[name].append((time.process_time() - began) / PICTURES)
    # In the first round the smallest size came first.
    first = {family: seconds[f"{family} {SIZES[-1]}"] for family in FAMILIES}
    first = {family: max(0.0, values[0] - float(np.median(values[2:]))) for family, values in first.items()}
    return {name: values[2:] for name, values in seconds.items()}, first


def in_batches(rounds: int, device: str) -> Seconds:
    """Seconds a picture on a device, the transfer of the picture not counted, for it is where it is needed."""
    seconds: Seconds = {}
    for family in FORMULAS:
        for size in SIZES:
            images = SyntheticImages(family, PICTURES, 1_000_000, size)
            values = []
            for number in range(rounds + 1):
                began = time.perf_counter()
                pixels, _ = draw_batch(images, range(number * BATCH, (number + 1) * BATCH), device)
                pixels[-1, -1, -1, -1].item()  # waits for the device
                values.append((time.perf_counter() - began) / BATCH)
            seconds[f"{family} {size}"] = values[1:]
    return seconds


def report(seconds: Seconds, first: dict[str, float], batches: Seconds, given: argparse.Namespace) -> None:
    print(f"{'pictures/s, one core':<22}" + "".join(f"{f'{size} px':>21}" for size in SIZES) + f"{'class, ms':>12}")
    for family in FAMILIES:
        print(f"{family:<22}" + "".join(cell(seconds[f"{family} {size}"]) for size in SIZES)
              + f"{1000 * first[family]:>12.2f}")  # fmt: skip
    for family in FORMULAS if batches else ():
        print(f"{family + ' on ' + given.device:<22}" + "".join(cell(batches[f"{family} {size}"]) for size in SIZES))
    result = {
        "what": "generated pictures, seconds a picture",
        "rounds": given.rounds,
        "pictures": PICTURES,
        "clock": "processor time, one thread",
        "seconds_per_picture": seconds,
        "seconds_per_class": first,
        "seconds_per_picture_on_device": batches,
        "environment": {"hardware": hardware(given.device), "numpy": np.__version__, "commit": commit()},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"synthetic-speed-{given.device or 'cpu'}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.name}")


def cell(values: list[float]) -> str:
    """Median and quartiles of pictures per second."""
    low, middle, high = (1 / value for value in np.quantile(values, (0.75, 0.5, 0.25)))
    return f"{middle:>8,.0f} ({low:,.0f}-{high:,.0f})".rjust(21)


def hardware(device: str | None) -> str:
    """What drew."""
    return torch.cuda.get_device_name() if device and device.startswith("cuda") else processor_name()


if __name__ == "__main__":
    sys.exit(main())
