"""Exact evaluation: every image counts once, on any number of processes, with the plain loss.

For the Trainer and score.py. The scores are computed in training/metrics/metric_state.py. Not transformers'
`evaluation_loop`: it gathers the logits of all images, unless each metric is written for batches.

Tests: tests/training/engine/test_trainer.py.
"""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import EvalPrediction

from hf_vit.errors import HFViTError
from hf_vit.problem_type import SINGLE_LABEL

from ..config.arguments import TrainArguments
from ..data.samplers import EvalSampler
from ..metrics.metric_state import LossState, Metrics, MetricState
from ..metrics.outcomes import Outcomes, OutcomeState
from ..metrics.target_scores import sigmoid, target_scores
from ..reporting.progress import Display
from .accelerator import memory_advice
from .checkpoints.full_tensors import reshard
from .dataloaders import all_batches, create_loader
from .device_inputs import DeviceInputs
from .distributed import raise_on_all_ranks


@dataclass
class Evaluated:
    """The result of an evaluation; outputs only if requested, in the order of the data.

    Attributes:
        scores: the loss, and those of `MetricState`. count: images. unreadable: names of the images left out.
        counts: hits and confusions by class, if labels are classes.
        logits, labels: (n, K) and (n,) or (n, K). outcomes: of each image, if requested.
    """

    scores: dict[str, float]
    count: int
    unreadable: list[str]
    counts: Metrics | None
    logits: np.ndarray | None = None
    labels: np.ndarray | None = None
    index: np.ndarray | None = None  # (n,), of the images in the dataset, without the unreadable ones
    outcomes: Outcomes | None = None

    def metrics(self, prefix: str, more: Callable[[EvalPrediction], dict] | None = None) -> dict[str, float]:
        """The scores under transformers' names, `prefix_loss` and so on, and those that `more` computes."""
        metrics = {f"{prefix}_{name}": value for name, value in self.scores.items()}
        if more is not None:
            extra = more(EvalPrediction(predictions=self.logits, label_ids=self.labels))
            metrics |= {f"{prefix}_{name.removeprefix(f'{prefix}_')}": value for name, value in extra.items()}
        return metrics


class Evaluator:
    """The evaluations of a run, with the average of the weights if one is kept.

    Args:
        loss_module: prepared network and loss. config: of the model. inputs: brings a batch to the device.
        handler: of the callbacks, which see the loader in use. on_step: called after every batch.
        averaged: context in which the model holds the weights to evaluate.
    """

    def __init__(
        self,
        loss_module,
        config: Any,
        problem_type: str,
        args: TrainArguments,
        accelerator: Accelerator,
        inputs: DeviceInputs,
        display: Display,
        handler: CallbackHandler,
        averaged: Callable[[], AbstractContextManager[None]],
        on_step: Callable[[], None],
    ):
        self.loss_module, self.config, self.problem_type, self.args = loss_module, config, problem_type, args
        self.accelerator, self.inputs, self.display, self.handler = accelerator, inputs, display, handler
        self.averaged, self.on_step = averaged, on_step

    def run(self, dataset: Dataset, keep_outputs: bool = False, keep_outcomes: bool = False) -> Evaluated:
        """Evaluate on every image of a map-style dataset once."""
        size, process = self.args.per_device_eval_batch_size, self.accelerator
        order = EvalSampler(len(dataset), size, rank=process.process_index, world_size=process.num_processes)
        loader = create_loader(dataset, order, self.args, process.device)
        self.handler.eval_dataloader = loader
        done = itertools.count(1)

        def on_batch() -> None:
            self.display.evaluating(next(done), len(order))
            self.on_step()

        try:
            with self.averaged(), memory_advice(lambda: self.args, evaluating=True):
                return evaluate(
                    self.loss_module, loader, order, process, self.inputs, keep_outputs, on_batch,
                    None if self.problem_type == SINGLE_LABEL else self.score_outputs,
                    OutcomeState(self.problem_type) if keep_outcomes else None,
                )  # fmt: skip
        finally:
            self.display.evaluating(None)

    def score_outputs(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Scores of logits (N, K) for several labels, or numbers, (N, K); at the thresholds of the configuration."""
        names = [self.config.id2label[number] for number in range(self.config.num_labels)]
        thresholds = getattr(self.config, "label_thresholds", None)
        return target_scores(self.problem_type, logits, labels, names, thresholds)

    def tune_thresholds(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Set the configuration's thresholds to those with the highest F1, and return the scores at them."""
        from ..metrics.multilabel.multilabel import best_thresholds  # with `evaluate`, which takes seconds to import

        self.config.label_thresholds = best_thresholds(sigmoid(logits), labels).tolist()
        return self.score_outputs(logits, labels)


@torch.no_grad()
def evaluate(
    loss_module,
    loader: DataLoader,
    order: EvalSampler,
    accelerator: Accelerator,
    prepare,
    keep_outputs: bool = False,
    on_batch=None,
    score_outputs: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None,
    outcome_state: OutcomeState | None = None,
) -> Evaluated:
    """Run `loss_module` over a loader of `order` and compute the scores.

    Args:
        loss_module: prepared network and loss: `loss_module(pixel_values, labels) -> losses, logits, labels`.
        prepare: brings a batch to the device: `prepare(batch) -> (pixel_values, labels)`.
        keep_outputs: also gather all logits and labels, for metrics that need them.
        on_batch: called after every batch.
        score_outputs: computes the scores of all logits and labels, both (n, K), if labels are not classes.
        outcome_state: collects the outcome of each image.

    Raises:
        HFViTError: no image can be read, or one cannot and `on_decode_error` is "stop"; in all processes.
    """
    loss_module.eval()
    keep_outputs |= score_outputs is not None
    state = (
        MetricState(accelerator.device, calibration=False) if score_outputs is None else LossState(accelerator.device)
    )
    outputs: list[tuple[torch.Tensor, ...]] = []
    unreadable: list[str] = []
    shape: tuple[int, ...] = (0,)  # of one image's logits: (K,), or (n, K) for n masked patches
    failures: list[HFViTError] = []
    for batch in all_batches(loader, failures.append if accelerator.num_processes > 1 else None):
        pixel_values, labels = prepare(batch)
        losses, logits, labels = loss_module(pixel_values, labels)
        indices = own_indices(batch["index"], order.filler)
        shape = tuple(logits.shape[1:])
        # Neither the sampler's filler nor the blank image of an empty batch counts.
        losses, logits, labels = losses[: len(indices)], logits[: len(indices)], labels[: len(indices)]
        state.update(logits, labels, losses)
        if outcome_state is not None:
            outcome_state.update(logits, labels, indices, losses)
        unreadable += batch["unreadable"]
        if keep_outputs:
            outputs.append((logits.float(), labels, indices.to(accelerator.device)))
        if on_batch is not None:
            on_batch()
    reshard(loss_module)  # no backward pass has done it
    # Only now: up to here every rank has taken part in every pass.
    raise_on_all_ranks(failures[0] if failures else None)
    counted = state.reduce(accelerator)
    if not counted.images:
        raise HFViTError(f"no image to evaluate on can be read: {', '.join(unreadable[:3])}")
    scores = {"loss": counted.sums["loss"] / counted.images} | {
        name: value for name, (value, _) in counted.scores().items()
    }
    result = Evaluated(scores, counted.images, unreadable, counted if isinstance(counted, Metrics) else None)
    result.outcomes = None if outcome_state is None else outcome_state.gather(accelerator)
    if keep_outputs:
        classes = score_outputs is None
        result.logits, result.labels, result.index = gather_outputs(outputs, accelerator, *shape, classes=classes)
    if score_outputs is not None and result.logits is not None and result.labels is not None:
        result.scores |= score_outputs(result.logits, result.labels)
    return result


def own_indices(index: torch.Tensor, filler: int | None) -> torch.Tensor:
    """The batch's indices without the filler, which can only be the last one."""
    return index[:-1] if filler is not None and len(index) and int(index[-1]) == filler else index


def gather_outputs(
    outputs: list[tuple], accelerator: Accelerator, *shape: int, classes: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All processes' logits, labels and indices, in the order of the data.

    Args:
        shape: of one image's logits, for a process without images.
        classes: labels are class numbers; otherwise one float for each logit.
    """
    if outputs:
        logits, labels, index = (torch.cat(part) for part in zip(*outputs))
    else:
        logits = torch.zeros(0, *shape, device=accelerator.device)
        label_shape, dtype = (shape[:-1], torch.int64) if classes else (shape, torch.float32)
        labels = torch.zeros(0, *label_shape, dtype=dtype, device=accelerator.device)
        index = torch.zeros(0, dtype=torch.int64, device=accelerator.device)
    # Ranks may have read different numbers of images, and collective operations need equal shapes: -1 marks padding.
    padded = [accelerator.pad_across_processes(part, dim=0, pad_index=-1) for part in (logits, labels, index)]
    logits, labels, index = (accelerator.gather_for_metrics(part).cpu().numpy() for part in padded)
    order = np.argsort(index, kind="stable")  # a rank has every world_size-th image: back to the order of the data
    order = order[index[order] >= 0]
    return logits[order], labels[order], index[order]
