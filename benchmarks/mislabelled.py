"""How many deliberately wrong labels the report's list finds, compared with cleanlab on the same probabilities.

    python -m benchmarks.mislabelled --data uoft-cs/cifar10
    python -m benchmarks.mislabelled --data digits --images 1000 --patches 100

Of a part of the training images (--images, the same number of each class) --flipped of the labels become another
class, each as likely. Probabilities are out of fold (--folds): a logistic regression on the labels as they then are,
over features that no label made: --patches random patches of the images, whitened, as filters, rectified, pooled 2 x 2
(Coates, Lee, Ng 2011). Two lists of each: the images that it calls mislabelled, and the --flipped of all images that
come first by its score, where precision is recall. cleanlab: pip install cleanlab; left out without it.

Results: benchmarks/results/mislabelled.json, and a table on the screen.
"""

import json
import statistics
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.baselines import missing
from hf_vit.capabilities import processor_name
from hf_vit.errors import HFViTError, Parser, report_error
from training.data.dataset import ImageDataset, open_dataset
from training.data.subsets import fold_numbers
from training.data.transforms import EvalTransform
from training.reporting.mislabelled import find_label_issues


RESULTS = Path(__file__).parent / "results" / "mislabelled.json"
PATCH, SIDE, POOLED = 6, 32, 2  # pixels of a patch, of an image; cells a side


def build_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="uoft-cs/cifar10", help="images and labels (uoft-cs/cifar10)")
    parser.add_argument("--images", type=int, default=5000, help="of them, the same number of each class (5000)")
    parser.add_argument("--flipped", type=float, default=0.05, help="fraction of wrong labels (0.05)")
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation (5)")
    parser.add_argument("--patches", type=int, default=200, help="filters (200)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="each another choice of labels (0 1 2)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the results")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print."""
    try:
        arguments = build_parser().parse_args(argv)
        rows = measure(arguments)
    except (HFViTError, OSError) as error:
        return report_error(error)
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    settings["data"] = Path(settings["data"]).name
    result = {"settings": settings, "hardware": processor_name(), "runs": rows, "mean": means(rows)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, row in result["mean"].items():
        print(f"{name:40}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return 0


def measure(arguments: Namespace) -> list[dict]:
    """For each seed: what the probe scores, and precision and recall of every list."""
    data = open_dataset(arguments.data, split="train")
    data = data.per_class(arguments.images // len(data.label_names))
    features = patch_features(pixels_of(data), arguments.patches)
    rows = []
    for seed in arguments.seeds:
        labels, flipped = flip(data.labels, arguments.flipped, len(data.label_names), seed)
        probabilities = out_of_fold(features, labels, fold_numbers(data, arguments.folds, seed))
        accuracy = float((probabilities.argmax(1) == data.labels).mean())
        lists = {**ours(labels, probabilities, flipped.sum()), **cleanlabs(labels, probabilities, flipped.sum())}
        rows.append({"seed": seed, "accuracy": accuracy, "lists": {n: scored(p, flipped) for n, p in lists.items()}})
        print(f"seed {seed}: the probe is right on {accuracy:.1%}", file=sys.stderr)
    return rows


def flip(labels: np.ndarray, fraction: float, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a fraction is another class, and which these are (N,)."""
    rng = np.random.default_rng(seed)
    flipped = np.zeros(len(labels), dtype=bool)
    flipped[rng.choice(len(labels), round(fraction * len(labels)), replace=False)] = True
    other = (labels + rng.integers(1, classes, size=len(labels))) % classes
    return np.where(flipped, other, labels), flipped


def pixels_of(data: ImageDataset) -> torch.Tensor:
    """Images (N, 3, SIDE, SIDE) in [0, 1]."""
    data = data.with_transform(EvalTransform((SIDE, SIDE)))
    return torch.stack([data[index]["pixel_values"] for index in range(len(data))]).float() / 255


def patch_features(pixels: torch.Tensor, count: int, seed: int = 0) -> np.ndarray:
    """Each filter's positive and negative part, mean in each of POOLED x POOLED cells: float32 (N, 8 x count)."""
    generator = torch.Generator().manual_seed(seed)

    def patches(number: int) -> torch.Tensor:
        image, top, left = (
            torch.randint(0, most, (number,), generator=generator)
            for most in (len(pixels), SIDE - PATCH + 1, SIDE - PATCH + 1)
        )
        rows = [pixels[i, :, y : y + PATCH, x : x + PATCH] for i, y, x in zip(image, top, left)]
        flat = torch.stack(rows).flatten(1)
        return (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True) + 1e-3).sqrt()

    values, vectors = torch.linalg.eigh(torch.cov(patches(20_000).T))
    whiten = vectors @ torch.diag((values.clamp(min=0) + 0.1).rsqrt()) @ vectors.T
    filters = patches(count) @ whiten
    filters = (filters / filters.norm(dim=1, keepdim=True).clamp(min=1e-6)) @ whiten  # of the whitened image
    filters = (filters - filters.mean(1, keepdim=True)).unflatten(1, (3, PATCH, PATCH))
    features = []
    for batch in pixels.split(250):
        seen = torch.nn.functional.conv2d(batch, filters)
        level = seen.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        parts = [(sign * seen / level - 0.25).relu() for sign in (1, -1)]
        features.append(
            torch.cat([torch.nn.functional.adaptive_avg_pool2d(part, POOLED) for part in parts], 1).flatten(1)
        )
    return torch.cat(features).numpy()


def out_of_fold(features: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Probabilities (N, K) of every image by the probe that was fitted without its fold."""
    probabilities = np.zeros((len(labels), labels.max() + 1))
    for fold in np.unique(folds):
        seen = folds != fold
        scale = StandardScaler().fit(features[seen])
        probe = LogisticRegression(C=0.001, max_iter=200).fit(scale.transform(features[seen]), labels[seen])
        probabilities[~seen] = probe.predict_proba(scale.transform(features[~seen]))
    return probabilities


def ours(labels: np.ndarray, probabilities: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """The list of the report, and the first `count` images by its score."""
    classes = np.argsort(-probabilities, axis=1, kind="stable")
    ranked, own = np.take_along_axis(probabilities, classes, 1), probabilities[np.arange(len(labels)), labels]
    return {
        "report: list": find_label_issues(labels, own, classes, ranked).places,
        "report: first by probability": np.argsort(own, kind="stable")[:count],
    }


def cleanlabs(labels: np.ndarray, probabilities: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """The same of cleanlab, by its default filter and by confident learning's own; {} where it is not installed."""
    if missing("cleanlab"):
        print("note: cleanlab is not installed (pip install cleanlab): its lists are left out", file=sys.stderr)
        return {}
    from cleanlab.filter import find_label_issues as theirs
    from cleanlab.rank import get_label_quality_scores as quality

    lists: dict[str, np.ndarray] = {
        f"cleanlab: list, {name}": theirs(labels, probabilities, filter_by=name, return_indices_ranked_by=order)
        for name, order in (("prune_by_noise_rate", "self_confidence"), ("confident_learning", "normalized_margin"))
    }
    for method in ("self_confidence", "normalized_margin"):
        scores = quality(labels, probabilities, method=method)
        lists[f"cleanlab: first by {method}"] = np.argsort(scores, kind="stable")[:count]
    return lists


def scored(places: np.ndarray, flipped: np.ndarray) -> dict[str, float]:
    """Images of a list, how many of them have a wrong label, and how many of the wrong labels they are."""
    hits = int(flipped[places].sum())
    return {"images": len(places), "precision": hits / max(len(places), 1), "recall": hits / int(flipped.sum())}


def means(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Over the seeds."""

    def mean(name: str, key: str) -> float:
        return statistics.fmean(row["lists"][name][key] for row in rows)

    return {name: {key: mean(name, key) for key in ("images", "precision", "recall")} for name in rows[0]["lists"]}


if __name__ == "__main__":
    sys.exit(main())
