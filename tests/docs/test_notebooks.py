"""The notebooks run from top to bottom on a CPU, without a download; their `pip install` cell is looked at, not run.

python -m pytest tests/docs/test_notebooks.py
"""

import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_begins_with_one_installation_and_stores_no_outputs(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    extra = re.fullmatch(r'%pip install -q -e "\.\./\.\.\[(\w+)\]".*', code[0].source)
    assert extra and f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not any("pip install" in cell.source for cell in code[1:])
    assert not any(cell.outputs for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("%pip")]
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    if path.stem == "finetune_on_your_own_images":
        accuracy = [float(number) for number in re.findall(r"step \d+: accuracy ([\d.]+)%", said)]
        assert accuracy and accuracy[-1] > 60 and (tmp_path / "out" / "README.md").is_file()
        table = notebook.cells[-2].outputs[-1]["data"]["text/plain"]  # of result.predict
        assert "'accuracy'" in said and "label" in table and "score" in table and "from_frame" in said
    else:
        assert "predicted" in said and re.search(r"^random +insertion minus deletion area", said, re.MULTILINE)
