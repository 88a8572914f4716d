"""Bad input: the one error that a user can mend, the parser that raises it, and the line that command lines print.

Its message names the cause and the way out, in one line. For all of hf_vit but what travels to the Hub, for
training and benchmarks.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn


LISTED = 8  # how many names an error message lists


class HFViTError(ValueError):
    """Bad input. Command lines print it as `error: ...` and exit with status 2; libraries let it through."""


class Parser(argparse.ArgumentParser):
    """argparse that raises a bad option as an HFViTError, in place of the usage on the screen."""

    def error(self, message: str) -> NoReturn:
        raise HFViTError(f"{message} (--help lists the options)")


def report_error(error: Exception) -> int:
    """Print an error as one line on stderr; returns the exit status of a command that ends with it."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def listed(names: Sequence[object]) -> str:
    """Names for a message, the first few."""
    shown = ", ".join(str(name) for name in names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown}, ... ({len(names)} in all)"
