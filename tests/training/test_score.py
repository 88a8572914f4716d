"""Scoring: the same counts whatever the batches and processes, any classifier by one command, bad input in one line.

pytest tests/training/test_score.py
"""

import csv
import json
import os
import socket
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from PIL import Image
from pyarrow import Table
from pyarrow.parquet import write_table
from scipy.sparse import csr_array
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTForImageClassification, save_checkpoint
from hf_vit.errors import HFViTError
from hf_vit.hub.model_card import render_card
from hf_vit.hub.model_folder import files_to_upload
from tests.conftest import ROOT
from tests.helpers.tiny_classifiers import DIGITS, run, save_tiny, value
from training import score
from training.data.dataset import open_dataset
from training.evaluation.classifier import open_classifier
from training.evaluation.evaluate_classifier import batches, create_context
from training.evaluation.report import plot_confusion_matrix, taken_for, weakest, write_eval_results
from training.metrics.metric_state import MetricState


# -- counts ----------------------------------------------------------------------------------------------------------


def test_batches_do_not_change_the_counts(models, tmp_path):
    tables, facts = set(), []
    for size in (1, 7, 360):
        facts.append(run(model=models["ours"], dataset="digits", output_dir=tmp_path / str(size),
                         per_device_eval_batch_size=size))  # fmt: skip
        tables.add((tmp_path / str(size) / "per_class.csv").read_text())
    assert len(tables) == 1
    assert len({value(row, "accuracy") for row in facts}) == 1
    assert value(facts[0], "nll") == pytest.approx(value(facts[2], "nll"), abs=1e-5)


# -- one command, any classifier -------------------------------------------------------------------------------------


def test_ours_leaves_everything_behind(models, tmp_path, capsys):
    facts = score.main(["--model", models["ours"], "--dataset", "digits", "--output_dir", str(tmp_path), "--use_cpu"])
    written = json.loads((tmp_path / "facts.json").read_text())
    assert written == json.loads(json.dumps(facts))
    assert written["scoring"]["preprocessing"]["resize"] == "squash" and written["scoring"]["labels"] == "by name"
    assert {
        "parameters",
        "gmacs",
        "latency_p50_ms",
        "latency_p99_ms",
        "images_per_second",
        "memory_peak_bytes",
    } <= set(written["speed"])
    metrics = {row["metric"] for row in written["results"]}
    assert {"accuracy", "top5_accuracy", "mean_per_class", "ece", "nll", "ece_after_temperature"} <= metrics
    assert all(row["n"] == 360 for row in written["results"])
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert len(rows) == 10 and sum(int(row["n"]) for row in rows) == 360
    assert sum(int(row["correct"]) for row in rows) / 360 == pytest.approx(value(facts, "accuracy"))
    assert Image.open(tmp_path / "confusion_matrix.png").width > 200
    index = yaml.safe_load((tmp_path / "model_index.yaml").read_text())["model-index"][0]
    assert index["results"][0]["metrics"][0]["value"] == pytest.approx(value(facts, "accuracy"))
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "GMACs" in shown and "weakest classes" in shown
    assert "## Results" in render_card(facts)


def test_what_is_said_of_the_weights_is_a_note(tmp_path, capsys):
    model = HFViTForImageClassification.from_pretrained(save_tiny(tmp_path / "zero"))
    torch.nn.init.zeros_(model.classifier.weight)
    save_checkpoint(model, tmp_path / "zero.npz", format="google-npz")
    score.main(["--model", str(tmp_path / "zero.npz"), "--dataset", "digits", "--use_cpu", "--no_speed"])
    said = capsys.readouterr()
    assert "note: " in said.out and "all zeros" in said.out and "Warning" not in said.err


def test_weakest_classes_are_those_with_mistakes():
    def shown(logits, labels):
        state = MetricState(torch.device("cpu"))
        state.update(logits, torch.tensor(labels))
        return weakest(state.reduce(Accelerator(cpu=True)), ["cat", "dog", "cow"])

    some_wrong = shown(torch.eye(3)[[0, 1, 1]], [0, 1, 2])
    assert "cow" in some_wrong and "cat" not in some_wrong
    assert shown(torch.eye(3), [0, 1, 2]) == "every image is classified correctly"


def test_what_a_class_is_taken_for_is_another_class():
    state = MetricState(torch.device("cpu"))
    state.update(torch.eye(3)[[0, 0, 0, 1, 2, 2, 2]], torch.tensor([0, 0, 0, 0, 1, 1, 2]))
    confused = state.reduce(Accelerator(cpu=True)).most_confused()
    taken = [taken_for(confused, ["a", "b", "c"], number) for number in range(3)]
    assert taken == ["taken for b once", "taken for c 2 times", ""]


@pytest.fixture
def drawn(monkeypatch):
    """The arrays that figures turn into colors."""
    shown, to_rgba = [], ScalarMappable.to_rgba
    monkeypatch.setattr(
        ScalarMappable, "to_rgba", lambda self, array, *a, **k: shown.append(array) or to_rgba(self, array, *a, **k)
    )
    return shown


def test_the_confusion_of_21841_classes_is_drawn_several_classes_to_a_row(tmp_path, drawn):
    rows, columns, counts = np.array([0, 21, 22, 21840]), np.array([0, 22, 22, 0]), np.array([3, 1, 2, 5])
    confusion = csr_array((counts, (rows, columns)), shape=(21841, 21841))
    names = [f"n{number:05d}" for number in range(21841)]
    tracemalloc.start()
    plot_confusion_matrix(tmp_path / "many.png", confusion, names)
    assert tracemalloc.get_traced_memory()[1] < 120e6  # K x K are 477 MB even of bytes
    tracemalloc.stop()
    assert drawn[0].shape == (993, 993)  # 22 classes each
    np.testing.assert_array_equal(drawn[0][0, :2], [0.75, 0.25])
    assert drawn[0][1, 1] == drawn[0][992, 0] == 1 and drawn[0].sum() == 3
    drawn.clear()
    plot_confusion_matrix(tmp_path / "few.png", confusion[:3, :3], names[:3])
    np.testing.assert_array_equal(drawn[0], [[1, 0, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(("classes", "numbers"), [(3, ["1200", "7", "5"]), (31, [])])
def test_a_cell_of_few_classes_has_its_number(tmp_path, monkeypatch, classes, numbers):
    written = []
    monkeypatch.setattr(Axes, "text", lambda axes, column, row, text, **options: written.append((text, options)))
    confusion = csr_array(([1200, 7, 5], ([0, 0, 2], [0, 1, 2])), shape=(classes, classes))
    plot_confusion_matrix(tmp_path / "cells.png", confusion, [f"n{number}" for number in range(classes)])
    assert [text for text, _ in written] == numbers
    assert [options["color"] for _, options in written] == ["white", "black", "white"][: len(numbers)]


def test_accuracy_is_that_of_a_plain_loop(models):
    model = HFViTForImageClassification.from_pretrained(models["ours"]).eval()
    data = open_dataset("digits", split="test")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images = [data.read(index)[0] for index in range(len(data))]
    with torch.no_grad():
        logits = model(processor(images, return_tensors="pt")["pixel_values"]).logits
    expected = float((logits.argmax(-1).numpy() == data.labels).mean())
    assert value(run(model=models["ours"], dataset="digits"), "accuracy") == expected


@pytest.mark.parametrize(
    "name, resize, crop",
    [("vit", "squash", None), ("efficientnet", "squash", None), ("bit", "resize small side, center crop", 0.8)],
)
def test_classifiers_of_transformers_by_the_same_command(models, name, resize, crop):
    facts = score.main(["--model", models[name], "--dataset", "digits", "--use_cpu", "--split", "test[:40]"])
    view = facts["scoring"]["preprocessing"]
    assert (view["resize"], view["crop_pct"]) == (resize, crop)
    assert facts["model"]["model_type"] == name and facts["speed"]["gmacs"] > 0
    assert value(facts, "accuracy") >= 0 and facts["scoring"]["labels"] == "by number"
    if name == "vit":  # patches, projections of attention, its two products, MLP, head; 17 tokens
        by_hand = 16 * 48 * 32 + 17 * 4 * 32 * 32 + 2 * 17 * 17 * 32 + 17 * 2 * 32 * 32 + 32 * 10
        assert facts["speed"]["gmacs"] * 1e9 == pytest.approx(by_hand)
    if name == "bit":
        assert view["mean"] == [0.4] * 3 and view["resample"] == "bicubic" and view["image_size"] == [32, 32]


def test_a_checkpoint_file_and_another_resolution(goldens, tmp_path):
    name = str(goldens / "vt_token.npz")
    names = [str(n) for n in range(10)]
    assert open_classifier(name, image_size=48).model.config.image_size == 48
    assert open_classifier(name).label_names != names
    facts = run(model=name, dataset="digits", split="test[:20]", image_size=48)
    assert facts["model"]["image_size"] == [48, 48] and facts["scoring"]["labels"] == "by number"


def test_views_are_averaged_as_probabilities(models):
    classifier, data = open_classifier(models["ours"]), open_dataset("digits", split="test[:5]")
    context = create_context(True, batch_size=5)
    shapes = {
        tta: next(batches(classifier, data, context, tta))[0] for tta in ("none", "flip", "five_crop", "ten_crop")
    }
    assert [shapes[tta].shape[1] for tta in shapes] == [1, 2, 5, 10]
    assert torch.equal(shapes["flip"][:, 1], shapes["none"][:, 0].flip(-1))
    assert torch.equal(shapes["ten_crop"][:, 5:], shapes["ten_crop"][:, :5].flip(-1))
    with torch.no_grad():
        both = torch.stack([classifier.logits(shapes["flip"][:, view]).softmax(-1) for view in (0, 1)]).mean(0)
    facts = run(model=models["ours"], dataset="digits", split="test[:5]", tta="flip")
    assert value(facts, "nll") == pytest.approx(-both[range(5), data.labels].log().mean().item(), abs=1e-5)
    assert facts["scoring"]["preprocessing"]["tta"] == "flip"


def test_mixed_precision_counts_every_image(models):
    facts = run("--bf16", model=models["ours"], dataset="digits", split="test[:50]")
    assert facts["environment"]["precision"] == "bf16" and all(row["n"] == 50 for row in facts["results"])


def test_entries_for_the_hubs_leaderboards(tmp_path, models):
    facts = run(model=models["ours"], dataset="digits", split="test[:20]")
    write_eval_results(tmp_path / "none", facts)
    assert not (tmp_path / "none").exists()  # digits are not on the Hub
    for row in facts["results"]:
        row["dataset"] = "owner/digits"
    write_eval_results(tmp_path / "some", facts)
    entries = yaml.safe_load((tmp_path / "some" / "owner--digits.yaml").read_text())
    first = next(entry for entry in entries if entry["dataset"]["task_id"] == "accuracy")
    assert first["dataset"]["id"] == "owner/digits"
    assert first["value"] == pytest.approx(100 * value(facts, "accuracy"), abs=1e-3)
    folder = tmp_path / "repository"
    write_eval_results(folder / ".eval_results", facts)
    assert files_to_upload(folder) == [".eval_results/owner--digits.yaml"]


def test_a_trained_models_own_card_gains_the_scores(tmp_path, capsys):
    folder = tmp_path / "trained"
    save_tiny(folder)
    own = run(model=str(folder), dataset="digits", split="test[:20]")
    row = {"dataset": "digits", "split": "test[:20]", "metric": "accuracy", "value": 0.5, "n": 20, "seed": 3}
    older = {**row, "metric": "loss", "value": 1.5}
    facts = {"model": own["model"], "training": {"stage": "finetune", "seed": 3}, "results": [row, older]}
    (folder / "facts.json").write_text(json.dumps(facts))
    run(model=str(folder), dataset="digits", split="test[:20]", output_dir=folder)
    after = json.loads((folder / "facts.json").read_text())
    assert after["training"]["stage"] == "finetune" and older in after["results"] and row not in after["results"]
    assert value(after, "accuracy") == value(own, "accuracy")
    card = (folder / "README.md").read_text()
    assert "confusion_matrix.png" in card and "mean_per_class" in card.split("---")[1]
    assert "| Expected calibration error |" in card
    other = save_tiny(tmp_path / "other")
    with pytest.raises(SystemExit):
        run(model=other, dataset="digits", split="test[:20]", output_dir=folder)
    assert "holds a trained model that is not" in capsys.readouterr().err


def test_the_page_of_a_scoring_is_not_what_the_card_was_to_show(tmp_path, capsys):
    folder = tmp_path / "trained"
    save_tiny(folder)
    own = run(model=str(folder), dataset="digits", split="test[:20]")
    facts = {
        "model": own["model"],
        "training": {"stage": "finetune", "seed": 3},
        "results": [],
        "report": "report.html",
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (folder / "report.html").write_text("the page of the training")
    run("--report", model=str(folder), dataset="digits", split="test[20:60]", output_dir=folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "could not be made" not in text and "without '" not in capsys.readouterr().out
    assert "Learning curves" in text and "no history" not in text and "of 40, by confident learning" in text
    assert f"{value(json.loads((folder / 'facts.json').read_text()), 'accuracy'):.2%}" in text
    assert "report.html" not in (folder / "README.md").read_text()
    assert "report.html" not in files_to_upload(folder)


def test_a_switch_takes_a_value_as_in_training():
    needed = ["--model", "m", "--dataset", "digits", "--output_dir", "out"]
    for words, on in (([], False), (["--report"], True), (["--report", "true"], True), (["--report", "no"], False)):
        assert score.parse_score([*needed, *words]).report is on
    assert score.parse_score([*needed, "--bf16", "--use_cpu=true", "--no_speed", "false"]).bf16 is True
    with pytest.raises(HFViTError, match="--report: 'maybe' is not true or false"):
        score.parse_score([*needed, "--report", "maybe"])


def test_a_page_needs_a_folder_and_a_head(models, capsys):
    for words, message in (
        (["--dataset", "digits"], "--report writes a page: give its folder with --output_dir"),
        (["--dataset", "digits", "--output_dir", "x", "--knn", "3"], "--report has no effect here"),
    ):
        with pytest.raises(SystemExit) as error:
            score.main(["--model", models["ours"], "--report", *words])
        assert error.value.code == 2 and message in capsys.readouterr().err


# -- images and names as people have them -----------------------------------------------------------------------------


@pytest.fixture
def folder_of_two(tmp_path):
    """A test split of the classes 犬 and `$5`, three images each, one of which cannot be read."""
    for label, color in (("犬", 40), ("$5", 200)):
        (tmp_path / "data" / "test" / label).mkdir(parents=True)
        for number in range(3):
            image = Image.new("RGB", (20, 24), (color, 20 * number, 0))
            image.save(tmp_path / "data" / "test" / label / f"{number}.png")
    (tmp_path / "data" / "test" / "犬" / "2.png").write_bytes(b"no image")
    return tmp_path / "data"


def test_class_names_are_written_as_they_stand(folder_of_two, tmp_path, capsys):
    model = save_tiny(tmp_path / "model", id2label={0: "$5", 1: "犬"})
    run(model=model, dataset=folder_of_two, output_dir=tmp_path / "out", on_decode_error="skip", cache_dir=tmp_path)
    table = (tmp_path / "out" / "per_class.csv").read_text(encoding="utf-8")
    rows = {row["class"]: row for row in csv.DictReader(table.splitlines())}
    assert set(rows) == {"犬", "$5"} and rows["犬"]["n"] == "2" and rows["$5"]["n"] == "3"
    for row in rows.values():
        assert float(row["recall_low"]) <= float(row["recall"]) <= float(row["recall_high"])
    assert Image.open(tmp_path / "out" / "confusion_matrix.png").width > 200
    said = capsys.readouterr()
    assert "1 image left out" in said.out and "images left out" not in said.out
    notes = [line for line in said.err.splitlines() if "font" in line or "Glyph" in line]
    assert len(notes) <= 1 and all("no installed font draws 犬" in line for line in notes)


def test_an_image_that_cannot_be_read_stops_and_names_the_option(folder_of_two, tmp_path, capsys):
    model = save_tiny(tmp_path / "model", id2label={0: "$5", 1: "犬"})
    options = {"model": model, "dataset": folder_of_two, "cache_dir": tmp_path}
    for workers in (0, 1):
        with pytest.raises(SystemExit):
            run(**options, dataloader_num_workers=workers)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "2.png" in error and "--on_decode_error skip leaves such images out" in error and "Caught" not in error
    facts = run(**options, on_unreadable="skip")
    assert "--on_unreadable is now --on_decode_error" in capsys.readouterr().err
    assert facts["data"]["unreadable_images"] == 1 and all(row["n"] == 5 for row in facts["results"])


def test_a_byte_order_mark_in_a_label_map_belongs_to_no_name(models, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({str(n): n for n in range(10)}), encoding="utf-8-sig")
    (tmp_path / "map.yaml").write_text("\n".join(f"'{n}': {n}" for n in range(10)), encoding="utf-8-sig")
    expected = value(run(model=models["ours"], dataset="digits", split="test[:50]"), "accuracy")
    for name in ("map.json", "map.yaml"):
        facts = run(model=models["ours"], dataset="digits", split="test[:50]", label_map=tmp_path / name)
        assert value(facts, "accuracy") == expected and facts["scoring"]["labels"] == f"by {name}"


def test_a_folder_in_timms_format_is_scored_as_the_model_it_came_from(models, tmp_path):
    model = HFViTForImageClassification.from_pretrained(models["ours"])
    save_checkpoint(model, tmp_path / "timm", format="timm")
    facts = run(model=tmp_path / "timm", dataset="digits", split="test[:60]", label_map="number")
    assert value(facts, "accuracy") == value(
        run(model=models["ours"], dataset="digits", split="test[:60]"), "accuracy"
    )


def test_results_have_intervals_and_what_imbalance_hides(models):
    rows = {row["metric"]: row for row in run(model=models["ours"], dataset="digits", split="test[:90]")["results"]}
    for metric in ("accuracy", "top5_accuracy", "mean_per_class", "macro_f1"):
        low, high = rows[metric]["interval"]
        assert 0 <= low < rows[metric]["value"] < high <= 1
    assert "interval" not in rows["nll"]


# -- which output means which class ----------------------------------------------------------------------------------


def test_a_map_and_competing_outputs(models, tmp_path):
    (tmp_path / "map.yaml").write_text("\n".join(f"'{number}': {9 - number}" for number in range(10)))
    facts = run(model=models["ours"], dataset="digits", label_map=tmp_path / "map.yaml")
    classifier, data = open_classifier(models["ours"]), open_dataset("digits", split="test")
    pixels, *_ = next(batches(classifier, data, create_context(True, batch_size=360)))
    with torch.no_grad():
        expected = classifier.logits(pixels[:, 0]).log_softmax(-1)[range(360), 9 - data.labels]
    assert facts["scoring"]["labels"] == "by map.yaml"
    assert value(facts, "nll") == pytest.approx(-expected.mean().item(), abs=1e-5)


# -- ReaL ------------------------------------------------------------------------------------------------------------


def test_real_accuracy_of_a_run(models, tmp_path):
    """Also of a slice, whose first image is not the list's first."""
    classifier, data = open_classifier(models["ours"]), open_dataset("digits", split="test")
    pixels, *_ = next(batches(classifier, data, create_context(True, batch_size=360)))
    with torch.no_grad():
        guesses = classifier.logits(pixels[:, 0]).argmax(-1).tolist()
    lists = [[int(label), (row * 7) % 10] if row % 3 else [] for row, label in enumerate(data.labels)]
    (tmp_path / "real.json").write_text(json.dumps(lists))
    for first in (0, 100):
        facts = run(model=models["ours"], dataset="digits", split=f"test[{first}:]", real_labels=tmp_path)
        row = next(row for row in facts["results"] if row["metric"] == "real_accuracy")
        counted = [guess in real for guess, real in list(zip(guesses, lists))[first:] if real]
        assert row["n"] == len(counted) < 360 - first and row["value"] == np.mean(counted)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path, models):
    """What can be wrong, by name."""
    for number, name in enumerate(("zer0", "0ne")):
        folder = tmp_path / "pets" / "test" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 20), (number * 90, 0, 0)).save(folder / "a.png")
    (tmp_path / "short.json").write_text("[[1], [2]]")
    (tmp_path / "beyond.json").write_text(json.dumps([[*range(12)]] * 360))
    (tmp_path / "shifted.json").write_text(json.dumps([[(int(label) + 1) % 10] for label in
                                                       open_dataset("digits", split="test").labels]))  # fmt: skip
    (tmp_path / "map.json").write_text(json.dumps({"zer0": "0"}))
    images = [{"bytes": (tmp_path / "pets" / "test" / "0ne" / "a.png").read_bytes(), "path": None}]
    for name, columns in (("unlabelled", {}), ("marked", {"label": [-1]}), ("empty", {"label": [0]})):
        table = Table.from_pydict({"image": images, **columns})
        write_table(table[:0] if name == "empty" else table, tmp_path / f"{name}-test.parquet")
    save_tiny(tmp_path / "narrow", id2label={0: "a", 1: "b"})
    save_tiny(tmp_path / "spelled", id2label={0: "zero", 1: "one"})
    save_tiny(tmp_path / "headless", num_labels=0, id2label=None)
    return tmp_path


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model": "{bad}/narrow", "dataset": "digits", "label_map": "number"}, "label 9 of the data is outside"),
        ({"dataset": "{bad}/pets"}, "the data has 2 classes, the model 10 outputs"),
        ({"model": "{bad}/spelled", "dataset": "{bad}/pets"}, "the nearest are '0ne': 'one', 'zer0': 'zero'"),
        ({"dataset": "{bad}/pets", "label_map": "{bad}/map.json"}, "has no entry for 0ne"),
        ({"dataset": "{bad}/unlabelled-test.parquet"}, "no column of labels"),
        ({"dataset": "{bad}/marked-test.parquet"}, "1 of 1 rows"),
        ({"dataset": "{bad}/empty-test.parquet"}, "is empty"),
        ({"dataset": "digits", "split": "validation"}, "no split 'validation'"),
        ({"dataset": "digits", "split": "test[5:5]"}, "holds none of the 360"),
        ({"dataset": "digits", "real_labels": "{bad}/short.json"}, "ReaL labels of 2 images, but the split has 360"),
        ({"dataset": "digits", "real_labels": "{bad}/beyond.json"}, "ReaL label 11 is outside the model's 10 outputs"),
        ({"dataset": "digits", "real_labels": "{bad}/shifted.json"}, "own class in 0% of 360 cases"),
        ({"dataset": "digits", "real_labels": "{bad}/none.json"}, "no such file"),
        ({"dataset": "digits", "label_subset": "imagenet_a"}, "must differ and lie within the head's 0..9"),
        ({"dataset": "digits", "label_subset": "imagenet_z"}, "neither a file nor one of data, imagenet_a"),
        ({"model": "{bad}/headless", "dataset": "digits"}, "has no head to score"),
        ({"model": "{bad}/nothing", "dataset": "digits"}, "cannot load --model"),
        ({"dataset": "owner/images"}, "owner/images"),
        ({}, "give --dataset"),
        ({"dataset": "digits", "crop_pct": 2}, "crop_pct must lie in"),
        ({"dataset": "digits", "knn": 5000}, "choose 1 to 1437"),
        ({"dataset": "digits", "few_shot": 900}, "the scarcest class has"),
    ],
)
def test_bad_input_is_one_line(options, words, bad, models, capsys):
    options = {"model": models["ours"], **options, "cache_dir": str(bad)}
    with pytest.raises(SystemExit) as stop:
        run(**{name: str(text).replace("{bad}", str(bad)) for name, text in options.items()})
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and words in error


def test_outputs_that_are_not_finite_are_not_scored(tmp_path, capsys):
    folder = save_tiny(tmp_path / "broken")
    model = HFViTForImageClassification.from_pretrained(folder)
    for weight in (model.vit.layernorm.weight, model.classifier.weight):  # finite, and their product is not
        torch.nn.init.constant_(weight, 1e30)
    model.save_pretrained(folder)
    with pytest.raises(SystemExit):
        run(model=folder, dataset="digits")
    assert "not finite for 360 images" in capsys.readouterr().err


# -- several processes -----------------------------------------------------------------------------------------------


def launch(processes, output, *words):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}",
            "-m", "training.score", "--output_dir", str(output), "--use_cpu", "--no_speed", *words]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "facts.json").read_text()), (output / "per_class.csv").read_text()


@pytest.mark.slow
def test_more_processes_than_images(tmp_path):
    model = save_tiny(tmp_path / "model")
    common = ("--model", model, "--dataset", "digits", "--split", "test[:1]")
    facts, _ = launch(2, tmp_path / "one", *common)
    assert all(row["n"] == 1 for row in facts["results"])


@pytest.mark.gpu
def test_a_gpu_counts_as_the_cpu_does(models):
    words = ["--model", models["ours"], "--dataset", "digits", "--no_speed"]
    assert value(score.main(words), "accuracy") == value(score.main([*words, "--use_cpu"]), "accuracy")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_one_and_two_processes_and_any_batches_count_the_same(data, tmp_path, request):
    names = DIGITS
    if data == "cifar10":
        data = request.getfixturevalue("shared") / "data" / "cifar10"
        names = dict(enumerate(open_dataset(str(data), split="test", cache_dir=tmp_path / "cache").label_names))
    model = save_tiny(tmp_path / "model", hidden_size=16, num_hidden_layers=1, id2label=names)
    common = ("--model", model, "--dataset", str(data), "--split", "test", "--cache_dir", str(tmp_path / "cache"))
    found = [
        launch(processes, tmp_path / f"{processes}-{size}", *common, "--per_device_eval_batch_size", str(size))
        for processes, size in ((1, 64), (1, 250), (2, 64), (2, 77))
    ]
    assert len({table for _, table in found}) == 1
    scores = [{row["metric"]: row["value"] for row in facts["results"]} for facts, _ in found]
    for other in scores[1:]:
        assert all(other[name] == scores[0][name] for name in ("accuracy", "top5_accuracy", "mean_per_class"))
        assert other == pytest.approx(scores[0], abs=1e-4)


def test_tables_are_read_with_the_options_of_finetune(tmp_path):
    """Paths below another folder, and a column whose words are no usual splits."""
    model = save_tiny(tmp_path / "model", id2label={0: "dark", 1: "light"})
    (tmp_path / "images").mkdir()
    lines = ["file,kind,part"]
    for number in range(6):
        Image.new("RGB", (8, 8), (40 + 30 * number,) * 3).save(tmp_path / "images" / f"{number}.png")
        lines.append(f"{number}.png,{'light' if number > 2 else 'dark'},{'B' if number % 2 else 'A'}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    options = {"dataset": tmp_path / "table.csv", "image_root": tmp_path / "images", "label_column": "kind"}
    options |= {"split_column": "part", "eval_split": "B"}
    facts = run(model=model, cache_dir=tmp_path / "cache", **options)
    assert next(row["n"] for row in facts["results"] if row["metric"] == "accuracy") == 3
