"""A classifier over a data set: every picture once, on any number of processes, from one or several views.

For score.py, features.py and suites.py. Counting is counts.py; nothing here trains.
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

from ..data.dataset import ImageDataset, collate
from ..data.samplers import EvalOrder
from ..data.transforms import RESAMPLING, EvalTransform, covering_window
from ..engine.evaluation_loop import gather_outputs, own_indices
from ..metrics.metric_state import Counts, Totals
from .classifier import Classifier
from .label_mapping import LabelMatch


CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))  # right, down
TTA = {"none": (1, False), "flip": (1, True), "five_crop": (5, False), "ten_crop": (5, True)}  # crops, mirrored too
CROP_PCT = 0.875  # of the five crops, unless the model has its own: 224 of 256
KEPT_LOGITS = 60_000_000  # pictures x outputs up to which logits are kept, for the temperature; ImageNet's are 50 M


@dataclass(frozen=True)
class Machine:
    """How pictures get through the model."""

    accelerator: Accelerator
    batch_size: int = 32
    workers: int = 0
    bf16: bool = False

    def precision(self):
        """Context of a forward pass."""
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext()


def create_machine(use_cpu: bool, **settings) -> Machine:
    """The machine of this process; processes come from its launcher."""
    cpu = use_cpu or not torch.accelerator.is_available()
    PartialState(cpu=cpu)
    return Machine(Accelerator(cpu=cpu), **settings)


@dataclass(frozen=True)
class FiveCrops:
    """Four corners and the centre of a resized picture, side by side in the channels: uint8 (H, W, 5 C)."""

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
class Scored:
    """What scoring found; logits and labels in the data's order, only where they were few enough to keep."""

    totals: Totals
    unreadable: list[str]
    logits: np.ndarray | None
    labels: np.ndarray | None


def preprocessing(classifier: Classifier, tta: str) -> dict[str, Any]:
    """How pictures were cut and normalised, for the facts."""
    view = classifier.transform
    crop_pct = view.crop_fraction
    if crop_pct is None and TTA[tta][0] > 1:
        crop_pct = CROP_PCT
    return {
        "resize": "squash" if crop_pct is None else "resize small side, centre crop",
        **view.describe(),
        "crop_pct": crop_pct,
        "mean": list(classifier.normalise.mean),
        "std": list(classifier.normalise.std),
        "tta": tta,
    }


def batches(
    classifier: Classifier, dataset: ImageDataset, machine: Machine, tta: str = "none"
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]]:
    """This process's pictures: normalised views (B, V, C, H, W) on the device, labels and indices (B,), unreadable."""
    if not len(dataset):
        raise HFViTError(f"'{dataset.name}' ({dataset.split}) has no pictures to score")
    accelerator, crops, mirrored = machine.accelerator, *TTA[tta]
    view = classifier.transform if crops == 1 else FiveCrops(classifier.transform)
    rank, world = accelerator.process_index, accelerator.num_processes
    order = EvalOrder(len(dataset), machine.batch_size, rank=rank, world_size=world)
    loader = DataLoader(
        dataset.with_transform(view),
        batch_sampler=order,
        collate_fn=collate,
        num_workers=machine.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    for batch in loader:
        own = own_indices(batch["index"], order.filler)
        if not len(own):
            yield torch.empty(0), batch["labels"][:0], own, batch["unreadable"]
            continue
        pixels = batch["pixel_values"][: len(own)].to(accelerator.device, non_blocking=True)
        pixels = classifier.normalise(pixels.unflatten(1, (crops, -1)))  # (B, V, C, H, W)
        pixels = torch.cat([pixels, pixels.flip(-1)], dim=1) if mirrored else pixels
        yield pixels, batch["labels"][: len(own)], own, batch["unreadable"]


@torch.no_grad()
def score_dataset(
    classifier: Classifier,
    dataset: ImageDataset,
    match: LabelMatch,
    machine: Machine,
    tta: str = "none",
    real: np.ndarray | None = None,
) -> Scored:
    """Score every picture once; several views are averaged as probabilities.

    Args:
        match: which outputs mean the classes of the data. real: int64 (N, any) of ReaL labels, filled up with -1.

    Raises:
        HFViTError: no picture that can be read, outputs that are not finite, ReaL labels outside the head.
    """
    accelerator, device = machine.accelerator, machine.accelerator.device
    outputs = len(match.names)
    if real is not None and real.max() >= outputs:
        raise HFViTError(f"ReaL label {real.max()} is outside the model's {outputs} outputs (0..{outputs - 1})")
    classifier.model.to(device)
    columns = None if match.columns is None else torch.from_numpy(match.columns).to(device)
    places = torch.from_numpy(match.places)
    counts, unreadable = Counts(outputs, device), []
    keep, kept = len(dataset) * outputs <= KEPT_LOGITS, []
    for pixels, labels, own, names in batches(classifier, dataset, machine, tta):
        unreadable += names
        if not len(own):
            continue
        logits = outputs_of(classifier, pixels, columns, machine)
        labels = places[labels].to(device)
        counts.add(logits, labels, None if real is None else torch.from_numpy(real)[own].to(device))
        if keep:
            kept.append((logits, labels, own.to(device)))
    totals = counts.total(accelerator)
    unreadable = unreadable if accelerator.num_processes == 1 else gather_object(unreadable)
    if not totals.count:
        raise HFViTError(f"no picture of '{dataset.name}' ({dataset.split}) can be read: {', '.join(unreadable[:3])}")
    if totals.not_finite:
        raise HFViTError(f"the outputs of {classifier.name} are not finite for {totals.not_finite:,} pictures")
    gathered = gather_outputs(kept, accelerator, outputs) if keep else (None, None)
    return Scored(totals, sorted(set(unreadable)), *gathered)


def outputs_of(classifier: Classifier, pixels: torch.Tensor, columns: torch.Tensor | None, machine: Machine):
    """Competing outputs (B, K) of views (B, V, C, H, W): logits of one, log of the mean probability of several."""
    with machine.precision():
        logits = classifier.logits(pixels.flatten(0, 1))
    logits = (logits if columns is None else logits[:, columns]).unflatten(0, pixels.shape[:2])  # (B, V, K)
    if pixels.shape[1] == 1:
        return logits[:, 0]
    return logits.log_softmax(-1).logsumexp(1) - np.log(pixels.shape[1])
