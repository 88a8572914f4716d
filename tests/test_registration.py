"""`import hf_vit` is as light as `import transformers`, and the Auto classes know ours whatever is imported first.

Each case is a Python of its own. python -m pytest tests/test_registration.py
"""

import subprocess
import sys

import pytest
from conftest import ROOT


def output(code):
    """What a new Python prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_adds_only_itself():
    found = output(
        "import sys, transformers; before = set(sys.modules); import hf_vit; "
        "print(sorted(set(sys.modules) - before)); hf_vit.HFViTError; print('torch' in sys.modules)"
    )
    assert found.splitlines() == ["['hf_vit', 'hf_vit.registration']", "False"]


CHECKS = """
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
size = dict(image_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
config = AutoConfig.for_model("hf_vit", **size)
for auto in (AutoModel, AutoModelForImageClassification, AutoBackbone):
    model = auto.from_config(config)
    print(type(model).__module__, type(model).__name__)
print(IMAGE_PROCESSOR_MAPPING[hf_vit.HFViTConfig]["pil"].__name__)
assert all(getattr(hf_vit, name) for name in hf_vit.__all__) and set(hf_vit.__all__) <= set(dir(hf_vit))
try:
    hf_vit.HFViTNothing
except AttributeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import hf_vit",
        "import hf_vit; hf_vit.HFViTModel",
        "import transformers; transformers.AutoModel; transformers.AutoImageProcessor; import hf_vit",
    ],
)
def test_auto_classes_know_ours(first):
    assert output(f"{first}\n{CHECKS}").splitlines() == [
        "hf_vit.modeling_hf_vit HFViTModel",
        "hf_vit.modeling_hf_vit HFViTForImageClassification",
        "hf_vit.modeling_hf_vit HFViTBackbone",
        "ViTImageProcessorPil",
        "module 'hf_vit' has no attribute 'HFViTNothing'",
    ]
