"""Several labels of an image, and numbers: from a table of 200 images to a card, files of predictions and ONNX.

pytest tests/training/test_problem_types.py
"""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from hf_vit.cli.main import main as hf_vit
from hf_vit.errors import HFViTError
from hf_vit.image_io import open_image
from hf_vit.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from training import finetune, open_dataset, score


COLORS = ("red", "green", "blue")
SMALL = {
    "set": {
        "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 4,
    },
    "image_size": 8, "max_steps": 60, "per_device_train_batch_size": 40, "learning_rate": 0.005, "warmup_steps": 0,
    "disable_tqdm": True, "use_cpu": True, "crop": "squash", "logging_steps": 20,
}  # fmt: skip


def words(**options):
    """The command line with these options."""
    pairs = [f"{name}={value}" for name, value in options.pop("set").items()]
    found = ["--set", *pairs]
    for name, value in options.items():
        found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """200 images of 8 x 8 px with some of three colors in them; a table of the colors, of brightness and year."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    rows = []
    for number in range(200):
        there = random.random(3) < 0.4
        level = random.integers(60, 200)
        pixels = np.where(there, 200, 20) * np.ones((8, 8, 3)) * level / 200 + random.integers(0, 20, (8, 8, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
        mean = pixels.astype(np.uint8).mean()
        names = [name for name, is_there in zip(COLORS, there) if is_there]
        rows.append([f"{number}.png", "|".join(names), *there.astype(int), 2000 + mean * 5, mean / 1000 - 3])
    with open(root / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "tags", *COLORS, "year", "depth"], *rows])
    return SimpleNamespace(root=root, table=root / "table.csv", frame=pandas.read_csv(root / "table.csv"))


@pytest.fixture(scope="module")
def several(data, tmp_path_factory):
    """A run on several labels, by the command line."""
    folder = tmp_path_factory.mktemp("several") / "model"
    options = {"dataset": data.table, "label_column": "tags", "label_separator": "|", "problem_type": MULTI_LABEL}
    facts = finetune.main(words(**SMALL, **options, dev_fraction=0.2, eval_steps=30, output_dir=folder))
    return SimpleNamespace(folder=folder, facts=facts)


@pytest.fixture(scope="module")
def numbers(data, tmp_path_factory):
    """A run on two numbers of very different size, which the columns leave no doubt about."""
    folder = tmp_path_factory.mktemp("numbers") / "model"
    options = {"dataset": data.table, "label_column": ["year", "depth"], "dev_fraction": 0.2}
    facts = finetune.main(words(**SMALL, **options, eval_steps=30, load_best_model_at_end=True, output_dir=folder))
    return SimpleNamespace(folder=folder, facts=facts)


def scores_of(facts):
    return {row["metric"]: row["value"] for row in facts["results"]}


def json_of(capsys):
    return json.loads(capsys.readouterr().out)


# -- several labels ------------------------------------------------------------------------------------------------


def test_several_labels_are_learned_and_scored(several, data):
    found = scores_of(several.facts)
    assert found["mean_average_precision"] > 0.95 and found["micro_f1"] > 0.8 and found["macro_f1"] > 0.8
    assert found["micro_f1_at_thresholds"] >= found["micro_f1"] - 0.05 and "accuracy" not in found
    config = json.loads((several.folder / "config.json").read_text())
    assert config["problem_type"] == MULTI_LABEL and len(config["label_thresholds"]) == 3
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    history = (several.folder / "history.jsonl").read_text()
    assert "eval_mean_average_precision" in history and '"accuracy"' not in history


def test_the_stock_pipeline_gives_each_label_a_score_of_its_own(several, data):
    rows = pipeline("image-classification", model=str(several.folder), device="cpu")(str(data.root / "0.png"), top_k=3)
    model = AutoModelForImageClassification.from_pretrained(several.folder)
    assert {row["label"] for row in rows} == set(COLORS)
    result = SimpleNamespace(**{row["label"]: row["score"] for row in rows})
    assert abs(result.red + result.green + result.blue - 1) > 1e-3
    assert model.config.label_thresholds is not None


def test_predict_names_the_labels_that_reach_their_threshold(several, data, tmp_path, capsys):
    images = [str(data.root / f"{number}.png") for number in range(40)]
    truth = dict(zip(data.frame["file"], data.frame["tags"].fillna("")))
    assert hf_vit(["predict", *images, "--model", str(several.folder), "--out", str(tmp_path / "s.csv")]) == 0
    table = pandas.read_csv(tmp_path / "s.csv", keep_default_na=False)
    assert list(table.columns) == ["image", "label", "score", "error", "blue", "green", "red"]
    right = [
        set(row.label.split("|")) == set(truth[row.image.rsplit("/")[-1]].split("|")) for row in table.itertuples()
    ]
    assert (
        np.mean(right) > 0.8 and (table["label"] == "").any() and table["label"].str.contains("|", regex=False).any()
    )
    hf_vit(["predict", *images, "--model", str(several.folder), "--copy-to", str(tmp_path / "sorted")])
    copied = sorted(path.name for path in (tmp_path / "sorted").iterdir())
    assert copied == ["_no_label", "blue", "green", "red"]
    both = next(row for row in table.itertuples() if "|" in row.label)
    assert all((tmp_path / "sorted" / name / both.image.rsplit("/")[-1]).is_file() for name in both.label.split("|"))
    capsys.readouterr()
    hf_vit(["predict", images[0], "--model", str(several.folder), "--json", "--min-score", "0"])
    assert [hit["label"] for hit in json_of(capsys)["predictions"][0]["labels"]] != [] and len(COLORS) == 3
    hf_vit(["predict", images[0], "--model", str(several.folder), "--min-score", "1"])
    assert "(no label)" in capsys.readouterr().out


def test_the_card_says_what_several_labels_are(several, data, capsys):
    card = (several.folder / "README.md").read_text()
    assert "It says which of 3 labels an image has: several, one or none." in card
    assert "| Mean average precision over the labels |" in card and "Binary cross-entropy" in card
    assert "was measured on the same images, and is better there than elsewhere" in card
    image = data.root / data.frame["file"][data.frame["tags"].notna()].iloc[0]
    code = re.search(r"```python\n(from transformers import pipeline.*?)```", card, re.S)[1]
    code = code.replace('model="model"', f"model={str(several.folder)!r}").replace('"image.jpg"', repr(str(image)))
    exec(code, {})
    assert "score" in capsys.readouterr().out


def test_scoring_several_labels_again_gives_the_same(several, data, tmp_path):
    facts = score.main(
        ["--model", str(several.folder), "--dataset", str(data.table), "--split", "train", "--label_column", "tags",
         "--label_separator", "|", "--output_dir", str(tmp_path / "out"), "--use_cpu", "--no_speed"]
    )  # fmt: skip
    found = scores_of(facts)
    assert found["mean_average_precision"] > 0.95 and "micro_f1_at_thresholds" in found and "accuracy" not in found
    lines = list(csv.DictReader((tmp_path / "out" / "per_label.csv").read_text().splitlines()))
    assert [line["label"] for line in lines] == ["blue", "green", "red"]
    assert sum(int(line["n"]) for line in lines) == data.frame[list(COLORS)].to_numpy().sum()
    subset = {"--few_shot": "1", "--knn": "2", "--label_subset": "data", "--real_labels": "real.json"}
    for option, value in subset.items():
        with pytest.raises(SystemExit):
            score.main(
                ["--model", str(several.folder), "--dataset", str(data.table), "--split", "train", "--label_column",
                 "tags", "--label_separator", "|", "--use_cpu", "--no_speed", option, value]
            )  # fmt: skip


# -- numbers -------------------------------------------------------------------------------------------------------


def test_numbers_come_back_in_their_unit(numbers, data):
    found = scores_of(numbers.facts)
    assert found["r2"] > 0.9 and found["mae_year"] < 100 and found["mae_depth"] < 0.02
    classify = pipeline("image-classification", model=str(numbers.folder), device="cpu")
    rows = classify(str(data.root / "7.png"), function_to_apply="none")  # its default from transformers 5.23
    values = {row["label"]: row["score"] for row in rows}
    assert abs(values["year"] - data.frame["year"][7]) < 200 and abs(values["depth"] - data.frame["depth"][7]) < 0.05
    config = json.loads((numbers.folder / "config.json").read_text())
    assert config["problem_type"] == REGRESSION and config["id2label"] == {"0": "year", "1": "depth"}
    train = data.frame[["year", "depth"]].mean()
    assert np.allclose(config["target_mean"], train, rtol=0.1) and numbers.facts["training"]["best_step"] in (30, 60)


def test_every_command_gives_numbers_in_their_unit(numbers, data, tmp_path, capsys):
    image, model = str(data.root / "7.png"), str(numbers.folder)
    hf_vit(["predict", image, "--model", model, "--json"])
    values = json_of(capsys)["predictions"][0]["values"]
    assert abs(values["year"] - data.frame["year"][7]) < 200
    hf_vit(["predict", image, "--model", model, "--out", str(tmp_path / "n.csv")])
    assert (tmp_path / "n.csv").read_text().splitlines()[0] == "image,error,year,depth"
    for option in (["--min-score", "0.5"], ["--copy-to", "x"], ["--top-k", "2"]):
        assert hf_vit(["predict", image, "--model", model, *option]) == 2
        assert "answers with numbers and has no labels" in capsys.readouterr().err
    hf_vit(["inspect", model, image, "--out", str(tmp_path / "seen"), "--steps", "1"])
    assert "deletion and insertion curves show scores" in capsys.readouterr().err
    assert f"year {values['year']:.6g}" in (tmp_path / "seen" / "report.html").read_text()
    hf_vit(["info", model])
    assert "2 numbers (regression)" in capsys.readouterr().out
    card = (numbers.folder / "README.md").read_text()
    assert "It reads 2 numbers off an image." in card and "| Mean absolute error of year |" in card


def test_scoring_numbers_again(numbers, data):
    words = ["--model", str(numbers.folder), "--dataset", str(data.table), "--split", "train", "--use_cpu"]
    facts = score.main([*words, "--label_column", "depth", "year", "--no_speed"])  # in another order
    assert scores_of(facts)["r2"] > 0.9 and scores_of(facts)["mae_year"] < 100


def test_training_goes_on_with_the_same_numbers(numbers, data, tmp_path):
    """The head stays, since it is for the same numbers, and so does its scale; a stock Trainer computes the loss."""
    options = {"label_column": ["year", "depth"], "model": numbers.folder, "max_steps": 1, "learning_rate": 0.0}
    options = {name: value for name, value in SMALL.items() if name != "set"} | options
    result = finetune(dataset=data.frame, image_root=data.root, output_dir=tmp_path / "more", **options)
    assert result.model.config.target_mean == pytest.approx(
        json.loads((numbers.folder / "config.json").read_text())["target_mean"]
    )
    assert result.metrics["r2"] > 0.9
    dataset = open_dataset(str(data.table), label_column=["year", "depth"])
    items = [{"pixel_values": torch.zeros(3, 8, 8), "labels": dataset.label(number)} for number in range(4)]
    trainer = Trainer(
        result.model.cpu(), TrainingArguments(str(tmp_path / "stock"), report_to=[], use_cpu=True), eval_dataset=items
    )
    expected = (
        (result.model(torch.zeros(4, 3, 8, 8)).logits - torch.stack([i["labels"] for i in items])).square().mean()
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


# -- both, elsewhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["several", "numbers"])
def test_the_demo_and_the_onnx_file_answer_as_predict_does(kind, data, tmp_path, capsys, request):
    pytest.importorskip("onnxscript", reason='ONNX needs pip install "hf-vit[export]"')
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("gradio", reason='the demo needs pip install "hf-vit[demo]"')
    from hf_vit.hub.space_app import SpaceClassifier

    folder, image = request.getfixturevalue(kind).folder, data.root / "7.png"
    capsys.readouterr()  # of the training, where this test is the first
    all_labels = [] if kind == "numbers" else ["--min-score", "0"]
    hf_vit(["predict", str(image), "--model", str(folder), "--json", *all_labels])
    row = json_of(capsys)["predictions"][0]
    expected = row["values"] if kind == "numbers" else {hit["label"]: hit["score"] for hit in row["labels"]}
    assert hf_vit(["export", str(folder), str(tmp_path / "onnx"), "--json"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    pixels = AutoImageProcessor.from_pretrained(folder)(open_image(image), return_tensors="np")["pixel_values"]
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels})
    assert config["problem_type"] == (REGRESSION if kind == "numbers" else MULTI_LABEL)
    answers = logits[0] if kind == "numbers" else 1 / (1 + np.exp(-logits[0]))
    exported = {config["id2label"][str(index)]: answer for index, answer in enumerate(answers)}
    assert exported == pytest.approx(expected, rel=1e-4, abs=1e-5)
    shown = SpaceClassifier.load("model", folder).scores(Image.open(image))
    if kind == "numbers":
        shown = {name: float(number) for name, number in (part.split(": ") for part in shown.split(", "))}
    assert shown == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_several_labels_are_inspected(several, data, tmp_path):
    """Each score by itself: those of an image with two labels are shown as the stock pipeline gives them."""
    image = str(data.root / data.frame["file"][data.frame["tags"].str.contains("|", regex=False, na=False)].iloc[0])
    assert hf_vit(["inspect", str(several.folder), image, "--out", str(tmp_path / "seen"), "--steps", "1"]) == 0
    page = (tmp_path / "seen" / "report.html").read_text()
    rows = pipeline("image-classification", model=str(several.folder), device="cpu")(image, top_k=3)
    assert sum(row["score"] for row in rows) > 1.2
    assert all(f"{row['label']} {row['score']:.1%}" in page for row in rows)


# -- from Python -----------------------------------------------------------------------------------------------------


def test_a_frame_of_numbers_from_python(data, tmp_path):
    frame = data.frame.assign(file=[str(data.root / name) for name in data.frame["file"]])
    result = finetune(dataset=frame, label_column="depth", loss="huber", output_dir=tmp_path / "out", **SMALL)
    table = result.predict(list(frame["file"][:5]))
    assert list(table.columns) == ["image", "depth"] and np.abs(table["depth"] - frame["depth"][:5]).max() < 0.05
    assert result.metrics["r2"] > 0.8 and "loss" in result.metrics


def test_a_frame_of_several_labels_from_python(data, tmp_path):
    frame = data.frame.assign(file=[str(data.root / name) for name in data.frame["file"]])
    options = SMALL | {"mixup_alpha": 0.1, "max_steps": 80}
    result = finetune(dataset=frame, label_column=list(COLORS), output_dir=tmp_path / "out", **options)
    table = result.predict(list(frame["file"][:20]))
    assert list(table.columns) == ["image", "label", "score", *COLORS]
    wanted = [[name for name in COLORS if frame[name][row]] for row in range(20)]
    assert np.mean([found == right for found, right in zip(table["label"], wanted)]) > 0.7
    again = [(path, tags) for path, tags in zip(frame["file"], wanted * 10)]
    assert open_dataset(again).problem_type == MULTI_LABEL


def test_a_resumed_run_is_the_uninterrupted_one(data, tmp_path):
    options = SMALL | {"dataset": str(data.table), "label_column": "depth", "max_steps": 6, "save_steps": 3}
    whole = finetune(output_dir=tmp_path / "whole", **options)
    part = tmp_path / "part"
    finetune(output_dir=part, **options)
    (part / "model.safetensors").unlink()
    for name in ("checkpoint-6",):
        for path in sorted((part / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (part / name).rmdir()
    finetune(output_dir=part, resume_from_checkpoint=True, **options)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole.output_dir, part))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "year", "mixup_alpha": 0.2}, "--mixup_alpha 0.2 has no meaning"),
        ({"label_column": "year", "loss": "sigmoid"}, "--loss sigmoid is not for .*: choose from mse"),
        ({"label_column": "year", "class_weights": "balanced"}, "--class_weights balanced has no meaning for"),
        ({"label_column": "year", "metric_for_best_model": "accuracy"}, "accuracy is not for --problem_type reg"),
        ({"label_column": "year", "samples_per_class": 2}, "--samples_per_class counts one class for each image"),
        ({"label_column": [*COLORS], "label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1 has no meaning"),
        ({"label_column": [*COLORS], "train_sampling_strategy": "balanced"}, "balanced has no meaning"),
        ({"label_column": "year", "sweep": {"learning_rate": [0.1]}, "problem_type": REGRESSION, "dev_fraction": 0.1},
         "--sweep .* has no meaning"),
        ({"label_column": "year", "card_examples": 2}, "--card_examples 2 has no meaning"),
        ({"label_column": "year", "preview": True}, "--preview True has no meaning"),
        ({"label_column": "red", "loss": "huber"}, "--loss huber is not for --problem_type single"),
        ({"label_column": "tags", "problem_type": MULTI_LABEL}, "nothing says what separates its labels"),
        ({"label_column": [*COLORS], "problem_type": SINGLE_LABEL}, "reads one column"),
        ({"label_column": "tags", "problem_type": REGRESSION}, "no number in column 'tags'|which is no number"),
        ({"label_column": "year", "problem_type": REGRESSION, "label_separator": "|"}, "--label_separator is for"),
        ({"label_column": "year", "loss": "masked_patches", "problem_type": REGRESSION}, "reads no labels"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused_by_name(data, tmp_path, options, message):
    with pytest.raises(HFViTError, match=message) as error:
        finetune(dataset=str(data.table), output_dir=tmp_path / "out", **SMALL | options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_whole_numbers_with_a_few_fractions_leave_doubt(tmp_path):
    rows = [{"image": Image.new("RGB", (8, 8)), "label": number} for number in (0, 1, 2.5, 0, 1, 2)]
    with pytest.raises(HFViTError, match="1 fractions, such as"):
        open_dataset(pandas.DataFrame(rows))


def test_a_sweep_of_labels_without_accuracy_ends_in_one_line(data, tmp_path):
    options = SMALL | {"max_steps": 1, "label_column": "year", "dev_fraction": 0.1}
    with pytest.raises(HFViTError, match="--sweep chooses by accuracy"):
        finetune(dataset=str(data.table), sweep={"learning_rate": [0.1]}, output_dir=tmp_path / "out", **options)
