"""Card and report are tried before a run with a time limit, whose steps stay as they are without.

python -m pytest tests/training/reporting/test_rehearsal.py
"""

import sys

import pytest
import torch
from PIL import Image

from hf_vit.errors import HFViTError
from hf_vit.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from tests.training.reporting.test_run_page import RUN
from training import finetune, open_dataset
from training.reporting import rehearsal, report_page
from training.reporting.rehearsal import FinishSeconds, invented_outcomes


IMAGES = [Image.new("L", (8, 8), shade) for shade in range(0, 240, 20)]
TABLES = {
    SINGLE_LABEL: [(image, "ab"[number % 2]) for number, image in enumerate(IMAGES)],
    MULTI_LABEL: [(image, ["a", "b"][: number % 3]) for number, image in enumerate(IMAGES)],
    REGRESSION: [(image, number / 7) for number, image in enumerate(IMAGES)],
}


@pytest.mark.parametrize("problem_type", TABLES)
def test_every_section_can_be_made_of_invented_answers(tmp_path, problem_type):
    images = open_dataset(TABLES[problem_type], problem_type=problem_type)
    names = images.label_names
    for data in (images, None):
        outcomes = invented_outcomes(data, problem_type, len(names))
        failed = []
        report = report_page.ReportInput("", [], [], rehearsal.HISTORY, outcomes, names, data, "")
        report_page.write_report_page(tmp_path, report, failed.append)
        assert not failed


def test_the_limit_counts_what_was_tried(tmp_path, monkeypatch):
    tried = FinishSeconds(page=50.0, attention=1.0)
    monkeypatch.setattr("training.engine.planning.run_timing.rehearse_finish", lambda *args: tried)
    assert tried.total(card_examples=2, reports=True) == 50 + 2 + 6
    assert tried.total(card_examples=0, reports=False) == 50
    assert FinishSeconds(page=0.0, attention=60.0).total(0, True) == 65
    with pytest.raises(HFViTError, match=r"--time_limit 0:00:50 .* is over before one step"):
        finetune(output_dir=str(tmp_path / "out"), report=True, time_limit=50, **RUN)


def test_trying_changes_no_step(tmp_path):
    with_limit = finetune(output_dir=str(tmp_path / "limited"), time_limit="10m", **RUN)
    without = finetune(output_dir=str(tmp_path / "free"), **RUN)
    assert with_limit.facts["training"]["time_plan"]["steps_asked"] == 4
    weights = without.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in with_limit.model.state_dict().items())
    assert not list((tmp_path / "limited").glob("tmp*"))


def test_the_command_counts_from_the_start_of_its_process(tmp_path, monkeypatch):
    options = {**RUN, "set": [f"{name}={value}" for name, value in RUN["set"].items()], "time_limit": "10m"}
    words = ["finetune"]
    for name, value in options.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value).lower()])]
    monkeypatch.setattr("training.train.seconds_of_process", lambda: 300.0)
    monkeypatch.setattr(sys, "argv", [*words, "--output_dir", str(tmp_path / "command")])
    assert 300 < finetune.main()["training"]["time_plan"]["used_seconds"] < 600
    called = finetune.main([*words[1:], "--output_dir", str(tmp_path / "called")])
    assert called["training"]["time_plan"]["used_seconds"] < 300


def test_seconds_of_the_process_are_those_since_it_began():
    from training.train import seconds_of_process

    first, second = seconds_of_process(), seconds_of_process()
    assert 0 < first <= second or first == second == 0  # a process of more than ten minutes


def test_the_page_draws_no_more_than_there_is_time_for(tmp_path, monkeypatch):
    from training.engine.planning.time_plan import TimePlan

    monkeypatch.setattr(TimePlan, "left", lambda plan: -1.0)
    finetune(output_dir=str(tmp_path / "out"), time_limit="10m", **RUN)
    text = (tmp_path / "out" / "report.html").read_text()
    shown = text[text.index("<h2>What the model looks at") : text.index("<h2>Near-duplicates")]
    assert shown.count("<img") == 1
