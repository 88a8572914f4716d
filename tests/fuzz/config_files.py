"""Damaged config.json files through `from_pretrained`: what becomes of each.

    python -m tests.fuzz.config_files [--every 1]

Every field takes every value of VALUES. A folder may load with the same answers, or be refused by one ValueError or
OSError line. It must never answer otherwise, end in another exception, or take longer than `SECONDS` of processor
time.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

import torch
import transformers

from hf_vit import HFViTConfig, HFViTForImageClassification
from tests.fuzz.command import report
from tests.fuzz.time_limit import Hang, start_clock, stop_clock


SECONDS = 20
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 5, 7, 64, 10**6, 10**9, 10**18, 10**30, -(10**9),
    0.5, 1.5, -0.5, 1e-320, 1e300, float("nan"), float("inf"), -float("inf"),
    "", "x", "12", "true", "none", "float99", "\0",
    [], [1], [1, 2], [32, 32], [0, 0], [-1, 5], ["a"], [None, None], [["a", "b"]],
    {}, {"a": 1}, {"0": "a"}, {"0": "a", "1": "b", "2": "c"}, {"1": "a", "2": "b", "3": "c"}, {"-1": "a", "0": "b"},
    {"0": None},
]  # fmt: skip
MORE_FIELDS = (
    "num_labels",
    "torch_dtype",
    "attn_implementation",
    "per_layer_config",
    "output_attentions",
    "rope_scaling",
)
# Nothing in the weights contradicts another number of heads or another epsilon.
NOT_IN_THE_WEIGHTS = {("num_attention_heads", 1), ("num_attention_heads", 2), ("layer_norm_eps", 0.5)}


def original(folder: Path) -> tuple[HFViTForImageClassification, torch.Tensor]:
    """A small model saved in a folder, and an image."""
    torch.manual_seed(0)
    config = HFViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, patch_size=8, image_size=32,
        id2label={0: "a", 1: "b", 2: "c"},
    )  # fmt: skip
    model = HFViTForImageClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model, torch.randn(1, 3, 32, 32)


def outcome(folder: Path, pixels: torch.Tensor, logits: torch.Tensor) -> str:
    start_clock(SECONDS)
    try:
        found = HFViTForImageClassification.from_pretrained(folder).eval()(pixels).logits
        same = isinstance(found, torch.Tensor) and found.shape == logits.shape
        return "same" if same and torch.allclose(found.float(), logits, rtol=0, atol=1e-2) else "silently wrong"
    except Hang:
        return "hang"
    except (ValueError, OSError) as error:
        return "refused" if str(error).count("\n") <= 1 else "refused in many lines"
    except Exception as error:
        return f"traceback {type(error).__name__}"
    finally:
        stop_clock()


@torch.no_grad()
def run(every: int = 1) -> tuple[Counter, list[str]]:
    """Outcomes of every so-manieth mutation, and a line for each that must not be."""
    outcomes: Counter = Counter()
    bad = []
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, pixels = original(folder)
        logits = model(pixels).logits
        fields = json.loads((folder / "config.json").read_text())
        mutations = [(field, value) for field in (*fields, *MORE_FIELDS) for value in VALUES]
        for field, value in mutations[::every]:
            (folder / "config.json").write_text(json.dumps(fields | {field: value}))
            result = outcome(folder, pixels, logits)
            if result == "silently wrong" and (field, value) in NOT_IN_THE_WEIGHTS:
                result = "cannot be known"
            outcomes[result] += 1
            if result not in ("same", "refused", "cannot be known"):
                bad.append(f"{field}={value!r}: {result}")
    transformers.logging.set_verbosity(verbosity)
    return outcomes, bad


if __name__ == "__main__":
    report(__doc__, run, every=1)
