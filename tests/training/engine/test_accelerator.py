"""Precisions that are not there, and memory that runs out, each named with the way out.

pytest tests/training/engine/test_accelerator.py
"""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config import load_config_from_file

import training
from hf_vit.errors import HFViTError
from training.config.arguments import TrainArguments
from training.engine.accelerator import check_precision, create_accelerator, memory_advice


@pytest.mark.parametrize(
    ("precision", "words"), [("fp16", "--fp16 needs a GPU.*--bf16"), ("fp8", "--fp8 needs.*--bf16")]
)
def test_a_precision_that_is_not_there(precision, words):
    with pytest.raises(HFViTError, match=words):
        check_precision(precision, cpu=True)


def test_two_runs_of_one_process_may_differ_in_precision():
    for values, expected in (({"bf16": True}, "bf16"), ({}, "no")):
        assert create_accelerator(TrainArguments(use_cpu=True, **values)).mixed_precision == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 2},
            "_batch_size 32 --gradient_accumulation_steps 4",
        ),
        ({"per_device_train_batch_size": 1}, "add --activation_checkpointing"),
        ({"per_device_train_batch_size": 1, "activation_checkpointing": True}, "lower --image_size"),
    ],
)
def test_out_of_memory_says_what_to_lower(values, words):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        with pytest.raises(HFViTError, match=words), memory_advice(lambda: TrainArguments(**values)):
            raise error


def test_evaluation_and_workers_without_memory_say_what_to_lower():
    args = TrainArguments(per_device_eval_batch_size=128, dataloader_num_workers=4)
    with pytest.raises(HFViTError, match="lower --per_device_eval_batch_size 64"), memory_advice(lambda: args, True):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(HFViTError, match=r"lower --dataloader_num_workers \(now 4\)"), memory_advice(lambda: args):
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory_advice(TrainArguments):
        raise RuntimeError("shapes do not match")


def test_every_accelerate_config_file_loads_and_says_what_it_is_for():
    files = sorted((Path(training.__file__).parent / "launch").glob("*.yaml"))
    assert [file.stem for file in files] == ["cpu", "eight_gpus", "fsdp2", "one_gpu"]
    for file in files:
        assert file.read_text().startswith("# ") and load_config_from_file(str(file)).num_processes >= 1
