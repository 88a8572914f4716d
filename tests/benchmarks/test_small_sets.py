"""Small sets: who trains on what, equal time, values tried on dev alone, results that are not computed twice.

pytest tests/benchmarks/test_small_sets.py; the baselines need torchvision (transformers) and timm with a clone of it.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vit import ViTImageProcessorPil as ViTImageProcessor

from benchmarks import small_sets
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.errors import HFViTError
from training.config.parser import parse
from training.data.dataset import open_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pools of two sets with 12 and 8 images of each of two classes, and a base."""
    folder, random = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for source in ("cifar10", "digits"):
        for split, count in (("train", 12), ("test", 8)):
            for level, label in ((40, "dark"), (200, "light")):
                path = folder / "pools" / source / split / label
                path.mkdir(parents=True)
                for number in range(count):
                    pixels = (level + random.integers(0, 20, (32, 32, 3))).astype(np.uint8)
                    Image.fromarray(pixels).save(path / f"{number}.png")
    torch.manual_seed(0)
    config = HFViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    HFViTForImageClassification(config).save_pretrained(folder / "base")
    ViTImageProcessor(do_center_crop=False, size={"height": 32, "width": 32}).save_pretrained(folder / "base")
    return folder


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(small_sets, "RESULTS", tmp_path / "results.json")
    return tmp_path / "results.json"


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}


def test_scored_images_never_train(folder, tmp_path):
    counts = small_sets.lay_out(folder / "pools", "cifar10-10", 0, "dev", tmp_path / "dev")
    trained, scored = names(tmp_path / "dev" / "train"), names(tmp_path / "dev" / "scored")
    assert counts == {"train": 20, "scored": 4} and len(trained) == 20 and len(scored) == 4
    assert not trained & scored
    assert small_sets.lay_out(folder / "pools", "cifar10-10", 0, "test", tmp_path / "test")["scored"] == 16
    assert names(tmp_path / "test" / "train") == trained  # the seed alone draws it
    small_sets.lay_out(folder / "pools", "cifar10-10", 1, "test", tmp_path / "other")
    assert names(tmp_path / "other" / "train") != trained


def test_the_base_sees_no_image_of_a_set():
    rows = range(50_000)
    assert not set(rows[small_sets.FOR_SETS]) & set(rows[small_sets.FOR_BASE])


def test_images_are_shrunk_to_the_short_side_and_else_kept(tmp_path):
    images = [Image.new("RGB", (96, 64), "red"), Image.new("RGB", (8, 8), "blue")]
    dataset = SimpleNamespace(read=lambda row: (images[row], row, ""), label_names=["a", "b"])
    small_sets.export(dataset, np.arange(2), tmp_path)
    sizes = [Image.open(path).size for path in sorted(tmp_path.glob("*/*"))]
    assert sizes == [(48, 32), (8, 8)]


def test_recipes_run_as_documented_and_nobody_flips_digits(tmp_path):
    settings = {"set": "cifar10-25", "base": tmp_path, "folder": tmp_path, "seed": 5, "words": ""}
    for method in small_sets.RECIPES:
        plain = parse(["--config", method], "finetune")
        found = parse(small_sets.recipe_words({**settings, "method": method}, tmp_path / "out"), "finetune")
        assert found.train.seed == 5 and found.data.flip == plain.data.flip
        for name in ("learning_rate", "num_train_epochs", "patience", "optim", "per_device_train_batch_size"):
            assert getattr(found.train, name) == getattr(plain.train, name)
        assert found.data.dev_fraction == plain.data.dev_fraction and found.model.head_init == plain.model.head_init
        digits = small_sets.recipe_words({**settings, "method": method, "set": "digits"}, tmp_path / "out")
        assert not parse(digits, "finetune").data.flip


def test_baselines_get_the_time_of_finetune_small():
    def row(method, seconds, words=""):
        return {"set": "digits", "on": "test", "method": method, "words": words, "training_seconds": seconds}

    rows = [row("probe", 1.0), *(row("finetune_small", seconds) for seconds in (4.0, 5.0, 9.0))]
    rows += [
        row("timm", 50.0),
        row("finetune_small", 60.0, "--patience 1"),
        {**row("finetune_small", 70.0), "on": "dev"},
    ]
    assert small_sets.time_of_ours(rows, "digits", "test") == 5.0
    for name, present in (("flowers", rows), ("digits", rows[:1])):
        with pytest.raises(HFViTError, match="run that first"):
            small_sets.time_of_ours(present, name, "test")


def test_timm_leaves_out_incomplete_batches_and_gets_epochs_for_them():
    assert [small_sets.images_an_epoch("timm", count) for count in (100, 101, 128, 250, 1000)] == [
        100, 100, 128, 128, 896,
    ]  # fmt: skip
    assert small_sets.images_an_epoch("transformers", 250) == 250


def test_a_run_is_scored_kept_and_not_repeated(folder, results, monkeypatch):
    words = ["run", "--folder", str(folder), "--sets", "cifar10-10", "--seeds", "0", "--methods", "probe"]
    assert small_sets.main(words) == 0
    (row,) = json.loads(results.read_text())["rows"]
    assert row["accuracy"] == 1.0 and row["steps"] == 0 and row["images"] == 20 and row["scored_images"] == 16
    assert 0 < row["training_seconds"] < row["whole_seconds"]
    monkeypatch.setattr(small_sets, "train_and_score", None)
    assert small_sets.main(words) == 0 and len(json.loads(results.read_text())["rows"]) == 1
    assert "100.00" in small_sets.table(small_sets.saved_rows())[1]


def test_the_clock_ends_with_the_last_update_and_leaves_no_hook(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(small_sets.time, "process_time", lambda: now[0])
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with small_sets.clock() as moments:
        for moment in (5.0, 7.0):
            now[0] = moment
            model(torch.ones(1, 2)).sum().backward()
            now[0] += 1
            optimizer.step()
        now[0] = 20.0
        model(torch.ones(1, 2))  # scoring
    optimizer.step()
    assert moments == {"first": 5.0, "last": 8.0}


def test_values_are_tried_on_dev_alone(folder, results, capsys):
    words = ["run", "--folder", str(folder), "--methods", "probe", "--words", "--learning_rate 1"]
    assert small_sets.main(words) == 2 and "--on dev" in capsys.readouterr().err
    assert small_sets.main(["run", "--folder", str(folder / "no"), "--methods", "probe"]) == 2
    assert not results.exists()


def test_timm_trains_below_its_batch(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(small_sets, "SETS", {**small_sets.SETS, "digits": small_sets.SmallSet("digits", 10, False)})
    for name, flip in (("cifar10-10", []), ("digits", ["--hflip", "0"])):
        small_sets.lay_out(folder / "pools", name, 0, "test", tmp_path / name / "images")
        settings = {"set": name, "folder": tmp_path / name, "base": folder / "base", "seed": 0, "epochs": 600}
        words = small_sets.script_words(settings)
        assert words[words.index("--batch-size") :] == ["--batch-size", "10", *flip]
        assert words[words.index("--warmup-epochs") + 1] == "10" and words[words.index("--num-classes") + 1] == "2"
        assert not {"--lr", "--opt", "--sched", "--aa", "--amp"} & set(words)  # the script's own
    converted = open_dataset(str(tmp_path / "digits" / "images" / "train"), split="train")
    assert len(converted) == 20 and (folder / "base-timm.safetensors").is_file()
