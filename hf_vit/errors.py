"""HFViTError, the error for bad input; the parser of command lines that raises it, and how commands print it.

Its message names the cause and the way out, in one line. All of hf_vit, training and benchmarks uses it, except the
files that travel to the Hub.
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


MAX_LISTED = 8  # names in an error message
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # content of a file in a clone without Git LFS


class HFViTError(ValueError):
    """Bad input. Command lines print it as `error: ...` and exit with status 2; libraries let it through."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises HFViTError for bad options, instead of printing the usage.

    The error names the nearest option, command or choice, and in words the expected kind of number.
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
        """Refuse misspelled options first: argparse would report the intended one as missing."""
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if name.startswith("--") and not any(known.startswith(name) for known in self._option_string_actions):
                self.refuse_unknown([word])

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """Raise HFViTError for words that are neither an option nor the value of one."""
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
    """Log the warnings of a block as `note: ...`, one line each, once; for command lines.

    Args:
        log: takes a line; default: stderr. leave_out: classes of warnings that do not matter to the command.
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
    """An error's message on one line; for errors of the operating system the file and the reason."""
    if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return " ".join(str(error).split())


def report_error(error: Exception) -> int:
    """Print an error as one line on stderr; returns the exit status of the command."""
    print(f"error: {error_in_one_line(error)}", file=sys.stderr)
    return 2


def listed(names: Sequence[object]) -> str:
    """The first `MAX_LISTED` names, for a message."""
    shown = ", ".join(str(name) for name in names[:MAX_LISTED])
    return shown if len(names) <= MAX_LISTED else f"{shown}, ... ({len(names)} in all)"
