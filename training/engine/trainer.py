"""The loop: a visible one, over Accelerate, with the surface of transformers.Trainer.

    trainer = Trainer(model, TrainArguments(output_dir="out", max_steps=500), train_dataset, eval_dataset, processor)
    trainer.train(resume_from_checkpoint=True)

transformers' own callbacks (TrainerCallback, EarlyStoppingCallback, ...) run in it unchanged. It is not a subclass:
transformers' loop turns soft labels into binary problems and decays norms and position embeddings.

Every random draw is a function of (seed, update, process), the order of the data of (seed, position): so a checkpoint
remembers two numbers, and a resumed run is the uninterrupted one, bit for bit, with any number of workers.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from torch.utils.data import Dataset
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
from hf_vit.hub.upload import push_folder

from ..config.arguments import TrainArguments
from ..data.samplers import EvalOrder, keyed, seed_draw
from ..data.transforms import Mixing
from ..reporting import attention_examples, progress
from ..reporting import facts as report
from ..reporting.flops import measured_peak
from . import checkpoint_io as disk
from . import save_outputs, trainer_state
from .accelerator import create_accelerator, memory_advice
from .cpu_kernels import bfloat16_note, kernels_for
from .dataloaders import Batches, loader_of
from .distributed import raise_together, together
from .ema import WeightAverage
from .evaluation_loop import Evaluated, evaluate
from .losses import Normalise, create_objective
from .nan_check import FiniteCheck, nothing_readable
from .optimizers import GradualUnfreezing, averaged_by, create_optimizer, create_scheduler
from .preemption import StopRequest
from .schedule import Plan, with_passes
from .trackers import CSVTracker, flat


class Trainer:
    """Trains and evaluates an image classifier.

    Args:
        model: `model(pixel_values).logits` is all that is asked of it.
        args: the numbers of the run.
        train_dataset, eval_dataset: `training.data.ImageDataset` with a transform (for training also
            `training.data.streaming.ImageStream`), or any map-style dataset of {"pixel_values": uint8 or
            normalised float (C, H, W), "labels": int}.
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
            # gradient_checkpointing_enable: its name before transformers 5.23
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        optimizer, scheduler = optimizers
        self.normalise = Normalise.of(image_processor, model.config.num_channels)
        self.objective, self.optimizer = self.accelerator.prepare(
            create_objective(model, args, self.normalise), optimizer or create_optimizer(model, args)
        )
        self._parameters = list(self.objective.parameters())
        self.kernels = kernels_for(self.accelerator.device, args.cpu_kernels, args.torch_compile)
        data, config = self.train_dataset, model.config
        self.plan = Plan(args, config, None if data is None else len(data), self.world_size)
        self.max_steps = self.plan.max_steps
        self.lr_scheduler = scheduler or create_scheduler(
            self.optimizer.optimizer, args, self.max_steps, self.plan.epoch
        )
        every = self.plan.updates_of("unfreeze_every")
        self.unfreezing = GradualUnfreezing(self.objective, every) if every else None
        self.average = WeightAverage(model, args.ema_decay) if args.ema_decay else None
        mixes = args.mixup_alpha or args.cutmix_alpha
        self.mixing = Mixing(args.mixup_alpha, args.cutmix_alpha, config.num_labels, args.seed) if mixes else None
        self.mixing_ends = self.max_steps - self.plan.updates_of("mixing_off")
        device = self.accelerator.device
        self.meter, self.watch = progress.Meter(device), progress.Stopwatch(device)
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
        self._grad_norm: torch.Tensor | None = None
        self._begin_callbacks(callbacks or [])
        self.batches = Batches(
            data, args, self.plan, self.rank, self.world_size, device, self.callback_handler, self.watch
        )
        self.finite = FiniteCheck(self.accelerator, self.batches)

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
        return self.plan.stage_of(self.state.global_step).pictures

    def _begin_callbacks(self, callbacks: list) -> None:
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *callbacks], self.model, self.image_processor, self.optimizer, self.lr_scheduler
        )
        self.state = TrainerState(
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
            stateful_callbacks=trainer_state.stateful(self),
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
                for batches in self.batches.updates(self.state.global_step, self.position):
                    self.control = self._event("on_step_begin")
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
                        self.position = self.batches.next_epoch(self.position)
                        break
                    if epoch_ended:
                        self.control = self._event("on_epoch_begin")
                    self.watch.start()
        return self._end()

    def first_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The run's first forward pass: normalised pictures (B, C, H, W), and labels (B,), or (B, K) where mixed."""
        self._check_data()
        batch = next(self.batches.updates(0, 0))[0]
        raise_together(self.batches.error)
        return self._to_device(batch, 0)

    def _update(self, batches: list[dict]) -> None:
        """One optimizer step over the batches of its passes, equal to one large batch."""
        step, passes = self.state.global_step, len(batches)
        most = max(stage.passes for stage in self.plan.stages)
        self.finite.begin(step, self.position)
        count = self._count(batches)
        self.accelerator.gradient_accumulation_steps, self.accelerator.step = passes, 0
        if not self.objective.training:
            self.objective.train()
        for number, batch in enumerate(batches):
            draw = step * most + number
            seed_draw(self.args.seed, draw, self.rank, self.accelerator.device)
            with self.accelerator.accumulate(self.objective):
                pixel_values, labels = self._to_device(batch, step)
                with self.kernels:
                    found = self.objective(pixel_values, labels)
                    losses, logits, labels = (part[: len(batch["labels"])] for part in found)
                    # Accelerate divides by the passes and averages over the processes: the mean over all remains.
                    self.accelerator.backward(losses.sum() * (passes * self.world_size) / count)
                self.finite.see(self.meter.add(losses.detach(), logits.detach(), labels), step)
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
                self.finite.see(self._grad_norm, step)
        self.control = self._event("on_pre_optimizer_step")

    def _count(self, batches: list[dict]) -> int | torch.Tensor:
        """Pictures of this update over all processes: what the sum of the losses is divided by."""
        count, step = sum(len(batch["labels"]) for batch in batches), self.state.global_step
        if self.world_size > 1:
            total = self.accelerator.reduce(torch.tensor(float(count), device=self.accelerator.device), "sum")
            self.finite.see(1 / total, step)
            if self.batches.error is not None:
                self.finite.see(torch.full_like(total, math.nan), step)
                self.stop_request.make()
            return total.clamp(min=1)
        if not count:
            raise HFViTError(nothing_readable(step, [name for batch in batches for name in batch["unreadable"]]))
        return count

    def _to_device(self, batch: dict, step: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised pictures and labels on the device; mixed if it is a batch of update `step`, all of one weight."""
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
        if step is not None and self.mixing is not None and step < self.mixing_ends:
            pixel_values, labels = self.mixing(pixel_values, labels, step)
        return pixel_values, labels

    def _advance(self) -> bool:
        """Count an update; True if an epoch ended with it."""
        size, before, stage = len(self.train_dataset), self.position, self.plan.stage_of(self.state.global_step)
        self.position += stage.pictures
        self.state.global_step += 1
        self.state.epoch = self.position / size
        self.state.total_flos += self._flops_of[stage.image_size] * stage.pictures
        self.watch.lap(stage.pictures)
        self.display.advance()
        return self.position // size > before // size

    # -- logging, evaluating, saving ---------------------------------------------------------------------------------

    def _log_evaluate_save(self) -> None:
        """What the callbacks asked for after an update. The loss is looked at before anything is kept."""
        self.control.should_log |= self.state.global_step >= self.max_steps
        save = self.control.should_save
        if self.control.should_log or self.control.should_evaluate or save or self.interrupted:
            self.finite.check(self.output_dir)  # waits for the device, whose time counts
            self.watch.pause()
        if self.control.should_log:
            self._log_training()
        if self.control.should_evaluate:
            save |= self._note_best(self.evaluate())
        if save or self.interrupted:
            self.save_checkpoint()
            self.control = self._event("on_save")

    def _log_training(self) -> None:
        loss, hits, count = self.accelerator.reduce(self.meter.sums, "sum").tolist()
        self.meter.reset()
        logs = {"loss": loss / max(count, 1), "accuracy": hits / max(count, 1), "learning_rate": self._rate}
        if self._grad_norm is not None:
            logs["grad_norm"] = float(self._grad_norm)
        self.log(logs, self._speed())

    def _speed(self) -> dict[str, float]:
        """What the clock says since the last log."""
        speed = self.watch.interval()
        left = self.plan.pictures_after(self.state.global_step)
        speed["eta_seconds"] = left / max(speed["images_per_second"], 1e-9)
        speed["memory_peak_bytes"] = progress.memory_peak(self.accelerator.device)
        flops, self._flops_logged = self.state.total_flos - self._flops_logged, self.state.total_flos
        if self.peak is not None:
            speed["mfu"] = flops / (speed["interval_seconds"] * self.peak * self.world_size)
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
        metrics = found.metrics(metric_key_prefix, self.compute_metrics)
        if eval_dataset is None:
            self.last_evaluation = (self.state.global_step, metrics, found.count)
        if not self._best_is_loaded:  # those weights belong to an earlier update, which has its line
            self.log(metrics)
        self.control = self._event("on_evaluate", metrics=metrics)
        return metrics

    def predict(self, test_dataset: Dataset, metric_key_prefix: str = "test") -> PredictionOutput:
        """Logits (N, K), labels (N,) and scores, in the order of the data."""
        found = self._evaluate(keyed(test_dataset), keep_outputs=True)
        metrics = found.metrics(metric_key_prefix, self.compute_metrics)
        self.control = self._event("on_predict", metrics=metrics)
        return PredictionOutput(found.logits, found.labels, metrics)

    def _evaluate(self, dataset: Dataset, keep_outputs: bool) -> Evaluated:
        size = self.args.per_device_eval_batch_size
        order = EvalOrder(len(dataset), size, rank=self.rank, world_size=self.world_size)
        loader = loader_of(dataset, order, self.args, self.accelerator.device)
        self.callback_handler.eval_dataloader = loader

        def on_batch() -> None:
            self.control = self._event("on_prediction_step")

        with self.averaged(), memory_advice(self.args, evaluating=True):
            return evaluate(self.objective, loader, order, self.accelerator, self._to_device, keep_outputs, on_batch)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the model holds the average of its weights, if one is kept."""
        return averaged_by(self.optimizer.optimizer) if self.average is None else self.average.applied()

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
        trainer_state.save(self, folder)
        with together():
            if self.accelerator.is_main_process:
                disk.rotate(self.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            save_outputs.push_midway(self, folder if self.args.hub_strategy == "checkpoint" else None)
        return folder

    # -- beginning and end -------------------------------------------------------------------------------------------

    def _begin(self, resume: str | bool | None) -> None:
        """Check everything that can be checked, then make the output folder."""
        with together():
            self._check_data()
            folder = disk.find_checkpoint(self.output_dir, resume)
            if not resume and self.output_dir.is_dir() and any(self.output_dir.iterdir()):
                raise HFViTError(
                    f"{self.output_dir} is not empty: give another --output_dir, or --resume_from_checkpoint true to "
                    "go on from its newest checkpoint"
                )
            if self.args.push_to_hub and get_token() is None:
                raise HFViTError("--push_to_hub needs a Hugging Face token: run `hf auth login`, or set HF_TOKEN")
        trainer_state.refuse_different(self, folder)
        self.began, self._keeping_history = time.time(), True
        sizes = {stage.image_size for stage in self.plan.stages}
        self._flops_of = {size: report.picture_flops(self.model, self.args, size) for size in sizes}
        if report.is_hf_vit(self.model):
            self.peak = measured_peak(self.accelerator.device, self.precision)
        if folder is not None:
            trainer_state.load(self, folder)
            self.display.say(f"resuming from {folder}, after update {self.state.global_step} of {self.max_steps}")
        self._flops_logged = self.state.total_flos
        low_on_cpu = self.precision == "bf16" and self.accelerator.device.type == "cpu"
        if low_on_cpu and self.accelerator.is_main_process and (note := bfloat16_note(self.args.cpu_kernels)):
            self.display.say(note)
        with together(), disk.space_needed(self.output_dir):
            if self.accelerator.is_main_process:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                disk.sweep(self.output_dir)
                disk.rotate(self.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
                progress.write_history(self.output_dir, self.state.log_history)
        self.state.max_steps = self.max_steps
        self.state.num_train_epochs = math.ceil(self.plan.pictures_after(0) / len(self.train_dataset))
        self.state.train_batch_size = self.args.per_device_train_batch_size
        self.state.compute_steps(self.args, self.max_steps)
        self.accelerator.init_trackers(self.args.run_name or self.name, flat(dataclasses.asdict(self.args)))
        for tracker in self.accelerator.trackers:
            if isinstance(tracker, CSVTracker):
                tracker.forget_after(self.state.global_step)
        self.display.begin(self.state.global_step, self.max_steps)
        self.control = self._event("on_train_begin")

    def _check_data(self) -> None:
        if self.train_dataset is None:
            raise HFViTError("nothing to train on: give a train_dataset")
        self.plan.check(self.train_dataset)
        if self.unfreezing is not None:
            self.unfreezing.check(self.max_steps)

    def _end(self) -> TrainOutput:
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and not self.interrupted:
            trainer_state.load_weights(self, Path(best))
            self._best_is_loaded, self.last_evaluation = True, None
            self.display.say(f"best evaluated weights: those of update {self.state.best_global_step}")
        self.control = self._event("on_train_end")
        self.display.end()
        self.seconds = time.time() - self.began
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        metrics = {
            "train_runtime": self.seconds,
            "train_samples_per_second": self.watch.images / max(self.watch.seconds, 1e-9),
            "total_flos": self.state.total_flos,
        }
        return TrainOutput(self.state.global_step, losses[-1] if losses else math.nan, metrics)

    # -- what stays --------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write weights (their average, if one is kept), config, code and processor; each file appears whole."""
        save_outputs.save_model(self, self.output_dir if output_dir is None else Path(output_dir))

    def create_model_card(self, **entries) -> dict[str, Any]:
        """Write facts.json, the training curve and the card rendered from them; returns the facts.

        Args:
            entries: top-level facts to add or replace.
        """
        return save_outputs.write_facts_and_card(self, entries)

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
