"""Detect slowdowns without a clock: counts of work, compared with recorded ones and with transformers' ViT.

    make bench-check
    python -m benchmarks.check --update        # after an intended change

Each case counts operations, GFLOP of the matmuls, megabytes written, and calls of Python functions; for loading,
random initializations. The counts depend only on the versions of torch and transformers. One percent more than
recorded is a failure (exit status 1).
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import transformers_vit
from benchmarks.cpu_training import fused, step
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.errors import HFViTError, Parser, report_error


RECORDED = Path(__file__).parent / "results" / "counts.json"
MAX_OVER_RECORDED = 1.01
MAX_OVER_TRANSFORMERS = 1.1  # positions are added to class token and patches apart: one small operation more
VERSIONS = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
TRANSFORMERS = " (transformers)"


class Operations(TorchDispatchMode):
    """Counts operations and the bytes of their new results; views, no-ops and meta tensors do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes, self.names = 0, 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        known = {x.data_ptr() for x in inputs}
        made = [x for x in tree_leaves(result) if torch.is_tensor(x) and not x.is_meta and x.data_ptr() not in known]
        if not func.is_view and (made or (func._schema.is_mutable and not inputs[0].is_meta)):
            self.count += 1
            self.names[func.overloadpacket.__name__] += 1
            self.bytes += sum(x.numel() * x.element_size() for x in made)
        return result


def counted(work: Callable[[], Any]) -> dict[str, float]:
    """Operations, GFLOP, megabytes and Python calls of `work`, in its second run."""
    work()
    calls = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    with FlopCounterMode(display=False) as flops:
        work()
    with Operations() as operations:
        work()
    return {
        "operations": operations.count,
        "gflop": round(flops.get_total_flops() / 1e9, 4),
        "megabytes": round(operations.bytes / 1e6, 3),
        "python_calls": calls,
    }


def config(**changes: Any) -> HFViTConfig:
    """Four blocks of a ViT-Ti at 224 px, which have every kind of operation."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
    return HFViTConfig(**{"image_size": 224, "patch_size": 16, "num_labels": 10, **sizes, **changes})


def cases() -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels, labels = torch.randn(8, 3, 224, 224), torch.arange(8)

    def ours(**changes: Any) -> HFViTForImageClassification:
        return HFViTForImageClassification(config(**changes)).eval()

    def forward(model: torch.nn.Module) -> Callable[[], Any]:
        return torch.inference_mode()(lambda: model(pixels))

    def training_step(model: torch.nn.Module, low: bool) -> Callable[[], None]:
        # without the CPU kernels, which differ between machines
        one_step = step(model, pixels, labels, low, fused(model))

        def run() -> None:
            torch.manual_seed(1)  # the same samples drop the same paths
            one_step()

        return run

    theirs = transformers_vit(config(), "sdpa").eval()
    hybrid = ours(resnet_depths=(2, 2), patch_size=2)
    return {
        "forward": counted(forward(ours())),
        f"forward{TRANSFORMERS}": counted(forward(theirs)),
        "forward of a hybrid": counted(forward(hybrid)),
        "training step, float32": counted(training_step(ours(), False)),
        f"training step, float32{TRANSFORMERS}": counted(training_step(theirs, False)),
        "training step, bfloat16": counted(training_step(ours(), True)),
        "training step, drop path 0.4": counted(training_step(ours(drop_path_rate=0.4), False)),
        "training step, patch dropout 0.5": counted(training_step(ours(patch_dropout_rate=0.5), False)),
        "loading": loading(),
    }


def loading() -> dict[str, float]:
    """Tensors of random numbers drawn by `from_pretrained`: no weight is initialized to be overwritten."""
    with tempfile.TemporaryDirectory() as folder:
        HFViTForImageClassification(config()).save_pretrained(folder)
        with Operations() as operations:
            HFViTForImageClassification.from_pretrained(folder)
    draws = sum(count for name, count in operations.names.items() if "uniform" in name or "normal" in name)
    return {"random_operations": draws, "operations": operations.count}


def compare(counted_now: dict[str, dict[str, float]], recorded: dict[str, dict[str, float]]) -> list[str]:
    """One line for each count that is worse than recorded, or than transformers' in the same run."""
    worse = []
    for case, counts in counted_now.items():
        for name, value in counts.items():
            before = recorded.get(case, {}).get(name)
            if before is None:
                worse.append(f"{case}: {name} is not recorded: run with --update")
            elif value > before * MAX_OVER_RECORDED:
                worse.append(f"{case}: {name} {value:,} against {before:,} recorded")
        theirs = counted_now.get(case + TRANSFORMERS)
        if theirs:
            worse += [
                f"{case}: {name} {counts[name]:,} against {theirs[name]:,} of transformers"
                for name in ("operations", "gflop")
                if counts[name] > theirs[name] * MAX_OVER_TRANSFORMERS
            ]
    return worse


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.check", description="Counts of work, without a clock.")
    parser.add_argument("--update", action="store_true", help="record the counts")
    try:
        arguments = parser.parse_args(argv)
    except HFViTError as error:
        return report_error(error)
    counts_of = cases()
    for case, counts in counts_of.items():
        print(f"{case:<42}" + "  ".join(f"{name} {value:,}" for name, value in counts.items()))
    if arguments.update:
        RECORDED.write_text(json.dumps({"versions": VERSIONS, "counts": counts_of}, indent=1) + "\n", encoding="utf-8")
        return 0
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    if recorded["versions"] != VERSIONS:
        differs = f"recorded with {recorded['versions']}, this is {VERSIONS}: install constraints.txt, or --update"
        return report_error(HFViTError(differs))
    worse = compare(counts_of, recorded["counts"])
    print("\n".join(worse) or "\nno more work than recorded", file=sys.stderr if worse else sys.stdout)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
