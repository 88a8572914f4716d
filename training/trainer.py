"""The loop: a visible one, over Accelerate, with the surface of transformers.Trainer.

    trainer = Trainer(model, TrainArguments(output_dir="out", max_steps=500), train_dataset, eval_dataset, processor)
    trainer.train(resume_from_checkpoint=True)

transformers' own callbacks (TrainerCallback, EarlyStoppingCallback, ...) run in it unchanged. It is not a subclass:
transformers' loop turns soft labels into binary problems and decays norms and position embeddings.

Every random draw is a function of (seed, update, process), the order of the data of (seed, position): so a checkpoint
remembers two numbers, and a resumed run is the uninterrupted one, bit for bit, with any number of workers.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import get_token
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import EvalPrediction, PredictionOutput, TrainOutput

from hf_vit.errors import HFViTError
from hf_vit.hub import push_folder
from hf_vit.model_card import write_card

from . import attention_examples, progress, resuming
from . import checkpointing as disk
from . import facts as report
from .arguments import TrainArguments
from .augmentation import Mixing
from .averaging import WeightAverage
from .cpu_kernels import kernels_for
from .data import collate
from .device import create_accelerator, memory_advice
from .evaluation import Evaluated, evaluate
from .flops import measured_peak, train_flops
from .lengths import updates_of
from .masked_patches import MASKED_PATCHES, colour_flops
from .objective import Normalise, create_objective
from .optimization import GradualUnfreezing, averaged_by, create_optimizer, create_scheduler
from .sampling import EvalOrder, KeyedDataset, TrainOrder, keyed, seed_draw, stack
from .schedules import Stage, seen_at, stages_of, with_passes
from .signals import StopRequest, leave_to_the_loop
from .streaming import ImageStream, StreamOrder
from .trackers import flat


NEVER = 1 << 62


class Trainer:
    """Trains and evaluates an image classifier.

    Args:
        model: `model(pixel_values).logits` is all that is asked of it.
        args: the numbers of the run.
        train_dataset, eval_dataset: `training.data.ImageDataset` with a transform (for training also
            `training.streaming.ImageStream`), or any map-style dataset of {"pixel_values": uint8 or normalised float
            (C, H, W), "labels": int}.
        image_processor: saved beside the weights; its mean and std normalise uint8 pictures on the device.
        compute_metrics: `EvalPrediction -> dict`, in addition to loss, accuracy and top-5 accuracy.
        callbacks: transformers' TrainerCallback instances or classes.
        optimizers: (optimizer, scheduler) in place of those that `args` name.
        about: entries for the facts that the Trainer cannot know: stage, recipe, base_model, arguments, augmentation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        image_processor=None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        about: dict[str, Any] | None = None,
    ):
        args = with_passes(args)
        self.model, self.args, self.image_processor = model, args, image_processor
        self.train_dataset, self.eval_dataset = keyed(train_dataset), keyed(eval_dataset)
        self.compute_metrics, self.about = compute_metrics, about or {}
        attention_examples.check(args.card_examples, model, self.eval_dataset, image_processor)
        self.accelerator = create_accelerator(args)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        if args.activation_checkpointing:
            model.activation_checkpointing_enable()
        optimizer, scheduler = optimizers
        self.normalise = Normalise.of(image_processor, model.config.num_channels)
        self.objective, self.optimizer = self.accelerator.prepare(
            create_objective(model, args, self.normalise), optimizer or create_optimizer(model, args)
        )
        self._parameters = list(self.objective.parameters())
        self.kernels = kernels_for(self.accelerator.device, args.cpu_kernels, args.torch_compile)
        self.max_steps = self._count_steps()
        epoch = 0.0 if self.train_dataset is None else len(self.train_dataset) / self._pictures()
        self.stages = stages_of(args, model.config, self.max_steps, epoch, self.world_size)
        self.lr_scheduler = scheduler or create_scheduler(self.optimizer.optimizer, args, self.max_steps, epoch)
        every = updates_of("unfreeze_every", args.unfreeze_every, self.max_steps, epoch)
        self.unfreezing = GradualUnfreezing(self.objective, every) if every else None
        self.average = WeightAverage(model, args.ema_decay) if args.ema_decay else None
        self.mixing = None
        if args.mixup_alpha or args.cutmix_alpha:
            self.mixing = Mixing(args.mixup_alpha, args.cutmix_alpha, model.config.num_labels, args.seed)
        self.mixing_ends = self.max_steps - updates_of("mixing_off", args.mixing_off, self.max_steps, epoch)
        self.meter, self.watch = progress.Meter(self.accelerator.device), progress.Stopwatch()
        self.display = progress.Display(self.accelerator.is_main_process, not args.disable_tqdm)
        self.position = 0  # pictures of the endless row of epochs that are behind us
        self.stop_request, self.interrupted = StopRequest(self.accelerator), False
        self.last_evaluation: tuple[int, dict[str, float], int] | None = None  # update, scores, pictures
        self.unreadable: dict[str, None] = {}  # names in the order met; one met again counts once
        self.began, self.seconds = time.time(), 0.0
        self.peak: float | None = None
        self._flops_of: dict[tuple[int, int] | None, int] = {}  # training on one picture of a stage's size
        self._flops_logged = 0.0
        self._keeping_history = self._best_is_loaded = False
        self._places: dict[int, int] = {}  # update -> position, since the loss was last looked at
        self._grad_norm: torch.Tensor | None = None
        self._done: torch.cuda.Event | None = None  # end of the last update on the GPU
        self._begin_callbacks(callbacks or [])

    # -- what a run is -----------------------------------------------------------------------------------------------

    @property
    def output_dir(self) -> Path:
        if self.args.output_dir is None:
            raise HFViTError("where should the result go? Give --output_dir FOLDER")
        return Path(self.args.output_dir)

    @property
    def name(self) -> str:
        """What the model is called: its repository, or its folder."""
        return self.args.hub_model_id or self.output_dir.resolve().name

    @property
    def precision(self) -> str:
        chosen = str(self.accelerator.mixed_precision)
        return "fp32" if chosen == "no" else chosen

    @property
    def global_batch_size(self) -> int:
        """Pictures of one update, over all processes and passes; where it changes, of the present one."""
        return self.stage_of(self.state.global_step).pictures

    def stage_of(self, step: int) -> Stage:
        """The stage of update `step` (from 0)."""
        return next(stage for stage in reversed(self.stages) if stage.start <= step)

    def pictures_after(self, step: int) -> int:
        """Pictures of the updates from `step` to the end of the run."""
        return sum(max(0, stage.stop - max(stage.start, step)) * stage.pictures for stage in self.stages)

    def _pictures(self) -> int:
        """Pictures of one update, where no schedule changes it."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.world_size

    def _count_steps(self) -> int:
        """Updates of the run; epochs are rounded up."""
        if self.args.max_steps > 0 or self.train_dataset is None:
            return self.args.max_steps
        return max(1, math.ceil(self.args.num_train_epochs * len(self.train_dataset) / self._pictures()))

    def _begin_callbacks(self, callbacks: list) -> None:
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *callbacks], self.model, self.image_processor, self.optimizer, self.lr_scheduler
        )
        self.state = TrainerState(
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
            stateful_callbacks=resuming.stateful(self),
        )
        self.control = self._event("on_init_end")

    def _event(self, name: str, **kwargs) -> TrainerControl:
        return getattr(self.callback_handler, name)(self.args, self.state, self.control, **kwargs)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add one of transformers' callbacks, or one in their manner."""
        self.callback_handler.add_callback(callback)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train from the beginning, or from a checkpoint as if there had been no interruption.

        Args:
            resume_from_checkpoint: path of a checkpoint, or True for the newest complete one of `output_dir` (the
                beginning if there is none). None takes `args.resume_from_checkpoint`.

        Raises:
            HFViTError: bad input; a loss that is not finite; no memory; no space on the disk.
        """
        self._begin(self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint)
        with self.stop_request.listening(), memory_advice(self.args):
            while self.state.global_step < self.max_steps and not self.control.should_training_stop:
                self.control = self._event("on_epoch_begin")
                for batches in self._updates():
                    self.control = self._event("on_step_begin")
                    with self.kernels:
                        self._update(batches)
                    epoch_ended = self._advance()
                    self.control = self._event("on_step_end")
                    if epoch_ended:
                        self.control = self._event("on_epoch_end")
                    if self.stop_request.made(self.state.global_step):
                        self.interrupted = self.control.should_training_stop = True
                    self._log_evaluate_save()
                    if self.control.should_training_stop:
                        break
                    if self.control.should_epoch_stop:
                        self.position = self._next_epoch()
                        break
                    if epoch_ended:
                        self.control = self._event("on_epoch_begin")
                    self.watch.start()
        return self._end()

    def first_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The run's first forward pass: normalised pictures (B, C, H, W), and labels (B,), or (B, K) where mixed."""
        self._check_data()
        batches = next(self._updates())
        return self._to_device(batches[0], 0)

    def _update(self, batches: list[dict]) -> None:
        """One optimizer step over the batches of its passes, equal to one large batch."""
        step, passes = self.state.global_step, len(batches)
        most = max(stage.passes for stage in self.stages)
        count = self._count(batches)
        if not self.objective.training:
            self.objective.train()
        for number, batch in enumerate(batches):
            draw = step * most + number
            seed_draw(self.args.seed, draw, self.rank, self.accelerator.device)
            with self.accelerator.accumulate(self.objective):
                pixel_values, labels = self._to_device(batch, draw)
                found = self.objective(pixel_values, labels)
                losses, logits, labels = (part[: len(batch["labels"])] for part in found)
                # Accelerate divides by the passes and averages over the processes: what remains is the mean over all.
                self.accelerator.backward(losses.sum() * (passes * self.world_size) / count)
                self.meter.add(losses.detach(), logits.detach(), labels, step)
                if self.accelerator.sync_gradients:
                    if self.unfreezing is not None:
                        self.unfreezing.drop_gradients(step)
                    self._clip(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not self.accelerator.sync_gradients:
                self.control = self._event("on_substep_end")
        self.control = self._event("on_optimizer_step")
        self._rate = max(self.lr_scheduler.get_last_lr())
        self.lr_scheduler.step()
        if self.average is not None:
            self.average.update(step + 1)

    def _clip(self, step: int) -> None:
        if self.args.max_grad_norm > 0:
            norm = self.accelerator.clip_grad_norm_(self._parameters, self.args.max_grad_norm)
            self._grad_norm = disk.local(norm)
            if self.accelerator.scaler is None:  # a scaled loss overflows now and then, and its step is left out
                self.meter.mark(self._grad_norm, step)
        self.control = self._event("on_pre_optimizer_step")

    def _count(self, batches: list[dict]) -> int | torch.Tensor:
        """Pictures of this update over all processes: what the sum of the losses is divided by."""
        count = sum(len(batch["labels"]) for batch in batches)
        if self.world_size > 1:
            total = self.accelerator.reduce(torch.tensor(float(count), device=self.accelerator.device), "sum")
            return total.clamp(min=1)
        if not count:
            names = [name for batch in batches for name in batch["unreadable"]]
            raise HFViTError(f"no picture of update {self.state.global_step + 1} can be read: {', '.join(names[:3])}")
        return count

    def _to_device(self, batch: dict, draw: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised pictures and labels on the device; mixed if `draw` numbers a training batch."""
        for name in batch["unreadable"]:
            if name not in self.unreadable:
                self.unreadable[name] = None
                self.display.say(f"skipped: {name}")
        device = self.accelerator.device
        pixel_values = batch["pixel_values"].to(device, non_blocking=True)
        labels = batch["labels"].to(device, non_blocking=True)
        if not len(labels):  # all processes take part in every pass: a blank picture, which nobody counts
            side = self.model.config.image_size
            height, width = (side, side) if isinstance(side, int) else side
            pixel_values = pixel_values.new_zeros((1, self.model.config.num_channels, height, width))
            labels = labels.new_zeros(1)
        pixel_values = self.normalise(pixel_values)
        mixes = self.mixing is not None and self.state.global_step < self.mixing_ends
        if draw is not None and mixes:
            pixel_values, labels = self.mixing(pixel_values, labels, draw)
        return pixel_values, labels

    def _advance(self) -> bool:
        """Count an update; True if an epoch ended with it."""
        size, before, stage = len(self.train_dataset), self.position, self.stage_of(self.state.global_step)
        self._places[self.state.global_step] = before
        self.position += stage.pictures
        self.state.global_step += 1
        self.state.epoch = self.position / size
        self.state.total_flos += self._flops_of[stage.image_size] * stage.pictures
        self.watch.lap(stage.pictures)
        self.display.advance()
        if self.accelerator.device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record()
        return self.position // size > before // size

    # -- batches -----------------------------------------------------------------------------------------------------

    def _next_epoch(self) -> int:
        """The next place of the row at which an epoch begins, for all processes alike."""
        size = len(self.train_dataset)
        return math.ceil(math.ceil(self.position / size) * size / self.world_size) * self.world_size

    def _updates(self) -> Iterator[list[dict]]:
        """The batches of one update after another, from `position` to the end of the run."""
        for stage in self.stages:
            if self.state.global_step < stage.stop:
                yield from self._updates_of(stage)

    def _updates_of(self, stage: Stage) -> Iterator[list[dict]]:
        """The batches of one update after another, from `position` to the end of a stage."""
        stop = self.position + (stage.stop - self.state.global_step) * stage.pictures
        loader = self._loader(seen_at(self.train_dataset, stage.image_size), self._order(stage, self.position, stop))
        self.callback_handler.train_dataloader = loader
        self.accelerator.gradient_accumulation_steps, self.accelerator.step = stage.passes, 0
        batches = iter(loader)
        self.watch.start()
        while True:
            began, busy = time.perf_counter(), self._device_is_busy()
            update = list(itertools.islice(batches, stage.passes))
            if not (busy and self._device_is_busy()):
                self.watch.wait(time.perf_counter() - began)
            if len(update) < stage.passes:
                return
            yield update

    def _device_is_busy(self) -> bool:
        """Whether the GPU still works on the last update: waiting for data then costs nothing."""
        return self._done is not None and not self._done.query()

    def _order(self, stage: Stage, position: int, stop: int) -> TrainOrder | StreamOrder:
        """The batches of this process from one place of the row to another."""
        data, size = self.train_dataset, stage.batch_size
        where = {"position": position, "stop": stop, "rank": self.rank, "world_size": self.world_size}
        if isinstance(data, ImageStream):
            return data.order(size, seed=self.args.seed, **where)
        return TrainOrder(len(data), size, seed=self.args.seed, **where)

    def _loader(self, dataset: Dataset, order: TrainOrder | StreamOrder | EvalOrder) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            batch_sampler=order,
            collate_fn=stack if isinstance(dataset, KeyedDataset) else collate,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=leave_to_the_loop,
        )

    # -- logging, evaluating, saving ---------------------------------------------------------------------------------

    def _log_evaluate_save(self) -> None:
        """What the callbacks asked for after an update. The loss is looked at before anything is kept."""
        self.control.should_log |= self.state.global_step >= self.max_steps
        save = self.control.should_save and self.args.save_strategy != "no"
        if self.control.should_log or self.control.should_evaluate or save or self.interrupted:
            self.watch.pause()
            self._check_finite()
        if self.control.should_log:
            self._log_training()
        if self.control.should_evaluate:
            save |= self._note_best(self.evaluate())
        if save or self.interrupted:
            self.save_checkpoint()
            self.control = self._event("on_save")

    def _check_finite(self) -> None:
        """Raise HFViTError naming the update and its files if a loss or gradient was not finite."""
        bad = int(self.meter.bad_step)
        first = torch.tensor([bad if bad >= 0 else NEVER], device=self.accelerator.device)
        step = int(self.accelerator.gather(first).min())
        if step == NEVER:
            self._places.clear()
            return
        names = self._names_of(step) if bad == step else []
        names = names if self.world_size == 1 else gather_object(names)
        kept = disk.checkpoints(self.output_dir)
        good = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise HFViTError(
            f"the loss is not finite at update {step + 1} (batch: {', '.join(names[:8])}"
            f"{', ...' if len(names) > 8 else ''}); {good}. "
            "Lower --learning_rate, raise --warmup_steps, or set --max_grad_norm 1"
        )

    def _names_of(self, step: int) -> list[str]:
        """The files that this process read for an update."""
        start, stage = self._places[step], self.stage_of(step)
        batches = self._order(stage, start, start + stage.pictures)
        items = [self.train_dataset[key] for keys in batches for key in keys]
        return [str(item["name"] if "name" in item else item["unreadable"]) for item in items]

    def _log_training(self) -> None:
        loss, hits, count = self.accelerator.reduce(self.meter.sums, "sum").tolist()
        self.meter.reset()
        logs = {"loss": loss / max(count, 1), "accuracy": hits / max(count, 1), "learning_rate": self._rate}
        if self._grad_norm is not None:
            logs["grad_norm"] = float(self._grad_norm)
        self.log(logs, self._speed())

    def _speed(self) -> dict[str, float]:
        """What the clock says since the last log."""
        seconds, rate, waiting = self.watch.interval()
        speed = {
            "seconds": self.watch.seconds,
            "interval_seconds": seconds,
            "images_per_second": rate,
            "data_wait": waiting,
            "memory_peak_bytes": progress.memory_peak(self.accelerator.device),
            "eta_seconds": self.pictures_after(self.state.global_step) / max(rate, 1e-9),
        }
        flops, self._flops_logged = self.state.total_flos - self._flops_logged, self.state.total_flos
        if self.peak is not None:
            speed["mfu"] = flops / (seconds * self.peak * self.world_size)
        return speed

    def log(self, logs: dict[str, float], speed: dict[str, float] | None = None) -> None:
        """Add a line to the history, the display, the trackers and the callbacks.

        Args:
            logs: what is a function of arguments and data. speed: what the clock said.
        """
        speed = speed or {}
        line = {"step": self.state.global_step, "epoch": self.state.epoch or 0.0, **logs}
        self.state.log_history.append(line)
        self.display.show(self.state.global_step, logs, speed)
        if self.accelerator.is_main_process and self._keeping_history:
            with disk.space_needed(self.output_dir):
                progress.append_line(self.output_dir / progress.HISTORY_NAME, line)
                if speed:
                    progress.append_line(self.output_dir / progress.SPEED_NAME, {"step": line["step"], **speed})
        self.accelerator.log({**logs, **speed}, step=self.state.global_step)
        self.control = self._event("on_log", logs=dict(logs))

    def evaluate(self, eval_dataset: Dataset | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Score every picture of the evaluation split once.

        Returns:
            `eval_loss`, `eval_accuracy`, `eval_top5_accuracy` (above five classes), and what `compute_metrics` adds.
        """
        dataset = self.eval_dataset if eval_dataset is None else keyed(eval_dataset)
        if dataset is None:
            raise HFViTError("nothing to evaluate on: give an eval_dataset")
        found = self._evaluate(dataset, keep_outputs=self.compute_metrics is not None)
        metrics = found.metrics(metric_key_prefix)
        if self.compute_metrics is not None:
            extra = self.compute_metrics(EvalPrediction(predictions=found.logits, label_ids=found.labels))
            head = f"{metric_key_prefix}_"
            metrics |= {head + name.removeprefix(head): value for name, value in extra.items()}
        if eval_dataset is None:
            self.last_evaluation = (self.state.global_step, metrics, found.count)
        if not self._best_is_loaded:  # those weights belong to an earlier update, which has its line
            self.log(metrics)
        self.control = self._event("on_evaluate", metrics=metrics)
        return metrics

    def predict(self, test_dataset: Dataset, metric_key_prefix: str = "test") -> PredictionOutput:
        """Logits (N, K), labels (N,) and scores, in the order of the data."""
        found = self._evaluate(keyed(test_dataset), keep_outputs=True)
        metrics = found.metrics(metric_key_prefix)
        self.control = self._event("on_predict", metrics=metrics)
        return PredictionOutput(found.logits, found.labels, metrics)

    def _evaluate(self, dataset: Dataset, keep_outputs: bool) -> Evaluated:
        size = self.args.per_device_eval_batch_size
        order = EvalOrder(len(dataset), size, rank=self.rank, world_size=self.world_size)
        loader = self._loader(dataset, order)
        self.callback_handler.eval_dataloader = loader

        def on_batch() -> None:
            self.control = self._event("on_prediction_step")

        with self._averaged():
            return evaluate(self.objective, loader, order, self.accelerator, self._to_device, keep_outputs, on_batch)

    def _averaged(self):
        """Within it, the model holds the average of its weights, if one is kept."""
        if self.average is None:
            return averaged_by(self.optimizer.optimizer)
        return self.average.applied()

    def _note_best(self, metrics: dict[str, float]) -> bool:
        """Remember the best score; True if its weights have to be kept."""
        name = "eval_" + self.args.metric_for_best_model.removeprefix("eval_")
        if name not in metrics:
            raise HFViTError(f"--metric_for_best_model {name}: evaluation gives {', '.join(metrics)}")
        value, best = metrics[name], self.state.best_metric
        if best is not None and not (value > best if self.args.greater_is_better else value < best):
            return False
        self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        if self.args.load_best_model_at_end or self.args.save_strategy == "best":
            self.state.best_model_checkpoint = str(self.output_dir / f"checkpoint-{self.state.global_step}")
            return True
        return False

    def save_checkpoint(self) -> Path:
        """Write `checkpoint-N`, whole or not at all; then older ones beyond `save_total_limit` go."""
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        resuming.save(self, folder)
        if self.accelerator.is_main_process:
            disk.rotate(self.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            self._push_midway(folder)
        return folder

    def _push_midway(self, checkpoint: Path) -> None:
        """Upload the run as it stands, whole: what anybody loads meanwhile is a model with its card."""
        self.seconds = time.time() - self.began
        self.save_model()
        measured = self.last_evaluation is not None and self.last_evaluation[0] == self.state.global_step
        self.create_model_card(**({} if measured else {"results": []}))
        try:
            self.push_to_hub(checkpoint if self.args.hub_strategy == "checkpoint" else None, attempts=2)
        except HFViTError as error:  # the network is no reason to stop; the end of the run uploads again
            self.display.say(f"not uploaded: {error}")

    # -- beginning and end -------------------------------------------------------------------------------------------

    def _begin(self, resume: str | bool | None) -> None:
        """Check everything that can be checked, then make the output folder."""
        self._check_data()
        folder = disk.find_checkpoint(self.output_dir, resume)
        if not resume and self.output_dir.is_dir() and any(self.output_dir.iterdir()):
            raise HFViTError(
                f"{self.output_dir} is not empty: give another --output_dir, or --resume_from_checkpoint true to go "
                "on from its newest checkpoint"
            )
        if self.args.push_to_hub and get_token() is None:
            raise HFViTError("--push_to_hub needs a Hugging Face token: run `hf auth login`, or set HF_TOKEN")
        self.began, self._keeping_history = time.time(), True
        self._flops_of = {stage.image_size: self._train_flops(stage.image_size) for stage in self.stages}
        if report.is_hf_vit(self.model):
            self.peak = measured_peak(self.accelerator.device, self.precision)
        if folder is not None:
            resuming.load(self, folder)
            self.display.say(f"resuming from {folder}, after update {self.state.global_step} of {self.max_steps}")
        self._flops_logged = self.state.total_flos
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            disk.sweep(self.output_dir)
            progress.write_history(self.output_dir, self.state.log_history)
        self.state.max_steps = self.max_steps
        self.state.num_train_epochs = math.ceil(self.pictures_after(0) / len(self.train_dataset))
        self.state.train_batch_size = self.args.per_device_train_batch_size
        self.state.compute_steps(self.args, self.max_steps)
        self.accelerator.init_trackers(self.args.run_name or self.name, flat(dataclasses.asdict(self.args)))
        self.display.begin(self.state.global_step, self.max_steps)
        self.control = self._event("on_train_begin")

    def _train_flops(self, image_size: tuple[int, int] | None) -> int:
        """Operations of training on one picture of that size; 0 for a network that the account does not know."""
        if not report.is_hf_vit(self.model):
            return 0
        frozen = not any(p.requires_grad for p in self.model.base_model.parameters())
        found = train_flops(self.model.config, image_size, frozen=frozen, compiled=self.args.torch_compile)
        return found + 3 * colour_flops(self.model.config, image_size) * (self.args.loss == MASKED_PATCHES)

    def _check_data(self) -> None:
        if self.train_dataset is None:
            raise HFViTError("nothing to train on: give a train_dataset")
        largest, size = max(self.stages, key=lambda stage: stage.pictures), len(self.train_dataset)
        for stage in self.stages:
            seen_at(self.train_dataset, stage.image_size)
        if self.unfreezing is not None and self.unfreezing.last >= self.max_steps:
            raise HFViTError(
                f"--unfreeze_every {self.args.unfreeze_every}: the lowest layer would begin at update "
                f"{self.unfreezing.last}, after the end of training ({self.max_steps}): lower it"
            )
        if largest.pictures > size:
            raise HFViTError(
                f"a batch of {largest.pictures} pictures ({largest.batch_size} x {largest.passes} passes x "
                f"{self.world_size} processes) is larger than the {size} training pictures: lower "
                f"--per_device_train_batch_size to {max(1, size // (largest.passes * self.world_size))} or less"
            )

    def _end(self) -> TrainOutput:
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and not self.interrupted:
            resuming.load_weights(self, Path(best))
            self._best_is_loaded, self.last_evaluation = True, None
            self.display.say(f"best evaluated weights: those of update {self.state.best_global_step}")
        self.control = self._event("on_train_end")
        self.display.end()
        self.seconds = time.time() - self.began
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        rate = self.watch.images / max(self.watch.seconds, 1e-9)
        metrics = {
            "train_runtime": self.seconds,
            "train_samples_per_second": rate,
            "total_flos": self.state.total_flos,
        }
        return TrainOutput(self.state.global_step, losses[-1] if losses else math.nan, metrics)

    # -- what stays --------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write weights (their average, if one is kept), config, code and processor; each file appears whole."""
        folder = self.output_dir if output_dir is None else Path(output_dir)
        main = self.accelerator.is_main_process
        with self._averaged():
            weights = disk.weights_of(self.model, keep=main)
            if main:
                with disk.written_aside(folder / ".finished") as aside:
                    self.model.save_pretrained(aside, state_dict=weights)
                    if self.image_processor is not None:
                        self.image_processor.save_pretrained(aside)
                disk.publish(folder / ".finished", folder)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, **entries) -> dict[str, Any]:
        """Write facts.json, the training curve and the card rendered from them; returns the facts.

        Args:
            entries: top-level facts to add or replace.
        """
        names = list(self.unreadable)
        unreadable = len(set(names if self.world_size == 1 else gather_object(names)))
        facts = report.run_facts(self, unreadable) | entries
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if progress.draw_curve(self.state.log_history, self.output_dir / progress.CURVE_NAME):
                facts["figures"] = [progress.CURVE_NAME]
            positions = self.output_dir / progress.POSITIONS_NAME
            if report.is_hf_vit(self.model) and progress.draw_positions(self.model, positions):
                facts.setdefault("figures", []).append(positions.name)
            with self._averaged():
                attention_examples.add(self, facts)
            report.write_facts(self.output_dir, facts)
            write_card(self.output_dir)
        self.accelerator.wait_for_everyone()
        return facts

    def push_to_hub(self, checkpoint: Path | None = None, **kwargs) -> str | None:
        """Upload `output_dir` (weights, code, processor, card, facts); its address, on the main process.

        Args:
            checkpoint: folder that goes along as `last-checkpoint/`.
            kwargs: further arguments of `hf_vit.hub.push_folder`.
        """
        self.control = self._event("on_push_begin")
        if not self.accelerator.is_main_process:
            return None
        private = self.args.hub_private_repo
        return push_folder(self.output_dir, self.name, private=private, checkpoint=checkpoint, **kwargs)
