"""Start-up: importing, and loading a ViT-L, in time and memory, compared with transformers.

A suite of `benchmarks.run`. Files are in the page cache, and Python processes keep their bytecode, as installed
packages do.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import ViTForImageClassification

from benchmarks.cpu_inference import CPU
from benchmarks.measure import Point, filled
from hf_vit import HFViTConfig, HFViTForImageClassification


LOAD = """
import sys
import benchmarks.torchvision_operators
import transformers
from {module} import {name}
transformers.logging.disable_progress_bar()
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
model = {name}.from_pretrained(sys.argv[1])
sum(float(p.detach().sum()) for p in model.parameters())  # files are mapped: a weight takes memory when it is read
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / weights)
"""

ADDED = """
import time
import transformers
began = time.perf_counter()
import hf_vit
print(time.perf_counter() - began)
"""


def points(options: argparse.Namespace) -> Iterator[Point]:
    def imports(statement: str) -> Callable[[], None]:
        return lambda: python(statement)

    added = statistics.median(float(python(ADDED)) for _ in range(9))
    yield Point(
        "import", 1, {"hf_vit and transformers": imports("import transformers, hf_vit")},
        {"transformers": imports("import transformers")},
        unit="s", note="a whole Python each; `import transformers` leaves out torch and every model; "
        f"`import hf_vit` takes {1000 * added:.1f} ms of it (median of 9)",
    )  # fmt: skip
    yield Point(
        "import of the classes", 1, {"hf_vit": imports("from hf_vit import HFViTForImageClassification")},
        {
            "transformers ViT": imports("from transformers import ViTForImageClassification"),
            "torch": imports("import torch"),
        },
        unit="s", note="a whole Python each",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = HFViTConfig.from_preset("vit-large-patch16-224", num_labels=1000)
        filled(lambda: HFViTForImageClassification(config), CPU).save_pretrained(folder)
        memory: dict[str, float] = {}

        def load(module: str, name: str) -> Callable[[], None]:
            def call() -> None:
                memory[module] = float(python(LOAD.format(module=module, name=name), folder))

            return call

        ours, theirs = load("hf_vit", "HFViTForImageClassification"), load("transformers", "ViTForImageClassification")
        ours(), theirs()
        yield Point(
            "load a ViT-L/16, 1.2 GB of float32", 1, {"hf_vit": ours}, {"transformers ViT": theirs}, unit="s",
            note="a whole Python each, imports included, every weight read once; resident memory grows at most by "
            + ", ".join(f"{peak:.2f} x the weights ({module})" for module, peak in memory.items()),
        )  # fmt: skip
        yield Point(
            "from_pretrained of a ViT-L/16 alone", 1,
            {"hf_vit": lambda: HFViTForImageClassification.from_pretrained(folder)},
            {"transformers ViT": lambda: ViTForImageClassification.from_pretrained(folder)},
            unit="s", note="in one process; weights are mapped, not read",
        )  # fmt: skip


def python(code: str, *arguments: str) -> str:
    """What a Python of its own prints."""
    command = [sys.executable, "-c", code, *arguments]
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return done.stdout
