"""Progressive resolution and batch schedules: what a stage is, what the network sees in it, resuming, the account.

pytest tests/training/engine/planning/test_schedule.py
"""

import pytest
import torch

from hf_vit import HFViTConfig
from hf_vit.errors import HFViTError
from tests.helpers.training_runs import Images, arguments, history, tiny
from training.config.arguments import TrainArguments
from training.config.parser import parse
from training.data.dataset import open_dataset
from training.data.transforms import EvalTransform, TrainTransform
from training.engine.planning.schedule import stages_of
from training.engine.trainer import Trainer
from training.reporting.flops import train_flops


CONFIG = HFViTConfig(image_size=16, patch_size=4, hidden_size=16, num_attention_heads=2)


def stages(devices=1, max_steps=100, epoch=20.0, **values):
    args = TrainArguments(max_steps=max_steps, **{"per_device_train_batch_size": 8} | values)
    return stages_of(args, CONFIG, max_steps, epoch, devices)


def test_without_a_schedule_a_run_is_one_stage():
    only = stages(gradient_accumulation_steps=2, devices=3)
    assert [(s.start, s.stop, s.image_size, s.batch_size, s.accumulation_steps, s.images) for s in only] == [
        (0, 100, None, 8, 2, 48)
    ]


def test_sizes_and_batches_begin_at_updates_shares_percent_and_epochs():
    found = stages(image_size_schedule={"0": 8, "0.3": [12, 8], "4 epochs": 16}, gradient_accumulation_steps=2)
    assert [(s.start, s.stop, s.image_size) for s in found] == [
        (0, 30, (8, 8)),
        (30, 80, (12, 8)),
        (80, 100, (16, 16)),
    ]
    both = stages(devices=2, image_size_schedule={"50%": 8}, batch_size_schedule={"0": 4, "20%": 32, "50": 48})
    assert [(s.start, s.image_size, s.batch_size, s.accumulation_steps, s.images) for s in both] == [
        (0, None, 2, 1, 4), (20, None, 8, 2, 32), (50, (8, 8), 8, 3, 48),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size_schedule": {"0": 2}}, "smaller than one patch of 4 x 4"),
        ({"image_size_schedule": {"0": "big"}}, "give pixels"),
        ({"image_size_schedule": {"soon": 8}}, "give steps, a fraction"),
        ({"image_size_schedule": {"100": 8}}, "begins after the last of 100 steps"),
        ({"image_size_schedule": {"10": 8, "10%": 12}}, "two of these begin at the same"),
        ({"batch_size_schedule": {"0": 0}}, "1 or more"),
        ({"batch_size_schedule": {"0": 17}}, "take a multiple of 3"),
        ({"batch_size_schedule": {"2 epochs": 16}}, "gives epochs no fixed length"),
        ({"batch_size_schedule": {"0": 16}, "warmup_steps": "1 epoch"}, "gives epochs no fixed length"),
        ({"batch_size_schedule": {"0": 16}, "max_steps": -1}, "needs --max_steps"),
    ],
)
def test_what_cannot_be_meant_is_said(values, message):
    with pytest.raises(HFViTError, match=message):
        stages(**values)


def test_recipes_and_flags_spell_them_alike(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "image_size_schedule: {0: 128, 30%: [160, 192]}\nbatch_size_schedule: {50%: 512}\nmax_steps: 10\n"
    )
    written = parse(["--config", str(recipe)], "pretrain").train
    line = "--image_size_schedule 0=128 30%=[160,192] --batch_size_schedule 50%=512 --max_steps 10"
    assert written == parse(line.split(), "pretrain").train
    (tmp_path / "again.yaml").write_text(parse(line.split(), "pretrain").to_yaml())
    assert parse(["--config", str(tmp_path / "again.yaml")], "pretrain").train == written
    with pytest.raises(HFViTError, match="such as --image_size_schedule 0=128"):
        parse(["--image_size_schedule", "128"], "pretrain")


SCHEDULE = {"image_size_schedule": {"0": 8, "4": 12}, "batch_size_schedule": {"2": 16, "4": 24}}


def trainer(folder, **values):
    data = open_dataset("digits", split="train").with_transform(TrainTransform(16, flip=False), 0)
    held_out = open_dataset("digits", split="test[:50]").with_transform(EvalTransform(16), 0)
    model = tiny(image_size=16, num_labels=10, hidden_dropout_prob=0.1)
    return Trainer(model, arguments(folder, logging_steps=1, **SCHEDULE | values), data, held_out)


def test_the_network_sees_the_sizes_and_batches_and_the_account_counts_them(tmp_path):
    run, seen = trainer(tmp_path / "out"), []
    run.model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    run.train()
    # before the first step, a few passes are tried
    assert seen[-12:] == [(8, 3, 8, 8)] * 2 + [(8, 3, 8, 8)] * 4 + [(8, 3, 12, 12)] * 6
    assert run.position == 2 * 8 + 2 * 16 + 2 * 24 and run.timer.images == run.position
    small, large = (train_flops(run.model.config, (side, side)) for side in (8, 12))
    assert run.state.total_flos == (2 * 8 + 2 * 16) * small + 2 * 24 * large
    seen.clear()
    run.evaluate()
    assert {shape[2:] for shape in seen} == {(16, 16)}
    assert run.create_model_card()["compute"]["train_exaflops"] == run.state.total_flos / 1e18
    assert run.state.epoch == pytest.approx(96 / 1437)


def test_a_resumed_run_is_the_same_with_any_number_of_workers(tmp_path):
    whole = trainer(tmp_path / "whole", save_steps=3)
    whole.train()
    assert (tmp_path / "whole/checkpoint-3").is_dir()  # in the middle of a stage
    again = trainer(tmp_path / "again", save_steps=3, dataloader_num_workers=2)
    again.train(str(tmp_path / "whole/checkpoint-3"))
    for (name, ours), theirs in zip(whole.model.named_parameters(), again.model.parameters()):
        assert torch.equal(ours, theirs), name
    assert history(tmp_path / "whole") == history(tmp_path / "again")
    assert again.state.total_flos == whole.state.total_flos and again.position == whole.position


def test_a_schedule_that_changes_nothing_changes_nothing(tmp_path):
    plain = trainer(tmp_path / "plain", image_size_schedule={}, batch_size_schedule={}, gradient_accumulation_steps=2)
    same = trainer(tmp_path / "same", image_size_schedule={"3": 16}, batch_size_schedule={"0": 16, "4": 16})
    for run in (plain, same):
        run.train()
    assert history(tmp_path / "plain") == history(tmp_path / "same")
    for ours, theirs in zip(plain.model.parameters(), same.model.parameters()):
        assert torch.equal(ours, theirs)


def test_data_without_a_size_to_choose_and_batches_beyond_the_data_are_refused(tmp_path):
    args = arguments(tmp_path / "out", image_size_schedule={"0": 12})
    with pytest.raises(HFViTError, match="needs a data set of training"):
        Trainer(tiny(), args, Images(40)).train()
    kept = open_dataset("digits", split="train").with_transform(TrainTransform(16, crop="none"), 0)
    with pytest.raises(HFViTError, match="choose another crop"):
        Trainer(tiny(), args, kept).train()
    args = arguments(tmp_path / "out", batch_size_schedule={"3": 48})
    with pytest.raises(HFViTError, match=r"48 images \(8 x 6 accumulation.*: lower --batch_size_schedule to 40"):
        Trainer(tiny(), args, Images(40)).train()
    for values, lower in (
        ({"global_batch_size": 48}, "--global_batch_size to 40 or less"),
        ({"gradient_accumulation_steps": 48, "per_device_train_batch_size": 1}, "--gradient_accumulation_steps to 40"),
        ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 16}, "--per_device_train_batch_size to 13"),
    ):
        with pytest.raises(HFViTError, match=f"a batch of 48 images .*: lower {lower}"):
            Trainer(tiny(), arguments(tmp_path / "out", **values), Images(40)).train()
    assert not (tmp_path / "out").exists()
