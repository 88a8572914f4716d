"""strict_yaml.py: what readers of YAML disagree about is refused, the rest is what it looks like."""

import pytest

from hf_vit.errors import HFViTError
from training.config.parser import parse
from training.config.strict_yaml import read_yaml, yaml_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10), ("-3", -3), ("0", 0), ("0.5", 0.5), ("-.5", -0.5), ("1.0e-6", 1e-6), ("true", True),
        ("null", None), ("30%", "30%"), ("5 epochs", "5 epochs"), ("3a", "3a"), ("[1, 2.5]", [1, 2.5]),
        ("{a: 1}", {"a": 1}),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("0x10", "0x10"), ("1_000", "1_000"), ("'010'", "010"),
    ],
)  # fmt: skip
def test_values_are_what_they_look_like(text, value):
    found = yaml_value("--set x", text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"max_steps: 5\nmax_steps: 7\n", "line 2: max_steps is given twice"),
        (b"max_steps: 010\n", "010 begins with 0"),
        (b"set: {hidden_size: 1, hidden_size: 2}\n", "hidden_size is given twice"),
        (b"set: !!omap [hidden_size: 1]\n", "the tag .*omap is not for recipes"),
        (b"set: &x {a: 1}\nsweep: *x\n", r"aliases .* are not for recipes"),
        (b"set: " + b"[" * 5000, "more than 20 brackets"),
        (b"? [1]\n: 2\n", "a key has to be a word"),
        ("run_name: Größe\n".encode("latin-1"), r"is not UTF-8 \(byte 12\): save it as UTF-8"),
        (b"- max_steps\n", "a recipe is lines of"),
        (b"a: [1\n", "is not YAML"),
    ],
)
def test_what_readers_disagree_about_is_one_line(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(HFViTError, match=message) as error:
        read_yaml(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_steps: 1:30", "--max_steps '1:30': give a whole number"),
        ("learning_rate: 1:30", "--learning_rate '1:30': give a number"),
        ("config: quickstart", "a recipe cannot name another one"),
        ("cofig: quickstart", "unknown key 'cofig' in .*; --help lists"),
        ("max_step: 3", "unknown key 'max_step' .*; did you mean max_steps?"),
        ("max_steps: .inf", "--max_steps inf: give a whole number"),
    ],
)
def test_a_recipe_with_a_slip_is_one_line(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_text(content + "\n", encoding="utf-8-sig")
    with pytest.raises(HFViTError, match=message):
        parse(["--config", str(tmp_path / "recipe.yaml")], "finetune")
