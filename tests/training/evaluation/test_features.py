"""Probes, and the features on disk that they read.

pytest tests/training/evaluation/test_features.py
"""

import numpy as np
import pytest
from PIL import Image

from hf_vit.image_io import UnreadableImage
from tests.helpers.tiny_classifiers import run, save_tiny, value
from training.data.dataset import open_dataset
from training.evaluation import features
from training.evaluation.classifier import open_classifier
from training.evaluation.evaluate_classifier import create_context
from training.evaluation.features import compute_features


def test_probes_and_their_features_on_disk(models, tmp_path, monkeypatch):
    options = {"model": models["ours"], "dataset": "digits", "few_shot": [1, 5], "knn": 5, "cache_dir": tmp_path}
    first = run(**options)
    assert len([row for row in first["results"] if "_shot_" in row["metric"]]) == 6
    assert value(first, "5_nn_accuracy") > 0.3  # weights are random, chance is 0.1

    def never(*args):
        raise AssertionError("features are computed a second time")

    monkeypatch.setattr(features, "batches", never)
    assert run(**options)["results"] == first["results"]
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AssertionError, match="a second time"):
        run(**options | {"model": other})


def test_features_without_the_unreadable_are_not_given_where_those_should_stop(models, tmp_path):
    for label in ("0", "1"):
        for number in range(3):
            path = tmp_path / "images" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (90 * int(label), 50 * number, 0)).save(path)
    path.write_bytes(b"broken")
    classifier, context = open_classifier(models["ours"]), create_context(True)
    for cached in (False, True):
        found = compute_features(classifier, open_dataset(str(tmp_path / "images"), split="train"), context, tmp_path)
        assert (found.labels.tolist(), found.cached) == ([0, 0, 0, 1, 1], cached)
    stopping = open_dataset(str(tmp_path / "images"), split="train", on_unreadable="stop")
    with pytest.raises(UnreadableImage, match=r"1/2\.png"):
        compute_features(classifier, stopping, context, tmp_path)


def test_other_images_or_another_view_have_other_features(models, tmp_path):
    context, data = create_context(True), open_dataset("digits", split="test[:6]")
    for crop_pct, images in ((None, data), (None, data.select([1, 0, 2, 3, 4, 5])), (0.8, data)):
        classifier = open_classifier(models["ours"], crop_pct=crop_pct)
        found = compute_features(classifier, images, context, tmp_path)
        assert not found.cached
        np.testing.assert_array_equal(found.features, compute_features(classifier, images, context, tmp_path).features)


@pytest.mark.slow
def test_probes_on_photographs(shared, tmp_path):
    model = save_tiny(tmp_path / "model", size=32)
    facts = run(model=model, dataset=shared / "data" / "oxford_flowers12", few_shot=[1, 5, 10, 25], knn=20,
                cache_dir=tmp_path)  # fmt: skip
    chance = 1 / 12
    assert value(facts, "20_nn_accuracy") > 2 * chance
    few = {row["metric"]: [] for row in facts["results"]}
    for row in facts["results"]:
        few[row["metric"]].append(row["value"])
    assert np.mean(few["25_shot_accuracy"]) > np.mean(few["1_shot_accuracy"]) > chance
