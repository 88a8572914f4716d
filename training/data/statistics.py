"""Statistics of a data set before training: counts, sizes, colors, unreadable images.

python -m training.data.statistics --dataset path/or/hub-id --split train
"""

import json
from typing import Any

import numpy as np

from hf_vit.errors import HFViTError, Parser, report_error
from hf_vit.problem_type import MULTI_LABEL, PROBLEM_TYPES, REGRESSION

from .dataset import ImageDataset, UnreadableImage, open_dataset


SAMPLE = 1000  # images that are opened
MAX_NAMED = 12  # classes; of more, only some are named with their counts


def statistics(dataset: ImageDataset, sample: int = SAMPLE) -> dict[str, Any]:
    """Statistics of a data set, ready for JSON: of all labels, and of a sample of evenly spaced images.

    Args:
        sample: largest number of images to open; 0 for all.

    Returns:
        name, split, fingerprint, images, classes, the largest and smallest class with their counts (for a regression
        mean, standard deviation, minimum and maximum of each number), and of the sample: smallest, median and largest
        width and height in pixels, mean and standard deviation of each channel (0 to 1, over pixels, with equal
        weights for all images), and the names of unreadable images.
    """
    opened = len(dataset) if sample == 0 else min(sample, len(dataset))
    sizes, means, squares, unreadable = [], [], [], []
    for index in np.unique(np.linspace(0, len(dataset) - 1, num=opened, dtype=np.int64)):
        try:
            image, _, _ = dataset.read(int(index))
        except UnreadableImage as error:
            unreadable.append(str(error))
            continue
        sizes.append(image.size)
        pixels = np.asarray(image, dtype=np.float64).reshape(-1, 3) / 255
        means.append(pixels.mean(axis=0))
        squares.append((pixels**2).mean(axis=0))
    facts = {
        "name": dataset.name,
        "split": dataset.split,
        "fingerprint": dataset.fingerprint,
        "images": len(dataset),
        **label_facts(dataset),
        "opened": opened,
        "unreadable": unreadable,
    }
    if sizes:
        mean = np.mean(means, axis=0)
        std = np.sqrt(np.maximum(np.mean(squares, axis=0) - mean**2, 0.0))
        for side, values in zip(("width", "height"), zip(*sizes)):
            facts[side] = {"smallest": min(values), "median": float(np.median(values)), "largest": max(values)}
        facts["mean"], facts["std"] = mean.round(4).tolist(), std.round(4).tolist()
    return facts


def images_of_labels(dataset: ImageDataset) -> np.ndarray:
    """Number of images (K,) of each class or label."""
    if dataset.problem_type == MULTI_LABEL:
        return dataset.labels.sum(axis=0)
    return np.bincount(dataset.labels, minlength=len(dataset.label_names))


def label_facts(dataset: ImageDataset) -> dict[str, Any]:
    """Statistics of the labels, ready for JSON."""
    names, values = dataset.label_names, dataset.labels
    if dataset.problem_type == REGRESSION:
        rows = zip(values.mean(0), values.std(0), values.min(0), values.max(0))
        parts = ("mean", "std", "smallest", "largest")
        return {"targets": {name: dict(zip(parts, map(float, row))) for name, row in zip(names, rows)}}
    counts = images_of_labels(dataset)
    most, least = int(counts.argmax()), int(counts.argmin())
    return {
        "classes": len(names),
        "largest_class": {"name": names[most], "images": int(counts[most])},
        "smallest_class": {"name": names[least], "images": int(counts[least])},
        **({"without_label": int((~values.any(1)).sum())} if dataset.problem_type == MULTI_LABEL else {}),
    }


def labels_in_words(dataset: ImageDataset) -> str:
    """A line for the user: classes or labels with their numbers of images, or the range of each number."""
    if dataset.problem_type == REGRESSION:
        rows = list(label_facts(dataset)["targets"].items())[:MAX_NAMED]
        more = f", ... ({len(dataset.label_names)} in all)" if len(dataset.label_names) > MAX_NAMED else ""
        return (
            ", ".join(
                f"{name} {row['smallest']:.4g} to {row['largest']:.4g} (mean {row['mean']:.4g}, std {row['std']:.4g})"
                for name, row in rows
            )
            + more
        )
    if dataset.problem_type == MULTI_LABEL:
        return f"{class_count_lines(dataset)}; {(~dataset.labels.any(1)).sum():,} images have none"
    return class_count_lines(dataset)


def class_count_lines(dataset: ImageDataset) -> str:
    """Classes with their numbers of images; of more than MAX_NAMED the first, the largest and the smallest."""
    counts, names = images_of_labels(dataset), dataset.label_names
    if len(names) <= MAX_NAMED:
        return ", ".join(f"{name} ({count:,})" for name, count in zip(names, counts))
    first = ", ".join(f"{names[label]} ({counts[label]:,})" for label in range(3))
    most, least = int(counts.argmax()), int(counts.argmin())
    return f"{first}, ...; largest {names[most]} ({counts[most]:,}), smallest {names[least]} ({counts[least]:,})"


def sample_of_sizes(dataset: ImageDataset, sample: int = 64) -> str:
    """A line about sizes and modes of some images, from their headers, and the number of unreadable ones."""
    sizes, modes, unreadable = [], set(), 0
    opened = np.unique(np.linspace(0, len(dataset) - 1, num=min(sample, len(dataset)), dtype=np.int64))
    for index in opened:
        try:
            image = dataset.source.open(int(dataset.rows[index]))
        except UnreadableImage:
            unreadable += 1
            continue
        sizes.append(image.size)
        modes.add(image.mode)
    if not sizes:
        return f"none of {len(opened)} images that were looked at is readable"
    (low_w, high_w), (low_h, high_h) = ((min(side), max(side)) for side in zip(*sizes))
    size = f"{low_w}x{low_h}" if (low_w, low_h) == (high_w, high_h) else f"{low_w}x{low_h} to {high_w}x{high_h}"
    text = f"{size} px (width x height), {', '.join(sorted(modes))}"
    return f"{text}; {unreadable} of {len(opened)} unreadable" if unreadable else text


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print the statistics of a data set as JSON; bad input is one line on stderr and exit status 2."""
    parser = Parser(prog="python -m training.data.statistics", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", required=True, help="folder, parquet, shards, Hub id, digits or synthetic:NAME")
    parser.add_argument("--dataset_config_name", help="configuration of a Hub dataset")
    parser.add_argument("--split", default="train", help="split, such as train or train[:98%%] (default: train)")
    parser.add_argument("--image_column", help="column with the images")
    parser.add_argument("--label_column", nargs="+", help="column with the labels; several: one a label or number")
    parser.add_argument("--problem_type", choices=PROBLEM_TYPES, help="what the labels are; default: as they say")
    parser.add_argument("--label_separator", help="between the labels of a cell of text")
    parser.add_argument("--sample", type=int, default=SAMPLE, help=f"images to open, 0 for all (default: {SAMPLE})")
    try:
        arguments = parser.parse_args(argv)
        dataset = open_dataset(
            arguments.dataset, config_name=arguments.dataset_config_name, split=arguments.split,
            image_column=arguments.image_column, label_column=arguments.label_column,
            problem_type=arguments.problem_type, label_separator=arguments.label_separator,
        )  # fmt: skip
        facts = statistics(dataset, arguments.sample)
    except (HFViTError, OSError) as error:
        raise SystemExit(report_error(error)) from None
    print(json.dumps(facts, indent=2, ensure_ascii=False))
    return facts


if __name__ == "__main__":
    main()
