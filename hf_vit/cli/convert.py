"""`hf-vit convert SRC DST`: any dialect in, a folder for `from_pretrained` or another dialect out, and an account.

Called by `hf_vit/cli/main.py`, which adds `--json` and turns errors into one line and exit status 2.
"""

import argparse
import ast
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from ..checkpoints.load import Loaded, read_checkpoint
from ..checkpoints.save import FORMATS, replaced_folder, save_checkpoint, save_processor
from ..checkpoints.spec import label_names
from ..checkpoints.tensor_file import read_json
from ..errors import HFViTError
from .inputs import image_size


EXAMPLES = """\
  hf-vit convert ViT-B_16.npz vit-b16
  hf-vit convert ViT-B_16.npz vit-b16-flowers --image-size 384 512 --num-labels 102
  hf-vit convert google/vit-base-patch16-224 vit-base.npz --format google-npz
  hf-vit convert vit_small.safetensors vit-small --set num_attention_heads=6"""

# The rows of the table, in reading order.
ARCHITECTURE = (
    *("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "layer_norm_eps", "pooling", "use_class_token", "class_token_has_position"),
    *("num_register_tokens", "position_embedding_type", "position_interpolation", "representation_size"),
    *(
        "layer_scale_init",
        "qk_norm",
        "resnet_depths",
        "resnet_width_factor",
        "group_norm_eps",
        "weight_standardization",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument("source", metavar="SRC", help="file, folder or Hub id of any dialect")
    parser.add_argument(
        "destination", metavar="DST", type=Path, help="folder or, for npz and .safetensors, file to write"
    )
    parser.add_argument("--format", choices=FORMATS, help="dialect to write; without it a folder for from_pretrained")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar=("H", "W"),
        help="refit the position table to this image size, pixels",
    )
    parser.add_argument(
        "--checkpoint-image-size", type=int, nargs="+", metavar=("H", "W"), help="image size that SRC was made for"
    )
    parser.add_argument(
        "--num-labels", type=int, metavar="N", help="put a new, zero head of N classes in the head's place"
    )
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names, one per line, or id2label as JSON")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of HFViTConfig; may be given many times",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--overwrite", action="store_true", help="replace what lies at DST")


def run(arguments: argparse.Namespace) -> int:
    """Convert, print the account, return 0. Raises HFViTError; nothing is at DST then that was not there before."""
    asked = _asked(arguments)
    destination = arguments.destination
    _check_destination(destination, arguments.format, arguments.overwrite)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = read_checkpoint(arguments.source, revision=arguments.revision, **asked)
        if arguments.format is None:
            _save_folder(loaded, destination)
        else:
            save_checkpoint(loaded.model, destination, arguments.format, loaded.processor)
    account = _account(arguments, loaded, [str(w.message) for w in caught if issubclass(w.category, UserWarning)])
    if arguments.json:
        print(json.dumps(account, indent=2))
    else:
        _print(account)
    return 0


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    for name in ("image_size", "checkpoint_image_size"):
        if (size := image_size(arguments, name)) is not None:
            asked[name] = size
    if arguments.num_labels is not None:
        asked["num_labels"] = arguments.num_labels
    if arguments.labels is not None:
        asked["id2label"] = _label_names(arguments.labels)
    for setting in arguments.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise HFViTError(f"--set {setting}: write it as key=value")
        asked[name.strip()] = _value(value.strip())
    return asked


def _value(text: str) -> Any:
    """`3`, `0.1`, `(32, 48)`, `true`, `none`, or the text itself."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _label_names(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise HFViTError(f"{path}: no such file; --labels takes one class name per line, or id2label as JSON")
    if path.suffix == ".json":
        names = read_json(path)
        if not all(number.isdecimal() for number in names):
            raise HFViTError(f'{path}: must be id2label, {{"0": "cat", "1": "dog", ...}}')
        return {int(number): name for number, name in names.items()}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HFViTError(f"{path}: not a text in UTF-8 ({error}): save it so, one class name per line") from error
    return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))


def _check_destination(destination: Path, format: str | None, overwrite: bool) -> None:
    """Say before any work what would stand in the way."""
    is_file = format in ("google-npz", "big-vision-npz") or (format == "timm" and destination.suffix == ".safetensors")
    if destination.exists() and destination.is_dir() == is_file:
        raise HFViTError(
            f"{destination}: is a {'folder' if is_file else 'file'}, a {'file' if is_file else 'folder'} is written"
        )
    if not is_file and destination.suffix in (".npz", ".safetensors"):
        raise HFViTError(
            f"{destination}: is named as a file, but a folder would be written: for a file give --format google-npz "
            "or big-vision-npz (.npz) or timm (.safetensors), for a folder another name"
        )
    occupied = destination.is_file() or (destination.is_dir() and any(destination.iterdir()))
    if occupied and not overwrite:
        raise HFViTError(f"{destination}: there is something already; choose another place, or --overwrite")


def _save_folder(loaded: Loaded, destination: Path) -> None:
    with replaced_folder(destination) as temporary:
        loaded.model.save_pretrained(temporary)
        save_processor(temporary, loaded.processor)


def _account(arguments: argparse.Namespace, loaded: Loaded, warned: list[str]) -> dict[str, Any]:
    config, destination = loaded.model.config, arguments.destination
    hybrid = ("resnet_width_factor", "group_norm_eps", "weight_standardization")
    shown = [name for name in ARCHITECTURE if config.resnet_depths is not None or name not in hybrid]
    return {
        "source": str(loaded.path),
        "recognised": loaded.dialect,
        "architecture": {name: getattr(config, name) for name in shown} | {"num_labels": config.num_labels},
        "parameters": loaded.model.num_parameters(),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "assumed": loaded.notes,
        "changed": loaded.changed + _lost(arguments.format, loaded),
        "warnings": warned,
        "format": arguments.format or "hf_vit",
        "output": str(destination),
        "files": sorted(p.name for p in destination.iterdir()) if destination.is_dir() else [destination.name],
    }


def _lost(format: str | None, loaded: Loaded) -> list[str]:
    names = label_names(loaded.model.config)
    if format in ("google-npz", "big-vision-npz") and names != [f"LABEL_{i}" for i in range(len(names))]:
        return ["label names dropped: npz files hold none"]
    return []


def _print(account: dict[str, Any]) -> None:
    print(f"recognised  {account['recognised']}")
    print(f"read        {account['source']}")
    print("architecture")
    width = max(map(len, account["architecture"]))
    for name, value in account["architecture"].items():
        print(f"  {name:<{width}}  {value}")
    print(f"parameters  {account['parameters']:,} ({account['dtype']})")
    for title, lines in (("assumed", account["assumed"]), ("changed", account["changed"] or ["nothing"])):
        for line in lines:
            print(f"{title:<11} {line}")
    print(f"written     {account['output']} ({account['format']}): {', '.join(account['files'])}")
    for line in account["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
