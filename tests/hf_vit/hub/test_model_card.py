"""Facts in, card out: every number on the card is in the facts, metadata are the Hub's, the code block runs.

python -m pytest tests/hf_vit/hub/test_model_card.py
"""

import copy
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from transformers import ViTImageProcessor

from hf_vit import HFViTConfig, HFViTError, HFViTForImageClassification
from hf_vit.hub.model_card import load_facts, render_card, render_eval_results, write_card
from tests.helpers.hub_server import card_errors


FACTS = {
    "model": {
        "name": "runs/flowers-vit",
        "model_type": "hf_vit",
        "architecture": {"patch_size": 16, "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3},
        "parameters": 5_526_924,
        "base_model": "google/vit-base-patch16-224",
        "image_size": [224, 160],
        "num_labels": 3,
    },
    "task": "image-classification",
    "data": {
        "name": "nelorth/flowers", "config_name": None, "train_split": "train", "eval_split": "test",
        "train_images": 1437, "eval_images": 360, "label_names": ["daisy", "wild | rose", "a`b\nc"],
        "unreadable_images": 2, "train_fraction": 0.5, "fingerprint": "abc123",
    },
    "training": {
        "stage": "finetune", "recipe": "training/recipes/vit_finetune.yaml", "seed": 1, "steps": 500, "epochs": 10.25,
        "arguments": {
            "learning_rate": 0.003, "output_dir": "/home/me/out", "hub_token": "hf_abc", "read_token": "hf_abc",
            "optim": "sgd",
        },
        "augmentation": {"crop": "inception", "crop_area": [0.05, 1.0], "crop_ratio": [3 / 4, 4 / 3]},
        "global_batch_size": 64, "seconds": 123.4, "images_per_second": 456.7, "final_loss": 0.1234,
    },
    "compute": {"forward_flops_per_image": 2_500_000_000, "train_exaflops": 0.00024, "device_hours": 0.0343},
    "results": [
        {"dataset": "nelorth/flowers", "split": "test", "metric": "accuracy", "value": 0.9, "n": 360, "seed": 1},
        {"dataset": "nelorth/flowers", "split": "test", "metric": "loss", "value": 0.31, "n": 360, "seed": 1},
    ],
    "environment": {"hardware": "A CPU", "device": "cpu", "torch": "2.13.0", "commit": None},
    "history": "history.jsonl",
    "figures": ["training_curve.png", "attention_maps.png"],
}  # fmt: skip


@pytest.fixture
def facts():
    return copy.deepcopy(FACTS)


def test_metadata_are_the_hubs(facts):
    data = ModelCard(render_card(facts)).data
    assert data.pipeline_tag == "image-classification" and data.library_name == "transformers"
    assert data.license == "apache-2.0" and data.datasets == ["nelorth/flowers"]
    assert data.base_model == "google/vit-base-patch16-224"
    accuracy = next(result for result in data.eval_results if result.metric_type == "accuracy")
    assert (accuracy.metric_value, accuracy.dataset_split, accuracy.metric_args) == (
        0.9,
        "test",
        {"n": 360, "seed": 1},
    )


def test_the_hubs_validator_accepts_the_metadata(facts):
    assert card_errors(render_card(facts), "model") == []
    assert card_errors(render_card({"model": facts["model"]}), "model") == []
    assert card_errors(render_card(facts | {"license": "mine"}), "model")  # it can say no


def test_eval_results_are_the_hubs(facts, tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    write_card(tmp_path)
    path = tmp_path / ".eval_results" / "nelorth--flowers.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nelorth/flowers", "accuracy", 90.0)
    assert entry.notes == "percent; measured at the end of training, split test, n = 360, seed 1"
    path.write_text("- a fuller measurement\n")
    write_card(tmp_path)
    assert path.read_text() == "- a fuller measurement\n"
    facts["results"] = [row | {"dataset": "images"} for row in facts["results"]]  # a folder: no place on the Hub
    assert render_eval_results(facts) == {}


def test_what_was_measured_is_on_the_card(facts):
    card = render_card(facts)
    for said in ("5.5 million", "5,526,924", "224 x 160", "90.00% ± 1.58", "0.3100", "1,437", "360", "0.003", "sgd",
                 "2.5 GFLOPs", "0.00024 exaFLOPs", "456.7", "A CPU", "`daisy`", "`wild | rose`",
                 "2 images of the data", "abc123", "inception", "`[0.75, 1.33333]`", "`vit_finetune.yaml`",
                 "![Training curve](training_curve.png)"):  # fmt: skip
        assert said in card, said


def test_no_stubs_no_secrets_no_places_of_a_machine(facts):
    facts["model"]["base_model"] = "/home/someone/pretrained"
    facts["data"]["name"] = "/home/someone/images"
    for result in facts["results"]:
        result["dataset"] = "/home/someone/images"
    card = render_card(facts)
    for unwanted in ("More information", "hf_abc", "/home", "None", "null", "output_dir"):
        assert unwanted not in card
    data = ModelCard(card).data
    assert data.base_model is None and data.datasets is None
    assert "fine-tuned from `pretrained` on `images`" in card


def test_a_sweep_and_what_deduplication_removed(facts):
    assert "dev split" not in render_card(facts)
    facts["training"]["sweep"] = [
        {"values": {"learning_rate": rate, "max_steps": 500}, "dev_accuracy": score, "n": 1600}
        for rate, score in ((1e-3, 0.8), (1 / 3, 0.5))
    ]
    facts["training"]["arguments"]["deduplicate_against"] = "/home/someone/exam"
    facts["data"]["duplicates_left_out"] = 1234
    card = render_card(facts)
    assert "| `learning_rate` = `0.001`, `max_steps` = `500` | 80.00% ± 1.00, n = 1,600 |" in card
    assert "| `learning_rate` = `0.333333`, `max_steps` = `500` | 50.00% ± 1.25, n = 1,600 |" in card
    assert "Left out as duplicates | 1,234, also in `exam` |" in card and "/home" not in card


def test_sections_without_facts_are_left_out(facts):
    card = render_card({"model": facts["model"]})
    headings = re.findall(r"^## (.*)", card, re.MULTILINE)
    assert headings == ["Use", "Intended use and limits", "Citation", "License"]
    assert "not measured on held-out images" in card
    assert ModelCard(card).data.eval_results is None


def test_tables_survive_odd_labels(facts):
    facts["training"]["arguments"] = {"weird": "a|b\nc", "list": [1, "x|y"], "html": "<script>"}
    for table in re.findall(r"(?:^\|.*\n)+", render_card(facts), re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table


def test_several_seeds_are_summed_up_and_the_index_holds_our_own(facts):
    row = facts["results"][0]
    facts["results"] = [row | {"seed": seed, "value": value} for seed, value in enumerate((0.88, 0.90, 0.92))]
    card = render_card(facts)
    assert "90.00% ± 2.00 (88.00% to 92.00%) | 360 | 0, 1, 2 |" in card
    assert [result.metric_value for result in ModelCard(card).data.eval_results] == [0.90]


def test_hybrid_is_called_so(facts):
    facts["model"]["architecture"] |= {"resnet_depths": [3, 4, 9], "patch_size": 1}
    card = render_card(facts)
    assert "ResNet" in card and "hybrid" in ModelCard(card).data.tags


def test_only_figures_that_exist_are_shown(facts, tmp_path):
    (tmp_path / "training_curve.png").write_bytes(b"")
    card = render_card(facts, tmp_path)
    assert "training_curve.png" in card and "attention_maps.png" not in card


def test_rendering_is_a_function_of_the_facts(facts):
    assert render_card(facts) == render_card(json.loads(json.dumps(facts)))


def test_front_matter_is_plain_yaml(facts):
    facts["model"]["name"] = "name: with {odd} - characters #1"
    front = render_card(facts).split("---\n")[1]
    assert yaml.safe_load(front)["model-index"][0]["name"] == facts["model"]["name"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"no facts\.json"),
        ("{", "not readable as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"model": {"name": "x", "architecture": {}, "image_size": 8, "num_labels": 2}}', r"lacks model\.parameters"),
    ],
)
def test_broken_facts_are_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "facts.json").write_text(content)
    with pytest.raises(HFViTError, match=said):
        load_facts(tmp_path)


def test_result_without_n_is_refused(facts):
    del facts["results"][1]["n"]
    with pytest.raises(HFViTError, match=r"lacks results\[1\]\.n"):
        render_card(facts)


def test_the_cards_own_code_runs(facts, tmp_path, monkeypatch, capsys):
    config = HFViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        id2label=dict(enumerate(["daisy", "rose", "tulip"])),
    )  # fmt: skip
    folder = tmp_path / "flowers-vit"
    HFViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    (folder / "facts.json").write_text(json.dumps(facts))
    Image.new("RGB", (30, 20)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    lines = re.search(r"```python\n(.*?)```", write_card(folder).read_text(), re.DOTALL)[1]
    assert len(lines.splitlines()) == 3
    exec(lines, {})
    assert "daisy" in capsys.readouterr().out


def test_the_code_on_a_gray_models_card_runs(facts, tmp_path, monkeypatch, capsys):
    """`pipeline` makes three channels of every image, so it is not what the card shows."""
    config = HFViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_channels=1, id2label=dict(enumerate(["daisy", "rose", "tulip"])),
    )  # fmt: skip
    folder = tmp_path / "flowers-vit"
    HFViTForImageClassification(config).save_pretrained(folder)
    settings = {"image_mean": [0.5], "image_std": [0.5], "do_convert_rgb": False}
    ViTImageProcessor(size={"height": 16, "width": 16}, **settings).save_pretrained(folder)
    facts["model"]["architecture"] = facts["model"]["architecture"] | {"num_channels": 1}
    (folder / "facts.json").write_text(json.dumps(facts))
    Image.new("RGB", (30, 20)).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    lines = re.search(r"```python\n(.*?)```", write_card(folder).read_text(), re.DOTALL)[1]
    exec(lines.replace("trust_remote_code=True", "trust_remote_code=False"), {})
    assert capsys.readouterr().out.strip() in ("daisy", "rose", "tulip")
