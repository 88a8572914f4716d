"""The scripts: from arguments to a folder that loads, and one line for whatever is wrong.

pytest tests/training/test_finetune.py
"""

import json
import shutil

import fsspec
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification, save_checkpoint
from hf_vit.image_processing import ImageProcessing
from tests.helpers.streams import encoded, tar_bytes
from training import finetune, pretrain
from training.build_model import build_model, image_processor_for
from training.config.arguments import DataArguments
from training.config.parser import parse
from training.data.dataset import open_dataset


TINY = (
    "--set hidden_size=16 num_hidden_layers=1 num_attention_heads=2 intermediate_size=16 patch_size=4 --image_size 8"
)
SHORT = "--max_steps 4 --per_device_train_batch_size 16 --logging_steps 2 --save_steps 2 --use_cpu --disable_tqdm"


def words(*parts):
    return [word for part in parts for word in str(part).split()]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Folder train/CLASS/*.png of three colors, 20 images each, of many sizes; without an evaluation split."""
    root, random = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / "train" / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 120, (*random.integers(9, 30, 2), 3), dtype=np.uint8)
            pixels[..., channel] += 130
            Image.fromarray(pixels).save(root / "train" / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    facts = pretrain.main(
        words(TINY, SHORT, "--dataset synthetic:glyphs@52,3 --crop squash --no_flip --output_dir", folder)
    )
    assert facts["training"]["stage"] == "pretrain" and facts["model"]["num_labels"] == 52
    return folder


def test_finetuning_replaces_the_head_resizes_and_leaves_a_folder_that_loads(
    tmp_path, pretrained, photographs, capsys
):
    out = tmp_path / "out"
    line = words("--model", pretrained, "--dataset", photographs, "--image_size 8 12 --output_dir", out, SHORT,
                 "--learning_rate 0.02 --max_steps 30 --no_flip --do_predict")  # fmt: skip
    facts = finetune.main(line)
    assert "(10%, stratified) are kept for it" in capsys.readouterr().out
    assert facts["model"]["image_size"] == [8, 12] and facts["data"]["label_names"] == ["blue", "green", "red"]
    assert facts["data"]["train_images"] == 54 and facts["model"]["base_model"] == "pretrained"
    accuracy = next(row for row in facts["results"] if row["metric"] == "accuracy")
    assert accuracy["value"] == 1.0 and accuracy["n"] == 6

    model = AutoModelForImageClassification.from_pretrained(out)
    processor = AutoImageProcessor.from_pretrained(out)
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    image = Image.open(photographs / "train/green/0.png")
    with torch.no_grad():
        logits = model(**processor(image, return_tensors="pt")).logits
    assert model.config.id2label[int(logits.argmax())] == "green"
    written = json.loads((out / "facts.json").read_text())
    assert written == json.loads(json.dumps(facts)) and (out / "README.md").is_file()
    for name in (
        "history.jsonl",
        "speed.jsonl",
        "training_curve.png",
        "config_resolved.yaml",
        "preprocessor_config.json",
    ):
        assert (out / name).is_file(), name
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    with np.load(out / "predictions.npz") as kept:
        assert kept["logits"].shape == (6, 3)


def test_the_processor_gives_the_trainers_predictions(tmp_path, pretrained):
    out = tmp_path / "out"
    finetune.main(
        words(
            "--model", pretrained, "--dataset digits --image_size 12 --do_predict --no_flip --output_dir", out, SHORT
        )
    )
    model, processor = AutoModelForImageClassification.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    test = open_dataset("digits", split="test")
    with torch.no_grad():
        logits = model(**processor([test.read(i)[0] for i in range(20)], return_tensors="pt")).logits
    np.testing.assert_allclose(logits.numpy(), np.load(out / "predictions.npz")["logits"][:20], atol=1e-5)


def test_mean_and_deviation_are_those_of_the_base_model():
    config = HFViTConfig(image_size=12, patch_size=4)
    settings = ViTImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.1]).to_dict()
    base = ImageProcessing.from_transformers(settings)
    kept = image_processor_for(config, DataArguments(crop_pct=0.5), base)
    assert (*kept.image_mean, *kept.image_std) == (0.4, 0.5, 0.6, 0.2, 0.3, 0.1)
    assert kept.size["shortest_edge"] == 24 and kept.crop_size["height"] == 12
    googles = image_processor_for(config, DataArguments(), None)
    assert {*googles.image_mean, *googles.image_std} == {0.5} and googles.size["width"] == 12


def test_the_representation_layer_goes_with_the_head_unless_it_is_kept(tmp_path):
    config = HFViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                         image_size=8, patch_size=4, representation_size=8, num_labels=3)  # fmt: skip
    HFViTForImageClassification(config).save_pretrained(tmp_path)
    for options, width in ((["--keep_representation"], 8), ([], 16)):
        arguments = parse(["--model", str(tmp_path), *options], "finetune")
        model, _, _ = build_model(arguments, ["cat", "dog"])
        assert model.classifier.weight.shape == (2, width)


def test_the_resolved_config_repeats_the_run(tmp_path, photographs):
    first, again = tmp_path / "a", tmp_path / "b"
    finetune.main(words(TINY, SHORT, "--dataset", photographs, "--mixup_alpha 0.2 --output_dir", first))
    assert yaml.safe_load((first / "config_resolved.yaml").read_text())["set"]["hidden_size"] == 16
    finetune.main(["--config", str(first / "config_resolved.yaml"), "--output_dir", str(again)])
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (first / "history.jsonl").read_bytes() == (again / "history.jsonl").read_bytes()


def test_a_matching_head_is_kept_and_a_probe_trains_nothing_else(tmp_path, photographs):
    first, probe = tmp_path / "first", tmp_path / "probe"
    finetune.main(words(TINY, SHORT, "--learning_rate 0.01 --dataset", photographs, "--output_dir", first))
    line = words(
        "--model", first, SHORT, "--freeze_backbone --learning_rate 0.01 --dataset", photographs, "--output_dir", probe
    )
    finetune.main(line)
    before, after = (HFViTForImageClassification.from_pretrained(folder).state_dict() for folder in (first, probe))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    finetune.main(
        words("--model", first, SHORT, "--learning_rate 0 --dataset", photographs, "--output_dir", tmp_path / "same")
    )
    same = HFViTForImageClassification.from_pretrained(tmp_path / "same").state_dict()
    assert all(torch.equal(before[name], same[name]) for name in before)


def test_what_is_said_of_the_weights_is_a_note_and_a_replaced_head_is_not_mentioned(tmp_path, photographs, capsys):
    fields = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    model = HFViTForImageClassification(HFViTConfig(**fields, patch_size=4, image_size=8, num_labels=5))  # zero head
    save_checkpoint(model, tmp_path / "described.safetensors", format="timm")
    base = tmp_path / "base.safetensors"
    save_file(load_file(tmp_path / "described.safetensors"), base)  # without the fields in its header
    finetune.main(words("--model", base, SHORT, "--dataset", photographs, "--output_dir", tmp_path / "out"))
    said = capsys.readouterr()
    assert "note: " in said.out and "does not say; assumed" in said.out
    assert "all zeros" not in said.out + said.err and "Warning" not in said.err


def test_a_width_without_its_mlp_is_noted():
    line = (
        "--dataset digits --image_size 8 --set hidden_size=16 num_attention_heads=2 patch_size=4 num_hidden_layers=1"
    )
    with pytest.warns(UserWarning, match="leaves the MLP at intermediate_size=3072; .* --set intermediate_size=64"):
        build_model(parse([*line.split(), "--output_dir", "out"], "finetune"), ["a", "b"])


def test_few_labels_are_balanced_and_repeatable(tmp_path):
    facts = finetune.main(words(TINY, SHORT, "--dataset digits --samples_per_class 3 --output_dir", tmp_path / "out"))
    assert facts["data"]["train_images"] == 30 and facts["data"]["eval_split"] == "test"


def test_unreadable_images_are_counted_or_stop_the_run(tmp_path, photographs, capsys):
    broken = tmp_path / "images"
    for path in photographs.glob("train/*/*.png"):
        target = broken / path.relative_to(photographs)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() if path.name != "7.png" else b"no image")
    line = words(TINY, SHORT, "--max_steps 8 --dataset", broken, "--dev_fraction 0.2 --output_dir")
    facts = finetune.main([*line, str(tmp_path / "out")])
    assert facts["data"]["unreadable_images"] == 3
    listed = (tmp_path / "out/unreadable.txt").read_text().splitlines()
    assert len(listed) == 3 and all("7.png: not an image" in line for line in listed)
    assert "skipped: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        finetune.main([*line, str(tmp_path / "stop"), "--on_decode_error", "stop"])
    assert stopped.value.code == 2 and "7.png" in capsys.readouterr().err


def test_a_resumed_stream_ends_with_the_same_bytes(tmp_path):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    random = np.random.default_rng(0)
    rows = [
        {"image": Image.fromarray(random.integers(0, 255, (9, 9, 3), dtype=np.uint8)), "label": i % 2}
        for i in range(48)
    ]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["odd", "even"])})
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"data/{split}-00000.parquet", batch_size=7)
    line = words(TINY, SHORT, "--streaming --dataset", tmp_path / "data", "--max_steps 7 --output_dir")
    finetune.main([*line, str(tmp_path / "whole")])
    finetune.main([*line, str(tmp_path / "resumed"), "--dataloader_num_workers", "2"])
    shutil.rmtree(tmp_path / "resumed/checkpoint-7")
    finetune.main([*line, str(tmp_path / "resumed"), "--resume_from_checkpoint"])
    for name in ("model.safetensors", "history.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_a_resumed_stream_of_remote_shards_that_are_indexed_while_they_are_read(tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe("/finetune/label_names.json", b'["odd", "even"]')
    for shard in ("train-0", "train-1", "train-2", "test-0"):
        records = [(str(n), {"cls": str(n % 2).encode(), "png": encoded(n)}) for n in range(16)]
        files.pipe(f"/finetune/{shard}.tar", tar_bytes(records))
    name = "memory://finetune/{train-0,train-1,train-2,test-0}.tar --shuffle_shards 1 --streaming --max_steps 7"
    line = words(TINY, SHORT, "--dataset", name, "--cache_dir", tmp_path / "cache", "--output_dir")
    finetune.main([*line, str(tmp_path / "whole")])
    assert list((tmp_path / "cache").glob("copies-*/test-0.tar"))  # read again and again: copied
    finetune.main([*line, str(tmp_path / "resumed"), "--dataloader_num_workers", "2"])
    shutil.rmtree(tmp_path / "resumed/checkpoint-7")
    finetune.main([*line, str(tmp_path / "resumed"), "--resume_from_checkpoint"])
    for file in ("model.safetensors", "history.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{TINY} --dataset digits", "--output_dir is missing"),
        (f"{TINY} --output_dir OUT", "Give --dataset"),
        ("--dataset digits --output_dir OUT", "Give --model PATH_OR_HUB_ID"),
        (f"{TINY} --dataset digits --output_dir OUT --learning_rte 1", "did you mean --learning_rate"),
        (f"{TINY} --set hiden_size=3 --dataset digits --output_dir OUT", "did you mean hidden_size?"),
        ("--preset vit-hug-patch14-224 --dataset digits --output_dir OUT", "vit-hug"),
        (f"--model x --preset vit-tiny-patch16-224 {TINY} --dataset digits --output_dir OUT", "not both"),
        ("--model no/such-model --dataset digits --output_dir OUT", "no such file or folder"),
        (f"{TINY} --dataset no/such-folder/here --output_dir OUT", "no/such-folder/here"),
        ("--set patch_size=16 --image_size 8 --dataset digits --output_dir OUT", "smaller than"),
        (f"{TINY} --dataset ONE --output_dir OUT", "only one class"),
        (f"{TINY} --dataset digits --per_device_train_batch_size 5000 --output_dir OUT", "larger than the 1437"),
        (f"{TINY} --dataset digits --fp16 --use_cpu --output_dir OUT", "--fp16 needs a GPU"),
        (f"{TINY} --dataset digits --eval_split nothing --output_dir OUT", "no split 'nothing'"),
        (f"{TINY} --dataset digits --crop_pct 0.001 --image_size 8 --output_dir OUT", "at least 0.01"),
    ],
)
def test_bad_input_is_one_line_exit_status_2_and_no_folder(tmp_path, capsys, line, message):
    (tmp_path / "one/train/only").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "one/train/only/1.png")
    line = line.replace("OUT", str(tmp_path / "out")).replace("ONE", str(tmp_path / "one"))
    with pytest.raises(SystemExit) as stopped:
        finetune.main(line.split())
    error = capsys.readouterr().err.strip()
    assert (
        stopped.value.code == 2 and message in error and error.startswith("error: ") and len(error.splitlines()) == 1
    )
    assert not (tmp_path / "out").exists()


def test_bad_input_met_while_training_leaves_no_folder(tmp_path, capsys):
    images = tmp_path / "images"
    for name, color in (("cat", "red"), ("dog", "blue")):
        (images / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (20, 20), color).save(images / name / f"{number}.png")
    (images / "cat" / "broken.jpg").write_bytes(b"not an image")
    size = ["hidden_size=8", "num_hidden_layers=1", "num_attention_heads=1", "intermediate_size=8", "patch_size=8"]
    words = ["--dataset", str(images), "--set", *size, "--image_size", "16", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        finetune.main([*words, "--max_steps", "20", "--per_device_train_batch_size", "4", "--on_decode_error", "stop"])
    assert "broken.jpg" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["hidden_size=abc", "hidden_siz=8", "hidden_size=10"])
def test_impossible_fields_are_one_line(value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--dataset", "digits", "--set", value, "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and error.count("\n") == 0 and not (tmp_path / "out").exists()
