"""A torchvision that does not match torch is told in one line, before it breaks anybody's import.

python -m pytest tests/hf_vit/test_torchvision_match.py
"""

import os
import subprocess
import sys
import types
from importlib.metadata import Distribution, version
from pathlib import Path

import pytest

from hf_vit.errors import HFViTError
from hf_vit.torchvision_match import _is_our_command, check_torchvision, find_mismatch


ROOT = Path(__file__).parents[2]


def package(folder, name, number, build="", requires=""):
    """A package as pip installs it, whose import fails; the build is in version.py alone, as in PyPI's wheels."""
    code, metadata = folder / name, folder / f"{name}-{number}.dist-info"
    code.mkdir(parents=True)
    metadata.mkdir()
    (code / "__init__.py").write_text(f"raise RuntimeError('operator {name}::nms does not exist')\n")
    (code / "version.py").write_text(f"__version__ = '{number.split('+')[0]}{build and '+' + build}'\n")
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{needs}")
    return Distribution.at(metadata)


@pytest.mark.parametrize(
    ("torch", "torchvision", "way_out"),
    [
        (("2.13.0", "cu130"), ("0.28.0", "cu130", "torch (==2.13.0)"), None),
        (("2.13.0+cpu", "cpu"), ("0.28.0+cpu", "cpu", "torch (==2.13.0)"), None),
        (("2.13.1", "cu130"), ("0.28.0", "cu130", "torch (==2.13.0)"), None),  # patch releases serve each other
        (("2.15.0", "cu130"), ("0.29.1", "cu130", "torch (>=2.14.0)"), None),
        (("2.13.0", ""), ("0.28.0", "", "torch==2.13.0"), None),  # macOS has one build
        (("2.9.0a0+50eac81", ""), ("0.24.0a0+98f8b37", "", ""), None),  # built from source
        (("2.9.0", "cu130"), ("0.24.0", "cu128", "torch (==2.9.0)"), "'torchvision==0.24.0' --index-url"),
        (("2.13.0", "cu130"), ("0.24.0", "cu128", "torch (==2.9.0)"), "'torchvision==0.28.0' --index-url"),
        (("2.13.0+cpu", "cpu"), ("0.28.0", "cu130", "torch (==2.13.0)"), "/whl/cpu,"),
        (("2.6.0", ""), ("0.29.1", "", "torch (>=2.14.0)"), "'torchvision==0.21.0', or"),
        (("2.15.0", ""), ("0.28.0", "", "torch (==2.13.0)"), "'torchvision>=0.29', or"),
    ],
)
def test_pairs(tmp_path, torch, torchvision, way_out):
    message = find_mismatch(package(tmp_path, "torch", *torch), package(tmp_path, "torchvision", *torchvision))
    if way_out is None:
        assert message is None
    else:
        assert message.startswith(f"torchvision {torchvision[0]}") and f"does not match torch {torch[0]}" in message
        assert f"pip install {way_out}" in message or way_out in message
        assert "pip uninstall torchvision" in message and "\n" not in message


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["-c", "import hf_vit"], 1),
        (["-m", "hf_vit.cli.main", "--help"], 2),
        (["-m", "training.finetune", "--help"], 2),
    ],
)
def test_an_import_raises_and_a_command_ends_with_one_line(tmp_path, words, status):
    package(tmp_path, "torchvision", "0.1.0", requires="torch (==1.2.0)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
    *before, last = done.stderr.splitlines()
    assert done.returncode == status and not done.stdout
    assert last.startswith("error: " if status == 2 else "hf_vit.errors.HFViTError: ")
    assert f"torchvision 0.1.0 does not match torch {version('torch')}" in last
    assert status == 1 or not before


def test_what_a_command_of_ours_is():
    assert _is_our_command(["python", "-m", "training.finetune", "--help"])
    assert _is_our_command(["python", "-u", "-m", "hf_vit.training.score"])
    assert _is_our_command(["python", "/venv/bin/hf-vit", "predict"])
    assert not _is_our_command(["python", "-m", "pytest", "tests/test_hub.py", "-m", "hf_vit"])
    assert not _is_our_command(["python", "train.py", "-m"])
    assert not _is_our_command(["python"])


def test_one_that_has_been_imported_works_whatever_its_metadata_say(tmp_path, monkeypatch):
    package(tmp_path, "torchvision", "0.1.0", requires="torch (==1.2.0)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HFViTError, match="does not match torch"):
        check_torchvision()
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    check_torchvision()
