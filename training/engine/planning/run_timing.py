"""The time of a run: measured before the first step, logged, and fitted into a time limit.

For the Trainer. time_plan.py plans, run_estimate.py predicts, trial.py measures; they get what they need here.

Tests: tests/training/engine/planning/test_time_plan.py.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerControl

from ...config.arguments import TrainArguments
from ...data.normalize import Normalize
from ...reporting.facts import image_flops
from ...reporting.progress import Display, Timer
from ...reporting.rehearsal import rehearse_finish
from ..device_inputs import DeviceInputs
from .run_estimate import CHECKPOINT_COPIES, RunEstimate, probe_is_alternative
from .schedule import TrainingSchedule
from .time_plan import TimePlan, saving_seconds
from .trial import Passes, try_out, untouched


class RunTiming:
    """Measures, predicts and limits the time of a run.

    Args:
        loss_module, kernels, inputs: those of training, for the passes that are timed.
        schedule: of the run, which a time limit changes. timer: of the training steps.
        reports: whether a report follows the training. base_model: name of the pre-trained model, or None.

    Attributes:
        plan: of `args.time_limit`, from `begin` on; None without a limit.
        flops_of: training on one image of each stage's size, from `begin` on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss_module: nn.Module,
        accelerator: Accelerator,
        kernels: AbstractContextManager,
        inputs: DeviceInputs,
        schedule: TrainingSchedule,
        train_dataset: Any,
        eval_dataset: Any,
        timer: Timer,
        display: Display,
        problem_type: str,
        reports: bool,
        base_model: str | None,
    ):
        self.model, self.loss_module, self.accelerator, self.kernels = model, loss_module, accelerator, kernels
        self.inputs, self.schedule, self.display = inputs, schedule, display
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.problem_type, self.reports, self.base_model = problem_type, reports, base_model
        self.estimate = RunEstimate(schedule, timer, accelerator.device, display.log)
        self.plan: TimePlan | None = None
        self.flops_of: dict[tuple[int, int] | None, int] = {}

    def begin(self, args: TrainArguments, image_size: tuple[int, int], started: float, loading: float) -> None:
        """Count FLOPs, and make the plan of a time limit; before a checkpoint is resumed, which restores the plan.

        Args:
            image_size: of the model. started, loading: as in `TimePlan`.
        """
        sizes = {stage.image_size for stage in self.schedule.stages}
        self.flops_of = {size: image_flops(self.model, args, size or image_size) for size in sizes}
        if args.time_limit is not None:
            self.plan = TimePlan.of_run(
                args, self.schedule, self.flops_of, len(self.train_dataset),
                evaluates=self.eval_dataset is not None, device=self.accelerator.device, log=self.display.log,
                started=started, loading=loading,
            )  # fmt: skip

    def before_first_step(
        self, args: TrainArguments, step: int, position: int, folder: Path, normalize: Normalize, image_processor: Any
    ) -> None:
        """Time a few passes, and from them fit the run into its limit and log what it will take.

        Args:
            step, position: of the run, which may be a resumed one. folder: for checkpoints.
            normalize, image_processor: for a rehearsal of card and report.
        """
        devices, workers = self.accelerator.num_processes, args.dataloader_num_workers

        def passes_of(batch: dict) -> Passes:
            inputs = self.inputs(batch | {"unreadable": []}, step)  # the run itself reports unreadable images
            return Passes(self.loss_module, self.accelerator, self.kernels, *inputs)

        trial, stage = None, self.schedule.stage_of(step)
        eval_images = 0 if self.eval_dataset is None else len(self.eval_dataset)
        if self.schedule.max_steps:
            trial = try_out(passes_of, self.train_dataset, self.eval_dataset, args, stage, position)
        parameters = list(self.loss_module.parameters())
        if self.plan is not None:
            if self.plan.finishing is None:  # else the run goes on with what an earlier process measured
                saving = saving_seconds(folder, CHECKPOINT_COPIES * sum(p.nbytes for p in parameters))
                self.plan.expect(saving, self.finish_seconds(args.card_examples, normalize, image_processor))
            self.plan.begin(step, trial, eval_images, workers, devices)
        if trial is not None:
            trained = sum(p.nbytes for p in parameters if p.requires_grad)
            probe = probe_is_alternative(self.model, args, self.base_model)
            probe_images = len(self.train_dataset) + eval_images if probe else None
            self.estimate.begin(step, trial, devices, workers, trained, probe_images)

    def finish_seconds(self, examples: int, normalize: Normalize, image_processor: Any) -> float:
        """Seconds of card and report, rehearsed by the main process; the plan is its, and the others wait for it."""
        if not self.accelerator.is_main_process:
            return 0.0
        with untouched(self.loss_module, self.accelerator.device):
            finish = rehearse_finish(
                self.model, self.eval_dataset, normalize, image_processor, self.problem_type, self.reports, examples,
            )  # fmt: skip
        return finish.total(examples, self.reports)

    def after_step(self, step: int) -> bool:
        """Count a step, and fit the rest of the schedule into a time limit; True if its stages have changed."""
        self.estimate.after_step(step)
        return self.plan is not None and self.plan.after_step(step)

    def adjust(self, control: TrainerControl, args: TrainArguments, at_end: bool) -> None:
        """Change what the callbacks asked for after a step to what a time limit allows."""
        if self.plan is None or self.eval_dataset is None:
            return
        # where the limit ends the run, those are the weights that the whole schedule made
        control.should_evaluate |= at_end and args.eval_strategy != "no"
        if control.should_evaluate:
            control.should_evaluate = self.plan.allows_evaluation(last=at_end)
        if args.save_strategy == "steps":
            control.should_save |= self.plan.save_is_due()

    def measuring(self, name: str) -> AbstractContextManager[None]:
        """Count the time within it as "evaluation" or "saving", not as training."""
        return nullcontext() if self.plan is None else self.plan.measuring(name)
