"""Write the folder of a Hub Space: a page that classifies an image and shows the model's attention, with its model.

The page is hf_vit/hub/space_app.py, which does not need hf_vit; `hf-vit demo` (hf_vit/cli/demo.py) serves it locally.

Tests: tests/hf_vit/hub/test_space_app.py.
"""

import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import HFViTError
from ..image_processing import read_settings
from .model_folder import check_model_folder, files_to_upload


PAGE = Path(__file__).with_name("space_app.py")
# A Space decodes images as hf_vit does, with these files as its package `image_io`.
DECODER = {"image_io.py": "__init__.py"} | {
    name: name for name in ("image_processing.py", "tiff_check.py", "errors.py")
}
REQUIREMENTS = ("torch", "transformers")  # numpy and pillow come with gradio, which wants its own versions of them


def write_space(folder: str | Path, target: str | Path, title: str) -> Path:
    """Write a Space: the page as app.py, the files that it needs, and the model of `folder`; returns `target`.

    Raises:
        HFViTError: the folder is not a complete model, or not one of hf_vit's.
    """
    folder, target = Path(folder), Path(target)
    check_model_folder(folder)
    model_type = read_settings(folder / "config.json")["model_type"]
    if model_type != "hf_vit":
        raise HFViTError(
            f"{folder} is a model of type '{model_type}': the page shows the attention of hf_vit's ViTs; push the "
            "model alone, without --space"
        )
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
    about = f"An image in, labels and the model's attention out. The model in `{title}/` has a card of its own.\n"
    (target / "README.md").write_text(f"---\n{lines}---\n\n# {title}\n\n{about}", encoding="utf-8")
    return target


def _gradio() -> dict[str, str]:
    """The installed version of gradio, with which the page was tested; without one, the Hub takes its newest."""
    try:
        return {"sdk_version": version("gradio")}
    except PackageNotFoundError:
        return {}
