"""Every command answers bad input with one line, and --help with its usage.

pytest tests/hf_vit/test_errors.py
"""

import importlib
from pathlib import Path

import pytest

from hf_vit.errors import HFViTError, report_error


ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for package in ("hf_vit", "training", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.name != "space_app.py"  # a Space's app.py
)
SUBCOMMANDS = ("convert", "info", "predict", "inspect", "export", "demo", "card", "push")
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


def test_an_error_of_several_lines_is_printed_as_one(capsys):
    assert report_error(HFViTError("a\n  cause: a\tway out")) == 2
    assert capsys.readouterr().err == "error: a cause: a way out\n"
