"""A head that begins as a logistic regression on frozen features, and the recipes that begin with it.

pytest tests/training/engine/test_head_probe.py
"""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.errors import HFViTError
from training import finetune
from training.config.parser import parse
from training.data.dataset import open_dataset
from training.data.normalize import Normalize
from training.data.transforms import EvalTransform
from training.engine import head_probe
from training.engine.head_probe import fit, init_head


CLASSES = ("dark", "light", "left")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """40 images a class to train and 10 to test, which a linear layer on any features tells apart."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for label in CLASSES:
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 60, (12, 12, 3), dtype=np.uint8)
                pixels[:, : {"dark": 0, "light": 12, "left": 6}[label]] += 150
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    config = HFViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                         image_size=12, patch_size=4, num_labels=0)  # fmt: skip
    HFViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def line(images, pretrained, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    words = f"--model {pretrained} --dataset {images} --cache_dir {cache} --use_cpu --disable_tqdm"
    return words.split()


def blobs(count, classes=3, width=5, seed=0):
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return random.normal(size=(classes, width))[labels] * 3 + random.normal(size=(count, width)), labels


def test_the_head_is_scikit_learns_logistic_regression_on_standardized_features():
    features, labels = blobs(300)
    weight, bias, found = fit(features, labels, 3, seed=0)
    scaler = StandardScaler().fit(features)
    reference = LogisticRegression(C=found["C"], max_iter=1000).fit(scaler.transform(features), labels)
    logits = features @ weight.T + bias
    expected = reference.decision_function(scaler.transform(features))
    np.testing.assert_allclose(logits - logits.mean(1, keepdims=True), expected, atol=1e-3)
    assert found["n"] == 60 and found["accuracy"] > 0.9 and weight.dtype == np.float32


def test_the_penalty_is_chosen_by_likelihood_where_accuracy_would_choose_another():
    """Twelve held-out images have thirteen accuracies; by them the head of a small set was several points worse."""
    random, labels = np.random.default_rng(2), np.arange(60) % 3
    features = random.normal(size=(3, 30))[labels] * 0.5 + random.normal(size=(60, 30))
    kept, held_out = train_test_split(np.arange(60), test_size=12, random_state=0, stratify=labels)
    x = StandardScaler().fit_transform(features)
    probes = {c: LogisticRegression(C=c, max_iter=1000).fit(x[kept], labels[kept]) for c in head_probe.PENALTIES}
    by_loss = min(probes, key=lambda c: log_loss(labels[held_out], probes[c].predict_proba(x[held_out])))
    by_accuracy = max(probes, key=lambda c: probes[c].score(x[held_out], labels[held_out]))
    assert fit(features, labels, 3, seed=0)[2]["C"] == by_loss != by_accuracy


def test_two_classes_and_a_class_without_images():
    features, labels = blobs(80, classes=2)
    weight, bias, _ = fit(features, labels * 2, 3, seed=0)  # classes 0 and 2; of 1 there is no image
    scores = features @ weight.T + bias
    probability = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert (scores.argmax(1) == labels * 2).mean() > 0.9 and probability[:, 1].max() < 1e-3
    scaler = StandardScaler().fit(features)
    chosen = fit(features, labels, 2, seed=0)
    reference = LogisticRegression(C=chosen[2]["C"], max_iter=1000).fit(scaler.transform(features), labels)
    two = features @ chosen[0].T + chosen[1]
    np.testing.assert_allclose(
        two[:, 1] - two[:, 0], reference.decision_function(scaler.transform(features)), atol=1e-3
    )


def test_classes_with_one_image_are_fitted_and_never_held_out():
    features, labels = blobs(40, classes=2)
    features, labels = np.concatenate([features, [[50.0] * 5]]), np.append(labels, 2)
    weight, bias, found = fit(features, labels, 3, seed=0)
    assert (features @ weight.T + bias)[-1].argmax() == 2 and found["n"] == 8
    few, few_labels = blobs(3)
    assert fit(few, few_labels, 3, seed=0)[2]["n"] == 0  # nothing to choose on
    with pytest.raises(HFViTError, match="two or more classes, got 1"):
        fit(features[:3], np.zeros(3, int), 3, seed=0)
    with pytest.raises(HFViTError, match="not finite"):
        fit(np.full((4, 2), np.nan), np.array([0, 1, 0, 1]), 2, seed=0)


def test_features_are_computed_once_and_kept(images, pretrained, tmp_path, monkeypatch):
    train = open_dataset(str(images), split="train").with_transform(EvalTransform((12, 12)), 0)
    normalize, args = Normalize([0.5] * 3, [0.5] * 3), parse(["--use_cpu", "--output_dir", "x"], "finetune").train
    model = HFViTForImageClassification.from_pretrained(pretrained)
    model.replace_head(3)
    seen = []
    found = init_head(model, train, normalize, args, tmp_path, on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)] and found["accuracy"] > 0.9
    with torch.no_grad():
        batch = torch.stack([train[(0, index)]["pixel_values"] for index in range(len(train))])
        predicted = model.eval()(normalize(batch)).logits.argmax(-1)
    assert float((predicted == torch.as_tensor(train.labels)).float().mean()) > 0.95
    again = HFViTForImageClassification.from_pretrained(pretrained)
    again.replace_head(3)
    monkeypatch.setattr(head_probe, "create_loader", None)
    init_head(again, train, normalize, args, tmp_path)
    assert torch.equal(model.classifier.weight, again.classifier.weight)


def test_the_recipe_probe_makes_a_finished_model_without_a_step(line, tmp_path, capsys):
    out = tmp_path / "out"
    facts = finetune.main([*line, "--config", "probe", "--output_dir", str(out)])
    assert facts["training"]["steps"] == 0 and facts["results"][0]["n"] == 30
    accuracy = next(row["value"] for row in facts["results"] if row["metric"] == "accuracy")
    assert accuracy > 0.9 and (out / "README.md").is_file() and (out / "model.safetensors").is_file()
    said = capsys.readouterr().out
    assert "head: logistic regression on frozen features of 120 images" in said and "training loss" not in said
    logits = HFViTForImageClassification.from_pretrained(out)(torch.zeros(1, 3, 12, 12)).logits
    assert CLASSES[int(logits.argmax())]  # loads with a head of the data's classes


def test_fine_tuning_from_the_probe_says_both_numbers_and_keeps_the_better(line, tmp_path, capsys):
    words = [*line, "--config", "finetune_foundation", "--num_train_epochs", "2", "--warmup_steps", "0"]
    facts = finetune.main([*words, "--output_dir", str(tmp_path / "good")])
    said = capsys.readouterr().out
    text = next(row for row in said.splitlines() if row.startswith("loss on train"))
    assert re.search(r"before training [\d.]+ with accuracy [\d.]+%, best of training [\d.]+ with accuracy", text)
    assert "kept: those" in text
    worse = finetune.main([*words, "--learning_rate", "0.3", "--optim", "sgd", "--output_dir", str(tmp_path / "bad")])
    assert "kept: those before training" in capsys.readouterr().out
    first = json.loads((tmp_path / "bad/history.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and worse["training"]["best_step"] == 0
    kept = next(row["value"] for row in worse["results"] if row["metric"] == "accuracy")
    assert kept == first["eval_accuracy"] and facts["training"]["steps"] > 0
    assert facts["data"]["train_images"] == 96  # a fifth of train is the dev split; the test split is not looked at


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--head_init probe --preset vit-tiny-patch16-224", "reads the features of a pre-trained --model"),
        ("--max_steps 0", "--max_steps 0: give steps above 0, or -1"),
        ("--head_init probe --model x --loss sigmoid", "is for --loss softmax, not sigmoid"),
        ("--head_init probe --model x --streaming", "reads the training images twice: leave out --streaming"),
    ],
)
def test_refusals_are_one_line(words, message):
    with pytest.raises(HFViTError, match=message):
        parse(words.split(), "finetune")


def test_a_set_smaller_than_the_default_batch_trains_and_is_previewed(line, tmp_path, capsys):
    small = [*line, "--samples_per_class", "5", "--num_train_epochs", "1", "--warmup_steps", "0"]
    facts = finetune.main([*small, "--output_dir", str(tmp_path / "out")])
    assert facts["training"]["global_batch_size"] == 15 and facts["training"]["steps"] == 1
    assert "note: the 15 training images are fewer than the default batch: steps of 15" in capsys.readouterr().out
    finetune.main([*small, "--output_dir", str(tmp_path / "seen"), "--preview", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").is_file()
    with pytest.raises(SystemExit):
        finetune.main([*small, "--output_dir", str(tmp_path / "no"), "--per_device_train_batch_size", "64"])
    assert "is larger than the 15 training images" in capsys.readouterr().err
