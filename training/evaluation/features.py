"""Features of a frozen model, computed once and cached by the fingerprints of weights, preprocessing and images.

For score_model.py and suites.py; the probes are few_shot.py.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_vit.atomic_file import atomic_path
from hf_vit.errors import HFViTError

from ..data.dataset import ImageDataset
from ..data.sources import digest, own_cache
from ..engine.evaluation_loop import gather_outputs
from ..engine.head_probe import model_fingerprint
from .classifier import Classifier
from .evaluate_classifier import EvalContext, batches, preprocessing


@dataclass(frozen=True)
class Features:
    """features: float32 (N, D); labels: int64 (N,), numbers of the data's classes; cached: read from disk."""

    features: np.ndarray
    labels: np.ndarray
    cached: bool


@torch.no_grad()
def compute_features(
    classifier: Classifier, dataset: ImageDataset, context: EvalContext, cache_dir: str | Path | None
) -> Features:
    """The input of the classifier's head for every image, in the data's order; read from disk if cached.

    Args:
        cache_dir: folder of the cache; None: inside `datasets`' cache.

    Raises:
        HFViTError: no image can be read.
    """
    settings = preprocessing(classifier, "none") | {"bf16": context.bf16}
    fingerprint = digest(model_fingerprint(classifier.model), dataset.fingerprint, sorted(settings.items()))
    path = Path(own_cache(cache_dir)) / f"features-{fingerprint}.npz"
    if path.is_file():
        with np.load(path) as saved:
            if len(saved["labels"]) == len(dataset) or dataset.on_unreadable == "skip":
                return Features(saved["features"], saved["labels"], cached=True)
    accelerator, device = context.accelerator, context.accelerator.device
    classifier.model.to(device)
    parts = []
    for pixels, labels, indices, _ in batches(classifier, dataset, context):
        if len(indices):
            with context.precision():
                parts.append((classifier.features(pixels[:, 0]), labels.to(device), indices.to(device)))
    width = torch.tensor([parts[0][0].shape[1] if parts else 0], device=device)
    features, labels, _ = gather_outputs(parts, accelerator, int(accelerator.gather(width).max()))
    if not len(labels):
        raise HFViTError(f"no image of '{dataset.name}' ({dataset.split}) can be read")
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            np.savez(temporary, features=features, labels=labels)
    accelerator.wait_for_everyone()
    return Features(features, labels, cached=False)
