"""Is a folder a complete model, and which of its files belong on the Hub?

Only regular files inside the folder are uploaded: facts.json and links, which somebody else may have written, cannot
name others. For `upload.py` and `space.py`.

Tests: tests/hf_vit/hub/test_upload.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ..errors import HFViTError
from ..image_processing import read_settings
from .model_card import EVAL_RESULTS, FACTS, REPORT_FILE, load_facts, shows_report


SCANNED_BYTES = 1 << 20  # of a file at a time
UPLOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jsonl",
    "*.py",
    "*.png",
    "*.svg",
    "README.md",
    "LICENSE",
    f"{EVAL_RESULTS}/*.yaml",
)
FIGURES = (".png", ".svg", ".jpg", ".jpeg", ".webp", ".gif")


def check_model_folder(folder: Path) -> None:
    """Raise HFViTError unless the folder holds a model that loads by itself."""
    if not folder.is_dir():
        raise HFViTError(f"no folder {folder}: give the one that training or save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise HFViTError(f"{folder} is not a model: it has no config.json")
    config = read_settings(folder / "config.json")
    if not config.get("model_type"):
        raise HFViTError(f"{folder / 'config.json'} names no model_type: it is not the config of a model")
    targets = config.get("auto_map") or {}
    if not isinstance(targets, dict) or not all(isinstance(target, str) for target in targets.values()):
        raise HFViTError(f"{folder / 'config.json'}: 'auto_map' must give each class one file.Name")
    needed = {f"{target.split('--')[-1].split('.')[0]}.py" for target in targets.values()}
    for name in sorted(needed):
        needed |= siblings(folder, name)
    missing = [name for name in ["preprocessor_config.json", *sorted(needed)] if not (folder / name).is_file()]
    missing = [name for name in weight_files(folder) if not (folder / name).is_file()] + missing
    if missing:
        raise HFViTError(
            f"{folder} is incomplete, it lacks {', '.join(missing)}: save the model and its image processor there "
            "with save_pretrained"
        )


def weight_files(folder: Path) -> list[str]:
    """The weight files: one, or the shards of an index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    weight_map = read_settings(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and PurePosixPath(name).name == name for name in names):
        raise HFViTError(f"{index} names no weights of this folder: save the model again with save_pretrained")
    return sorted(set(names))


def siblings(folder: Path, name: str) -> set[str]:
    """A file of the model's code and all files of the folder that it imports, directly or not."""
    names, pending = set(), [name]
    while pending:
        name = pending.pop()
        if name in names or not (folder / name).is_file():
            names.add(name)
            continue
        names.add(name)
        try:
            code = (folder / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise HFViTError(f"{folder / name} is not Python in UTF-8: save the model again") from None
        imports = re.findall(r"^\s*from\s+\.(\w+)\s+import", code, re.MULTILINE)
        pending += [f"{module}.py" for module in imports]
    return names


def files_to_upload(folder: Path) -> list[str]:
    """Names of the files of the model, of its scores, and of the figures and the report in its facts.

    Raises:
        HFViTError: one of them is a link or not a regular file, or a figure in the facts is outside of the folder.
    """
    paths = (path for pattern in UPLOADED for path in folder.glob(pattern))
    # a dot: temporary files of an interrupted write
    names = {path.relative_to(folder).as_posix() for path in paths if path.name[0] != "."}
    facts = load_facts(folder) if (folder / FACTS).is_file() else {}
    figures = facts.get("figures") or []
    if shows_report(facts) and (folder / REPORT_FILE).exists():  # it holds images: only if the facts permit it
        names.add(REPORT_FILE)
    for name in figures if isinstance(figures, list) else [figures]:
        path = PurePosixPath(str(name))
        if path.is_absolute() or ".." in path.parts or "\\" in str(name) or path.suffix.lower() not in FIGURES:
            raise HFViTError(
                f"{folder / FACTS} names the figure '{name}', which is no image file inside the folder: remove it "
                "from 'figures'"
            )
        if (folder / name).exists():
            names.add(path.as_posix())
    for name in names:
        sendable(folder / name, folder)
    return sorted(names)


def sendable(path: Path, folder: Path) -> Path:
    """The path of a regular file in the folder itself.

    Raises:
        HFViTError: it is a link, or inside one, or a folder, FIFO or device: with links, a folder from somebody else
            could upload any file of this machine.
    """
    steps = [path, *(parent for parent in path.parents if folder in parent.parents)]
    link = next((step for step in steps if step.is_symlink()), None)
    if link is not None:
        raise HFViTError(f"{link} is a link: nothing outside of {folder} is uploaded; put the file itself there")
    if not path.is_file():
        raise HFViTError(f"{path} is not a regular file: remove it from the folder")
    return path


def check_no_secret(files: Mapping[str, Path], token: str) -> None:
    """Raise HFViTError, which names the file, if any file contains the token."""
    secret = token.encode()
    for path in files.values():
        with path.open("rb") as file:
            tail = b""  # of the previous block: the token may lie across two
            while block := file.read(SCANNED_BYTES):
                window = tail + block
                if secret in window:
                    raise HFViTError(f"{path} contains your access token: remove it before anything is uploaded")
                tail = window[-len(secret) :]
