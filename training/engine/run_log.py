"""The log of a run: history.jsonl, speed.jsonl, the display and the trackers.

For the Trainer. Losses and scores, which depend on arguments and data alone, go to history.jsonl; a resumed run writes
the same bytes. Times and rates go to speed.jsonl.

Tests: tests/training/engine/test_trainer.py.
"""

from pathlib import Path

from accelerate import Accelerator
from transformers.trainer_callback import TrainerState

from hf_vit.atomic_file import full_disk_is_an_error

from ..reporting import progress
from .checkpoints import checkpoint_io


class RunLog:
    """Logs a run, into files from `begin` on.

    Attributes:
        peak_flops: FLOP/s of the device; None if unknown. flops_logged: FLOPs of the run up to the last line.
    """

    def __init__(self, accelerator: Accelerator, display: progress.Display):
        self.accelerator, self.display = accelerator, display
        self.folder: Path | None = None
        self.peak_flops: float | None = None
        self.flops_logged = 0.0

    def begin(self, folder: Path, peak_flops: float | None) -> None:
        """Write lines to `folder` from now on; an evaluation without training leaves no files."""
        self.folder, self.peak_flops = folder, peak_flops

    def add(self, state: TrainerState, logs: dict[str, float], speed: dict[str, float]) -> None:
        """Add a line.

        Args:
            logs: reproducible numbers. speed: times and rates; may be empty.
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
        """Times and rates since the last line.

        Args:
            images_left: images until the end of the run. flops: of the run so far.
        """
        speed = timer.interval()
        speed["eta_seconds"] = images_left / max(speed["images_per_second"], 1e-9)
        speed["memory_peak_bytes"] = progress.memory_peak(self.accelerator.device)
        since, self.flops_logged = flops - self.flops_logged, flops
        if self.peak_flops is not None:
            available = speed["interval_seconds"] * self.peak_flops * self.accelerator.num_processes
            speed["mfu"] = since / available
        return speed
