"""Several processes train what one does: DDP and FSDP2 over gloo, on the CPU.

pytest tests/training/engine/test_several_processes.py
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file


ROOT = Path(__file__).parents[3]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def start(folder, processes=2, kind="ddp", **values):
    """Run several_processes.py to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= FSDP2 if kind == "fsdp2" else {}
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}",
            str(ROOT / "tests/helpers/several_processes.py"), str(folder), kind, json.dumps(values)]  # fmt: skip
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)


def launch(folder, processes=2, kind="ddp", **values):
    """`start`; return (history lines, weights, what the evaluation saw)."""
    done = start(folder, processes, kind, **values)
    assert done.returncode == 0, done.stderr[-3000:]
    history = [json.loads(text) for text in (folder / "history.jsonl").read_text().splitlines()]
    return history, load_file(folder / "model.safetensors"), json.loads((folder / "seen.json").read_text())


def same(first, second, atol):
    (history, weights, seen), (other_history, other_weights, other_seen) = first, second
    assert len(history) == len(other_history)
    for line, other in zip(history, other_history):
        assert line == pytest.approx(other, abs=atol)
    for name in weights:
        if "k_proj.bias" not in name:  # zero gradient but for rounding
            np.testing.assert_allclose(weights[name], other_weights[name], atol=atol, err_msg=name)
    np.testing.assert_allclose(seen["logits"], other_seen["logits"], atol=10 * atol)


STEPS = {"max_steps": 6, "logging_steps": 1, "save_steps": 3, "eval_steps": 3, "optim": "sgd"}


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch_and_sharding_changes_nothing(tmp_path):
    one = launch(tmp_path / "one", 1, per_device_train_batch_size=8, **STEPS)
    two = launch(tmp_path / "two", 2, per_device_train_batch_size=4, **STEPS)
    accumulated = launch(tmp_path / "passes", 2, per_device_train_batch_size=2, gradient_accumulation_steps=2, **STEPS)
    sharded = launch(tmp_path / "fsdp2", 2, "fsdp2", per_device_train_batch_size=4, **STEPS)
    assert "MULTI_CPU" in two[2]["kind"] and "FSDP" in sharded[2]["kind"]
    same(one, two, 1e-5)
    same(two, accumulated, 1e-5)
    same(two, sharded, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "atol"),
    [
        ({"optim": "lamb"}, 1e-5),  # its norms are those of whole tensors
        ({"optim": "muon"}, 5e-3),  # orthogonalized in bfloat16, summed in another order when sharded
        ({"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}, 1e-5),
    ],
)
def test_sharding_changes_no_optimizer_and_they_resume(tmp_path, values, atol):
    values = {**STEPS, "weight_decay": 0.1, "per_device_train_batch_size": 4, **values}
    two = launch(tmp_path / "two", 2, **values)
    sharded = launch(tmp_path / "fsdp2", 2, "fsdp2", **values)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (two[0], sharded[0])]
    assert losses[0] == pytest.approx(losses[1], abs=atol)
    for name, weight in two[1].items():
        if "k_proj.bias" not in name:  # zero gradient but for rounding
            np.testing.assert_allclose(weight, sharded[1][name], atol=atol, err_msg=name)
    forget_the_end(tmp_path / "fsdp2")
    assert launch(tmp_path / "fsdp2", 2, "fsdp2", resume=True, **values)[0] == sharded[0]


def forget_the_end(folder):
    """As if the run had been killed after step 3."""
    for path in [*(folder / "checkpoint-6").iterdir(), folder / "model.safetensors", folder / "history.jsonl"]:
        path.unlink()
    (folder / "checkpoint-6").rmdir()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "async_save"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_two_processes_resume_with_the_same_bytes(tmp_path, kind, async_save):
    values = {
        **STEPS,
        "optim": "adamw_torch_fused",
        "ema_decay": 0.9,
        "logging_steps": 4,
        "per_device_train_batch_size": 4,
    }
    whole = launch(tmp_path / "whole", 2, kind, **values)
    launch(tmp_path / "resumed", 2, kind, async_save=async_save, **values)
    forget_the_end(tmp_path / "resumed")
    resumed = launch(tmp_path / "resumed", 2, kind, resume=True, async_save=async_save, **values)
    assert resumed[0] == whole[0]
    for name in ("model.safetensors", "history.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


@pytest.mark.slow
def test_sharded_and_killed_while_writing_the_checkpoint_before_serves(tmp_path):
    values = STEPS | {"max_steps": 9, "optim": "adamw_torch_fused", "ema_decay": 0.9, "per_device_train_batch_size": 4}
    whole = launch(tmp_path / "whole", 2, "fsdp2", async_save=True, **values)
    done = start(tmp_path / "killed", 2, "fsdp2", async_save=True, killed_in="checkpoint-6", **values)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    half, complete = sorted(path.name for path in (tmp_path / "killed").glob("*checkpoint-*"))
    assert half.startswith(".writing-") and half.endswith("checkpoint-6") and complete == "checkpoint-3"
    assert any((tmp_path / "killed" / half).iterdir())
    resumed = launch(tmp_path / "killed", 2, "fsdp2", resume=True, async_save=True, **values)
    assert resumed[0] == whole[0] and resumed[2] == whole[2]
    for name in ("model.safetensors", "history.jsonl", "checkpoint-9/optimizer.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert not list((tmp_path / "killed").glob(".writing-*"))


@pytest.mark.slow
def test_processes_with_unequal_memory_agree_on_what_fits_on_all(tmp_path):
    values = {**STEPS, "per_device_train_batch_size": 4}
    two = launch(tmp_path / "two", **values)
    auto = launch(tmp_path / "auto", auto_batch_size=True, fitting=[4, 2], **values)
    same(two, auto, 1e-5)
    facts = json.loads((tmp_path / "auto/facts.json").read_text())["training"]
    assert (facts["per_device_train_batch_size"], facts["gradient_accumulation_steps"]) == (2, 2)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_at_the_same_update_with_a_checkpoint(tmp_path):
    values = {"max_steps": 25, "logging_steps": 5, "save_steps": 0, "per_device_train_batch_size": 4}
    whole = launch(tmp_path / "whole", **values)
    launch(tmp_path / "out", sigterm=3, **values)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-10"]
    history, weights, _ = launch(tmp_path / "out", resume=True, **values)
    assert history == whole[0]
    for name in weights:
        np.testing.assert_array_equal(weights[name], whole[1][name], err_msg=name)
