"""What the Trainer's loop costs: its steps against a bare PyTorch loop that does the same work, in turns.

    python -m benchmarks.loop_overhead
    python -m benchmarks.loop_overhead --preset vit-small-patch16-224 --batch_size 64 --rounds 20

Both read the same images in the same order through the same DataLoader settings, normalize, run forward and
backward, clip, step AdamW and the schedule, and add up loss and accuracy on the device, logging every 10 steps. The
bare loop has no Accelerate, callbacks, checks or display. A round is one run of each, in changing order; the first
round is not counted. Compared are the medians over rounds of the median time of a step: on a GPU wall-clock time,
on the CPU the processor time of the process, which other programs on the machine disturb less.
"""

import json
import logging
import math
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
import transformers

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.capabilities import processor_name
from hf_vit.errors import Parser, report_error
from training.config.arguments import TrainArguments
from training.data.dataset import collate, open_dataset
from training.data.samplers import TrainSampler
from training.data.transforms import TrainTransform
from training.engine.optimizers import create_optimizer
from training.engine.planning.lr_schedules import create_scheduler
from training.engine.trainer import Trainer
from training.reporting.facts import commit


RESULTS = Path(__file__).parent / "results"
LOG_EVERY = 10


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.loop_overhead", description="Trainer against bare loop.")
    parser.add_argument("--preset", default=None, help="size (default: the quickstart's ViT at 16 px)")
    parser.add_argument("--batch_size", type=int, default=128, help="images of a step (default: 128)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run (default: 20)")
    parser.add_argument("--rounds", type=int, default=10, help="counted runs of each (default: 10)")
    try:
        arguments = parser.parse_args(argv)
        config = model_config(arguments.preset)
    except ValueError as error:
        return report_error(error)
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    data = open_dataset("synthetic:glyphs@52,200", split="train")
    data = data.with_transform(TrainTransform(config.image_size_hw, crop="squash"))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    seconds: dict[str, list[float]] = {"bare loop": [], "Trainer": []}
    for number in range(arguments.rounds + 1):
        runs = {"bare loop": bare, "Trainer": ours}
        for name in list(runs)[:: 1 if number % 2 else -1]:
            step_seconds = statistics.median(runs[name](config, data, arguments.batch_size, arguments.steps, device))
            if number:
                seconds[name].append(step_seconds)
        print(f"\rround {number} of {arguments.rounds}", end="", file=sys.stderr, flush=True)
    report(arguments, config, device, seconds)
    return 0


def model_config(preset: str | None) -> HFViTConfig:
    if preset is not None:
        return HFViTConfig.from_preset(preset, num_labels=52)
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 384}
    return HFViTConfig(**sizes, patch_size=4, image_size=16, num_labels=52)


def training_arguments(folder: str, batch_size: int, steps: int) -> TrainArguments:
    return TrainArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, logging_steps=LOG_EVERY,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-3, weight_decay=0.05,
    )  # fmt: skip


class Clock(transformers.TrainerCallback):
    """Notes when each step ended."""

    def __init__(self, device: torch.device):
        self.now = time.process_time if device.type == "cpu" else time.perf_counter
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(self.now())


def ours(config, data, batch_size: int, steps: int, device: torch.device) -> list[float]:
    """Seconds of each step of the Trainer, but for the first."""
    torch.manual_seed(0)
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(folder, batch_size, steps)
        trainer = Trainer(HFViTForImageClassification(config), args, data, callbacks=[clock])
        trainer.display.enabled = False
        trainer.train()
    return differences(clock.ends)


def bare(config, data, batch_size: int, steps: int, device: torch.device) -> list[float]:
    """Seconds of each step of the loop that one would write by hand, but for the first."""
    torch.manual_seed(0)
    args = training_arguments("", batch_size, steps)
    model = HFViTForImageClassification(config).to(device).train()
    optimizer = create_optimizer(model, args)
    schedule = create_scheduler(optimizer, args, steps)
    order = TrainSampler(len(data), batch_size, seed=42, position=0, stop=batch_size * steps, rank=0, world_size=1)
    loader = torch.utils.data.DataLoader(data, batch_sampler=order, collate_fn=collate)
    total, hits, clock = torch.zeros((), device=device), torch.zeros((), device=device), Clock(device)
    for number, batch in enumerate(loader, start=1):
        pixels = (batch["pixel_values"].to(device).float() / 255 - 0.5) / 0.5
        labels = batch["labels"].to(device)
        logits = model(pixels).logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.detach()
        hits += (logits.argmax(-1) == labels).sum()
        if number % LOG_EVERY == 0:
            if not math.isfinite(total.item() + hits.item()):
                raise SystemExit("error: the loss is not finite")
            total.zero_()
            hits.zero_()
        clock.ends.append(clock.now())
    return differences(clock.ends)


def differences(moments: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(moments)]


def report(arguments, config: HFViTConfig, device: torch.device, seconds: dict[str, list[float]]) -> None:
    """Print the table and write the result."""
    bare_median, our_median = (statistics.median(values) for values in seconds.values())
    pairs = [own / other - 1 for other, own in zip(*seconds.values())]
    low, overhead, high = statistics.quantiles(pairs, n=4)
    shape = f"{arguments.rounds} rounds of {arguments.steps} steps of {arguments.batch_size}"
    print(f"\r{'':<24}{'median ms':>12}   {shape}")
    print(f"{'bare loop':<24}{1e3 * bare_median:>12.2f}\n{'Trainer':<24}{1e3 * our_median:>12.2f}")
    print(f"overhead {overhead:+.2%} (quartiles of the rounds {low:+.2%} to {high:+.2%})")
    result = {
        "what": "loop overhead",
        "model": arguments.preset or "quickstart",
        "image_size": list(config.image_size_hw),
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "clock": "processor" if device.type == "cpu" else "wall",
        "seconds": seconds,
        "overhead_median": overhead,
        "overhead_quartiles": [low, high],
        "environment": {
            "hardware": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit(),
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"loop-overhead-{arguments.preset or 'quickstart'}-{device.type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
