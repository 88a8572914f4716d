"""Each command once with good input, and with the bad input that people give.

python -m pytest tests/hf_vit/cli/test_cli.py
"""

import csv
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from transformers import ViTImageProcessor

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.cli.embed import fingerprint, read_features
from hf_vit.cli.main import build_parser, main
from hf_vit.cli.predict import folder_name
from hf_vit.cli.scores_file import ScoresFile
from hf_vit.image_io import open_image
from tests.conftest import ROOT


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


LABELS = {0: "circle", 1: "square", 2: "star"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny classifier whose logits differ from image to image."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = HFViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        id2label=LABELS,
    )  # fmt: skip
    network = HFViTForImageClassification(config)
    torch.nn.init.normal_(network.classifier.weight)
    network.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    facts = {"name": "tiny", "architecture": {}, "parameters": 1, "image_size": [16, 16], "num_labels": 3}
    (folder / "facts.json").write_text(json.dumps({"model": facts}))
    return folder


@pytest.fixture
def images(tmp_path):
    """Five images of several formats and sizes in two folders, and one file that is none."""
    random = np.random.default_rng(0)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "c.JPEG", "deep/d.bmp", "deep/e.png")):
        mode, size = ("L", (9, 30)) if number == 4 else ("RGB", (20 + number, 14))
        shape = size[::-1] if mode == "L" else (*size[::-1], 3)
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_text("not an image")
    return tmp_path / "in"


def run(capsys, *words):
    """(status, stdout, stderr) of `hf-vit WORDS`."""
    try:
        status = main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def error_of(capsys, *words):
    """The one line that a command with bad input prints."""
    status, out, err = run(capsys, *words)
    assert status == 2 and not out
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


# -- info


def test_info_counts_what_the_literature_counts(capsys):
    status, out, _ = run(capsys, "info", "vit-base-patch16-224", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["parameters"] == 86_567_656
    assert sum(part["parameters"] for part in facts["parts"]) == facts["parameters"]
    tokens, width = 197, 768
    block = tokens * 12 * width**2 + 2 * tokens**2 * width  # projections and MLP; attention scores and values
    assert facts["macs"] == 196 * 768 * width + 12 * block + 1000 * width
    assert facts["weight_bytes"] == {"float32": 4 * 86_567_656, "bfloat16": 2 * 86_567_656}


def test_info_of_a_hybrid_adds_up(capsys):
    _, out, _ = run(capsys, "info", "r50-vit-base-patch16", "--json")
    facts = json.loads(out)
    assert facts["parameters"] == 98_659_112
    assert facts["parts"][0]["name"] == "ResNet (3-4-9)"
    for key in ("parameters", "macs"):
        assert sum(part[key] for part in facts["parts"]) == facts[key]


def test_info_of_a_folder_at_another_size(capsys, model):
    status, out, _ = run(capsys, "info", model, "--image-size", 32, 16)
    assert status == 0
    assert "32 x 16 px, 9 tokens, 3 labels" in out and "2 blocks" in out
    total = sum(
        weight.numel()
        for weight in HFViTForImageClassification.from_pretrained(model, image_size=(32, 16)).parameters()
    )
    assert re.search(rf"^total +{total:,} ", out, re.MULTILINE)


def test_info_errors(capsys):
    assert "did you mean 'vit-base-patch16-224'" in error_of(capsys, "info", "vit-bass-patch16")
    assert "smaller than one patch" in error_of(capsys, "info", "vit-base-patch16", "--image-size", 8)
    assert "image_size must be" in error_of(capsys, "info", "vit-base-patch16", "--image-size", 0)
    assert "3 numbers" in error_of(capsys, "info", "vit-base-patch16", "--image-size", 8, 8, 8)


# -- predict


def test_predict_is_what_the_model_says(capsys, model, images):
    _, out, _ = run(capsys, "predict", images / "a.png", "--model", model, "--json")
    row = json.loads(out)["predictions"][0]
    pixels = ViTImageProcessor.from_pretrained(model)(Image.open(images / "a.png"), return_tensors="pt")
    with torch.no_grad():
        scores = HFViTForImageClassification.from_pretrained(model).eval()(**pixels).logits.softmax(-1)[0]
    assert {hit["label"]: hit["score"] for hit in row["labels"]} == pytest.approx(
        {LABELS[number]: score for number, score in enumerate(scores.tolist())}
    )
    assert [hit["score"] for hit in row["labels"]] == sorted((hit["score"] for hit in row["labels"]), reverse=True)


def test_predict_gives_each_of_several_labels_its_own_probability(capsys, model, images, tmp_path):
    classifier = HFViTForImageClassification.from_pretrained(model).eval()
    classifier.config.problem_type = "multi_label_classification"
    processor = ViTImageProcessor.from_pretrained(model)
    for part in (classifier, processor):
        part.save_pretrained(tmp_path)
    _, out, _ = run(capsys, "predict", images / "a.png", "--model", tmp_path, "--json")
    with torch.no_grad():
        logits = classifier(**processor(Image.open(images / "a.png"), return_tensors="pt")).logits[0]
    found = [hit["score"] for hit in json.loads(out)["predictions"][0]["labels"]]
    assert found == pytest.approx(logits.sigmoid().sort(descending=True).values.tolist()[: len(found)])


def test_predict_folders_globs_and_batches(capsys, model, images):
    words = (images.parent / "**" / "e.png", images, images / "*.png")
    status, out, err = run(capsys, "predict", *words, "--model", model, "--batch-size", 2, "--top-k", 1, "--json")
    found = json.loads(out)
    names = [row["image"].removeprefix(f"{images}/") for row in found["predictions"]]
    assert names == ["deep/e.png", "a.png", "b.jpg", "c.JPEG", "deep/d.bmp"]
    assert all(len(row["labels"]) == 1 for row in found["predictions"])
    assert status == 1 and "broken.png" in err and found["unreadable"][0]["image"].endswith("broken.png")


def test_predict_prints_a_line_for_each_image(capsys, model, images):
    status, out, _ = run(capsys, "predict", images / "deep", "--model", model, "--top-k", 2, "--image-size", 24)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 2
    assert all(line.count("%") == 2 and "deep" in line for line in lines)


def test_predict_from_addresses(capsys, model, images):
    handler = functools.partial(QuietHandler, directory=str(images))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        words = [f"{base}/a.png", f"{base}/nothing.png", f"{base}/broken.png", images / "b.jpg"]
        status, out, _ = run(capsys, "predict", *words, "--model", model, "--json")
        server.shutdown()
    found = json.loads(out)
    assert status == 1 and [row["image"] for row in found["predictions"]] == [words[0], str(words[3])]
    reasons = {row["image"]: row["reason"] for row in found["unreadable"]}
    assert "404" in reasons[words[1]] and "not an image" in reasons[words[2]]
    _, out, _ = run(capsys, "predict", images / "a.png", "--model", model, "--json")
    alone, together = json.loads(out)["predictions"][0]["labels"], found["predictions"][0]["labels"]
    assert [hit["label"] for hit in alone] == [hit["label"] for hit in together]


def test_predict_errors(capsys, model, images, tmp_path):
    assert "no image at 'nowhere.jpg'" in error_of(capsys, "predict", "nowhere.jpg", "--model", model)
    (tmp_path / "empty").mkdir()
    assert "no image at" in error_of(capsys, "predict", tmp_path / "empty", "--model", model)
    image = images / "a.png"
    assert "no-such-model" in error_of(capsys, "predict", image, "--model", "./no-such-model")
    assert "'0' is not a whole number above 0" in error_of(capsys, "predict", image, "--model", "m", "--top-k", 0)
    assert "--model" in error_of(capsys, "predict", image)
    bare = HFViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=0
    )
    HFViTForImageClassification(bare).save_pretrained(tmp_path / "bare")
    assert "has no classifier" in error_of(capsys, "predict", image, "--model", tmp_path / "bare")
    assert "no device 'tpu9'" in error_of(capsys, "predict", image, "--model", model, "--device", "tpu9")


# -- card and push


def test_card_is_written_for_the_repository_asked_for(capsys, model):
    status, out, _ = run(capsys, "card", model, "--repo-id", "me/tiny")
    assert status == 0 and out.strip() == str(model / "README.md")
    assert 'model="me/tiny"' in (model / "README.md").read_text()
    assert json.loads(run(capsys, "card", model, "--json")[1]) == {"card": str(model / "README.md")}


def test_card_errors(capsys, tmp_path):
    assert "no facts.json" in error_of(capsys, "card", tmp_path)
    for name in ("tiny", "my id", "a/b/c"):
        assert "write owner/name" in error_of(capsys, "card", tmp_path, "--repo-id", name)


def test_push_errors(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_vit.hub.upload.get_token", lambda: None)
    assert "no Hugging Face token" in error_of(capsys, "push", model, "me/tiny")
    assert "no config.json" in error_of(capsys, "push", tmp_path, "me/tiny")


# -- the parser


def test_every_command_has_help_with_examples(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name in ("convert", "info", "predict", "export", "demo", "card", "push"):
        status, out, _ = run(capsys, name, "--help")
        assert status == 0 and f"hf-vit {name}" in out.split("examples:")[1] and "--json" in out


def test_unknown_words_are_one_line(capsys):
    assert "invalid choice" in error_of(capsys, "predicts", "x")
    assert "--topk" in error_of(capsys, "predict", "x", "--model", "m", "--topk", 3)
    assert build_parser().prog == "hf-vit"


@pytest.mark.parametrize("write_through", [False, True], ids=["buffered", "PYTHONUNBUFFERED"])
def test_a_reader_of_the_output_that_leaves_is_no_error(model, write_through, monkeypatch, capsys):
    """`hf-vit info MODEL | head -1`"""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        if write_through:
            pipe = io.TextIOWrapper(io.FileIO(write, "w", closefd=False), write_through=True)
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info", str(model)]) == 141
    assert not capsys.readouterr().err


def test_another_broken_pipe_is_an_error(model, monkeypatch, capsys):
    def lose_connection(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("hf_vit.cli.info.run", lose_connection)
    assert main(["info", str(model)]) == 2
    assert "Broken pipe" in capsys.readouterr().err


def test_no_room_is_imported_before_its_command_is_given():
    code = """if True:
        import sys
        from hf_vit.cli.main import main
        assert main(["predicts"]) == 2
        try:
            main(["--help"])
        finally:
            assert "hf_vit.cli.predict" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "classify images" in done.stdout, done.stderr


# -- predict into files, embed, search


def csv_rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def scores_rows(path):
    if path.suffix == ".csv":
        return csv_rows(path)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_predict_writes_all_scores_and_what_could_not_be_read(capsys, model, images, tmp_path, suffix):
    _, out, _ = run(capsys, "predict", images, "--model", model, "--json")
    expected = {row["image"]: row["labels"] for row in json.loads(out)["predictions"]}
    path = tmp_path / f"scores{suffix}"
    status, out, err = run(capsys, "predict", images, "--model", model, "--out", path, "--batch-size", 2)
    assert status == 1 and "broken.png" in err and "scores of 5 images" in out
    rows = scores_rows(path)
    read = {row["image"]: row for row in rows if not row["error"]}
    (broken,) = [row for row in rows if row["error"]]
    assert broken["image"].endswith("broken.png") and "not an image" in broken["error"] and not broken["label"]
    assert set(read) == set(expected) and len(rows) == 6
    for name, hits in expected.items():
        assert read[name]["label"] == hits[0]["label"] and float(read[name]["score"]) == pytest.approx(
            hits[0]["score"]
        )
        assert {hit["label"]: hit["score"] for hit in hits} == pytest.approx(
            {label: float(read[name][label]) for label in LABELS.values()}, rel=1e-5
        )
    assert not path.with_name(path.name + ".partial").exists()
    assert "exists: remove it" in error_of(capsys, "predict", images, "--model", model, "--out", path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_top_k_writes_the_best_labels_in_place_of_all_scores(capsys, model, images, tmp_path, suffix):
    words = ("predict", images, "--model", model)
    _, printed, _ = run(capsys, *words, "--top-k", 2, "--json")
    expected = {row["image"]: row["labels"] for row in json.loads(printed)["predictions"]}
    rows = {}
    for most in (1, 2, 99):  # the last is more than there are
        path = tmp_path / f"scores-{most}{suffix}"
        assert run(capsys, *words, "--top-k", most, "--out", path)[0] == 1
        table = scores_rows(path)
        ranks = [f"{what}_{rank}" for rank in range(2, min(most, len(LABELS)) + 1) for what in ("label", "score")]
        assert list(table[0]) == ["image", "label", "score", "error", *ranks]
        rows[most] = {row["image"]: row for row in table}
    for image, labels in expected.items():
        for most, row in ((most, rows[most][image]) for most in rows):
            assert (row["label"], float(row["score"])) == (labels[0]["label"], pytest.approx(labels[0]["score"]))
            assert most == 1 or row["label_2"] == labels[1]["label"]
            assert most == 1 or float(row["score_2"]) == pytest.approx(labels[1]["score"])
    path = tmp_path / f"sure{suffix}"
    run(capsys, *words, "--top-k", 2, "--min-score", 1, "--out", path)
    assert all(not row["label_2"] and not row["score_2"] for row in scores_rows(path))


def test_scores_of_many_classes_wait_for_a_parquet_file_as_numbers_of_four_bytes(tmp_path):
    names, scores = [f"n{number}" for number in range(4000)], [1.0, *[0.0] * 3999]
    with ScoresFile(tmp_path / "scores.parquet", names) as file:
        tracemalloc.start()
        for number in range(128):
            file.add([(f"{number}.png", "n0", 1.0, scores)])
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert taken < 4e6  # 2 MB of scores; a dictionary for each image takes 30 MB
    assert parquet.read_table(tmp_path / "scores.parquet").column("n0").to_pylist() == [1.0] * 128


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("cut", [0, 7])
def test_a_killed_predict_goes_on_and_tries_again_what_could_not_be_read(
    capsys, model, images, tmp_path, suffix, cut, monkeypatch
):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"scores{suffix}"
    run(capsys, "predict", images, "--model", model, "--out", whole)
    partial = path.with_name(path.name + ".partial")
    lines = whole.read_bytes().splitlines(keepends=True)
    broken = [line for line in lines if b"broken" in line]
    partial.write_bytes(b"".join([*lines[:3], *broken, lines[3]])[: -cut or None])
    Image.new("RGB", (9, 9)).save(images / "broken.png")
    opened = []
    monkeypatch.setattr(
        "hf_vit.cli.inputs.open_image", lambda path, **kw: opened.append(path) or open_image(path, **kw)
    )
    status, out, _ = run(capsys, "predict", images, "--model", model, "--out", path, "--resume")
    assert status == 0 and "by an earlier run" in out and not partial.exists()
    known = 3 + (not cut) - (suffix == ".csv")
    assert len(opened) == 6 - known
    names = [row["image"] for row in csv_rows(path)] if suffix == ".csv" else [
        json.loads(line)["image"] for line in path.read_text().splitlines()
    ]  # fmt: skip
    assert len(names) == len(set(names)) == 6


def test_predict_files_errors(capsys, model, images, tmp_path):
    words = ("predict", images / "a.png", "--model", model)
    assert "ends in .csv" in error_of(capsys, *words, "--out", tmp_path / "scores.xlsx")
    assert "--resume goes on with" in error_of(capsys, *words, "--resume")
    assert "needs a .csv or .jsonl" in error_of(capsys, *words, "--out", tmp_path / "s.parquet", "--resume")
    assert "give one of them" in error_of(capsys, *words, "--out", tmp_path / "s.csv", "--json")
    assert "no folder" in error_of(capsys, *words, "--out", tmp_path / "none" / "s.csv")
    assert "from 0 to 1" in error_of(capsys, *words, "--min-score", "1.5")
    (tmp_path / "other.csv.partial").write_text("image,label,score,error,cat\n")
    assert "columns of another model" in error_of(capsys, *words, "--out", tmp_path / "other.csv", "--resume")


def test_predict_sorts_images_into_folders(capsys, model, images, tmp_path):
    _, out, _ = run(capsys, "predict", images, "--model", model, "--json")
    best = {row["image"]: row["labels"][0] for row in json.loads(out)["predictions"]}
    limit = sorted(hit["score"] for hit in best.values())[2]
    status, out, _ = run(
        capsys, "predict", images, "--model", model, "--copy-to", tmp_path / "sorted", "--min-score", limit - 1e-6
    )
    assert status == 1 and out.count("(below --min-score)") == 2
    for name, hit in best.items():
        folder = hit["label"] if hit["score"] >= limit - 1e-6 else "_below_min_score"
        copy = tmp_path / "sorted" / folder / name.rsplit("/", 1)[1]
        assert copy.read_bytes() == Path(name).read_bytes()


@pytest.mark.parametrize("label", ["../up", "a/b", "..", "con:trol", ""])
def test_a_label_is_one_folder_inside_the_target(label):
    name = folder_name(label)
    assert name and "/" not in name and name not in (".", "..")


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_embed_and_search(capsys, model, images, tmp_path, suffix):
    path = tmp_path / f"features{suffix}"
    status, out, err = run(capsys, "embed", images, "--model", model, "--out", path, "--batch-size", 2)
    assert status == 1 and "5 images, 16 numbers each" in out and "broken.png" in err
    names, features, about = read_features(path)
    assert len(about.pop("weights")) == 32 and about == {"model": str(model), "features": "pooled"}
    classifier = HFViTForImageClassification.from_pretrained(model).eval()
    processor = ViTImageProcessor.from_pretrained(model)
    for name, row in zip(names, features):
        pixels = processor(open_image(name), return_tensors="pt")
        with torch.no_grad():
            np.testing.assert_allclose(row, classifier.vit(**pixels).pooler_output[0].numpy(), atol=1e-5)
    sheet = tmp_path / "sheet.png"
    words = ("search", images / "b.jpg", "--model", model, "--in", path, "--top-k", 3, "--sheet", sheet)
    status, out, _ = run(capsys, *words, "--json")
    found = json.loads(out)["found"]
    assert status == 0 and found[0]["image"] == str(images / "b.jpg") and len(found) == 3
    assert found[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert [row["similarity"] for row in found] == sorted((row["similarity"] for row in found), reverse=True)
    assert Image.open(sheet).size == (4 * 160, 178)
    inked = (np.asarray(Image.open(sheet))[:160, :160] < 250).any(axis=2)  # of a small image, which is enlarged
    assert max(inked.any(axis=0).sum(), inked.any(axis=1).sum()) >= 150 > max(Image.open(images / "b.jpg").size)


def test_search_knows_other_weights_by_their_content(capsys, model, images, tmp_path):
    path, copy, other = tmp_path / "f.npz", tmp_path / "copy", tmp_path / "other"
    run(capsys, "embed", images / "a.png", "--model", model, "--out", path)
    shutil.copytree(model, copy)
    network = HFViTForImageClassification.from_pretrained(model)
    torch.nn.init.normal_(network.classifier.weight)  # a head is no part of features
    network.save_pretrained(copy)
    network.vit.layernorm.bias.data[0] += 1
    shutil.copytree(model, other)
    network.save_pretrained(other)
    search = ("search", images / "a.png", "--in", path, "--model")
    assert run(capsys, *search, copy)[::2] == (0, "")
    for words in ((other,), (model, "--image-size", 32)):
        status, _, err = run(capsys, *search, *words)
        assert status == 0 and err.startswith("note: the features were computed with other weights")
    plain, processor = HFViTForImageClassification.from_pretrained(model), ViTImageProcessor.from_pretrained(model)
    mark = fingerprint(plain, processor)
    assert fingerprint(plain.optimize_for_inference(), processor) == mark  # as `embed` loads it for many images
    _, _, about = read_features(path)
    np.savez(path, image=np.array(["a"]), features=np.ones((1, 16), np.float32),
             about=np.array(json.dumps({key: about[key] for key in ("model", "features")})))  # fmt: skip
    assert run(capsys, *search, model)[2] == "" and "note" in run(capsys, *search, copy)[2]  # of an earlier version


def test_predict_embed_and_search_take_tables_and_addresses(capsys, model, images, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=images)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/b.jpg"
        table = tmp_path / "t.csv"
        table.write_text(f"id,photo\n1,in/a.png\n2,{address}\n3,in/gone.png\n")
        scores, features = tmp_path / "scores.csv", tmp_path / "f.npz"
        words = (table, "--image-column", "photo", "--model", model)
        status, _, err = run(capsys, "predict", *words, "--out", scores)
        assert status == 1 and "1 of 3 images could not be read" in err and "gone.png: cannot be read" in err
        assert [row["image"] for row in csv_rows(scores)] == [str(images / "a.png"), address, str(images / "gone.png")]
        assert "has no column 'photos'" in error_of(
            capsys, "predict", table, "--model", model, "--image-column", "photos"
        )
        assert run(capsys, "embed", *words, "--out", features)[0] == 1
        words = ("search", address, "--model", model, "--in", features, "--sheet", tmp_path / "sheet.png")
        status, out, _ = run(capsys, *words, "--json")
        assert status == 0 and json.loads(out)["found"][0]["image"] == address
        drawn = np.asarray(Image.open(tmp_path / "sheet.png"))
        assert np.array_equal(drawn[:160, :160], drawn[:160, 160:320])  # the query, and what was found: downloaded
        server.shutdown()


def test_features_of_class_token_and_patches(capsys, model, images, tmp_path):
    classifier = HFViTForImageClassification.from_pretrained(model).eval()
    pixels = ViTImageProcessor.from_pretrained(model)(open_image(images / "a.png"), return_tensors="pt")
    with torch.no_grad():
        tokens = classifier.vit(**pixels).last_hidden_state[0]
    for kind, expected in (("class", tokens[0]), ("mean", tokens[1:].mean(0))):
        path = tmp_path / f"{kind}.npz"
        run(capsys, "embed", images / "a.png", "--model", model, "--out", path, "--features", kind)
        np.testing.assert_allclose(read_features(path)[1][0], expected.numpy(), atol=1e-5)


def test_embed_and_search_errors(capsys, model, images, tmp_path):
    image = images / "a.png"
    assert "ends in .parquet or .npz" in error_of(
        capsys, "embed", image, "--model", model, "--out", tmp_path / "f.txt"
    )
    words = ("search", image, "--model", model, "--in")
    assert "make it with hf-vit embed" in error_of(capsys, *words, tmp_path / "none.npz")
    (tmp_path / "broken.npz").write_text("no")
    assert "is not a file of hf-vit embed" in error_of(capsys, *words, tmp_path / "broken.npz")
    np.savez(tmp_path / "other.npz", image=np.array(["a"]), features=np.ones((1, 3), np.float32),
             about=np.array(json.dumps({"model": "other", "features": "pooled"})))  # fmt: skip
    assert "holds 3 numbers an image" in error_of(capsys, *words, tmp_path / "other.npz")
    assert "the query is one image" in error_of(
        capsys, "search", images, "--model", model, "--in", tmp_path / "other.npz"
    )
