"""The demo page in a real browser, and the folder of its Space. The page needs gradio, the browser playwright.

python -m pytest tests/test_demo.py
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import yaml
from conftest import ROOT
from hub_server import HubServer, card_errors
from PIL import Image
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.cli import main
from hf_vit.demo import write_space


LABELS = {number: f"thing {number}" for number in range(8)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny classifiers whose labels depend on the picture."""
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


def top_label(folder, picture):
    model = HFViTForImageClassification.from_pretrained(folder).eval()
    pixels = ViTImageProcessorPil.from_pretrained(folder)(Image.open(picture), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return LABELS[int(model(pixels).logits.argmax())]


def test_the_space_is_complete_and_accepted(models, tmp_path):
    space = write_space(models[0], tmp_path / "space", "letters")
    assert card_errors((space / "README.md").read_text(), "space") == []
    assert {"app.py", "requirements.txt", "letters"} <= {path.name for path in space.iterdir()}
    assert {"model.safetensors", "config.json", "modeling_hf_vit.py"} <= {
        p.name for p in (space / "letters").iterdir()
    }
    assert not re.search(r"^\s*(from|import) (hf_vit|\.)", (space / "app.py").read_text(), re.MULTILINE)
    front = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", "app.py")


def test_push_as_a_space(models, tmp_path):
    with HubServer(users={"hf_w": "alice"}) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "hf_vit.cli", "push", str(models[0]), "alice/page", "--space"],
            env=hub.environment(home=tmp_path, token="hf_w") | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{hub.endpoint}/spaces/alice/page"
        assert {"app.py", "README.md", "letters/model.safetensors"} <= set(
            hub.repositories["spaces/alice/page"].files("main")[1]
        )


def test_without_gradio_or_a_model_the_error_is_one_line(models, tmp_path, capsys, monkeypatch):
    assert main(["push", str(tmp_path), "alice/page", "--space"]) == 2
    assert "is not a model: it has no config.json" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_vit.demo_page", raising=False)
    assert main(["demo", str(models[0])]) == 2
    line = capsys.readouterr().err
    assert 'pip install "hf-vit[demo]"' in line and line.count("\n") == 1


@pytest.fixture(scope="module")
def page(models):
    """Address of `hf-vit demo` with two models."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_vit.cli", "demo", str(models[0]), "--compare", str(models[1])]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu", "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"},
        stdout=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        assert process.poll() is None, "the page ended"
        try:
            urllib.request.urlopen(address, timeout=1)
            break
        except OSError:
            time.sleep(0.5)
    yield address
    process.terminate()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 1000), (390, 844)], ids=["desk", "phone"])
def test_a_picture_is_classified_and_explained_in_the_browser(page, models, tmp_path, width, height):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("needs chromium")
    picture = tmp_path / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((300, 200)).save(picture)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.goto(page, wait_until="domcontentloaded")
        tab.locator("input[type=file]").first.wait_for(state="attached", timeout=60_000)
        tab.locator("input[type=file]").first.set_input_files(picture)
        for folder in models:
            tab.get_by_text(top_label(folder, picture)).first.wait_for(timeout=60_000)
        tab.wait_for_function("document.querySelectorAll('img').length >= 3", timeout=60_000)
        before = tab.locator("img").nth(1).get_attribute("src")
        tab.locator("input[type=number]").first.fill("1")
        tab.locator("input[type=number]").first.press("Enter")
        tab.wait_for_function(
            "before => document.querySelectorAll('img')[1].src != before", arg=before, timeout=60_000
        )
        tab.screenshot(path=tmp_path / f"demo-{width}.png", full_page=True)  # to look at
        assert tab.evaluate("document.documentElement.scrollWidth") <= width + 1, "the page scrolls sideways"
        browser.close()
