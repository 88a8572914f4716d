"""Where the numbers of a run also go: Accelerate's trackers by name, and a CSV file.

For the Trainer. `--report_to tensorboard csv`.
"""

import csv
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers, on_main_process

from hf_vit.errors import HFViTError


class CSVTracker(GeneralTracker):
    """Appends `step, name, value` lines to metrics.csv; long form, since different steps log different names."""

    name = "csv"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str):
        super().__init__()
        self.path = Path(logging_dir) / "metrics.csv"

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def forget_after(self, step: int) -> None:
        """Drop what an interrupted run wrote beyond the checkpoint that it is resumed from."""
        if self.path.exists():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if "\n" in line]
            kept = [line for line in lines if not line[:1].isdigit() or int(line.split(",", 1)[0]) <= step]
            self.path.write_text("".join(kept), encoding="utf-8")  # without a line that was being written

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        """The configuration is in the output folder already."""

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "name", "value"])
            writer.writerows([step, name, value] for name, value in values.items())


def chosen_trackers(names: list[str], run_name: str, logging_dir: str) -> list:
    """What `Accelerator(log_with=...)` takes for these names.

    Raises:
        HFViTError: an unknown tracker, or one whose package is not installed.
    """
    wanted = [name for name in names if name != "none"]
    known = {str(name): name for name in LOGGER_TYPE_TO_CLASS}
    available = {str(name) for name in get_available_trackers()}
    for name in wanted:
        if name != "csv" and name not in known:
            raise HFViTError(f"--report_to {name}: choose from none, csv, {', '.join(sorted(known))}")
        if name != "csv" and name not in available:
            raise HFViTError(f"--report_to {name} needs its package: pip install {name}, or use --report_to csv")
    return [CSVTracker(run_name, logging_dir) if name == "csv" else name for name in wanted]


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """What trackers accept as a run's configuration."""
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in values.items()
    }
