"""Where the numbers of a run also go: every logged one reaches TensorBoard and trackio, by its name and step.

pytest tests/training/engine/test_trackers.py
"""

import json
import sqlite3

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from hf_vit.errors import HFViTError
from tests.helpers.training_runs import Images, arguments, history, tiny
from training.engine import trackers
from training.engine.trainer import Trainer


def test_tensorboard_holds_every_number_of_the_history(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path / "out", report_to=["tensorboard"], eval_steps=3, run_name="first")
    trainer = Trainer(tiny(), args, Images(40), Images(10))
    trainer.train()
    trainer.accelerator.end_training()
    files = [path for path in (tmp_path / "out").rglob("events.out.tfevents.*") if path.parent.name == "first"]
    events = EventAccumulator(str(files[0].parent)).Reload()
    for name in ("loss", "accuracy", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy"):
        kept = {line["step"]: line[name] for line in history(tmp_path / "out") if name in line}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(kept, rel=1e-6), name
    assert len(events.Scalars("images_per_second")) == 3


def test_trackio_holds_every_number_of_the_history(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    args = arguments(tmp_path / "out", report_to=["trackio"], eval_steps=3, run_name="first")
    trainer = Trainer(tiny(), args, Images(40), Images(10))
    trainer.train()
    trainer.accelerator.end_training()
    with sqlite3.connect(tmp_path / "trackio" / "first.db") as kept:
        rows = [(step, json.loads(text)) for step, text in kept.execute("select step, metrics from metrics")]
    for name in ("loss", "accuracy", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy"):
        expected = {line["step"]: line[name] for line in history(tmp_path / "out") if name in line}
        assert {step: values[name] for step, values in rows if name in values} == pytest.approx(expected), name


def test_a_tracker_without_its_package_or_unknown_is_one_line(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    for name in map(str, LOGGER_TYPE_TO_CLASS):
        with pytest.raises(HFViTError, match=f"--report_to {name} needs its package: pip install {name}"):
            trackers.check_trackers([name])
    with pytest.raises(HFViTError, match=r"choose from none, .*tensorboard.*trackio"):
        trackers.check_trackers(["paper"])
    with pytest.raises(HFViTError, match=r"history.jsonl in the output folder has these numbers"):
        trackers.check_trackers(["csv"])
    assert trackers.check_trackers(["none"]) == []
