"""Checkpoints written while training goes on: the same files, whole or not there, and nothing lost without a word.

pytest tests/training/engine/checkpoints/test_run_checkpoints.py
"""

import errno
import json
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import torch
from transformers import TrainerCallback

from hf_vit import HFViTForImageClassification
from hf_vit.errors import HFViTError
from tests.helpers.training_runs import Images, arguments, tiny
from training.engine.checkpoints import checkpoint_io
from training.engine.trainer import Trainer


VALUES = {"max_steps": 9, "save_steps": 3, "save_total_limit": None, "ema_decay": 0.9, "weight_decay": 0.1}
TENSORS = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")


def trainer(folder, callbacks=(), **values):
    args = arguments(folder, **VALUES | values)
    return Trainer(tiny(seed=1, hidden_dropout_prob=0.1), args, Images(30), Images(7), callbacks=list(callbacks))


def contents(folder):
    """The bytes of tensors, and what resuming reads but for the clock."""
    state = json.loads((folder / "trainer_state.json").read_text())
    counters = json.loads((folder / "resume.json").read_text())
    counters = {name: value for name, value in counters.items() if name not in ("clock", "wall_seconds")}
    return [(folder / name).read_bytes() for name in TENSORS], state["log_history"], counters


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    trainer(folder).train()
    return folder


class Open(TrainerCallback):
    """Lets the writer go on, some steps after the checkpoint was asked for."""

    def __init__(self, gate, step):
        self.gate, self.step = gate, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.gate.set()


def test_what_is_written_later_is_the_state_of_its_step(tmp_path, at_once, monkeypatch):
    gate, threads = threading.Event(), []
    write = checkpoint_io.write_checkpoint

    def late(*args):
        assert gate.wait(60)
        threads.append(threading.current_thread())
        write(*args)

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", late)
    trainer(tmp_path / "out", [Open(gate, 5)], async_save=True).train()  # step 3 is written after step 5
    assert len(threads) == 3 and threading.main_thread() not in threads
    for number in (3, 6, 9):
        name = f"checkpoint-{number}"
        assert contents(tmp_path / "out" / name) == contents(at_once / name)
        HFViTForImageClassification.from_pretrained(tmp_path / "out" / name)
    assert (tmp_path / "out/history.jsonl").read_bytes() == (at_once / "history.jsonl").read_bytes()


def killed_while_writing(folder):
    """For a child process: the second checkpoint stays half written."""
    write_json = checkpoint_io.write_json

    def stuck(path, value):
        if "checkpoint-6" in str(path.parent):
            (folder.parent / "half").touch()
            time.sleep(60)
        write_json(path, value)

    checkpoint_io.write_json = stuck
    trainer(folder, async_save=True).train()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_killed_while_writing_the_checkpoint_before_serves(tmp_path, at_once):
    child = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(tmp_path / "out",))
    child.start()
    end = time.monotonic() + 60
    while not (tmp_path / "half").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    names = sorted(path.name for path in (tmp_path / "out").glob("*checkpoint-*"))
    assert names[1:] == ["checkpoint-3"] and names[0].startswith(".writing-")
    HFViTForImageClassification.from_pretrained(tmp_path / "out/checkpoint-3")
    trainer(tmp_path / "out", async_save=True).train(True)
    assert contents(tmp_path / "out/checkpoint-9") == contents(at_once / "checkpoint-9")
    assert not list((tmp_path / "out").glob(".writing-*"))


class SaveAt(TrainerCallback):
    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize(("fails_at", "max_steps"), [(6, 2000), (9, 9)])
def test_a_full_disk_ends_the_run_with_its_line(tmp_path, monkeypatch, fails_at, max_steps):
    """Soon after it happened, not at the next checkpoint; at the end, before the run is called finished."""
    write_json = checkpoint_io.write_json

    def full(path, value):
        if f"checkpoint-{fails_at}" in str(path.parent):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr(checkpoint_io, "write_json", full)
    values = {"max_steps": max_steps, "save_strategy": "no", "logging_steps": 2000}
    run = trainer(tmp_path / "out", [SaveAt(3, fails_at)], async_save=True, **values)
    with pytest.raises(HFViTError, match=r"no space left for .*earlier checkpoints are intact"):
        run.train()
    assert run.state.global_step < 2000
    names = [path.name for path in checkpoint_io.checkpoints(tmp_path / "out")]
    assert names == ["checkpoint-3"]


def test_older_checkpoints_go_when_the_new_one_is_there(tmp_path):
    trainer(tmp_path / "out", async_save=True, save_total_limit=1).train()
    assert [path.name for path in checkpoint_io.checkpoints(tmp_path / "out")] == ["checkpoint-9"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_takes_no_memory_of_its_own(tmp_path):
    def memory(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024

    tensors = {str(number): torch.ones(2**20) for number in range(24)}  # 96 MB
    checkpoint_io.write_tensors(tmp_path / "first.safetensors", {"a": torch.ones(8)})
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = memory("VmRSS")
    checkpoint_io.write_tensors(tmp_path / "a.safetensors", tensors)
    assert memory("VmHWM") - before < 24
