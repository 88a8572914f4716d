"""The cards in model_cards/ are what their facts render to, byte for byte.

python -m pytest tests/hf_vit/hub/test_model_cards.py
"""

import json
import re

import pytest

from hf_vit.hub.model_card import load_facts, render_card, render_eval_results, write_card
from tests.conftest import ROOT


CARDS = ROOT / "model_cards"


def differences(folder):
    """What in a folder of model_cards/ is not as its facts render."""
    facts, card = load_facts(folder), folder / "README.md"
    if not card.is_file():
        return [f"{folder.name} has no README.md: hf-vit card {folder}"]
    text = card.read_text(encoding="utf-8")
    addressed = re.search(r'model="([^"]+)"', text)
    wrong = [] if text == render_card(facts, folder, addressed and addressed[1]) else ["README.md"]
    wrong += [name for name, content in render_eval_results(facts).items() if (folder / name).read_text() != content]
    wrong += [name for name in facts.get("figures") or [] if not (folder / name).is_file()]
    return [f"{folder.name}/{name}" for name in wrong]


def test_every_card_is_what_its_facts_render_to():
    folders = sorted(path for path in CARDS.iterdir() if path.is_dir())
    assert [line for folder in folders for line in differences(folder)] == []


def test_a_card_that_was_edited_or_outlived_its_facts_is_found(tmp_path):
    model = {"name": "it", "architecture": {}, "parameters": 5, "image_size": [8, 8], "num_labels": 2}
    row = {"dataset": "a/b", "split": "test", "metric": "accuracy", "value": 0.5, "n": 10, "seed": 0}
    (tmp_path / "facts.json").write_text(json.dumps({"model": model, "results": [row]}))
    assert "has no README.md" in differences(tmp_path)[0]
    write_card(tmp_path, "me/it")
    assert differences(tmp_path) == []
    (tmp_path / "facts.json").write_text(json.dumps({"model": model | {"parameters": 6}, "results": [row]}))
    assert differences(tmp_path) == [f"{tmp_path.name}/README.md"]
    (tmp_path / "facts.json").write_text(json.dumps({"model": model, "results": [row | {"value": 0.6}]}))
    assert differences(tmp_path) == [f"{tmp_path.name}/README.md", f"{tmp_path.name}/.eval_results/a--b.yaml"]


@pytest.mark.parametrize("path", sorted(CARDS.glob("*/facts.json")), ids=lambda path: path.parent.name)
def test_facts_name_no_place_of_a_machine(path):
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text())
