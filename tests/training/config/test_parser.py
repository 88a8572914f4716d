"""Recipes and flags: they share their keys, every value gets its type, and what is misspelt is named.

pytest tests/training/config/test_parser.py
"""

import re

import pytest

from hf_vit.errors import HFViTError
from hf_vit.problem_type import SINGLE_LABEL
from training.config.arguments import FIELDS, TrainArguments
from training.config.parser import HELP_GROUPS, TYPES, parse


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "learning_rate: 3e-3\nmax_steps: 7\nset: {hidden_size: 64, pooling: gap}\nimage_size: [24, 32]\n"
    )
    found = parse(["--config", str(recipe), "--max_steps", "9", "--set", "hidden_size=128"], "finetune")
    assert found.train.learning_rate == 3e-3  # YAML 1.1 reads 3e-3 as a word
    assert found.train.max_steps == 9
    assert found.model.set == {"hidden_size": 128, "pooling": "gap"}
    assert found.model.image_size == [24, 32]
    assert found.train.per_device_train_batch_size == TrainArguments().per_device_train_batch_size
    assert found.recipe == "mine"


def test_a_flag_takes_the_place_of_what_a_resolved_config_says_of_the_same(tmp_path):
    resolved = tmp_path / "config_resolved.yaml"
    resolved.write_text(parse(["--max_steps", "7", "--preset", "vit-tiny-patch16-224"], "finetune").to_yaml())

    def given(words):
        return parse(["--config", str(resolved), *words.split()], "finetune")

    assert given("").train.eval_strategy == "no" and given("--eval_steps 3").train.eval_strategy == "steps"
    assert (
        given("").train.for_problem(SINGLE_LABEL).greater_is_better
        and not given("--metric_for_best_model loss").train.greater_is_better
    )
    assert given("--metric_for_best_model loss --greater_is_better true").train.greater_is_better
    assert given("").train.max_steps == 7 and given("--num_train_epochs 2").train.max_steps == -1
    assert given("--num_train_epochs 2 --max_steps 5").train.max_steps == 5
    assert given("--model x").model.preset is None
    (tmp_path / "none.yaml").write_text("save_strategy: 'no'\nlogging_strategy: epoch\ndev_fraction: 0.1\n")
    words = "--save_steps 5 --logging_steps 5"
    none = parse(["--config", str(tmp_path / "none.yaml")], "finetune")
    every = parse(["--config", str(tmp_path / "none.yaml"), *words.split()], "finetune")
    assert none.train.save_strategy == "no" and every.train.save_strategy == every.train.logging_strategy == "steps"
    named = parse(["--config", str(tmp_path / "none.yaml"), "--eval_split", "test"], "finetune").data
    assert (named.eval_split, named.dev_fraction) == ("test", None)
    (tmp_path / "mine.yaml").write_text("gradient_accumulation_steps: 16\n")
    mine = parse(["--config", str(tmp_path / "mine.yaml"), "--global_batch_size", "64"], "finetune")
    assert mine.train.gradient_accumulation_steps == 1


def test_set_reads_yaml_values():
    words = [
        "--set",
        "layer_norm_eps=1e-5",
        "resnet_depths=[3,4]",
        "qk_norm=true",
        "--set",
        "representation_size=null",
    ]
    fields = parse(words, "pretrain").model.set
    assert fields == {"layer_norm_eps": 1e-5, "resnet_depths": [3, 4], "qk_norm": True, "representation_size": None}


def test_booleans_as_flag_value_and_negation():
    assert parse(["--bf16"], "finetune").train.bf16 is True
    assert parse(["--bf16", "false"], "finetune").train.bf16 is False
    assert parse(["--no_flip"], "finetune").data.flip is False
    assert parse(["--resume_from_checkpoint"], "finetune").train.resume_from_checkpoint is True
    path = "out/checkpoint-3"
    assert parse(["--resume_from_checkpoint", path], "finetune").train.resume_from_checkpoint == path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rte 1", "did you mean --learning_rate"),
        ("--learning_rate fast", "--learning_rate 'fast': give a number"),
        ("--max_steps 1.5", "--max_steps '1.5': give a whole number"),
        ("--crop insepton", "did you mean inception"),
        ("--flip perhaps", "give true or false"),
        ("--image_size 8 wide", "give whole numbers"),
        ("--config no_such", "no recipe 'no_such'"),
        ("--set hidden_size", "give field=value"),
        ("--set resnet_depths=[3", "--set resnet_depths=[3: '[3' is not YAML"),
        ("--sweep learning_rate=[0.1", "is not YAML; brackets and quotes have to be closed"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_what_is_misspelt_is_one_line_that_names_the_way_out(words, message):
    with pytest.raises(HFViTError, match=re.escape(message)) as error:
        parse(words.split(), "finetune")
    assert "\n" not in str(error.value)


def test_an_unknown_key_of_a_recipe_is_named_with_its_file(tmp_path):
    (tmp_path / "r.yaml").write_text("weight_decy: 0.1\n")
    with pytest.raises(HFViTError, match=r"weight_decy.*r\.yaml.*weight_decay"):
        parse(["--config", str(tmp_path / "r.yaml")], "finetune")


@pytest.mark.parametrize(
    "value", ["5", "null", "true", "[]", "[[1]]", "[null]", "{}", "'x'", "[1, x, {b: 2}]", ".inf", "'\\0'", "''"]
)
def test_every_option_of_a_recipe_takes_any_kind_of_value_or_refuses_it_in_one_line(value, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for name in FIELDS:
        recipe.write_text(f"{name}: {value}\n" + ("" if name == "dataset" else "dataset: digits\n"))
        try:
            parse(["--config", str(recipe), "--output_dir", str(tmp_path / "out")], "finetune")
        except HFViTError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000


def test_help_gives_every_option_with_its_group(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], "finetune")
    text = capsys.readouterr().out
    for name in FIELDS:
        assert f"--{name}" in text
    for title in HELP_GROUPS:
        assert f"\n{title}:\n" in text
    assert "unit: steps" in text and "source: Table 4" in text


WHOLE_NUMBERS = [name for name, hint in TYPES.items() if hint in (int, int | None)]


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999", "1.5", "1e300"])
def test_what_is_no_whole_number_is_one_line(name, value):
    with pytest.raises(HFViTError, match=f"--{name} "):
        parse(["--output_dir", "x", f"--{name}={value}"], "finetune")


@pytest.mark.parametrize(
    "words",
    [
        "--image_size 1000000000", "--max_steps 1e9", "--num_train_epochs 1e9", "--warmup_steps 1e99",
        "--cooldown_steps 99999999999", "--dataloader_prefetch_factor 1e9", "--dataloader_num_workers 1e9",
        "--per_device_train_batch_size 1e9", "--crop_pct 1e-320", "--resize_small 1e300",
    ],
)  # fmt: skip
def test_numbers_that_would_never_end_are_refused(words):
    with pytest.raises(HFViTError, match=f"{words.split()[0]} .*: give "):
        parse(["--output_dir", "x", *words.split()], "finetune")


def test_help_has_every_option_once_and_the_defaults_of_its_command(capsys):
    listed = [name for names in HELP_GROUPS.values() for name in names]
    assert sorted(listed) == sorted(FIELDS)
    assert len(next(iter(HELP_GROUPS.values()))) <= 10
    for stage, rate, first in (("finetune", "0.0001", "--model "), ("pretrain", "0.001", "--preset ")):
        with pytest.raises(SystemExit):
            parse(["--help"], stage)
        text = capsys.readouterr().out
        assert f"default: {rate}\n" in text.partition("--learning_rate")[2][:200]
        options = [line.strip() for line in text.splitlines() if line.startswith("  --")]
        assert options[2].startswith(first) and all(any(o.startswith(f"--{n} ") for o in options) for n in FIELDS)


def test_old_spellings_are_understood_and_say_the_new_one(capsys):
    arguments = parse(["--output_dir", "x", "--mixing_off", "3", "--on_unreadable=stop"], "finetune")
    assert arguments.train.mixup_off_steps == 3 and arguments.data.on_decode_error == "stop"
    said = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in said] == [
        "--mixing_off is now --mixup_off_steps", "--on_unreadable is now --on_decode_error",
    ]  # fmt: skip
