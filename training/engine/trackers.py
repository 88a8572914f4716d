"""Accelerate's trackers, by name (`--report_to tensorboard`).

For the Trainer. `history.jsonl` and `speed.jsonl` in the output folder hold the same numbers without any tracker.
"""

from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from hf_vit.errors import HFViTError


def check_trackers(names: list[str]) -> list[str]:
    """The names for `Accelerator(log_with=...)`, checked.

    Raises:
        HFViTError: an unknown tracker, or one whose package is not installed.
    """
    requested = [name for name in names if name != "none"]
    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    available = {str(name) for name in get_available_trackers()}
    for name in requested:
        if name == "csv":  # a tracker of version 0.1.0
            raise HFViTError("--report_to csv: history.jsonl in the output folder has these numbers; leave it out")
        if name not in known:
            raise HFViTError(f"--report_to {name}: choose from none, {', '.join(sorted(known))}")
        if name not in available:
            raise HFViTError(f"--report_to {name} needs its package: pip install {name}")
    return requested


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration with values of the types that trackers accept."""
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in values.items()
    }
