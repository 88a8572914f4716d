"""The command line: hf-vit convert | info | predict | inspect | export | demo | card | push.

Each command is one pair of functions, `add_NAME` for its options and `run_NAME` for its work, which returns the exit
status. Results go to stdout (a table, or JSON with `--json`), everything else to stderr. Bad input is one line there,
`error: ...`, and exit status 2.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from hf_vit import (
    HFViTConfig,
    HFViTForImageClassification,
    __version__,
    demo,
    export,
    inspect_command,
    predict_command,
)
from hf_vit.checkpoints import convert
from hf_vit.configuration_hf_vit import PRESETS
from hf_vit.errors import HFViTError, Parser, report_error
from hf_vit.hub import push_folder, push_space
from hf_vit.inputs import image_size, load, print_table
from hf_vit.model_card import is_hub_id, write_card


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` is what follows `hf-vit`. Returns the exit status."""
    try:
        arguments = build_parser().parse_args(argv)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        return report_error(error)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hf-vit", description="Vision Transformers and hybrids: look, predict, share.")
    parser.add_argument("--version", action="version", version=f"hf_vit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_convert, add_info, add_predict, add_inspect, add_export, add_demo, add_card, add_push):
        add(commands)
    return parser


def command(commands: Any, name: str, run: Any, about: str, examples: str) -> argparse.ArgumentParser:
    """A sub-command with its examples under the options and the `--json` that all have."""
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)
    return parser


# -- convert (its options and its work are hf_vit/checkpoints/convert.py) ----------------------------------------


def add_convert(commands: Any) -> None:
    about = "turn a checkpoint of Google, timm, torchvision or transformers into another format"
    convert.add_arguments(command(commands, "convert", convert.run, about, convert.EXAMPLES))


# -- info --------------------------------------------------------------------------------------------------------


def add_info(commands: Any) -> None:
    parser = command(
        commands,
        "info",
        run_info,
        "show a model's parts with their output, parameters and multiply-adds",
        "  hf-vit info vit-base-patch16-224\n"
        "  hf-vit info r50-vit-base-patch16-384\n"
        "  hf-vit info path/to/model --image-size 384 512\n"
        "  hf-vit info R26_S_32.npz --json",
    )
    parser.add_argument(
        "model", help=f"preset ({', '.join(list(PRESETS)[:3])}, ...), folder, Hub id or checkpoint file"
    )
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="one number, or height and width")


def run_info(arguments: argparse.Namespace) -> int:
    config = config_of(arguments.model)
    if (size := image_size(arguments)) is not None:
        config.image_size = size
        config.check_architecture()
    facts = describe(config)
    if arguments.json:
        print(json.dumps({"model": arguments.model, **facts}, indent=2))
        return 0
    height, width = facts["image_size"]
    print(f"{arguments.model}: {height} x {width} px, {facts['tokens']} tokens, {facts['num_labels']} labels\n")
    table = [("part", "output", "parameters", "MACs")]
    table += [
        (part["name"], part["output"], f"{part['parameters']:,}", f"{part['macs']:,}") for part in facts["parts"]
    ]
    table.append(("total", "", f"{facts['parameters']:,}", f"{facts['macs']:,}"))
    print_table(table)
    megabytes = facts["weight_bytes"]
    print(f"\n{facts['macs'] / 1e9:.2f} GMACs for one image; weights {megabytes['float32'] / 1e6:,.1f} MB in float32, "
          f"{megabytes['bfloat16'] / 1e6:,.1f} MB in bfloat16")  # fmt: skip
    return 0


def config_of(model: str) -> HFViTConfig:
    """The configuration of a preset (with ImageNet's 1000 labels), a checkpoint file, a folder or a Hub repository."""
    if Path(model).exists() or "/" in model or Path(model).suffix:
        return load(model).model.config
    return HFViTConfig.from_preset(model, num_labels=1000)


def describe(config: HFViTConfig) -> dict[str, Any]:
    """Parts of the network in the order in which a picture passes them.

    Multiply-adds are counted by running the network without data (PyTorch's FlopCounterMode on the meta device):
    matrix products and convolutions of one image, not norms and activations.
    """
    with torch.device("meta"):
        model = HFViTForImageClassification._from_config(config, attn_implementation="eager").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, config.num_channels, *config.image_size_hw))
    flops = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}

    def count(prefix: str, parameters: int | None = None) -> dict[str, int]:
        module = model.get_submodule(prefix)
        own = sum(parameter.numel() for parameter in module.parameters()) if parameters is None else parameters
        return {"parameters": own, "macs": flops.get(f"{type(model).__name__}.{prefix}", 0) // 2}

    rows, columns = config.grid_size
    tokens, width = rows * columns + config.num_prefix_tokens, config.hidden_size
    embeddings, stem = "vit.embeddings", "vit.embeddings.patch_embeddings"
    parts = []
    if config.resnet_depths is not None:
        units = "-".join(map(str, config.resnet_depths)) or "root only"
        parts.append({"name": f"ResNet ({units})", "output": "feature map", **count(f"{stem}.backbone")})
    parts.append(
        {"name": "patch projection", "output": f"{rows} x {columns} x {width}", **count(f"{stem}.projection")}
    )
    loose = sum(parameter.numel() for parameter in model.get_submodule(embeddings).parameters(recurse=False))
    if loose:
        parts.append({"name": "tokens and positions", "output": f"{tokens} x {width}", "parameters": loose, "macs": 0})
    block, depth = count("vit.layers.0"), config.num_hidden_layers
    parts.append(
        {
            "name": f"{depth} blocks of {block['parameters']:,}",
            "output": f"{tokens} x {width}",
            "parameters": depth * block["parameters"],
            "macs": depth * block["macs"],
        }
    )
    parts.append({"name": "final norm", "output": f"{tokens} x {width}", **count("vit.layernorm")})
    if config.pooling == "map":
        parts.append({"name": "attention pooling", "output": f"{width}", **count("vit.map_head")})
    if config.representation_size is not None:
        parts.append({"name": "representation", "output": f"{config.representation_size}", **count("vit.pooler")})
    if config.num_labels:
        parts.append({"name": "classifier", "output": f"{config.num_labels}", **count("classifier")})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "image_size": list(config.image_size_hw),
        "tokens": tokens,
        "num_labels": config.num_labels,
        "parameters": parameters,
        "macs": counter.get_total_flops() // 2,
        "weight_bytes": {"float32": 4 * parameters, "bfloat16": 2 * parameters},
        "parts": parts,
    }


# -- predict (its options and its work are hf_vit/predict_command.py) ---------------------------------------------


def add_predict(commands: Any) -> None:
    predict_command.add_arguments(
        command(commands, "predict", predict_command.run, "classify pictures", predict_command.EXAMPLES)
    )


# -- export (its options and its work are hf_vit/export.py) -------------------------------------------------------


def add_export(commands: Any) -> None:
    about = "write an ONNX or torch.export model that needs no transformers, and check it against the model"
    export.add_arguments(command(commands, "export", export.run, about, export.EXAMPLES))


# -- inspect (its options and its work are hf_vit/inspect_command.py) ---------------------------------------------


def add_inspect(commands: Any) -> None:
    about = "show what a model attends to: maps over pictures, filters, positions, distances, on one page"
    inspect_command.add_arguments(command(commands, "inspect", inspect_command.run, about, inspect_command.EXAMPLES))


# -- demo (its options and its work are hf_vit/demo.py) -----------------------------------------------------------


def add_demo(commands: Any) -> None:
    about = "serve a page that classifies a picture and shows where the model looks"
    demo.add_arguments(command(commands, "demo", demo.run, about, demo.EXAMPLES))


# -- card and push -----------------------------------------------------------------------------------------------


def add_card(commands: Any) -> None:
    parser = command(
        commands,
        "card",
        run_card,
        "render the model card of a folder from its facts.json",
        "  hf-vit card out\n  hf-vit card out --repo-id owner/name",
    )
    parser.add_argument("folder", help="what training wrote")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="repository that the card's code block loads")


def run_card(arguments: argparse.Namespace) -> int:
    if arguments.repo_id is not None and not is_hub_id(arguments.repo_id):
        raise HFViTError(f"--repo-id '{arguments.repo_id}' is not the name of a repository: write owner/name")
    path = write_card(arguments.folder, arguments.repo_id)
    print(json.dumps({"card": str(path)}) if arguments.json else path)
    return 0


def add_push(commands: Any) -> None:
    parser = command(
        commands,
        "push",
        run_push,
        "upload a folder to the Hub: weights, code, processor, card, facts and figures",
        "  hf-vit push out owner/name\n"
        "  hf-vit push out name --private\n"
        "  hf-vit push out owner/name --create-pr\n"
        "  hf-vit push out owner/name-demo --space\n"
        "The access token is the one of `hf auth login`, or HF_TOKEN.",
    )
    parser.add_argument("folder", help="what training or save_pretrained wrote")
    parser.add_argument("repo", help="owner/name, or name for one of your own; made where it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument(
        "--space", action="store_true", help="upload the page of `hf-vit demo` with the model, as a Space"
    )


def run_push(arguments: argparse.Namespace) -> int:
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
        demo.write_space(arguments.folder, Path(folder) / "space", title)
        url = push_space(Path(folder) / "space", arguments.repo, private=arguments.private)
    print(json.dumps({"url": url}) if arguments.json else url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
