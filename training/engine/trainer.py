"""The training loop, over Accelerate, with the interface of transformers.Trainer.

    trainer = Trainer(model, TrainArguments(output_dir="out", max_steps=500), train_dataset, eval_dataset, processor)
    trainer.train(resume_from_checkpoint=True)

transformers' own callbacks (TrainerCallback, EarlyStoppingCallback, ...) run in it unchanged. It is not a subclass:
transformers' loop turns soft labels into binary problems and decays norms and position embeddings.

Every random draw is a function of (seed, step, process), and the order of the data of (seed, position). A checkpoint
therefore stores two numbers, and a resumed run equals the uninterrupted one, bit for bit, with any number of workers.
"""

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_token
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import EvalPrediction, PredictionOutput, TrainOutput

from hf_vit.atomic_file import full_disk_is_an_error
from hf_vit.errors import HFViTError
from hf_vit.hub.upload import push_folder
from hf_vit.image_processing import ImageProcessing, input_size
from hf_vit.problem_type import SINGLE_LABEL, problem_type_of
from hf_vit.transformers_classifiers import num_channels

from ..config.arguments import MASKED_PATCHES, TrainArguments
from ..data.dataset import check_problem_type
from ..data.mixup import MixupCutmix
from ..data.normalize import Normalize
from ..data.samplers import keyed
from ..metrics.metric_state import Metrics
from ..metrics.outcomes import Outcomes
from ..reporting import attention_examples, facts, progress
from ..reporting.flops import measured_peak
from .accelerator import create_accelerator, memory_advice
from .checkpoints import checkpoint_io, save_outputs
from .checkpoints.output_folder import checkpoint_to_resume, locked
from .checkpoints.resume import resume_run
from .checkpoints.resume_check import RunIdentity
from .checkpoints.run_checkpoints import RunCheckpoints
from .checkpoints.run_lock import RunLock
from .checkpoints.trainer_state import TrainingState
from .cpu_kernels import MAX_SMALL_PASS, CPUKernels, bfloat16_note, kernels_for
from .dataloaders import Batches
from .device_inputs import DeviceInputs
from .distributed import all_ranks, raise_on_all_ranks
from .ema import WeightAverage
from .evaluation_loop import Evaluator
from .losses import create_loss_module
from .nan_check import FiniteCheck
from .optimizers import averaged_by, create_optimizer
from .planning.auto_batch_size import fit_batch_size
from .planning.lr_schedules import create_scheduler
from .planning.run_timing import RunTiming
from .planning.schedule import TrainingSchedule, with_accumulation_steps
from .planning.time_plan import TimePlan
from .planning.trial import Passes
from .preemption import StopRequest
from .run_log import RunLog
from .trackers import flat
from .train_step import TrainStep


class Trainer:
    """Trains and evaluates an image classifier.

    Args:
        model: any network whose `model(pixel_values).logits` are the outputs to train.
        args: the hyperparameters of the run.
        train_dataset, eval_dataset: `training.data.ImageDataset` with a transform (for training also
            `training.data.shards.streaming.ImageStream`), or any map-style dataset of {"pixel_values": uint8 or
            normalized float (C, H, W), "labels": int}.
        image_processor: saved with the weights; its mean and std normalize uint8 images on the device.
        compute_metrics: `EvalPrediction -> dict`, in addition to loss, accuracy and top-5 accuracy.
        callbacks: transformers' TrainerCallback instances or classes.
        optimizers: (optimizer, scheduler) in place of those that `args` name.
        about: entries for the facts that the Trainer cannot know: stage, recipe, base_model, arguments, augmentation.
        started: `time.monotonic()` at which the run began, from which `args.time_limit` counts; None: now.
        loading: seconds from then on in which Python was loaded, where the process is to end within the limit.
    """

    # -- construction ------------------------------------------------------------------------------------------------

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
        started: float | None = None,
        loading: float = 0.0,
    ):
        self.started, self.loading = time.monotonic() if started is None else started, loading
        masked = args.loss == MASKED_PATCHES
        self.problem_type = SINGLE_LABEL if masked else problem_type_of(model.config)
        args = with_accumulation_steps(args.for_problem(self.problem_type))
        self.model, self.args, self.image_processor = model, args, image_processor
        self.train_dataset, self.eval_dataset = keyed(train_dataset), keyed(eval_dataset)
        self.compute_metrics, self.about = compute_metrics, about or {}
        if not masked:
            for dataset in (self.train_dataset, self.eval_dataset):
                check_problem_type(dataset, self.problem_type)
        attention_examples.check_attention_examples(args.card_examples, model, self.eval_dataset, image_processor)
        self.accelerator = create_accelerator(args)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        device, config = self.accelerator.device, model.config
        if args.activation_checkpointing:
            # gradient_checkpointing_enable: its name before transformers 5.23
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()

        self.normalize = Normalize.of(image_processor, num_channels(config))
        processing = image_processor and ImageProcessing.from_transformers(image_processor.to_dict())
        self.image_size = input_size(config, processing)  # height, width
        optimizer, scheduler = optimizers
        # Network and loss as one module: DDP and FSDP gather and reduce around its forward, torch.compile sees one
        # graph.
        self.loss_module, self.optimizer = self.accelerator.prepare(
            create_loss_module(model, args, self.normalize, self.train_dataset),
            optimizer or create_optimizer(model, args),
        )
        self.kernels = kernels_for(device, args.cpu_kernels, args.torch_compile)
        images = None if self.train_dataset is None else len(self.train_dataset)
        self.schedule = TrainingSchedule(args, config, images, self.world_size)
        if args.time_limit is not None and scheduler is not None:
            raise HFViTError("--time_limit fits the schedule of the arguments: leave out the scheduler that was given")
        # Not prepared: Accelerate would step it once for each process.
        self.lr_scheduler = scheduler or create_scheduler(
            self.optimizer.optimizer, args, self.schedule.length, self.schedule.epoch, self.schedule.scheduled
        )

        # The callbacks see Accelerate's optimizer, the state below the plain one, whose tensors a checkpoint holds.
        self.control = TrainerControl()
        # early stopping is transformers' callback, which keeps its count in checkpoints
        early_stopping = [] if args.patience is None else [EarlyStoppingCallback(args.patience)]
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *early_stopping, *(callbacks or [])],
            model,
            image_processor,
            self.optimizer,
            self.lr_scheduler,
        )
        self.training_state = TrainingState(
            model=model,
            optimizer=self.optimizer.optimizer,
            scheduler=self.lr_scheduler,
            meter=progress.Meter(device, classes=self.problem_type == SINGLE_LABEL),
            timer=progress.Timer(device),
            trainer_state=TrainerState(
                is_local_process_zero=self.accelerator.is_local_main_process,
                is_world_process_zero=self.accelerator.is_main_process,
                stateful_callbacks=self._stateful_callbacks(),
            ),
            callbacks=self._stateful_callbacks(),
            scaler=self.accelerator.scaler,
            ema=WeightAverage(model, args.ema_decay) if args.ema_decay else None,
            rates_from_arguments=optimizer is None and scheduler is None,
        )
        self._event("on_init_end")

        self.display = progress.Display(self.accelerator.is_main_process, not args.disable_tqdm)
        self.run_log = RunLog(self.accelerator, self.display)
        self.checkpoints = RunCheckpoints(args.save_total_limit, args.async_save, self.display.log)
        self.stop_request, self.interrupted = StopRequest(self.accelerator), False
        mixes = args.mixup_alpha or args.cutmix_alpha
        self.inputs = DeviceInputs(
            self.normalize,
            MixupCutmix(args.mixup_alpha, args.cutmix_alpha, config.num_labels, args.seed) if mixes else None,
            self.schedule,
            (num_channels(config), *self.image_size),
            None if self.problem_type == SINGLE_LABEL else config.num_labels,
            device,
            self._note_unreadable,
        )
        self.batches = Batches(
            self.train_dataset, args, self.schedule, self.accelerator, self.callback_handler, self.timer
        )
        self.finite = FiniteCheck(self.accelerator, self.batches)
        self.train_step = TrainStep(
            args, self.accelerator, self.loss_module, self.optimizer, self.training_state, self.schedule, self.inputs,
            self.kernels, self.batches, self.finite, self.stop_request, self._event,
        )  # fmt: skip
        self.evaluator = Evaluator(
            self.loss_module, config, self.problem_type, args, self.accelerator, self.inputs, self.display,
            self.callback_handler, self.averaged, lambda: self._event("on_prediction_step"),
        )  # fmt: skip
        self.lock: RunLock | None = None
        self.reports = args.report and not masked
        self.timing = RunTiming(
            model, self.loss_module, self.accelerator, self.kernels, self.inputs, self.schedule, self.train_dataset,
            self.eval_dataset, self.timer, self.display, self.problem_type, self.reports, self.about.get("base_model"),
        )  # fmt: skip
        self.seconds = 0.0
        self.last_outputs: tuple[np.ndarray, np.ndarray] | None = None  # of the last evaluation, if they are kept
        self._counts: Metrics | None = None  # of the last evaluation, if this process made it
        self.outcomes: Outcomes | None = None  # of each image of it, if the run will be reported
        self._best_is_loaded = False

    @property
    def output_dir(self) -> Path:
        if self.args.output_dir is None:
            raise HFViTError("--output_dir is missing: give the folder for the results")
        return Path(self.args.output_dir)

    @property
    def name(self) -> str:
        """Name of the model: its repository, or its folder."""
        return self.args.hub_model_id or self.output_dir.resolve().name

    @property
    def precision(self) -> str:
        mixed = str(self.accelerator.mixed_precision)
        return "fp32" if mixed == "no" else mixed

    @property
    def max_steps(self) -> int:
        """Steps of the run; a time limit may change them on the way."""
        return self.schedule.max_steps

    @property
    def global_batch_size(self) -> int:
        """Images of the present step, over all processes and accumulation steps."""
        return self.schedule.stage_of(self.state.global_step).images

    @property
    def state(self) -> TrainerState:
        """transformers' state of the run, as callbacks get it."""
        return self.training_state.trainer_state

    @property
    def position(self) -> int:
        """Images seen so far, as a position in the endless sequence of epochs."""
        return self.training_state.position

    @property
    def timer(self) -> progress.Timer:
        return self.training_state.timer

    @property
    def time_plan(self) -> TimePlan | None:
        """The plan of `args.time_limit`, from the beginning of the training on; None without a limit."""
        return self.timing.plan

    @property
    def last_evaluation(self) -> tuple[int, dict[str, float], int] | None:
        """Step, metrics and images of the last evaluation."""
        return self.training_state.last_evaluation

    @property
    def unreadable(self) -> dict[str, None]:
        """Names of the images that this process could not read, in the order in which they came."""
        return self.training_state.unreadable

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add one of transformers' callbacks, or one of the same interface."""
        self.callback_handler.add_callback(callback)

    def _event(self, name: str, **kwargs) -> None:
        """Call every callback; they answer in `self.control`."""
        self.control = getattr(self.callback_handler, name)(self.args, self.state, self.control, **kwargs)

    def _stateful_callbacks(self) -> list[ExportableState]:
        """What checkpoints keep of the callbacks: those with a state, and the control flags."""
        return [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train from the start, or from a checkpoint as if there had been no interruption.

        Args:
            resume_from_checkpoint: path of a checkpoint, or True for the newest complete one of `output_dir` (from
                the start if there is none). None takes `args.resume_from_checkpoint`.

        Raises:
            HFViTError: bad input; a loss that is not finite; out of memory; the disk is full.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with all_ranks():
            self._check_data()
        # Outermost: torch reports a killed data worker from a signal handler, wherever the loop is at that moment.
        with memory_advice(lambda: self.args), self.output_folder_lock(), self.display, self.checkpoints.writing():
            self._begin(resume)
            with self.stop_request.listening():
                self._loop()
            return self._end()

    def output_folder_lock(self) -> AbstractContextManager[None]:
        """Keep other runs out of the output folder; may be entered again within itself.

        Raises:
            HFViTError: another run is at work there.
        """
        self.lock = self.lock or RunLock(self.output_dir)
        return locked(self.lock)

    def first_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The run's first micro-batch: normalized images (B, C, H, W), and labels (B,), or (B, K) if mixed."""
        self._check_data()
        batch = next(self.batches.steps(0, 0))[0]
        raise_on_all_ranks(self.batches.error)
        return self.inputs(batch, 0)

    def _check_data(self) -> None:
        if self.train_dataset is None:
            raise HFViTError("nothing to train on: give a train_dataset")
        self.schedule.check(self.train_dataset)
        if self.train_step.unfreezing is not None:
            self.train_step.unfreezing.check(self.max_steps)

    def _begin(self, resume: str | bool | None) -> None:
        """Check everything that can be checked, then prepare the output folder and restore the state of the run."""
        with all_ranks():  # hours of training must not end at a missing token
            if self.args.push_to_hub and get_token() is None:
                raise HFViTError("--push_to_hub needs a Hugging Face token: run `hf auth login`, or set HF_TOKEN")
        folder = checkpoint_to_resume(self.output_dir, resume)
        self.run_log.begin(self.output_dir, measured_peak(self.accelerator.device, self.precision))
        self.training_state.began = time.time()
        self.timing.begin(self.args, self.image_size, self.started, self.loading)
        resumed = folder is not None and self._resume(folder, resume == checkpoint_io.NEWEST_INTACT)
        self.run_log.flops_logged = self.state.total_flos
        low_on_cpu = self.precision == "bf16" and self.accelerator.device.type == "cpu"
        if low_on_cpu and self.accelerator.is_main_process and (note := bfloat16_note(self.args.cpu_kernels)):
            self.display.log(note)
        with all_ranks(), full_disk_is_an_error(self.output_dir, checkpoint_io.advice(self.output_dir)):
            if self.accelerator.is_main_process:
                checkpoint_io.remove_old_checkpoints(
                    self.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint
                )
                # Rewritten: a killed run may have logged steps after the checkpoint, which are now taken again.
                progress.write_history(self.output_dir, self.state.log_history)
        if self.args.auto_batch_size and not resumed and self.max_steps:
            self._find_batch_size()
        self._check_kernels()
        # What transformers' callbacks read: intervals below 1 become fractions of the run in compute_steps.
        self.state.max_steps = self.max_steps
        self.state.num_train_epochs = math.ceil(self.schedule.images_after(0) / len(self.train_dataset))
        self.state.train_batch_size = self.args.per_device_train_batch_size
        self.state.compute_steps(self.args, self.max_steps)
        self.accelerator.init_trackers(self.args.run_name or self.name, flat(dataclasses.asdict(self.args)))
        self.timing.before_first_step(
            self.args, self.state.global_step, self.position, self.output_dir, self.normalize, self.image_processor
        )
        self.state.max_steps = self.max_steps
        self.display.begin(self.state.global_step, self.max_steps)
        self._event("on_train_begin")
        if self.args.eval_on_start and self.eval_dataset is not None and self.state.global_step == 0:
            with self.timing.measuring("evaluation"):
                save = self.training_state.note_best(self.evaluate(), self.args)
            if save:
                self.save_checkpoint()

    def _resume(self, folder: Path, set_damaged_aside: bool) -> bool:
        """Restore a checkpoint, or the newest intact one before it if it is damaged and may be set aside.

        Returns:
            False if there is no intact checkpoint.

        Raises:
            HFViTError: the checkpoint is damaged, or of another run; the message says what differs.
        """
        checkpoint = self.checkpoints.read(folder, set_damaged_aside)
        if checkpoint is not None:
            folder, saved = checkpoint
            if self.args.auto_batch_size:
                self._find_batch_size(saved["counters"]["arguments"])
            self.training_state.callbacks = self._stateful_callbacks()
            resume_run(
                self.training_state, saved, folder, self.output_dir, self._identity(), self.schedule, self.time_plan,
                self.display.log,
            )  # fmt: skip
            self.control.should_training_stop = False  # a checkpoint at the end of an interrupted run holds True
        return checkpoint is not None

    def _identity(self) -> RunIdentity:
        """What a checkpoint of this run has to be resumed with."""
        architecture = facts.architecture_of(self.model.config)
        other = self.about.get("arguments", {})
        return RunIdentity.of(self.train_dataset, self.eval_dataset, architecture, self.args, other)

    def _find_batch_size(self, saved: dict[str, Any] | None = None) -> None:
        """Take the largest micro-batch that fits, or that of a checkpoint's arguments, for the same steps."""
        network = self.accelerator.unwrap_model(self.loss_module, keep_torch_compile=False)
        sizes = (stage.image_size or self.image_size for stage in self.schedule.stages)
        passes = Passes(network, self.accelerator, self.kernels, *self.inputs.blank(max(sizes, key=math.prod)))
        log = self.display.log
        self.args = self.evaluator.args = fit_batch_size(self.args, self.schedule, self.model, passes, log, saved)

    def _check_kernels(self) -> None:
        """Leave out the CPU kernels if small passes take longer with them, by a measurement of this machine."""
        stage = self.schedule.stage_of(0)  # also of a resumed run, which has to compute the same
        flops = stage.batch_size * (self.timing.flops_of[stage.image_size] or math.inf)
        if not isinstance(self.kernels, CPUKernels) or self.world_size > 1 or flops > MAX_SMALL_PASS:
            return
        network, size = self.accelerator.unwrap_model(self.loss_module), stage.image_size or self.image_size
        passes = Passes(network, self.accelerator, self.kernels, *self.inputs.blank(size))
        shapes = repr([(name, tuple(p.shape)) for name, p in network.named_parameters()])
        self.kernels.disable_if_slower(
            (hashlib.sha256(shapes.encode()).hexdigest()[:16], stage.batch_size, tuple(size), self.precision),
            lambda: passes.train(stage.batch_size, measured_kernels=False),
            lambda: passes.train(stage.batch_size),
        )

    def _loop(self) -> None:
        """Step after step, until the end of the run, a callback or a signal."""
        while self.state.global_step < self.max_steps and not self.control.should_training_stop:
            self._event("on_epoch_begin")
            for micro_batches in self.batches.steps(self.state.global_step, self.position):
                self._event("on_step_begin")
                self.train_step(micro_batches)
                epoch_ended = self._advance()
                stages_changed = self.timing.after_step(self.state.global_step)
                self.state.max_steps = self.display.max_steps = self.max_steps  # a time limit may have changed them
                self._event("on_step_end")
                if epoch_ended:
                    self._event("on_epoch_end")
                if self.checkpoints.failed:  # on a full disk, say; the next checkpoint or the end raises the error
                    self.stop_request.request()
                if self.stop_request.requested(self.state.global_step):
                    self.interrupted = self.control.should_training_stop = True
                self._log_evaluate_save()
                if self.control.should_training_stop:
                    break
                if self.control.should_epoch_stop:
                    self.training_state.position = self.batches.next_epoch(self.position)
                    break
                if epoch_ended:
                    self._event("on_epoch_begin")
                if stages_changed:  # the loader has read ahead for the old stages
                    break
                self.timer.start()

    def _advance(self) -> bool:
        """Count a step; True if an epoch ended with it."""
        size, before, stage = len(self.train_dataset), self.position, self.schedule.stage_of(self.state.global_step)
        self.training_state.position += stage.images
        self.state.global_step += 1
        self.state.epoch = self.position / size
        self.state.total_flos += self.timing.flops_of[stage.image_size] * stage.images
        self.timer.lap(stage.images)
        self.display.advance()
        return self.position // size > before // size

    def _note_unreadable(self, name: str) -> None:
        if name not in self.unreadable:
            self.unreadable[name] = None
            self.display.log(f"skipped: {name}")

    def _log_evaluate_save(self) -> None:
        """Do what the callbacks asked for after a step. The loss is checked before anything is kept."""
        at_end = self.state.global_step >= self.max_steps
        self.control.should_log |= at_end
        if not self.interrupted:
            self.timing.adjust(self.control, self.args, at_end)
        save = self.control.should_save
        if self.control.should_log or self.control.should_evaluate or save or self.interrupted:
            self.finite.check(self.output_dir)  # waits for the device; that time still counts as training
            self.timer.pause()
        if self.control.should_log:
            self._log_training()
        if self.control.should_evaluate:
            with self.timing.measuring("evaluation"):
                metrics = self.evaluate()
            save |= self.training_state.note_best(metrics, self.args)
        if save or self.interrupted:
            with self.timing.measuring("saving"):
                self.save_checkpoint()
            self._event("on_save")

    def _log_training(self) -> None:
        # Each rank has summed up its own images since the last line.
        loss, hits, count = self.accelerator.reduce(self.training_state.meter.sums, "sum").tolist()
        self.training_state.meter.reset()
        logs = {"loss": loss / max(count, 1)}
        if self.problem_type == SINGLE_LABEL:
            logs["accuracy"] = hits / max(count, 1)
        logs["learning_rate"] = self.train_step.learning_rate
        if self.train_step.grad_norm is not None:
            logs["grad_norm"] = float(self.train_step.grad_norm)
        left = self.schedule.images_after(self.state.global_step)
        self.log(logs, self.run_log.speed(self.timer, left, self.state.total_flos))

    def log(self, logs: dict[str, float], speed: dict[str, float] | None = None) -> None:
        """Add a line to the history, the display, the trackers and the callbacks.

        Args:
            logs: reproducible numbers, functions of arguments and data alone. speed: times and rates.
        """
        self.run_log.add(self.state, logs, speed or {})
        self._event("on_log", logs=dict(logs))  # a copy, since callbacks may add to it

    def _end(self) -> TrainOutput:
        self.checkpoints.finish()
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and not self.interrupted:
            # The weights alone: optimizer and counters stay those of the last step.
            self.training_state.load_weights(checkpoint_io.read_training_checkpoint(Path(best)))
            self._best_is_loaded, self.training_state.last_evaluation = True, None
            self.display.log(f"best evaluated weights: those of step {self.state.best_global_step}")
        self._event("on_train_end")
        self.seconds = time.time() - self.training_state.began
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        metrics = {
            "train_runtime": self.seconds,
            "train_samples_per_second": self.timer.images / max(self.timer.seconds, 1e-9),
            "total_flos": self.state.total_flos,
        }
        return TrainOutput(self.state.global_step, losses[-1] if losses else math.nan, metrics)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Dataset | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Score every image of the evaluation split once.

        Returns:
            `eval_loss`, `eval_accuracy`, `eval_top5_accuracy` (above five classes), and what `compute_metrics` adds.
            For several labels `eval_mean_average_precision`, `eval_macro_f1`, `eval_micro_f1`; for numbers `eval_r2`,
            `eval_mae`, `eval_rmse`.
        """
        dataset = self.eval_dataset if eval_dataset is None else keyed(eval_dataset)
        if dataset is None:
            raise HFViTError("nothing to evaluate on: give an eval_dataset")
        evaluated = self.evaluator.run(
            dataset, keep_outputs=self.compute_metrics is not None, keep_outcomes=self.reports and eval_dataset is None
        )
        metrics = evaluated.metrics(metric_key_prefix, self.compute_metrics)
        if eval_dataset is None:
            self.training_state.last_evaluation = (self.state.global_step, metrics, evaluated.count)
            self.last_outputs = None if evaluated.logits is None else (evaluated.logits, evaluated.labels)
            self._counts, self.outcomes = evaluated.counts, evaluated.outcomes
        if not self._best_is_loaded:  # the best weights belong to an earlier step, whose line is there already
            self.log(metrics)
        self._event("on_evaluate", metrics=metrics)
        return metrics

    def predict(self, test_dataset: Dataset, metric_key_prefix: str = "test") -> PredictionOutput:
        """Logits (N, K), labels (N,) and scores, in the order of the data."""
        evaluated = self.evaluator.run(keyed(test_dataset), keep_outputs=True)
        metrics = evaluated.metrics(metric_key_prefix, self.compute_metrics)
        self._event("on_predict", metrics=metrics)
        return PredictionOutput(evaluated.logits, evaluated.labels, metrics)

    def tune_thresholds(self) -> int:
        """Set `config.label_thresholds` to those with the highest F1 on the evaluation images; returns their number.

        The scores at these thresholds replace those of the last evaluation.
        """
        if self.last_outputs is None:
            self.evaluate()
        assert self.last_outputs is not None and self.last_evaluation is not None
        step, metrics, count = self.last_evaluation
        scores = self.evaluator.tune_thresholds(*self.last_outputs)
        metrics = metrics | {f"eval_{name}": value for name, value in scores.items()}
        self.training_state.last_evaluation = (step, metrics, count)
        return count

    def averaged(self) -> AbstractContextManager[None]:
        """Let the model hold the average of its weights, if one is kept."""
        ema = self.training_state.ema
        return averaged_by(self.optimizer.optimizer) if ema is None else ema.applied()

    # -- saving ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """Write `checkpoint-N`, whole or not at all; then remove older ones beyond `save_total_limit`.

        With `async_save` it is written while the next steps are taken.
        """
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        self.training_state.callbacks = self._stateful_callbacks()
        counters = self._identity().as_dict() | {"global_batch_size": self.global_batch_size}
        if self.time_plan is not None:
            counters["time_plan"] = self.time_plan.state_dict()
        write_model = functools.partial(
            save_outputs.write_model, model=self.model, image_processor=self.image_processor, to_resume=True
        )
        self.checkpoints.write(folder, self.training_state, counters, write_model)
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            self.checkpoints.finish()
            self._push_midway(folder if self.args.hub_strategy == "checkpoint" else None)
        return folder

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write weights (their average, if one is kept), config, code and processor; each file appears whole."""
        folder = self.output_dir if output_dir is None else Path(output_dir)
        with self.averaged():
            save_outputs.save_model(folder, self.model, self.image_processor)

    def create_model_card(self, **entries) -> dict[str, Any]:
        """Write facts.json, the training curve and the card rendered from them; returns the facts.

        Args:
            entries: top-level facts to add or replace.
        """
        unreadable = sorted(self.training_state.all_unreadable())
        last = self.last_evaluation
        classes = self.problem_type == SINGLE_LABEL
        missing = (classes and self._counts is None) or (self.reports and self.outcomes is None)
        if missing and last is not None and last[0] == self.state.global_step:
            # The run was resumed at its end: checkpoints hold the evaluation's scores, but not its counts.
            evaluated = self.evaluator.run(self.eval_dataset, keep_outcomes=self.reports)
            self._counts, self.outcomes = evaluated.counts, evaluated.outcomes
        with self.averaged():
            return save_outputs.write_facts_and_card(
                self.output_dir, self._record(len(unreadable)), entries, self._counts, unreadable, self.normalize,
                self.image_processor,
            )  # fmt: skip

    def _record(self, unreadable: int) -> facts.RunRecord:
        return facts.RunRecord(
            model=self.model,
            name=self.name,
            image_size=self.image_size,
            args=self.args,
            about=self.about,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            accelerator=self.accelerator,
            precision=self.precision,
            trainer_state=self.state,
            timer=self.timer,
            position=self.position,
            global_batch_size=self.global_batch_size,
            seconds=self.seconds,
            peak_flops=self.run_log.peak_flops,
            last_evaluation=self.last_evaluation,
            unreadable=unreadable,
            argument_changes=self.training_state.argument_changes,
            intervals=None if self._counts is None else self._counts.intervals(),
            time_plan=None if self.time_plan is None else self.time_plan.facts(),
        )

    def push_to_hub(self, checkpoint: Path | None = None, **kwargs) -> str | None:
        """Upload `output_dir` (weights, code, processor, card, facts); returns its address on the main process.

        Args:
            checkpoint: folder to upload with it as `last-checkpoint/`.
            kwargs: further arguments of `hf_vit.hub.push_folder`.
        """
        self._event("on_push_begin")
        if not self.accelerator.is_main_process:
            return None
        private = self.args.hub_private_repo
        return push_folder(self.output_dir, self.name, private=private, checkpoint=checkpoint, **kwargs)

    def _push_midway(self, checkpoint: Path | None) -> None:
        """Upload the unfinished run as a complete model with its card.

        Args:
            checkpoint: folder to upload with it, for whoever wants to continue the training.
        """
        self.seconds = time.time() - self.training_state.began
        self.save_model()
        measured = self.last_evaluation is not None and self.last_evaluation[0] == self.state.global_step
        self.create_model_card(**({} if measured else {"results": []}))
        try:
            self.push_to_hub(checkpoint, attempts=2)
        except HFViTError as error:  # the network is no reason to stop; the end of the run uploads again
            self.display.log(f"not uploaded: {error}")
