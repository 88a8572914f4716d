"""Run a classifier over a data set: every image once, on any number of processes, from one or several views.

For score_model.py, features.py and suites.py. The metrics are in training/metrics/metric_state.py.

Tests: tests/training/test_score.py.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader

from hf_vit.errors import HFViTError
from hf_vit.image_io import UnreadableImage

from ..data.dataset import ImageDataset, collate
from ..data.samplers import EvalSampler
from ..data.transforms import RESAMPLING, EvalTransform, covering_window
from ..engine.dataloaders import all_batches
from ..engine.distributed import raise_on_all_ranks
from ..engine.evaluation_loop import own_indices
from ..metrics.metric_state import Metrics, MetricState
from ..metrics.outcomes import OutcomeState
from .classifier import Classifier
from .label_mapping import LabelMatch


CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))  # right, down
TTA = {"none": (1, False), "flip": (1, True), "five_crop": (5, False), "ten_crop": (5, True)}  # crops, mirrored too
CROP_PCT = 0.875  # of the five crops, unless the model has its own: 224 of 256
MAX_KEPT_LOGITS = 60_000_000  # images x outputs; up to it logits are kept to fit a temperature (ImageNet: 50 M)


@dataclass(frozen=True)
class EvalContext:
    """How a model is evaluated: processes and device, images per batch, decoding processes, precision."""

    accelerator: Accelerator
    batch_size: int = 32
    workers: int = 0
    bf16: bool = False

    def precision(self):
        """Context of a forward pass."""
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext()


def create_context(use_cpu: bool, **settings) -> EvalContext:
    """The context of this process; the launcher decides how many there are."""
    cpu = use_cpu or not torch.accelerator.is_available()
    PartialState(cpu=cpu)
    return EvalContext(Accelerator(cpu=cpu), **settings)


@dataclass(frozen=True)
class FiveCrops:
    """Four corners and the center of a resized image, side by side in the channels: uint8 (H, W, 5 C)."""

    view: EvalTransform

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        height, width = self.view.image_size_hw
        enlarge = 1.0 / (self.view.crop_fraction or CROP_PCT)
        windows = [covering_window(*image.size, (height, width), enlarge, *corner) for corner in CORNERS]
        mode = "L" if self.view.num_channels == 1 else "RGB"
        filter = RESAMPLING[self.view.resample]
        crops = [image.resize((width, height), filter, box=window).convert(mode) for window in windows]
        return np.concatenate([np.asarray(crop).reshape(height, width, -1) for crop in crops], axis=2)


@dataclass
class Predictions:
    """The result of scoring.

    Attributes:
        metrics: counts over all processes. unreadable: images left out.
        logits, labels: float32 (N, K) and int64 (N,) in the data's order; on the main process, up to MAX_KEPT_LOGITS.
    """

    metrics: Metrics
    unreadable: list[str]
    logits: np.ndarray | None
    labels: np.ndarray | None


class KeptLogits:
    """Collects the logits of all processes on the main process, in the data's order, without a second copy.

    Args:
        images, outputs: N and K. batch_size: images of one `add`, at most.
    """

    def __init__(self, images: int, outputs: int, batch_size: int, accelerator: Accelerator):
        self.accelerator, self.batch_size, self.outputs = accelerator, batch_size, outputs
        rows = images if accelerator.is_main_process else 0
        self.logits = np.empty((rows, outputs), dtype=np.float32)  # memory is used as it is written
        self.labels = np.full(rows, -1, dtype=np.int64)
        self._to_send: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> None:
        """Keep a batch: (B, K), (B,), and the images' indices in the data (B,)."""
        if self.accelerator.is_main_process:
            self.logits[index.numpy()] = logits.float().cpu().numpy()
            self.labels[index.numpy()] = labels.cpu().numpy()
        else:
            self._to_send.append((logits.float().cpu(), labels.cpu(), index))

    def gather(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Logits (n, K) and labels (n,) of readable images on the main process, else None; all processes call it."""
        accelerator, device = self.accelerator, self.accelerator.device
        rounds = int(accelerator.gather(torch.tensor([len(self._to_send)], device=device)).max())
        for number in range(rounds):
            logits = torch.zeros(self.batch_size, self.outputs)
            labels, index = torch.full((2, self.batch_size), -1)  # -1: no image
            if number < len(self._to_send):
                for padded, values in zip((logits, labels, index), self._to_send[number]):
                    padded[: len(values)] = values
            logits, labels, index = (
                accelerator.gather(part.to(device)).cpu().numpy() for part in (logits, labels, index)
            )
            if accelerator.is_main_process:
                valid = index >= 0
                self.logits[index[valid]], self.labels[index[valid]] = logits[valid], labels[valid]
        if not accelerator.is_main_process:
            return None, None
        readable = np.flatnonzero(self.labels >= 0)
        for row, source in enumerate(readable):  # in place: few images are missing, and a copy would double the memory
            if row != source:
                self.logits[row] = self.logits[source]
        return self.logits[: len(readable)], self.labels[readable]


def preprocessing(classifier: Classifier, tta: str) -> dict[str, Any]:
    """How images were cropped and normalized, for the facts."""
    view = classifier.transform
    crop_pct = view.crop_fraction
    if crop_pct is None and TTA[tta][0] > 1:
        crop_pct = CROP_PCT
    return {
        "resize": "squash" if crop_pct is None else "resize small side, center crop",
        **view.describe(),
        "crop_pct": crop_pct,
        "mean": list(classifier.normalize.mean),
        "std": list(classifier.normalize.std),
        "tta": tta,
    }


def batches(
    classifier: Classifier, dataset: ImageDataset, context: EvalContext, tta: str = "none"
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]]:
    """This process's images: normalized views (B, V, C, H, W) on the device, labels and indices (B,), unreadable.

    Raises:
        HFViTError: at the end, on all processes, if one of them could not read its images.
    """
    if not len(dataset):
        raise HFViTError(f"'{dataset.name}' ({dataset.split}) has no images to score")
    accelerator, crops, mirrored = context.accelerator, *TTA[tta]
    view = classifier.transform
    if crops > 1:
        if not isinstance(view, EvalTransform):
            raise HFViTError(
                f"--tta {tta}: the image processor of {classifier.name} does more than resize, crop and normalize, so "
                "crops cannot be chosen; use --tta none or flip"
            )
        view = FiveCrops(view)
    rank, world = accelerator.process_index, accelerator.num_processes
    order = EvalSampler(len(dataset), context.batch_size, rank=rank, world_size=world)
    loader = DataLoader(
        dataset.with_transform(view),
        batch_sampler=order,
        collate_fn=collate,
        num_workers=context.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    failures: list[HFViTError] = []
    for batch in all_batches(loader, failures.append):
        indices = own_indices(batch["index"], order.filler)
        if not len(indices):
            yield torch.empty(0), batch["labels"][:0], indices, batch["unreadable"]
            continue
        pixels = batch["pixel_values"][: len(indices)].to(accelerator.device, non_blocking=True)
        pixels = classifier.normalize(pixels.unflatten(1, (crops, -1)))  # (B, V, C, H, W)
        pixels = torch.cat([pixels, pixels.flip(-1)], dim=1) if mirrored else pixels
        yield pixels, batch["labels"][: len(indices)], indices, batch["unreadable"]
    error = failures[0] if failures else None
    if isinstance(error, UnreadableImage):
        error = UnreadableImage(f"{error}; --on_decode_error skip leaves such images out")
    raise_on_all_ranks(error)


@torch.no_grad()
def score_dataset(
    classifier: Classifier,
    dataset: ImageDataset,
    match: LabelMatch,
    context: EvalContext,
    tta: str = "none",
    real: np.ndarray | None = None,
    outcomes: OutcomeState | None = None,
) -> Predictions:
    """Score every image once; several views are averaged as probabilities.

    Args:
        match: the outputs for the classes of the data. real: int64 (N, any), ReaL labels padded with -1.
        outcomes: collects the result of each image.

    Raises:
        HFViTError: no image can be read; outputs are not finite; ReaL labels beyond the outputs.
    """
    accelerator, device = context.accelerator, context.accelerator.device
    outputs = len(match.names)
    if real is not None and real.max() >= outputs:
        raise HFViTError(f"ReaL label {real.max()} is outside the model's {outputs} outputs (0..{outputs - 1})")
    classifier.model.to(device)
    columns = None if match.columns is None else torch.from_numpy(match.columns).to(device)
    places = torch.from_numpy(match.places)
    state, unreadable = MetricState(device), []
    keep = len(dataset) * outputs <= MAX_KEPT_LOGITS
    kept_logits = KeptLogits(len(dataset), outputs, context.batch_size, accelerator) if keep else None
    for pixels, labels, indices, names in batches(classifier, dataset, context, tta):
        unreadable += names
        if not len(indices):
            continue
        logits = outputs_of(classifier, pixels, columns, context)
        labels = places[labels].to(device)
        state.update(logits, labels, real=None if real is None else torch.from_numpy(real)[indices].to(device))
        if outcomes is not None:
            outcomes.update(logits, labels, indices)
        if kept_logits is not None:
            kept_logits.add(logits, labels, indices)
    metrics = state.reduce(accelerator)
    unreadable = unreadable if accelerator.num_processes == 1 else gather_object(unreadable)
    if not metrics.images:
        raise HFViTError(f"no image of '{dataset.name}' ({dataset.split}) can be read: {', '.join(unreadable[:3])}")
    if not_finite := metrics.counts["not_finite"]:
        raise HFViTError(
            f"the outputs of {classifier.name} are not finite for {not_finite:,} image{'s' if not_finite > 1 else ''}"
        )
    return Predictions(
        metrics, sorted(set(unreadable)), *(kept_logits.gather() if kept_logits is not None else (None, None))
    )


def outputs_of(classifier: Classifier, pixels: torch.Tensor, columns: torch.Tensor | None, context: EvalContext):
    """Competing outputs (B, K) of views (B, V, C, H, W): logits of one, log of the mean probability of several."""
    with context.precision():
        logits = classifier.logits(pixels.flatten(0, 1))
    logits = (logits if columns is None else logits[:, columns]).unflatten(0, pixels.shape[:2])  # (B, V, K)
    if pixels.shape[1] == 1:
        return logits[:, 0]
    return logits.log_softmax(-1).logsumexp(1) - np.log(pixels.shape[1])
