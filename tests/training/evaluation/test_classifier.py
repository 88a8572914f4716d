"""Any image classifier: images as from its own processor, and what its head reads.

pytest tests/training/evaluation/test_classifier.py
"""

import pytest
import torch
from transformers import (
    AutoImageProcessor,
)

from hf_vit.errors import HFViTError
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
