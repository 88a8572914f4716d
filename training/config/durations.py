"""Lengths of training as users write them (`500` steps, `0.1` of all steps, `"5 epochs"`, `"10%"`), and times.

For arguments.py, optimizers.py, lr_schedules.py, schedule.py and the Trainer.
"""

import math
import re

from hf_vit.errors import HFViTError


# Arguments that take a length of training: steps, a fraction of all steps, epochs or percent.
RAMPS = ("warmup_steps", "cooldown_steps")
LENGTHS = (*RAMPS, "mixup_off_steps", "unfreeze_every")
MAX_LENGTH = 10**8
NUMBER = r"(\d+\.?\d*|\.\d+)"
LENGTH = re.compile(rf"{NUMBER}\s*(|steps?|epochs?|%|percent)")
TIME = re.compile(
    rf"(?:{NUMBER}\s*h(?:ours?)?)?\s*(?:{NUMBER}\s*m(?:in(?:utes?)?)?)?\s*(?:{NUMBER}\s*(?:s(?:ec(?:onds?)?)?)?)?"
)


def steps_of(name: str, value: float | str, max_steps: int, epoch: float) -> int:
    """A length of training in steps: `500`, `0.1` (a fraction of all), `"5 epochs"`, `"10%"`.

    Args:
        name: of the argument, for the message. max_steps: of the run. epoch: steps of one epoch.

    Raises:
        HFViTError: the value has none of these forms.
    """
    match = LENGTH.fullmatch(str(value).strip())
    if match is None:
        raise HFViTError(f"--{name} {value!r}: give steps, a fraction below 1, or a length such as '5 epochs', '10%'")
    number, unit = float(match[1]), match[2]
    if number > MAX_LENGTH:
        raise HFViTError(f"--{name} {str(value)[:40]}: give at most {MAX_LENGTH:,}")
    if unit.startswith("epoch"):
        return round(number * epoch)
    if unit in ("%", "percent"):
        return math.ceil(number * max_steps / 100)
    return math.ceil(number * max_steps) if number < 1 else int(number)


def check_ramps(warmup: int, cooldown: int, max_steps: int) -> None:
    """Raise HFViTError if warm-up and cooldown, in steps, do not fit into the run."""
    if max_steps > 0 and warmup + cooldown > max_steps:
        both = f"warm-up of {warmup} steps" + (f" and cooldown of {cooldown}" if cooldown else "")
        raise HFViTError(
            f"{both}: longer than the training of {max_steps}: lower --warmup_steps (below 1: a fraction of the run)"
        )


def seconds_of(name: str, value: float | str) -> float:
    """A time in seconds: `"20m"`, `"1h30m"`, `"90s"`, or a number of seconds.

    Args:
        name: of the argument, for the message.

    Raises:
        HFViTError: the value has none of these forms, or is 0.
    """
    match = TIME.fullmatch(str(value).strip())
    parts = [float(part) for part in match.groups(default="0")] if match else []
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1)))
    if not 0 < seconds <= MAX_LENGTH:
        raise HFViTError(f"--{name} {str(value)[:40]!r}: give a time such as 20m, 1h30m or 90s")
    return seconds
