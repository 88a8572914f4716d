"""Where the numbers of a run also go: every logged one reaches TensorBoard and trackio, by its name and update.

pytest tests/training/engine/test_trackers.py
"""

import json
import shutil
import sqlite3

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from hf_vit.errors import HFViTError
from tests.training.engine.test_trainer import Pictures, arguments, history, tiny
from training.engine import trackers
from training.engine.trainer import Trainer


def test_tensorboard_holds_every_number_of_the_history(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path / "out", report_to=["tensorboard"], eval_steps=3, run_name="first")
    trainer = Trainer(tiny(), args, Pictures(40), Pictures(10))
    trainer.train()
    trainer.accelerator.end_training()
    files = [path for path in (tmp_path / "out").rglob("events.out.tfevents.*") if path.parent.name == "first"]
    events = EventAccumulator(str(files[0].parent)).Reload()
    for name in ("loss", "accuracy", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy"):
        kept = {line["step"]: line[name] for line in history(tmp_path / "out") if name in line}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(kept, rel=1e-6), name
    assert len(events.Scalars("images_per_second")) == 3


def test_csv_of_a_resumed_run_has_every_line_once(tmp_path):
    def train(name, resume=None, **values):
        args = arguments(tmp_path / name, report_to=["csv"], logging_steps=1, save_steps=2, eval_steps=2, **values)
        Trainer(tiny(), args, Pictures(40), Pictures(10)).train(resume)
        lines = (line.split(",") for line in (tmp_path / name / "metrics.csv").read_text().splitlines())
        return [line for line in lines if line[1] in ("name", "loss", "accuracy", "eval_loss", "learning_rate")]

    whole = train("whole")
    assert train("out") == whole
    shutil.rmtree(tmp_path / "out/checkpoint-6")  # as if killed after update 5 or so
    assert train("out", True) == whole
    for torn in ("", "step,na", "step,name,value\n", "step,name,value\n7,lo"):  # as if killed while writing
        (tmp_path / "out/metrics.csv").write_text(torn)
        shutil.rmtree(tmp_path / "out/checkpoint-6")
        assert train("out", True) == [whole[0], *(line for line in whole[1:] if int(line[0]) > 4)], torn


def test_trackio_holds_every_number_of_the_history(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    args = arguments(tmp_path / "out", report_to=["trackio"], eval_steps=3, run_name="first")
    trainer = Trainer(tiny(), args, Pictures(40), Pictures(10))
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
            trackers.chosen_trackers([name], "run", "out")
    with pytest.raises(HFViTError, match=r"choose from none, csv, .*tensorboard.*trackio"):
        trackers.chosen_trackers(["paper"], "run", "out")
    assert trackers.chosen_trackers(["none"], "run", "out") == []
