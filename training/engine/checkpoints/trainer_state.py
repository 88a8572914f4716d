"""The state of a run in one object, which checkpoints save and resumed runs restore.

It holds no generator's state: the order of images, dropout and mixup are functions of (seed, position), and `position`
is the state of the sampler. checkpoint_io.py writes and reads what `state_dict` returns; resume_check.py decides
whether a run may be resumed from a checkpoint.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import nn
from transformers.trainer_callback import ExportableState, TrainerState

from hf_vit.errors import HFViTError

from ...config.arguments import TrainArguments
from ...reporting.progress import Meter, Timer
from ..ema import WeightAverage
from .full_tensors import full, model_weights, optimizer_state, set_model_weights, set_optimizer_state, shard_like


@dataclasses.dataclass
class TrainingState:
    """Model, optimizer, schedule, average and counters of a run.

    Attributes:
        model, optimizer: not wrapped by Accelerate; weights may be sharded.
        scheduler: of the learning rate. scaler: of float16's loss, or None. ema: average of the weights, or None.
        meter: sums since the last log. timer: of the training steps.
        trainer_state: transformers' step, epoch, history and best metric. callbacks: those with a state.
        rates_from_arguments: optimizer and scheduler were built from this run's arguments, whose rates, decay and
            schedule stay in force after loading; False for objects that the caller built.
        position: images seen so far, as a position in the endless sequence of epochs.
        last_evaluation: step, metrics, number of images.
        unreadable: names of unreadable images, each once, in the order in which they came.
        began: `time.time()` at which the run would have begun without interruptions.
        argument_changes: for every resume with other arguments, the step and what changed.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    meter: Meter
    timer: Timer
    trainer_state: TrainerState
    callbacks: list[ExportableState]
    scaler: Any = None
    ema: WeightAverage | None = None
    rates_from_arguments: bool = True
    position: int = 0
    last_evaluation: tuple[int, dict[str, float], int] | None = None
    unreadable: dict[str, None] = dataclasses.field(default_factory=dict)
    began: float = dataclasses.field(default_factory=time.time)
    argument_changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def state_dict(self, copies: bool = False) -> dict[str, Any]:
        """Tensors of model, optimizer and average by name, and the rest ready for JSON.

        Every process has to call it; only the main one's tensors are complete.

        Args:
            copies: copy tensors that are on the CPU already, because steps are taken before they are written.
        """
        main = PartialState().is_main_process
        tensors, optimizer = optimizer_state(self.optimizer, self._names(), main, copies)
        ema = self.ema
        # transformers' TrainerState exports the callbacks' state in its constructor.
        exported = TrainerState(stateful_callbacks=self.callbacks).stateful_callbacks
        return {
            "model": model_weights(self.model, main, copies),
            "optimizer": tensors,
            "ema": None if ema is None else {n: full(v, main, copies) for n, v in zip(ema.names, ema.average)},
            "trainer_state": dataclasses.asdict(dataclasses.replace(self.trainer_state, stateful_callbacks=exported)),
            "counters": {
                "position": self.position,
                # of each rank: a resume on as many ranks continues them exactly
                "sums": gather(self.meter.sums[None]).tolist(),
                "last_evaluation": self.last_evaluation,
                "clock": self.timer.state_dict(),
                "wall_seconds": time.time() - self.began,
                "unreadable": self.all_unreadable(),
                "optimizer": optimizer,
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "argument_changes": self.argument_changes,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on any number of processes.

        Raises:
            HFViTError: another architecture, optimizer, or set of trained parameters.
        """
        counters = state["counters"]
        self.load_weights(state)
        keep_rates = not self.rates_from_arguments
        set_optimizer_state(self.optimizer, self._names(), state["optimizer"], counters["optimizer"], keep_rates)
        self._load_schedule(counters["scheduler"])
        if counters["scaler"] is not None and self.scaler is not None:
            self.scaler.load_state_dict(counters["scaler"])
        process = PartialState()
        self.trainer_state = TrainerState(**state["trainer_state"])
        self.trainer_state.is_local_process_zero = process.is_local_main_process
        self.trainer_state.is_world_process_zero = process.is_main_process
        self.position = counters["position"]
        sums = torch.tensor(counters["sums"], dtype=self.meter.sums.dtype, device=self.meter.sums.device)
        if len(sums) == process.num_processes:
            self.meter.sums.copy_(sums[process.process_index])
        else:  # another number of processes: the first one takes the sums of all
            self.meter.sums.copy_(sums.sum(0) if process.is_main_process else torch.zeros_like(sums[0]))
        last = counters["last_evaluation"]
        self.last_evaluation = None if last is None else tuple(last)
        self.timer.load_state_dict(counters["clock"])
        self.began = time.time() - counters["wall_seconds"]  # the time between two processes does not count
        self.unreadable = dict.fromkeys(counters["unreadable"]) if process.is_main_process else {}
        self.argument_changes = list(counters.get("argument_changes", []))
        self._load_callbacks(self.trainer_state.stateful_callbacks)

    def load_weights(self, state: dict[str, Any]) -> None:
        """Restore the weights of a checkpoint, and their average."""
        set_model_weights(self.model, state["model"])
        if self.ema is not None:
            saved = state["ema"] or {}
            if set(saved) != set(self.ema.names):
                raise HFViTError("the checkpoint holds no average of these weights: restore --ema_decay")
            self.ema.average = [shard_like(saved[name], p) for name, p in zip(self.ema.names, self.ema.weights)]

    def all_unreadable(self) -> list[str]:
        """Names of unreadable images, over all processes; every process has to call it."""
        names = list(self.unreadable)
        return names if PartialState().num_processes == 1 else sorted(set(gather_object(names)))

    def note_best(self, metrics: dict[str, float], args: TrainArguments) -> bool:
        """Remember the best score; True if a checkpoint of its weights has to be saved."""
        name = "eval_" + args.metric_for_best_model.removeprefix("eval_")
        if name not in metrics:
            raise HFViTError(f"--metric_for_best_model {name}: evaluation gives {', '.join(metrics)}")
        state = self.trainer_state
        value, best = metrics[name], state.best_metric
        if best is not None and not (value > best if args.greater_is_better else value < best):
            return False
        state.best_metric, state.best_global_step = value, state.global_step
        if args.load_best_model_at_end or args.save_strategy == "best":
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
            return True
        return False

    def find_best_again(self, output_dir: Path, resumed_from: Path) -> None:
        """Look for the best checkpoint again: its folder may have moved, or the run continues in another one."""
        best = self.trainer_state.best_model_checkpoint
        if best is not None:
            recorded = Path(best)  # as the checkpoint names it
            candidates = (output_dir / recorded.name, resumed_from.parent / recorded.name, recorded)
            self.trainer_state.best_model_checkpoint = str(
                next((path for path in candidates if path.is_dir()), candidates[0])
            )

    def _load_schedule(self, saved: dict[str, Any]) -> None:
        """Continue at the checkpoint's step, on this run's own schedule if its arguments made it."""
        if not self.rates_from_arguments:
            self.scheduler.load_state_dict(saved)
            return
        # LambdaLR.load_state_dict would restore the old base rates, and leave the old rate in the groups for a step.
        scheduler = self.scheduler
        scheduler.last_epoch, scheduler._step_count = saved["last_epoch"], saved["_step_count"]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def _load_callbacks(self, saved: dict[str, Any]) -> None:
        """Restore the state of each callback; several of one class in their order."""
        waiting = {name: list(entry) if isinstance(entry, list) else [entry] for name, entry in saved.items()}
        for callback in self.callbacks:
            entries = waiting.get(type(callback).__name__)
            if entries:
                entry = entries.pop(0)
                for name, value in {**entry["args"], **entry["attributes"]}.items():
                    setattr(callback, name, value)

    def _names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}
