"""What a data set looks like: facts that can be checked by hand."""

import json

import pytest
from PIL import Image

from training.data.dataset import open_dataset
from training.data.statistics import main, statistics


@pytest.fixture
def folder(tmp_path):
    for name, sizes in {"black": [(4, 6), (8, 2)], "white": [(10, 20)]}.items():
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size, name).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_statistics(folder):
    (folder / "white" / "broken.png").write_bytes(b"no image")
    facts = json.loads(json.dumps(statistics(open_dataset(str(folder), split="train"))))
    assert (facts["images"], facts["classes"], facts["opened"]) == (4, 2, 4)
    assert facts["largest_class"]["images"] == facts["smallest_class"]["images"] == 2
    assert facts["width"] == {"smallest": 4, "median": 8.0, "largest": 10}
    assert facts["height"] == {"smallest": 2, "median": 6.0, "largest": 20}
    assert facts["mean"] == [0.3333] * 3 and facts["std"] == [0.4714] * 3
    assert len(facts["unreadable"]) == 1 and facts["unreadable"][0].startswith("white/broken.png: ")


def test_nothing_readable_has_no_sizes(folder):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    facts = statistics(open_dataset(str(folder), split="train"))
    assert len(facts["unreadable"]) == 3 and "width" not in facts


def test_command(capsys):
    facts = main(["--dataset", "digits", "--split", "test", "--sample", "20"])
    assert json.loads(capsys.readouterr().out) == facts
    assert facts["images"] == 360 and facts["opened"] == 20 and facts["width"]["largest"] == 8
    with pytest.raises(SystemExit, match="2"):
        main(["--dataset", "/no/such/place"])
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: no file or folder '/no/such/place'") and err.count("\n") == 1
