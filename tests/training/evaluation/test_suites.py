"""Suites: the published rows are those of the paper, what cannot be reached is never a zero, and a run is resumed.

pytest tests/training/evaluation/test_suites.py
"""

import json
import re
import shutil

import pytest
import yaml

from tests.helpers.tiny_classifiers import DIGITS, save_tiny
from training import score
from training.data.dataset import open_dataset
from training.evaluation import suites
from training.evaluation.few_shot import RidgeProbe


CONTENT = suites.read_suites(suites.SUITES)


def test_vtab_has_19_tasks_and_the_papers_means():
    tasks = suites.tasks_of("vtab", CONTENT)
    groups = [task["vtab"] for task in tasks.values()]
    assert [groups.count(group) for group in suites.VTAB_GROUPS] == [7, 4, 8]
    for model, mean in (("ViT-H/14 (JFT-300M)", 77.63), ("ViT-L/16 (ImageNet-21k)", 72.72)):
        row = next(row for row in CONTENT["published"] if row["model"] == model)
        assert row["vtab_mean"] == mean
        assert sum(row[name] for name in tasks) / 19 == pytest.approx(mean, abs=0.1)  # Table 9 has one decimal
    thousand = {"train[:1000]", "train[:800]+validation[:200]"}
    assert all(task["steps"] == 2500 and task["train_split"] in thousand for task in tasks.values())
    assert all(task["dev_fraction"] == 0.2 for task in tasks.values())  # 800 and 200, where rates are chosen


def test_published_rows_name_tasks_and_sources():
    known = {*CONTENT["tasks"], "vtab_mean", "model", "source"}
    for row in CONTENT["published"]:
        assert set(row) <= known and re.match(r"arXiv:2010\.11929 Table \d", row["source"])
        assert all(50 < value < 100 for name, value in row.items() if name in ("imagenet", "cifar10", "pets"))
    table2 = {row["model"]: row["imagenet"] for row in CONTENT["published"][:5]}
    assert list(table2.values()) == [88.55, 87.76, 85.30, 87.54, 88.4]


def test_every_task_is_whole():
    for suite, members in CONTENT["suites"].items():
        assert suites.tasks_of(suite, CONTENT) and all(name == "vtab" or name in CONTENT["tasks"] for name in members)
    for name, task in CONTENT["tasks"].items():
        assert {"title", "dataset", "classes", "method", "split", "train_split"} <= set(task), name
        if task["method"] == "transfer":
            assert task["steps"] in (500, 2500, 10000) and task["learning_rates"], name


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite of three tasks on the digits, one on the Hub, one with other classes; returns (command, folder)."""
    content = {
        "tasks": {
            "head": {"title": "Digits", "method": "head", "dataset": "digits", "classes": 10},
            "real": {"title": "Digits ReaL", "method": "head", "real": True, "dataset": "digits", "classes": 10},
            "probed": {"title": "Digits again", "dataset": "digits", "classes": 10, "steps": 2,
                       "dev_fraction": 0.1, "learning_rates": [0.0001, 0.1]},
            "far": {"title": "Far away", "dataset": "owner/far-away", "classes": 10},
            "vtab_other": {"title": "Other", "vtab": "natural", "dataset": "digits", "classes": 12},
        },
        "vtab_protocol": {"train_split": "train[:1000]", "steps": 2, "learning_rates": [0.01]},
        "suites": {"small": ["head", "real", "probed", "far", "vtab"]},
        "published": [{"model": "Known", "source": "a paper", "head": 90.0, "far": 50.0, "vtab_mean": 60.0}],
    }  # fmt: skip
    (tmp_path / "suites.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setattr(suites, "SUITES", tmp_path / "suites.yaml")
    labels = open_dataset("digits", split="test").labels
    (tmp_path / "real.json").write_text(json.dumps([[int(label)] for label in labels]))
    model, folder = save_tiny(tmp_path / "model"), tmp_path / "out"

    def command(*words):
        return score.main(["--model", model, "--suite", "small", "--output_dir", str(folder), "--cache_dir",
                           str(tmp_path / "cache"), "--use_cpu", "--no_speed", "--real_labels",
                           str(tmp_path / "real.json"), *words])  # fmt: skip

    return command, folder


def test_what_cannot_be_reached_has_no_score_and_no_mean(suite, capsys):
    command, folder = suite
    facts = command()
    status = {name: found["status"] for name, found in facts["tasks"].items()}
    assert status == {"head": "done", "real": "done", "probed": "done", "far": "not available",
                      "vtab_other": "not available"}  # fmt: skip
    assert "accuracy" not in facts["tasks"]["far"] and "owner/far-away" in facts["tasks"]["far"]["reason"]
    assert "has 10 classes, the task has 12" in facts["tasks"]["vtab_other"]["reason"]
    assert facts["means"] == {}
    assert facts["tasks"]["head"]["accuracy"] == facts["tasks"]["real"]["accuracy"]
    assert facts["tasks"]["probed"]["accuracy"] > 0.3 and facts["tasks"]["probed"]["train_images"] == 1437
    assert json.loads((folder / "suite.json").read_text())["tasks"] == facts["tasks"]
    table = (folder / "suite.md").read_text()
    assert "| Far away | not available | 50.00% |" in table and "- Known: a paper" in table
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Far away"))
    assert re.split(r" {2,}", line) == ["Far away", "not available", "50.00%"]


def test_a_suite_goes_on_where_it_stopped(suite, monkeypatch):
    command, _ = suite
    first = command()
    asked = []
    real_task = suites.run_task
    monkeypatch.setattr(suites, "run_task", lambda name, *rest: asked.append(name) or real_task(name, *rest))
    assert command()["tasks"] == first["tasks"]
    assert asked == ["far", "vtab_other"]  # what had no score is tried again
    asked.clear()
    command("--crop_pct", "0.9")
    assert asked == ["head", "real", "probed", "far", "vtab_other"]  # other settings, other results


def test_a_local_copy_takes_the_place_of_the_hubs(suite):
    facts = suite[0]("--data", "far=digits")
    assert facts["tasks"]["far"]["status"] == "done"


FINE_TUNED = ("--transfer", "finetune", "--finetune_set", "image_size=16", "save_strategy=no", "learning_rate=0.01",
              "max_steps=1", "gradient_accumulation_steps=1")  # fmt: skip


@pytest.mark.parametrize("words", [(), FINE_TUNED], ids=["probed", "fine-tuned"])
def test_a_copy_that_changed_is_not_taken_for_the_old_one(suite, tmp_path, capsys, words):
    command, folder = suite
    copy = write_digits(tmp_path / "copy")
    before = command("--data", f"probed={copy}", *words)["tasks"]["probed"]
    assert before["data"]["test"]["images"] == before["n"] == 40
    assert command("--data", f"probed={copy}", *words)["tasks"]["probed"] == before
    kept = folder / "tasks" / "probed.json"
    for split in ("train", "test"):
        next((copy / split / "3").iterdir()).unlink()
        with pytest.raises(SystemExit):
            command("--data", f"probed={copy}", *words)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        count = before["data"][split]["images"]
        assert (
            error.startswith(f"error: '{copy}' has changed since {kept} was written: ") and "remove that file" in error
        )
        assert f"{split} had {count} images, now has {count - 1}, and not the same ones" in error
        kept.unlink()
        after = command("--data", f"probed={copy}", *words)["tasks"]["probed"]
        assert after["data"][split]["images"] == count - 1
    assert after["n"] == 39
    shutil.rmtree(copy)
    assert command("--data", f"probed={copy}", *words)["tasks"]["probed"] == after


def write_digits(folder):
    """Four test images and six training images of each digit as files."""
    for split, count in (("train", 6), ("test", 4)):
        data = open_dataset("digits", split=split).per_class(count)
        for index in range(len(data)):
            image, label, name = data.read(index)
            (folder / split / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(folder / split / str(label) / f"{name.split('/')[1]}.png")
    return folder


def test_fine_tuning_chooses_a_rate_and_resumes(suite, monkeypatch):
    command, folder = suite
    words = ("--transfer", "finetune", "--per_device_eval_batch_size", "64", "--finetune_set", "image_size=16",
             "gradient_accumulation_steps=1", "save_strategy=no")  # fmt: skip
    facts = command(*words)
    found = facts["tasks"]["probed"]
    assert found["method"] == "fine-tuning" and found["n"] == 360
    tried = {row["values"]["learning_rate"]: row["dev_accuracy"] for row in found["tried"]}
    assert set(tried) == {0.0001, 0.1} and found["learning_rate"] == max(tried, key=tried.get)
    (run,) = (folder / "runs").glob("probed-*")
    final = json.loads((run / "facts.json").read_text())
    assert final["training"]["steps"] == 2 and final["data"]["train_images"] == 1437
    assert final["training"]["arguments"]["optim"] == "sgd"
    trial = json.loads((run / "sweep" / "learning_rate=0.1" / "facts.json").read_text())
    assert trial["data"]["train_images"] < 1437  # the rest is what the rate is chosen on
    (folder / "tasks" / "probed.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(suites, "run", lambda *args, **more: pytest.fail("a finished run is run again"))
        assert command(*words)["tasks"]["probed"]["accuracy"] == found["accuracy"]
    other = command(*words, "learning_rate=0.05", "max_steps=1")["tasks"]["probed"]  # other settings, another run
    assert other["learning_rate"] == 0.05 and "tried" not in other
    assert len(list((folder / "runs").glob("probed-*"))) == 2


def test_means_need_every_task():
    tasks = suites.tasks_of("vtab", CONTENT)
    found = {name: {"status": "done", "accuracy": 0.5} for name in tasks}
    assert suites.means(found, tasks) == {"vtab_mean": 0.5, **{f"vtab_{group}": 0.5 for group in suites.VTAB_GROUPS}}
    found["vtab_dmlab"] = {"status": "not available"}
    assert set(suites.means(found, tasks)) == {"vtab_natural", "vtab_specialized"}


def test_the_probe_is_the_ridge_of_the_features(suite, tmp_path):
    from training.evaluation.classifier import open_classifier
    from training.evaluation.evaluate_classifier import create_context
    from training.evaluation.features import compute_features

    facts = suite[0]()
    classifier, context = open_classifier(str(tmp_path / "model")), create_context(True, batch_size=90)
    train, test = (
        compute_features(classifier, open_dataset("digits", split=split), context, tmp_path / "elsewhere")
        for split in ("train", "test")
    )
    expected = RidgeProbe().fit(train.features, train.labels).score(test.features, test.labels)
    assert facts["tasks"]["probed"]["accuracy"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--suite", "big"], "--suite big: choose one of imagenet, paper, vtab"),
        (["--suite", "vtab", "--data", "vtab_dtd"], "give TASK=PATH"),
        (["--suite", "vtab", "--data", "cifar10=x"], "the suite has no task 'cifar10'"),
        (["--suite", "vtab", "--knn", "5"], "--knn has no effect here"),
        (["--dataset", "digits", "--transfer", "finetune"], "--transfer has no effect here"),
        (["--dataset", "digits", "--train_split", "test"], "--train_split has no effect here"),
        (["--dataset", "digits", "--knn", "5", "--l2", "1"], "--l2 has no effect here"),
        (["--suite", "vtab", "--transfer", "finetune", "--l2", "1"], "--l2 has no effect here"),
        (["--suite", "vtab", "--finetune_set", "seed=1"], "--finetune_set has no effect here"),
        (["--dataset", "digits", "--knn", "5", "--tta", "flip"], "--tta has no effect here"),
        (["--suite", "vtab", "--dataset", "digits"], "give --dataset"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys):
    model = save_tiny(tmp_path / "model", id2label=DIGITS)
    with pytest.raises(SystemExit) as stop:
        score.main(["--model", model, "--output_dir", str(tmp_path / "out"), "--use_cpu", *words])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and message in error and "\n" not in error
