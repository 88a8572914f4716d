"""Kill a run with SIGKILL at random moments, resume it, and compare with the run that was left alone, byte by byte.

    python -m benchmarks.kill_and_resume                  # 20 kills on the CPU, some minutes
    python -m benchmarks.kill_and_resume --kills 4 --seed 1

Every trial trains a small hybrid ViT on scikit-learn's digits with dropout, mixup, an average of the weights and
gradient accumulation. It is killed once, with all its processes and workers, at a moment drawn from the whole
duration of the run (start, steps, evaluation, checkpoint, final writing), then resumed with other workers.
Map-style reading and streaming with 0, 2 and 4 workers, two processes, and checkpoints written beside the steps take
turns. Equal means: the same bytes of model.safetensors and history.jsonl.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_vit.capabilities import processor_name
from hf_vit.errors import HFViTError, Parser, report_error
from training import finetune
from training.data.dataset import open_dataset
from training.reporting.facts import commit


RESULTS = Path(__file__).parent / "results"
RUN = (
    "--set hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64 patch_size=2 "
    "resnet_depths=[] hidden_dropout_prob=0.1 drop_path_rate=0.1 --image_size 16 --use_cpu --disable_tqdm "
    "--max_steps 40 --logging_steps 3 --save_steps 4 --save_total_limit 2 --eval_steps 13 "
    "--per_device_train_batch_size 8 --gradient_accumulation_steps 2 --learning_rate 3e-3 --weight_decay 0.1 "
    "--mixup_alpha 0.2 --cutmix_alpha 0.5 --ema_decay 0.95 --label_smoothing_factor 0.1"
)
COMPARED = ("model.safetensors", "history.jsonl")


@dataclass(frozen=True)
class Kind:
    """A way of running: where the images come from, how many processes, workers before and after the kill."""

    name: str
    processes: int
    workers: tuple[int, int]
    streaming: bool
    async_save: bool = False

    @property
    def reference(self) -> str:
        """Runs of one reference end with the same bytes: workers must not matter."""
        return f"{'stream' if self.streaming else 'map'}-{self.processes}"


KINDS = [
    Kind("map-style, 0 then 2 workers", 1, (0, 2), False),
    Kind("streaming, 2 then 0 workers", 1, (2, 0), True),
    Kind("map-style, 4 then 0 workers", 1, (4, 0), False),
    Kind("two processes, map-style", 2, (0, 0), False),
    Kind("streaming, 4 then 2 workers", 1, (4, 2), True),
    Kind("two processes, streaming", 2, (0, 2), True),
    Kind("map-style, async checkpoints", 1, (0, 2), False, async_save=True),
    Kind("two processes, async checkpoints", 2, (0, 0), False, async_save=True),
]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.kill_and_resume", description="Kill, resume, compare.")
    parser.add_argument("--kills", type=int, default=20, help="trials (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    try:
        arguments = parser.parse_args(argv)
    except HFViTError as error:
        return report_error(error)
    torch.set_num_threads(1)
    moments, trials = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        parquet = write_parquet(root / "digits")
        whole: dict[str, tuple[float, dict]] = {}
        for number in range(arguments.kills):
            kind = KINDS[number % len(KINDS)]
            if kind.reference not in whole:
                folder = root / kind.reference
                seconds = train(kind, folder, parquet, kind.workers[0])
                whole[kind.reference] = (seconds, digests(folder))
            seconds, expected = whole[kind.reference]
            trial = kill_once(kind, root / "trial", parquet, moments.uniform(0, seconds))
            trial["equal"] = digests(root / "trial") == expected
            trials.append({"kind": kind.name, **trial})
            shutil.rmtree(root / "trial")
            print(f"{number + 1:>3}  {describe(trials[-1])}", flush=True)
            write_results(arguments.seed, trials)
    equal = sum(trial["equal"] for trial in trials)
    print(f"\n{equal} of {len(trials)} runs that were killed and resumed ended with the same bytes")
    return 0 if equal == len(trials) else 1


def write_results(seed: int, trials: list[dict]) -> None:
    """After every trial: an hour of them is not lost with the last."""
    RESULTS.mkdir(exist_ok=True)
    result = {
        "what": "kill and resume",
        "seed": seed,
        "equal": sum(trial["equal"] for trial in trials),
        "trials": trials,
        "environment": {"hardware": processor_name(), "torch": torch.__version__, "commit": commit()},
    }
    (RESULTS / "kill-and-resume-cpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def describe(trial: dict) -> str:
    state = "equal" if trial["equal"] else "NOT EQUAL"
    return f"{trial['kind']:<30} killed after {trial['after_seconds']:5.2f} s, at {trial['found']:<26} {state}"


def write_parquet(folder: Path) -> Path:
    """The digits as parquet files of small row groups, which can be streamed."""
    from datasets import ClassLabel, Dataset, Features, disable_progress_bars
    from datasets import Image as DatasetImage

    disable_progress_bars()
    folder.mkdir()
    for split in ("train", "test"):
        digits = open_dataset("digits", split=split)
        rows = [(Image.fromarray(np.asarray(digits.read(i)[0])), int(digits.labels[i])) for i in range(len(digits))]
        features = Features({"image": DatasetImage(), "label": ClassLabel(names=digits.label_names)})
        table = Dataset.from_list([{"image": image, "label": label} for image, label in rows], features=features)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"), batch_size=50)
    return folder


def train(kind: Kind, folder: Path, parquet: Path, workers: int, kill_after: float | None = None) -> float:
    """Run to the end, or until the kill; returns the seconds it took."""
    words = [
        *RUN.split(),
        "--output_dir",
        str(folder),
        "--dataloader_num_workers",
        str(workers),
        "--resume_from_checkpoint",
    ]
    words += ["--async_save"] if kind.async_save else []
    words += ["--dataset", str(parquet), "--streaming"] if kind.streaming else ["--dataset", "digits", "--no_flip"]
    context, port = multiprocessing.get_context("fork"), 20_000 + os.getpid() % 20_000
    began = time.monotonic()
    ranks = [context.Process(target=child, args=(words, rank, kind.processes, port)) for rank in range(kind.processes)]
    for rank in ranks:
        rank.start()
    if kill_after is not None:
        time.sleep(max(0.0, began + kill_after - time.monotonic()))
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.join()
        if kill_after is None and rank.exitcode:
            raise SystemExit(f"error: a run ended with status {rank.exitcode}; its message stands above")
    return time.monotonic() - began


def child(words: list[str], rank: int, processes: int, port: int) -> None:
    """One process of a run, as torchrun would start it, silent and in a group of its own."""
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if processes > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in world.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    errors = os.dup(2)
    os.dup2(quiet, 2)
    try:
        finetune.main(words)
    except SystemExit as stop:
        if stop.code:
            os.write(errors, f"process {rank} ended with status {stop.code}\n".encode())
        raise


def kill_once(kind: Kind, folder: Path, parquet: Path, after: float) -> dict:
    """Kill a run after so many seconds, resume it, and say what the kill left."""
    train(kind, folder, parquet, kind.workers[0], kill_after=after)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    steps = [int(name.split("-")[1]) for name in names if name.startswith("checkpoint-")]
    writing = any(name.startswith(".") for name in names)
    found = "the start" if not steps else f"checkpoint-{max(steps)}" + (", while writing" if writing else "")
    train(kind, folder, parquet, kind.workers[1])
    return {"after_seconds": round(after, 3), "found": found}


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in COMPARED}


if __name__ == "__main__":
    sys.exit(main())
