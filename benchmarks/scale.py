"""How cost grows with the data: folders of up to a million images, shards of up to a million records.

    python -m benchmarks.scale --save               # ten minutes on two cores
    python -m benchmarks.scale --full               # a folder of four million too, and more steps and seeds
    python -m benchmarks.scale --parts shards shuffle

Images are hard links to a few files, shards to one, so that the disk holds little. Each measurement is a process of
its own. Seconds are of processor time, of the process and its workers, which other work on the machine disturbs less;
memory is what a process alone has written to (smaps_rollup), in MB. A worker is compared with one that hands out
zeros: torch's own needs that much for any data set. `exponent` is the slope of log(cost) over log(size) from the
smallest size to the largest: 0 does not grow, 1 grows as the data do, 2 as their square.
"""

import filecmp
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import environment
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.atomic_file import atomic_write
from hf_vit.errors import HFViTError, Parser, report_error
from training.data.dataset import collate, open_dataset
from training.data.samplers import TrainSampler
from training.data.shards.chunks import RUN_LENGTH
from training.data.shards.streaming import BUFFER_SIZE, ImageStream, open_stream
from training.data.synthetic import SyntheticImages
from training.data.transforms import TrainTransform


RESULTS = Path(__file__).parent / "results" / "scale.json"
PARTS = ("folders", "shards", "processes", "shuffle", "losses", "predict")
PER_FOLDER, PER_SHARD = 1000, 1000  # images
WORKERS, BATCH = 2, 128
READ = 100_000  # images, after which memory is looked at again
ORDER = {"seed": 0, "position": 0, "stop": 10**9, "rank": 0, "world_size": 1}
NEIGHBORS = 1024
MB = 1e6

spent = 0.0  # processor seconds of measured processes


# What a process of its own measures: each returns {row: value}


def scan(folder: str) -> dict[str, float]:
    """The least that opening can cost: every name, by `os.scandir`."""
    before, began = private_memory(os.getpid()), processor_seconds()
    names, pending = [], [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    names.append(entry.name)
    return {"os.scandir, s": processor_seconds() - began, "os.scandir, MB": private_memory(os.getpid()) - before}


def scan_as_torchvision(folder: str) -> dict[str, float]:
    """As `torchvision.datasets.ImageFolder` finds its samples: sorted `os.walk`, a path and a class for each."""
    before, began = private_memory(os.getpid()), processor_seconds()
    samples = []
    for number, name in enumerate(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())):
        for root, _, files in sorted(os.walk(os.path.join(folder, name), followlinks=True)):
            for file in sorted(files):
                path = os.path.join(root, file)
                if path.lower().endswith((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")):
                    samples.append((path, number))
    memory = private_memory(os.getpid()) - before
    return {"torchvision's way, s": processor_seconds() - began, "torchvision's way, MB": memory}


def open_folder(folder: str, cache: str, again: bool) -> dict[str, float]:
    before, began = private_memory(os.getpid()), processor_seconds()
    dataset = open_dataset(folder, split="train", cache_dir=cache)
    seconds, memory = processor_seconds() - began, private_memory(os.getpid()) - before
    assert len(dataset.label_names) > 1
    name = "open again" if again else "open"
    return {f"{name}, s": seconds, f"{name}, MB": memory}


def open_shards(folder: str, cache: str, again: bool) -> dict[str, float]:
    before, began = private_memory(os.getpid()), processor_seconds()
    open_stream(folder, split="train", cache_dir=cache)
    seconds, memory = processor_seconds() - began, private_memory(os.getpid()) - before
    name = "open again" if again else "open"
    return {f"{name}, s": seconds, f"{name}, MB": memory}


def first_step(
    folder: str, cache: str, streaming: bool, images: int, group_size: int | None = None
) -> dict[str, float]:
    """Opening, workers, the first batch; private memory then and after `images`."""
    wall, began = time.perf_counter(), processor_seconds()
    transform = TrainTransform(32)
    opened = (
        open_stream(folder, split="train", cache_dir=cache, group_size=group_size)
        if streaming
        else open_dataset(folder, split="train", cache_dir=cache)
    )
    dataset = opened.with_transform(transform, seed=0)
    order = dataset.order(BATCH, **ORDER) if streaming else TrainSampler(len(dataset), BATCH, **ORDER)
    batches = start_loader(dataset, order)
    next(batches)
    found = {"first batch, s": processor_seconds() - began, "first batch, wall s": time.perf_counter() - wall}
    children = [process.pid for process in multiprocessing.active_children()]
    parent, workers = private_memory(os.getpid()), max(map(private_memory, children))
    for _ in range(images // BATCH):
        next(batches)
    read = f"after {images:,} images"
    return found | {
        "parent at the first batch, MB": parent,
        f"parent {read}, MB": private_memory(os.getpid()),
        "a worker at the first batch, MB": workers,
        f"a worker {read}, MB": max(map(private_memory, children)),
    }


def start_loader(dataset: torch.utils.data.Dataset, order: Any) -> Iterator[dict]:
    """Batches from forked workers; without a word they would be started as this process was, by a fork server."""
    words = {"collate_fn": collate, "num_workers": WORKERS, "multiprocessing_context": "fork"}
    return iter(torch.utils.data.DataLoader(dataset, batch_sampler=order, **words))


class Zeros(torch.utils.data.Dataset):
    """A data set that holds nothing: what its workers need, those of every other need too."""

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {"pixel_values": torch.zeros(3, 32, 32, dtype=torch.uint8), "labels": 0, "index": key[1]}


def first_step_of_zeros(images: int) -> dict[str, float]:
    """`first_step` of a data set that holds nothing."""
    batches = start_loader(Zeros(), TrainSampler(1000, BATCH, **ORDER))
    next(batches)
    children = [process.pid for process in multiprocessing.active_children()]
    workers = max(map(private_memory, children))
    for _ in range(images // BATCH):
        next(batches)
    return {
        "a worker of zeros at the first batch, MB": workers,
        f"a worker of zeros after {images:,} images, MB": max(map(private_memory, children)),
    }


def resume_stream(folder: str, cache: str) -> dict[str, float]:
    """From a position to its first record; and how fast records are read."""
    stream = open_stream(folder, split="train", cache_dir=cache)
    order = stream.order(BATCH, seed=0, position=0, stop=10**9)
    found = {}
    for percent in (10, 50, 90):
        began = processor_seconds()
        next(order.records(len(stream) * percent // 100))
        found[f"resume at {percent} %, s"] = processor_seconds() - began
    count, began = 20 * BUFFER_SIZE, processor_seconds()
    for _ in itertools.islice(order.records(0), count):
        pass
    found["records read in a processor second"] = count / (processor_seconds() - began)
    return found


def predict(folder: str, model: str, out: str, resume: bool) -> dict[str, float]:
    """Class scores of a folder; or the rest of a run that was stopped."""
    from hf_vit.cli.main import main

    began = processor_seconds()
    sys.stdout, printed = io.StringIO(), sys.stdout
    words = ["predict", folder, "--model", model, "--batch-size", "64", "--out", out]
    assert main([*words, "--resume"] if resume else words) == 0
    sys.stdout = printed
    name = "hf-vit predict --resume at 90 %" if resume else "hf-vit predict"
    seconds, peak = processor_seconds() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    return {f"{name}, s": seconds, f"{name}, peak MB": peak}


TASKS: dict[str, Callable[..., dict[str, float]]] = {
    task.__name__: task
    for task in (
        scan,
        scan_as_torchvision,
        open_folder,
        open_shards,
        first_step,
        first_step_of_zeros,
        resume_stream,
        predict,
    )
}


def processor_seconds() -> float:
    """Of this process and its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def private_memory(process: int) -> float:
    """MB that a process alone has written to: neither what a file holds nor what it shares with another."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024 / MB


def in_a_process(task: str, **words: Any) -> dict[str, float]:
    """What a task measures in a process of its own."""
    (found,) = in_processes(task, 1, words)
    return found


def in_processes(task: str, count: int, words: dict[str, Any]) -> list[dict[str, float]]:
    """What a task measures in several processes at the same time; imports are done once, before they are forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.scale", "pyarrow"])
    # A full collection writes to all that was imported before the fork: 110 MB, which are no task's
    with ProcessPoolExecutor(count, context, initializer=gc.freeze) as pool:
        running = [pool.submit(measured, task, words) for _ in range(count)]
        results = [future.result() for future in running]
    global spent
    spent += sum(seconds for _, seconds in results)
    return [found for found, _ in results]


def measured(task: str, words: dict[str, Any]) -> tuple[dict[str, float], float]:
    """What a task returns, and the processor seconds that it took."""
    began = processor_seconds()
    return TASKS[task](**words), processor_seconds() - began


# The data


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((48, 48)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_folder(folder: Path, images: int) -> Path:
    """`images` JPEG files, up to a thousand to a class; each class holds links to one file."""
    classes = max(2, images // PER_FOLDER)
    for number in range(classes):
        inside = folder / f"{number:05d}"
        inside.mkdir(parents=True)
        first = inside / "00000.jpg"
        first.write_bytes(jpeg(number))
        for other in range(1, images // classes):
            os.link(first, inside / f"{other:05d}.jpg")
    return folder


def make_shards(folder: Path, shards: int) -> Path:
    """`shards` links to one tar file of a thousand records in a hundred classes."""
    folder.mkdir(parents=True)
    first = folder / "train-00000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(PER_SHARD):
            for kind, data in (("cls", str(number // 10).encode()), ("jpg", jpeg(number // 10))):
                member = tarfile.TarInfo(f"{number:06d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for other in range(1, shards):
        os.link(first, folder / f"train-{other:05d}.tar")
    (folder / "label_names.json").write_text(json.dumps([f"class {number}" for number in range(100)]))
    return folder


# The parts: each yields (size, {row: value})


def folders(root: Path, full: bool) -> Iterator[tuple[int, dict[str, float]]]:
    for images in (1_000, 10_000, 100_000, 1_000_000, *[4_000_000] * full):
        folder, cache = str(make_folder(root / f"folder-{images}", images)), str(root / f"cache-{images}")
        in_a_process("scan", folder=folder)  # into the kernel's cache
        found = in_a_process("scan", folder=folder) | in_a_process(
            "open_folder", folder=folder, cache=cache, again=False
        )
        found |= in_a_process("scan_as_torchvision", folder=folder)
        found |= in_a_process("open_folder", folder=folder, cache=cache, again=True)
        found |= in_a_process("first_step", folder=folder, cache=cache, streaming=False, images=READ)
        found |= in_a_process("first_step_of_zeros", images=READ)
        for when in ("at the first batch", f"after {READ:,} images"):
            found[f"of it for the images {when}, MB"] = (
                found[f"a worker {when}, MB"] - found[f"a worker of zeros {when}, MB"]
            )
        yield images, found


def shards(root: Path, full: bool) -> Iterator[tuple[int, dict[str, float]]]:
    for count in (10, 100, 1_000):
        folder, cache = str(make_shards(root / f"shards-{count}", count)), str(root / f"cache-shards-{count}")
        found = in_a_process("open_shards", folder=folder, cache=cache, again=False)
        found |= in_a_process("open_shards", folder=folder, cache=cache, again=True)
        found |= in_a_process("first_step", folder=folder, cache=cache, streaming=True, images=READ)
        empty = {"cache": str(root / f"cache-groups-{count}"), "group_size": 10}
        grouped = in_a_process("first_step", folder=folder, streaming=True, images=0, **empty)
        found["first batch, no index, 10 shards at a time, s"] = grouped["first batch, s"]
        yield count * PER_SHARD, found | in_a_process("resume_stream", folder=folder, cache=cache)


def processes(root: Path, full: bool) -> Iterator[tuple[int, dict[str, float]]]:
    count = 100
    folder = str(make_shards(root / "shards-at-once", count))
    found = {}
    for together in (1, 2):
        words = {"folder": folder, "cache": str(root / f"cache-{together}"), "again": False}
        seconds = sum(part["open, s"] for part in in_processes("open_shards", together, words))
        found[f"{together} processes open at once, s of all"] = seconds
    yield count * PER_SHARD, found


@dataclass(frozen=True)
class SortedRecords:
    """Records sorted by class, in runs, without bytes: for the order alone."""

    sizes: np.ndarray
    first: np.ndarray
    fingerprint: str = "sorted"
    label_names: tuple = ("0", "1")

    @classmethod
    def of(cls, records: int, run_length: int) -> "SortedRecords":
        first = np.arange(0, records, run_length)
        return cls(np.diff(first, append=records), first)

    def read(self, chunk: int) -> list[tuple[bytes, int, str]]:
        return [(b"", 0, "")] * int(self.sizes[chunk])


def stream_order(records: int, run_length: int, buffer_size: int, seed: int, first: int, count: int) -> np.ndarray:
    """Numbers of the records that a stream of sorted shards shows one after another."""
    stream = ImageStream(SortedRecords.of(records, run_length), "sorted", "train", buffer_size=buffer_size)
    order = stream.order(1, seed=seed, position=0, stop=10**12)
    return np.array([record.index for record in itertools.islice(order.records(first), count)])


def shuffle(root: Path, full: bool) -> Iterator[tuple[int, dict[str, float]]]:
    """Classes and shards among 1,024 neighbors: a thousand classes, sorted, in shards of a thousand records."""
    for records in (100_000, 1_000_000):
        shown = {
            f"single records, buffer of {BUFFER_SIZE} (default)": (1, BUFFER_SIZE),
            f"runs of {RUN_LENGTH}, buffer of {BUFFER_SIZE} (default of mixed shards)": (RUN_LENGTH, BUFFER_SIZE),
            "runs of 256, buffer of 2048 (before)": (256, 2048),
            "runs of 4, buffer of 16384": (4, 16384),
        }
        orders = {name: stream_order(records, *how, 0, records // 2, 8 * NEIGHBORS) for name, how in shown.items()}
        orders["one by one, as a folder"] = np.random.default_rng(0).permutation(records)[: 8 * NEIGHBORS]
        found = {}
        for name, order in orders.items():
            for what, values in (("classes", order * 1000 // records), ("shards", order // PER_SHARD)):
                parts = values.reshape(-1, NEIGHBORS)
                found[f"{what} in 1,024 neighbors, {name}"] = float(np.mean([len(np.unique(part)) for part in parts]))
        yield records, found


def losses(root: Path, full: bool) -> Iterator[tuple[int, dict[str, float]]]:
    """Loss of a tiny model over its training, from a stream of sorted shards and one by one.

    52 classes of 400 glyphs, sorted. The buffer is scaled so that it holds as many records of each class as the
    default does of a thousand classes: four.
    """
    images = SyntheticImages("glyphs", classes=52, instances=400, size=16)
    items = sorted((images[number] for number in range(len(images))), key=lambda item: item["label"])
    count, labels = len(items), torch.tensor([item["label"] for item in items])
    pixels = np.stack([item["image"] for item in items]).transpose(0, 3, 1, 2)
    inputs = torch.from_numpy(pixels).float() / 127.5 - 1
    buffer = BUFFER_SIZE * 52 // 1000
    steps, batch = (600, 64) if full else (300, 64)
    curves: dict[str, list[np.ndarray]] = {}
    for seed in range(5 if full else 3):
        length = steps * batch
        for name, order in (
            ("one by one", np.concatenate([np.random.default_rng((seed, e)).permutation(count) for e in range(9)])),
            ("stream, single records (default)", stream_order(count, 1, buffer, seed, 0, length)),
            ("stream, runs of 8", stream_order(count, 8, buffer, seed, 0, length)),
            ("stream, runs of 256", stream_order(count, 256, buffer, seed, 0, length)),
        ):
            curves.setdefault(name, []).append(loss_curve(inputs, labels, order[:length].reshape(steps, batch), seed))
    found = {}
    for name, runs in curves.items():
        for part, of in (("first half", slice(0, steps // 2)), ("second half", slice(steps // 2, None))):
            means = [float(run[of].mean()) for run in runs]
            found[f"loss, {part}, {name}"] = float(np.mean(means))
            found[f"std over seeds, {part}, {name}"] = float(np.std(means, ddof=1))
    yield count, found


def loss_curve(inputs: torch.Tensor, labels: torch.Tensor, order: np.ndarray, seed: int) -> np.ndarray:
    """The loss on a fixed random tenth of the images after every tenth step of plain AdamW."""
    torch.manual_seed(seed)
    config = HFViTConfig(
        image_size=16, patch_size=4, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_labels=int(labels.max()) + 1,
    )  # fmt: skip
    model = HFViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    watched = torch.from_numpy(np.random.default_rng(0).permutation(len(inputs))[: len(inputs) // 10])
    curve = []
    for number, rows in enumerate(torch.from_numpy(order)):
        model.train()
        loss = torch.nn.functional.cross_entropy(model(inputs[rows]).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 10 == 9:
            model.eval()
            with torch.inference_mode():
                logits = model(inputs[watched]).logits
            curve.append(float(torch.nn.functional.cross_entropy(logits, labels[watched])))
    return np.array(curve).repeat(10)


def predictions(root: Path, full: bool) -> Iterator[tuple[int, dict[str, float]]]:
    from transformers import ViTImageProcessor

    home = root / "model"
    config = HFViTConfig(
        image_size=32, patch_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_labels=100,
    )  # fmt: skip
    HFViTForImageClassification(config).save_pretrained(home)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(home)
    for images in (5_000, 50_000):
        folder = make_folder(root / f"predict-{images}", images)
        out = root / f"{images}.csv"
        words = {"folder": str(folder), "model": str(home), "out": str(out)}
        found = in_a_process("predict", **words, resume=False)
        whole = out.rename(root / "whole.csv")
        with whole.open("rb") as complete, out.with_name(f"{out.name}.partial").open("wb") as stopped:
            stopped.writelines(itertools.islice(complete, images * 9 // 10))
            stopped.write(b"half a li")
        found |= in_a_process("predict", **words, resume=True)
        if not filecmp.cmp(out, whole, shallow=False):
            raise HFViTError("a resumed hf-vit predict wrote another file")
        yield images, found


RUNS: dict[str, Callable[[Path, bool], Iterator[tuple[int, dict[str, float]]]]] = dict(
    zip(PARTS, (folders, shards, processes, shuffle, losses, predictions))
)


def exponent(sizes: list[int], costs: list[float]) -> float | None:
    """Slope of log(cost) over log(size) from the smallest size to the largest; None for what is not positive."""
    if len(sizes) < 2 or min(costs[0], costs[-1]) <= 0:
        return None
    return math.log(costs[-1] / costs[0]) / math.log(sizes[-1] / sizes[0])


def table(part: str, points: list[tuple[int, dict[str, float]]]) -> list[dict[str, Any]]:
    """The rows of a part: a cost at each size, and its exponent."""
    sizes = [size for size, _ in points]
    rows = []
    for name in points[0][1]:
        costs = [found[name] for _, found in points]
        rows.append({"part": part, "row": name, "sizes": sizes, "values": costs, "exponent": exponent(sizes, costs)})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["row"]) for row in rows)
    print(f"\n{rows[0]['part']:<{width}}" + "".join(f"{size:>12,}" for size in rows[0]["sizes"]) + "    exponent")
    for row in rows:
        slope = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
        print(f"{row['row']:<{width}}" + "".join(f"{value:>12.4g}" for value in row["values"]) + f"{slope:>12}")


def save(part: str, rows: list[dict[str, Any]], run: dict[str, Any]) -> None:
    """Write a part's rows into the results; those of the other parts stay."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": {}, "rows": []}
    runs = kept["runs"] | {part: run | {"environment": environment(torch.device("cpu"))}}
    rows = [row for row in kept["rows"] if row["part"] != part] + rows
    atomic_write(RESULTS, json.dumps({"runs": runs, "rows": rows}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.scale", description="How cost grows with the data.")
    parser.add_argument("--full", action="store_true", help="four million images too, more steps and seeds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--folder", type=Path, help="where files are made and removed (default: the temporary folder)")
    parser.add_argument("--save", action="store_true", help=f"write the results to {RESULTS.name}")
    try:
        given = parser.parse_args(argv)
        for part in given.parts:
            wall, began = time.perf_counter(), processor_seconds() + spent
            with tempfile.TemporaryDirectory(prefix="scale-", dir=given.folder) as root:
                new = table(part, list(RUNS[part](Path(root), given.full)))
            seconds = {"processor_s": processor_seconds() + spent - began, "wall_s": time.perf_counter() - wall}
            show(new)
            print("{}: {processor_s:.0f} s of processor time, {wall_s:.0f} s".format(part, **seconds), flush=True)
            if given.save:
                save(part, new, {"full": given.full} | seconds)
    except (HFViTError, OSError) as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
