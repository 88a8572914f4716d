"""run_lock.py: one run in one folder; an owner that has died holds nothing.

pytest tests/training/engine/checkpoints/test_run_lock.py
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_vit.errors import HFViTError
from tests.helpers.training_runs import Images, arguments, tiny
from training.engine.checkpoints.run_lock import LOCK_NAME, RunLock
from training.engine.trainer import Trainer


# The lock alone, without the package: a second process starts in a moment.
HOLDER = """
import importlib.util, sys, types
for name in ("hf_vit", "hf_vit.errors"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["hf_vit.errors"].HFViTError = ValueError
spec = importlib.util.spec_from_file_location("run_lock", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from pathlib import Path
module.RunLock(Path(sys.argv[2])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    (tmp_path / "out").mkdir()
    path = Path(sys.modules[RunLock.__module__].__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(tmp_path / "out")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_by_name_and_takes_over_from_one_that_died(tmp_path, holder):
    trainer = Trainer(tiny(), arguments(tmp_path / "out", max_steps=1), Images(40))
    words = rf"out is in use by another run \(process {holder.pid} on {socket.gethostname()}\)"
    with pytest.raises(HFViTError, match=words):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_NAME]
    holder.kill()
    holder.wait()
    trainer.train()
    assert not (tmp_path / "out" / LOCK_NAME).exists() and (tmp_path / "out/checkpoint-1").is_dir()


def test_an_owner_on_another_machine_is_refused_with_the_way_out(tmp_path):
    (tmp_path / LOCK_NAME).write_text(json.dumps({"process": 1, "host": "elsewhere"}))
    with pytest.raises(HFViTError, match=r"process 1 on elsewhere.*or remove .*\.lock if it has ended"):
        RunLock(tmp_path).acquire()
    (tmp_path / LOCK_NAME).write_text("{torn")
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()
    lock.release()


def test_it_may_be_taken_again_and_ends_with_the_last_release(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    lock = RunLock(folder)
    lock.acquire()
    lock.acquire()
    lock.release()
    assert (folder / LOCK_NAME).exists()
    lock.release()
    assert not folder.exists()  # nothing else was in it


def test_a_start_that_failed_blocks_nothing(tmp_path):
    for name in ("history.jsonl", "config_resolved.yaml", ".lock"):
        (tmp_path / name).write_text("")
    Trainer(tiny(), arguments(tmp_path, max_steps=1), Images(40)).train()
    with pytest.raises(HFViTError, match="is not empty"):
        Trainer(tiny(), arguments(tmp_path, max_steps=1), Images(40)).train()
