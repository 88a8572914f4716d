"""What a run says before and after: the data, the scores with their intervals, each class; and a whole journey.

pytest tests/training/test_train.py
"""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from hf_vit.cli.main import main as hf_vit
from hf_vit.errors import HFViTError
from tests.conftest import ROOT
from training import finetune


SIZE = "hidden_size=16 num_hidden_layers=1 num_attention_heads=2 intermediate_size=32 patch_size=4"
LINE = (
    f"--set {SIZE} --image_size 16 --use_cpu --disable_tqdm --warmup_steps 0 --learning_rate 0.01 --logging_steps 20"
)
NAMES = ("rosé", "tulipe", "百合")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A CSV of 300 images of three unequal classes, three files of which are odd; one test image is trained on."""
    root, random = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    (root / "photos").mkdir()
    rows = []
    for number in range(300):
        kind = 0 if number % 25 < 18 else 1 if number % 25 < 23 else 2
        pixels = random.integers(0, 120, (12, 15, 3), dtype=np.uint8)
        pixels[..., kind] += 130
        Image.fromarray(pixels).save(root / "photos" / f"{number}.png")
        rows.append((f"photos/{number}.png", NAMES[kind], "test" if number % 5 == number // 25 % 5 else "train"))
    (root / "photos/1.png").write_text("no image")
    (root / "photos/2.png").unlink()
    Image.new("CMYK", (15, 12)).save(root / "photos/3.png", format="JPEG")  # of another mode and format
    shutil.copy(root / "photos/6.png", root / "photos/5.png")
    pd.DataFrame(rows, columns=["file", "kind", "part"]).to_csv(root / "flowers.csv", index=False)
    return root / "flowers.csv"


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    """(output folder, facts, what stood on the screen) of a run with balanced sampling from the table."""
    out = tmp_path_factory.mktemp("run") / "out"
    words = f"{LINE} --dataset {table} --label_column kind --split_column part --max_steps 60 --output_dir {out}"
    words += " --train_sampling_strategy balanced --do_predict --per_device_train_batch_size 16 --crop squash"
    done = subprocess.run(
        [sys.executable, "-m", "training.finetune", *words.split()], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "facts.json").read_text()), done.stdout


def test_the_data_are_summed_up_before_training(run):
    lines = {line.strip().split("  ")[0]: line for line in run[2].splitlines()}
    assert "240 images, 3 classes" in lines["training"] and "60 images (test)" in lines["evaluation"]
    assert "smallest 百合 (" in lines["class sizes"] and "largest rosé (" in lines["class sizes"]
    assert "see mean_per_class and macro_f1" not in lines["class sizes"]  # less than ten times
    assert "15x12 px (width x height)" in lines["images"] and "RGB" in lines["images"]
    assert "1 between 60 evaluation and 240 training images: photos/5.png = photos/6.png" in lines["duplicates"]
    assert "1 of 240 images" in run[2] and "are missing: photos/2.png" in run[2]
    assert "splits by the column 'part': test (60), train (240)" in run[2]


def test_every_share_has_its_interval_and_every_class_its_line(run):
    out, facts, said = run
    rows = {row["metric"]: row for row in facts["results"]}
    for name in ("accuracy", "mean_per_class", "macro_f1"):
        low, high = rows[name]["interval"]
        assert 0 <= low <= rows[name]["value"] <= high <= 1 and rows[name]["n"] == 60
        assert f"{name.replace('_', ' ')}  " in said and "(95 %: " in said
    assert "(95 %: " in (out / "README.md").read_text()
    with open(out / "per_class.csv", encoding="utf-8", newline="") as file:
        classes = list(csv.DictReader(file))
    with np.load(out / "predictions.npz") as kept:
        labels, predicted = kept["labels"], kept["logits"].argmax(-1)
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, zero_division=0)
    assert [row["class"] for row in classes] == facts["data"]["label_names"] == sorted(NAMES)
    for number, row in enumerate(classes):
        assert int(row["n"]) == support[number]
        found = [float(row[name] or 0) for name in ("precision", "recall", "f1")]
        assert found == pytest.approx([precision[number], recall[number], f1[number]], abs=1e-6)
        assert float(row["recall_low"]) <= recall[number] <= float(row["recall_high"])


def test_from_a_table_to_a_card_predictions_and_an_onnx_file(run, table, tmp_path, capsys):
    out, facts, _ = run
    assert next(row for row in facts["results"] if row["metric"] == "mean_per_class")["value"] > 0.9
    assert facts["data"]["unreadable_images"] == 2
    unreadable = (out / "unreadable.txt").read_text()
    assert "photos/1.png" in unreadable and "photos/2.png" in unreadable
    card = (out / "README.md").read_text()
    assert all(name in card for name in NAMES) and "2 images of the data could not be read" in card
    assert hf_vit(["predict", str(table), "--model", str(out), "--out", str(tmp_path / "scores.csv")]) == 1
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert list(scores.columns[4:]) == sorted(NAMES) and len(scores) == 300 and scores["error"].notna().sum() == 2
    assert hf_vit(["export", str(out), str(tmp_path / "exported")]) == 0
    assert list((tmp_path / "exported").glob("*.onnx"))
    capsys.readouterr()


def test_a_run_resumed_at_its_end_has_the_same_results(run, table, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(run[0], out)
    (out / "per_class.csv").unlink()
    words = f"--config {out}/config_resolved.yaml --output_dir {out} --resume_from_checkpoint true"
    facts = finetune.main(words.split())
    assert json.loads(json.dumps(facts["results"])) == run[1]["results"]
    assert (out / "per_class.csv").read_bytes() == (run[0] / "per_class.csv").read_bytes()


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        ({"file": ["x.png"] * 40, "id": [f"n{n}" for n in range(40)]}, {"label_column": "id"}, "an id, not classes"),
        (
            {"file": ["x.png"] * 3, "label": ["a", "b", "a"], "class": [1, 2, 1]},
            {},
            "several columns that could be the",
        ),
        ({"file": ["x.png"] * 3, "label": ["a", 1, 2.5]}, {}, "all of one type"),
        ({"file": ["x.png"] * 3, "label": [1.0, float("nan"), 2.0]}, {}, "1 of 3 rows .* have no label"),
        ({"file": ["x.png"] * 3, "label": ["a", float("nan"), "b"]}, {}, "no label|of one type"),
        ({"file": ["no.png", "none.png"], "label": ["a", "b"]}, {}, "none of the 2 images .* give the folder with"),
        ({"file": ["no.png", "x.png"], "label": ["a", "b"]}, {"on_decode_error": "stop"}, "1 of 2 images .* no.png"),
        (
            {"file": ["x.png"] * 4, "label": ["a", "b"] * 2},
            {"folds": 3},
            "--folds 3 is above the 2 images of class 'a'",
        ),
        ({"file": ["x.png"] * 2, "label": ["a", "b"]}, {"dev_fraction": 0.5}, "one image in each class"),
        ({"a": [1], "b": [2]}, {}, "no column of images among a, b"),
        ({f"c{n}": [n] for n in range(1000)}, {}, r"no column of images among c0, c1, .* \(1000 in all\)"),
    ],
)
def test_frames_that_cannot_be_trained_on(frame, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")
    with pytest.raises(HFViTError, match=message) as error:
        finetune(
            dataset=pd.DataFrame(frame), set=SIZE.split(), image_size=16, output_dir="out", use_cpu=True, **options
        )
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
