"""`hf-vit push FOLDER REPO`: one folder to the Hub, as a model or, with `--space`, as the page of `hf-vit demo`.

Called by `hf_vit/cli/main.py`, which adds `--json`.

Tests: tests/hf_vit/cli/test_cli.py.
"""

import argparse
import json
import tempfile
from pathlib import Path

from ..errors import HFViTError
from ..hub.space import write_space
from ..hub.upload import push_folder, push_space


EXAMPLES = """\
  hf-vit push out owner/name
  hf-vit push out name --private
  hf-vit push out owner/name --create-pr
  hf-vit push out owner/name-demo --space
The access token is the one of `hf auth login`, or HF_TOKEN."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument("folder", help="output folder of training or save_pretrained")
    parser.add_argument("repo", help="owner/name, or name for one of your own; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument(
        "--space", action="store_true", help="upload the page of `hf-vit demo` with the model, as a Space"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.space:
        return push_demo(arguments)
    url = push_folder(
        arguments.folder,
        arguments.repo,
        private=arguments.private,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
    )
    print(json.dumps({"url": url}) if arguments.json else url)
    return 0


def push_demo(arguments: argparse.Namespace) -> int:
    if arguments.revision or arguments.create_pr:
        raise HFViTError("a Space is uploaded to its main branch: leave out --revision and --create-pr")
    with tempfile.TemporaryDirectory() as folder:
        title = Path(arguments.folder).resolve().name
        write_space(arguments.folder, Path(folder) / "space", title)
        url = push_space(Path(folder) / "space", arguments.repo, private=arguments.private)
    print(json.dumps({"url": url}) if arguments.json else url)
    return 0
