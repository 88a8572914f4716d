"""`hf-vit convert SRC DST`: convert any format to a folder for `from_pretrained` or to another format.

Prints what was recognized, assumed and changed. Called by `hf_vit/cli/main.py`, which adds `--json` and prints errors.
"""

import argparse
import ast
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints.load import AssumptionWarning, Loaded, read_checkpoint
from ..checkpoints.save import FORMATS, replaced_folder, save_checkpoint, save_processor
from ..checkpoints.spec import label_names
from ..errors import HFViTError
from ..image_processing import ImageProcessing, read_settings
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
    parser.add_argument("source", metavar="SRC", help="file, folder or Hub id of any format")
    parser.add_argument(
        "destination", metavar="DST", type=Path, help="folder or, for npz and .safetensors, file to write"
    )
    parser.add_argument("--format", choices=FORMATS, help="format to write; without it a folder for from_pretrained")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar=("H", "W"),
        help="resize the position table to this image size, pixels",
    )
    parser.add_argument(
        "--checkpoint-image-size", type=int, nargs="+", metavar=("H", "W"), help="image size of SRC's position table"
    )
    parser.add_argument(
        "--num-labels", type=int, metavar="N", help="replace the head by a zero-initialized one of N classes"
    )
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names, one per line, or id2label as JSON")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of HFViTConfig; may be repeated",
    )
    parser.add_argument(
        "--image-mean", type=float, nargs="+", metavar="X", help="mean of each channel (0 to 1; default: SRC's)"
    )
    parser.add_argument(
        "--image-std", type=float, nargs="+", metavar="X", help="standard deviation of each channel (default: SRC's)"
    )
    parser.add_argument(
        "--state-dict-key", metavar="KEY", help="entry of a .pth file that holds the weights, such as state_dict_ema"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DST")


def run(arguments: argparse.Namespace) -> int:
    """Convert and print a summary. Raises HFViTError; DST is then unchanged."""
    requested = _requested_fields(arguments)
    destination = arguments.destination
    _check_destination(destination, arguments.format, arguments.overwrite)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = read_checkpoint(
            arguments.source, revision=arguments.revision, state_dict_key=arguments.state_dict_key, **requested
        )
        processing = _processing(arguments, loaded)
        if arguments.format is None:
            _save_folder(loaded, destination, processing)
        else:
            save_checkpoint(loaded.model, destination, arguments.format, processing)
    # assumptions have rows of their own
    shown = [
        w for w in caught if issubclass(w.category, UserWarning) and not issubclass(w.category, AssumptionWarning)
    ]
    account = _account(arguments, loaded, processing, [str(warning.message) for warning in shown])
    if arguments.json:
        print(json.dumps(account, indent=2))
    else:
        _print(account)
    return 0


def _requested_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as keyword arguments of `read_checkpoint`."""
    requested: dict[str, Any] = {}
    for name in ("image_size", "checkpoint_image_size"):
        if (size := image_size(arguments, name)) is not None:
            requested[name] = size
    if arguments.num_labels is not None:
        requested["num_labels"] = arguments.num_labels
    if arguments.labels is not None:
        requested["id2label"] = _label_names(arguments.labels)
    for setting in arguments.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise HFViTError(f"--set {setting}: write it as key=value")
        requested[name.strip()] = _value(value.strip())
    return requested


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
        names = read_settings(path)
        if not all(number.isdecimal() for number in names):
            raise HFViTError(f'{path}: must be id2label, {{"0": "cat", "1": "dog", ...}}')
        return {int(number): name for number, name in names.items()}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise HFViTError(f"{path}: not a text in UTF-8 ({error}): save it so, one class name per line") from error
    return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))


def _check_destination(destination: Path, format: str | None, overwrite: bool) -> None:
    """Raise HFViTError, before any work, if DST cannot be written."""
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


def _processing(arguments: argparse.Namespace, loaded: Loaded) -> ImageProcessing:
    """The source's image processing, with the mean and std of the options."""
    statistics = {
        name: tuple(values) for name in ("image_mean", "image_std") if (values := getattr(arguments, name)) is not None
    }
    channels = loaded.model.config.num_channels
    for name, values in statistics.items():
        if len(values) not in (1, channels):
            option = f"--{name.replace('_', '-')}"
            raise HFViTError(f"{option} takes one number, or one for each of {channels} channels; got {len(values)}")
    if not statistics:
        return loaded.image_processing
    mean, std = (statistics.get(name) or tuple(loaded.processor[name]) for name in ("image_mean", "image_std"))
    return replace(loaded.image_processing, image_mean=mean, image_std=std)


def _save_folder(loaded: Loaded, destination: Path, processing: ImageProcessing) -> None:
    with replaced_folder(destination) as temporary:
        loaded.model.save_pretrained(temporary)
        save_processor(temporary, processing.to_transformers(loaded.model.config.num_channels))
        if loaded.license is not None:
            (temporary / "README.md").write_text(_card(loaded), encoding="utf-8")


def _card(loaded: Loaded) -> str:
    """A model card with the source of the weights and their license."""
    metadata = {"library_name": "transformers", "tags": ["hf_vit"]} | loaded.license.metadata()  # type: ignore[union-attr]
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n"
        f"Weights of `{loaded.path.parent.name}` ({loaded.format}), converted by `hf-vit convert`; the license is "
        "that of their model card.\n"
    )


def _account(
    arguments: argparse.Namespace, loaded: Loaded, processing: ImageProcessing, warned: list[str]
) -> dict[str, Any]:
    """The summary of a conversion: the keys are those of `--json`."""
    config, destination = loaded.model.config, arguments.destination
    hybrid = ("resnet_width_factor", "group_norm_eps", "weight_standardization")
    shown = [name for name in ARCHITECTURE if config.resnet_depths is not None or name not in hybrid]
    return {
        "source": str(loaded.path),
        "recognized": loaded.format,
        "architecture": {name: getattr(config, name) for name in shown} | {"num_labels": config.num_labels},
        "parameters": loaded.model.num_parameters(),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "images": processing.describe(),
        "license": loaded.license.metadata() if loaded.license is not None else None,
        "assumed": loaded.assumptions,
        "notes": loaded.notes,
        "changed": loaded.changed + _lost(arguments.format, loaded),
        "warnings": warned,
        "format": arguments.format or "hf_vit",
        "output": str(destination),
        "files": sorted(p.name for p in destination.iterdir()) if destination.is_dir() else [destination.name],
    }


def _lost(format: str | None, loaded: Loaded) -> list[str]:
    """What the target format cannot store and the outputs do not depend on."""
    names = label_names(loaded.model.config)
    if format in ("google-npz", "big-vision-npz") and names != [f"LABEL_{i}" for i in range(len(names))]:
        return ["label names dropped: npz files hold none"]
    return []


def _print(account: dict[str, Any]) -> None:
    print(f"recognized  {account['recognized']}")
    print(f"read        {account['source']}")
    print("architecture")
    width = max(map(len, account["architecture"]))
    for name, value in account["architecture"].items():
        print(f"  {name:<{width}}  {value}")
    print(f"parameters  {account['parameters']:,} ({account['dtype']})")
    print(f"images      {account['images']}")
    if account["license"] is not None:
        print(f"license     {', '.join(account['license'].values())}")
    titles = {"assumed": account["assumed"], "note": account["notes"], "changed": account["changed"] or ["nothing"]}
    for title, lines in titles.items():
        for line in lines:
            print(f"{title:<11} {line}")
    print(f"written     {account['output']} ({account['format']}): {', '.join(account['files'])}")
    for line in account["warnings"]:
        print(f"note: {line}", file=sys.stderr)
