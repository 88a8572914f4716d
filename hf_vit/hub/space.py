"""`hf-vit demo MODEL`: a page in the browser that classifies a picture and shows where the model looks.

The page is hf_vit/hub/space_app.py, which also runs alone: `write_space` lays it beside a model as the folder of a Hub
Space (`hf-vit push FOLDER REPO --space`). Needs `pip install "hf-vit[demo]"`. Called by `hf_vit/cli/main.py`.
"""

import argparse
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers.models.vit import ViTImageProcessorPil

from ..cli.inputs import load_classifier, pick_device
from ..errors import HFViTError
from .upload import check_folder, files_to_upload


EXAMPLES = """\
  hf-vit demo path/to/model
  hf-vit demo owner/name --compare ViT-B_16.npz
  hf-vit demo path/to/model --host 0.0.0.0 --port 8080"""
PAGE = Path(__file__).with_name("space_app.py")
# A Space decodes images as hf_vit does, and carries these files as its package `image_io`
DECODER = {"image_io.py": "__init__.py", "image_processing.py": "image_processing.py", "errors.py": "errors.py"}
REQUIREMENTS = ("torch", "transformers")  # numpy and pillow come with gradio, which wants its own versions of them
NEEDS_GRADIO = 'the page needs gradio: pip install "hf-vit[demo]"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument("model", help="folder, Hub id or checkpoint file")
    parser.add_argument("--compare", metavar="MODEL", help="another one beside it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted. Raises HFViTError: no gradio, no model, no free port."""
    try:
        from .space_app import Classifier, serve
    except ImportError as error:
        raise HFViTError(f"{NEEDS_GRADIO} ({error})") from error
    device = pick_device(arguments.device)
    classifiers, given = [], [name for name in (arguments.model, arguments.compare) if name]
    short = [Path(name).name for name in given]
    for name, shown in zip(given, short if len(set(short)) == len(short) else given):
        loaded = load_classifier(name)
        model = loaded.model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides that `to` takes one
        classifiers.append(Classifier(shown, model, ViTImageProcessorPil(**loaded.processor)))
    if arguments.json:
        print(json.dumps({"models": [classifier.name for classifier in classifiers]}), flush=True)
    try:
        serve(classifiers, server_name=arguments.host, server_port=arguments.port, quiet=arguments.json)
    except OSError as error:
        raise HFViTError(f"cannot listen on {arguments.host}, port {arguments.port}: {error}") from error
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


def write_space(folder: str | Path, target: str | Path, title: str) -> Path:
    """Lay out a Space: the page as app.py, what it needs, and the model of `folder` beside it; returns `target`.

    Raises:
        HFViTError: the folder is not a complete model.
    """
    folder, target = Path(folder), Path(target)
    check_folder(folder)
    for name in files_to_upload(folder):
        (target / title / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / title / name)
    shutil.copyfile(PAGE, target / "app.py")
    (target / "image_io").mkdir(exist_ok=True)
    for source, copied in DECODER.items():
        shutil.copyfile(PAGE.parents[1] / source, target / "image_io" / copied)
    pins = "".join(f"{name}=={version(name).split('+')[0]}\n" for name in REQUIREMENTS)
    (target / "requirements.txt").write_text(pins, encoding="utf-8")
    python = ".".join(map(str, sys.version_info[:2]))
    front = {"title": title, "sdk": "gradio", **_gradio(), "python_version": python, "app_file": "app.py"}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
    about = f"A picture in, labels and the model's attention out. The model in `{title}/` has a card of its own.\n"
    (target / "README.md").write_text(f"---\n{lines}---\n\n# {title}\n\n{about}", encoding="utf-8")
    return target


def _gradio() -> dict[str, str]:
    """The version of gradio that the page was tried with here; the Hub's newest where there is none."""
    try:
        return {"sdk_version": version("gradio")}
    except PackageNotFoundError:
        return {}
