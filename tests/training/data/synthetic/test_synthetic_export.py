"""Exported images are the drawn ones, for our door and for `datasets`; interrupted exports go on."""

import re

import datasets
import numpy as np
import pytest

from hf_vit.atomic_file import TEMPORARY
from training.data.dataset import open_dataset
from training.data.shards.streaming import open_stream
from training.data.synthetic import SyntheticImages
from training.data.synthetic.export import main


NAME = "synthetic:glyphs+atoms@6,20,16,label_noise=0.2"


@pytest.fixture
def images():
    return SyntheticImages.from_name(NAME)


def exported(folder, *words):
    assert main([NAME, "--out", str(folder), "--shard_size", "50", *words]) == 0
    return folder


def test_parquet_is_read_by_datasets_and_by_our_door(tmp_path, images, capsys):
    folder = exported(tmp_path / "out")
    assert "144 images in 5 files" in capsys.readouterr().out
    read = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in read.items()} == {"train": 120, "validation": 12, "test": 12}
    assert read["train"].features["label"].names == images.label_names
    ours = open_dataset(str(folder), split="train")
    streamed = open_stream(str(folder), split="train")
    assert ours.label_names == streamed.label_names == images.label_names and len(streamed) == 120
    for index in (0, 57, 119):
        item = images[index]
        np.testing.assert_array_equal(np.asarray(read["train"][index]["image"].convert("RGB")), item["image"])
        np.testing.assert_array_equal(np.asarray(ours.read(index)[0]), item["image"])
        assert read["train"][index]["label"] == ours.read(index)[1] == item["label"]
    held_out = images.split("test")
    np.testing.assert_array_equal(np.asarray(read["test"][7]["image"].convert("RGB")), held_out[7]["image"])


def test_webdataset_is_read_by_datasets_and_by_our_door(tmp_path, images):
    folder = exported(tmp_path / "out", "--format", "webdataset", "--splits", "train")
    assert sorted(path.name for path in folder.glob("*.tar")) == [f"train-{n:06d}.tar" for n in range(3)]
    read = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    ours = open_dataset(str(folder), split="train", cache_dir=str(tmp_path / "index"))
    streamed = open_stream(str(folder), split="train", cache_dir=str(tmp_path / "index"))
    assert len(read) == len(ours) == len(streamed) == 120
    assert ours.label_names == streamed.label_names == images.label_names
    for index in (0, 57, 119):
        item = images[index]
        np.testing.assert_array_equal(np.asarray(read[index]["png"].convert("RGB")), item["image"])
        np.testing.assert_array_equal(np.asarray(ours.read(index)[0]), item["image"])
        assert int(read[index]["cls"]) == ours.read(index)[1] == item["label"]


def test_an_interrupted_export_goes_on(tmp_path, capsys):
    folder = exported(tmp_path / "out", "--splits", "train")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "train-00001-of-00003.parquet").unlink()
    (folder / f"{TEMPORARY}1-train-00001-of-00003.parquet").write_bytes(b"half of it")
    capsys.readouterr()
    exported(folder, "--splits", "train")
    assert "50 images in 1 files" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_processes_write_the_same(tmp_path):
    words = ["synthetic:atoms@5,12,16", "--splits", "train", "--shard_size", "30", "--out"]
    for folder, extra in (("one", []), ("other", ["--workers", "2"])):
        assert main([*words, str(tmp_path / folder), *extra]) == 0
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("one", "other")
    )
    assert one == other and len(one) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([NAME, "--seed", "1"], "holds something else than this set; give another folder"),
        ([NAME, "--shard_size", "0"], "--shard_size and --workers are at least 1"),
        (["synthetic:atom@5,5"], "no synthetic family 'atom'.*did you mean atoms?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, words, message):
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*words, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)
