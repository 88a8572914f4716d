"""`hf-vit export MODEL OUT --format onnx|torch-export`: a model for machines without transformers, checked against it.

OUT contains `model.onnx` (or `model.pt2`), `config.json` with the label names, `preprocessor_config.json` and
`export.json` with the checks. The model accepts any batch size; with `--dynamic-size` also any image size, for hybrids
any multiple of `size_multiple_of` in export.json. A model whose logits differ from ours is removed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import Loaded
from ..checkpoints.save import replaced_folder
from ..errors import HFViTError
from ..export import FORMATS, INT8_FILE, compare_int8, export_model, need, quantize
from .inputs import find_images, image_size, load_classifier, read_images


EXAMPLES = """\
  hf-vit export path/to/model exported
  hf-vit export owner/name exported --image-size 384 --dynamic-size
  hf-vit export path/to/model exported --format torch-export
  hf-vit export path/to/model exported --int8 dynamic --images images/validation"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument("model", help="folder, Hub id or checkpoint file")
    parser.add_argument("out", type=Path, help="folder to write; must be empty or not exist")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="what to write (default onnx)")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="one number, or height and width")
    parser.add_argument(
        "--dynamic-size",
        action="store_true",
        help="accept any image size (hybrids: any multiple of a patch), not only any batch size",
    )
    parser.add_argument(
        "--int8",
        choices=("dynamic", "weights"),
        help="also write an int8 ONNX model: weights and activations (dynamic), or stored weights alone",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="files, folders and patterns to measure int8 on; those in a folder named like a label count for accuracy",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, check, and print a summary; only a model that passed is left at OUT. Raises HFViTError."""
    if arguments.int8 and arguments.format != "onnx":
        raise HFViTError("--int8 is made of the ONNX model: leave --format out")
    if arguments.images and not arguments.int8:
        raise HFViTError("--images measures what --int8 changes: give --int8 too, or leave it out")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise HFViTError(f"{arguments.out}: there is something already; choose another place")
    need(["onnx", "onnxruntime", "onnxscript"] if arguments.format == "onnx" else [])
    size = image_size(arguments)
    loaded = load_classifier(arguments.model, **({} if size is None else {"image_size": size}))
    with replaced_folder(arguments.out) as folder:
        account = export_model(loaded, folder, arguments.format, arguments.dynamic_size)
        if arguments.int8:
            quantize(folder / FORMATS["onnx"], folder / INT8_FILE, arguments.int8)
            account["int8"] = {**measure_int8(loaded, folder, arguments.images), "kind": arguments.int8}
        account["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / "export.json").write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    account = {"model": arguments.model, "output": str(arguments.out), **account}
    print(json.dumps(account, indent=2) if arguments.json else account_table(account))
    return 0


def measure_int8(loaded: Loaded, folder: Path, patterns: Sequence[str]) -> dict[str, Any]:
    """`compare_int8` on the images of `--images`; unreadable ones are listed."""
    unreadable: list[dict[str, str]] = []
    paths = find_images(patterns) if patterns else []
    account = compare_int8(loaded, folder, read_images(paths, loaded.model.config.num_channels, unreadable))
    if paths and not account["n"]:
        raise HFViTError("none of --images could be read: int8 cannot be measured on them")
    return account | ({"unreadable": unreadable} if unreadable else {})


def account_table(account: dict[str, Any]) -> str:
    """The summary as text."""
    sizes = {name: size / 1e6 for name, size in account["files"].items() if name.startswith("model")}
    lines = [f"written     {account['output']}: " + ", ".join(f"{name} ({mb:.1f} MB)" for name, mb in sizes.items())]
    for check in account["checked"]:
        shape = f"{check['batch']} x {check['height']} x {check['width']}"
        lines.append(f"checked     {shape}: largest difference {check['largest_difference']:.1e}")
    if int8 := account.get("int8"):
        change = "not measured (no --images)"
        if "largest_change" in int8:
            changes = ", ".join(f"{name} by at most {value:.3g}" for name, value in int8["largest_change"].items())
            change = f"{int8['n']} images: {changes}"
        elif int8["n"]:
            change = f"same label on {int8['same_label']:.1%} of {int8['n']} images"
        if "labelled" in int8:
            float32, quantized = int8["accuracy_float32"], int8["accuracy_int8"]
            change += f", accuracy {float32:.2%} -> {quantized:.2%} on {int8['labelled']}"
        lines.append(f"int8        {int8['kind']}: {change}")
        for row in int8.get("unreadable", []):
            print(f"unreadable: {row['image']}: {row['reason']}", file=sys.stderr)
    return "\n".join(lines)
