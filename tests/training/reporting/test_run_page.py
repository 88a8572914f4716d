"""The report of a run: written at the end of fine-tuning, never uploaded unasked, and no danger to the run.

python -m pytest tests/training/reporting/test_run_page.py
"""

import json
import re
import shutil

import pytest
from PIL import Image

from hf_vit import HFViTForImageClassification
from hf_vit.cli.main import main as hf_vit
from hf_vit.hub.model_folder import files_to_upload
from training import finetune
from training.metrics.outcomes import Outcomes
from training.reporting import report_page, run_page


RUN = {
    "set": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 4,
    },
    "image_size": 8, "dataset": "digits", "max_steps": 4, "eval_steps": 2, "logging_steps": 1, "warmup_steps": 0,
    "per_device_train_batch_size": 64, "per_device_eval_batch_size": 180, "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    finetune(output_dir=str(folder), **RUN)
    return folder


def test_the_page_is_written_and_complete(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "could not be made" not in text
    assert re.findall(r"<h2>([^<]+)</h2>", text) == [
        "Learning curves", "Confusion matrix", "Classes", "Most confused", "Highest loss", "Likely mislabelled",
        "Calibration", "What the model looks at", "Near-duplicates",
    ]  # fmt: skip
    facts = json.loads((run / "facts.json").read_text())
    accuracy = next(row for row in facts["results"] if row["metric"] == "accuracy")
    low, high = accuracy["interval"]
    assert f"{accuracy['value']:.2%}" in text and f"{low:.2%} to {high:.2%}" in text
    assert "attention rollout" in text and "by perceptual hash" in text
    outcomes = Outcomes.load(run / "outcomes.npz")
    assert len(outcomes) == 360 and (outcomes.classes[:, 0] == outcomes.labels).mean() == pytest.approx(
        accuracy["value"]
    )


def test_it_stays_on_this_machine(run):
    assert "report" not in json.loads((run / "facts.json").read_text())
    assert "report.html" not in (run / "README.md").read_text()
    sent = files_to_upload(run)
    assert "model.safetensors" in sent
    assert not {"report.html", "mislabelled.csv", "outcomes.npz"} & set(sent)


def test_the_card_links_it_where_it_shows_images(run, tmp_path):
    folder = tmp_path / "out"
    finetune(output_dir=str(folder), card_examples=1, **RUN)
    assert "](report.html)" in (folder / "README.md").read_text()
    assert "report.html" in files_to_upload(folder)
    hf_vit(["card", str(folder)])
    assert "](report.html)" in (folder / "README.md").read_text()
    (folder / "report.html").unlink()
    hf_vit(["card", str(folder)])
    assert "report.html" not in (folder / "README.md").read_text()
    assert "report.html" not in files_to_upload(folder)


def test_another_file_cannot_be_named_as_the_page(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    (folder / "private.html").write_text("not for others")
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts | {"report": "private.html"}))
    assert not {"private.html", "report.html"} & set(files_to_upload(folder))


def test_without_it(tmp_path):
    folder = tmp_path / "out"
    result = finetune(output_dir=str(folder), report=False, **RUN)
    assert result.metrics["accuracy"] > 0 and (folder / "README.md").exists()
    assert not {"report.html", "mislabelled.csv", "outcomes.npz"} & {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("where", ["write_report_page", "run_input"])
def test_a_failure_is_one_line_and_the_run_stays(tmp_path, monkeypatch, capsys, where):
    def broken(*words):
        raise MemoryError("no memory for a page")

    monkeypatch.setattr(report_page if where == "write_report_page" else run_page, where, broken)
    folder = tmp_path / "out"
    result = finetune(output_dir=str(folder), card_examples=1, **RUN)
    said = [line for line in capsys.readouterr().out.splitlines() if "report.html" in line]
    assert said == ["note: no report.html, the folder is complete without it: no memory for a page"]
    assert result.metrics["accuracy"] > 0 and not (folder / "report.html").exists()
    assert "report.html" not in (folder / "README.md").read_text()
    assert HFViTForImageClassification.from_pretrained(folder).config.num_labels == 10


def test_a_run_resumed_at_its_end_has_its_page(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    before = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "report.html").unlink()
    finetune(output_dir=str(folder), resume_from_checkpoint=True, **RUN)
    after = (folder / "report.html").read_text(encoding="utf-8")
    matrix = re.compile(r'class="matrix">(.*?)</table>', re.DOTALL)
    assert matrix.search(after).group(1) == matrix.search(before).group(1)


def test_an_image_without_a_class_is_named_without_its_folder(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        Image.new("L", (8, 8), 20 * number).save(path)
    data = [(str(path), number / 3) for number, path in enumerate(paths)]
    finetune(
        output_dir=str(tmp_path / "out"),
        **RUN | {"dataset": data, "per_device_train_batch_size": 4, "dev_fraction": 0.5},
    )
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    looked_at = text[text.index("<h2>What the model looks at") : text.index("<h2>Near-duplicates")]
    assert "<img" in looked_at and ".png" in looked_at and str(tmp_path) not in text
