"""`hf-vit demo MODEL`: a page in the browser that classifies an image and shows the model's attention.

Needs `pip install "hf-vit[demo]"`. Uploaded images are in a temporary folder, which is removed at the end.

Tests: tests/hf_vit/hub/test_space_app.py.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from transformers.models.vit import ViTImageProcessorPil

from ..errors import HFViTError
from .inputs import load_classifier, pick_device


EXAMPLES = """\
  hf-vit demo path/to/model
  hf-vit demo owner/name --compare ViT-B_16.npz
  hf-vit demo path/to/model --host 0.0.0.0 --port 8080"""
NEEDS_GRADIO = 'the page needs gradio: pip install "hf-vit[demo]"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument("model", help="folder, Hub id or checkpoint file")
    parser.add_argument("--compare", metavar="MODEL", help="a second model, shown next to the first")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: only this machine)")
    parser.add_argument(
        "--port", type=port, metavar="N", help="port to listen on (default: the first free one from 7860)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to 65535")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted. Raises HFViTError: no gradio, no model, no free port."""
    try:
        from ..hub.space_app import SpaceClassifier
    except ImportError as error:
        raise HFViTError(f"{NEEDS_GRADIO} ({error})") from error
    device = pick_device(arguments.device)
    classifiers, names = [], [name for name in (arguments.model, arguments.compare) if name]
    short = [Path(name).name for name in names]
    for name, shown in zip(names, short if len(set(short)) == len(short) else names):
        loaded = load_classifier(name)
        model = loaded.model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides that `to` takes one
        classifiers.append(SpaceClassifier(shown, model, ViTImageProcessorPil(**loaded.processor)))
    if arguments.json:
        print(json.dumps({"models": [classifier.name for classifier in classifiers]}), flush=True)
    with tempfile.TemporaryDirectory(prefix="hf-vit-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # gradio reads it at each upload, and does not remove files itself
        return show(arguments, classifiers)


def show(arguments: argparse.Namespace, classifiers: list) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    from ..hub.space_app import serve

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the uploads are removed
    try:
        serve(classifiers, server_name=arguments.host, server_port=arguments.port, quiet=arguments.json)
    except OSError as error:
        raise HFViTError(f"cannot listen on {arguments.host}, port {arguments.port}: {error}") from error
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0
