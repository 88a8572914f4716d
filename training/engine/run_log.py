"""Where the lines of a run go: the history, the file of speeds, the display and the trackers.

For the Trainer. What is a function of arguments and data stands in history.jsonl, what the clock said in speed.jsonl:
the first is the same in a resumed run, bit for bit.

Tests: tests/training/engine/test_trainer.py.
"""

from pathlib import Path

from accelerate import Accelerator
from transformers.trainer_callback import TrainerState

from hf_vit.atomic_file import full_disk_is_an_error

from ..reporting import progress
from .checkpoints import checkpoint_io


class RunLog:
    """Logs a run; writes files once it has begun.

    Attributes:
        peak_flops: of the device, or None where it is not known. flops_logged: of the run, up to the last line.
    """

    def __init__(self, accelerator: Accelerator, display: progress.Display):
        self.accelerator, self.display = accelerator, display
        self.folder: Path | None = None
        self.peak_flops: float | None = None
        self.flops_logged = 0.0

    def begin(self, folder: Path, peak_flops: float | None) -> None:
        """From here on, keep the lines in `folder`: an evaluation without a run leaves no files."""
        self.folder, self.peak_flops = folder, peak_flops

    def add(self, state: TrainerState, logs: dict[str, float], speed: dict[str, float]) -> None:
        """Add a line.

        Args:
            logs: what is a function of arguments and data. speed: what the clock said, or nothing.
        """
        line = {"step": state.global_step, "epoch": state.epoch or 0.0, **logs}
        state.log_history.append(line)
        self.display.show(state.global_step, logs, speed)
        if self.accelerator.is_main_process and self.folder is not None:
            with full_disk_is_an_error(self.folder, checkpoint_io.advice(self.folder)):
                progress.append_line(self.folder / progress.HISTORY_NAME, line)
                if speed:
                    progress.append_line(self.folder / progress.SPEED_NAME, {"step": line["step"], **speed})
        self.accelerator.log({**logs, **speed}, step=state.global_step)

    def speed(self, timer: progress.Timer, images_left: int, flops: float) -> dict[str, float]:
        """What the clock says since the last line.

        Args:
            images_left: to train on. flops: of the run so far.
        """
        speed = timer.interval()
        speed["eta_seconds"] = images_left / max(speed["images_per_second"], 1e-9)
        speed["memory_peak_bytes"] = progress.memory_peak(self.accelerator.device)
        since, self.flops_logged = flops - self.flops_logged, flops
        if self.peak_flops is not None:
            available = speed["interval_seconds"] * self.peak_flops * self.accelerator.num_processes
            speed["mfu"] = since / available
        return speed
