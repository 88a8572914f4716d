"""Three recipes on CIFAR-10: one network for all, each its own numbers, images without loss, a clock that stops.

pytest tests/benchmarks/test_cifar10_baselines.py; the baselines need torchvision (transformers) and a clone of timm
(timm), so `make bench-cifar10 ARGS="--scale tiny --data digits --timm PATH"` tries all three.
"""

import json

import numpy as np
import pytest
import torch

from benchmarks import cifar10_baselines as baselines
from benchmarks.baselines import missing
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.errors import HFViTError
from training.config.parser import parse
from training.data.dataset import open_dataset


# Both stay out of the project's environment: a torchvision of another build breaks every import of transformers.
NO_TIMM = "compares with timm, which needs torchvision: make test-baselines runs it in its own environment"
NO_TORCHVISION = "the example of transformers needs torchvision: make test-baselines runs it in its own environment"


def settings(folder, scale="tiny", epochs=1):
    return {"data": str(folder), "out": str(folder), "seed": 3, "scale": scale, "epochs": epochs,
            "recipe": baselines.SCALES[scale].recipe, "script": str(folder / "train.py")}  # fmt: skip


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_images_are_laid_out_without_loss(tmp_path):
    digits = open_dataset("digits", split="test")
    assert baselines.export(digits, tmp_path / "train", 60) == 60
    again = open_dataset(str(tmp_path), split="train")
    assert again.label_names == digits.label_names and len(again) == 60
    assert np.bincount(again.labels).min() >= 5  # of every class
    kept, _, name = again.read(0)
    original = digits.read(int(name.split("/")[-1].removesuffix(".png")))[0]
    np.testing.assert_array_equal(np.asarray(kept), np.asarray(original))
    assert baselines.export(digits, tmp_path / "all", None) == len(digits)


@pytest.mark.parametrize("scale", baselines.SCALES, ids="{}-scale".format)
def test_all_train_one_network(tmp_path, scale):
    found = parse(baselines.recipe_words(settings(tmp_path, scale)), "pretrain")
    with torch.device("meta"):
        config = HFViTConfig(**found.model.set, image_size=32, num_labels=10)
        own = parameters(HFViTForImageClassification(config))
        assert own == parameters(baselines.stock_network(baselines.SCALES[scale], num_labels=10))


@pytest.mark.parametrize("scale", baselines.SCALES, ids="{}-scale".format)
@pytest.mark.skipif(missing("timm") is not None, reason=NO_TIMM)
def test_timms_is_the_same_network(tmp_path, scale):
    import timm
    from timm.utils import ParseKwargs

    words = baselines.script_words(settings(tmp_path, scale))
    parser = baselines.Parser(allow_abbrev=False)
    parser.add_argument("--model-kwargs", nargs="*", action=ParseKwargs)
    options = parser.parse_known_args(words)[0].model_kwargs
    theirs = timm.create_model("vit_small_patch16_224", num_classes=10, **options)
    assert parameters(theirs) == parameters(baselines.stock_network(baselines.SCALES[scale], num_labels=10))


def test_each_keeps_its_own_numbers(tmp_path):
    for scale, epochs, warm_up in (("gpu", 100, "2"), ("cpu", 2, "0")):
        found = parse(baselines.recipe_words(settings(tmp_path, scale, epochs)), "pretrain")
        recipe = parse(["--config", baselines.SCALES[scale].recipe], "pretrain")
        assert found.train.num_train_epochs == epochs and found.train.seed == 3
        for name in ("learning_rate", "optim", "global_batch_size", "mixup_alpha", "bf16", "warmup_steps"):
            assert getattr(found.train, name) == getattr(recipe.train, name)
        assert found.train.use_cpu is (scale == "cpu") and found.data.auto_augment == recipe.data.auto_augment
        theirs = baselines.script_words(settings(tmp_path, scale, epochs))
        for option in ("--epochs", "--val-interval"):
            assert theirs[theirs.index(option) + 1] == str(epochs)
        assert theirs[theirs.index("--warmup-epochs") + 1] == warm_up
        assert not {"--lr", "--opt", "--sched", "--batch-size", "--aa", "--amp"} & set(theirs)  # the script's own


def test_the_clock_runs_from_the_first_forward_pass_to_the_last_update(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(baselines.time, "process_time", lambda: now[0])

    def train(_):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for moment in (5.0, 7.0):
            now[0] = moment
            model(torch.ones(1, 2)).sum().backward()
            now[0] += 1
            optimizer.step()
        now[0] = 20.0
        model(torch.ones(1, 2))  # scoring
        return 0.5

    monkeypatch.setitem(baselines.CANDIDATES, "ours", train)
    baselines.candidate("ours", settings(tmp_path))
    assert json.loads((tmp_path / "clock.json").read_text()) == {"training_seconds": 3.0}
    assert json.loads((tmp_path / "score.json").read_text()) == 0.5


def test_timms_script_runs_with_its_words_and_its_last_score_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines.sys, "argv", ["pytest"])
    lines = ["import sys, pathlib", "out = pathlib.Path(sys.argv[sys.argv.index('--output') + 1], 'run')",
             "out.mkdir()", "assert __name__ == '__main__'",
             "(out / 'summary.csv').write_text('epoch,eval_top1\\n0,10.0\\n1,12.5\\n')"]  # fmt: skip
    (tmp_path / "train.py").write_text("\n".join(lines))
    assert baselines.train_script(settings(tmp_path)) == 0.125


def test_a_try_of_ours_ends_with_a_score_and_no_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baselines, "RESULTS", tmp_path)
    assert baselines.main(["--scale", "tiny", "--data", "digits", "--only", "ours"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[0] == "ours" and row[-1] == row[-2] and float(row[-1].removesuffix("%")) <= 100
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(missing("torchvision") is not None, reason=NO_TORCHVISION)
def test_a_try_of_the_example_ends_with_a_score(tmp_path):
    for name, split in baselines.SPLITS.items():
        baselines.export(open_dataset("digits", split=split), tmp_path / "images" / name, 40)
    found = baselines.measured("transformers", settings(tmp_path) | {"data": str(tmp_path / "images"),
                                                                 "out": str(tmp_path / "out")}, threads=1)  # fmt: skip
    assert 0 <= found["accuracy"] <= 1 and 0 < found["training_seconds"] < found["process_seconds"]


def test_a_candidate_that_fails_is_named_with_its_last_line(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first\necho it broke >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(baselines.sys, "executable", str(python))
    with pytest.raises(HFViTError, match=r"^timm ended with status 3: it broke$"):
        baselines.measured("timm", settings(tmp_path) | {"out": str(tmp_path / "out")}, threads=1)


def test_results_hold_every_row_and_the_table_all_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "RESULTS", tmp_path)
    arguments = baselines.build_parser().parse_args(
        ["--scale", "cpu", "--data", "it", "--only", "ours", "--epochs", "3"]
    )
    rows = [{"candidate": "ours", "seed": seed, "accuracy": 0.5 + seed / 10, "training_seconds": 9.0 + seed,
             "process_seconds": 12.0} for seed in range(2)]  # fmt: skip
    baselines.keep(arguments, {"train": 5, "validation": 2}, rows)
    kept = json.loads((tmp_path / "cifar10-baselines-cpu.json").read_text())
    assert kept["rows"] == rows and kept["clock"] == "processor" and kept["epochs"] == 3
    assert baselines.table(rows)[1].split() == ["ours", "10", "12", "55.00%", "50.00%", "60.00%"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--scale", "cpu"], "train.py is not in its wheel"),
        (["--scale", "gpu", "--only", "ours"], "needs a CUDA device"),
        (["--scale", "cpu", "--only", "transformers"], "torchvision does not import: no: run it in the environment"),
        (["--scale", "cpu", "--only", "ours", "--epochs", "0"], "--epochs 0: give 1 or more"),
        (["--scale", "cpu", "--only", "ours", "--recipe", "none_such"], "none_such"),
        (["--scale", "tiny", "--only", "ours", "--seeds", "0", "0"], "--seeds 0 0: give each once"),
        (["--scale", "tiny", "--only", "ours", "ours"], "--only ours ours: give each once"),
        (["--scale", "tiny", "--only", "ours", "--seeds", "0", "-1"], "--seed -1: give 0 to"),
        (["--scale", "cpu", "--only", "ours"], "'digits' (train: 1,437 images of 8 x 8 px, 10 classes) is not"),
        (["--scale", "cpu", "--only", "ours", "--data", "/no/such"], "/no/such"),
    ],
)
def test_bad_input_is_one_line_before_any_run(monkeypatch, capsys, words, message):
    monkeypatch.setattr(baselines.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(baselines, "missing", lambda package: f"{package} does not import: no")
    monkeypatch.setattr(baselines, "measured", lambda *_: pytest.fail("it ran"))
    assert baselines.main(["--data", "digits", *words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]
