"""Facts: what they name, and what they leave out.

pytest tests/training/reporting/test_facts.py
"""

import json

from accelerate import Accelerator

from hf_vit import HFViTConfig
from training.reporting import facts


def test_the_architecture_is_what_our_config_adds_and_reads_back():
    config = HFViTConfig(hidden_size=32, num_attention_heads=2, resnet_depths=(1, 2), patch_size=1, num_labels=5)
    found = json.loads(json.dumps(facts.architecture_of(config)))
    assert found["resnet_depths"] == [1, 2] and "id2label" not in found and "transformers_version" not in found
    assert facts.architecture_of(HFViTConfig(**found)) == facts.architecture_of(config)


def test_paths_lose_their_folders_and_hub_ids_stay(tmp_path):
    assert facts.public_name(str(tmp_path / "..")) == tmp_path.parent.name
    assert facts.public_name("someone/images") == "someone/images"


def test_the_environment_names_hardware_and_versions():
    found = facts.environment_facts(Accelerator(cpu=True), "fp32")
    assert found["device"] == "cpu" and found["cores"] >= 1 and found["hardware"]
    assert {"python", "torch", "transformers", "accelerate", "hf_vit", "commit", "date"} <= set(found)


def test_facts_appear_in_one_step(tmp_path):
    facts.write_facts(tmp_path, {"model": {"name": "it"}})
    assert json.loads((tmp_path / "facts.json").read_text()) == {"model": {"name": "it"}}
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
