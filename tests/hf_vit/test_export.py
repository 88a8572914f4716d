"""Exported models agree with ours, at sizes they were not made for, and say what int8 changes.

python -m pytest tests/hf_vit/test_export.py
"""

import json
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.cli.export import account_table
from hf_vit.cli.inputs import find_images, load_model, read_images
from hf_vit.cli.main import main
from hf_vit.export import _positions, compare_int8


SMALL = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "id2label": {0: "red", 1: "green", 2: "blue"},
}  # fmt: skip
HYBRID = {"resnet_depths": (1, 1), "resnet_width_factor": 0.5, "patch_size": 1}


def saved(folder, **fields):
    """A tiny classifier with random weights everywhere, and its processor."""
    torch.manual_seed(0)
    model = HFViTForImageClassification(HFViTConfig(**(SMALL | fields)))
    if model.config.num_labels:
        torch.nn.init.normal_(model.classifier.weight)
    if model.vit.embeddings.position_embeddings is not None:
        torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def export(capsys, *words):
    status = main(["export", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize("fields", [{}, HYBRID], ids=["vit", "hybrid"])
def test_onnx_of_any_batch_and_size(fields, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    account = export(capsys, saved(tmp_path / "model", **fields), tmp_path / "out", "--dynamic-size")
    assert len(account["checked"]) == 4 and all(row["largest_difference"] < 1e-4 for row in account["checked"])
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    assert [axis if isinstance(axis, int) else "any" for axis in session.get_inputs()[0].shape] == [
        "any",
        3,
        "any",
        "any",
    ]
    pixels = torch.randn(5, 3, 64, 96)
    found = session.run(None, {"pixel_values": pixels.numpy()})[0]
    expected = HFViTForImageClassification.from_pretrained(tmp_path / "model").eval()(pixels).logits.detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    assert {"config.json", "preprocessor_config.json", "export.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("fields", [{}, HYBRID], ids=["vit", "hybrid"])
def test_torch_export_of_any_batch_and_size(fields, tmp_path, capsys):
    folder = saved(tmp_path / "model", **fields)
    account = export(capsys, folder, tmp_path / "out", "--format", "torch-export", "--dynamic-size")
    assert len(account["checked"]) == 4 and all(row["largest_difference"] < 1e-4 for row in account["checked"])
    program, pixels = torch.export.load(tmp_path / "out" / "model.pt2").module(), torch.randn(5, 3, 48, 72)
    expected = HFViTForImageClassification.from_pretrained(folder).eval()(pixels).logits.detach()
    torch.testing.assert_close(program(pixels).detach(), expected, atol=1e-4, rtol=1e-4)
    assert account.get("size_multiple_of") == ([8, 8] if fields else None)
    if not fields:
        assert program(torch.zeros(1, 3, 37, 51)).shape == (1, 3)


def test_a_fixed_size_stays_fixed(tmp_path, capsys):
    account = export(capsys, saved(tmp_path / "model"), tmp_path / "out", "--format", "torch-export")
    assert [(row["height"], row["width"]) for row in account["checked"]] == [(32, 32)] * 2
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert program(torch.zeros(4, 3, 32, 32)).shape == (4, 3)
    with pytest.raises(Exception, match="32"):
        program(torch.zeros(1, 3, 40, 40))


@pytest.mark.parametrize(
    ("kind", "fields"), [("dynamic", {}), ("weights", {}), ("dynamic", HYBRID), ("weights", HYBRID)]
)
def test_int8_is_smaller_and_measured(kind, fields, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    from onnx import numpy_helper

    random = np.random.default_rng(0)
    for name in ("red", "green"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = random.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    model = saved(tmp_path / "model", hidden_size=64, intermediate_size=256, **fields)
    account = export(capsys, model, tmp_path / "out", "--int8", kind, "--images", tmp_path / "images")
    share = account["files"]["model.int8.onnx"] / account["files"]["model.onnx"]
    assert share < (0.9 if fields else 0.6)  # some of the ResNet stays float32
    if kind == "dynamic":  # 7 bits, which do not overflow where the processor adds in 16
        graph = onnx.load(tmp_path / "out" / "model.int8.onnx").graph
        weights = [numpy_helper.to_array(one) for one in graph.initializer if one.data_type == onnx.TensorProto.INT8]
        largest = [abs(weight.astype(int)).max() for weight in weights if weight.size > 1000]
        assert len(largest) >= 8 and all(32 < value <= 64 for value in largest)
    int8 = account["int8"]
    assert int8["n"] == int8["labelled"] == 6 and int8["same_label"] >= 0.8
    assert 0 < int8["largest_probability_change"] < 0.2
    assert abs(int8["accuracy_float32"] - int8["accuracy_int8"]) <= 1 - int8["same_label"] + 1e-9


def test_int8_is_measured_against_the_names_of_folders(tmp_path, monkeypatch):
    """Of three labelled images two are right before and one after; a fourth lies in a folder that is no label."""
    answers = {"model.onnx": {"blue": 2, "elsewhere": 0, "green": 1, "red": 2}}
    answers["model.int8.onnx"] = answers["model.onnx"] | {"green": 0}
    for name in answers["model.onnx"]:
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    rest = {file: iter(sorted(found)) for file, found in answers.items()}

    def stand_in(path):
        return lambda pixels: 9.0 * np.eye(3)[[answers[path.name][next(rest[path.name])]]]

    monkeypatch.setattr("hf_vit.export.runner", stand_in)
    found = compare_int8(
        load_model(str(saved(tmp_path / "model"))),
        tmp_path,
        read_images(find_images([str(tmp_path / "images")]), 3, []),
    )
    assert (found["n"], found["same_label"], found["labelled"]) == (4, 0.75, 3)
    assert (found["accuracy_float32"], found["accuracy_int8"]) == pytest.approx((2 / 3, 1 / 3))
    table = account_table({"output": "out", "files": {}, "checked": [], "int8": found | {"kind": "dynamic"}})
    assert table.endswith("same label on 75.0% of 4 images, accuracy 66.67% -> 33.33% on 3")


@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding_type": "learned1d"},
        *({"position_interpolation": name} for name in ("bilinear_align_corners", "bicubic", "bicubic_antialias")),
        {"use_class_token": False, "pooling": "gap"},
    ],
)
def test_positions_of_any_grid_are_the_models(fields):
    embeddings = HFViTForImageClassification(HFViTConfig(**(SMALL | fields))).vit.embeddings
    torch.nn.init.normal_(embeddings.position_embeddings)
    for grid in ((4, 4), (6, 3)):
        torch.testing.assert_close(_positions(embeddings, grid), embeddings.patch_positions(grid))


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_full_disk_is_one_line_and_leaves_nothing(format, tmp_path, capsys):
    """A limit on the size of files stands for the disk; writing by itself, torch would end the process."""
    model = saved(tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        assert main(["export", str(model), str(tmp_path / "out"), "--format", format]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "no space left for" in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_is_one_line_and_leaves_nothing(tmp_path, capsys):
    model = saved(tmp_path / "model")

    def refused(*words):
        capsys.readouterr()  # what saving a model printed
        try:
            assert main(["export", str(model), *map(str, words)]) == 2
        except SystemExit as stop:
            assert stop.code == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        return line

    assert "invalid choice: 'tflite'" in refused(tmp_path / "out", "--format", "tflite")
    assert "leave --format out" in refused(tmp_path / "out", "--format", "torch-export", "--int8", "dynamic")
    assert "give --int8 too" in refused(tmp_path / "out", "--images", "x.png")
    assert "something already" in refused(model)
    assert "no image at 'x.png'" in refused(tmp_path / "out", "--int8", "weights", "--images", "x.png")
    saved(model, num_labels=0, id2label=None)
    assert "has no classifier" in refused(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_disagrees_is_not_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_vit.export.runner", lambda path: lambda pixels: np.full((len(pixels), 3), 7.0))
    words = ["export", str(saved(tmp_path / "model")), str(tmp_path / "out"), "--format", "torch-export"]
    assert main(words) == 2
    assert "differs from the model" in capsys.readouterr().err and not (tmp_path / "out").exists()
