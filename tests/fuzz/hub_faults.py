"""Uploads, downloads and trainings that publish, against a Hub that fails from a seed: what becomes of each.

    python -m tests.fuzz.hub_faults [--count 75] [--seed 0]

Requests are answered with 500 or 429, cut before they are read or in the middle of the answer. An upload or a download
may end complete, or be refused by one `HFViTError` line; a training always ends with its folder complete. A commit
that holds a part of a model, other weights than those sent, a token in any output, another exception: none may be.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.command import report
from tests.helpers.hub_process import WRITER
from tests.helpers.hub_process import run as run_process
from tests.helpers.hub_server import Faults, HubServer, Repository


RATE = 0.35  # of requests that fail
WHOLE = {"README.md", "config.json", "modeling_hf_vit.py", "preprocessor_config.json", "facts.json"}
CLIENT = """
import contextlib, hashlib, io, json, sys, time
time.sleep = lambda seconds: None
import torch
from hf_vit import load_checkpoint
from hf_vit.hub.upload import push_folder
from training.pretrain import main as pretrain

def train(folder, *options):
    size = ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=16", "patch_size=4"]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        pretrain([
            "--set", *size, "--image_size", "8", "--dataset", "digits", "--max_steps", "4", "--save_steps", "2",
            "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "512", "--output_dir", folder,
            *options,
        ])
    return said.getvalue()

def do(task, name):
    if task == "train":
        return train(f"{root}/{name}", "--push_to_hub", "true", "--hub_model_id", f"alice/{name}",
                     "--hub_strategy", "every_save")
    if task == "push":
        return push_folder(f"{root}/model", f"alice/{name}")
    state = load_checkpoint(f"alice/{name}").state_dict()
    return hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()

root, tasks, answers = sys.argv[1], json.loads(sys.argv[2]), []
if not tasks:
    train(f"{root}/model")
    state = load_checkpoint(f"{root}/model").state_dict()
    print(json.dumps(hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()))
    sys.exit()
for task, name in tasks:
    try:
        answers.append(do(task, name))
    except BaseException as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    """Names and contents of a model's folder, without its checkpoints."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def outcome(task: str, name: str, answer: str, hub: HubServer, root: Path, digest: str) -> str:
    """`complete`, `refused`, or what must not be."""
    if WRITER in answer:
        return "token shown"
    repository = hub.repositories.get(f"alice/{name}")
    if task == "load":
        if answer == digest:
            return "complete"
        refused = answer.startswith("HFViTError: ") and "\n" not in answer.strip()
        return "refused" if refused else f"bad answer {answer[:200]!r}"
    weights = (root / ("model" if task == "push" else name) / "model.safetensors").read_bytes()
    for files in repository.commits.values() if repository else ():
        if files.keys() - {".gitattributes"} and not (files.keys() >= WHOLE and "model.safetensors" in files):
            return f"a part was published: {sorted(files)}"
        if task == "push" and "model.safetensors" in files and files["model.safetensors"] != weights:
            return "other weights were published"
    if task == "train":
        if not files_of(root / name).keys() >= WHOLE | {"model.safetensors"}:
            return "the training's folder is not complete"
        return "complete" if "uploaded to" in answer else "refused" if "not uploaded: " in answer else answer[-200:]
    if answer.startswith("http"):
        assert repository is not None
        return "complete" if "model.safetensors" in repository.files("main")[1] else "said complete, is not"
    refused = answer.startswith("HFViTError: ") and "\n" not in answer.strip()
    return "refused" if refused else f"bad answer {answer[:200]!r}"


def run(count: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Outcomes of `count` tasks, half of them uploads, a third downloads, the rest trainings; a line for each bad."""
    kinds = ("push", "load", "push", "load", "push", "train")
    tasks = [(kinds[number % len(kinds)], f"{kinds[number % len(kinds)]}-{number}") for number in range(count)]
    outcomes: Counter = Counter()
    bad = []
    with tempfile.TemporaryDirectory() as name, HubServer(users={WRITER: "alice"}) as hub:
        root = Path(name)
        digest = run_process(hub, root / "home", CLIENT, root, json.dumps([]), token=WRITER)
        for task, repository in tasks:
            if task == "load":
                stored = Repository()
                stored.commits["1" * 40] = files_of(root / "model")
                stored.refs["main"] = "1" * 40
                hub.repositories[f"alice/{repository}"] = stored
        hub.faults = Faults(RATE, seed)
        answers = run_process(hub, root / "home", CLIENT, root, json.dumps(tasks), token=WRITER)
        for (task, repository), answer in zip(tasks, answers, strict=True):
            result = outcome(task, repository, answer, hub, root, digest)
            outcomes[f"{task} {result if result in ('complete', 'refused') else 'bad'}"] += 1
            if result not in ("complete", "refused"):
                bad.append(f"seed {seed}, {repository}: {result}")
        outcomes["requests that failed"] = len(hub.faults.happened)
    return outcomes, bad


if __name__ == "__main__":
    report(__doc__, run, count=75, seed=0)
