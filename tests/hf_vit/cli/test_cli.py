"""Each command once with good input, and with the bad input that people give.

python -m pytest tests/hf_vit/cli/test_cli.py
"""

import functools
import json
import re
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.cli.main import build_parser, main
from tests.conftest import ROOT


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


LABELS = {0: "circle", 1: "square", 2: "star"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny classifier whose logits differ from picture to picture."""
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
def pictures(tmp_path):
    """Five pictures of several formats and sizes in two folders, and one file that is none."""
    random = np.random.default_rng(0)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "c.JPEG", "deep/d.bmp", "deep/e.png")):
        mode, size = ("L", (9, 30)) if number == 4 else ("RGB", (20 + number, 14))
        shape = size[::-1] if mode == "L" else (*size[::-1], 3)
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_text("not a picture")
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
    assert "at least 1 pixel" in error_of(capsys, "info", "vit-base-patch16", "--image-size", 0)
    assert "3 numbers" in error_of(capsys, "info", "vit-base-patch16", "--image-size", 8, 8, 8)


# -- predict


def test_predict_is_what_the_model_says(capsys, model, pictures):
    _, out, _ = run(capsys, "predict", pictures / "a.png", "--model", model, "--json")
    row = json.loads(out)["predictions"][0]
    pixels = ViTImageProcessor.from_pretrained(model)(Image.open(pictures / "a.png"), return_tensors="pt")
    with torch.no_grad():
        scores = HFViTForImageClassification.from_pretrained(model).eval()(**pixels).logits.softmax(-1)[0]
    assert {hit["label"]: hit["score"] for hit in row["labels"]} == pytest.approx(
        {LABELS[number]: score for number, score in enumerate(scores.tolist())}
    )
    assert [hit["score"] for hit in row["labels"]] == sorted((hit["score"] for hit in row["labels"]), reverse=True)


def test_predict_gives_each_of_several_labels_its_own_probability(capsys, model, pictures, tmp_path):
    classifier = HFViTForImageClassification.from_pretrained(model).eval()
    classifier.config.problem_type = "multi_label_classification"
    processor = ViTImageProcessor.from_pretrained(model)
    for part in (classifier, processor):
        part.save_pretrained(tmp_path)
    _, out, _ = run(capsys, "predict", pictures / "a.png", "--model", tmp_path, "--json")
    with torch.no_grad():
        logits = classifier(**processor(Image.open(pictures / "a.png"), return_tensors="pt")).logits[0]
    found = [hit["score"] for hit in json.loads(out)["predictions"][0]["labels"]]
    assert found == pytest.approx(logits.sigmoid().sort(descending=True).values.tolist()[: len(found)])


def test_predict_folders_globs_and_batches(capsys, model, pictures):
    words = (pictures.parent / "**" / "e.png", pictures, pictures / "*.png")
    status, out, err = run(capsys, "predict", *words, "--model", model, "--batch-size", 2, "--top-k", 1, "--json")
    found = json.loads(out)
    names = [row["image"].removeprefix(f"{pictures}/") for row in found["predictions"]]
    assert names == ["deep/e.png", "a.png", "b.jpg", "c.JPEG", "deep/d.bmp"]
    assert all(len(row["labels"]) == 1 for row in found["predictions"])
    assert status == 1 and "broken.png" in err and found["unreadable"][0]["image"].endswith("broken.png")


def test_predict_prints_a_line_for_each_picture(capsys, model, pictures):
    status, out, _ = run(capsys, "predict", pictures / "deep", "--model", model, "--top-k", 2, "--image-size", 24)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 2
    assert all(line.count("%") == 2 and "deep" in line for line in lines)


def test_predict_from_addresses(capsys, model, pictures):
    handler = functools.partial(QuietHandler, directory=str(pictures))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        words = [f"{base}/a.png", f"{base}/nothing.png", f"{base}/broken.png", pictures / "b.jpg"]
        status, out, _ = run(capsys, "predict", *words, "--model", model, "--json")
        server.shutdown()
    found = json.loads(out)
    assert status == 1 and [row["image"] for row in found["predictions"]] == [words[0], str(words[3])]
    reasons = {row["image"]: row["reason"] for row in found["unreadable"]}
    assert "404" in reasons[words[1]] and "not an image" in reasons[words[2]]
    _, out, _ = run(capsys, "predict", pictures / "a.png", "--model", model, "--json")
    alone, together = json.loads(out)["predictions"][0]["labels"], found["predictions"][0]["labels"]
    assert [hit["label"] for hit in alone] == [hit["label"] for hit in together]


def test_predict_errors(capsys, model, pictures, tmp_path):
    assert "no image at 'nowhere.jpg'" in error_of(capsys, "predict", "nowhere.jpg", "--model", model)
    (tmp_path / "empty").mkdir()
    assert "no image at" in error_of(capsys, "predict", tmp_path / "empty", "--model", model)
    picture = pictures / "a.png"
    assert "no-such-model" in error_of(capsys, "predict", picture, "--model", "./no-such-model")
    assert "'0' is not a whole number above 0" in error_of(capsys, "predict", picture, "--model", "m", "--top-k", 0)
    assert "--model" in error_of(capsys, "predict", picture)
    bare = HFViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=0
    )
    HFViTForImageClassification(bare).save_pretrained(tmp_path / "bare")
    assert "has no classifier" in error_of(capsys, "predict", picture, "--model", tmp_path / "bare")
    assert "no device 'tpu9'" in error_of(capsys, "predict", picture, "--model", model, "--device", "tpu9")


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
    assert done.returncode == 0 and "predict   classify pictures" in done.stdout, done.stderr
