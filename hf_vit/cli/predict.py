"""`hf-vit predict PICTURES --model MODEL`: labels and scores of pictures, as a table or JSON.

Threads read, scale and normalise the next pictures while the model computes on these.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import torch
from PIL import Image
from transformers.models.vit import ViTImageProcessorPil

from ..image_io import check_channels, printable, processor_pixels
from ..interpretability.perturbation import probabilities
from ..modeling.modeling_hf_vit import HFViTForImageClassification
from .inputs import find_images, image_size, load_classifier, pick_device, positive, print_table, read_images


EXAMPLES = """\
  hf-vit predict cat.jpg --model path/to/model
  hf-vit predict pictures/ 'more/*.png' --model owner/name --top-k 3
  hf-vit predict https://example.org/cat.jpg --model path/to/model
  hf-vit predict pictures/ --model path/to/model --json > predictions.json"""
PREPARE_FROM = 128  # pictures: choosing the fastest kernels takes the time of a batch, and wins a tenth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument("images", nargs="+", help="files, folders (searched through), glob patterns and addresses")
    parser.add_argument("--model", required=True, help="folder, Hub id or checkpoint file")
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="labels for each picture (default 5)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="pictures at a time (default 16)")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="one number, or height and width")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Classify, print, and list what could not be read; 1 if there was such a picture."""
    paths = find_images(arguments.images, addresses=True)
    device = pick_device(arguments.device)
    size = image_size(arguments)
    loaded = load_classifier(arguments.model, **({} if size is None else {"image_size": size}))
    processor = ViTImageProcessorPil(**loaded.processor)
    loaded.model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides that `to` takes a device
    model = prepared(loaded.model, len(paths))
    names: dict[Any, str] = model.config.id2label or {}
    channels = model.config.num_channels
    check_channels(channels)
    predictions: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []
    for batch, pixels in batches(paths, processor, channels, arguments.batch_size, unreadable):
        with torch.inference_mode():
            scores = probabilities(model, model(pixels.to(device, model.dtype)).logits.float())
        best = scores.topk(min(arguments.top_k, scores.shape[-1]))
        for path, values, classes in zip(batch, best.values.tolist(), best.indices.tolist()):
            labels = [{"label": names[number], "score": value} for number, value in zip(classes, values)]
            predictions.append({"image": printable(path), "labels": labels})
    if arguments.json:
        print(json.dumps({"model": arguments.model, "predictions": predictions, "unreadable": unreadable}, indent=2))
    else:
        print_table(
            [(row["image"], *(f"{hit['label']} {hit['score']:.1%}" for hit in row["labels"])) for row in predictions]
        )
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} images could not be read:", file=sys.stderr)
        for row in unreadable:
            print(f"  {row['image']}: {row['reason']}", file=sys.stderr)
    return 1 if unreadable else 0


def prepared(model: HFViTForImageClassification, pictures: int) -> HFViTForImageClassification:
    """The model, with the fastest kernels chosen where the pictures are worth it."""
    return model.optimize_for_inference() if pictures >= PREPARE_FROM else model.eval()


def batches(
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
