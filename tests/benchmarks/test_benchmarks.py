"""The benchmark tables say what was measured, name who is absent, and the counts fail on more work.

python -m pytest tests/benchmarks/test_benchmarks.py
"""

import json

import pytest
import torch
from torch import nn

from benchmarks import torchvision_operators  # noqa: F401 - before whatever imports torchvision


# isort: split
from benchmarks import check, limit, measure, run
from benchmarks.measure import LIMIT, Point
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.inference import build


CPU = torch.device("cpu")


def result(**seconds):
    return {
        "never_slower": {}, "alone": {},
        "title": "work", "images": 2, "unit": "ms/image", "ours": ["hf_vit"], "baselines": [*seconds][1:],
        "seconds": seconds, "absent": {"timm": "timm does not import"}, "quoted": ["published: 7"], "note": "",
        "environment": {"hardware": "Xeon", "instructions": "AMX"},
    }  # fmt: skip


def test_candidates_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    monkeypatch.setattr(measure, "SLOW", 1e9)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.interleaved(calls, 0.0, CPU)
    assert order[:6] == ["a", "b", "c", "b", "c", "a"]
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", measure.ROUNDS[0])


def test_a_slow_candidate_comes_in_every_third_round(monkeypatch):
    times = {"fast": 1, "middle": 2, "slow": 9}
    now = [0.0]

    def call(name):
        now[0] += times[name]

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    taken = measure.interleaved({name: lambda name=name: call(name) for name in times}, 0.0, CPU)
    assert taken == {"fast": [1.0] * 4, "middle": [2.0] * 4, "slow": [9.0] * 2}
    assert measure.ratio({"seconds": taken}, "slow", "fast") == 9


def test_the_table_has_ratios_absent_baselines_and_published_figures():
    text = "\n".join(measure.lines(result(hf_vit=[0.2, 0.2, 0.4], other=[0.3, 0.4, 0.6])))
    row = next(line for line in text.splitlines() if line.strip().startswith("other"))
    assert row.split()[1] == "200" and row.endswith("1.50x")
    assert "timm does not import" in text and "absent" in text and "published: 7" in text


def test_baselines_left_out_are_named():
    point = Point("nothing", 1, {"hf_vit": lambda: None}, {"timm": lambda: None}, limit=lambda: None)
    found = measure.measure(point, 0.0, CPU, without=["timm"])
    assert found["absent"] == {"timm": "--without"} and set(found["seconds"]) == {"hf_vit", LIMIT}


def test_a_point_replaces_its_earlier_self(tmp_path):
    path = tmp_path / "suite.json"
    for value in (1.0, 2.0):
        run.keep(result(hf_vit=[value]), path)
    run.keep(result(hf_vit=[3.0]) | {"title": "another"}, path)
    kept = json.loads(path.read_text())
    assert [(point["title"], point["seconds"]["hf_vit"]) for point in kept] == [("another", [3.0]), ("work", [2.0])]


@pytest.mark.parametrize("training", [False, True])
def test_the_limit_does_every_product(training, monkeypatch):
    monkeypatch.setattr(
        limit.Choices, "fastest", lambda self, key, layers: ("PyTorch", [layer["PyTorch"]() for layer in layers])
    )
    config = HFViTConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model, done = HFViTForImageClassification(config).eval(), []
    products = limit.products(model, torch.randn(2, 3, 16, 16), torch.float32, training)
    with check.Operations() as operations:
        products()
    done = operations.names
    linear = 2 * 6 + 1
    assert done["mm"] == linear * (3 if training else 1)
    assert done["bmm"] == 2 * 2 * (3 if training else 1)
    assert done["convolution"] == 1 and done["convolution_backward"] == training


def test_the_limit_takes_the_fastest_library_for_each_shape(monkeypatch):
    """Every candidate computes the same where it works; one that fails on this machine does not count."""
    x, weight = torch.randn(6, 32), torch.randn(48, 32)
    found = limit.linear_candidates(x, weight)
    assert "PyTorch" in found
    for prepare in found.values():
        result = prepare()()
        result = torch.as_tensor(next(iter(result.values())) if isinstance(result, dict) else result[0])
        torch.testing.assert_close(result.reshape(-1)[:48], (x @ weight.t())[0], atol=1e-4, rtol=1e-4)
    now = [0.0]
    monkeypatch.setattr(limit.time, "perf_counter", lambda: now[0])

    def taking(name, seconds):
        def call():
            now[0] += seconds
            return name

        return lambda: call

    def fails():
        raise RuntimeError("could not create a primitive descriptor")

    choices = limit.Choices()
    candidates = {"PyTorch": taking("PyTorch", 3), "oneDNN": taking("oneDNN", 1), "MKL": fails}
    for layer in (candidates, candidates | {"oneDNN": taking("oneDNN", 4)}):  # 6 s against 5 s for both
        choices.add(("linear", 6, 32, 48), layer)
    choices.add(("linear", 1, 32, 48), {"PyTorch": taking("PyTorch", 1), "oneDNN": taking("oneDNN", 2)})
    choices.add(("linear", 2, 32, 48), candidates)
    # one choice for all layers of a shape; a library's calls stand together
    assert [call() for call in choices.calls()] == ["PyTorch"] + ["oneDNN"] * 3


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_the_limit_asks_the_runtimes_that_are_installed(package):
    """A call that a runtime refuses would be left out in silence, as one library is on some machines."""
    pytest.importorskip(package)
    pytest.importorskip("onnx")
    x, weight = torch.randn(6, 32), torch.randn(48, 32)
    by_runtime = {"onnxruntime": limit._by_onnxruntime, "openvino": limit._by_openvino}[package]
    result = by_runtime(x, weight)()
    values = result[0] if isinstance(result, list) else next(iter(result.values()))
    torch.testing.assert_close(torch.as_tensor(values), x @ weight.t(), atol=1e-4, rtol=1e-4)


def test_the_peak_is_measured_in_registers_or_left_out():
    peak = limit.peak_flops()
    assert (peak is None) == (build.library(limit.PEAK_SOURCE, {"run": []}) is None)
    assert peak is None or peak > 1e6


def test_a_fast_path_that_loses_to_the_plain_one_is_said_in_words_and_fails(monkeypatch, capsys, tmp_path):
    times = {"plain": [0.2] * 3, "fast": [0.3] * 3, "int8": [0.1] * 3}
    measured = result(**times) | {"ours": list(times), "never_slower": {"fast": "plain", "int8": "plain"}}
    measured["alone"] = {"fast": {name: times[name] for name in ("fast", "plain")}}
    (line,) = measure.losses(measured)
    assert line == "work: 'fast' takes 1.50 times as long as 'plain', which it replaces"
    monkeypatch.setattr(run, "SUITES", {"startup": lambda options: iter([Point("work", 1, {}, {})])})
    monkeypatch.setattr(run, "measure", lambda *arguments: dict(measured))
    monkeypatch.setattr(run, "machine", lambda device: {})
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert run.main(["--suite", "startup"]) == 1
    assert "slower than the plain one: work: 'fast' takes 1.50 times" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds_alone", "lost"), [(1.02, 0), (1.1, 1)])
def test_a_fast_path_that_was_slower_among_others_is_timed_again_with_the_plain_one(monkeypatch, seconds_alone, lost):
    rounds = []

    def interleaved(candidates, seconds, device):
        rounds.append([*candidates])
        return {name: [1.0 if name == "plain" else 1.1 if len(rounds) == 1 else seconds_alone] for name in candidates}

    monkeypatch.setattr(measure, "interleaved", interleaved)
    calls = dict.fromkeys(("fast", "plain", "timm"), lambda: None)
    point = Point("work", 1, {"fast": calls.pop("fast")}, calls, never_slower={"fast": "plain"})
    measured = measure.measure(point, 1.0, CPU)
    assert rounds == [["fast", "plain", "timm"], ["fast", "plain"]]
    assert len(measure.losses(measured)) == lost
    assert not measure.losses(measure.measure(point, 1.0, CPU, without=["plain"]))


def test_a_filled_model_has_weights_without_initialization():
    model = measure.filled(lambda: nn.Linear(8, 8), CPU)
    assert model.weight.device == CPU and 0 < model.weight.abs().max() < 1


def test_more_work_than_recorded_is_a_failure():
    recorded = {"forward": {"operations": 100, "gflop": 1.0}}
    assert check.compare({"forward": {"operations": 100, "gflop": 1.0}}, recorded) == []
    assert "operations 102" in check.compare({"forward": {"operations": 102, "gflop": 1.0}}, recorded)[0]
    assert "--update" in check.compare({"new": {"operations": 1}}, recorded)[0]
    theirs = {"forward" + check.TRANSFORMERS: {"operations": 80, "gflop": 1.0}}
    worse = check.compare({"forward": {"operations": 100, "gflop": 1.0}} | theirs, recorded | theirs)
    assert worse == ["forward: operations 100 against 80 of transformers"]


def test_counting_sees_work_and_not_views():
    x = torch.randn(4, 6)
    with check.Operations() as operations:
        (x.t() @ x).view(36).add_(1)
    assert dict(operations.names) == {"mm": 1, "add_": 1} and operations.bytes == 4 * 36


def test_suites_have_names_and_one_line_each(capsys):
    assert run.main(["--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == list(run.SUITES) and all(len(line) > 30 for line in shown)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--precision", "float32"], "--precision has no effect on cpu-drop-path"),
        (["--suite", "startup", "--batch_size", "8"], "--batch_size has no effect on startup: give --suite"),
        (["--suite", "cpu-inference", "--tiny"], "--tiny has no effect on cpu-inference"),
        (["--suite", "cpu-inference", "gpu", "--preset", "vit-base-patch16-224"], "--preset has no effect on cpu-inf"),
    ],
)
def test_an_option_that_a_suite_does_not_heed_is_an_error(words, said, capsys):
    assert run.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_misspelt_baseline_is_named_and_the_figures_are_kept(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "machine", lambda device: {})
    monkeypatch.setitem(
        run.SUITES, "startup", lambda options: iter([Point("work", 1, {"hf_vit": int}, {"timm": int, "flax": int})])
    )
    assert run.main(["--suite", "startup", "--without", "tim", "flax", "--seconds", "0"]) == 2
    assert capsys.readouterr().err.strip() == "error: --without tim: matches no row; the rows are flax, timm"
    kept = json.loads((tmp_path / "startup.json").read_text())[0]
    assert kept["absent"] == {"flax": "--without"} and kept["baselines"] == ["timm"]


def test_figures_of_one_processor_stay_beside_those_of_another(tmp_path):
    path = tmp_path / "startup.json"
    for instructions, seconds in [("AMX", 1.0), ("AVX2", 2.0), ("AMX", 3.0)]:
        environment = {"hardware": "Xeon", "instructions": instructions}
        run.keep(result(hf_vit=[seconds]) | {"environment": environment}, path)
    kept = json.loads(path.read_text())
    assert [(one["environment"]["instructions"], one["seconds"]["hf_vit"]) for one in kept] == [
        ("AMX", [3.0]),
        ("AVX2", [2.0]),
    ]
