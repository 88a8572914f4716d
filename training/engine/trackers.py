"""Where the numbers of a run also go: Accelerate's trackers, by name (`--report_to tensorboard`).

For the Trainer. Without any, `history.jsonl` and `speed.jsonl` in the output folder hold the same numbers.
"""

from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from hf_vit.errors import HFViTError


def check_trackers(names: list[str]) -> list[str]:
    """What `Accelerator(log_with=...)` takes for these names.

    Raises:
        HFViTError: an unknown tracker, or one whose package is not installed.
    """
    requested = [name for name in names if name != "none"]
    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    available = {str(name) for name in get_available_trackers()}
    for name in requested:
        if name == "csv":
            raise HFViTError("--report_to csv: history.jsonl in the output folder has these numbers; leave it out")
        if name not in known:
            raise HFViTError(f"--report_to {name}: choose from none, {', '.join(sorted(known))}")
        if name not in available:
            raise HFViTError(f"--report_to {name} needs its package: pip install {name}")
    return requested


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """What trackers accept as a run's configuration."""
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in values.items()
    }
