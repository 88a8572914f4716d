"""`hf-vit info MODEL`: a model's parts with their output, parameters and multiply-adds.

Tests: tests/hf_vit/cli/test_cli.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..modeling.configuration_hf_vit import PRESETS, HFViTConfig
from ..modeling.modeling_hf_vit import HFViTForImageClassification
from ..problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, problem_type_of
from .inputs import image_size, load_model, print_table


OUTPUTS = {SINGLE_LABEL: "labels", MULTI_LABEL: "labels, several of an image", REGRESSION: "numbers (regression)"}
EXAMPLES = """\
  hf-vit info vit-base-patch16-224
  hf-vit info r50-vit-base-patch16-384
  hf-vit info path/to/model --image-size 384 512
  hf-vit info R26_S_32.npz --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument(
        "model", help=f"preset ({', '.join(list(PRESETS)[:3])}, ...), folder, Hub id or checkpoint file"
    )
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="one number, or height and width")


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments.model)
    if (size := image_size(arguments)) is not None:
        config.image_size = size
        config.check_architecture()
    facts = describe_network(config)
    if arguments.json:
        print(json.dumps({"model": arguments.model, **facts}, indent=2))
        return 0
    height, width = facts["image_size"]
    print(f"{arguments.model}: {height} x {width} px, {facts['tokens']} tokens, {facts['num_labels']} "
          f"{OUTPUTS[facts['problem_type']]}\n")  # fmt: skip
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
        return load_model(model).model.config
    return HFViTConfig.from_preset(model, num_labels=1000)


def describe_network(config: HFViTConfig) -> dict[str, Any]:
    """The parts of the network in forward order, with output, parameters and multiply-adds.

    Multiply-adds are counted by PyTorch's FlopCounterMode on the meta device: matmuls and convolutions for one image,
    without norms and activations.
    """
    with torch.device("meta"):
        model = HFViTForImageClassification._from_config(config, attn_implementation="eager").eval()
        model.requires_grad_(False)  # with gradients, the counter fails at the probe of attention pooling
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, config.num_channels, *config.image_size_hw))
    flops = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}

    def count(prefix: str, parameters: int | None = None) -> dict[str, int]:
        module = model.get_submodule(prefix)
        number = sum(parameter.numel() for parameter in module.parameters()) if parameters is None else parameters
        return {"parameters": number, "macs": flops.get(f"{type(model).__name__}.{prefix}", 0) // 2}

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
    for name, module in (("patch norm", "patch_norm"), ("norm before the blocks", "pre_layernorm")):
        if getattr(config, module):
            parts.append({"name": name, "output": f"{tokens} x {width}", **count(f"{embeddings}.{module}")})
    depth = config.num_hidden_layers
    block = count("vit.layers.0") if depth else {"parameters": 0, "macs": 0}
    shared = model.vit.shared_relative_position_bias_table
    if shared is not None:
        row = {"name": "shared relative biases", "output": "", "parameters": shared.numel(), "macs": 0}
        parts.append(row)
    parts.append(
        {
            "name": f"{depth} blocks of {block['parameters']:,}",
            "output": f"{tokens} x {width}",
            "parameters": depth * block["parameters"],
            "macs": depth * block["macs"],
        }
    )
    if config.final_norm != "none":
        output = f"{tokens} x {width}" if config.final_norm == "tokens" else f"{width}"
        parts.append({"name": "final norm", "output": output, **count("vit.layernorm")})
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
        "problem_type": problem_type_of(config),
        "parameters": parameters,
        "macs": counter.get_total_flops() // 2,
        "weight_bytes": {"float32": 4 * parameters, "bfloat16": 2 * parameters},
        "parts": parts,
    }
