"""Resuming: the same bytes as without an interruption, and nothing else is taken for the same run.

pytest tests/training/engine/checkpoints/test_trainer_state.py
"""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_vit.errors import HFViTError
from tests.helpers.training_runs import Images, arguments, tiny
from training.data.dataset import open_dataset
from training.data.transforms import EvalTransform
from training.engine.trainer import Trainer


class Die(TrainerCallback):
    """Ends the run as a power cut would: in the middle of a step, nothing written."""

    def __init__(self, step):
        self.update = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            raise KeyboardInterrupt


EVERYTHING = {
    "max_steps": 9, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 4,
    "save_steps": 3, "eval_steps": 5, "save_total_limit": None, "ema_decay": 0.9, "mixup_alpha": 0.3,
    "cutmix_alpha": 0.5, "weight_decay": 0.1,
}  # fmt: skip


def run(folder, stop_at=None, resume=None, callbacks=(), data=None, model=None, **values):
    """Train in `folder`; return the bytes of weights, average, history."""
    args = arguments(folder, **{**EVERYTHING, **values})
    model = model or tiny(seed=1, hidden_dropout_prob=0.1, drop_path_rate=0.2)
    trainer = Trainer(
        model, args, data or Images(30), Images(7), callbacks=[*callbacks, *([Die(stop_at)] if stop_at else [])]
    )
    if stop_at:
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume)
        return None
    trainer.train(resume)
    trainer.evaluate()
    trainer.save_model()
    last = folder / "checkpoint-9"
    kept = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "trainer_state.json")
    files = [folder / "model.safetensors", folder / "history.jsonl", *(last / name for name in kept)]
    return [path.read_bytes() for path in files if path.exists()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize("stop_at", [1, 4, 5, 8])
def test_interrupted_mid_accumulation_and_resumed_gives_the_same_bytes(tmp_path, uninterrupted, stop_at):
    run(tmp_path / "out", stop_at)
    assert run(tmp_path / "out", resume=True) == uninterrupted


def test_interrupted_again_and_again_with_other_workers(tmp_path, uninterrupted):
    run(tmp_path / "out", 4)
    run(tmp_path / "out", 7, resume=True, dataloader_num_workers=2)
    assert run(tmp_path / "out", resume=str(tmp_path / "out/checkpoint-6"), dataloader_num_workers=1) == uninterrupted


def test_a_hybrid_resumed_gives_the_same_bytes(tmp_path):
    """Its convolutions keep standardized kernels, and the optimizer is a fused one."""

    def hybrid():
        return tiny(seed=1, resnet_depths=(), patch_size=1)

    whole = run(tmp_path / "whole", model=hybrid())
    assert run(tmp_path / "cut", stop_at=5, model=hybrid()) is None
    assert run(tmp_path / "cut", resume=True, model=hybrid()) == whole


def test_sgd_and_a_finished_run_resumed(tmp_path):
    first = run(tmp_path / "a", optim="sgd", ema_decay=0.0)
    run(tmp_path / "b", 7, optim="sgd", ema_decay=0.0)
    assert run(tmp_path / "b", resume=True, optim="sgd", ema_decay=0.0) == first
    assert run(tmp_path / "b", resume=True, optim="sgd", ema_decay=0.0) == first  # nothing is left to train


@pytest.mark.parametrize(
    "values",
    [
        {"optim": "muon", "layer_decay": 0.7, "ema_decay": 0.0},
        {"optim": "lamb", "unfreeze_every": 2, "mixup_off_steps": 4, "ema_decay": 0.0},
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "warmup_steps": 2, "ema_decay": 0.0},
    ],
)
def test_other_optimizers_go_on_with_the_same_bytes(tmp_path, values):
    if values["optim"].startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    whole = run(tmp_path / "whole", **values)
    run(tmp_path / "out", stop_at=7, **values)
    assert run(tmp_path / "out", resume=True, **values) == whole


def test_callbacks_remember(tmp_path):
    args = {"load_best_model_at_end": True, "eval_steps": 1, "max_steps": 9, "save_steps": 1, "learning_rate": 0.0}
    run(tmp_path / "out", 3, callbacks=[EarlyStoppingCallback(4)], model=tiny(seed=1), **args)
    trainer = Trainer(tiny(seed=1), arguments(tmp_path / "out", **{**EVERYTHING, **args}), Images(30), Images(7),
                      callbacks=[EarlyStoppingCallback(4)])  # fmt: skip
    trainer.train(True)
    assert trainer.state.global_step == 5  # step 1 is the best, 2 to 5 are no better


def test_without_a_checkpoint_resuming_is_beginning(tmp_path, uninterrupted):
    assert run(tmp_path / "out", resume=True) == uninterrupted


def test_what_is_half_written_is_not_a_checkpoint(tmp_path, uninterrupted):
    run(tmp_path / "out", 7)
    (tmp_path / "out/checkpoint-6/resume.json").unlink()
    shutil.copytree(tmp_path / "out/checkpoint-3", tmp_path / "out/.writing-checkpoint-9")
    assert run(tmp_path / "out", resume=True) == uninterrupted
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    with pytest.raises(HFViTError, match="not a complete checkpoint"):
        run(tmp_path / "out", resume=str(tmp_path / "out/.nothing"))


def test_other_data_are_refused_with_what_changed(tmp_path):
    run(tmp_path / "out", 4)
    with pytest.raises(HFViTError, match=r"the data changed \(images: 30 there, 31 here\)"):
        run(tmp_path / "out", resume=True, data=Images(31))


def test_as_many_other_images_are_other_data(tmp_path):
    one, other = (open_dataset("digits", split=split).with_transform(EvalTransform((8, 8)), 0)
                  for split in ("train[:40]", "train[40:80]"))  # fmt: skip
    assert len(one) == len(other) and one.fingerprint != other.fingerprint
    values = {"max_steps": 4, "save_steps": 2, "logging_steps": 2}
    Trainer(tiny(num_labels=10), arguments(tmp_path / "out", **values), one).train()
    with pytest.raises(HFViTError, match=r"the data changed \(fingerprint: "):
        Trainer(
            tiny(num_labels=10), arguments(tmp_path / "out", **values), dataclasses.replace(other, split=one.split)
        ).train(True)


def test_another_architecture_is_refused_with_what_changed(tmp_path):
    run(tmp_path / "out", 4)
    before = (tmp_path / "out/history.jsonl").read_bytes()
    with pytest.raises(HFViTError, match=r"the architecture changed \(.*hidden_size: 16 there, 32 here"):
        run(tmp_path / "out", resume=True, model=tiny(hidden_size=32))
    assert (tmp_path / "out/history.jsonl").read_bytes() == before


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(tmp_path):
    run(tmp_path / "out", 7)
    with pytest.raises(HFViTError, match=r"checkpoint-6 is what 6 steps made, this run has 5: raise --max_steps"):
        run(tmp_path / "out", resume=True, max_steps=5)


def test_a_run_that_goes_on_in_another_folder_still_finds_its_best_weights(tmp_path):
    best = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1, "learning_rate": 0.0}
    run(tmp_path / "out", 4, **best)  # without a rate, the first step stays the best
    for number in range(5, 10):
        assert not (tmp_path / f"out/checkpoint-{number}").exists()
    (tmp_path / "out").rename(tmp_path / "moved")
    run(tmp_path / "other", 6, resume=str(tmp_path / "moved/checkpoint-4"), **best)
    run(tmp_path / "other", resume=True, **best)
    assert not (tmp_path / "other/checkpoint-1").exists() and (tmp_path / "other/model.safetensors").exists()


def test_a_finished_run_resumed_keeps_to_the_limit_of_checkpoints(tmp_path):
    run(tmp_path / "out", save_total_limit=2)
    shutil.copytree(tmp_path / "out/checkpoint-6", tmp_path / "out/checkpoint-3")  # killed before it was removed
    run(tmp_path / "out", resume=True, save_total_limit=2)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]


def test_a_checkpoint_is_a_model_folder_without_pickles(tmp_path):
    run(tmp_path / "out", 4)
    folder = tmp_path / "out/checkpoint-3"
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".py"}
    model = tiny().from_pretrained(folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and isinstance(model.classifier, torch.nn.Linear)
