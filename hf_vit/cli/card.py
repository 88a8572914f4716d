"""`hf-vit card FOLDER`: the model card of a folder from its facts.json. Called by `hf_vit/cli/main.py`.

Tests: tests/hf_vit/cli/test_cli.py.
"""

import argparse
import json

from ..errors import HFViTError
from ..hub.model_card import is_hub_id, write_card


EXAMPLES = """\
  hf-vit card out
  hf-vit card out --repo-id owner/name"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument("folder", help="output folder of training")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="repository in the card's code example")


def run(arguments: argparse.Namespace) -> int:
    if arguments.repo_id is not None and not is_hub_id(arguments.repo_id):
        raise HFViTError(f"--repo-id '{arguments.repo_id}' is not the name of a repository: write owner/name")
    path = write_card(arguments.folder, arguments.repo_id)
    print(json.dumps({"card": str(path)}) if arguments.json else path)
    return 0
