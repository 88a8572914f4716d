"""How cost grows: the exponent, the rows, the order that is judged, and tasks on a few files.

pytest tests/benchmarks/test_scale.py
"""

import numpy as np
import pytest

from benchmarks import scale


def test_the_exponent_is_the_slope_of_the_logarithms():
    assert scale.exponent([10, 100, 1000], [3.0, 7.0, 3.0]) == 0
    assert scale.exponent([10, 1000], [2.0, 200.0]) == pytest.approx(1)
    assert scale.exponent([10, 1000], [1.0, 1e4]) == pytest.approx(2)
    assert scale.exponent([10], [1.0]) is None and scale.exponent([1, 2], [-1.0, 1.0]) is None


def test_rows_hold_a_cost_for_each_size(capsys):
    rows = scale.table("folders", [(10, {"open, s": 1.0, "MB": 5.0}), (100, {"open, s": 10.0, "MB": 5.0})])
    assert [(row["row"], row["values"]) for row in rows] == [("open, s", [1.0, 10.0]), ("MB", [5.0, 5.0])]
    scale.show(rows)
    assert capsys.readouterr().out.splitlines()[2].split()[-1] == "1.00"


def test_the_order_that_is_judged_shows_every_record_once():
    order = scale.stream_order(300, run_length=8, buffer_size=40, seed=0, first=0, count=300)
    assert sorted(order.tolist()) == list(range(300)) and order.tolist() != list(range(300))


def test_tasks_on_a_few_files(tmp_path, capsys):
    folder = scale.make_folder(tmp_path / "folder", 20)
    shards = scale.make_shards(tmp_path / "shards", 2)
    cache = str(tmp_path / "cache")
    for task, words in (
        ("scan", {"folder": str(folder)}),
        ("scan_as_torchvision", {"folder": str(folder)}),
        ("open_folder", {"folder": str(folder), "cache": cache, "again": False}),
        ("open_shards", {"folder": str(shards), "cache": cache, "again": False}),
        ("resume_stream", {"folder": str(shards), "cache": cache}),
    ):
        found, seconds = scale.measured(task, words)
        assert seconds >= 0
        assert found and all(np.isfinite(value) for value in found.values())
    assert scale.main(["--parts", "clouds"]) == 2 and "invalid choice" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_of_their_own():
    before = scale.spent
    found = scale.in_processes("scan", 2, {"folder": str(scale.RESULTS.parent)})
    assert len(found) == 2 and all("os.scandir, s" in part for part in found) and scale.spent > before
