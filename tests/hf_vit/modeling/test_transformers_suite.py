"""transformers' own common model tests, run against our classes.

They are in transformers' source distribution only; `make transformers-suite` fetches it into .cache/ and runs this:

    pytest tests/hf_vit/modeling/test_transformers_suite.py

Left out, and why:
  test_config                      builds a config from {hidden_size} alone; the tester's sizes are passed instead
  test_model_get_set_embeddings    expects nn.Embedding; ViT's own test in transformers replaces it as well
  test_reverse_loading_mapping     expects files in the layout before v5; ours are written with v5's names (design)
  test_bc_torch_dtype              looks our classes up in the transformers package
  test_model_weights_reload_no_missing_tied_weights
                                   expects a warning for a file without weights; ours refuses it
  test_training*                   run for HFViTForImageClassification; the encoder alone has no loss
Tests for accelerators, Flash Attention, DeepSpeed and generation skip themselves.
"""

import importlib
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
import transformers

from hf_vit import HFViTBackbone, HFViTConfig, HFViTForImageClassification, HFViTModel


ROOT = Path(__file__).resolve().parents[3]
SUITE = ROOT / ".cache" / f"transformers-{transformers.__version__}" / "tests"
if not SUITE.is_dir():
    pytest.skip(
        "the wheel of transformers is without its tests: make transformers-suite fetches and runs them",
        allow_module_level=True,
    )


def upstream(name: str) -> types.ModuleType:
    """A module of transformers' tests, under the package name `transformers_suite`."""
    package = types.ModuleType("transformers_suite")
    package.__path__ = [str(SUITE)]
    sys.modules.setdefault("transformers_suite", package)
    for absent, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        parent, module = (types.ModuleType(f"transformers_suite.{part}") for part in (absent.split(".")[0], absent))
        setattr(module, mixin, type(mixin, (), {}))  # not in the source distribution, and not for encoders
        sys.modules.setdefault(parent.__name__, parent)
        sys.modules.setdefault(module.__name__, module)
    return importlib.import_module(f"transformers_suite.{name}")


common = upstream("test_modeling_common")
backbones = upstream("test_backbone_common")


class ModelTester:
    """What transformers' mixins ask of a model's tester."""

    __test__ = False
    is_training = True
    batch_size, num_hidden_layers, hidden_size, num_attention_heads = 3, 2, 32, 4
    seq_length = encoder_seq_length = 17

    def get_config(self) -> HFViTConfig:
        return HFViTConfig(
            image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=37, num_labels=3,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": common.floats_tensor([3, 3, 32, 32])}


class HFViTModelsTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (HFViTModel, HFViTForImageClassification)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = ModelTester()

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = dict(inputs)
        if return_labels and model_class is HFViTForImageClassification:
            inputs["labels"] = torch.zeros(3, dtype=torch.long)
        return inputs

    test_bc_torch_dtype = test_model_get_set_embeddings = test_reverse_loading_mapping = None
    test_model_weights_reload_no_missing_tied_weights = None


class HFViTTrainingTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (HFViTForImageClassification,)
    test_resize_embeddings = False
    setUp = HFViTModelsTest.setUp
    _prepare_for_class = HFViTModelsTest._prepare_for_class


for name in [name for name in dir(HFViTModelsTest) if name.startswith("test_") and name != "test_resize_embeddings"]:
    setattr(HFViTModelsTest if "training" in name else HFViTTrainingTest, name, None)


class HFViTBackboneTest(backbones.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (HFViTBackbone,)
    config_class = HFViTConfig
    has_attentions = True
    setUp = HFViTModelsTest.setUp
