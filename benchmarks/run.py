"""Our forward pass against transformers' ViT with the same weights, in one run, in turns.

    make bench
    python -m benchmarks.run --preset vit-small-patch16-224 --batch_size 8 --rounds 20

Each round times every candidate once, in rotating order, so that a machine that slows down slows all of them. Reported
are median, quartiles and the ratio to the first; the table is printed, everything goes to benchmarks/results/*.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import ViTForImageClassification

from hf_vit import HFViTConfig, HFViTForImageClassification, __version__
from training.facts import processor_name


RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Forward pass against transformers.")
    parser.add_argument("--preset", default="vit-small-patch16-224", help="size (default: vit-small-patch16-224)")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures of one pass (default: 8)")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each candidate (default: 15)")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.manual_seed(0)
    ours, theirs = pair(arguments.preset, device)
    pixels = torch.randn(arguments.batch_size, 3, *ours.config.image_size_hw, device=device)
    with torch.inference_mode():
        difference = (ours(pixels).logits - theirs(pixels).logits).abs().max().item()
        candidates = {"hf_vit": lambda: ours(pixels), "transformers ViT": lambda: theirs(pixels)}
        seconds = interleaved(candidates, arguments.rounds, device)
    result = {
        "what": "forward pass",
        "preset": arguments.preset,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "largest_difference_of_logits": difference,
        "seconds": seconds,
        "environment": {
            "hardware": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_vit": __version__,
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"forward-{arguments.preset}-{device.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    print(f"\nlargest difference of logits {difference:.1e}; written to {path.relative_to(RESULTS.parent.parent)}")
    return 0


def pair(preset: str, device: torch.device) -> tuple[HFViTForImageClassification, ViTForImageClassification]:
    """Ours, and transformers' with the same weights, in eval mode."""
    config = HFViTConfig.from_preset(preset, num_labels=1000)
    if config.resnet_depths is not None or config.pooling != "token":
        raise SystemExit(f"error: transformers has no counterpart of {preset}; choose a plain ViT with a class token")
    ours = HFViTForImageClassification(config)
    torch.nn.init.normal_(ours.classifier.weight, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = ViTForImageClassification.from_pretrained(folder)
    return ours.eval().to(device), theirs.eval().to(device)


def interleaved(candidates: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each pass of each candidate; one warm-up pass each is not counted."""
    names, seconds = list(candidates), {name: [] for name in candidates}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            began = time.perf_counter()
            candidates[name]()
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
        print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def table(result: dict) -> str:
    """Rows of median, quartiles, images/s and ratio to the first candidate."""
    first = None
    lines = [f"{result['preset']}, forward, batch {result['batch_size']}, {result['rounds']} rounds in turns", ""]
    lines.append(f"{'':<20}{'median ms':>12}{'quartiles ms':>20}{'images/s':>12}{'ratio':>8}")
    for name, values in result["seconds"].items():
        low, median, high = statistics.quantiles(values, n=4)
        first = first or median
        spread = f"{1e3 * low:.1f} to {1e3 * high:.1f}"
        rate = result["batch_size"] / median
        lines.append(f"{name:<20}{1e3 * median:>12.1f}{spread:>20}{rate:>12.1f}{median / first:>8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
