"""`hf-vit inspect`: one page, its figures and numbers, and the bad input that people give.

python -m pytest tests/hf_vit/cli/test_inspect.py
"""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitConfig, BitForImageClassification, ViTImageProcessor
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.cli.main import main
from hf_vit.interpretability import plots
from hf_vit.interpretability.perturbation import compare_explanations
from hf_vit.interpretability.relevance import explain


def folder_of(path, **changes):
    torch.manual_seed(0)
    config = HFViTConfig(**({
        "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "id2label": {0: "circle", 1: "square", 2: "<star>"},
    } | changes))  # fmt: skip
    model = HFViTForImageClassification(config)
    if config.num_labels:
        torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(path)
    height, width = config.image_size_hw
    ViTImageProcessor(size={"height": height, "width": width}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("model"))


@pytest.fixture
def images(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name, shape in (("a.png", (30, 50, 3)), ("b <i>.jpg", (44, 20, 3))):
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / "in" / name)
    return tmp_path / "in"


def run(capsys, *words):
    """(status, stdout, stderr) of `hf-vit inspect WORDS`."""
    capsys.readouterr()  # what saving a model printed
    try:
        status = main(["inspect", *map(str, words)])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_one_page_of_two_models(capsys, model, images, tmp_path):
    other = folder_of(tmp_path / "hybrid", resnet_depths=(), patch_size=1, resnet_width_factor=0.5, pooling="map")
    words = (images, "--out", tmp_path / "out", "--compare", other, "--steps", 2, "--json")
    status, out, err = run(capsys, model, *words)
    assert status == 0 and not err
    page = (tmp_path / "out" / "report.html").read_text()
    assert json.loads(out)["report"] == str(tmp_path / "out" / "report.html")
    assert "b &lt;i&gt;.jpg" in page and "<i>" not in page and "&lt;star&gt;" in page
    assert page.count("<figcaption>original") == 4 and 'src="data:image' in page and 'src="model' not in page
    assert page.count("<svg") == 2 * (2 + 1) + 1 + 4 * 2  # of each model, of both, curves of each image and model
    assert page.count("<figcaption><b>head 1</b>") == 4 * 2  # two blocks
    assert "block 0" in page and "counted from 0" in page and "<script" not in page
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert [subject["stride_px"] for subject in numbers["models"]] == [[4, 4], [4, 4]]
    assert np.shape(numbers["models"][0]["attention_distance_px"]) == (2, 2)
    areas = numbers["images"][1]["models"][0]["areas"]
    assert set(areas) == {"attention", "rollout", "gradient_rollout", "relevance", "random"}
    for place in ("model-1", "model-2"):
        for name in ("attention", "rollout", "gradient_rollout", "relevance", "colors"):
            with Image.open(tmp_path / "out" / place / "001-a" / f"{name}.png") as seen:
                assert seen.size == (350, 210)  # 50 x 30, enlarged to see something
        for name in ("002-b <i>/heads", "002-b <i>/norms", "002-b <i>/curves", "filters", "positions", "distance"):
            assert (tmp_path / "out" / place / f"{name}.png").is_file()
    assert (tmp_path / "out" / "distances.png").is_file()


def test_the_page_names_no_folder_and_overlays_are_as_large_as_images(capsys, model, tmp_path):
    """A grayscale photograph that its EXIF turns, larger than the page shows it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (700, 400), 90).save(tmp_path / "turned.jpg", exif=exif)
    words = (tmp_path / "turned.jpg", "--out", tmp_path / "out", "--steps", 0)
    assert run(capsys, model, *words)[0] == 0
    for name in ("rollout", "colors"):
        with Image.open(tmp_path / "out" / "model-1" / "001-turned" / f"{name}.png") as seen:
            assert seen.size == (400, 700)
    assert f"<h1>What {model.name} sees</h1>" in (tmp_path / "out" / "report.html").read_text()


def test_a_model_without_images(capsys, model, tmp_path):
    status, out, _ = run(capsys, model, "--out", tmp_path / "out")
    assert status == 0 and out.strip() == str(tmp_path / "out" / "report.html")
    assert sorted(path.name for path in (tmp_path / "out" / "model-1").iterdir()) == ["filters.png", "positions.png"]


def test_choices_are_honoured(capsys, model, images, tmp_path):
    words = ("--methods", "relevance", "--class", "square", "--layers", -1, "--heads", 1, "--steps", 0, "--limit", 1)
    status, _, err = run(capsys, model, images, "--out", tmp_path / "out", *words, "--image-size", 24, 16)
    assert status == 0 and "the first 1 of 2 images; --limit 2 for all" in err
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert [row["models"][0]["explained"] for row in numbers["images"]] == ["square"]
    assert numbers["models"][0]["image_size"] == [24, 16] and numbers["models"][0]["grid"] == [6, 4]
    shown = {path.name for path in (tmp_path / "out" / "model-1" / "001-a").iterdir()}
    assert shown == {"relevance.png", "colors.png", "heads.png", "norms.png"}


def test_choices_reach_what_is_computed(capsys, monkeypatch, model, images, tmp_path):
    """Class, steps and baseline of the numbers, class of the overlay; blocks and heads of the figures."""
    drawn = {}

    def heads(maps, title, numbers, proportion):
        drawn.update(layers=list(maps), heads=list(numbers), proportion=proportion)
        return plots.Figure()

    def norms(lengths, *_):
        drawn.update(norms=list(lengths))
        return plots.Figure()

    monkeypatch.setattr(plots, "draw_attention_heads", heads)
    monkeypatch.setattr(plots, "draw_norms", norms)
    choices = ("--class", "2", "--steps", 3, "--baseline", "mean", "--methods", "rollout", "relevance")
    words = (images / "a.png", "--out", tmp_path / "out", "--layers", -1, "--heads", 1, "--device", "cpu")
    assert run(capsys, model, *words, *choices)[0] == 0
    assert drawn == {"layers": [1], "heads": [1], "proportion": 30 / 50, "norms": [1]}
    classifier = HFViTForImageClassification.from_pretrained(model).eval()
    processor = ViTImageProcessorPil.from_pretrained(model)
    with Image.open(images / "a.png") as image:
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        original = plots.enlarged(np.asarray(image), 360)
    own = compare_explanations(classifier, pixels, ["rollout", "relevance"], 2, 3, "mean", random_orders=3)
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    areas = numbers["images"][0]["models"][0]["areas"]
    assert list(areas) == list(own)
    for method, found in areas.items():
        assert found["deletion"] == pytest.approx(own[method].deletion_area.item(), rel=1e-5)
        assert found["insertion"] == pytest.approx(own[method].insertion_area.item(), rel=1e-5)
    scores = [area["score"] for area in numbers["models"][0]["mean_areas"].values()]
    assert scores == sorted(scores, reverse=True)  # the best first
    view = plots.view_of(processor.to_dict(), original.shape[:2])
    heat = plots.on_image(explain(classifier, pixels, "relevance", 2)[0].numpy(), (4, 4), view)
    with Image.open(tmp_path / "out" / "model-1" / "001-a" / "relevance.png") as seen:
        assert np.array_equal(np.asarray(seen), plots.overlay(original, heat))


def test_several_labels_have_probabilities_of_their_own(capsys, images, tmp_path):
    several = folder_of(tmp_path / "several", problem_type="multi_label_classification")
    words = (images / "a.png", "--out", tmp_path / "out", "--steps", 2, "--methods", "rollout")
    assert run(capsys, several, *words)[0] == 0
    found = json.loads((tmp_path / "out" / "numbers.json").read_text())["images"][0]["models"][0]
    classifier = HFViTForImageClassification.from_pretrained(several).eval()
    with Image.open(images / "a.png") as image:
        pixels = ViTImageProcessorPil.from_pretrained(several)(image, return_tensors="pt")["pixel_values"]
    expected = classifier(pixels).logits[0].sigmoid().sort(descending=True).values.tolist()
    assert [score for _, score in found["labels"]] == pytest.approx(expected, rel=1e-4)


def test_models_of_other_kinds(capsys, images, tmp_path):
    """No classifier and no positions; one channel."""
    bare = folder_of(tmp_path / "bare", id2label=None, num_labels=0, position_embedding_type="none", pooling="gap")
    status, _, err = run(capsys, bare, images, "--out", tmp_path / "out-bare")
    assert status == 0 and "no classifier: only attention, rollout" in err
    gray = folder_of(tmp_path / "gray", num_channels=1)
    assert run(capsys, gray, images, "--out", tmp_path / "out-gray", "--steps", 0)[0] == 0


def test_unreadable_images_are_listed(capsys, model, images, tmp_path):
    (images / "broken.png").write_text("not an image")
    status, _, err = run(capsys, model, images, "--out", tmp_path / "out", "--steps", 0)
    assert status == 1 and "broken.png: not an image" in err
    assert "broken.png" in (tmp_path / "out" / "report.html").read_text()


def test_the_report_of_a_run_is_not_overwritten(capsys, model, tmp_path):
    (tmp_path / "report.html").write_text("<!doctype html> the page of a run")
    status, _, err = run(capsys, model, "--out", tmp_path)
    assert status == 2 and "is the report of a training run: name another folder with --out" in err
    assert (tmp_path / "report.html").read_text().endswith("the page of a run")
    for _ in range(2):  # one of its own is
        assert run(capsys, model, "--out", tmp_path / "seen")[0] == 0


def test_without_matplotlib(capsys, monkeypatch, model, tmp_path):
    monkeypatch.setitem(sys.modules, "hf_vit.interpretability.plots", None)
    monkeypatch.delattr("hf_vit.interpretability.plots", raising=False)
    status, printed, err = run(capsys, model, "--out", tmp_path / "out")
    assert status == 2 and not printed and "drawing needs matplotlib" in err and 'pip install "hf-vit[inspect]"' in err


def test_bad_input_is_one_line(capsys, model, images, tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(5, 64)}, tmp_path / "resnet.pth")
    (tmp_path / "broken.png").write_text("not an image")
    bit = BitForImageClassification(BitConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_groups=2))
    bit.save_pretrained(tmp_path / "bit")
    out = ("--out", tmp_path / "out")
    small = folder_of(tmp_path / "small", num_hidden_layers=1, num_attention_heads=1, id2label={0: "circle"})
    cases = [
        ((model, *out, "--compare", small, "--layers", 1), f"{small}: layer 1 does not exist: the model has 1"),
        ((small, *out, "--compare", model, "--heads", 1), f"{small}: head 1 does not exist: the model has 1"),
        ((model, *out, "--compare", small, "--class", "square"), f"{small}: no class 'square': the model has 1"),
        ((model, *out, "--compare", tmp_path / "bit"), f"{tmp_path / 'bit'}"),
        ((tmp_path / "resnet.pth", *out), "a convolutional network"),
        ((tmp_path / "bit", *out), "a convolutional network"),
        ((tmp_path / "nothing", *out), "no such file or folder"),
        ((model, images, *out, "--layers", 2), "layer 2 does not exist: the model has 2, 0 to 1"),
        ((model, images, *out, "--heads", 7), "head 7 does not exist: the model has 2, 0 to 1"),
        ((model, images, *out, "--device", "nowhere"), "no device 'nowhere' here"),
        ((model, images, *out, "--class", "moon"), "no class 'moon': the model has 3 (circle, square, <star>"),
        ((model, tmp_path / "broken.png", *out), "none of 1 images could be read"),
        ((model, tmp_path / "missing.png", *out), "no image at"),
        ((model, "--out", tmp_path / "resnet.pth"), "is a file: name a folder"),
        ((model, images, *out, "--methods", "lime"), "invalid choice: 'lime'"),
        ((model, images, *out, "--steps", "-1"), "not a whole number"),
    ]
    for words, message in cases:
        status, printed, err = run(capsys, *words)
        assert status == 2 and not printed, words
        assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and message in err, err
