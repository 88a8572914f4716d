"""Any image classifier: images as from its own processor, and what its head reads.

pytest tests/training/evaluation/test_classifier.py
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoImageProcessor,
)

from hf_vit.errors import HFViTError
from hf_vit.problem_type import SINGLE_LABEL
from tests.helpers.tiny_classifiers import DIGITS, save_tiny
from training.build_model import load_pretrained
from training.data.dataset import open_dataset
from training.data.transforms import ProcessorTransform
from training.evaluation import features
from training.evaluation.classifier import open_classifier
from training.evaluation.evaluate_classifier import batches, create_context, preprocessing
from training.evaluation.report import describe_view


@pytest.mark.parametrize("name", ["vit", "efficientnet", "bit"])
def test_images_reach_the_model_as_from_its_own_processor(models, name):
    classifier, data = open_classifier(models[name]), open_dataset("digits", split="test[:3]")
    found = next(batches(classifier, data, create_context(True, batch_size=3)))[0][:, 0]
    own = AutoImageProcessor.from_pretrained(models[name], backend="pil")
    expected = own([data.read(index)[0] for index in range(3)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_features_are_what_the_classifier_reads(models):
    for name in ("ours", "vit", "bit", "resnet", "efficientnet"):
        classifier = open_classifier(models[name])
        pixels = torch.randn(3, 3, *classifier.transform.image_size_hw)
        with torch.no_grad():
            found, logits = classifier.features(pixels), classifier.logits(pixels)
            head = [layer for layer in classifier.model.modules() if isinstance(layer, torch.nn.Linear)][-1]
            torch.testing.assert_close(head(found), logits)
        mark = features.model_fingerprint(classifier.model)
        assert mark == features.model_fingerprint(open_classifier(models[name]).model)
        head.bias.data[0] += 1e-3
        assert mark != features.model_fingerprint(classifier.model)


def test_a_model_of_the_hub_without_network_is_an_error_at_once(monkeypatch):
    def model_info(self, name, timeout):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(HFViTError, match=r"nor a Hub model that can be reached now \(no route\)"):
        open_classifier("google/vit-base-patch16-224")


def test_crops_of_a_processor_that_does_more_than_crop_are_refused(models):
    classifier = open_classifier(models["ours"])
    classifier.transform = ProcessorTransform((16, 16))
    with pytest.raises(HFViTError, match=r"--tta five_crop: .* use --tta none or flip"):
        next(batches(classifier, open_dataset("digits", split="test[:3]"), create_context(True), "five_crop"))
    assert describe_view(preprocessing(classifier, "none")) == "NoneType, squash, tta none"


def change_settings(folder, file, **settings):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))


@pytest.mark.parametrize(
    "file, settings, message",
    [
        ("config.json", {"model_type": "own", "auto_map": {
            "AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}}, "which is never run here"),
        ("preprocessor_config.json", {"image_processor_type": "Own", "auto_map": {
            "AutoImageProcessor": "own.Own"}}, r"code of its own \(own.Own\), which is never run here"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["ours", "resnet"])
def test_code_of_a_model_is_refused_without_a_question(models, tmp_path, monkeypatch, file, settings, message, kind):
    folder = shutil.copytree(models[kind], tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    change_settings(folder, file, **settings)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(HFViTError, match=message) as caught:
        open_classifier(str(folder))
    assert "\n" not in str(caught.value)
    with pytest.raises(HFViTError):
        asked = SimpleNamespace(model=str(folder), set={}, image_size=None, keep_representation=False)
        load_pretrained(asked, {}, SINGLE_LABEL)
    assert not (tmp_path / "ran").exists()


def test_code_next_to_a_known_architecture_is_not_run(models, tmp_path):
    folder = shutil.copytree(models["vit"], tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
    change_settings(folder, "config.json", auto_map=auto_map)
    pixels = torch.randn(1, 3, *open_classifier(models["vit"]).transform.image_size_hw)
    with torch.no_grad():
        torch.testing.assert_close(
            open_classifier(str(folder)).logits(pixels), open_classifier(models["vit"]).logits(pixels)
        )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", ["{oh", "[]", '{"image_processor_type": "NoSuchProcessor", "image_mean": [0.1, 0.2, 0.3]}']
)
def test_a_processor_that_cannot_be_used_is_not_replaced_by_another(models, tmp_path, content):
    folder = shutil.copytree(models["ours"], tmp_path / "model")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(HFViTError, match=r"preprocessor_config\.json: "):
        open_classifier(str(folder))


def test_weights_without_a_processor_get_googles_numbers(models):
    assert not list(Path(models["ours"]).glob("*processor*"))
    assert open_classifier(models["ours"]).normalize.mean == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("value", [None, 3, [1], "x"])
def test_a_config_on_which_transformers_fails_is_read_as_a_checkpoint(tmp_path, value):
    """AutoConfig itself ends in a TypeError for an auto_map that is no mapping."""
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": value}))
    assert open_classifier(str(tmp_path)).label_names == list(DIGITS.values())
