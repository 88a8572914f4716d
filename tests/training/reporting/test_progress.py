"""Meter, timer, display and history.

pytest tests/training/reporting/test_progress.py
"""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT
from training.config.recipes import recipe_path
from training.reporting import progress


def test_the_meter_adds_up_images():
    meter = progress.Meter(torch.device("cpu"))
    logits = torch.eye(3)
    meter.add(torch.tensor([1.0, 2.0, 3.0]), logits, torch.tensor([0, 1, 0]))
    soft = torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.0, 0.2, 0.8]])
    meter.add(torch.tensor([1.0, 1.0, 1.0]), logits, soft)
    assert meter.sums.tolist() == [9.0, 4.0, 6.0]
    assert float(meter.add(torch.tensor([1.0, 2.5, 1.0]), logits, soft)) == 4.5
    meter.reset()
    assert meter.sums.tolist() == [0.0, 0.0, 0.0]


def test_the_timer_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    timer = progress.Timer(torch.device("cpu"))

    def after(seconds):
        now[0] += seconds

    timer.start()
    after(1.5)
    with timer.wait():
        after(0.5)
    timer.lap(64)
    after(100)  # an evaluation
    timer.start()
    after(2)
    timer.lap(64)
    assert (timer.seconds, timer.images) == (4.0, 128)
    found = {"seconds": 4.0, "interval_seconds": 4.0, "images_per_second": 32.0, "data_wait": 0.125}
    assert timer.interval() == found
    after(1)
    timer.lap(10)
    found = {"seconds": 5.0, "interval_seconds": 1.0, "images_per_second": 10.0, "data_wait": 0.0}
    assert timer.interval() == found


def test_the_display_gives_one_line_a_log_where_there_is_no_terminal(capsys):
    display = progress.Display(enabled=True, bar=True)
    display.begin(0, 100)
    speed = {"images_per_second": 1234.0, "data_wait": 0.31, "memory_peak_bytes": 2**30, "eta_seconds": 3725.0,
             "interval_seconds": 2.0, "mfu": 0.42}  # fmt: skip
    display.show(10, {"loss": 0.5, "accuracy": 0.75, "learning_rate": 1e-3}, speed)
    display.show(20, {"eval_loss": 0.25}, {})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "step 10/100  loss 0.5  accuracy 75.00%  learning_rate 1.00e-03  1,234 images/s  MFU 42%  data wait 31%  "
        "memory 1.00 GiB  ETA 1:02:05"
    )
    assert lines[1].startswith("hint: 31% of the time") and lines[2] == "evaluation 20/100  loss 0.25"


@pytest.mark.parametrize(("share", "hints"), [(0.19, 0), (0.21, 1)])
def test_the_bar_too_is_followed_by_one_hint_where_images_come_too_slowly(capsys, monkeypatch, share, hints):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    display = progress.Display(enabled=True, bar=True)
    display.begin(0, 100)
    speed = {"images_per_second": 10.0, "data_wait": share, "memory_peak_bytes": 0, "interval_seconds": 2.0}
    for step in (10, 20):
        display.show(step, {"loss": 0.5}, speed)
    display.end()
    shown = capsys.readouterr().err
    assert shown.count("hint:") == hints and "10 images/s" in shown


def test_a_notebook_has_a_bar_and_signs_of_life(capsys, monkeypatch):
    assert not progress.in_notebook()
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert progress.in_notebook()
    display = progress.Display(enabled=True, bar=True)
    assert display.sign.enabled  # a long step leaves the bar as it is
    display.begin(0, 100)
    display.advance()
    display.log("a line")
    display.end()
    shown = capsys.readouterr().err
    assert "1/100" in shown and "a line" in shown
    shell.config.clear()  # a terminal's IPython
    assert not progress.in_notebook() and not progress.Display(enabled=True, bar=True).use_bar


def test_a_silent_display_says_nothing(capsys):
    display = progress.Display(enabled=False, bar=True)
    display.show(1, {"loss": 1.0}, {})
    display.log("word")
    assert capsys.readouterr().err == ""


def test_history_is_replaced_and_appended(tmp_path):
    progress.write_history(tmp_path, [{"step": 1, "loss": 0.1}])
    progress.append_line(tmp_path / progress.HISTORY_NAME, {"step": 2, "loss": 0.30000000000000004})
    lines = [json.loads(line) for line in (tmp_path / progress.HISTORY_NAME).read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.30000000000000004}]


def test_an_estimate_names_the_cheaper_way_where_a_run_is_long():
    short = progress.estimate(12.34, 600, 1.26, probe=60)
    assert short == "about 12.3 images/s: 0:10:00 to the end (h:mm:ss), 1.3 GiB"
    long = progress.estimate(2, 38 * 3600, 1, probe=240)
    assert long.endswith("; --config probe, a linear head on frozen features, takes about 0:04:00")
    assert recipe_path("probe").is_file()
    assert "probe" not in progress.estimate(2, 38 * 3600, 1, probe=None)
    assert "probe" not in progress.estimate(2, 38 * 3600, 1, probe=20 * 3600)  # hardly cheaper


def test_a_silent_run_gives_signs_of_life(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SIGN", 0.05)
    monkeypatch.setattr(progress, "NEXT_SIGN", 0.05)
    sign = progress.SignOfLife(True)
    sign.activity = lambda: "opening data"
    with sign:
        deadline = time.monotonic() + 10
        while (shown := capsys.readouterr().err) == "" and time.monotonic() < deadline:
            time.sleep(0.01)
    assert shown.startswith("opening data (0:00:0")
    with progress.SignOfLife(False):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_what_a_run_is_doing_is_said_from_before_the_first_step_to_the_end():
    display = progress.Display(True, bar=False)
    assert display.sign.activity() == "getting ready: timing a few passes"
    display.begin(0, 2)
    assert display.sign.activity() == "training, step 0 of 2"
    display.evaluating(1, 3)
    assert display.sign.activity() == "evaluating, batch 1 of 3"
    display.evaluating(None)
    display.advance()
    display.advance()
    assert display.sign.activity() == "finishing"


@pytest.mark.parametrize(
    ("words", "said"), [(["-m", "training.finetune", "--help"], 1), (["-c", "import training"], 0)]
)
def test_a_command_says_that_it_loads_where_that_takes_long(words, said, tmp_path):
    slow = "import threading; init = threading.Timer.__init__\n"
    slow += "threading.Timer.__init__ = lambda timer, seconds, *rest: init(timer, 0.0, *rest)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)  # no waiting
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and done.stderr.count("loading torch and transformers") == said, done.stderr
