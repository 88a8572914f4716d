"""`hf-vit predict IMAGES --model MODEL`: labels and scores of images, on the screen, as JSON or as a file.

A multi-label model (`config.problem_type`) gives the labels whose score reaches their threshold; a regression gives
numbers, in the unit of its training targets.

Threads read, resize and normalize the next images while the model computes. Rows are printed and written immediately:
a million images take no more memory than a thousand, and `--resume` continues a killed run.

Tests: tests/hf_vit/cli/test_cli.py.
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
from transformers import PreTrainedConfig, PreTrainedModel

from ..download import is_address
from ..errors import HFViTError
from ..image_io import printable, processor_pixels
from ..interpretability.perturbation import probabilities
from ..problem_type import LABEL_JOINER, MULTI_LABEL, REGRESSION, SINGLE_LABEL, problem_type_of, thresholds_of
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
DEFAULT_TOP_K = 5  # labels of an image, of a model with one label an image
BELOW = "_below_min_score"  # folder of --copy-to for images without a label above --min-score
NO_LABEL = "_no_label"  # the same for a multi-label model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument(
        "images", nargs="+", help="files, folders (searched through), glob patterns, addresses, tables of these"
    )
    parser.add_argument("--model", required=True, help="folder, Hub id or checkpoint file")
    add_table_arguments(parser)
    parser.add_argument(
        "--top-k",
        type=positive,
        metavar="K",
        help="labels for each image (default 5; of a model of several labels all that reach their threshold); with "
        "--out, the file has these and their scores in place of all",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write all scores (with --top-k, the best): .csv, .jsonl or .parquet"
    )
    parser.add_argument("--resume", action="store_true", help="continue --out after an interrupted run")
    parser.add_argument(
        "--copy-to", metavar="FOLDER", help="copy each image into FOLDER/LABEL/, for each of its labels"
    )
    parser.add_argument(
        "--min-score",
        type=fraction,
        metavar="S",
        help="leave out labels below S, instead of by the model's thresholds; copies without a label go to "
        f"{BELOW}/ (of a model of several labels: {NO_LABEL}/)",
    )
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="images at a time (default 16)")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="one number, or height and width")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Classify, print or write, and list unreadable images; returns 1 if there are any."""
    if arguments.resume and arguments.out is None:
        raise HFViTError("--resume goes on with the file of --out: give it")
    if arguments.out is not None and arguments.json:
        raise HFViTError("--json prints and --out writes: give one of them")
    paths = find_images(arguments.images, True, arguments.image_column, arguments.image_root)
    model, processor = open_model(arguments.model, arguments, len(paths), classes=True)
    refuse_label_options(arguments, model.config)
    results = classify(model, processor, paths, arguments)
    if arguments.out is not None:
        unreadable = write_scores(arguments, model, paths, results)
    elif arguments.json:
        unreadable = print_json(arguments, results, problem_type_of(model.config))
    else:
        unreadable = print_lines(model, paths, results)
    if unreadable:
        print(f"{len(unreadable)} of {counted(len(paths), 'image')} could not be read:", file=sys.stderr)
        for row in unreadable:
            print(f"  {row['image']}: {row['reason']}", file=sys.stderr)
    return 1 if unreadable else 0


def refuse_label_options(arguments: argparse.Namespace, config: PreTrainedConfig) -> None:
    """Raise HFViTError for options of labels and scores if the model is a regression."""
    for name in ("top_k", "min_score", "copy_to"):
        if problem_type_of(config) == REGRESSION and getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise HFViTError(f"{arguments.model} answers with numbers and has no labels: leave out {option}")


class Results:
    """The batches of `classify`, and the images that could not be read."""

    def __init__(self, batches: Iterator[list[tuple[Any, list[dict[str, Any]], list[float]]]]):
        self.batches = batches
        self.unreadable: list[dict[str, str]] = []
        self.skip: set[str] = set()  # images of an earlier run


def classify(model: PreTrainedModel, processor: Any, paths: Sequence[Any], arguments: argparse.Namespace) -> Results:
    """Classify images in batches of rows (path, labels with their scores, best first, and all scores).

    The labels are the best `--top-k`; of a multi-label model those that reach their threshold; of a regression all.
    """
    names: dict[Any, str] = model.config.id2label or {}
    problem, thresholds = problem_type_of(model.config), torch.zeros(len(names))
    if problem == MULTI_LABEL:
        thresholds = torch.tensor(thresholds_of(model.config))
    if arguments.min_score is not None:
        thresholds = torch.full_like(thresholds, arguments.min_score)
    top_k = len(names) if problem != SINGLE_LABEL else DEFAULT_TOP_K
    top_k = min(arguments.top_k or top_k, len(names))
    device = next(model.parameters()).device

    def compute() -> Iterator[list[tuple[Any, list[dict[str, Any]], list[float]]]]:
        remaining = [path for path in paths if printable(path) not in results.skip]
        bar = tqdm(total=len(remaining), unit=" images", disable=None if arguments.out else True)
        for batch, pixels in prepared_batches(
            remaining, processor, num_channels(model.config), arguments.batch_size, results.unreadable
        ):
            with torch.inference_mode():
                scores = probabilities(model, model(pixels.to(device, model.dtype)).logits.float())
            order = scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k].tolist()
            if problem == REGRESSION:
                order = [list(names)] * len(batch)
            rows = []
            for path, row, numbers in zip(batch, scores.tolist(), order):
                labels = [{"label": names[number], "score": row[number]} for number in numbers]
                if problem != REGRESSION:
                    labels = [hit for hit, number in zip(labels, numbers) if hit["score"] >= float(thresholds[number])]
                if arguments.copy_to is not None:
                    copied = labels if problem == MULTI_LABEL else labels[:1]
                    for label in [hit["label"] for hit in copied] or [NO_LABEL if problem == MULTI_LABEL else BELOW]:
                        copy_image(path, Path(arguments.copy_to), label)
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
    """Write all scores, or with `--top-k` the best labels and their scores, to the file of `--out`, batch by batch.

    For a multi-label model the file has all scores, and `--top-k` limits the column of labels.
    """
    names: dict[Any, str] = model.config.id2label or {}
    problem, reported = problem_type_of(model.config), 0
    classes = [names[number] for number in range(len(names))]
    ranks = None if arguments.top_k is None or problem != SINGLE_LABEL else min(arguments.top_k, len(classes))
    with ScoresFile(arguments.out, classes, arguments.resume, problem != REGRESSION, ranks) as file:
        results.skip = file.done
        for rows in results.batches:
            table = (
                (printable(path), labels_in_a_cell(hits, problem), max(scores),
                 scores if ranks is None else [cell for hit in hits[1:] for cell in hit.values()])
                for path, hits, scores in rows
            )  # fmt: skip
            errors = [(row["image"], row["reason"]) for row in results.unreadable[reported:]]
            reported += len(errors)
            file.add(table, errors)
        file.add((), [(row["image"], row["reason"]) for row in results.unreadable[reported:]])
    earlier = f", {len(file.done):,} of them by an earlier run" if file.done else ""
    outputs = "numbers" if problem == REGRESSION else "scores"
    print(f"{arguments.out}: {outputs} of {counted(len(paths) - len(results.unreadable), 'image')}{earlier}")
    return results.unreadable


def labels_in_a_cell(hits: list[dict[str, Any]], problem: str) -> str:
    """The best label, or for a multi-label model all of them; "" for none."""
    names = [hit["label"] for hit in hits]
    return LABEL_JOINER.join(names) if problem == MULTI_LABEL else names[0] if names else ""


def print_json(arguments: argparse.Namespace, results: Results, problem: str) -> list[dict[str, str]]:
    """Print one JSON object, row by row."""
    print(f'{{\n  "model": {json.dumps(arguments.model, ensure_ascii=False)},\n  "predictions": [', end="")
    first = True
    for rows in results.batches:
        for path, labels, _ in rows:
            entry: dict[str, Any] = {"image": printable(path), "labels": labels}
            if problem == REGRESSION:
                entry = {"image": printable(path), "values": {hit["label"]: hit["score"] for hit in labels}}
            row = json.dumps(entry, ensure_ascii=False)
            print(f"{'' if first else ','}\n    {row}", end="")
            first = False
    print(f'\n  ],\n  "unreadable": {json.dumps(results.unreadable, ensure_ascii=False)}\n}}')
    return results.unreadable


def print_lines(model: PreTrainedModel, paths: Sequence[Any], results: Results) -> list[dict[str, str]]:
    """Print a line for each image, in columns of a width that all rows fit."""
    width = max(len(printable(path)) for path in paths)
    labels = max((len(name) for name in (model.config.id2label or {}).values()), default=0) + len(" 100.0%")
    problem = problem_type_of(model.config)
    no_label = "(no label)" if problem == MULTI_LABEL else "(below --min-score)"
    score = "{:.6g}" if problem == REGRESSION else "{:.1%}"
    for rows in results.batches:
        for path, hits, _ in rows:
            cells = [f"{hit['label']} {score.format(hit['score'])}".ljust(labels) for hit in hits] or [no_label]
            print("  ".join([printable(path).ljust(width), *cells]).rstrip())
    return results.unreadable


def copy_image(path: Any, folder: Path, label: str) -> None:
    """Copy a file into `folder/label/`, under another name if a different file has that name."""
    if is_address(path):
        raise HFViTError(f"--copy-to copies files, '{path}' is an address: download it first")
    source = Path(path)
    target = folder / folder_name(label)
    target.mkdir(parents=True, exist_ok=True)
    destination, number = target / source.name, 1
    while destination.exists() and destination.read_bytes() != source.read_bytes():
        number += 1
        destination = target / f"{source.stem}-{number}{source.suffix}"
    if not destination.exists():
        shutil.copy2(source, destination)


def folder_name(label: str) -> str:
    """A label as the name of a folder: without separators, and not `.` or `..`."""
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", label).strip()
    return name if name.strip(".") else f"_{name}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def prepared_batches(
    paths: Sequence[Any], processor: Any, channels: int, size: int, unreadable: list[dict[str, str]]
) -> Iterator[tuple[list[Any], torch.Tensor]]:
    """Yield paths and normalized images `(B, C, H, W)`, in order; two batches are prepared ahead.

    A batch ends early if the next image has another size, from a processor that does not resize.
    """

    def pixels(image: Image.Image) -> torch.Tensor:
        return processor_pixels(processor, image)  # (1, C, H, W)

    readable = read_images(paths, channels, unreadable, pixels, 2 * size)
    for _, same_shape in groupby(readable, key=lambda row: row[1].shape):
        while batch := list(islice(same_shape, size)):
            yield [path for path, _ in batch], torch.cat([tensor for _, tensor in batch])
