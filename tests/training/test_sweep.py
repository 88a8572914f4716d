"""A grid on the dev split, then the final run on everything; interrupted ones go on.

pytest tests/training/test_sweep.py
"""

import json

import pytest

from hf_vit.errors import HFViTError
from training import finetune, train
from training.config.parser import parse
from training.sweep import grid, sweep, trial_of


LINE = (
    "--set hidden_size=16 num_hidden_layers=1 num_attention_heads=2 intermediate_size=16 patch_size=4 --image_size 8 "
    "--dataset digits --use_cpu --disable_tqdm --per_device_train_batch_size 64 --max_steps 8 --warmup_steps 0 "
    "--crop squash --no_flip --dev_fraction 0.1 --sweep learning_rate=[1e-9,0.02]"
)


def test_the_best_rate_on_the_dev_split_trains_on_everything(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    facts = finetune.main([*LINE.split(), "--output_dir", str(out)])
    rows = json.loads((out / "sweep.json").read_text())
    assert facts["training"]["sweep"] == rows and [row["values"]["learning_rate"] for row in rows] == [1e-9, 0.02]
    assert rows[1]["dev_accuracy"] > rows[0]["dev_accuracy"] and rows[0]["n"] == 144  # a tenth of 1,437
    assert facts["training"]["arguments"]["learning_rate"] == 0.02
    assert facts["data"]["train_images"] == 1437 and facts["data"]["eval_split"] == "test"
    trial = json.loads((out / "sweep/learning_rate=0.02/facts.json").read_text())
    assert trial["data"]["train_images"] == 1437 - 144
    assert "on 144 dev images" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        finetune.main([*LINE.split(), "--output_dir", str(out)])
    assert "is not empty" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(train, "run", lambda arguments, *rest, **more: seen.append(arguments.train.output_dir) or {})
    assert finetune.main([*LINE.split(), "--output_dir", str(out), "--resume_from_checkpoint"]) == {}
    assert seen == [str(out)]  # the trials are not run again
    resolved = out / "sweep/learning_rate=0.02/config_resolved.yaml"
    resolved.write_text(resolved.read_text().replace("weight_decay: 0.0", "weight_decay: 0"))
    finetune.main([*LINE.split(), "--output_dir", str(out), "--resume_from_checkpoint"])
    assert seen == [str(out)] * 2  # equal numbers, however they are written
    with pytest.raises(SystemExit):
        finetune.main([*LINE.split(), "--output_dir", str(out), "--resume_from_checkpoint", "--max_steps", "9"])
    assert "trained with other arguments (--max_steps was 8, is 9)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["--sweep max_steps=[8,2] --warmup_steps 4", "--sweep loss=[softmax,masked_patches] --mixup_alpha 0.1"]
)
def test_a_later_trial_that_cannot_be_meant_is_refused_before_the_first_runs(words, tmp_path, capsys):
    line = LINE.split(" --max_steps")[0].split() + ["--dev_fraction", "0.1", *words.split()]
    with pytest.raises(SystemExit):
        finetune.main([*line, "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


def test_a_trial_that_ends_the_sweep_is_named(tmp_path, capsys):
    words = ["--optim", "sgd", "--max_grad_norm", "0", "--max_steps", "4", "--sweep", "learning_rate=[1e-3,1e30]"]
    with pytest.raises(SystemExit):
        finetune.main([*LINE.split(), *words, "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: learning_rate=1e+30: the loss is not")


def test_a_flag_overrides_the_sweep_of_a_recipe():
    words = ["--config", "finetune_cifar10", "--model", "x", "--output_dir", "out"]
    swept, fixed = parse(words, "finetune"), parse([*words, "--learning_rate", "0.003"], "finetune")
    assert swept.train.sweep and not fixed.train.sweep and fixed.train.learning_rate == 0.003
    assert swept.data.dev_fraction == 0.02 and fixed.data.dev_fraction is None
    both = parse([*words[2:], "--config", "augreg_transfer", "--max_steps", "900"], "finetune")
    assert list(both.train.sweep) == ["learning_rate"] and (both.train.max_steps, both.data.dev_fraction) == (900, 0.1)


def test_a_flag_for_the_evaluation_takes_the_place_of_the_recipes_where_nothing_is_swept():
    words = ["--config", "finetune_pets", "--model", "x", "--output_dir", "out", "--learning_rate", "0.003"]
    carved = parse([*words, "--dev_fraction", "0.2"], "finetune").data
    assert (carved.dev_fraction, carved.eval_split) == (0.2, None)
    assert parse(words, "finetune").data.eval_split == "test"


def test_grids_and_trials():
    assert grid({"a": [1, 2], "b": [3, 4]}) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    found = parse([*LINE.split(), "--output_dir", "out", "--eval_split", "test", "--push_to_hub"], "finetune")
    trial = trial_of(found, {"learning_rate": 0.5, "crop_area": [0.5, 1.0]})
    assert trial.train.learning_rate == 0.5 and trial.data.crop_area == [0.5, 1.0] and not trial.train.push_to_hub
    assert trial.data.eval_split is None and trial.data.dev_fraction == 0.1 and not trial.train.sweep
    assert found.train.sweep == {"learning_rate": [1e-9, 0.02]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sweep learning_rate=[0.1]", "give --dev_fraction"),
        ("--dev_fraction 0.1 --sweep learning_rate=0.1", "give a list of values"),
        ("--dev_fraction 0.1 --sweep learning_rate=[fast]", "--learning_rate 'fast': give a number"),
        ("--dev_fraction 0.1 --sweep model=[a,b]", "only arguments of training"),
        ("--dev_fraction 0.1 --sweep learning_rte=[1]", "only arguments of training"),
        ("--dev_fraction 0.1 --eval_split test", "leave out one of them"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(words, message):
    with pytest.raises(HFViTError) as error:
        parse(words.split(), "finetune")
    assert message in str(error.value)


def test_each_run_of_a_sweep_has_an_equal_part_of_the_time(tmp_path, monkeypatch):
    limits = []

    def run(arguments, stage, **more):
        limits.append(arguments.train.time_limit)
        return {"results": [{"metric": "accuracy", "value": 0.5, "n": 9}]}

    (tmp_path / "out").mkdir()
    arguments = parse([*LINE.split(), "--time_limit", "1m", "--output_dir", str(tmp_path / "out")], "finetune")
    sweep(arguments, "finetune", run)
    assert limits == [20.0, 20.0, 20.0]
