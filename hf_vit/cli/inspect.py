"""`hf-vit inspect MODEL [IMAGE...] --out DIR`: explanations and figures of a model and its images, on one page.

Called by `hf_vit/cli/main.py`, which adds `--json` and prints errors. DIR then contains

    report.html           one page with all images embedded
    numbers.json          all measurements
    model-1/              figures of the model: filters.png, positions.png, distance.png, and a folder for each image
        001-NAME/         overlays of the original's size (attention.png, rollout.png, ...; below PAGE_WIDTH pixels
                          enlarged by a whole factor), heads.png, norms.png, colors.png, curves.png
    model-2/              the same for the model of --compare
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from transformers.models.vit import ViTImageProcessorPil

from ..atomic_file import atomic_write
from ..errors import HFViTError
from ..html_page import figure_svg, image_uri, write_page
from ..image_io import check_channels, printable, processor_pixels
from ..interpretability.attention import (
    attention_distance,
    class_attention,
    embedding_filters,
    feature_colors,
    head_numbers,
    layer_numbers,
    position_similarity,
    token_norms,
    token_states,
)
from ..interpretability.perturbation import BASELINES, compare_explanations, probabilities
from ..interpretability.relevance import METHODS, explain
from ..problem_type import REGRESSION, problem_type_of
from .inputs import find_images, image_size, load_model, pick_device, positive, read_images


EXAMPLES = """\
  hf-vit inspect path/to/model --out seen
  hf-vit inspect path/to/model cat.jpg images/ --out seen
  hf-vit inspect ViT-B_16.npz cat.jpg --out seen --image-size 384 512 --layers 0 5 -1
  hf-vit inspect out images/ --out seen --compare other/model --class cat --steps 0"""
REPORT = "report.html"
PROGRAM = "hf-vit inspect"  # in the page's metadata: only its own report is overwritten
TEMPLATE = Path(__file__).with_name("inspection_report.html")
PAGE_WIDTH = 360  # pixels of an image on the page; the files have the original's
CLASS_FREE = ("attention", "rollout")  # methods that do not depend on the class


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument("model", help="folder, Hub id or checkpoint file")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, folders (searched through), glob patterns")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the page and its figures")
    parser.add_argument("--compare", metavar="MODEL", help="a second model, shown next to the first")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="explanations (all)")
    parser.add_argument("--class", dest="target", metavar="NAME", help="class to explain, name or number (predicted)")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="blocks to show, counted from 0, negative ones from the last (first, middle, last)",
    )
    parser.add_argument("--heads", type=int, nargs="+", metavar="N", help="heads to show, counted from 0 (all)")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="one number, or height and width")
    parser.add_argument("--limit", type=positive, default=24, metavar="N", help="largest number of images (24)")
    parser.add_argument(
        "--steps", type=whole, default=10, metavar="N", help="steps of the deletion and insertion curves (10; 0: none)"
    )
    parser.add_argument("--baseline", choices=BASELINES, default="blur", help="content of removed patches (blur)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(text)


@dataclass
class Subject:
    """A model under inspection, its processor, and the results for it."""

    title: str
    model: Any
    processor: Any
    folder: Path
    layers: list[int]
    target: int | None
    methods: list[str]
    figures: list[Markup] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    distances: list[torch.Tensor] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> int:
    """Inspect, write the page and print its path; returns 1 if some images could not be read."""
    try:
        from ..interpretability import plots as figures
    except ImportError as error:
        raise HFViTError(f'drawing needs matplotlib ({error}): pip install "hf-vit[inspect]"') from error
    if arguments.out.exists() and not arguments.out.is_dir():
        raise HFViTError(f"--out {arguments.out} is a file: name a folder")
    page = arguments.out / REPORT
    if page.is_file() and f'content="{PROGRAM}"' not in page.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise HFViTError(f"{page} is the report of a training run: name another folder with --out")
    paths = find_images(arguments.images)
    if len(paths) > arguments.limit:
        print(
            f"note: the first {arguments.limit} of {len(paths)} images; --limit {len(paths)} for all",
            file=sys.stderr,
        )
        paths = paths[: arguments.limit]
    names = [arguments.model] + ([arguments.compare] if arguments.compare else [])
    subjects = [_subject(name, number, arguments) for number, name in enumerate(names, start=1)]
    channels = {subject.model.config.num_channels for subject in subjects}
    for number in channels:
        check_channels(number)
    unreadable: list[dict[str, str]] = []
    shown: list[dict[str, Any]] = []
    readable = read_images(paths, max(channels), unreadable, in_memory=1)
    for number, (path, image) in enumerate(readable, start=1):
        rows = [
            _inspect(subject, image, f"{number:03d}-{printable(path.stem)}", arguments, figures)
            for subject in subjects
        ]
        shown.append({"name": printable(path.name), "path": printable(path), "size": image.size, "models": rows})
    if paths and not shown:
        raise HFViTError(
            f"none of {len(paths)} images could be read; {printable(paths[0])}: {unreadable[0]['reason']}"
        )
    for index, subject in enumerate(subjects):
        _color_features(subject, [image["models"][index] for image in shown], figures)
        _describe(subject, figures)
    comparison = _comparison_figures(subjects, shown, arguments.out, figures)
    _write_report(arguments.out, subjects, shown, unreadable, comparison)
    report = arguments.out / REPORT
    result = {"report": str(report), "numbers": str(arguments.out / "numbers.json"), "unreadable": unreadable}
    print(json.dumps(result, indent=2) if arguments.json else report)
    for row in unreadable:
        print(f"could not be read: {row['image']}: {row['reason']}", file=sys.stderr)
    return 1 if unreadable else 0


def _subject(name: str, number: int, arguments: argparse.Namespace) -> Subject:
    size = image_size(arguments)
    loaded = load_model(name, **({} if size is None else {"image_size": size}))
    model: Any = loaded.model.to(pick_device(arguments.device))  # type: ignore[arg-type]
    depth, classes = model.config.num_hidden_layers, model.config.num_labels
    try:
        layers = sorted(set(layer_numbers(model, arguments.layers or (0, depth // 2, depth - 1)).values()))
        head_numbers(model, arguments.heads)
        target = _class(model, arguments.target)
    except HFViTError as error:
        raise HFViTError(f"{name}: {error}") from error  # which of two models
    methods = [method for method in arguments.methods if classes or method in CLASS_FREE]
    if problem_type_of(model.config) == REGRESSION and arguments.steps:
        print(f"note: {name} answers with numbers, and deletion and insertion curves show scores", file=sys.stderr)
    if len(methods) < len(arguments.methods):
        print(f"note: {name} has no classifier: only {', '.join(methods) or 'its figures'}", file=sys.stderr)
    folder = arguments.out / f"model-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    processor = ViTImageProcessorPil(**loaded.processor)
    title = Path(name).resolve().name if Path(name).exists() else name  # the page may be sent to people
    return Subject(title, model, processor, folder, layers, target, methods)


def _class(model: Any, name: str | None) -> int | None:
    """The number of a class given by name or number."""
    if name is None:
        return None
    names = model.config.id2label if model.config.num_labels else {}
    for number, label in names.items():
        if label == name:
            return int(number)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    some = ", ".join(list(names.values())[:5])
    raise HFViTError(f"no class '{name}': the model has {len(names)}{' (' + some + ', ...)' if names else ''}")


# -- one image, one model -----------------------------------------------------------------------------------------


def _inspect(subject: Subject, image: Image.Image, name: str, arguments: argparse.Namespace, figures: Any) -> dict:
    """Everything about an image: figures into its folder, a row for the page back."""
    model, folder = subject.model, subject.folder / name
    folder.mkdir(exist_ok=True)
    image = image.convert("L" if model.config.num_channels == 1 else "RGB")
    pixels = processor_pixels(subject.processor, image).to(model.device, model.dtype)
    row: dict[str, Any] = {"title": subject.title, "folder": folder, "labels": [], "maps": [], "curves": []}
    target = subject.target
    if model.config.num_labels:
        with torch.no_grad():
            scores = probabilities(model, model(pixels).logits.float())[0]
        names, numbers = model.config.id2label, problem_type_of(model.config) == REGRESSION
        shown = list(names) if numbers else scores.topk(min(3, len(scores))).indices.tolist()
        target = shown[0] if target is None else target
        row["labels"] = [(names[index], float(scores[index])) for index in shown]
        row["texts"] = [f"{name} {value:.6g}" if numbers else f"{name} {value:.1%}" for name, value in row["labels"]]
        row["explained"] = names[target]
    original = figures.enlarged(np.asarray(image.convert("RGB")), PAGE_WIDTH)
    view = figures.view_of(subject.processor.to_dict(), original.shape[:2])
    row |= {"original": image_uri(original, PAGE_WIDTH), "view": view}
    maps = {method: explain(model, pixels, method, target) for method in subject.methods}
    for method, heat in maps.items():
        placed = figures.on_image(heat[0].cpu().numpy(), model.config.total_stride, view)
        seen = figures.overlay(original, placed)
        Image.fromarray(seen).save(folder / f"{method}.png")
        row["maps"].append((method.replace("_", " "), image_uri(seen, PAGE_WIDTH)))
    _draw_tokens(subject, pixels, folder, row, arguments, figures)
    if arguments.steps and model.config.num_labels and problem_type_of(model.config) != REGRESSION and maps:
        _draw_curves(subject, pixels, maps, target, row, arguments, figures)
    subject.distances.append(attention_distance(model, pixels))
    subject.features.append(token_states(model, pixels, normalized=True)[-1][0].cpu())
    return row


def _draw_tokens(
    subject: Subject, pixels: torch.Tensor, folder: Path, row: dict, arguments: argparse.Namespace, figures: Any
) -> None:
    model, layers = subject.model, subject.layers
    maps = class_attention(model, pixels, layers, arguments.heads)
    query = "of the class token" if model.config.use_class_token else "of the patches, their mean"
    query = "of the first patch" if model.config.pooling == "first" else query
    heads = {layer: maps[layer][0].cpu().numpy() for layer in layers}
    shape = row["view"].window[2] / row["view"].window[3]  # of what the model sees, before it was squashed
    figure = figures.draw_attention_heads(heads, f"attention {query}", head_numbers(model, arguments.heads), shape)
    norms = {layer: values[0].cpu().numpy() for layer, values in token_norms(model, pixels, layers).items()}
    lengths = figures.draw_norms(norms, "length of the patch tokens", shape)
    for file, drawn in (("heads", figure), ("norms", lengths)):
        figures.save(drawn, folder / f"{file}.png")
    # On the page each map is an image with a caption: they flow to the width of the screen
    row["asking"] = query
    row["heads"] = [
        (layer, [_tile(figures.colored(heat, figures.HEAT, shape), f"head {number}")
                 for number, heat in zip(head_numbers(model, arguments.heads), maps)])
        for layer, maps in heads.items()
    ]  # fmt: skip
    row["norms"] = []
    for layer, values in norms.items():
        lines = f"{values.min():.3g} to {values.max():.3g}", f"largest / median {values.max() / np.median(values):.1f}"
        row["norms"].append(_tile(figures.colored(values, figures.NORMS, shape), f"block {layer}", *lines))


def _draw_curves(
    subject: Subject,
    pixels: torch.Tensor,
    maps: dict[str, torch.Tensor],
    target: int | None,
    row: dict,
    arguments: argparse.Namespace,
    figures: Any,
) -> None:
    curves = compare_explanations(
        subject.model, pixels, maps, target, arguments.steps, arguments.baseline, random_orders=3
    )
    drawn = {method: (curve.deletion[0].numpy(), curve.insertion[0].numpy()) for method, curve in curves.items()}
    fractions = next(iter(curves.values())).fractions.numpy()
    figure = figures.draw_curves(fractions, drawn, f"class: {row['explained']}")
    figures.save(figure, row["folder"] / "curves.png")
    row["curves"] = [figure_svg(figures.draw_curve_of(which, fractions, drawn)) for which in (0, 1)]
    row["areas"] = {
        method: {
            "deletion": float(curve.deletion_area[0]),
            "insertion": float(curve.insertion_area[0]),
            "score": float(curve.score[0]),
        }
        for method, curve in curves.items()
    }


def _color_features(subject: Subject, rows: list[dict], figures: Any) -> None:
    """Principal components as colors, common to all images of the run."""
    if not rows:
        return
    colors = feature_colors(torch.stack(subject.features)).numpy()
    for row, color in zip(rows, colors):
        large = figures.colors_on_image(color, subject.model.config.total_stride, row["view"])
        Image.fromarray(large).save(row["folder"] / "colors.png")
        row["maps"].append(("features", image_uri(large, PAGE_WIDTH)))


# -- the model ------------------------------------------------------------------------------------------------------


def _describe(subject: Subject, figures: Any) -> None:
    """The figures of a model's parameters, and of its attention over all images."""
    model, drawn = subject.model, {}
    filters = embedding_filters(model)
    drawn["filters"] = figures.draw_filters(filters.components.numpy(), filters.explained.numpy())
    if model.config.position_embedding_type != "none":
        drawn["positions"] = figures.draw_position_similarity(position_similarity(model).cpu().numpy())
    if subject.distances:
        distance = torch.stack(subject.distances).mean(dim=0)
        count = len(subject.distances)
        title = f"attention distance, mean of {count} image{'s' if count > 1 else ''}"
        drawn["distance"] = figures.draw_attention_distance({subject.title: distance.numpy()}, title)
        subject.numbers["attention_distance_px"] = distance.tolist()
    for name, figure in drawn.items():
        figures.save(figure, subject.folder / f"{name}.png")
        subject.figures.append(figure_svg(figure))
    height, width = model.config.image_size_hw
    rows, columns = model.config.grid_size
    subject.numbers |= {
        "model": subject.title,
        "image_size": [height, width],
        "grid": [rows, columns],
        "stride_px": list(model.config.total_stride),
        "blocks": model.config.num_hidden_layers,
        "heads": model.config.num_attention_heads,
        "pooling": model.config.pooling,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "filters_explained_variance": filters.explained.tolist(),
    }


def _comparison_figures(subjects: list[Subject], shown: list[dict], out: Path, figures: Any) -> list[Markup]:
    """Figures with both models in one plot."""
    if len(subjects) < 2 or not shown:
        return []
    tables = {f"{number}: {subject.title}": torch.stack(subject.distances).mean(dim=0).numpy()
              for number, subject in enumerate(subjects, start=1)}  # fmt: skip
    figure = figures.draw_attention_distance(tables, "attention distance of both models")
    figures.save(figure, out / "distances.png")
    return [figure_svg(figure)]


# -- the page -------------------------------------------------------------------------------------------------------


def _tile(pixels: np.ndarray, title: str, *lines: str) -> dict[str, Any]:
    return {"source": image_uri(pixels, PAGE_WIDTH // 2), "title": title, "lines": lines}


def _mean_areas(shown: list[dict], index: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Mean over images of each method's areas, best score first."""
    rows = [image["models"][index]["areas"] for image in shown if "areas" in image["models"][index]]
    means = {
        method: {which: float(np.mean([row[method][which] for row in rows])) for which in rows[0][method]}
        for method in (rows[0] if rows else ())
    }
    yield from sorted(means.items(), key=lambda item: -item[1]["score"])


def _write_report(
    out: Path, subjects: list[Subject], shown: list[dict], unreadable: list[dict], comparison: list[Markup]
) -> None:
    for index, subject in enumerate(subjects):
        subject.numbers["mean_areas"] = dict(_mean_areas(shown, index))
    numbers = {
        "models": [subject.numbers for subject in subjects],
        "images": [
            {
                "image": image["path"],
                "models": [
                    {"labels": row["labels"], "explained": row.get("explained"), "areas": row.get("areas", {})}
                    for row in image["models"]
                ],
            }
            for image in shown
        ],
        "unreadable": unreadable,
    }
    atomic_write(out / "numbers.json", json.dumps(numbers, indent=2) + "\n")
    write_page(out / REPORT, TEMPLATE, subjects=subjects, shown=shown, unreadable=unreadable, together=comparison)
