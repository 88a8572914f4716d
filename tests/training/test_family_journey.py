"""A tiny DINOv2 and a tiny CLIP from their own folders to the Hub: fine-tuned, inspected, exported, pushed, loaded.

The last step runs where hf_vit cannot be imported.

pytest tests/training/test_family_journey.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_vit import HFViTForImageClassification
from hf_vit.cli.main import main
from tests.helpers.compare import same_outputs
from tests.helpers.hub_process import BLOCK_HF_VIT, WRITER, run
from tests.helpers.hub_server import HubServer
from training import finetune, open_dataset


GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens_family"
NAMES = ("dinov2_classifier", "clip_two_towers")
# Random weights learn little in forty steps; chance is 0.1.
LEAST = 0.3


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Four test images of the digits as files."""
    folder, data = tmp_path_factory.mktemp("digits"), open_dataset("digits", split="test")
    for index in range(4):
        data.read(index)[0].resize((40, 40)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each golden fine-tuned on the digits at 24 px, another grid than its own."""
    root = tmp_path_factory.mktemp("trained")
    for name in NAMES:
        base = shutil.copytree(GOLDENS / name, root / "base" / name)
        (base / "README.md").write_text("---\nlicense: mit\n---\n")
        words = f"--model {base} --dataset digits --image_size 24 --output_dir {root / name} --max_steps 40"
        words += " --per_device_train_batch_size 64 --learning_rate 0.003 --layer_decay 0.9 --ema_decay 0.9 --no_flip"
        finetune.main([*words.split(), "--crop", "squash", "--use_cpu", "--disable_tqdm", "--card_examples", "2"])
    return root


@pytest.fixture(scope="module")
def hub():
    with HubServer(users={WRITER: "alice"}) as server:
        yield server


@pytest.fixture(scope="module")
def downloaded(hub, trained, digits, tmp_path_factory):
    """What each gives on an image, loaded from the Hub by a process without hf_vit."""
    push = """
    import sys
    from hf_vit.cli.main import main
    for folder in sys.argv[1:]:
        assert main(["push", folder, "alice/" + folder.rpartition("/")[2]]) == 0
    print("null")
    """
    home = tmp_path_factory.mktemp("home")
    run(hub, home, push, *(trained / name for name in NAMES), token=WRITER)
    load = BLOCK_HF_VIT + (
        "import json, torch\n"
        "from PIL import Image\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification as Auto\n"
        "found = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    model = Auto.from_pretrained('alice/' + name, trust_remote_code=True)\n"
        "    processor = AutoImageProcessor.from_pretrained('alice/' + name)\n"
        "    pixels = processor(Image.open(sys.argv[2]).convert('RGB'), return_tensors='pt')\n"
        "    with torch.no_grad():\n"
        "        found[name] = model(**pixels).logits.tolist()\n"
        "print(json.dumps(found))\n"
    )
    return run(hub, tmp_path_factory.mktemp("elsewhere"), load, json.dumps(NAMES), digits / "0.png")


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_the_digits_and_its_card_keeps_the_license(name, trained):
    facts = json.loads((trained / name / "facts.json").read_text())
    accuracy = next(row["value"] for row in facts["results"] if row["metric"] == "accuracy")
    assert accuracy > LEAST and facts["license"] == "mit" and facts["model"]["image_size"] == [24, 24]
    config = json.loads((trained / name / "config.json").read_text())
    assert config["head_input"] == ("token_and_mean" if name.startswith("dinov2") else "pooled")
    card = (trained / name / "README.md").read_text()
    assert "license: mit" in card and "attention_examples.png" in card


@pytest.mark.parametrize("name", NAMES)
def test_it_is_inspected(name, trained, digits, tmp_path, capsys):
    words = ["inspect", str(trained / name), str(digits / "0.png"), "--out", str(tmp_path / "seen"), "--steps", "2"]
    assert main([*words, "--json"]) == 0
    assert (tmp_path / "seen" / "report.html").stat().st_size > 10_000
    assert str(tmp_path / "seen") in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_it_is_exported_to_both_formats(name, trained, digits, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason='ONNX needs pip install "hf-vit[export]"')
    onnxruntime = pytest.importorskip("onnxruntime")
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = HFViTForImageClassification.from_pretrained(trained / name)(pixels).logits
    for format in ("onnx", "torch-export"):
        out = tmp_path / format
        assert main(["export", str(trained / name), str(out), "--format", format, "--json"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    program = torch.export.load(tmp_path / "torch-export" / "model.pt2").module()
    torch.testing.assert_close(program(pixels), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_from_the_hub_where_hf_vit_is_not_installed(name, trained, digits, downloaded, capsys):
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(trained / name)
    pixels = processor(Image.open(digits / "0.png").convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        expected = HFViTForImageClassification.from_pretrained(trained / name)(**pixels).logits
    assert same_outputs(downloaded[name], expected)
    assert main(["predict", str(digits / "0.png"), "--model", str(trained / name), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["predictions"][0]["labels"][0]["label"]
    assert best == str(int(np.argmax(downloaded[name][0])))
