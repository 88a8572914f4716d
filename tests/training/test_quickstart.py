"""The quickstart's own work: commands that the scripts accept, a check that can fail, a report of what was measured.

python -m pytest tests/training/test_quickstart.py            # -m slow: every stage, with few steps
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from hf_vit import HFViTConfig, HFViTError, HFViTForImageClassification
from tests.conftest import ROOT
from training import quickstart
from training.config.parser import parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "digits"
    torch.manual_seed(0)
    config = HFViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=10,
    )  # fmt: skip
    model = HFViTForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def test_every_stage_is_a_command_that_the_scripts_accept(tmp_path):
    stages = [parse(words, name) for _, name, words in quickstart.commands(tmp_path, [3, 4], [])]
    assert len(stages) == 1 + 2 * 4
    assert len({stage.train.output_dir for stage in stages}) == len(stages)
    for stage in stages:
        if stage.data.samples_per_class:
            assert stage.train.max_steps == quickstart.FEW_STEPS
    pretrain, main = stages[:2]
    assert main.train.do_predict and main.train.output_dir == str(tmp_path / "digits")
    assert main.model.model == pretrain.train.output_dir
    assert main.model.image_size[0] > pretrain.model.image_size[0]


def test_from_scratch_is_the_same_network_for_the_same_number_of_steps(tmp_path):
    stages = [parse(words, name) for _, name, words in quickstart.commands(tmp_path, [0], [])]
    pretrained, scratch, few, few_scratch = stages[1:]
    assert scratch.model.model is None and scratch.model.set == quickstart.recipe(quickstart.PRETRAIN)["set"]
    for one, other in ((pretrained, scratch), (few, few_scratch)):
        assert one.train.max_steps == other.train.max_steps and one.model.image_size == other.model.image_size
        assert one.train.learning_rate == other.train.learning_rate


def test_an_earlier_result_goes_and_another_folder_stays(tmp_path):
    mine = tmp_path / "quickstart"
    quickstart.clear(mine)
    (mine / "digits").mkdir()
    (mine / "digits" / "facts.json").write_text("{}")
    quickstart.clear(mine)
    assert [path.name for path in mine.iterdir()] == [quickstart.REPORT_NAME]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(HFViTError, match="is not empty"):
        quickstart.clear(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_process_without_hf_vit_repeats_the_models_logits(folder):
    images = np.random.default_rng(0).integers(0, 255, (70, 8, 8, 3), dtype=np.uint8)
    logits = quickstart.external_logits(folder, images)
    pixels = ViTImageProcessor.from_pretrained(folder)([Image.fromarray(i) for i in images], return_tensors="pt")
    with torch.no_grad():
        expected = HFViTForImageClassification.from_pretrained(folder).eval()(**pixels).logits.numpy()
    assert quickstart.compare_predictions(logits, expected)["agrees"]


def test_a_folder_without_its_code_does_not_pass_for_loadable(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "digits")
    (tmp_path / "digits" / "modeling_hf_vit.py").unlink()
    with pytest.raises(HFViTError, match="does not load in a process without hf_vit"):
        quickstart.external_logits(tmp_path / "digits", np.zeros((1, 8, 8, 3), dtype=np.uint8))


def test_comparison_can_fail():
    logits = np.eye(4, dtype=np.float32)
    assert quickstart.compare_predictions(logits, logits + 1e-6)["agrees"]
    assert not quickstart.compare_predictions(logits, logits + 1e-2)["agrees"]
    swapped = quickstart.compare_predictions(logits, logits[::-1])
    assert not swapped["agrees"] and swapped["equal"] == 0
    with pytest.raises(HFViTError, match="the trainer wrote"):
        quickstart.compare_predictions(logits, logits[:3])


def test_a_failed_stage_ends_the_run(tmp_path, capsys):
    with pytest.raises(HFViTError, match="pre-training ended with status 2"):
        quickstart.run_stage("pre-training", "pretrain", ["--dataset", str(tmp_path / "nowhere")])
    assert capsys.readouterr().err.startswith("error: ")


def test_a_signal_in_a_stage_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(quickstart.STAGE_COMMANDS, "pretrain", lambda words: {})  # what a command returns after Ctrl-C
    assert quickstart.main(["--output_dir", str(tmp_path / "quickstart")]) == 130
    assert "stopped" in capsys.readouterr().err


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), quickstart.thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def report(seeds):
    stages = [{"stage": "pre-training", "seed": 0, "accuracy": 0.9, "n": 3120, "train_images": 31200, "steps": 700,
               "seconds": 98.2, "images_per_second": 950.0}]  # fmt: skip
    for seed in seeds:
        for number, variant in enumerate(quickstart.VARIANTS):
            about = {"stage": quickstart.name_of(variant), "pretrained": variant.pretrained, "few": variant.few}
            score = {"accuracy": 0.99 - 0.1 * number - 0.01 * seed, "n": 360, "seed": seed}
            work = {"train_images": 100 if variant.few else 1437, "steps": 200 if variant.few else 400}
            stages.append(about | score | work | {"seconds": 20.4 + number, "images_per_second": 800.0 + number})
    check = {"n": 360, "equal": 360, "largest_difference": 1e-7, "agrees": True}
    environment = {"hardware": "A CPU", "threads": 2, "torch": "2.13.0", "transformers": "5.23.0"}
    return {"stages": stages, "check": check, "seconds": 251.0, "environment": environment, "image_sizes": [16, 24]}


def test_report_says_what_was_measured(tmp_path):
    text = quickstart.report_text(report([0]), tmp_path)
    for said in ("99.00% on 360", "1,437 labels, 400 steps", "100 labels, 200 steps", "89.0%", "79.0%", "69.0%",
                 "seed 0", "1 min 38 s", "950", "4 min 11 s", "360 of 360 predictions equal", "A CPU",
                 "trust_remote_code=True", "training.finetune"):  # fmt: skip
        assert said in text, said


def test_report_of_several_seeds_gives_mean_and_deviation(tmp_path):
    text = quickstart.report_text(report([0, 1, 2]), tmp_path)
    assert "98.0% ± 1.0" in text and "seeds 0, 1, 2" in text


def test_report_does_not_hide_a_disagreement(tmp_path):
    wrong = report([0])
    wrong["check"] |= {"equal": 12, "agrees": False}
    assert "12 of 360 predictions NOT EQUAL" in quickstart.report_text(wrong, tmp_path)


def test_bad_options_are_one_line(tmp_path, capsys):
    (tmp_path / "x").write_text("")
    assert quickstart.main(["--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_every_stage_runs_and_gives_the_weights_of_its_command(tmp_path):
    root, alone = tmp_path / "quickstart", tmp_path / "alone"
    extra = ["--max_steps", "2", "--cpu_kernels", "false"]  # which serve is measured, and tests keep their own table
    assert quickstart.run(root, [0], extra=extra) == 0
    written = json.loads((root / quickstart.REPORT_NAME).read_text())
    assert written["check"]["agrees"] and len(written["stages"]) == 5
    assert (root / "digits" / "README.md").is_file()
    threads = str(max(1, quickstart.usable_cores() - 1))
    for (_, name, words), folder in zip(quickstart.commands(alone, [0], extra), ("pretrained", "digits")):
        command = [sys.executable, "-m", f"training.{name}", *words]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads}, check=True)
        weights = [load_file(where / folder / "model.safetensors") for where in (root, alone)]
        for key, values in weights[0].items():
            assert torch.equal(values, weights[1][key]), f"{folder}: {key}"
