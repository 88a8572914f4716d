"""`hf-vit convert`, through the command line's own door.

python -m pytest tests/hf_vit/cli/test_convert.py
"""

import errno
import json
import os
import stat
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_vit import HFViTForImageClassification, HFViTForMaskedPatchPrediction
from hf_vit.checkpoints import load_checkpoint
from hf_vit.cli.main import main
from tests.helpers.checkpoints import ours, same
from tests.helpers.compare import same_outputs


def convert(*words) -> int:
    return main(["convert", *map(str, words)])


def test_npz_to_a_folder_that_from_pretrained_loads(goldens, tmp_path, capsys):
    source = goldens / "vt_token_prelogits.npz"
    assert convert(source, tmp_path / "vit") == 0
    said = capsys.readouterr().out
    assert "Google vision_transformer npz, pre-Linen numbering" in said and "24,971" in said
    assert "representation_size" in said and str(tmp_path / "vit") in said
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    assert type(model) is HFViTForImageClassification
    same(model, load_checkpoint(source))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    assert dict(processor.size) == {"height": 32, "width": 32} and list(processor.image_mean) == [0.5] * 3
    assert (tmp_path / "vit" / "modeling_hf_vit.py").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["vit"]


def test_options_and_json(goldens, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    words = ["--image-size", 48, 24, "--labels", tmp_path / "names.txt", "--set", "hidden_dropout_prob=0.1", "--json"]
    assert convert(goldens / "vt_token.npz", tmp_path / "vit", *words) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["architecture"]["image_size"] == [48, 24] and account["architecture"]["num_labels"] == 2
    assert json.loads((tmp_path / "vit/config.json").read_text())["id2label"] == {"0": "cat", "1": "dog"}
    assert account["changed"] == [
        "position table refitted from 4x4 to 6x3",
        "classifier of 10 classes replaced by one of 2, all zeros: train it",
    ]
    assert account["format"] == "hf_vit" and "model.safetensors" in account["files"]
    model = HFViTForImageClassification.from_pretrained(tmp_path / "vit")
    assert model.config.hidden_dropout_prob == 0.1 and model.config.label2id == {"cat": 0, "dog": 1}
    assert sum(p.numel() for p in model.parameters()) == account["parameters"]


@pytest.mark.parametrize(
    ("format", "place"),
    [
        ("google-npz", "vit.npz"),
        ("big-vision-npz", "vit.npz"),
        ("timm", "vit.safetensors"),
        ("timm", "t"),
        ("transformers", "h"),
    ],
)
def test_every_format_and_back(tmp_path, capsys, format, place):
    model = ours()
    model.config.id2label = {i: f"class {i}" for i in range(5)}
    model.save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / place, "--format", format) == 0
    captured = capsys.readouterr()
    assert ("label names dropped" in captured.out) == place.endswith(".npz")
    assert ("note: timm computes" in captured.err) == (place == "vit.safetensors")
    assert convert(tmp_path / place, tmp_path / "back") == 0
    pixels = torch.randn(2, 3, 32, 32)
    back = HFViTForImageClassification.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert same_outputs(back(pixels).logits, model(pixels).logits)
    assert (back.config.id2label[3] == "class 3") != place.endswith(".npz")


def test_bad_input_is_one_line_and_writes_nothing(goldens, tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    broken.write_bytes((goldens / "vt_token.npz").read_bytes()[:50_000])
    (tmp_path / "turned.json").write_text('{"cat": 0, "dog": 1}')
    (tmp_path / "latin.txt").write_bytes("Dämmerung\n".encode("latin-1"))
    before = sorted(p.name for p in tmp_path.iterdir())
    token = goldens / "vt_token.npz"
    cases = (
        ([broken, tmp_path / "vit"], "truncated or corrupt"),
        ([tmp_path / "none.npz", tmp_path / "vit"], "no such file"),
        ([goldens / "vt_token_nonsquare.npz", tmp_path / "vit"], "image_size="),
        ([token, tmp_path / "vit", "--set", "hidden_sizes=3"], "did you mean 'hidden_size'"),
        ([token, tmp_path / "vit", "--set", "hidden_size"], "key=value"),
        ([token, tmp_path / "vit", "--set", "num_attention_heads=5"], "contradicts"),
        ([token, tmp_path / "vit", "--image-size", "4"], "smaller than one patch"),
        ([token, tmp_path / "vit", "--image-size", 1, 2, 3], "height and width"),
        ([token, tmp_path / "vit", "--labels", tmp_path / "none.txt"], "no such file"),
        ([token, tmp_path / "vit", "--labels", tmp_path / "turned.json"], "turned.json: must be id2label"),
        ([token, tmp_path / "vit", "--labels", tmp_path / "latin.txt"], "latin.txt: not a text in UTF-8"),
        ([token, tmp_path / "vit.npz"], "give --format google-npz or big-vision-npz"),
        ([token, tmp_path / "vit.safetensors", "--format", "transformers"], "is named as a file"),
        ([token, tmp_path / "vit", "--checkpoint-image-size", 1, 2, 3], "--checkpoint-image-size is one number"),
        ([goldens / "bv_map.npz", tmp_path / "vit.npz", "--format", "google-npz"], "pooling"),
        ([token, tmp_path, "--format", "timm"], "something already"),
        ([token, broken], "is a file, a folder is written"),
    )
    for words, reason in cases:
        assert convert(*words) == 2, words
        said = capsys.readouterr()
        assert reason in said.err and said.err.startswith("error: ") and len(said.err.splitlines()) == 1, said.err
        assert sorted(p.name for p in tmp_path.iterdir()) == before, words


def test_overwrite(goldens, tmp_path):
    assert convert(goldens / "vt_token.npz", tmp_path / "vit") == 0
    assert convert(goldens / "vt_gap.npz", tmp_path / "vit") == 2
    assert convert(goldens / "vt_gap.npz", tmp_path / "vit", "--overwrite") == 0
    assert load_checkpoint(tmp_path / "vit").config.pooling == "gap"


def test_a_folder_is_replaced_as_a_whole(goldens, tmp_path, capsys):
    """Nothing of the old model stays: its card, facts, shards. A folder that is no model's stays."""
    place = tmp_path / "vit"
    place.mkdir()
    for name in ("README.md", "facts.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (place / name).write_text("old")
    assert convert(goldens / "vt_token.npz", place, "--overwrite") == 0
    assert not {p.name for p in place.iterdir()} & {"README.md", "facts.json", "model.safetensors.index.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["vit"]
    (place / "thesis.docx").write_text("years")
    assert convert(goldens / "vt_token.npz", place, "--overwrite") == 2
    assert "thesis.docx" in capsys.readouterr().err and (place / "thesis.docx").is_file()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("fifo", "link"):
        for words in ((), ("--format", "google-npz"), ("--overwrite",)):
            assert convert(goldens / "vt_token.npz", tmp_path / name, *words) == 2
    assert (tmp_path / "fifo").is_fifo() and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("words", [(), ("--format", "timm"), ("--format", "transformers"), ("--format", "google-npz")])
def test_a_full_disk_is_one_line(goldens, tmp_path, capsys, monkeypatch, words):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("hf_vit.checkpoints.save.save_file", Mock(side_effect=full))
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", Mock(side_effect=full))
    monkeypatch.setattr(np.lib.format, "write_array", Mock(side_effect=full))
    assert convert(goldens / "vt_token.npz", tmp_path / "vit", *words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: no space left for") and not list(tmp_path.iterdir())


def test_statistics_and_license(goldens, tmp_path, capsys):
    assert convert(goldens / "vt_token.npz", tmp_path / "a", "--image-mean", 0.1, 0.2, 0.3, "--image-std", 0.4) == 0
    assert "mean 0.1 0.2 0.3 std 0.4" in capsys.readouterr().out
    settings = json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.1, 0.2, 0.3] and settings["image_std"] == [0.4] * 3
    assert not (tmp_path / "a" / "README.md").exists()
    (tmp_path / "a" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    assert convert(tmp_path / "a", tmp_path / "b") == 0
    out = capsys.readouterr().out
    assert "license     cc-by-nc-4.0" in out
    assert "note        the license of these weights (cc-by-nc-4.0) is non-commercial" in out
    assert metadata_load(tmp_path / "b" / "README.md")["license"] == "cc-by-nc-4.0"
    assert json.loads((tmp_path / "b" / "preprocessor_config.json").read_text()) == settings
    assert convert(goldens / "vt_token.npz", tmp_path / "c", "--image-mean", 0.1, 0.2) == 2
    assert convert(goldens / "vt_token.npz", tmp_path / "c", "--image-std", 0) == 2


def test_weights_have_the_mode_of_the_umask(goldens, tmp_path):
    assert convert(goldens / "vt_token.npz", tmp_path / "a") == 0
    assert convert(goldens / "vt_token.npz", tmp_path / "a.safetensors", "--format", "timm") == 0
    (tmp_path / "usual").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    for file in (*(tmp_path / "a").iterdir(), tmp_path / "a.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == usual, file


def test_warnings_are_printed(goldens, tmp_path, capsys):
    with np.load(goldens / "vt_token.npz") as file:
        np.savez(tmp_path / "zero.npz", **{n: file[n] * (0 if n == "head/kernel" else 1) for n in file.files})
    assert convert(tmp_path / "zero.npz", tmp_path / "vit") == 0
    said = capsys.readouterr().err
    assert said.startswith("note: ") and "all zeros" in said and ".py" not in said


def test_pretrained_without_labels_becomes_a_classifier(tmp_path):
    model = HFViTForMaskedPatchPrediction(ours(num_labels=0).config)
    model.save_pretrained(tmp_path / "mpp")
    assert convert(tmp_path / "mpp", tmp_path / "vit", "--num-labels", 3) == 0
    found = HFViTForImageClassification.from_pretrained(tmp_path / "vit")
    same(found.vit, model.vit)
    assert found.config.num_labels == 3
