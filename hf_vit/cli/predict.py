"""`hf-vit predict IMAGES --model MODEL`: labels and scores of images, on the screen, as JSON or as a file.

Threads read, scale and normalize the next images while the model computes on these. Rows are printed and written as
they come: a million images take no more memory than a thousand, and a killed run goes on with `--resume`.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel

from ..download import is_address
from ..errors import HFViTError
from ..image_io import printable, processor_pixels
from ..interpretability.perturbation import probabilities
from ..transformers_classifiers import num_channels
from .inputs import add_table_arguments, find_images, fraction, open_model, positive, read_images
from .scores_file import ScoresFile


EXAMPLES = """\
  hf-vit predict cat.jpg --model path/to/model
  hf-vit predict images/ 'more/*.png' --model owner/name --top-k 3
  hf-vit predict https://example.org/cat.jpg --model path/to/model
  hf-vit predict images/ --model path/to/model --json > predictions.json
  hf-vit predict images/ --model path/to/model --out scores.csv --resume
  hf-vit predict table.csv --image-column file --model path/to/model --out scores.csv
  hf-vit predict images/ --model path/to/model --copy-to sorted --min-score 0.8"""
BELOW = "_below_min_score"  # folder of --copy-to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument(
        "images", nargs="+", help="files, folders (searched through), glob patterns, addresses, tables of these"
    )
    parser.add_argument("--model", required=True, help="folder, Hub id or checkpoint file")
    add_table_arguments(parser)
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="labels for each image (default 5)")
    parser.add_argument("--out", metavar="FILE", help="write all scores: .csv, .jsonl or .parquet")
    parser.add_argument("--resume", action="store_true", help="go on with --out where an earlier run stopped")
    parser.add_argument("--copy-to", metavar="FOLDER", help="copy each image into FOLDER/LABEL/")
    parser.add_argument(
        "--min-score", type=fraction, metavar="S", help=f"best scores below S get no label; copies go to {BELOW}/"
    )
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="images at a time (default 16)")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="one number, or height and width")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Classify, print, and list what could not be read; 1 if there was such an image."""
    if arguments.resume and arguments.out is None:
        raise HFViTError("--resume goes on with the file of --out: give it")
    if arguments.out is not None and arguments.json:
        raise HFViTError("--json prints and --out writes: give one of them")
    paths = find_images(arguments.images, True, arguments.image_column, arguments.image_root)
    model, processor = open_model(arguments.model, arguments, len(paths), classes=True)
    results = classify(model, processor, paths, arguments)
    if arguments.out is not None:
        unreadable = write_scores(arguments, model, paths, results)
    elif arguments.json:
        unreadable = print_json(arguments, results)
    else:
        unreadable = print_lines(model, paths, results)
    if unreadable:
        print(f"{len(unreadable)} of {counted(len(paths), 'image')} could not be read:", file=sys.stderr)
        for row in unreadable:
            print(f"  {row['image']}: {row['reason']}", file=sys.stderr)
    return 1 if unreadable else 0


class Results:
    """What `classify` yields batch by batch, and the images that could not be read."""

    def __init__(self, batches: Iterator[list[tuple[Any, list[dict[str, Any]], list[float]]]]):
        self.batches = batches
        self.unreadable: list[dict[str, str]] = []
        self.skip: set[str] = set()  # images that an earlier run has


def classify(model: PreTrainedModel, processor: Any, paths: Sequence[Any], arguments: argparse.Namespace) -> Results:
    """For each batch the rows (path, best labels with their scores, scores of all classes)."""
    names: dict[Any, str] = model.config.id2label or {}
    device = next(model.parameters()).device

    def compute() -> Iterator[list[tuple[Any, list[dict[str, Any]], list[float]]]]:
        wanted = [path for path in paths if printable(path) not in results.skip]
        bar = tqdm(total=len(wanted), unit=" images", disable=None if arguments.out else True)
        for batch, pixels in prepared_batches(
            wanted, processor, num_channels(model.config), arguments.batch_size, results.unreadable
        ):
            with torch.inference_mode():
                scores = probabilities(model, model(pixels.to(device, model.dtype)).logits.float())
            best = scores.topk(min(arguments.top_k, scores.shape[-1]))
            rows = []
            for path, row, values, classes in zip(batch, scores.tolist(), best.values.tolist(), best.indices.tolist()):
                labels = [{"label": names[number], "score": value} for number, value in zip(classes, values)]
                if arguments.min_score is not None:
                    labels = [hit for hit in labels if hit["score"] >= arguments.min_score]
                if arguments.copy_to is not None:
                    copy_image(path, Path(arguments.copy_to), labels[0]["label"] if labels else BELOW)
                rows.append((path, labels, row))
            yield rows
            bar.update(len(batch))
        bar.close()

    results = Results(iter(()))
    results.batches = compute()
    return results


def write_scores(
    arguments: argparse.Namespace, model: PreTrainedModel, paths: Sequence[Any], results: Results
) -> list[dict[str, str]]:
    """All scores into the file of `--out`, as they come."""
    names: dict[Any, str] = model.config.id2label or {}
    said = 0
    with ScoresFile(arguments.out, [names[number] for number in range(len(names))], arguments.resume) as file:
        results.skip = file.done
        for rows in results.batches:
            table = (
                (printable(path), hits[0]["label"] if hits else "", max(scores), scores) for path, hits, scores in rows
            )
            errors = [(row["image"], row["reason"]) for row in results.unreadable[said:]]
            said += len(errors)
            file.add(table, errors)
        file.add((), [(row["image"], row["reason"]) for row in results.unreadable[said:]])
    kept = f", {len(file.done):,} of them by an earlier run" if file.done else ""
    print(f"{arguments.out}: scores of {counted(len(paths) - len(results.unreadable), 'image')}{kept}")
    return results.unreadable


def print_json(arguments: argparse.Namespace, results: Results) -> list[dict[str, str]]:
    """One JSON object, written row by row."""
    print(f'{{\n  "model": {json.dumps(arguments.model, ensure_ascii=False)},\n  "predictions": [', end="")
    first = True
    for rows in results.batches:
        for path, labels, _ in rows:
            row = json.dumps({"image": printable(path), "labels": labels}, ensure_ascii=False)
            print(f"{'' if first else ','}\n    {row}", end="")
            first = False
    print(f'\n  ],\n  "unreadable": {json.dumps(results.unreadable, ensure_ascii=False)}\n}}')
    return results.unreadable


def print_lines(model: PreTrainedModel, paths: Sequence[Any], results: Results) -> list[dict[str, str]]:
    """A line for each image, in columns whose width is known before."""
    width = max(len(printable(path)) for path in paths)
    labels = max((len(name) for name in (model.config.id2label or {}).values()), default=0) + len(" 100.0%")
    for rows in results.batches:
        for path, hits, _ in rows:
            cells = [f"{hit['label']} {hit['score']:.1%}".ljust(labels) for hit in hits] or ["(below --min-score)"]
            print("  ".join([printable(path).ljust(width), *cells]).rstrip())
    return results.unreadable


def copy_image(path: Any, folder: Path, label: str) -> None:
    """Copy a file into `folder/label/`, under another name where another file has its name there."""
    if is_address(path):
        raise HFViTError(f"--copy-to copies files, '{path}' is an address: download it first")
    source = Path(path)
    target = folder / folder_name(label)
    target.mkdir(parents=True, exist_ok=True)
    place, number = target / source.name, 1
    while place.exists() and place.read_bytes() != source.read_bytes():
        number += 1
        place = target / f"{source.stem}-{number}{source.suffix}"
    if not place.exists():
        shutil.copy2(source, place)


def folder_name(label: str) -> str:
    """A label as the name of one folder: no separators, no way out of the folder."""
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", label).strip()
    return name if name.strip(".") else f"_{name}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def prepared_batches(
    paths: Sequence[Any], processor: Any, channels: int, size: int, unreadable: list[dict[str, str]]
) -> Iterator[tuple[list[Any], torch.Tensor]]:
    """Paths and normalized images `(B, C, H, W)`, in order; while one batch is in use, the next two are prepared.

    A batch ends early where the next image has another size, which a processor that does not resize may give.
    """

    def pixels(image: Image.Image) -> torch.Tensor:
        return processor_pixels(processor, image)  # (1, C, H, W)

    readable = read_images(paths, channels, unreadable, pixels, 2 * size)
    for _, same_shape in groupby(readable, key=lambda row: row[1].shape):
        while batch := list(islice(same_shape, size)):
            yield [path for path, _ in batch], torch.cat([tensor for _, tensor in batch])
