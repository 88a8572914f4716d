"""Files of a checkpoint: whole or not there.

pytest tests/training/engine/checkpoints/test_checkpoint_io.py
"""

import errno
import os
import resource
import signal

import pytest
import torch

from hf_vit.errors import HFViTError
from training.engine.checkpoints import checkpoint_io as disk
from training.engine.checkpoints import full_tensors


def make(folder, number, complete=True):
    path = folder / f"checkpoint-{number}"
    path.mkdir(parents=True)
    if complete:
        (path / disk.RESUME_NAME).write_text("{}")
    return path


def test_a_full_disk_is_said_and_older_checkpoints_are_intact(tmp_path):
    make(tmp_path, 1)
    words = r"no space left.*intact.*--resume_from_checkpoint true"

    def write_model(folder, weights):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(HFViTError, match=words):
        disk.write_checkpoint(tmp_path / "checkpoint-2", {"model": {}}, write_model)
    assert disk.checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]
    assert "another disk" in disk.advice(tmp_path / "nowhere")


def test_a_file_that_cannot_grow_is_a_full_disk_also_for_safetensors(tmp_path):
    """The kernel's own limit on file sizes stands in for a disk without room."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(HFViTError, match="no space left"):
            disk.write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_checkpoints_are_ordered_by_number_and_complete(tmp_path):
    for number in (900, 1000, 20):
        make(tmp_path, number)
    make(tmp_path, 2000, complete=False)
    make(tmp_path / ".writing-checkpoint-3000", 1)
    assert [path.name for path in disk.checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-900", "checkpoint-1000"]
    assert disk.find_checkpoint(tmp_path, True).name == "checkpoint-1000"
    assert disk.find_checkpoint(tmp_path / "nowhere", True) is None and disk.find_checkpoint(tmp_path, None) is None


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for number in range(1, 6):
        make(tmp_path, number)
    disk.remove_old_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert [path.name for path in disk.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    disk.remove_old_checkpoints(tmp_path, None, None)
    assert len(disk.checkpoints(tmp_path)) == 3


def test_a_checkpoint_goes_in_one_step(tmp_path, monkeypatch):
    for number in (1, 2):
        make(tmp_path, number)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(disk.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        disk.remove_old_checkpoints(tmp_path, 1, None)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    disk.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_an_older_checkpoint_beside_newer_ones_is_refused_and_elsewhere_is_not(tmp_path):
    for number in (3, 12):
        make(tmp_path, number)
    with pytest.raises(HFViTError, match=r"checkpoint-12 is newer than .*checkpoint-3 .* in another --output_dir"):
        disk.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-3"))
    assert disk.find_checkpoint(tmp_path / "other", str(tmp_path / "checkpoint-3")).name == "checkpoint-3"
    assert disk.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-12")).name == "checkpoint-12"


def test_optimizer_state_survives_by_name(tmp_path):
    def build():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.8, 0.9))

    def step(layer, optimizer):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = build()
    step(layer, optimizer)
    names = {p: n for n, p in layer.named_parameters()}
    tensors, rest = full_tensors.optimizer_state(optimizer, names)
    disk.write_tensors(tmp_path / "o.safetensors", tensors)
    disk.write_json(tmp_path / "o.json", rest)
    other, fresh = build()
    full_tensors.set_model_weights(other, full_tensors.model_weights(layer))
    names = {p: n for n, p in other.named_parameters()}
    tensors, rest = disk.read_tensors(tmp_path / "o.safetensors"), disk.read_json(tmp_path / "o.json")
    full_tensors.set_optimizer_state(fresh, names, tensors, rest, hyperparameters=True)
    step(layer, optimizer)
    step(other, fresh)
    assert torch.equal(layer.weight, other.weight) and fresh.param_groups[0]["betas"] == (0.8, 0.9)


def test_weights_of_another_shape_are_refused(tmp_path):
    with pytest.raises(HFViTError, match="another architecture"):
        full_tensors.set_model_weights(torch.nn.Linear(3, 2), {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})


def test_differences_name_what_changed():
    assert disk.differences({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b: 2 there, 3 here"
    assert disk.differences({"a": 1}, {"a": 1}) == ""
