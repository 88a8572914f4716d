"""Every command answers bad input with one line, and --help with its usage.

pytest tests/hf_vit/test_errors.py
"""

import errno
import importlib
import warnings
from pathlib import Path

import pytest

from hf_vit.errors import HFViTError, Parser, report_error, warnings_as_notes


ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for package in ("hf_vit", "training", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.name != "space_app.py"  # a Space's app.py
)
SUBCOMMANDS = ("convert", "info", "predict", "embed", "search", "inspect", "export", "demo", "card", "push")
COMMANDS = MODULES + [f"hf_vit.cli.main {name}" for name in SUBCOMMANDS]


def run(capsys, command, *words):
    """(status, stdout, stderr) of a command, whether its main returns the status or raises it."""
    module, *before = command.split()
    try:
        status = importlib.import_module(module).main([*before, *words])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_one_line_with_the_way_out(command, capsys):
    status, out, err = run(capsys, command, "--no-such-option")
    assert status == 2 and not out
    (line,) = err.splitlines()
    assert line.startswith("error: ") and ("--help" in line or "did you mean --" in line)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_with_the_usage(command, capsys):
    status, out, err = run(capsys, command, "--help")
    assert status == 0 and out.startswith("usage: ") and "options:" in out and not err


def test_an_error_of_the_system_is_the_file_and_the_reason(capsys):
    assert report_error(PermissionError(errno.EACCES, "Permission denied", "/etc/shadow")) == 2
    assert report_error(OSError("no file")) == 2
    assert capsys.readouterr().err == "error: /etc/shadow: permission denied\nerror: no file\n"


def test_an_error_of_several_lines_is_printed_as_one(capsys):
    assert report_error(HFViTError("a\n  cause: a\tway out")) == 2
    assert capsys.readouterr().err == "error: a cause: a way out\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--image-sise", "3"), "unknown option --image-sise; did you mean --image-size?"),
        (("--image-sise=3",), "unknown option --image-sise; did you mean --image-size?"),
        (("x", "y"), "unexpected argument 'y'"),
        (("--image-size", "abc"), "--image-size: 'abc' is not a whole number"),
        (("--image-size", "3.5"), "--image-size: '3.5' is not a whole number"),
        (("--mean", "half"), "--mean: 'half' is not a number"),
        (("--filter", "bilinar"), "'bilinar' (choose from .*); did you mean bilinear?"),
    ],
)
def test_a_bad_option_is_named_with_the_nearest(words, says):
    parser = Parser()
    parser.add_argument("file", nargs="?")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--mean", type=float)
    parser.add_argument("--filter", choices=("bilinear", "bicubic"))
    with pytest.raises(HFViTError, match=says.replace("?", r"\?").replace("(", r"\(").replace(")", r"\)")) as caught:
        parser.parse_args(words)
    assert str(caught.value).endswith("(--help lists the options)") and "int" not in str(caught.value)


def test_a_misspelled_command_and_its_options_are_named(capsys):
    for words, near in ((("predicts", "x"), "predict"), (("predict", "x", "--modle", "y"), "--model")):
        status, _, err = run(capsys, "hf_vit.cli.main", *words)
        assert status == 2 and f"did you mean {near}?" in err


def test_warnings_become_notes_each_once(capsys):
    with warnings_as_notes(leave_out=(FutureWarning,)):
        for _ in range(2):
            warnings.warn("heads were\n  guessed", stacklevel=1)
        warnings.warn("of no matter", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "note: heads were guessed\n"


@pytest.mark.parametrize("number", ["99999", "-1", "http"])
def test_a_port_that_cannot_be_is_one_line(number, capsys):
    status, _, err = run(capsys, "hf_vit.cli.main", "demo", "model", f"--port={number}")
    assert status == 2 and f"'{number}' is not a whole number from 0 to 65535" in err
