"""From a table of 300 images, three of them odd, to a card and an ONNX file that answers as the model does.

pytest tests/training/test_table_journey.py
"""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from hf_vit import open_image
from hf_vit.cli.main import main as hf_vit
from training import finetune


KINDS = ("red", "green", "blue")
MISSING, DAMAGED, DEEP = "0.png", "1.png", "2.png"  # of a red, a green and a blue one


def test_a_table_with_odd_files_becomes_a_card_and_an_onnx_file(tmp_path, capsys):
    pytest.importorskip("onnxscript", reason='ONNX needs pip install "hf-vit[export]"')
    onnxruntime = pytest.importorskip("onnxruntime")
    random = np.random.default_rng(0)
    for number in range(300):
        pixels = random.integers(0, 60, (12, 12, 3))
        pixels[..., number % 3] += 180
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / MISSING).unlink()
    (tmp_path / DAMAGED).write_bytes((tmp_path / DAMAGED).read_bytes()[:200])
    Image.fromarray(np.full((12, 12), 40_000, np.uint16)).save(tmp_path / DEEP)
    with open(tmp_path / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "kind"), *((f"{n}.png", KINDS[n % 3]) for n in range(300))])

    model = tmp_path / "model"
    options = f"""
        --dataset {tmp_path}/table.csv --image_column file --label_column kind --output_dir {model} --use_cpu
        --set hidden_size=24 num_hidden_layers=1 num_attention_heads=2 intermediate_size=48 patch_size=4
        --image_size 8 --crop squash --max_steps 40 --per_device_train_batch_size 30 --learning_rate 0.005
        --warmup_steps 0 --dev_fraction 0.2 --eval_steps 20 --dataloader_num_workers 0 --disable_tqdm
    """
    facts = finetune.main(options.split())
    printed = capsys.readouterr()
    assert "1 of 300 images that" in printed.out and f"are missing: {MISSING}" in printed.out
    assert f"skipped: {MISSING}: cannot be read" in printed.err
    assert f"skipped: {DAMAGED}: cannot be decoded" in printed.err
    left_out = (model / "unreadable.txt").read_text()
    assert MISSING in left_out and DAMAGED in left_out and DEEP not in left_out
    assert {row["metric"]: row["value"] for row in facts["results"]}["accuracy"] > 0.9
    card = (model / "README.md").read_text()
    assert "| Unreadable images left out | 2 |" in card

    assert hf_vit(["export", str(model), str(tmp_path / "onnx"), "--json"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    capsys.readouterr()
    images = [tmp_path / f"{number}.png" for number in range(2, 32)]  # the first one has 16 bits
    hf_vit(["predict", *map(str, images), "--model", str(model), "--json"])
    predicted = [row["labels"][0] for row in json.loads(capsys.readouterr().out)["predictions"]]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "onnx")
    pixels = processor([open_image(path) for path in images], return_tensors="np")["pixel_values"]
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels})
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert [config["id2label"][str(best)] for best in logits.argmax(axis=1)] == [hit["label"] for hit in predicted]
    np.testing.assert_allclose(scores.max(axis=1), [hit["score"] for hit in predicted], atol=1e-4)
