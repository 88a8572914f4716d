"""`import hf_vit` makes the Auto classes know our classes, whatever is imported first.

python -m pytest tests/hf_vit/modeling/test_registration.py
"""

import os
import subprocess
import sys

import pytest
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForMaskedImageModeling
from transformers.models.vit import ViTImageProcessorPil

import hf_vit
from tests.conftest import ROOT
from tests.hf_vit.modeling.test_modeling_hf_vit import build


ORDERS = {
    "ours_first": "import hf_vit; from transformers import AutoModelForImageClassification",
    "auto_classes_first": "from transformers import AutoModelForImageClassification; import hf_vit",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("registration") / "tiny"
    build().save_pretrained(path)
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_an_auto_class_finds_ours_without_trust_in_any_order_of_imports(order, folder):
    code = f"import sys; {ORDERS[order]}; print(type(AutoModelForImageClassification.from_pretrained(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "<class 'hf_vit.modeling.modeling_hf_vit.HFViTForImageClassification'>\n"


def test_every_auto_class_knows_ours(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is hf_vit.HFViTConfig
    for auto, ours in (
        (AutoModel, hf_vit.HFViTModel),
        (AutoBackbone, hf_vit.HFViTBackbone),
        (AutoModelForMaskedImageModeling, hf_vit.HFViTForMaskedPatchPrediction),
    ):
        assert type(auto.from_config(config)) is ours
    ViTImageProcessorPil().save_pretrained(folder)
    assert type(AutoImageProcessor.from_pretrained(folder, backend="pil")) is ViTImageProcessorPil


def test_public_names():
    assert all(hasattr(hf_vit, name) for name in hf_vit.__all__)
    assert hf_vit.checkpoints.load_checkpoint is hf_vit.load_checkpoint
    finders = [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_vit")]
    assert not finders  # nothing of ours stands between Python and its imports
