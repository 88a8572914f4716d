"""Bad input: the one error that a user can fix, the parser that raises it, and the line that command lines print.

Its message names the cause and the way out, in one line. For all of hf_vit but what travels to the Hub, for
training and benchmarks.
"""

import argparse
import contextlib
import difflib
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn


LISTED = 8  # how many names an error message lists


LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a clone without Git LFS holds in a file's place


class HFViTError(ValueError):
    """Bad input. Command lines print it as `error: ...` and exit with status 2; libraries let it through."""


class Parser(argparse.ArgumentParser):
    """argparse that raises a bad option as an HFViTError, in place of the usage on the screen.

    The error names the nearest option, command or choice, and says in words what a number should be.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", int, _whole_number)
        self.register("type", float, _number)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._subparsers is None:
            self.check_options(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse_unknown(unknown)
        return parsed

    def check_options(self, words: Sequence[str]) -> None:
        """Refuse a misspelled option first: argparse would say that the one it was meant for is missing."""
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if name.startswith("--") and not any(known.startswith(name) for known in self._option_string_actions):
                self.refuse_unknown([word])

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """Raise HFViTError for words of the command line that are no option and no value of one."""
        option = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
        if option is None:
            self.error(f"unexpected argument {words[0]!r}")
        self.error(f"unknown option {option}{_nearest(option, self._option_string_actions)}")

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong:
            message += _nearest(wrong[1], re.findall(r"[^\s,']+", wrong[2]))
        raise HFViTError(f"{message} (--help lists the options)")


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


@contextlib.contextmanager
def warnings_as_notes(
    log: Callable[[str], Any] = _to_stderr, leave_out: tuple[type[Warning], ...] = ()
) -> Iterator[None]:
    """What is warned of in the block is logged as `note: ...`, one line each, once; for command lines.

    Args:
        log: takes a line; default: stderr. leave_out: kinds of warnings that do not matter to the command.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            notes = [w.message for w in caught if issubclass(w.category, UserWarning)]
            for text in dict.fromkeys(str(note) for note in notes if not isinstance(note, leave_out)):
                log(f"note: {' '.join(text.split())}")


def error_in_one_line(error: Exception) -> str:
    """What an error says, on one line; of the operating system's errors the file and the reason."""
    if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return " ".join(str(error).split())


def report_error(error: Exception) -> int:
    """Print an error as one line on stderr; returns the exit status of a command that ends with it."""
    print(f"error: {error_in_one_line(error)}", file=sys.stderr)
    return 2


def listed(names: Sequence[object]) -> str:
    """Names for a message, the first few."""
    shown = ", ".join(str(name) for name in names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown}, ... ({len(names)} in all)"
