"""resume_check.py: other arguments hold from the checkpoint on or are refused by name; damage is one line.

pytest tests/training/engine/checkpoints/test_resume_check.py
"""

import dataclasses
import json
import shutil

import pytest
from safetensors.torch import load_file

from hf_vit.errors import HFViTError
from tests.helpers.training_runs import Images, arguments, history, tiny
from training.data.dataset import open_dataset
from training.data.transforms import EvalTransform
from training.engine.trainer import Trainer


PLAIN = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "lr_scheduler_type": "constant", "optim": "sgd"}


def trainer_of(folder, about=None, model=None, data=None, evaluation=None, **values):
    args = arguments(folder, **{**PLAIN, **values})
    return Trainer(model or tiny(seed=1), args, data or Images(30), evaluation or Images(7), about=about)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    trainer_of(folder, about={"arguments": {"crop": "squash"}}).train()
    return folder


@pytest.fixture
def halfway(tmp_path, finished):
    """The same, as if it had ended after step 2."""
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    return tmp_path / "out"


def test_another_rate_and_decay_hold_from_the_first_resumed_step(halfway, capsys):
    trainer = trainer_of(halfway, learning_rate=0.5, weight_decay=2.0)
    trainer.train(True)
    assert [line["learning_rate"] for line in history(halfway) if "loss" in line] == [0.01, 0.01, 0.5, 0.5]
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 2.0}
    assert "learning_rate: 0.01 there, 0.5 here; weight_decay: 0.0 there, 2.0 here" in capsys.readouterr().err
    trainer.seconds = 1.0
    facts = trainer.create_model_card()
    changed = {"step": 2, "changes": {"learning_rate": [0.01, 0.5], "weight_decay": [0.0, 2.0]}}
    assert facts["training"]["argument_changes"] == [changed]
    resume = json.loads((halfway / "checkpoint-4/resume.json").read_text())
    assert resume["argument_changes"] == [changed]


def test_another_length_has_its_own_schedule_at_once(halfway):
    trainer_of(halfway, max_steps=8, lr_scheduler_type="linear").train(True)
    rates = [line["learning_rate"] for line in history(halfway) if "loss" in line]
    assert rates[2:] == pytest.approx([0.01 * (1 - step / 8) for step in range(2, 8)])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optim": "adamw_torch"}, "--optim was sgd, is adamw_torch"),
        ({"layer_decay": 0.5}, "--layer_decay was 1.0, is 0.5"),
        ({"about": {"arguments": {"freeze_backbone": True}}}, "--freeze_backbone was False, is True"),
    ],
)
def test_what_the_optimizers_state_belongs_to_is_refused_by_name(halfway, values, words):
    about = {"about": {"arguments": {"crop": "squash"}}}
    with pytest.raises(HFViTError, match=rf"checkpoint-2 cannot be resumed .*{words}"):
        trainer_of(halfway, **{**about, **values}).train(True)


def test_from_python_a_frozen_backbone_is_refused_without_a_traceback(halfway):
    model = tiny(seed=1)
    model.freeze_backbone()
    with pytest.raises(HFViTError, match=r"checkpoint-2 cannot be resumed: .*restore --freeze_backbone"):
        trainer_of(halfway, model=model).train(True)


def test_a_changed_crop_and_evaluation_split_are_reported(halfway, capsys):
    trainer_of(halfway, about={"arguments": {"crop": "none"}}, evaluation=Images(9)).train(True)
    said = capsys.readouterr().err
    assert "crop: squash there, none here" in said
    assert "evaluation images: 7 images there, 9 images here" in said


def test_the_same_images_under_another_name_are_the_same_data(tmp_path, capsys):
    data = open_dataset("digits", split="train[:40]").with_transform(EvalTransform((8, 8)), 0)
    trainer_of(tmp_path, data=data, model=tiny(num_labels=10), evaluation=data).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    moved = dataclasses.replace(data, name="/moved/digits/")
    trainer_of(tmp_path, data=moved, model=tiny(num_labels=10), evaluation=moved).train(True)
    assert "going on with other" not in capsys.readouterr().err


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "resume.json"])
@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_one_line_that_names_it(tmp_path, finished, name, damage):
    shutil.copytree(finished, tmp_path / "out")
    damage(tmp_path / "out/checkpoint-4" / name)
    with pytest.raises(HFViTError, match=rf"checkpoint-4 is damaged \({name} has changed.*checkpoint intact") as error:
        trainer_of(tmp_path / "out").train(True)
    assert "\n" not in str(error.value)


def test_asked_to_a_run_goes_on_from_the_newest_intact_checkpoint(tmp_path, finished, capsys):
    shutil.copytree(finished, tmp_path / "out")
    whole = load_file(finished / "checkpoint-4/model.safetensors")
    cut(tmp_path / "out/checkpoint-4/model.safetensors")
    trainer_of(tmp_path / "out", about={"arguments": {"crop": "squash"}}).train("intact")
    said = capsys.readouterr().err
    assert "checkpoint-4 is damaged" in said and "set aside as damaged-checkpoint-4" in said
    assert "resuming from" in said and "after step 2" in said
    again = load_file(tmp_path / "out/checkpoint-4/model.safetensors")
    assert all((again[name] == whole[name]).all() for name in whole)
    (tmp_path / "out/checkpoint-2/resume.json").write_text("{}")
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    trainer_of(tmp_path / "out").train("intact")
    assert "no checkpoint is whole: training begins anew" in capsys.readouterr().err
