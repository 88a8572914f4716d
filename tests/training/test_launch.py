"""The launch files: the Slurm script starts what torchrun and the training commands accept.

python -m pytest tests/training/test_launch.py
"""

import os
import re
import shlex
import subprocess

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch.distributed.run import get_args_parser

from tests.conftest import ROOT
from training.config.parser import parse


LAUNCH = ROOT / "training" / "launch"
SCRIPT = LAUNCH / "slurm.sh"
README = (LAUNCH / "README.md").read_text(encoding="utf-8")
STARTS = [line for line in README.replace("\\\n", "").splitlines() if line.startswith("accelerate launch")]
STARTS += re.findall(r"`(accelerate launch --config_file [^`]*)`", README)


@pytest.fixture
def slurm(tmp_path):
    """An environment with stand-ins for Slurm's commands; `srun` prints what it was given, one argument a line."""
    for name, body in (("scontrol", 'printf "node07\\nnode08\\n"'), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4017", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[07-08]"}
    return os.environ | job | {"SLURM_GPUS_ON_NODE": "4", "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_slurm_starts_one_torchrun_a_machine(slurm):
    words = ["training.pretrain", "--preset", "vit-small-patch16", "--dataset", "my images", "--output_dir", "out"]
    done = subprocess.run(["bash", SCRIPT, *words], env=slurm, capture_output=True, text=True, check=True)
    given = done.stdout.splitlines()
    start = given.index("torchrun")
    assert "--ntasks=2" in given[:start] and "--ntasks-per-node=1" in given[:start]
    launch = get_args_parser().parse_args(given[start + 1 :])
    assert launch.nnodes == "2" and launch.nproc_per_node == "4" and launch.rdzv_backend == "c10d"
    assert re.fullmatch(r"node07:2\d{4}", launch.rdzv_endpoint) and launch.rdzv_id == "4017"
    assert launch.module and launch.training_script == "training.pretrain"
    arguments = parse(launch.training_script_args, stage="pretrain")
    assert arguments.data.dataset == "my images" and arguments.train.resume_from_checkpoint is True


def test_slurm_without_a_module_says_how_it_is_called(slurm):
    done = subprocess.run(["bash", SCRIPT], env=slurm, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch")


def test_slurm_reads_the_options_of_the_head():
    options = re.findall(r"^#SBATCH (--[a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(options)["--signal"].startswith("TERM@") and ("--ntasks-per-node", "1") in options


def test_the_page_names_every_file():
    assert {path.name for path in LAUNCH.iterdir()} == {"README.md", *re.findall(r"^\| `(.+?)`", README, re.MULTILINE)}


@pytest.mark.parametrize("line", STARTS)
def test_accelerate_takes_the_commands_of_the_page(line, monkeypatch):
    """Its parser reads them with their configuration file, and ours the rest."""
    monkeypatch.chdir(ROOT)
    words = line.replace("$RANK", "1").replace("--machine_rank N", "--machine_rank 1").replace("$HOST0", "HOST0")
    launch, config, _ = _validate_launch_command(launch_command_parser().parse_args(shlex.split(words)[2:]))
    assert launch.module and launch.num_processes == config.num_processes
    if "fsdp2" in line:
        assert launch.machine_rank == 1 and launch.main_process_ip == "HOST0" and launch.use_fsdp
    words = [word for word in launch.training_script_args if word != "..."]
    parse(words or ["--model", "m", "--dataset", "d", "--output_dir", "out"], launch.training_script.split(".")[1])
