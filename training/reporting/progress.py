"""Progress of a run, on the screen and in files: meter, timer, progress line, history.

For the Trainer. The meter is on the device and is read only when something is logged. history.jsonl holds what depends
only on arguments and data (a resumed run writes the same bytes); times go to speed.jsonl.
"""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_vit.atomic_file import atomic_write

from ..metrics.metric_state import FRACTIONS, top1_hits


HISTORY_NAME, SPEED_NAME = "history.jsonl", "speed.jsonl"
WAITING_HINT = 0.2
LONG_RUN = 20 * 60  # seconds; for a longer run, a recipe is suggested that is MIN_SAVING times as fast
MIN_SAVING = 4
FIRST_SIGN, NEXT_SIGN = 8.0, 28.0  # seconds without output before a sign of life


class Meter:
    """Sums since the last log, on the device: loss, hits, images.

    Args:
        classes: whether labels are classes; several labels or numbers have no hits.
    """

    def __init__(self, device: torch.device, classes: bool = True):
        self.device, self.classes = device, classes
        self.wide = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=self.wide, device=device)

    @torch.no_grad()
    def add(self, losses: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Count one batch; returns the sum of its losses.

        Args:
            losses: (B,). logits, labels: (B, K) and (B,), or soft labels (B, K), whose largest probability is the
                truth; or (B, n, K) and (B, n) for n questions to each image, whose hits are a fraction.
        """
        total = losses.sum(dtype=self.wide)
        if not self.classes:
            self.sums += torch.stack([total, torch.zeros_like(total), torch.full_like(total, len(losses))])
            return total
        truth = labels.argmax(-1) if labels.is_floating_point() else labels
        hits = top1_hits(logits, truth).to(self.wide)  # (B, [n])
        hits = hits if hits.ndim == 1 else hits.mean(dim=1)
        self.sums += torch.stack([total, hits.sum(), torch.full_like(total, len(losses))])
        return total

    def reset(self) -> None:
        self.sums.zero_()


class Timer:
    """Seconds and images of training, without evaluation and checkpoints."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = self.waiting = 0.0
        self.images = 0
        self._mark = time.perf_counter()
        self._interval = (0.0, 0.0, 0)
        self._done: torch.cuda.Event | None = None  # end of the last step on the GPU

    def start(self) -> None:
        """Start, or continue after a pause."""
        self._mark = time.perf_counter()

    def pause(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def lap(self, images: int) -> None:
        """Count a finished step of `images` images."""
        self.pause()
        self.images += images
        if self.device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record()

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Count the time within as waiting for data, unless the GPU is still busy with the last step."""
        began, busy = time.perf_counter(), self._device_is_busy()
        yield
        if not (busy and self._device_is_busy()):
            self.waiting += time.perf_counter() - began

    def _device_is_busy(self) -> bool:
        return self._done is not None and not self._done.query()

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds, "waiting": self.waiting, "images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the measurements of an earlier process."""
        self.seconds, self.waiting, self.images = state["seconds"], state["waiting"], state["images"]
        self._interval = (self.seconds, self.waiting, self.images)

    def interval(self) -> dict[str, float]:
        """`seconds` of training so far; since the last call, seconds, images per second, and fraction of waiting."""
        seconds, waiting, images = self._interval
        self._interval = (self.seconds, self.waiting, self.images)
        spent = max(self.seconds - seconds, 1e-9)
        return {
            "seconds": self.seconds,
            "interval_seconds": spent,
            "images_per_second": (self.images - images) / spent,
            "data_wait": (self.waiting - waiting) / spent,
        }


def memory_peak(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class SignOfLife:
    """Lines that say what a run is doing if there is no progress bar.

    Without them, a long step looks like a run that hangs. Within `with`, a thread writes a line whenever nothing was
    written for a while.

    Args:
        enabled: False on a terminal, which has a progress bar, and on processes that stay silent.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.activity: Callable[[], str] = lambda: "starting"
        self._wake = threading.Event()
        self._began = self._spoken = time.monotonic()
        self._thread: threading.Thread | None = None

    def spoken(self) -> None:
        """Note that something else was just written."""
        self._spoken = time.monotonic()

    def start(self) -> None:
        if self.enabled and self._thread is None:
            self._began = time.monotonic()
            self._thread = threading.Thread(target=self._watch, daemon=True, name="sign of life")
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._wake.set()
            self._thread.join()
            self._thread = None
            self._wake.clear()

    def __enter__(self) -> "SignOfLife":
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def _watch(self) -> None:
        pause = FIRST_SIGN
        while not self._wake.wait(max(0.1, self._spoken + pause - time.monotonic())):
            if time.monotonic() - self._spoken >= pause:
                # not tqdm.write: a data worker that is forked while this thread holds its lock would wait for ever
                print(
                    f"{self.activity()} ({hours_minutes_seconds(time.monotonic() - self._began)})",
                    file=sys.stderr,
                    flush=True,
                )
                self._spoken, pause = time.monotonic(), NEXT_SIGN


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, which shows a progress bar though it is no terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


class Display:
    """A progress bar on a terminal and in a notebook, one line per log elsewhere. Silent unless enabled.

    Where there is no terminal, signs of life come between: the bar of a notebook stands still during a long step.
    """

    def __init__(self, enabled: bool, bar: bool):
        self.enabled = enabled
        terminal = sys.stderr.isatty()
        self.use_bar = enabled and bar and (terminal or in_notebook())
        self.step = self.max_steps = 0
        self.begun = False
        self.sign = SignOfLife(enabled and not (self.use_bar and terminal))
        self.sign.activity = self._activity
        self._evaluated: tuple[int, int] | None = None  # batches done, of how many
        self._bar: tqdm | None = None
        self._hinted = False

    def begin(self, step: int, max_steps: int) -> None:
        self.step, self.max_steps, self.begun = step, max_steps, True
        if self.use_bar:
            self._bar = tqdm(total=max_steps, initial=step, dynamic_ncols=True, unit="step")

    def __enter__(self) -> "Display":
        self.sign.start()
        return self

    def __exit__(self, *error) -> None:
        self.end()

    def advance(self) -> None:
        self.step += 1
        if self._bar is not None:
            self._bar.update(1)
            self.sign.spoken()

    def evaluating(self, batches: int | None, total: int = 0) -> None:
        """Note the finished batches of an evaluation; None: it has ended."""
        self._evaluated = None if batches is None else (batches, total)

    def _activity(self) -> str:
        if self._evaluated is not None:
            return f"evaluating, batch {self._evaluated[0]} of {self._evaluated[1]}"
        if not self.begun:
            return "getting ready: timing a few passes"
        return f"training, step {self.step} of {self.max_steps}" if self.step < self.max_steps else "finishing"

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)
            self.sign.spoken()

    def show(self, step: int, logs: dict[str, Any], speed: dict[str, Any]) -> None:
        """Show one log: scores and speed."""
        if not self.enabled:
            return
        parts = [f"{name.removeprefix('eval_')} {format_number(name, logs[name])}" for name in logs if name != "epoch"]
        if speed:
            parts.append(f"{speed['images_per_second']:,.0f} images/s")
            if "mfu" in speed:
                parts.append(f"MFU {speed['mfu']:.0%}")
            parts.append(f"data wait {speed['data_wait']:.0%}")
            parts.append(f"memory {speed['memory_peak_bytes'] / 2**30:.2f} GiB")
        if self._bar is not None and speed:
            self._bar.set_postfix_str(", ".join(parts))
        else:
            eta = f"  ETA {hours_minutes_seconds(speed['eta_seconds'])}" if speed else ""
            head = "evaluation" if any(name.startswith("eval_") for name in logs) else "step"
            self.log(f"{head} {step}/{self.max_steps}  " + "  ".join(parts) + eta)
        self._hint(speed)

    def _hint(self, speed: dict[str, Any]) -> None:
        if speed and speed["data_wait"] > WAITING_HINT and not self._hinted and speed["interval_seconds"] > 1:
            self._hinted = True
            cores = os.cpu_count()
            self.log(
                f"hint: {speed['data_wait']:.0%} of the time is spent waiting for images; "
                f"raise --dataloader_num_workers (this machine has {cores} cores)"
            )

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self.sign.stop()


def estimate(images_per_second: float, seconds: float, gigabytes: float, probe: float | None) -> str:
    """The expected time of a run, and a cheaper recipe if it is long.

    Args:
        seconds: from now to the end, without evaluations. gigabytes: the process's memory at its peak.
        probe: seconds of the recipe `probe` on the same images; None if it is no alternative.
    """
    remaining = hours_minutes_seconds(seconds)
    text = f"about {images_per_second:,.1f} images/s: {remaining} to the end (h:mm:ss), {gigabytes:.1f} GiB"
    if seconds > LONG_RUN and probe is not None and probe < seconds / MIN_SAVING:
        text += (
            f"; --config probe, a linear head on frozen features, takes about {hours_minutes_seconds(max(probe, 1))}"
        )
    return text


def format_number(name: str, value: float) -> str:
    if "accuracy" in name or name.removeprefix("eval_") in FRACTIONS:
        return f"{value:.2%}"
    return f"{value:.2e}" if name == "learning_rate" else f"{value:.4g}"


def discard(line: str) -> None:
    """A log function for processes that stay silent."""


def hours_minutes_seconds(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def write_history(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Replace history.jsonl: a resumed run continues the history of its checkpoint."""
    atomic_write(folder / HISTORY_NAME, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))


def append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, sort_keys=True) + "\n")


def two_columns(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
