"""Cross-validation: every image held out once, one run a fold, resumable, summed up and combined.

pytest tests/training/test_folds.py
"""

import base64
import dataclasses
import io
import json
import re
import shutil

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_vit.errors import HFViTError
from hf_vit.hub.model_folder import files_to_upload
from training import finetune, train
from training.config.arguments import DataArguments
from training.config.parser import parse
from training.data.dataset import open_dataset
from training.data.splits import open_splits
from training.data.subsets import fold_numbers, take_fold
from training.metrics.outcomes import Outcomes


LINE = (
    "--set hidden_size=16 num_hidden_layers=1 num_attention_heads=2 intermediate_size=16 patch_size=4 --image_size 8 "
    "--use_cpu --disable_tqdm --per_device_train_batch_size 8 --max_steps 6 --warmup_steps 0 --learning_rate 0.02 "
    "--crop squash --no_flip"
)


def colors(root, counts, start=0):
    """Folder CLASS/*.png of plain colors; each file another shade."""
    for channel, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(start, start + count):
            pixels = np.full((8, 8, 3), number, np.uint8)
            pixels[..., channel % 3] += 120
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """21 training images of three classes and six of a test split."""
    root = tmp_path_factory.mktemp("images")
    colors(root / "train", {"red": 9, "green": 7, "blue": 5})
    colors(root / "test", {"red": 2, "green": 2, "blue": 2}, start=50)
    return root


@pytest.fixture(scope="module")
def validated(tmp_path_factory, images):
    out = tmp_path_factory.mktemp("runs") / "out"
    words = f"--dataset {images} --folds 3 --combine_folds average --output_dir {out}"
    return out, finetune.main([*LINE.split(), *words.split()])


def test_the_page_of_all_folds_judges_every_image_by_a_model_that_did_not_see_it(validated, images):
    out, _ = validated
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "could not be made" not in text and "of 21, by confident learning" in text and "±" in text
    assert not {"report.html", "mislabelled.csv"} & set(files_to_upload(out))
    right = sum(
        int((part.classes[:, 0] == part.labels).sum())
        for part in (Outcomes.load(out / f"fold-{fold}" / "outcomes.npz") for fold in (1, 2, 3))
    )
    diagonal = re.findall(r'class="right[^"]*"[^>]*>(\d*)</td>', text)
    assert sum(int(count or 0) for count in diagonal) == right
    # the images are those of the captions: each is of its label's color
    tiles = re.findall(r'base64,([^"]+)" alt="(red|green|blue)"', text)
    assert tiles
    for data, color in tiles:
        pixel = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[80, 80]
        assert ("red", "green", "blue")[int(pixel.argmax())] == color


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 4, 5, 9, 12]), min_size=2, max_size=8).filter(lambda c: max(c) > 1),
    folds=st.integers(2, 4),
    seed=st.integers(0, 3),
)
def test_folds_are_stratified_and_hold_out_every_image_once(counts, folds, seed):
    class Data:
        groups = None
        labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
        label_names = tuple(map(str, range(len(counts))))
        name = "data"

        def __len__(self):
            return len(self.labels)

    numbers = fold_numbers(Data(), folds, seed)
    single = np.flatnonzero(np.bincount(Data.labels) == 1)
    assert np.array_equal(numbers == 0, np.isin(Data.labels, single))
    sizes = np.bincount(numbers, minlength=folds + 1)[1:]
    assert sizes.max() - sizes.min() <= 1
    for label in np.flatnonzero(np.array(counts) > 1):
        held = np.bincount(numbers[Data.labels == label], minlength=folds + 1)[1:]
        assert held.max() - held.min() <= 1
    assert np.array_equal(numbers, fold_numbers(Data(), folds, seed))


def test_a_fold_and_the_rest_are_the_whole(images):
    data = open_dataset(str(images))
    parts = [take_fold(data, 3, fold) for fold in (1, 2, 3)]
    assert sorted(np.concatenate([held.rows for _, held in parts])) == list(range(21))
    for number, (kept, held) in enumerate(parts, start=1):
        assert sorted([*kept.rows, *held.rows]) == list(range(21))
        assert (kept.split, held.split) == (f"train without fold {number} of 3", f"train, fold {number} of 3")
    assert len({kept.fingerprint for kept, _ in parts}) == 3
    with pytest.raises(HFViTError, match=r"--folds 6 is above the 5 images of class 'blue' .* give --folds 5 or less"):
        take_fold(data, 6, 1)


def test_each_fold_is_a_run_and_the_summary_their_mean(validated, images):
    out, summary = validated
    assert json.loads((out / "folds.json").read_text()) == summary
    values = []
    for fold in (1, 2, 3):
        facts = json.loads((out / f"fold-{fold}/facts.json").read_text())
        assert facts["data"]["eval_split"] == f"train, fold {fold} of 3" and facts["data"]["train_images"] == 14
        assert len((out / f"fold-{fold}/held_out.txt").read_text().splitlines()) == 7
        values.append(next(row["value"] for row in facts["results"] if row["metric"] == "accuracy"))
        assert summary["runs"][fold - 1]["accuracy"] == values[-1] and summary["runs"][fold - 1]["n"] == 7
    assert summary["metrics"]["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert summary["metrics"]["accuracy"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert summary["n"] == 21


def test_the_averaged_model_has_the_mean_of_the_weights_and_is_scored_on_the_test_split(validated, images):
    out, summary = validated
    states = [AutoModelForImageClassification.from_pretrained(out / f"fold-{n}").state_dict() for n in (1, 2, 3)]
    for name, weight in AutoModelForImageClassification.from_pretrained(out).state_dict().items():
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(weight.double(), mean, atol=1e-7, rtol=1e-6)
    rows = {row["metric"]: row for row in summary["combined"]["results"]}
    assert (
        summary["combined"]["kind"] == "average" and rows["accuracy"]["n"] == 6 and rows["accuracy"]["split"] == "test"
    )
    facts = json.loads((out / "facts.json").read_text())
    assert (
        facts["results"] == summary["combined"]["results"] and "average of 3 models" in (out / "README.md").read_text()
    )


def test_an_interrupted_cross_validation_goes_on_and_other_images_are_refused(
    validated, images, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "moved"
    shutil.copytree(validated[0], out)
    shutil.rmtree(out / "fold-3")
    seen = []

    def run(arguments, stage, **more):
        seen.append((arguments.data.fold, more["more_follow"]))
        return {}

    monkeypatch.setattr(train, "run", run)
    words = [
        *LINE.split(),
        "--dataset",
        str(images),
        "--folds",
        "3",
        "--combine_folds",
        "average",
        "--output_dir",
        str(out),
    ]
    assert finetune.main([*words, "--resume_from_checkpoint"]) == {}
    assert seen == [(3, True)]
    other = colors(tmp_path / "other", {"red": 9, "green": 7, "blue": 5}, start=3)
    for line, message in (
        (words, "is not empty"),
        ([*words, "--resume_from_checkpoint", "--learning_rate", "0.03"], "--learning_rate was 0.02, is 0.03"),
        ([*words, "--resume_from_checkpoint", "--dataset", str(other)], "--dataset was"),
    ):
        with pytest.raises(SystemExit):
            finetune.main(line)
        assert message in capsys.readouterr().err


def test_a_fold_can_be_run_alone(validated, images, tmp_path):
    words = f"--dataset {images} --folds 3 --fold 2 --output_dir {tmp_path / 'out'}"
    facts = finetune.main([*LINE.split(), *words.split()])
    assert facts["results"] == json.loads((validated[0] / "fold-2/facts.json").read_text())["results"]


def test_from_python_with_the_ensembles_logits(images, tmp_path):
    data = [(str(path), path.parent.name) for path in sorted((images / "train").rglob("*.png"))]
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    options = {"dataset": data, "folds": 3, "set": size | {"patch_size": 4}, "image_size": 8, "use_cpu": True,
               "disable_tqdm": True, "per_device_train_batch_size": 8, "max_steps": 6, "warmup_steps": 0,
               "learning_rate": 0.02,
               "crop": "squash", "flip": False, "output_dir": tmp_path / "out"}  # fmt: skip
    with pytest.raises(HFViTError, match="--combine_folds ensemble needs images that no fold trains on"):
        finetune(**options, combine_folds="ensemble")
    result = finetune(**options, combine_folds="ensemble", eval_file=write_table(images, tmp_path))
    assert 0 <= result.metrics["accuracy"] <= 1 and result.metrics["accuracy_std"] >= 0
    with np.load(tmp_path / "out" / "ensemble.npz") as kept:
        logits, labels = kept["logits"], kept["labels"]
    assert logits.shape == (6, 3)
    row = next(row for row in result.facts["combined"]["results"] if row["metric"] == "accuracy")
    assert row["value"] == pytest.approx((logits.argmax(-1) == labels).mean())
    predicted = result.predict([str(images / "test/red/50.png")])
    assert list(predicted.columns[3:]) == ["blue", "green", "red"]


def write_table(images, folder):
    rows = [f"{path},{path.parent.name}" for path in sorted((images / "test").rglob("*.png"))]
    (folder / "test.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    return str(folder / "test.csv")


def test_a_class_of_one_image_stays_in_training_and_is_named(tmp_path, capsys):
    images = colors(tmp_path / "images", {"red": 6, "green": 6, "rare": 1})
    for words in ("--folds 3 --fold 1", "--dev_fraction 0.6"):
        out = tmp_path / words[2:6]
        line = f"--dataset {images} --output_dir {out} {words} --max_steps 1"
        facts = finetune.main([*LINE.split(), *line.split(), "--per_device_train_batch_size", "2"])
        assert "classes of a single image, which stays in training: rare" in capsys.readouterr().out
        assert facts["data"]["label_names"] == ["green", "rare", "red"]
        held = (out / "held_out.txt").read_text().splitlines()
        assert len(held) >= 4 and "rare" not in "".join(held)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--folds 1", "--folds 1: give 2 or more"),
        ("--fold 1", "--fold 1 is one of --folds K"),
        ("--folds 3 --fold 4", "--fold 4: give 1 to 3"),
        ("--folds 3 --dev_fraction 0.1", "leave out one of them"),
        ("--folds 3 --eval_split test", "leave out --eval_split"),
        ("--folds 3 --eval_file t.csv", "leave out --eval_file"),
        ("--combine_folds average", "combines --folds K"),
        ("--folds 3 --fold 1 --combine_folds average", "leave out --fold"),
        ("--folds 3 --push_to_hub", "leave out --push_to_hub"),
        ("--folds 3 --resume_from_checkpoint out/checkpoint-3", "--folds is many runs"),
        ("--folds 3 --loss masked_patches", "no classes to cross-validate"),
    ],
)
def test_folds_that_cannot_be_meant(words, message):
    with pytest.raises(HFViTError, match=message):
        parse([*LINE.split(), "--dataset", "digits", "--output_dir", "out", *words.split()], "finetune")


def grouped_table(root, animals=8, images=3):
    """Three pictures of each animal, of one kind or the other; the table says which animal is on each."""
    root.mkdir()
    lines = ["file,kind,animal"]
    for animal in range(animals):
        for number in range(images):
            pixels = np.full((8, 8, 3), 20 * animal + number, np.uint8)
            Image.fromarray(pixels).save(root / f"{animal}-{number}.png")
            lines.append(f"{animal}-{number}.png,{'cat' if animal % 2 else 'dog'},{animal}")
    (root / "table.csv").write_text("\n".join(lines))
    return root / "table.csv"


def animals_of(dataset):
    return {dataset.image_name(index).split("-")[0] for index in range(len(dataset))}


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame", "arrays"])
def test_images_of_a_group_are_never_split(tmp_path, kind):
    table = grouped_table(tmp_path / "data")
    frame = pandas.read_csv(table)
    data = str(table)
    if kind == "parquet":
        data = str(table.with_suffix(".parquet"))
        frame.to_parquet(data)
    elif kind != "csv":
        frame["file"] = [str(table.parent / name) for name in frame["file"]]
        data = frame
        if kind == "arrays":
            data = frame.assign(file=[np.asarray(Image.open(name)) for name in frame["file"]])
    options = {"label_column": "kind", "image_column": "file", "group_column": "animal", "cache_dir": str(tmp_path)}
    for choice in ({"dev_fraction": 0.25}, *({"folds": 4, "fold": fold} for fold in (1, 2, 3, 4))):
        arguments = dataclasses.replace(DataArguments(dataset="x", **options, **choice), dataset=data)
        found = open_splits(arguments, 0, lambda text: None)
        train_groups, held_out = set(found.train.groups), set(found.evaluation.groups)
        assert not train_groups & held_out and len(train_groups | held_out) == 8
        assert len(found.evaluation) == 6 and set(found.evaluation.labels) == {0, 1}  # an animal of each kind


def test_groups_that_cannot_be_divided_are_one_line(tmp_path):
    table = grouped_table(tmp_path / "data", animals=4)
    options = {"label_column": "kind", "dataset": str(table)}

    def opened(**more):
        return open_splits(DataArguments(**options, **more), 0, lambda text: None)

    with pytest.raises(HFViTError, match=r"--folds 5 divides groups, and .* has 4 that can be held out"):
        opened(folds=5, group_column="animal")
    with pytest.raises(HFViTError, match="has no column 'patient'; its columns are file, kind, animal"):
        opened(folds=2, group_column="patient")
    with pytest.raises(HFViTError, match="'digits' is no table and has no column 'animal': leave out --group_column"):
        open_splits(DataArguments(dataset="digits", group_column="animal"), 0, lambda text: None)
    with pytest.raises(HFViTError, match="has 0 that can be held out"):  # one group a class: nothing to learn from
        opened(group_column="kind")


def test_an_empty_group_is_one_of_its_own_and_groups_on_both_sides_are_said(tmp_path):
    table = grouped_table(tmp_path / "data")
    text = table.read_text().replace("0-1.png,dog,0", "0-1.png,dog,")
    table.write_text(text)
    said: list[str] = []
    options = {"label_column": "kind", "group_column": "animal", "eval_file": str(table)}
    found = open_splits(DataArguments(dataset=str(table), **options), 0, said.append)
    assert len(set(found.train.groups)) == 9
    assert any(line.startswith("8 groups of 'animal' are in training and in evaluation") for line in said)


def test_each_image_has_the_prediction_of_the_run_that_did_not_see_it(validated, images):
    out, summary = validated
    with np.load(out / "out_of_fold.npz") as saved:
        found = {name: saved[name] for name in saved.files}
    data = open_dataset(str(images), split="train")
    assert sorted(found["names"]) == sorted(data.image_name(index) for index in range(len(data)))
    assert found["logits"].shape == (21, 3) and found["label_names"].tolist() == data.label_names
    for fold in (1, 2, 3):
        own = found["fold"] == fold
        held_out = (out / f"fold-{fold}/held_out.txt").read_text().splitlines()
        assert found["names"][own].tolist() == held_out
        accuracy = (found["logits"][own].argmax(1) == found["labels"][own]).mean()
        assert accuracy == pytest.approx(summary["runs"][fold - 1]["accuracy"])
