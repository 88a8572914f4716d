"""Studies: every one runs, goes on where it stopped, refuses other people's folders, and judges by its rules.

python -m pytest tests/training/test_study.py
"""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from training import study
from training.data.dataset import open_dataset
from training.studies import STUDIES, ablations, data_scale, generated, noisy_student, pretraining, resolution
from training.studies.design import Difference, Score, Scores, StudyRun
from training.studies.report import is_curve, read_scores, report, scores_of
from training.studies.stages import subset, surest, words, write_images


ROOT = Path(__file__).parents[2]
MEASURED = sorted(ROOT.glob("benchmarks/studies/*/results.json"))


def smoke(name, folder, *more):
    return study.main([name, "--out", str(folder), "--scale", "smoke", *more])


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs(name, tmp_path):
    found = smoke(name, tmp_path / "out", "--seeds", "0")
    assert found["scores"] and all(0 <= score["value"] <= 1 and score["n"] > 0 for score in found["scores"])
    assert len(found["verdicts"]) == len(STUDIES[name].rules)
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(rule.accept in report for rule in STUDIES[name].rules) and "n = 1 of at least 3 seeds**" in report
    assert (tmp_path / "out" / "figure.png").stat().st_size > 1000
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text() + report


def test_rules_are_written_before_anything_runs_and_a_killed_study_goes_on(tmp_path, monkeypatch):
    ran, execute_run = [], study.execute_run

    def until_third(run, folder):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(run.name)
        return execute_run(run, folder)

    monkeypatch.setattr(study, "execute_run", until_third)
    with pytest.raises(KeyboardInterrupt):
        smoke("resolution", tmp_path / "out", "--seeds", "0")
    told = (tmp_path / "out" / "plan.md").read_text()
    assert resolution.STUDY.rules[0].accept in told and "Fewer than 3 seeds: no claim is judged." in told
    assert not (tmp_path / "out" / "report.md").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("facts.json")}
    assert len(before) == 2
    monkeypatch.setattr(study, "execute_run", execute_run)
    killed = smoke("resolution", tmp_path / "out", "--seeds", "0")
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    whole = smoke("resolution", tmp_path / "whole", "--seeds", "0")
    assert [s["value"] for s in killed["scores"]] == [s["value"] for s in whole["scores"]]


def stop(run, folder):
    raise KeyboardInterrupt


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        study.main([str(word) for word in argv])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


def test_what_cannot_be_meant_is_refused(tmp_path, capsys):
    out = ("--out", tmp_path / "new", "--scale", "smoke")
    assert "did you mean pretraining?" in refusal(capsys, "pretrainning", *out)
    assert "choose from cpu, gpu, smoke" in refusal(capsys, "resolution", "--out", tmp_path, "--scale", "huge")
    assert "did you mean cifar10?" in refusal(capsys, "resolution", *out, "--data", "cifar=x")
    assert "did you mean pretrain_steps?" in refusal(capsys, "resolution", *out, "--settings", "pretrain_step=3")
    assert "give a value like [0, 1]" in refusal(capsys, "resolution", *out, "--settings", "seeds=3")
    assert "is none of digits" in refusal(capsys, "generated", *out, "--settings", "targets=[pets]")
    assert "NAME=VALUE" in refusal(capsys, "resolution", *out, "--train", "bf16")
    assert "each seed once" in refusal(capsys, "resolution", *out, "--seeds", 1, 1)
    for flags, message in (
        (("--settings", "pretrain_steps=abc"), "give a value like 2"),
        (("--settings", "pretrain_steps=-1"), "give a value like 2"),
        (("--settings", "pretrain_steps=null"), "give a value like 2"),
        (("--settings", "pretrain_steps=1.5"), "give a value like 2"),
        (("--settings", "finetune_rate=fast"), "give a value like 0.001"),
        (("--settings", "higher=[]"), "give a value like [24]"),
        (("--settings", "higher=[large]"), "give a value like [24]"),
        (("--settings", "model={"), "is not YAML"),
        (("--train", "learning_rate=fast"), "--learning_rate 'fast': give a number"),
        (("--train", "learning_rte=1"), "did you mean --learning_rate?"),
        (("--train", "warmup_steps=3"), "longer than the training of 2"),
        (("--train", "max_steps=3"), "--train max_steps: the study sets this itself"),
        (("--train", "output_dir=mine"), "--train output_dir: the study sets this itself"),
        (("--train", "eval_split=train"), "--train eval_split: the study sets this itself"),
    ):
        assert message in refusal(capsys, "resolution", *out, *flags), flags
    assert "do not make a study" in refusal(capsys, "ablations", *out, "--settings", "model={patch_size: 8}")
    assert "fraction above 0" in refusal(capsys, "pretraining", *out, "--settings", "fractions=[2.0]")
    text = refusal(capsys, "resolution", *out, "--data", f"cifar10={tmp_path / 'nowhere'}")
    assert "nowhere" in text and "--data cifar10=PATH" in text
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "holds no study" in refusal(capsys, "resolution", "--out", tmp_path / "mine", "--scale", "smoke")


def test_a_folder_of_another_study_or_of_other_settings_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "execute_run", stop)
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        smoke("resolution", folder)
    assert '"pretraining" here' in refusal(capsys, "pretraining", "--out", folder, "--scale", "smoke")
    text = refusal(capsys, "resolution", "--out", folder, "--scale", "smoke", "--settings", "finetune_steps=3")
    assert "finetune_steps: 2 there, 3 here" in text


def test_a_study_whose_definition_has_changed_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "execute_run", stop)
    folder, one = tmp_path / "out", STUDIES["resolution"]
    with pytest.raises(KeyboardInterrupt):
        smoke("resolution", folder)

    def changed(run):
        return dataclasses.replace(run, options=run.options | {"image_size": 48})

    def runs(settings):
        return [changed(run) if run.name == "after-24-1" else run for run in one.runs(settings)]

    rule = dataclasses.replace(one.rules[0], accept="any gain")
    for other, differs in (
        (dataclasses.replace(one, runs=runs), "after-24-1: image_size: 24 there, 48 here; 1 in all"),
        (dataclasses.replace(one, rules=(rule,)), f"rule '{rule.claim}': "),
        (dataclasses.replace(one, runs=lambda settings: one.runs(settings)[:-1]), "after-24-1: "),
    ):
        monkeypatch.setitem(study.STUDIES, "resolution", other)
        text = refusal(capsys, "resolution", "--out", folder, "--scale", "smoke")
        assert differs in text and "by an older definition" in text and "another --out" in text
    assert one.rules[0].accept in (folder / "plan.md").read_text()
    monkeypatch.setitem(study.STUDIES, "resolution", one)
    with pytest.raises(KeyboardInterrupt):
        smoke("resolution", folder)


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.parent.name)
def test_reports_of_measured_studies_say_what_their_results_say(path):
    """Rules judge the scores as the verdicts say; after a change of wording, python assets/draw_studies.py."""
    found = json.loads(path.read_text(encoding="utf-8"))
    asked, measured = STUDIES[found["study"]], scores_of(found)
    for rule, verdict in zip(asked.rules, found["verdicts"], strict=True):
        assert (rule.claim, rule.accept) == (verdict["claim"], verdict["accept"])
        assert rule.judge(measured, found["settings"]) == (verdict["shows"], verdict["numbers"])
    assert path.with_name("report.md").read_text(encoding="utf-8") == report(asked, found)
    assert path.with_name("figure.png").is_file()


def test_the_list_of_measured_studies_is_whole():
    index = runpy.run_path(str(ROOT / "assets" / "draw_studies.py"))["index"](ROOT / "benchmarks" / "studies")
    assert MEASURED and all(path.parent.name in index for path in MEASURED)
    assert (ROOT / "benchmarks" / "studies" / "README.md").read_text(encoding="utf-8") == index


def test_the_cost_of_a_score_has_that_of_all_it_starts_from_once(tmp_path):
    runs = [
        StudyRun("first", "pretrain", {}),
        StudyRun("labels", "pseudo_labels", {"model": "run:first"}),
        StudyRun("second", "finetune", {"dataset": "run:labels", "model": "run:first"}, "tuned"),
    ]
    for run, cost in zip(runs, (4.0, None, 0.5)):
        facts = {"results": [{"metric": "loss", "value": 9}, {"metric": "accuracy", "value": 0.25, "n": 7}]}
        facts |= {} if cost is None else {"training": {}, "compute": {"train_exaflops": cost}}
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / "facts.json").write_text(json.dumps(facts))
    (score,) = read_scores(runs, tmp_path)
    assert (score.series, score.value, score.n) == ("tuned", 0.25, 7)
    assert score.exaflops == 4.5


def test_curves_are_drawn_where_a_series_has_several_places():
    row = [0.5]
    assert is_curve(scores({("a", 1): row, ("a", 2): row, ("b", 1): row}), "")
    assert not is_curve(scores({("a", 1): row, ("b", 2): row}), "")
    assert not is_curve(scores({("a", "x"): row, ("a", "y"): row}), "")


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("name", STUDIES)
def test_what_a_study_is_at_every_scale_can_be_meant(name, scale):
    asked = study.build_parser().parse_args([name, "--out", "out", "--scale", scale, "--train", "bf16=false"])
    settings = study.settings_of(STUDIES[name], asked)
    assert len(study.runs_of(STUDIES[name], settings)) > 2
    values = [value for key, value in settings.items() if key not in ("scale", "data")]
    assert all(study.alike(value, value) for value in values)


def test_scores_are_of_the_test_split_also_beside_a_validation_split(tmp_path, capsys):
    digits, data = open_dataset("digits", split="test"), tmp_path / "three"
    (data / "data").mkdir(parents=True)
    for split, first, last in (("train", 0, 60), ("validation", 60, 80), ("test", 80, 110)):
        rows = np.arange(first, last)
        write_images(data, split, digits, rows, digits.labels[rows].tolist(), digits.label_names)
    found = smoke("resolution", tmp_path / "out", "--seeds", "0", "--data", f"cifar10={data}")
    assert {score["n"] for score in found["scores"]} == {30}
    (data / "data" / "test-00000-of-00001.parquet").unlink()
    capsys.readouterr()  # progress of writing
    text = refusal(capsys, "resolution", "--out", tmp_path / "no", "--scale", "smoke", "--data", f"cifar10={data}")
    assert "no split 'test'" in text


def test_settings_reach_the_runs(tmp_path):
    more = ("--settings", "finetune_steps=3", "--train", "learning_rate=0.5", "--seeds", "7")
    smoke("resolution", tmp_path / "out", *more)
    facts = json.loads((tmp_path / "out" / "runs" / "before-7" / "facts.json").read_text())
    assert facts["training"]["arguments"]["learning_rate"] == 0.5 and facts["training"]["seed"] == 7
    facts = json.loads((tmp_path / "out" / "runs" / "after-24-7" / "facts.json").read_text())
    assert facts["training"]["steps"] == 3 and facts["model"]["image_size"] == [24, 24]


def scores(values):
    """{(series, x[, panel]): values by seed}."""
    return Scores(
        Score(place[2] if len(place) > 2 else "", place[0], place[1], seed, value, 100, 1.0)
        for place, row in values.items()
        for seed, value in enumerate(row)
    )


def test_settings_by_their_old_names(capsys):
    words = ["data_scale", "--out", "out", "--settings", "probe_pictures=7", "shares=[0.5]"]
    settings = study.settings_of(STUDIES["data_scale"], study.build_parser().parse_args(words))
    assert settings["probe_images"] == 7 and settings["fractions"] == [0.5] and "shares" not in settings
    assert "--settings shares is now called fractions" in capsys.readouterr().err


def test_differences_are_paired_by_seed():
    found = scores({("a", 1): [0.5, 0.6, 0.7], ("b", 1): [0.4, 0.5, 0.61]}).difference("a", "b", 1)
    assert found.mean == pytest.approx(0.29 / 3) and found.error == pytest.approx(0.01 / 3)
    assert found.above(0.095) and not found.above(0.1) and not found.below()
    assert not Difference((0.2, -0.1, 0.1)).above() and Difference((0.2, -0.1, 0.1)).tied(0.0)
    assert not Difference((0.5,)).above()  # one seed shows nothing


def judged(name, claim, values, settings):
    rule = next(rule for rule in STUDIES[name].rules if claim in rule.claim)
    return rule.judge(scores(values), settings)[0]


def test_rules_tell_what_shows_from_what_does_not():
    three = {"fractions": [0.01, 0.1]}
    low, high = [0.3, 0.31, 0.32], [0.4, 0.42, 0.41]
    gain = {(pretraining.SCRATCH, 0.01): low, (pretraining.PRETRAINED, 0.01): high}
    same = {(pretraining.SCRATCH, 0.1): high, (pretraining.PRETRAINED, 0.1): high}
    assert not judged("pretraining", "beats training", gain | same, three)
    clear = {(pretraining.SCRATCH, 0.1): low, (pretraining.PRETRAINED, 0.1): [0.35, 0.36, 0.38]}
    assert judged("pretraining", "beats training", gain | clear, three)
    assert judged("pretraining", "where labels are few", gain | clear, three)
    sizes = {"image_size": 32, "higher": [48]}
    further = {("further training", 32): low, ("further training", 48): [v + 0.004 for v in low]}
    assert not judged("resolution", "higher resolution", further, sizes)  # clear, but below half a point
    further[("further training", 48)] = [0.306, 0.317, 0.326]
    assert judged("resolution", "higher resolution", further, sizes)
    fractions, gaps = {"fractions": [0.1, 1.0]}, {}
    for panel in (data_scale.FEW, data_scale.TUNED):
        gaps |= {(data_scale.RESNET, 0.1, panel): high, (data_scale.VIT, 0.1, panel): low}
        gaps |= {(data_scale.RESNET, 1.0, panel): high, (data_scale.VIT, 1.0, panel): [0.39, 0.40, 0.41]}
    assert judged("data_scale", "gains more", gaps, fractions) and not judged(
        "data_scale", "overtakes", gaps, fractions
    )
    gaps |= {(data_scale.VIT, 1.0, data_scale.FEW): [0.5, 0.52, 0.51]}
    assert judged("data_scale", "overtakes", gaps, fractions)
    rates = {("class token", ablations.HIGH): high, ("mean of the tokens", ablations.LOW): high}
    rates |= {("mean of the tokens", ablations.HIGH): low}
    placed = {(*place, ablations.POOLING): row for place, row in rates.items()}
    assert judged("ablations", "at its own learning rate", placed, {})
    placed[("mean of the tokens", ablations.HIGH, ablations.POOLING)] = high
    assert not judged("ablations", "at its own learning rate", placed, {})


THIRD = [0.3, 0.31, 0.32]


def over(values, *points):
    """Scores that are so many points above, a little more or less by seed."""
    return [value + point / 100 for value, point in zip(values, points)]


def test_differences_are_of_the_seeds_that_both_have():
    rows = [Score("", "a", 1, seed, 0.1 * seed, 9, 1.0) for seed in (2, 0, 1)]
    rows += [Score("", "b", 1, seed, 0.1 * seed - 0.01, 9, 1.0) for seed in (1, 2, 5)]
    assert Scores(rows).difference("a", "b", 1).values == pytest.approx((0.01, 0.01))


def test_what_is_clear_and_what_is_tied():
    clear, unclear = Difference((0.01, 0.02, 0.03)), Difference((0.0, 0.02, 0.04))  # errors 0.0058 and 0.0115
    assert clear.above() and not unclear.above() and not clear.above(0.021)
    assert Difference((-0.01, -0.02, -0.03)).below() and not Difference((0.0, -0.02, -0.04)).below()
    assert not clear.tied(0.003) and unclear.tied(0.003) and not Difference((0.004, 0.004, 0.004)).tied(0.003)
    assert Difference((0.004,)).tied(0.004) and not Difference((0.004,)).tied(0.003)  # no error of one seed


def test_rules_of_the_ablations():
    def shows(claim, panel, **rows):
        placed = {(name.replace("_", " "), "", panel): row for name, row in rows.items()}
        return judged("ablations", claim, placed, {})

    positions = {"none": THIRD, ablations.LEARNED: over(THIRD, 2, 2.1, 2)}
    for sincos, needed, alike in ((over(THIRD, 2, 1.9, 2), True, True), (over(THIRD, 4, -2, 4), False, True),
                                  (over(THIRD, 3, 3.1, 3), True, False)):  # fmt: skip
        rows = positions | {"2-D, sines and cosines": sincos}
        assert shows("clearly worse", ablations.POSITIONS, **rows) is needed
        assert shows("hardly differ", ablations.POSITIONS, **rows) is alike
    assert shows("no more than a linear", ablations.HEAD, linear=THIRD, one_hidden_layer=over(THIRD, 0.2, 0.3, 0.2))
    assert not shows("no more than a linear", ablations.HEAD, linear=THIRD, one_hidden_layer=over(THIRD, 1, 1.1, 1))
    for adam, better in (((2, 2.1, 2), True), ((2, -2, 2), False), ((-2, -2.1, -2), False)):
        assert shows("Adam", ablations.OPTIMIZER, SGD=THIRD, Adam=over(THIRD, *adam)) is better
        rows = {"from_scratch": THIRD, "masked_patches_first": over(THIRD, *adam)}
        assert shows("Masked patch", ablations.MASKED, **rows) is better


def test_rules_of_noisy_student():
    def shows(claim, first, second, control, teacher=None):
        rows = {(noisy_student.TEACHER, 0): THIRD, (noisy_student.CONTROL, 0): over(THIRD, *control)}
        rows |= {(noisy_student.STUDENT, 1): over(THIRD, *first), (noisy_student.STUDENT, 2): over(THIRD, *second)}
        return judged("noisy_student", claim, rows, {"turns": 2, "teacher": teacher})

    much, little = (2, 2.1, 2), (1, -1, 1)
    assert shows("last student", little, much, much) and not shows("last student", much, little, little)
    assert shows("teacher's labels", little, much, little) and not shows("teacher's labels", much, much, much)
    assert not shows("last student", much, much, much, teacher="given")  # its own score is not among them


def test_rules_of_generated_images():
    settings = {"budgets": [5, 9], "targets": ["x", "y"], "families": {"letters": "", "atoms": ""}, "longer": True}

    def shows(claim, y, budget=9):
        starts = {(generated.SCRATCH, 0): THIRD, (generated.MIMETIC, 0): THIRD, (generated.DYCK, 0): THIRD}
        starts |= {(generated.LONGER, 9): over(THIRD, 1, 1, 1), (generated.LONGER, 5): over(THIRD, 9, 9, 9)}
        starts |= {("letters", 14 - budget): THIRD, ("atoms", 14 - budget): THIRD, ("letters", budget): THIRD}
        values = {(*place, panel): row for place, row in starts.items() for panel in "xy"}
        values |= {("atoms", budget, "x"): over(THIRD, 3, 3.1, 3), ("atoms", budget, "y"): over(THIRD, *y)}
        return judged("generated", claim, values, settings)

    for claim in ("from scratch at equal", "mimetic", "k-Dyck"):
        assert shows(claim, (0.5, 0.6, 0.5)) and not shows(claim, (0.5, -0.6, 0.5))
        assert not shows(claim, (3, 3.1, 3), budget=5)  # the largest budget counts
    assert shows("as many steps", (2, 2.1, 2)) and not shows("as many steps", (0.5, 0.6, 0.5))
    settings["longer"] = False
    assert shows("as many steps", (2, 2.1, 2)) is None


def test_rules_of_compute():
    def shows(claim, vit, hybrid):
        rows = []
        for series, means, costs in (
            (data_scale.VIT, vit, (2.0, 8.0)),
            (data_scale.HYBRID, hybrid, (3.0, 12.0)),
            (data_scale.RESNET, (0.3, 0.5), (1.0, 16.0)),
        ):
            rows += [Score("", series, x, 0, mean, 9, cost) for x, mean, cost in zip((0.5, 2.0), means, costs)]
        return next(r for r in STUDIES["compute"].rules if claim in r.claim).judge(
            Scores(rows), {"widths": [2.0, 0.5]}
        )

    # Between the ResNets, 0.3 at 1 and 0.5 at 16: 0.35 at 2 and 0.45 at 8, by logarithms.
    assert (
        shows("of the same cost", (0.36, 0.46), (0, 0))[0] and not shows("of the same cost", (0.34, 0.46), (0, 0))[0]
    )
    assert "+1.00" in shows("of the same cost", (0.36, 0.46), (0, 0))[1]
    assert shows("lead shrinks", (0.3, 0.5), (0.32, 0.51))[0]
    assert (
        not shows("lead shrinks", (0.3, 0.5), (0.32, 0.53))[0]
        and not shows("lead shrinks", (0.3, 0.5), (0.29, 0.4))[0]
    )


def test_halves_of_the_classes_keep_images_and_share_none(tmp_path):
    whole = open_dataset("digits", split="test")
    parts = []
    for first in (0, 1):
        subset(tmp_path / str(first), {"dataset": "digits", "first": first})
        parts.append(open_dataset(str(tmp_path / str(first)), split="test"))
    assert [part.label_names for part in parts] == [list("02468"), list("13579")]
    assert sum(map(len, parts)) == len(whole)
    row = int(np.flatnonzero(whole.labels == 3)[0])
    place = int(np.flatnonzero(parts[1].labels == 1)[0])
    assert np.array_equal(np.asarray(parts[1].read(place)[0]), np.asarray(whole.read(row)[0]))


def test_pseudo_labels_are_sure_and_balanced():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.55, 0.45]])
    rows, labels = surest(probabilities, keep=4, confidence=0.6)
    assert rows.tolist() == [0, 1, 3, 3] and labels.tolist() == [0, 0, 1, 1]  # class 1 repeats its only one
    rows, _ = surest(probabilities, keep=4, confidence=0.85)
    assert rows.tolist() == [0, 0]


def test_words_of_a_command_line():
    options = {"set": {"patch_size": 4}, "crop_area": [0.1, 1.0], "flip": False, "empty": {}, "none": None}
    assert words(options) == ["--set", "patch_size=4", "--crop_area", "0.1", "1.0", "--flip", "False"]
