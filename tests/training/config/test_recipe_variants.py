"""How `--config` finds a recipe, `--variant` chooses in it, and what a resolved config keeps of both.

pytest tests/training/config/test_recipe_variants.py
"""

import pytest
import yaml

from hf_vit import HFViTConfig
from hf_vit.errors import HFViTError
from training.config.parser import parse
from training.config.recipes import RECIPES, RENAMED_RECIPES, read_recipe, recipe_names
from training.engine.planning.schedule import TrainingSchedule


MINE = """
set: {hidden_size: 128, drop_path_rate: 0.1}
max_steps: 100
variants:
  short: {max_steps: 10}
  epochs: {num_train_epochs: 3, set: {drop_path_rate: 0.4}}
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return str(path)


def test_a_variant_overrides_as_flags_do(mine):
    short = parse(["--config", mine, "--variant", "short"], "finetune")
    assert short.train.max_steps == 10 and short.model.set == {"hidden_size": 128, "drop_path_rate": 0.1}
    epochs = parse(["--config", mine, "--variant", "epochs", "--set", "hidden_size=64"], "finetune")
    assert (epochs.train.max_steps, epochs.train.num_train_epochs) == (-1, 3)  # epochs take the place of steps
    assert epochs.model.set == {"hidden_size": 64, "drop_path_rate": 0.4}
    assert (epochs.recipe, epochs.variant, epochs.origin) == ("mine", "epochs", "mine --variant epochs")


def test_the_default_variant_is_taken_and_can_be_another(tmp_path):
    (tmp_path / "d.yaml").write_text(MINE + "default_variant: short\n")
    assert parse(["--config", str(tmp_path / "d.yaml")], "finetune").train.max_steps == 10
    other = parse(["--config", str(tmp_path / "d.yaml"), "--variant", "epochs"], "finetune")
    assert other.train.num_train_epochs == 3


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (MINE, "", "no default: give --variant with one of short, epochs"),
        (MINE, "--variant shrt", "variants short, epochs; did you mean short"),
        ("max_steps: 5\n", "--variant short", "has no variants; leave it out"),
        ("max_steps: 5\ndefault_variant: short\n", "", "default_variant short.*has no variants"),
        (MINE + "default_variant: long\n", "", "default_variant long is not among its variants short, epochs"),
        ("variants: [a, b]\n", "", "variants has to map each name"),
        ("variants: {}\n", "", "variants has to map each name"),
        ("variants: {a: 3}\n", "", "variants has to map each name"),
        (
            "default_variant: a\nvariants: {a: {max_steps: 5}, b: {max_step: 5}}\n",
            "",
            "max_step.*variant b.*did",
        ),
        ("default_variant: a\nvariants: {a: {max_steps: 5}, b: {max_steps: x}}\n", "", "--max_steps 'x'"),
        ("variants: {a: {variants: {b: {}}}}\n", "--variant a", "unknown key 'variants' in variant a"),
        ("resolved_from: {recipe: deit3}\nmax_steps: 5\n", "", "resolved_from has to be"),
    ],
)
def test_what_a_variant_cannot_be(tmp_path, text, words, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(HFViTError, match=message) as error:
        parse(["--config", str(path), *words.split()], "finetune")
    assert "\n" not in str(error.value)


def test_a_variant_needs_a_recipe():
    with pytest.raises(HFViTError, match="--variant large is one of a recipe's: give --config"):
        parse(["--variant", "large"], "finetune")


@pytest.mark.parametrize("old", RENAMED_RECIPES)
def test_an_old_name_is_understood_with_one_line(old, capsys):
    new, variant = RENAMED_RECIPES[old]
    found = parse(["--config", old], "finetune")
    assert capsys.readouterr().err.splitlines() == [
        f"--config {old} is now --config {new} --variant {variant}; the old name goes with the next release"
    ]
    assert found == parse(["--config", new, "--variant", variant], "finetune")
    assert old not in recipe_names() and not capsys.readouterr().err


def test_an_old_name_has_its_variant_already():
    with pytest.raises(HFViTError, match="deit3_large is deit3 --variant large: give --config deit3 with"):
        parse(["--config", "deit3_large", "--variant", "small"], "pretrain")


def test_the_old_place_is_understood_with_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(RECIPES.parents[1])
    assert read_recipe("training/recipes/vit_jft.yaml").path == RECIPES / "published" / "vit_jft.yaml"
    assert capsys.readouterr().err == (
        "training/recipes/vit_jft.yaml is now training/recipes/published/vit_jft.yaml; the old name goes with the "
        "next release\n"
    )
    assert read_recipe("training/recipes/layer_decay_base.yaml").variant == "base"
    assert "is now --config finetune_mae --variant base" in capsys.readouterr().err
    assert read_recipe("vit_jft.yaml").name == read_recipe("vit_jft").name == "vit_jft"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HFViTError, match="no recipe"):  # another folder's path is not ours
        read_recipe("elsewhere/recipes/vit_jft.yaml")
    assert not capsys.readouterr().err


def test_a_resolved_config_states_recipe_and_variant_and_keeps_them(tmp_path):
    path = tmp_path / "config_resolved.yaml"
    for words in (["--config", "deit3", "--variant", "small"], ["--config", "vit_jft"], []):
        first = parse([*words, "--seed", "5"], "pretrain")
        path.write_text(first.to_yaml())
        assert yaml.safe_load(path.read_text())["resolved_from"] == {
            "recipe": first.recipe, "variant": first.variant,
        }  # fmt: skip
        again = parse(["--config", str(path)], "pretrain")
        assert again == first


def test_step_limit_ends_large_sets_sooner_and_small_ones_not():
    train = parse(
        ["--num_train_epochs", "10", "--step_limit", "50", "--per_device_train_batch_size", "8"], "finetune"
    ).train
    assert [TrainingSchedule(train, HFViTConfig(), n, 1).max_steps for n in (20, 40, 41, 10**6)] == [25, 50, 50, 50]
    for words, message in (
        ("--step_limit 0", "give 1 or more"),
        ("--step_limit 5 --max_steps 9", "leave out it or --max_steps"),
    ):
        with pytest.raises(HFViTError, match=message):
            parse(words.split(), "finetune")
    named = parse(["--config", "finetune_small", "--max_steps", "9"], "finetune").train
    assert (named.max_steps, named.step_limit) == (9, None)
