"""Uploads on a bad day: every one ends complete, or says that it did not; none leaves half a model behind.

python -m pytest tests/hf_vit/hub/test_hub_faults.py
"""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.helpers.hub_process import BLOCK_HF_VIT, WRITER, run
from tests.helpers.hub_server import Faults, HubServer


PUSH = """
import json, sys, time
time.sleep = lambda seconds: None
from hf_vit.hub.upload import push_folder
answers = {}
for name in sys.argv[2:]:
    try:
        answers[name] = push_folder(sys.argv[1], name)
    except ValueError as error:
        answers[name] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""


@pytest.fixture
def hub():
    with HubServer(users={WRITER: "alice"}) as server:
        yield server


def complete(hub, name, folder):
    """Whether the repository holds what a push of the folder leaves there."""
    files = hub.repositories[name].files("main")[1]
    return {"README.md", "config.json", "modeling_hf_vit.py", "preprocessor_config.json", "facts.json"} <= set(
        files
    ) and files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_every_upload_ends_complete_or_says_so(hub, folder, tmp_path):
    names = [f"alice/try-{number}" for number in range(8)]
    hub.faults = Faults(0.6, seed=1)
    answers = run(hub, tmp_path / "a", PUSH, folder, *names, token=WRITER)
    assert set(hub.faults.happened) == set(hub.faults.kinds)
    for name in names:
        repository = hub.repositories.get(name)
        if answers[name] == f"{hub.endpoint}/{name}":
            assert complete(hub, name, folder)
        else:
            assert answers[name].startswith("HFViTError: ") and len(answers[name].splitlines()) == 1
            assert repository is None or all(
                not files or "config.json" in files for files in repository.commits.values()
            )
    whole = [name for name in names if answers[name].startswith("http")]
    assert 0 < len(whole) < len(names)
    hub.faults = None
    run(hub, tmp_path / "b", PUSH, folder, *names, token=WRITER)
    assert all(complete(hub, name, folder) for name in names)


def test_a_transfer_that_fails_is_tried_again(hub, folder, tmp_path):
    hub.faults = Faults(1.0, seed=0, kinds=("500",), path="/lfs/", most=12)  # more than huggingface_hub's own tries
    answers = run(hub, tmp_path / "a", PUSH, folder, "alice/late", token=WRITER)
    assert answers["alice/late"].startswith("http") and complete(hub, "alice/late", folder)
    hub.faults, hub.lfs = Faults(1.0, seed=0, kinds=("500", "cut before"), path="/lfs/"), {}
    answers = run(hub, tmp_path / "b", PUSH, folder, "alice/never", token=WRITER)
    assert answers["alice/never"].startswith("HFViTError: cannot upload to")
    assert "Error while uploading" in answers["alice/never"]
    assert not hub.repositories["alice/never"].files("main")[1]


def test_an_interrupted_push_leaves_the_repository_as_it_was_and_continues(hub, folder, tmp_path):
    hub.held = "/commit/"
    command = [sys.executable, "-c", PUSH, str(folder), "alice/it"]
    process = subprocess.Popen(command, env=hub.environment(home=tmp_path / "a", token=WRITER))
    assert hub.holding.wait(600)
    process.kill()
    process.wait()
    hub.held = ""
    assert not hub.repositories["alice/it"].files("main")[1]
    hub.requests.clear()
    answers = run(hub, tmp_path / "b", PUSH, folder, "alice/it", token=WRITER)
    assert answers["alice/it"] == f"{hub.endpoint}/alice/it" and complete(hub, "alice/it", folder)
    assert not [request for request in hub.requests if request.startswith("PUT /lfs/")]


TRAIN = """
import sys, time
time.sleep = lambda seconds: None
from training.pretrain import main
size = ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=16", "patch_size=4"]
for strategy in sys.argv[2:]:
    main([
        "--set", *size, "--image_size", "8", "--dataset", "digits", "--max_steps", "4", "--save_steps", "2",
        "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "512", "--dataloader_num_workers", "0",
        "--push_to_hub", "true", "--hub_model_id", f"alice/{strategy}", "--hub_strategy", strategy,
        "--output_dir", f"{sys.argv[1]}/{strategy}",
    ])
print("[]")
"""

LOAD = """
import json, sys
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
found = {}
for name, commit in json.loads(sys.argv[1]):
    model = AutoModelForImageClassification.from_pretrained(name, revision=commit, trust_remote_code=True)
    AutoImageProcessor.from_pretrained(name, revision=commit)
    found[commit] = model(torch.zeros(1, 3, 8, 8)).logits.tolist()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_repository_filled_while_training_loads_at_every_commit(hub, tmp_path):
    strategies = ["end", "every_save", "checkpoint"]
    run(hub, tmp_path / "a", TRAIN, tmp_path / "runs", *strategies, token=WRITER)
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert written and not [path for path in written if WRITER.encode() in path.read_bytes()]
    commits = {name: [c for c in hub.repositories[f"alice/{name}"].commits if c != "0" * 40] for name in strategies}
    assert {name: len(made) for name, made in commits.items()} == {"end": 1, "every_save": 3, "checkpoint": 3}
    for name, made in commits.items():
        for commit in made:
            files = hub.repositories[f"alice/{name}"].commits[commit]
            assert {"README.md", "facts.json", "config.json", "modeling_hf_vit.py"} <= set(files)
            assert "last-checkpoint/optimizer.safetensors" in files or name != "checkpoint"
            assert not [path for path, content in files.items() if WRITER.encode() in content]
    wanted = [(f"alice/{name}", commit) for name, made in commits.items() for commit in made]
    found = run(hub, tmp_path / "b", BLOCK_HF_VIT + textwrap.dedent(LOAD), json.dumps(wanted))
    assert all(torch.tensor(found[commit]).isfinite().all() for _, commit in wanted)
    assert found[commits["every_save"][0]] != found[commits["every_save"][-1]]  # other updates, other weights


@pytest.mark.slow
def test_a_run_outlives_the_hub(hub, tmp_path):
    hub.faults = Faults(1.0, seed=0)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path / "runs"), "every_save"],
        env=hub.environment(home=tmp_path / "a", token=WRITER),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "every_save" / "model.safetensors").is_file()
    assert done.stdout.count("not uploaded: ") + done.stderr.count("not uploaded: ") == 3
    assert "hf-vit push" in done.stdout and WRITER not in done.stdout + done.stderr
