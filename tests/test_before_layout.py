"""Folders of hf_vit 0.1.0, when the model's code was nine files in one folder, still load, and a run goes on.

fixtures/before_layout/README.md says what they are. python -m pytest tests/test_before_layout.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_vit
from training import finetune


BEFORE = Path(__file__).resolve().parent / "fixtures" / "before_layout"
MODELS = ("vit", "hybrid")
LOGIT_TOLERANCE = 2e-6  # of the largest: another processor, or another address in memory, sums in another order
WEIGHT_TOLERANCE = 1e-5  # after six steps of SGD; what three of them change is a thousand times as much

# Runs with `python -I`: the current folder and PYTHONPATH are not searched, and an installed hf_vit is hidden.
WITHOUT_HF_VIT = """
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_vit", "training"):
            raise ModuleNotFoundError(f"{name} is hidden from this process")


sys.meta_path.insert(0, Hidden())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

*folders, repository, out = sys.argv[1:]
torch.set_num_threads(1)
logits = {}


def load(label, **options):
    for folder in folders:
        model = AutoModelForImageClassification.from_pretrained(folder, **options).eval()
        with torch.no_grad():
            logits[f"{folder}|{label}"] = model(load_file(f"{folder}_io.safetensors")["pixel_values"]).logits


load("hidden", trust_remote_code=True)
assert not any(name.split(".")[0] == "hf_vit" for name in sys.modules)
sys.meta_path.pop(0)
sys.path.insert(0, repository)
import hf_vit

load("installed, trusting", trust_remote_code=True)
load("installed")
save_file(logits, out)
"""


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A copy to write in, with the code files wherever they were written."""
    root = tmp_path_factory.mktemp("before") / "layout"
    shutil.copytree(BEFORE, root)
    for code in BEFORE.glob("vit/*.py"):
        for folder in ("hybrid", "run/checkpoint-3"):
            shutil.copy(code, root / folder)
    return root


def assert_same_logits(logits, root, name):
    expected = load_file(root / f"{name}_io.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=LOGIT_TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_loads_with_the_package_installed(before, name):
    model = AutoModelForImageClassification.from_pretrained(before / name).eval()
    assert type(model) is hf_vit.HFViTForImageClassification
    with torch.no_grad():
        assert_same_logits(model(load_file(before / f"{name}_io.safetensors")["pixel_values"]).logits, before, name)
    processor = AutoImageProcessor.from_pretrained(before / name)
    assert processor.size["height"] == model.config.image_size_hw[0]


def test_a_folder_loads_with_its_own_code(before, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    repository = Path(hf_vit.__file__).parents[1]
    words = [sys.executable, "-I", "-c", WITHOUT_HF_VIT, *MODELS, str(repository), str(tmp_path / "logits")]
    done = subprocess.run(words, cwd=before, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path / "logits")
    assert len(logits) == 3 * len(MODELS)
    for key, value in logits.items():
        assert_same_logits(value, before, key.split("|")[0])


def test_a_run_goes_on_or_is_refused_by_name(before, tmp_path, capsys):
    """With the arguments that it wrote itself: the same weights as without the interruption, or one line."""
    shutil.copytree(before / "run", tmp_path / "run")
    resolved = tmp_path / "run" / "config_resolved.yaml"
    words = ["--config", str(resolved), "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "true"]
    try:
        finetune.main(words)
    except SystemExit as refused:
        error = capsys.readouterr().err.strip()
        assert refused.code == 2 and error.count("\n") == 0
        assert "checkpoint-3" in error and re.search(r"(earlier|older) (version|format)", error), error
        return
    weights = load_file(tmp_path / "run" / "model.safetensors")
    expected = load_file(before / "run_weights.safetensors")
    then = load_file(before / "run" / "checkpoint-3" / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=WEIGHT_TOLERANCE)
    assert max((expected[name] - then[name]).abs().max().item() for name in expected) > 1000 * WEIGHT_TOLERANCE
    history = (tmp_path / "run" / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in history][:3] == [2, 4, 6]
