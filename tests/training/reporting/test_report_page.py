"""report.html: the sections of each problem type, names of any letters, many classes, a part that fails.

python -m pytest tests/training/reporting/test_report_page.py
"""

import csv
import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from hf_vit.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from training.data.dataset import open_dataset
from training.metrics.outcomes import Outcomes
from training.reporting import report_page
from training.reporting.report_page import ReportInput, beside, write_report_page


NAMES = ["<b>cat</b>", "$5 & $6", "柴犬"]
HISTORY = [
    {"step": 5, "loss": 2.0, "learning_rate": 0.1},
    {"step": 10, "loss": 1.0, "learning_rate": 0.05, "eval_loss": 1.2, "eval_accuracy": 0.5},
    {"step": 15, "eval_loss": 1.1, "eval_accuracy": 0.7},
]


@pytest.fixture
def images(tmp_path):
    """Four images of each of three classes."""
    for label in "abc":
        (tmp_path / "in" / "test" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 30), (number * 60, 0, 0)).save(tmp_path / "in" / "test" / label / f"{number}.png")
    return open_dataset(str(tmp_path / "in"), split="test")


def classes(labels, guesses, sure=0.9, total=3):
    """Outcomes of predictions that all have one confidence; the label has what is left."""
    labels, guesses = np.asarray(labels), np.asarray(guesses)
    other = (guesses + 1) % total
    second = np.where(labels == guesses, other, labels)
    probabilities = np.tile(np.float32([sure, 1 - sure]), (len(labels), 1))
    own = np.where(labels == guesses, sure, 1 - sure).astype(np.float32)
    return Outcomes(
        SINGLE_LABEL, np.arange(len(labels)), -np.log(own), labels, np.stack([guesses, second], 1), probabilities, own
    )


def page(folder, outcomes, dataset=None, names=NAMES, **changes):
    scores = [
        {"metric": "accuracy", "value": 0.75, "n": 12, "interval": [0.4, 0.9]},
        {"metric": "loss", "value": 0.5, "n": 12},
    ]
    given = ReportInput("my <model>", [("model", "ViT")], scores, HISTORY, outcomes, names, dataset, "held-out images")
    lines = []
    path = write_report_page(folder, dataclasses.replace(given, **changes), lines.append)
    text = path.read_text(encoding="utf-8")
    assert lines == [] and "could not be made" not in text
    return text


def headings(text):
    return re.findall(r"<h2>([^<]+)</h2>", text)


def test_sections_of_classes(tmp_path, images):
    labels = np.repeat([0, 1, 2], 4)
    guesses = labels.copy()
    guesses[[0, 1, 5]] = [1, 1, 2]
    text = page(tmp_path, classes(labels, guesses), images)
    assert headings(text) == ["Learning curves", "Confusion matrix", "Classes", "Most confused", "Highest loss",
                              "Likely mislabelled", "Calibration"]  # fmt: skip
    assert "my &lt;model&gt;" in text and "40.00% to 90.00%" in text and "75.00%" in text
    # the mistakes, as numbers of the matrix, as pairs and as images
    matrix = text[text.index('class="matrix"') : text.index("Most confused</h2>")]
    row = re.search(r"<tr><th>&lt;b&gt;cat&lt;/b&gt;</th>(.*?)</tr>", matrix).group(1)
    assert re.findall(r"<td[^>]*>(.*?)</td>", row) == ["2", "2", ""]
    assert "&lt;b&gt;cat&lt;/b&gt; taken for $5 &amp; $6: 2 of 4" in text
    assert text.count("data:image/jpeg") == 3 + 12 + 3
    with open(tmp_path / "mislabelled.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert {tuple(row[1:3]) for row in rows[1:]} == {(NAMES[0], NAMES[1]), (NAMES[1], NAMES[2])} and len(rows) == 4


def test_names_of_any_letters_are_themselves(tmp_path, images):
    text = page(tmp_path, classes([0, 1, 2], [1, 2, 0]), images)
    assert "<b>cat" not in text and "$5 &amp; $6" in text and "柴犬" in text


def test_everything_right(tmp_path, images):
    text = page(tmp_path, classes([0, 1, 2], [0, 1, 2]), images)
    assert "Every image is classified correctly." in text and "0 images of 3" in text


def test_without_images_the_numbers_stay(tmp_path):
    text = page(tmp_path, classes([0, 0, 1, 2], [0, 1, 1, 2]))
    assert "<img" not in text and "taken for" in text and not (tmp_path / "mislabelled.csv").exists()


def test_an_image_that_is_gone_is_left_out(tmp_path, images):
    (tmp_path / "in" / "test" / "a" / "0.png").unlink()
    text = page(tmp_path, classes(np.repeat([0, 1, 2], 4), np.repeat([1, 1, 2], 4)), images)
    assert text.count("data:image/jpeg") == 3 + 11 + 3  # of four confused ones, of twelve, of four


def test_the_page_of_many_classes_is_small(tmp_path):
    total = 21_841
    random = np.random.default_rng(0)
    labels, guesses = random.integers(total, size=(2, 4000))
    names = [f"class {number}" for number in range(total)]
    text = page(tmp_path, classes(labels, guesses, total=total), names=names)
    assert len(text) < 300_000
    assert text.count("<th>") < 2000 and "of 21,841; all others are one row" in text
    matrix = text[text.index('class="matrix"') : text.index("Most confused</h2>")]
    counts = [
        int(cell.replace(",", ""))
        for cell in re.findall(r"<td[^>]*>([\d,]*)</td>", matrix.partition("</table>")[0])
        if cell
    ]
    assert 0 < sum(counts) <= 4000


def test_sections_of_several_labels(tmp_path, images):
    random = np.random.default_rng(0)
    marks = (random.random((12, 3)) < 0.5).astype(np.float32)
    outputs = np.where(marks > 0, 3.0, -3.0).astype(np.float32)
    outputs[4] *= -1  # an image that seems to have the labels of another
    given = Outcomes(MULTI_LABEL, np.arange(12), np.abs(outputs - 3 * (2 * marks - 1)).mean(1), marks, outputs=outputs)
    text = page(tmp_path, given, images, thresholds=[0.5, 0.4, 0.3])
    assert headings(text) == ["Learning curves", "Labels", "Highest loss", "Likely mislabelled", "Calibration"]
    assert "average precision" in text and "0.400" in text
    with open(tmp_path / "mislabelled.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert {row[0] for row in rows} == {images.image_name(4)}
    expected = {(name, "superfluous" if mark else "missing") for name, mark in zip(NAMES, marks[4])}
    assert {tuple(row[1:3]) for row in rows} == expected


def test_sections_of_numbers(tmp_path, images):
    true = np.linspace(0, 1, 12, dtype=np.float32)[:, None] * [1, 100]
    given = Outcomes(REGRESSION, np.arange(12), np.arange(12.0), true, outputs=(true + [0.5, -1]).astype(np.float32))
    text = page(tmp_path, given, images, names=["height", "weight < 5"])
    assert headings(text) == ["Learning curves", "Predicted and true", "Highest loss"]
    table = text[text.index("mean absolute error") :]
    assert re.findall(r"<td>(.*?)</td>", table)[:2] == ["height", "0.5"]
    assert "instead of" in text and "weight &lt; 5" in text
    assert not (tmp_path / "mislabelled.csv").exists()


def test_a_part_that_fails_is_named_and_the_others_stay(tmp_path, images, monkeypatch):
    def broken(*words):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report_page, "draw_reliability", broken)
    given = ReportInput("m", [], [], HISTORY, classes([0, 1], [0, 1]), NAMES, images, "held-out images")
    lines = []
    text = write_report_page(tmp_path, given, lines.append).read_text(encoding="utf-8")
    assert lines == ["note: report.html is without 'calibration': no ink"]
    assert "This part could not be made: no ink" in text and "Confusion matrix" in text


def test_images_beside_each_other_have_frames_of_one_size():
    sheet = beside([Image.new("RGB", (10, 40), "red"), Image.new("RGB", (90, 30), "blue")], side=60, gap=4)
    assert sheet.size == (124, 60)
    assert (
        sheet.getpixel((30, 30))[0] > 200
        and sheet.getpixel((94, 30))[2] > 200
        and sheet.getpixel((2, 30)) == (128,) * 3
    )


def test_a_column_of_intervals_is_there_where_a_score_has_one():
    accuracy = {"metric": "accuracy", "value": 0.5, "n": 1200, "interval": [0.4, 0.6]}
    loss = {"metric": "loss", "value": 1.25, "n": 1200}
    head, rows = report_page.score_table([loss, accuracy])
    assert head == ["score", "value", "95 % interval", "images"]
    assert rows == [["loss", "1.25", "", "1,200"], ["accuracy", "50.00%", "40.00% to 60.00%", "1,200"]]
    assert report_page.score_table([loss]) == (["score", "value", "images"], [["loss", "1.25", "1,200"]])
