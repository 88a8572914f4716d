"""The demo page in a real browser, and the folder of its Space. The page needs gradio, the browser playwright.

python -m pytest tests/hf_vit/hub/test_space_app.py
"""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.cli.main import main
from hf_vit.hub.space import write_space
from tests.conftest import ROOT
from tests.helpers.hub_process import BLOCK_HF_VIT
from tests.helpers.hub_server import HubServer, card_errors


LABELS = {number: f"thing {number}" for number in range(8)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny classifiers whose labels depend on the image."""
    folders = []
    for seed, name in enumerate(("letters", "shapes")):
        torch.manual_seed(seed)
        config = HFViTConfig(
            image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=64, id2label=LABELS,
        )  # fmt: skip
        model = HFViTForImageClassification(config)
        torch.nn.init.normal_(model.classifier.weight)
        torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        folders.append(folder)
    return folders


def top_label(folder, image_path):
    model = HFViTForImageClassification.from_pretrained(folder).eval()
    pixels = ViTImageProcessorPil.from_pretrained(folder)(Image.open(image_path), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return LABELS[int(model(pixels).logits.argmax())]


def test_the_space_is_complete_and_accepted(models, tmp_path):
    space = write_space(models[0], tmp_path / "space", "letters")
    assert card_errors((space / "README.md").read_text(), "space") == []
    assert {"app.py", "requirements.txt", "letters"} <= {path.name for path in space.iterdir()}
    assert {"model.safetensors", "config.json", "modeling_hf_vit.py"} <= {
        p.name for p in (space / "letters").iterdir()
    }
    assert {path.name for path in (space / "image_io").iterdir()} == {
        "__init__.py",
        "errors.py",
        "image_processing.py",
        "tiff_check.py",
    }
    front = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")


def test_push_as_a_space(models, tmp_path):
    with HubServer(users={"hf_w": "alice"}) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "hf_vit.cli.main", "push", str(models[0]), "alice/page", "--space", "--private"],
            env=hub.environment(home=tmp_path, token="hf_w") | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{hub.endpoint}/spaces/alice/page"
        assert hub.repositories["spaces/alice/page"].private
        assert {"app.py", "README.md", "letters/model.safetensors"} <= set(
            hub.repositories["spaces/alice/page"].files("main")[1]
        )


def test_without_gradio_or_a_model_the_error_is_one_line(models, tmp_path, capsys, monkeypatch):
    assert main(["push", str(tmp_path), "alice/page", "--space"]) == 2
    assert "is not a model: it has no config.json" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_vit.hub.space_app", raising=False)
    assert main(["demo", str(models[0])]) == 2
    line = capsys.readouterr().err
    assert 'pip install "hf-vit[demo]"' in line and line.count("\n") == 1


def test_what_people_drop_on_the_page_is_removed_with_it(models, monkeypatch):
    pytest.importorskip("gradio")
    kept = []

    def serve(classifiers, **options):
        kept.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        (kept[0] / "upload.png").write_text("mine")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr("hf_vit.hub.space_app.serve", serve)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["demo", str(models[0])]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert kept and not kept[0].exists()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(command, port, **options):
    """Address of a page that a command serves, while the block lasts."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost", "GRADIO_SERVER_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        **options,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, "the page ended"
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def image_path(tmp_path):
    """Path of an image of 300 x 200 pixels."""
    path = tmp_path / "given.png"  # the overlays that Gradio serves are called image.png
    Image.radial_gradient("L").convert("RGB").resize((300, 200)).save(path)
    return path


def test_the_space_runs_where_hf_vit_cannot_be_imported(models, image_path, tmp_path):
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

    space = write_space(models[0], tmp_path / "space", "letters")
    alone = f"{BLOCK_HF_VIT}\nimport runpy\nrunpy.run_path('app.py', run_name='__main__')"
    with served(["-c", alone], free_port(), cwd=space) as address:
        client = Client(address, verbose=False, download_files=tmp_path / "downloaded")
        labels, overlay = client.predict(handle_file(image_path), 2, "3", api_name="/show")
        assert labels["label"] == top_label(models[0], image_path)
        assert len(labels["confidences"]) == 5
        assert Image.open(overlay).size == (640, 427)
        (tmp_path / "broken.png").write_text("not an image")
        labels, overlay = client.predict(handle_file(tmp_path / "broken.png"), 2, "3", api_name="/show")
        assert not labels and not overlay


def test_labels_that_two_classes_share_stay_two(models):
    pytest.importorskip("gradio")
    from hf_vit.hub.space_app import SpaceClassifier

    classifier = SpaceClassifier.load("letters", models[0])
    classifier.model.config.id2label = {number: ("crane", "crane", "ship")[number % 3] for number in range(8)}
    again = SpaceClassifier("letters", classifier.model, classifier.processor)
    scores = again.scores(Image.new("RGB", (32, 32), "red"))
    assert len(scores) == 8 and sum(scores.values()) == pytest.approx(1) and "crane (1)" in scores
    again.model.config.problem_type = "multi_label_classification"
    alone = torch.tensor(list(again.scores(Image.new("RGB", (32, 32), "red")).values()))
    assert torch.allclose(alone.logit().softmax(0), torch.tensor(list(scores.values())), atol=1e-4)
    assert float(alone.sum()) != pytest.approx(1, abs=0.05)


def test_the_last_image_and_the_last_choice_count(models):
    """None is dropped that comes while an answer is awaited: an image, a block, a head."""
    pytest.importorskip("gradio")
    from hf_vit.hub.space_app import SpaceClassifier, build_page

    page = build_page([SpaceClassifier.load("letters", models[0])])
    assert [event.trigger_mode for event in page.fns.values()] == ["always_last"] * 3


@pytest.fixture(scope="module")
def page(models):
    """Address of `hf-vit demo` with two models."""
    pytest.importorskip("gradio")
    port = free_port()
    options = ["--compare", models[1], "--port", port, "--device", "cpu", "--json"]
    with served(["-m", "hf_vit.cli.main", "demo", models[0], *options], port, cwd=ROOT) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        own, options = Path(playwright.chromium.executable_path), {}
        if not own.exists():
            found = shutil.which("chromium") or shutil.which("google-chrome")
            options["executable_path"] = found or pytest.skip(
                "the page is used in Chromium, which pip does not install: python -m playwright install chromium"
            )
        browser = playwright.chromium.launch(args=["--no-sandbox"], **options)
        yield browser
        browser.close()


def wait_for_overlay(tab, place, expected):
    """Wait until the overlay of a column is what the model itself draws."""
    difference = None
    for _ in range(240):
        sources = [image.get_attribute("src") for image in tab.locator("img").all()]
        sources = [source for source in sources if source and source.endswith(".png") and "given.png" not in source]
        if len(sources) > place:
            shown = Image.open(io.BytesIO(tab.request.get(sources[place]).body())).convert("RGB")
            difference = np.abs(np.asarray(shown, int) - np.asarray(expected, int)).max()
            if difference <= 2:
                return
        tab.wait_for_timeout(250)
    raise AssertionError(f"column {place} shows something else: {difference}")


@pytest.mark.parametrize(("width", "height"), [(1280, 1000), (390, 844)], ids=["desk", "phone"])
def test_images_in_the_browser(page, browser, models, image_path, tmp_path, width, height):
    from hf_vit.hub.space_app import MEAN, SpaceClassifier

    ours, given = [SpaceClassifier.load(folder.name, folder) for folder in models], Image.open(image_path)
    tab = browser.new_page(viewport={"width": width, "height": height})
    tab.goto(page, wait_until="domcontentloaded")
    upload = tab.locator("input[type=file]").first
    upload.wait_for(state="attached", timeout=60_000)
    upload.set_input_files(image_path)
    for place, folder in enumerate(models):
        tab.get_by_text(top_label(folder, image_path)).first.wait_for(timeout=60_000)
        wait_for_overlay(tab, place, ours[place].overlay(given, 2, MEAN))
    assert tab.get_by_text("%").count() == 2 * 5

    # another block of the first model, another head of the second
    tab.locator("input[type=number]").first.fill("1")
    tab.locator("input[type=number]").first.press("Enter")
    wait_for_overlay(tab, 0, ours[0].overlay(given, 1, MEAN))
    tab.get_by_label("Head").nth(1).click()
    tab.get_by_role("option", name="2").click()
    wait_for_overlay(tab, 1, ours[1].overlay(given, 2, "2"))
    wait_for_overlay(tab, 0, ours[0].overlay(given, 1, MEAN))
    tab.screenshot(path=tmp_path / f"demo-{width}.png", full_page=True)  # to look at
    assert tab.evaluate("document.documentElement.scrollWidth") <= width + 1, "the page scrolls sideways"

    # a file that is no image takes the answers of the last one away, and says why
    tab.get_by_label("Remove Image").click()
    (tmp_path / "broken.png").write_text("not an image")
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    tab.get_by_text("This file cannot be read as an image").wait_for(timeout=60_000)
    assert tab.get_by_text("%").count() == 0
    tab.screenshot(path=tmp_path / f"broken-{width}.png", full_page=True)
    tab.close()
