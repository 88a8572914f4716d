"""What a run shows while it goes, and what it leaves to look at: meter, stopwatch, progress line, history, curve.

For the Trainer. The meter lives on the device and is read only when something is logged. history.jsonl holds what is a
function of arguments and data (a resumed run writes the same bytes); what the clock measured goes to speed.jsonl.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from hf_vit import HFViTForImageClassification
from hf_vit.interpretability.attention import position_similarity
from hf_vit.interpretability.plots import draw_position_similarity


HISTORY_NAME, SPEED_NAME, CURVE_NAME = "history.jsonl", "speed.jsonl", "training_curve.png"
POSITIONS_NAME = "position_embedding_similarity.png"
WAITING_HINT = 0.2


class Meter:
    """Sums since the last log, on the device: loss, hits, pictures."""

    def __init__(self, device: torch.device):
        self.device = device
        self.wide = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=self.wide, device=device)

    @torch.no_grad()
    def add(self, losses: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Count one batch; returns the sum of its losses.

        Args:
            losses: (B,). logits, labels: (B, K) and (B,), or soft labels (B, K), whose largest share is the truth; or
                (B, n, K) and (B, n) for n questions to each picture, whose hits are a share.
        """
        truth = labels.argmax(-1) if labels.is_floating_point() else labels
        total = losses.sum(dtype=self.wide)
        hits = (logits.argmax(-1) == truth).to(self.wide)  # (B, [n])
        hits = hits if hits.ndim == 1 else hits.mean(dim=1)
        self.sums += torch.stack([total, hits.sum(), torch.full_like(total, len(losses))])
        return total

    def reset(self) -> None:
        self.sums.zero_()


class Stopwatch:
    """Seconds and pictures of training proper, without evaluation and checkpoints."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = self.waiting = 0.0
        self.images = 0
        self._mark = time.perf_counter()
        self._interval = (0.0, 0.0, 0)
        self._done: torch.cuda.Event | None = None  # end of the last update on the GPU

    def start(self) -> None:
        """Begin, or go on after a pause."""
        self._mark = time.perf_counter()

    def pause(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def lap(self, images: int) -> None:
        """An update of `images` pictures is done."""
        self.pause()
        self.images += images
        if self.device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record()

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Time within it goes by in waiting for data; it costs nothing while the GPU works on the last update."""
        began, busy = time.perf_counter(), self._device_is_busy()
        yield
        if not (busy and self._device_is_busy()):
            self.waiting += time.perf_counter() - began

    def _device_is_busy(self) -> bool:
        return self._done is not None and not self._done.query()

    def recall(self, seconds: float, waiting: float, images: int) -> None:
        """Go on from what an earlier process had measured."""
        self.seconds, self.waiting, self.images = seconds, waiting, images
        self._interval = (seconds, waiting, images)

    def interval(self) -> dict[str, float]:
        """`seconds` of training up to now; since the last call, seconds, pictures per second and share of waiting."""
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


class Display:
    """One progress bar on a terminal; elsewhere one line for each log. Silent where it is not enabled."""

    def __init__(self, enabled: bool, bar: bool):
        self.enabled = enabled
        self.use_bar = enabled and bar and sys.stderr.isatty()
        self.max_steps = 0
        self._bar: tqdm | None = None
        self._hinted = False

    def begin(self, step: int, max_steps: int) -> None:
        self.max_steps = max_steps
        if self.use_bar:
            self._bar = tqdm(total=max_steps, initial=step, dynamic_ncols=True, unit="update")

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def show(self, step: int, logs: dict[str, Any], speed: dict[str, Any]) -> None:
        """Show one log: what was learned, and how fast."""
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
            eta = f"  ETA {clock(speed['eta_seconds'])}" if speed else ""
            head = "evaluation" if any(name.startswith("eval_") for name in logs) else "step"
            self.say(f"{head} {step}/{self.max_steps}  " + "  ".join(parts) + eta)
        self._hint(speed)

    def _hint(self, speed: dict[str, Any]) -> None:
        if speed and speed["data_wait"] > WAITING_HINT and not self._hinted and speed["interval_seconds"] > 1:
            self._hinted = True
            cores = os.cpu_count()
            self.say(
                f"hint: {speed['data_wait']:.0%} of the time goes into waiting for pictures; "
                f"raise --dataloader_num_workers (this machine has {cores} cores)"
            )

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def format_number(name: str, value: float) -> str:
    if "accuracy" in name:
        return f"{value:.2%}"
    return f"{value:.2e}" if name == "learning_rate" else f"{value:.4g}"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def write_history(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Replace history.jsonl: on a resume, what the checkpoint knows is what counts."""
    aside = folder / f".{HISTORY_NAME}"
    aside.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines), encoding="utf-8")
    os.replace(aside, folder / HISTORY_NAME)


def append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, sort_keys=True) + "\n")


def draw_positions(model: HFViTForImageClassification, path: Path) -> bool:
    """Draw how alike the position embeddings are (paper, Figure 7).

    False for a model without a table of them, and for one whose table is spread over processes.
    """
    table = model.base_model.embeddings.position_embeddings
    if table is None or isinstance(table, DTensor):
        return False
    figure = draw_position_similarity(position_similarity(model).cpu().numpy())
    figure.savefig(path, facecolor="white", metadata={"Software": None})
    return True


def draw_curve(history: list[dict[str, Any]], path: Path) -> bool:
    """Draw loss and accuracy over the updates, training and evaluation; False if there is nothing to draw."""
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    drawn = False
    for axis, name in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        for key, label, style in ((name, "training", "-"), (f"eval_{name}", "evaluation", "o-")):
            points = [(line["step"], line[key]) for line in history if key in line]
            if points:
                axis.plot(*zip(*points), style, label=label, markersize=3, linewidth=1.4)
                drawn = True
        axis.set_xlabel("update")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    if drawn:
        figure.savefig(path, metadata={"Software": None})
    return drawn


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
