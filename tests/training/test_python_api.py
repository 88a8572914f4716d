"""`from training import finetune`: the command line's run as a function.

pytest tests/training/test_python_api.py
"""

import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pandas
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import training
from hf_vit.errors import HFViTError
from training import finetune
from training.data.dataset import open_dataset
from training.engine.preemption import StopRequest


SMALL = {
    "set": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 4,
    },
    "image_size": 8, "max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0,
    "disable_tqdm": True, "use_cpu": True, "crop": "squash",
}  # fmt: skip


@pytest.fixture
def frame(tmp_path):
    for number in range(24):
        color = 200 if number % 2 else 30
        Image.fromarray(np.full((16, 16, 3), color, np.uint8)).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(24)]
    return pandas.DataFrame({"path": paths, "species": ["light" if n % 2 else "dark" for n in range(24)]})


def test_a_frame_becomes_a_model_that_predicts(tmp_path, monkeypatch, frame):
    monkeypatch.chdir(tmp_path)
    result = finetune(dataset=frame, image_column="path", label_column="species", ema_decay=0.5, **SMALL)
    assert result.metrics["accuracy"] == 1.0 and str(result.output_dir) == "runs/finetune-1"
    saved = load_file(result.output_dir / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in result.model.state_dict().items())
    table = result.predict([frame["path"][0], Image.open(frame["path"][1])])
    assert list(table["label"]) == ["dark", "light"] and {"image", "score", "dark", "light"} <= set(table.columns)
    assert np.allclose(table[["dark", "light"]].sum(axis=1), 1)
    again = finetune(dataset=list(zip(frame["path"], frame["species"])), **SMALL)
    assert str(again.output_dir) == "runs/finetune-2"


def test_it_is_the_command_lines_run_bit_for_bit(tmp_path):
    options = SMALL | {"dataset": "digits", "max_steps": 3, "auto_augment": "randaug(1,5)"}
    result = finetune(output_dir=tmp_path / "python", **options)
    words = ["--set", *(f"{name}={value}" for name, value in options.pop("set").items())]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    facts = finetune.main([*words, "--output_dir", str(tmp_path / "command")])
    for name in ("model.safetensors", "history.jsonl"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    assert result.facts["results"] == facts["results"]


def test_ctrl_c_leaves_a_checkpoint_a_model_and_no_process(tmp_path, monkeypatch, frame):
    """As a notebook's stop button sends it, with a worker that decodes: the same call with a resume goes on."""

    def requested(self, step):
        if step == 3:
            workers.extend(set(psutil.Process().children()) - before)
            os.kill(os.getpid(), signal.SIGINT)
        return ask(self, step)

    options = SMALL | {"dataset": frame, "label_column": "species", "max_steps": 6, "dataloader_num_workers": 1}
    whole = finetune(output_dir=tmp_path / "whole", **options)
    ask, workers, before = StopRequest.requested, [], set(psutil.Process().children())
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", requested)
        stopped = finetune(output_dir=tmp_path / "out", **options)
    assert stopped.metrics == {} and (stopped.output_dir / "checkpoint-3" / "resume.json").is_file()
    assert set(stopped.predict([frame["path"][0]])["label"]) <= {"dark", "light"}
    assert workers and set(psutil.Process().children(recursive=True)) <= before
    result = finetune(output_dir=tmp_path / "out", resume_from_checkpoint=True, **options)
    assert result.metrics["accuracy"] == whole.metrics["accuracy"]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])


def test_bad_options_raise_and_leave_nothing(tmp_path, monkeypatch, frame):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HFViTError, match="unknown option learning_rat; did you mean learning_rate"):
        finetune(dataset=frame, learning_rat=1)
    with pytest.raises(HFViTError, match="--max_steps 'many': give a whole number"):
        finetune(dataset=frame, max_steps="many")
    assert not (tmp_path / "runs").exists()


def test_the_public_names_are_there():
    for name in training.__all__:
        assert getattr(training, name) is not None
    assert set(training.__all__) <= set(dir(training))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = training.nothing


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", None, "b", "b"], r"1 of 4 rows of 'DataFrame' have no label in column 'label'"),
        (["a", float("nan"), "b", "b"], r"1 of 4 rows of 'DataFrame' have no label in column 'label'"),
        (pandas.array([1, pandas.NA, 2, 2], dtype="Int64"), r"1 of 4 rows of 'DataFrame' have no label \(-1 or empty"),
        ([0.5, float("nan"), 1.5, 2.5], r"1 of 4 rows of 'DataFrame' have no number in column 'label'"),
    ],
)
def test_an_empty_cell_of_a_frame_is_one_of_any_kind(column, message):
    data = pandas.DataFrame({"image": [np.zeros((4, 4, 3), np.uint8)] * 4, "label": column})
    with pytest.raises(HFViTError, match=message):
        open_dataset(data)


def test_objects_that_cannot_be_read_are_one_line():
    data = pandas.DataFrame([["a.png", "x", "x"]], columns=["image", "label", "label"])
    with pytest.raises(HFViTError, match="the DataFrame has columns of the same name: label"):
        open_dataset(data)
    stream = datasets.Dataset.from_dict({"image": ["a.png"], "label": [0]}).to_iterable_dataset()
    with pytest.raises(HFViTError, match="IterableDataset has no rows to choose from: give a Dataset"):
        open_dataset(stream)


def test_a_polars_frame_trains_as_the_pandas_one_does(tmp_path, frame):
    polars = pytest.importorskip("polars", reason="polars is not installed: pip install polars")
    theirs = polars.DataFrame({name: frame[name].to_list() for name in frame})
    results = [
        finetune(dataset=data, image_column="path", label_column="species", output_dir=tmp_path / str(n), **SMALL)
        for n, data in enumerate((frame, theirs, theirs.lazy()))
    ]
    weights = results[0].model.state_dict()
    for result in results[1:]:
        assert all(torch.equal(value, weights[name]) for name, value in result.model.state_dict().items())


def test_columns_of_a_polars_frame(frame):
    pl = pytest.importorskip("polars", reason="polars is not installed: pip install polars")
    paths = frame["path"].to_list()
    images = {
        "paths": paths,
        "bytes": [Path(path).read_bytes() for path in paths],
        "structs": [{"bytes": Path(path).read_bytes(), "path": None} for path in paths],
        "objects": pl.Series([Image.open(path) for path in paths], dtype=pl.Object),
    }
    words = frame["species"].to_list()
    labels = {
        "strings": words,
        "categories": pl.Series(words, dtype=pl.Categorical),
        "fixed categories": pl.Series(words, dtype=pl.Enum(["light", "dark"])),
    }
    for column in images.values():
        for cells in labels.values():
            data = open_dataset(pl.DataFrame({"image": column, "label": cells}))
            assert data.label_names == ["dark", "light"] and data.labels.tolist() == [0, 1] * 12
            assert data.read(1)[0].size == (16, 16)
    several = open_dataset(pl.DataFrame({"image": paths, "label": [["a", "b"], ["b"], None] * 8}))
    assert several.labels[:3].tolist() == [[True, True], [False, True], [False, False]]
    numbers = [None, *np.linspace(0, 1, 23)]
    with pytest.raises(HFViTError, match="1 of 24 rows of 'DataFrame' have no number in column 'label'"):
        open_dataset(pl.DataFrame({"image": paths, "label": numbers}))
