"""The command line: hf-vit convert | info | predict | embed | search | inspect | export | demo | card | push.

Each command is a module with EXAMPLES, `add_arguments(parser)` and `run(arguments)`, which returns the exit status.
Results go to stdout (a table, or JSON with `--json`), everything else to stderr. Bad input is one line there,
`error: ...`, and exit status 2.

Tests: tests/hf_vit/cli/test_cli.py.
"""

import argparse
import importlib
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

import transformers

from .. import __version__
from ..errors import Parser, report_error


READER_LEFT = 128 + 13  # exit status, as of a program that SIGPIPE ends

COMMANDS = {  # name: (module, help)
    "convert": (
        "cli.convert",
        "turn a checkpoint of Google, timm, torchvision or transformers into another format",
    ),
    "info": ("cli.info", "show a model's parts with their output, parameters and multiply-adds"),
    "predict": ("cli.predict", "classify images, on the screen or into a file"),
    "embed": ("cli.embed", "write feature vectors of images"),
    "search": ("cli.search", "find the images that look most like a query"),
    "inspect": (
        "cli.inspect",
        "show what a model attends to: maps over images, filters, positions, distances, on one page",
    ),
    "export": (
        "cli.export",
        "write an ONNX or torch.export model that needs no transformers, and check it against the model",
    ),
    "demo": ("cli.demo", "serve a page that classifies an image and shows where the model looks"),
    "card": ("cli.card", "render the model card of a folder from its facts.json"),
    "push": ("cli.push", "upload a folder to the Hub: weights, code, processor, card, facts and figures"),
}


DESCRIPTION = """\
Use Vision Transformers and hybrids: classify images, see what a model looks at, convert checkpoints, export, share.
A MODEL is a folder, a checkpoint file (Google, timm, torchvision, transformers, ...) or the id of a Hub model."""
EPILOG = """\
examples:
  hf-vit predict photo.jpg holiday/ --model google/vit-base-patch16-224
  hf-vit inspect MODEL photo.jpg --out seen
  hf-vit convert ViT-B_16.npz vit-b16
  hf-vit COMMAND --help     options and examples of a command

Training and scoring: python -m training.finetune --help, python -m training.score --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv`: the arguments after `hf-vit`. Returns the exit status."""
    try:
        arguments = build_parser().parse_args(argv)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        status = arguments.run(arguments)
        sys.stdout.flush()  # here, not at the interpreter's end, which would report a closed pipe in two lines
        return status
    except (ValueError, OSError) as error:
        return READER_LEFT if reader_left(error) else report_error(error)


def reader_left(error: Exception) -> bool:
    """Whether stdout is a pipe whose reader has ended, such as `head`; the rest of the output is dropped then.

    Asked of the pipe, because the error may be that of another one, such as a connection.
    """
    if not isinstance(error, BrokenPipeError) or not hasattr(select, "poll"):
        return False
    try:
        descriptor = sys.stdout.fileno()
    except io.UnsupportedOperation:  # no file, as in a notebook
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-vit", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"hf_vit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Command)
    for name, (module, about) in COMMANDS.items():
        commands.add_parser(name, module=module, help=about, description=about[0].upper() + about[1:] + ".")
    return parser


class Command(Parser):
    """A sub-command. Its module is imported only when it is run or asked for help: `hf-vit --help` stays fast."""

    def __init__(self, module: str, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.module = module

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        module = importlib.import_module(f"hf_vit.{self.module}")
        self.epilog = f"examples:\n{module.EXAMPLES}"
        self.add_argument("--json", action="store_true", help="print JSON instead of text")
        module.add_arguments(self)
        self.set_defaults(run=module.run)
        self.check_options(args or ())
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.refuse_unknown(unknown)  # here, where the nearest of this command's options is known
        return parsed, unknown


if __name__ == "__main__":
    sys.exit(main())
