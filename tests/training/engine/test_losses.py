"""The loss, against its formulas.

pytest tests/training/engine/test_losses.py
"""

import math

import pytest
import torch
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.errors import HFViTError
from training.engine.losses import ClassificationLoss, Normalize, balanced_weights, cross_entropy, log_priors


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]])
LABELS = torch.tensor([0, 1])
SOFT = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]])


@pytest.mark.parametrize("labels", [LABELS, SOFT])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_is_minus_y_log_p(labels, smoothing):
    targets = labels if labels.ndim == 2 else torch.eye(3)[labels]
    targets = targets * (1 - smoothing) + smoothing / 3
    expected = -(targets * LOGITS.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(cross_entropy(LOGITS, labels, "softmax", smoothing), expected)


@pytest.mark.parametrize("labels", [LABELS, SOFT])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_is_big_visions_sum_over_classes(labels, smoothing):
    targets = labels if labels.ndim == 2 else torch.eye(3)[labels]
    targets = targets * (1 - smoothing) + smoothing / 3
    log_p, log_not_p = torch.nn.functional.logsigmoid(LOGITS), torch.nn.functional.logsigmoid(-LOGITS)
    expected = -(targets * log_p + (1 - targets) * log_not_p).sum(-1)
    torch.testing.assert_close(cross_entropy(LOGITS, labels, "sigmoid", smoothing), expected)


def test_smoothing_is_for_training_only_and_the_config_stays_clean():
    torch.manual_seed(0)
    model = HFViTForImageClassification(HFViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3))  # fmt: skip
    torch.nn.init.normal_(model.classifier.weight)
    loss_module, pixels = ClassificationLoss(model, smoothing=0.3), torch.randn(2, 3, 8, 8)
    smooth = loss_module.train()(pixels, SOFT)[0]
    losses, logits, _ = loss_module.eval()(pixels, LABELS)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, LABELS, reduction="none"))
    assert not torch.allclose(smooth, cross_entropy(logits, SOFT))
    assert model.config.problem_type is None


def test_a_frozen_backbone_is_read_as_in_evaluation():
    torch.manual_seed(0)
    model = HFViTForImageClassification(HFViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.5))  # fmt: skip
    torch.nn.init.normal_(model.classifier.weight)
    pixels, loss_module = torch.randn(2, 3, 8, 8), ClassificationLoss(model)
    assert not torch.equal(loss_module.train()(pixels, LABELS)[1], loss_module.eval()(pixels, LABELS)[1])
    model.freeze_backbone()
    assert torch.equal(loss_module.train()(pixels, LABELS)[1], loss_module.eval()(pixels, LABELS)[1])
    assert model.classifier.training is False and loss_module.train().model.classifier.training


def test_normalizing_agrees_with_the_image_processor():
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.5]
    )
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.5])(image[None]), expected, atol=1e-6, rtol=0)
    floats = torch.randn(1, 3, 8, 8)
    assert Normalize([0.5] * 3, [0.5] * 3)(floats) is floats


def test_balanced_weights_make_classes_count_alike_and_leave_the_evaluation_alone():
    class Data:
        labels = [0, 0, 0, 0, 0, 0, 1, 1]

    weights = balanced_weights(Data(), 3)
    assert weights.tolist() == pytest.approx([8 / 12, 8 / 4, 0.0])
    assert weights[torch.tensor(Data.labels)].mean() == pytest.approx(1)

    class Logits(torch.nn.Module):
        def forward(self, pixels):
            return type("Output", (), {"logits": pixels})

    module, logits, labels = (
        ClassificationLoss(Logits(), class_weights=weights),
        torch.zeros(2, 3),
        torch.tensor([0, 1]),
    )
    losses = module.train()(logits, labels)[0]
    assert losses.tolist() == pytest.approx([math.log(3) * 8 / 12, math.log(3) * 2])
    soft = torch.tensor([[0.5, 0.5, 0.0]])
    assert module(logits[:1], soft)[0].item() == pytest.approx(float(losses.mean()))
    assert module.eval()(logits, labels)[0].tolist() == pytest.approx([math.log(3)] * 2)
    with pytest.raises(HFViTError, match="leave out --streaming"):
        balanced_weights(object(), 3)


def test_logit_adjustment_adds_the_priors_in_training_alone():
    class Data:
        labels = [0] * 6 + [1] * 2

    class Logits(torch.nn.Module):
        def forward(self, pixels):
            return type("Output", (), {"logits": pixels})

    priors = log_priors(Data(), 3)  # the third class, which has no image, counts as one
    assert priors.exp().tolist() == pytest.approx([6 / 9, 2 / 9, 1 / 9])
    module = ClassificationLoss(Logits(), smoothing=0.1, logit_adjustment=2 * priors)
    losses, logits, _ = module.train()(LOGITS, LABELS)
    expected = torch.nn.functional.cross_entropy(LOGITS + 2 * priors, LABELS, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(logits, LOGITS)  # what the training accuracy counts
    torch.testing.assert_close(module.eval()(LOGITS, LABELS)[0], cross_entropy(LOGITS, LABELS))
