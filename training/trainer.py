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
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin, gather_object
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import EvalPrediction, PredictionOutput, TrainOutput

from hf_vit.errors import HFViTError
from hf_vit.hub import push_folder
from hf_vit.model_card import write_card

from . import checkpointing as disk
from . import facts as report
from . import progress
from .arguments import TrainArguments
from .augmentation import Mixing
from .averaging import WeightAverage
from .data import ImageDataset, collate
from .evaluation import Evaluated, evaluate
from .flops import forward_flops, measured_peak, train_flops
from .objective import Normalise, Objective
from .optimization import create_optimizer, create_scheduler
from .sampling import EvalOrder, KeyedDataset, TrainOrder, seed_draw, stack
from .trackers import chosen_trackers


AGREE_EVERY = 10  # updates between the processes' agreeing whether one of them was asked to stop


class Trainer:
    """Trains and evaluates an image classifier.

    Args:
        model: `model(pixel_values).logits` is all that is asked of it.
        args: the numbers of the run.
        train_dataset, eval_dataset: `training.data.ImageDataset` with a transform, or any map-style dataset of
            {"pixel_values": uint8 or normalised float (C, H, W), "labels": int}.
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
        self.model, self.args, self.image_processor = model, args, image_processor
        self.train_dataset, self.eval_dataset = _keyed(train_dataset), _keyed(eval_dataset)
        self.compute_metrics, self.about = compute_metrics, about or {}
        self.accelerator = create_accelerator(args)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        if args.activation_checkpointing:
            model.activation_checkpointing_enable()
        objective = Objective(model, args.loss, args.label_smoothing_factor)
        given_optimizer, given_scheduler = optimizers
        optimizer = given_optimizer or create_optimizer(model, args)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.max_steps = self._count_steps()
        self.lr_scheduler = given_scheduler or create_scheduler(self.optimizer.optimizer, args, self.max_steps)
        self.average = WeightAverage(model, args.ema_decay) if args.ema_decay else None
        self.normalise = _normaliser(image_processor, model.config.num_channels)
        self.mixing = None
        if args.mixup_alpha or args.cutmix_alpha:
            self.mixing = Mixing(args.mixup_alpha, args.cutmix_alpha, model.config.num_labels, args.seed)
        self.meter, self.watch = progress.Meter(self.accelerator.device), progress.Stopwatch()
        self.display = progress.Display(self.accelerator.is_main_process, not args.disable_tqdm)
        self.unreadable: dict[str, None] = {}  # names in the order met; a picture met again counts once
        self.last_evaluation: tuple[int, Evaluated] | None = None
        self.last_metrics: dict[str, float] = {}
        self.position, self.interrupted, self._asked_to_stop = 0, False, False
        self._places: dict[int, int] = {}  # update -> position, since the loss was last looked at
        self._grad_norm: torch.Tensor | None = None
        self._done: torch.cuda.Event | None = None  # end of the last update on the GPU
        self._keeping_history = False
        self._began, self._seconds, self._logged_at, self._rate = time.time(), 0.0, 0.0, 0.0
        self._train_flops, self._peak = 0, None
        self._begin_state(callbacks or [])

    # -- what a run is -------------------------------------------------------------------------------------------

    @property
    def output_dir(self) -> Path:
        if self.args.output_dir is None:
            raise HFViTError("where should the result go? Give --output_dir FOLDER")
        return Path(self.args.output_dir)

    @property
    def global_batch_size(self) -> int:
        """Pictures of one update, over all processes and passes."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.world_size

    def _count_steps(self) -> int:
        """Updates of the run; epochs are rounded up."""
        if self.args.max_steps > 0 or self.train_dataset is None:
            return self.args.max_steps
        return max(1, math.ceil(self.args.num_train_epochs * len(self.train_dataset) / self.global_batch_size))

    def _begin_state(self, callbacks: list[TrainerCallback]) -> None:
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *callbacks], self.model, self.image_processor, self.optimizer, self.lr_scheduler
        )
        self.state = TrainerState(
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
            stateful_callbacks=self._stateful(),
        )
        self.control = self._event("on_init_end")

    def _stateful(self) -> list:
        return [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]

    def _event(self, name: str, **kwargs) -> TrainerControl:
        return getattr(self.callback_handler, name)(self.args, self.state, self.control, **kwargs)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add one of transformers' callbacks, or one in their manner."""
        self.callback_handler.add_callback(callback)

    # -- training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train from the beginning, or from a checkpoint as if there had been no interruption.

        Args:
            resume_from_checkpoint: path of a checkpoint, or True for the newest complete one of `output_dir` (the
                beginning if there is none). None takes `args.resume_from_checkpoint`.

        Raises:
            HFViTError: bad input; a loss that is not finite; no memory; no space on the disk.
        """
        self._begin(self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint)
        with self._listening_for_sigterm(), self._memory_advice():
            while not self.control.should_training_stop and self.state.global_step < self.max_steps:
                self.control = self._event("on_epoch_begin")
                for batches in self._updates():
                    self.control = self._event("on_step_begin")
                    self._update(batches)
                    epoch_ended = self._advance()
                    self.control = self._event("on_step_end")
                    if epoch_ended:
                        self.control = self._event("on_epoch_end")
                    self._stop_if_asked()
                    self._log_evaluate_save()
                    if self.control.should_training_stop:
                        break
                    if self.control.should_epoch_stop:
                        self.position = (self.position // len(self.train_dataset) + 1) * len(self.train_dataset)
                        break
                    if epoch_ended:
                        self.control = self._event("on_epoch_begin")
                    self.watch.start()
        return self._finish()

    def _update(self, batches: list[dict]) -> None:
        """One optimizer step over `gradient_accumulation_steps` batches, equal to one large batch."""
        step, passes = self.state.global_step, len(batches)
        count = self._count(batches)
        self.objective.train()
        for number, batch in enumerate(batches):
            draw = step * passes + number
            seed_draw(self.args.seed, draw, self.rank)
            with self.accelerator.accumulate(self.objective):
                pixel_values, labels = self._to_device(batch, draw)
                losses, logits = self.objective(pixel_values, labels)
                # Accelerate divides by the passes and averages over the processes: what remains is the mean over all.
                self.accelerator.backward(losses.sum() * (passes * self.world_size) / count)
                self.meter.add(losses.detach(), logits.detach(), labels, step)
                if self.accelerator.sync_gradients:
                    self._clip(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not self.accelerator.sync_gradients:
                self.control = self._event("on_substep_end")
        self.control = self._event("on_optimizer_step")
        self._rate = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        if self.average is not None:
            self.average.update(step + 1)

    def _clip(self, step: int) -> None:
        if self.args.max_grad_norm > 0:
            self._grad_norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.args.max_grad_norm)
            if self.accelerator.scaler is None:  # a scaled loss overflows now and then, and its step is left out
                self.meter.mark(disk.local(self._grad_norm), step)
        self.control = self._event("on_pre_optimizer_step")

    def _count(self, batches: list[dict]) -> int | torch.Tensor:
        """Pictures of this update over all processes: what the sum of the losses is divided by."""
        count = sum(len(batch["labels"]) for batch in batches)
        if self.world_size == 1:
            if not count:
                names = [name for batch in batches for name in batch["unreadable"]]
                raise HFViTError(
                    f"no picture of update {self.state.global_step + 1} can be read: {', '.join(names[:3])}"
                )
            return count
        total = self.accelerator.reduce(torch.tensor(float(count), device=self.accelerator.device), "sum")
        return total.clamp(min=1)

    def _to_device(self, batch: dict, draw: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised pictures and labels on the device; mixed if `draw` numbers a training batch."""
        for name in batch["unreadable"]:
            if name not in self.unreadable:
                self.unreadable[name] = None
                self.display.say(f"skipped: {name}")
        device = self.accelerator.device
        pixel_values = batch["pixel_values"].to(device, non_blocking=True)
        labels = batch["labels"].to(device, non_blocking=True)
        if not len(labels):
            side = self.model.config.image_size
            height, width = (side, side) if isinstance(side, int) else side
            pixel_values = pixel_values.new_zeros((0, self.model.config.num_channels, height, width))
        pixel_values = self.normalise(pixel_values)
        if draw is not None and self.mixing is not None and len(labels):
            pixel_values, labels = self.mixing(pixel_values, labels, draw)
        return pixel_values, labels

    def _updates(self) -> Iterator[list[dict]]:
        """The batches of one update after another, from `position` to the end of the run."""
        stop = self.position + (self.max_steps - self.state.global_step) * self.global_batch_size
        order = self._order(self.position, stop)
        loader = self._loader(self.train_dataset, order)
        self.callback_handler.train_dataloader = loader
        batches = iter(loader)
        self.watch.start()
        while True:
            began = time.perf_counter()
            busy = self._device_is_busy()
            update = list(itertools.islice(batches, self.args.gradient_accumulation_steps))
            if not (busy and self._device_is_busy()):
                self.watch.wait(time.perf_counter() - began)
            if len(update) < self.args.gradient_accumulation_steps:
                return
            yield update

    def _device_is_busy(self) -> bool:
        """Whether the GPU still works on the last update: waiting for data then costs nothing."""
        return self._done is not None and not self._done.query()

    def _order(self, position: int, stop: int) -> TrainOrder:
        return TrainOrder(
            len(self.train_dataset), self.args.per_device_train_batch_size, seed=self.args.seed, position=position,
            stop=stop, rank=self.rank, world_size=self.world_size,
        )  # fmt: skip

    def _loader(self, dataset: Dataset, order: TrainOrder | EvalOrder) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            batch_sampler=order,
            collate_fn=collate if isinstance(dataset, ImageDataset) else stack,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=_ignore_signals,
        )

    def _advance(self) -> bool:
        """Count an update; True if an epoch ended with it."""
        size = len(self.train_dataset)
        before = self.position // size
        self._places[self.state.global_step] = self.position
        self.position += self.global_batch_size
        self.state.global_step += 1
        self.state.epoch = self.position / size
        self.state.total_flos += self._train_flops * self.global_batch_size
        self.watch.lap(self.global_batch_size)
        self.display.advance()
        if self.accelerator.device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record()
        return self.position // size > before

    # -- logging, evaluating, saving -----------------------------------------------------------------------------

    def _log_evaluate_save(self) -> None:
        """What the callbacks asked for after an update. The loss is looked at before anything is kept."""
        if self.state.global_step >= self.max_steps or self.interrupted:
            self.control.should_log |= not self.interrupted
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.watch.pause()
            self._check_finite()
        if self.control.should_log:
            self._log_training()
        if self.control.should_evaluate:
            metrics = self.evaluate()
            self.control.should_save |= self._note_best(metrics)
        if self.control.should_save and self.args.save_strategy != "no" or self.interrupted:
            self.save_checkpoint()
            self.control = self._event("on_save")

    def _check_finite(self) -> None:
        """Raise HFViTError naming the update and its files if a loss or gradient was not finite."""
        bad = int(self.meter.bad_step)
        first = torch.tensor([bad if bad >= 0 else 1 << 62], device=self.accelerator.device)
        step = int(self.accelerator.gather(first).min()) if self.world_size > 1 else int(first)
        if step == 1 << 62:
            self._places.clear()
            return
        names = self._names_of(step) if bad == step else []
        names = gather_object(names) if self.world_size > 1 else names
        kept = disk.checkpoints(self.output_dir)
        way_out = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise HFViTError(
            f"the loss is not finite at update {step + 1} (batch: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}); "
            f"{way_out}. Lower --learning_rate, raise --warmup_steps or set --max_grad_norm 1"
        )

    def _names_of(self, step: int) -> list[str]:
        """The files that this process read for an update."""
        position, size = self._places[step], self.args.per_device_train_batch_size
        order = self._order(position, position + self.global_batch_size)
        names = []
        for number in range(self.args.gradient_accumulation_steps):
            first = position + (number * self.world_size + self.rank) * size
            for key in order.keys(first, size):
                item = self.train_dataset[key]
                names.append(str(item.get("name", item.get("unreadable"))))
        return names

    def _log_training(self) -> None:
        sums = self.meter.sums if self.world_size == 1 else self.accelerator.reduce(self.meter.sums, "sum")
        loss, hits, count = sums.tolist()
        self.meter.reset()
        logs = {"loss": loss / max(count, 1), "accuracy": hits / max(count, 1), "learning_rate": self._rate}
        if self._grad_norm is not None:
            logs["grad_norm"] = float(disk.local(self._grad_norm))
        self.log(logs, self._speed())

    def _speed(self) -> dict[str, float]:
        """What the clock says since the last log."""
        before = self.watch.seconds
        rate, waiting = self.watch.interval()
        left = (self.max_steps - self.state.global_step) * self.global_batch_size
        speed = {
            "images_per_second": rate,
            "data_wait": waiting,
            "memory_peak_bytes": progress.memory_peak(self.accelerator.device),
            "eta_seconds": left / max(rate, 1e-9),
            "interval_seconds": before - self._logged_at,
        }
        self._logged_at = before
        if self._peak is not None and self._train_flops:
            speed["mfu"] = rate * self._train_flops / (self._peak * self.world_size)
        return speed

    def log(self, logs: dict[str, float], speed: dict[str, float] | None = None) -> None:
        """Add a line to the history, the display, the trackers and the callbacks."""
        speed = speed or {}
        logs = {"epoch": self.state.epoch or 0.0, **logs}
        line = {"step": self.state.global_step, **logs}
        self.state.log_history.append(line)
        self.display.show(self.state.global_step, logs, speed)
        if self.accelerator.is_main_process and self._keeping_history:
            with disk.space_needed(self.output_dir):
                progress.append_line(self.output_dir / progress.HISTORY_NAME, line)
                if speed:
                    spent = {"step": self.state.global_step, "seconds": self.watch.seconds, **speed}
                    progress.append_line(self.output_dir / progress.SPEED_NAME, spent)
        self.accelerator.log({**logs, **speed}, step=self.state.global_step)
        self.control = self._event("on_log", logs=dict(logs))

    def evaluate(self, eval_dataset: Dataset | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Score every picture of the evaluation split once.

        Returns:
            `eval_loss`, `eval_accuracy`, `eval_top5_accuracy` (above five classes), and what `compute_metrics` adds.
        """
        dataset = self.eval_dataset if eval_dataset is None else _keyed(eval_dataset)
        if dataset is None:
            raise HFViTError("nothing to evaluate on: give an eval_dataset")
        found = self._evaluate(dataset, keep_outputs=self.compute_metrics is not None)
        metrics = found.metrics(metric_key_prefix)
        if self.compute_metrics is not None:
            extra = self.compute_metrics(EvalPrediction(predictions=found.logits, label_ids=found.labels))
            metrics |= {
                f"{metric_key_prefix}_{name.removeprefix(metric_key_prefix + '_')}": v for name, v in extra.items()
            }
        if eval_dataset is None:
            self.last_evaluation = (self.state.global_step, found)
            self.last_metrics = metrics
        self.log(metrics)
        self.control = self._event("on_evaluate", metrics=metrics)
        return metrics

    def predict(self, test_dataset: Dataset, metric_key_prefix: str = "test") -> PredictionOutput:
        """Logits (N, K), labels (N,) and scores, in the order of the data."""
        found = self._evaluate(_keyed(test_dataset), keep_outputs=True)
        metrics = found.metrics(metric_key_prefix)
        self.control = self._event("on_predict", metrics=metrics)
        return PredictionOutput(found.logits, found.labels, metrics)

    def _evaluate(self, dataset: Dataset, keep_outputs: bool) -> Evaluated:
        order = EvalOrder(
            len(dataset), self.args.per_device_eval_batch_size, rank=self.rank, world_size=self.world_size
        )
        loader = self._loader(dataset, order)
        self.callback_handler.eval_dataloader = loader

        def on_batch() -> None:
            self.control = self._event("on_prediction_step")

        with self.average.applied() if self.average is not None else nullcontext():
            return evaluate(
                self.objective, loader, order, self.accelerator, self._to_device, keep_outputs, on_batch=on_batch
            )

    def _note_best(self, metrics: dict[str, float]) -> bool:
        """Remember the best score; True if it has to be saved."""
        name = self.args.metric_for_best_model
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise HFViTError(f"--metric_for_best_model {name}: evaluation gives {', '.join(metrics)}")
        value, best = metrics[name], self.state.best_metric
        if best is not None and not (value > best if self.args.greater_is_better else value < best):
            return False
        wanted = self.args.load_best_model_at_end or self.args.save_strategy == "best"
        self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        if wanted:
            self.state.best_model_checkpoint = str(self.output_dir / f"checkpoint-{self.state.global_step}")
        return wanted

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """Write `checkpoint-N` aside and rename it; older ones beyond `save_total_limit` go afterwards."""
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        weights = disk.weights_of(self.model)
        tensors, rest = disk.optimizer_state(self.optimizer.optimizer, names)
        average = None
        if self.average is not None:
            average = {name: disk.whole(value) for name, value in zip(self.average.names, self.average.average)}
        sums = self.accelerator.gather(self.meter.sums[None]).tolist()
        unreadable = list(self.unreadable) if self.world_size == 1 else gather_object(list(self.unreadable))
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=self._stateful()).stateful_callbacks
        if self.accelerator.is_main_process:
            with disk.written_aside(folder) as aside:
                self.model.save_pretrained(aside, state_dict=weights)
                if self.image_processor is not None:
                    self.image_processor.save_pretrained(aside)
                disk.write_tensors(aside / "optimizer.safetensors", tensors)
                if average is not None:
                    disk.write_tensors(aside / "ema.safetensors", average)
                self.state.save_to_json(str(aside / "trainer_state.json"))
                disk.write_json(aside / disk.RESUME_NAME, self._resume_facts(rest, sums, unreadable))
            disk.rotate(self.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            if self.args.push_to_hub and self.args.hub_strategy == "every_save":
                self._push(folder)
        self.accelerator.wait_for_everyone()
        return folder

    def _resume_facts(self, optimizer: dict, sums: list, unreadable: list[str]) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "position": self.position,
            "global_batch_size": self.global_batch_size,
            "sums": sums,
            "clock": {"seconds": self.watch.seconds, "waiting": self.watch.waiting, "images": self.watch.images},
            "wall_seconds": time.time() - self._began,
            "data": self._data_identity(),
            "architecture": report.architecture_of(self.model.config),
            "arguments": {
                k: v for k, v in dataclasses.asdict(self.args).items() if k not in ("resume_from_checkpoint",)
            },
            "unreadable": sorted(set(unreadable)),
            "optimizer": optimizer,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _data_identity(self) -> dict[str, Any]:
        """What a resumed run has to find again."""
        data = self.train_dataset
        if not isinstance(data, ImageDataset):
            return {"images": len(data)}
        return {"name": data.name, "split": data.split, "images": len(data), "fingerprint": data.fingerprint,
                "label_names": data.label_names}  # fmt: skip

    def _load_checkpoint(self, folder: Path) -> None:
        """Become what wrote `folder`; refuses other data and another architecture, saying what differs."""
        saved = disk.read_json(folder / disk.RESUME_NAME)
        for what, now in (
            ("architecture", report.architecture_of(self.model.config)),
            ("data", self._data_identity()),
        ):
            changed = disk.differences(saved[what], now)
            if changed:
                raise HFViTError(
                    f"{folder} cannot be resumed, the {what} changed ({changed}); restore it, or start anew in another "
                    "--output_dir"
                )
        disk.set_weights(self.model, disk.read_tensors(folder / "model.safetensors"), folder)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors = disk.read_tensors(folder / "optimizer.safetensors")
        disk.set_optimizer_state(self.optimizer.optimizer, names, tensors, saved["optimizer"])
        self.lr_scheduler.load_state_dict(saved["scheduler"])
        if saved["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            average = disk.read_tensors(folder / "ema.safetensors")
            self.average.average = [
                disk.like(average[name], p) for name, p in zip(self.average.names, self.average.weights)
            ]
        self._load_state(folder, saved)

    def _load_state(self, folder: Path, saved: dict[str, Any]) -> None:
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        state.is_local_process_zero = self.accelerator.is_local_main_process
        state.is_world_process_zero = self.accelerator.is_main_process
        if state.best_model_checkpoint is not None:  # the folder may have moved
            state.best_model_checkpoint = str(self.output_dir / Path(state.best_model_checkpoint).name)
        self.state = state
        self.position = saved["position"]
        rows = torch.tensor(saved["sums"], dtype=self.meter.wide, device=self.accelerator.device)
        same = len(rows) == self.world_size
        mine = rows[self.rank] if same else rows.sum(0) if self.rank == 0 else torch.zeros_like(rows[0])
        self.meter.sums.copy_(mine)
        clock = saved["clock"]
        self.watch.seconds, self.watch.waiting, self.watch.images = clock["seconds"], clock["waiting"], clock["images"]
        self.watch.interval()
        self._logged_at = self.watch.seconds
        self._began -= saved["wall_seconds"]
        self.unreadable = dict.fromkeys(saved["unreadable"]) if self.rank == 0 else {}
        for callback in self._stateful():
            entry = state.stateful_callbacks.get(type(callback).__name__)
            for entry in entry if isinstance(entry, list) else [entry] if entry else []:
                for name, value in {**entry["args"], **entry["attributes"]}.items():
                    setattr(callback, name, value)
        self.control.should_training_stop = False
        arguments = {k: v for k, v in dataclasses.asdict(self.args).items() if k not in ("resume_from_checkpoint",)}
        changed = disk.differences(saved["arguments"], arguments)
        if changed:
            self.display.say(f"resuming with other arguments than the checkpoint's: {changed}")

    # -- beginning and end ---------------------------------------------------------------------------------------

    def _begin(self, resume: str | bool | None) -> None:
        """Check everything that can be checked, then make the output folder."""
        self._check_data()
        folder = disk.find_checkpoint(self.output_dir, resume)
        if not resume and self.output_dir.is_dir() and any(self.output_dir.iterdir()):
            raise HFViTError(
                f"{self.output_dir} is not empty: give another --output_dir, or --resume_from_checkpoint true to go on "
                "from its newest checkpoint"
            )
        self._began, self._keeping_history = time.time(), True
        known = report.is_hf_vit(self.model)
        frozen = not any(p.requires_grad for p in self.model.base_model.parameters()) if known else False
        self._train_flops = train_flops(self.model.config, frozen=frozen) if known else 0
        self._peak = measured_peak(self.accelerator.device, self.precision) if known else None
        if folder is not None:
            self._load_checkpoint(folder)
            self.display.say(f"resuming from {folder}, after update {self.state.global_step} of {self.max_steps}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            progress.write_history(self.output_dir, self.state.log_history)
        self.state.max_steps = self.max_steps
        self.state.num_train_epochs = -(-self.max_steps * self.global_batch_size // len(self.train_dataset))
        self.state.train_batch_size = self.args.per_device_train_batch_size
        self.state.compute_steps(self.args, self.max_steps)
        self.accelerator.init_trackers(
            self.args.run_name or self.output_dir.name, _flat(dataclasses.asdict(self.args))
        )
        self.display.begin(self.state.global_step, self.max_steps)
        self.control = self._event("on_train_begin")

    def _check_data(self) -> None:
        if self.train_dataset is None:
            raise HFViTError("nothing to train on: give a train_dataset")
        size = len(self.train_dataset)
        if self.global_batch_size > size:
            passes = self.args.gradient_accumulation_steps
            raise HFViTError(
                f"a batch of {self.global_batch_size} pictures ({self.args.per_device_train_batch_size} x {passes} passes x "
                f"{self.world_size} processes) is larger than the {size} training pictures; lower "
                f"--per_device_train_batch_size to {max(1, size // (passes * self.world_size))} or less"
            )

    def _finish(self) -> TrainOutput:
        self.watch.pause()
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and not self.interrupted:
            self._load_best(Path(best))
        self.control = self._event("on_train_end")
        self.display.end()
        self._seconds = time.time() - self._began
        self.accelerator.end_training()
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        metrics = {
            "train_runtime": self._seconds,
            "train_samples_per_second": self.watch.images / max(self.watch.seconds, 1e-9),
            "total_flos": self.state.total_flos,
        }
        return TrainOutput(self.state.global_step, losses[-1] if losses else float("nan"), metrics)

    def _load_best(self, folder: Path) -> None:
        disk.set_weights(self.model, disk.read_tensors(folder / "model.safetensors"), folder)
        if self.average is not None:
            average = disk.read_tensors(folder / "ema.safetensors")
            self.average.average = [
                disk.like(average[name], p) for name, p in zip(self.average.names, self.average.weights)
            ]
        if self.state.best_global_step != self.state.global_step:
            self.last_evaluation = None
        self.display.say(f"best evaluated weights: update {self.state.best_global_step}")

    @contextmanager
    def _listening_for_sigterm(self) -> Iterator[None]:
        """SIGTERM ends the run after the current update, with a checkpoint."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame) -> None:
            self._asked_to_stop = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _stop_if_asked(self) -> None:
        """Stop on a signal; with several processes all of them have to learn of it first."""
        asked = self._asked_to_stop
        if self.world_size > 1:
            if self.state.global_step % AGREE_EVERY:
                return
            if asked:
                self.accelerator.set_trigger()
            asked = self.accelerator.check_trigger()
        if asked:
            self.interrupted = self.control.should_training_stop = True

    @contextmanager
    def _memory_advice(self) -> Iterator[None]:
        """Turn running out of memory into the setting that helps."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            text = str(error)
            if isinstance(error, RuntimeError) and "out of memory" not in text and "can't allocate memory" not in text:
                raise
            raise HFViTError(memory_message(self.args)) from error

    # -- what stays ----------------------------------------------------------------------------------------------

    @property
    def precision(self) -> str:
        return {"no": "fp32"}.get(str(self.accelerator.mixed_precision), str(self.accelerator.mixed_precision))

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write weights (the average, if there is one), config, code and processor; each file appears whole."""
        folder = self.output_dir if output_dir is None else Path(output_dir)
        with self.average.applied() if self.average is not None else nullcontext():
            weights = disk.weights_of(self.model)
        if self.accelerator.is_main_process:
            with disk.written_aside(folder / ".finished") as aside:
                self.model.save_pretrained(aside, state_dict=weights)
                if self.image_processor is not None:
                    self.image_processor.save_pretrained(aside)
            disk.publish(folder / ".finished", folder)
        self.accelerator.wait_for_everyone()

    def create_model_card(self, **kwargs) -> dict[str, Any]:
        """Write facts.json, the training curve and the card rendered from them; returns the facts.

        Args:
            kwargs: entries that replace or extend top-level facts.
        """
        unreadable = set(self.unreadable if self.world_size == 1 else gather_object(list(self.unreadable)))
        facts = self.facts(len(unreadable)) | kwargs
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if progress.draw_curve(self.state.log_history, self.output_dir / progress.CURVE_NAME):
                facts["figures"] = [progress.CURVE_NAME]
            report.write_facts(self.output_dir, facts)
            write_card(self.output_dir)
        self.accelerator.wait_for_everyone()
        return facts

    def facts(self, unreadable: int = 0) -> dict[str, Any]:
        """Everything measured about this run; what was not measured is absent."""
        about, data = self.about, self.train_dataset
        name = self.args.hub_model_id or self.output_dir.resolve().name
        facts: dict[str, Any] = {
            "model": report.model_facts(self.model, name, about.get("base_model")),
            "task": "image-classification",
            "data": {**about.get("data", {}), "train_images": len(data), "unreadable_images": unreadable},
            "training": {
                **{k: about[k] for k in ("stage", "recipe", "arguments", "augmentation") if k in about},
                "seed": self.args.seed,
                "steps": self.state.global_step,
                "epochs": self.position / len(data),
                "global_batch_size": self.global_batch_size,
                "seconds": self._seconds,
                "images_per_second": self.watch.images / max(self.watch.seconds, 1e-9),
                "final_loss": next((h["loss"] for h in reversed(self.state.log_history) if "loss" in h), None),
                "data_wait": self.watch.waiting / max(self.watch.seconds, 1e-9),
            },
            "compute": {
                "device_hours": self._seconds * self.world_size / 3600,
                "memory_peak_bytes": progress.memory_peak(self.accelerator.device),
            },
            "results": [],
            "environment": report.environment_facts(self.accelerator, self.precision),
            "history": progress.HISTORY_NAME,
            "figures": [],
        }
        if isinstance(data, ImageDataset):
            facts["data"] |= {"name": data.name, "train_split": data.split, "label_names": data.label_names,
                              "fingerprint": data.fingerprint}  # fmt: skip
        if report.is_hf_vit(self.model):
            facts["compute"]["forward_flops_per_image"] = forward_flops(self.model.config)
            facts["compute"]["train_exaflops"] = self.state.total_flos / 1e18
        if self._peak is not None and self._train_flops:
            rate = facts["training"]["images_per_second"]
            facts["compute"] |= {
                "peak_flops": self._peak,
                "mfu": rate * self._train_flops / (self._peak * self.world_size),
            }
        if self.last_evaluation is not None:
            split = self.eval_dataset.split if isinstance(self.eval_dataset, ImageDataset) else "evaluation"
            where = self.eval_dataset.name if isinstance(self.eval_dataset, ImageDataset) else "evaluation"
            found = self.last_evaluation[1]
            facts["data"] |= {"eval_split": split, "eval_images": len(self.eval_dataset)}
            facts["results"] = report.result_rows(self.last_metrics, where, split, found.count, self.args.seed)
        return facts

    def push_to_hub(self, commit_message: str | None = None) -> str | None:
        """Upload `output_dir` (weights, code, processor, card, facts) and return the address, on the main process."""
        address = None
        if self.accelerator.is_main_process:
            address = self._push(self.output_dir)
        self.accelerator.wait_for_everyone()
        return address

    def _push(self, folder: Path) -> str:
        self.control = self._event("on_push_begin")
        return push_folder(
            folder, self.args.hub_model_id or self.output_dir.resolve().name, private=self.args.hub_private_repo
        )


def create_accelerator(args: TrainArguments) -> Accelerator:
    """The Accelerator of one run.

    Raises:
        HFViTError: a precision that this hardware does not have.
    """
    AcceleratorState._reset_state()  # a second run in one process may use another precision
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp8" if args.fp8 else None
    _check_precision(precision, args)
    backend = args.torch_compile_backend if args.torch_compile else "no"
    options = {"mode": args.torch_compile_mode} if args.torch_compile and args.torch_compile_mode else {}
    return Accelerator(
        cpu=args.use_cpu,
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        dynamo_plugin=TorchDynamoPlugin(backend=backend, **options),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        log_with=chosen_trackers(args.report_to, args.run_name or "", args.output_dir or "") or None,
        project_dir=args.output_dir,
    )


def _check_precision(precision: str | None, args: TrainArguments) -> None:
    gpu = torch.cuda.is_available() and not args.use_cpu
    if precision == "fp16" and not gpu and not torch.backends.mps.is_available():
        raise HFViTError("--fp16 needs a GPU; on this CPU use --bf16, or leave the precision at 32 bits")
    if precision == "bf16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise HFViTError(
            f"{torch.cuda.get_device_name()} has no bfloat16; use --fp16, or leave the precision at 32 bits"
        )
    if precision == "fp8" and not (gpu and torch.cuda.get_device_capability() >= (8, 9)):
        raise HFViTError("--fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper); use --bf16")


def memory_message(args: TrainArguments) -> str:
    """Which setting to lower, in the order that costs least."""
    batch, passes = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if batch > 1:
        return (
            f"out of memory with {batch} pictures in one pass: --per_device_train_batch_size {batch // 2} "
            f"--gradient_accumulation_steps {passes * 2} gives the same training in less memory"
        )
    if not args.activation_checkpointing:
        return "out of memory with one picture in a pass: add --activation_checkpointing"
    return "out of memory with one picture in a pass: lower --image_size, use --bf16, or shard the model with FSDP2 (training/accelerate)"


def _keyed(dataset: Dataset | None) -> Dataset | None:
    return dataset if dataset is None or isinstance(dataset, ImageDataset | KeyedDataset) else KeyedDataset(dataset)


def _normaliser(image_processor, channels: int) -> Normalise:
    """The image processor's numbers; mean and std 0.5, as all of Google's ViTs, without one."""
    if image_processor is None:
        return Normalise([0.5] * channels, [0.5] * channels)
    scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    if not image_processor.do_normalize:
        return Normalise([0.0] * channels, [1.0] * channels, scale)
    return Normalise(list(image_processor.image_mean), list(image_processor.image_std), scale)


def _ignore_signals(worker: int) -> None:
    """A signal to the process group is for the loop, which ends the workers itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """What trackers accept as configuration."""
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()}
