"""`--head_init probe`: fit the head to features of the frozen backbone, before training begins.

For train.py. The features of each image are computed once, with the evaluation transform, and cached on disk under the
fingerprints of weights, transform and images. The classifier is scikit-learn's logistic regression. Its L2 penalty is
chosen on a part of the training images, by likelihood (CLIP, arXiv:2103.00020, A.3, by accuracy); the evaluation
images are not used.
"""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from hf_vit import HFViTForImageClassification
from hf_vit.atomic_file import atomic_path
from hf_vit.errors import HFViTError

from ..config.arguments import TrainArguments
from ..data.dataset import ImageDataset
from ..data.normalize import Normalize
from ..data.samplers import EvalSampler
from ..data.sources import digest
from .accelerator import memory_advice
from .dataloaders import create_loader
from .distributed import agreed


PENALTIES = tuple(10.0**power for power in range(-4, 3))  # scikit-learn's C: the inverse of the L2 penalty
HELD_OUT = 0.2  # of the training images, on which C is chosen
MAX_ITERATIONS = 1000
SMALLEST_STD = 1e-5
ABSENT_BIAS = -10.0  # of a class without training images, relative to the lowest bias


def model_fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits that change with any weight, its name or the architecture."""
    state = hashlib.sha256(str(sorted(model.config.to_diff_dict().items(), key=lambda pair: pair[0])).encode())
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()[:32]


def init_head(
    model: HFViTForImageClassification,
    dataset: ImageDataset,
    normalize: Normalize,
    args: TrainArguments,
    cache_dir: Path,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Fit the model's classifier to the features of the training images.

    Args:
        dataset: with the evaluation transform. cache_dir: where features are kept.
        on_batch: called with the number of finished batches, and of all.

    Returns:
        {"C": the chosen penalty, "accuracy": on the images held out for the choice, "n": their number}.

    Raises:
        HFViTError: images of a single class; a model without a linear head, or streamed data.
    """
    if not isinstance(model, HFViTForImageClassification) or not isinstance(model.classifier, nn.Linear):
        raise HFViTError("--head_init probe needs a ViT of hf_vit with a linear classifier: leave it out")
    if not isinstance(dataset, ImageDataset):
        raise HFViTError("--head_init probe reads the training images twice: leave out --streaming")
    features, labels = training_features(model, dataset, normalize, args, cache_dir, on_batch)
    # That of the main process: on other machines the last bits of the fit may differ.
    weight, bias, choice = agreed(fit(features, labels, model.config.num_labels, args.seed))
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(weight))
        model.classifier.bias.copy_(torch.from_numpy(bias))
    return choice


@torch.no_grad()
def training_features(
    model: HFViTForImageClassification,
    dataset: ImageDataset,
    normalize: Normalize,
    args: TrainArguments,
    cache_dir: Path,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The classifier's input for every image, float32 (N, D), and the labels (N,), in the order of the data."""
    transform = [repr(dataset.transform), normalize.mean, normalize.std, normalize.scale, args.bf16, args.fp16]
    fingerprint = digest(model_fingerprint(model), dataset.fingerprint, transform)
    path = Path(cache_dir) / f"head-features-{fingerprint}.npz"
    if agreed(path.is_file()):
        with np.load(path) as saved:
            return saved["features"], saved["labels"]
    process = PartialState()
    device, training = process.device, model.training
    order = EvalSampler(
        len(dataset), args.per_device_eval_batch_size, rank=process.process_index, world_size=process.num_processes
    )
    model.to(device).eval()
    half = torch.bfloat16 if args.bf16 else torch.float16
    rows: dict[int, tuple[np.ndarray, int]] = {}
    with memory_advice(lambda: args, evaluating=True):
        for number, batch in enumerate(create_loader(dataset, order, args, device), start=1):
            if len(batch["labels"]):
                with torch.autocast(device.type, dtype=half, enabled=args.bf16 or args.fp16):
                    outputs = model.base_model(normalize(batch["pixel_values"].to(device)))
                    read = model.head_input(outputs).float().cpu().numpy()
                for index, feature, label in zip(batch["index"].tolist(), read, batch["labels"].tolist()):
                    rows[index] = (feature, label)  # the filler of a last batch repeats an image
            on_batch(number, len(order))
    model.train(training)
    rows = {index: row for part in gather_object([rows]) for index, row in part.items()}
    if not rows:
        raise HFViTError(f"no image of '{dataset.name}' ({dataset.split}) can be read")
    features = np.stack([rows[index][0] for index in sorted(rows)])
    labels = np.array([rows[index][1] for index in sorted(rows)])
    if process.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            np.savez(temporary, features=features, labels=labels)
    return features, labels


def fit(features: np.ndarray, labels: np.ndarray, num_labels: int, seed: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """Logistic regression on features (N, D) with labels (N,), as a linear layer.

    Returns:
        Weight (K, D) and bias (K,), float32; and C, the accuracy on the held-out images, and their number.

    Raises:
        HFViTError: fewer than two classes, or features that are not finite.
    """
    from sklearn.model_selection import train_test_split

    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise HFViTError(f"--head_init probe needs images of two or more classes, got {len(classes)}")
    if not np.isfinite(features).all():
        raise HFViTError("--head_init probe: the features are not finite; leave out --bf16 or --fp16")
    features = features.astype(np.float64)
    mean, std = features.mean(0), features.std(0) + SMALLEST_STD
    # Standardized for the penalty, which would otherwise weigh on features of small scale; undone at the end.
    x = (features - mean) / std
    # A class with a single image has none to hold out; the stratified part has at least one of every other class.
    several = np.flatnonzero(np.isin(labels, classes[counts > 1]))
    held_out = max(int(HELD_OUT * len(several)), int((counts > 1).sum()))
    choice = {"C": 1.0, "accuracy": float("nan"), "n": 0}
    if 0 < held_out <= len(several) - int((counts > 1).sum()):
        _, chosen = train_test_split(several, test_size=held_out, random_state=seed, stratify=labels[several])
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        scores = []
        for penalty in PENALTIES:
            probe = _logistic(x[rest], labels[rest], penalty)
            likelihood = np.log(np.maximum(probe.predict_proba(x[chosen]), 1e-12))
            column = np.searchsorted(probe.classes_, labels[chosen])
            score = float(probe.score(x[chosen], labels[chosen]))
            scores.append((float(likelihood[np.arange(len(chosen)), column].mean()), score, penalty))
        # By likelihood: the accuracy of some tens of images is too coarse (docs/finetuning.md has what it costs).
        best = max(scores)
        choice = {"C": best[2], "accuracy": best[1], "n": len(chosen)}
    probe = _logistic(x, labels, choice["C"])
    coefficients, intercepts = probe.coef_, probe.intercept_
    if len(classes) == 2:  # scikit-learn fits one row for the difference of the two
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight = np.zeros((num_labels, features.shape[1]))
    bias = np.full(num_labels, intercepts.min() + ABSENT_BIAS)
    weight[classes] = coefficients / std
    bias[classes] = intercepts - (coefficients / std) @ mean
    return weight.astype(np.float32), bias.astype(np.float32), choice


def _logistic(features: np.ndarray, labels: np.ndarray, penalty: float):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of separable classes with hardly any penalty
        return LogisticRegression(C=penalty, max_iter=MAX_ITERATIONS).fit(features, labels)
