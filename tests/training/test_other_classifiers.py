"""Classifiers of transformers that are no plain ViT: trained, resumed and saved with their own class.

pytest tests/training/test_other_classifiers.py
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitConfig,
    ConvNextConfig,
    ConvNextModel,
    EfficientNetConfig,
    ResNetConfig,
    SwinConfig,
)
from transformers.utils import is_timm_available

from hf_vit.cli.main import main
from hf_vit.errors import HFViTError
from hf_vit.hub.model_folder import check_model_folder
from hf_vit.hub.space import write_space
from hf_vit.transformers_classifiers import head_names, load_other_classifier
from training import TrainArguments, Trainer, finetune, open_dataset, score
from training.data.transforms import EvalTransform


SQUASH = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
CROP = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}, "do_center_crop": True,
        "crop_size": 32, "resample": 3, "image_mean": [0.4] * 3, "image_std": [0.2, 0.3, 0.4]}  # fmt: skip
KINDS = {  # configuration and image processor of each
    "bit": (BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4), CROP),
    "swin": (SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4), SQUASH),
    "convnext": (
        ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32),
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875},
    ),
    "efficientnet": (
        EfficientNetConfig(image_size=32, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128),
        {"image_processor_type": "EfficientNetImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2,
         "image_mean": [0.4] * 3, "image_std": [0.2, 0.3, 0.4], "include_top": True},
    ),
    "resnet": (ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), SQUASH),
}  # fmt: skip
SHORT = "--dataset digits --per_device_train_batch_size 16 --logging_steps 2 --save_steps 2 --no_flip --use_cpu"
SHORT += " --disable_tqdm --learning_rate 0.01"
CARD = "---\nlicense: cc-by-nc-4.0\n---\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each, of three classes."""
    root = tmp_path_factory.mktemp("models")
    for name, (config, processor) in KINDS.items():
        config.num_labels = 3
        torch.manual_seed(0)
        AutoModelForImageClassification.from_config(config).save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(json.dumps(processor))
    (root / "swin" / "README.md").write_text(CARD)
    return root


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """Each fine-tuned on the digits for four steps."""
    root = tmp_path_factory.mktemp("trained")
    for name in KINDS:
        words = (
            f"--model {models / name} --output_dir {root / name} --max_steps 4 --ema_decay 0.5 --do_predict {SHORT}"
        )
        finetune.main(words.split())
    return root


def files(folder, number):
    paths = []
    data = open_dataset("digits", split="test")
    for index in range(number):
        paths.append(folder / f"{index}.png")
        data.read(index)[0].save(paths[-1])
    return paths


@pytest.mark.parametrize("name", KINDS)
def test_it_is_trained_and_saved_with_its_own_class(name, models, trained, tmp_path):
    facts = json.loads((trained / name / "facts.json").read_text())
    config = json.loads((trained / name / "config.json").read_text())
    assert config["model_type"] == name and "auto_map" not in config and not list((trained / name).glob("*.py"))
    assert facts["model"]["class"] == config["architectures"][0] and facts["model"]["base_model"] == name
    assert facts["model"]["image_size"] == [32, 32] and facts["model"]["num_labels"] == 10
    compute, seen = facts["compute"], 4 * 16
    assert compute["train_exaflops"] == pytest.approx(3 * compute["forward_flops_per_image"] * seen / 1e18)
    assert compute["forward_flops_per_image"] > 10_000
    model, info = AutoModelForImageClassification.from_pretrained(trained / name, output_loading_info=True)
    assert not any(info.values())
    processor = AutoImageProcessor.from_pretrained(trained / name, backend="pil")
    data = open_dataset("digits", split="test")
    images = [data.read(index)[0].convert("RGB") for index in range(20)]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    kept = np.load(trained / name / "predictions.npz")["logits"][:20]
    np.testing.assert_allclose(logits.numpy(), kept, atol=1e-5)
    # the processor makes of an image what the base model's own made of it
    own = AutoImageProcessor.from_pretrained(models / name, backend="pil")
    torch.testing.assert_close(
        processor(images[0], return_tensors="pt")["pixel_values"], own(images[0], return_tensors="pt")["pixel_values"],
        rtol=0, atol=1e-5,
    )  # fmt: skip
    card = (trained / name / "README.md").read_text()
    assert "trust_remote_code" not in card and "Vision Transformer" not in card and f"- {name}\n" in card
    before = AutoModelForImageClassification.from_pretrained(models / name).state_dict()
    head = head_names(model)
    after = model.state_dict()
    assert all(len(after[key]) == 10 and len(before[key]) == 3 for key in head)
    assert any(not torch.equal(after[key], before[key]) for key in before if key not in head)


def test_it_loads_where_hf_vit_is_not_installed(trained):
    code = (
        "import sys; sys.modules['hf_vit'] = None\n"  # importing it fails
        "from transformers import AutoModelForImageClassification as Auto\n"
        f"for name in {list(KINDS)}: print(type(Auto.from_pretrained(r'{trained}/' + name)).__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=trained, check=True)
    assert found.stdout.split() == [
        "BitForImageClassification", "SwinForImageClassification", "ConvNextForImageClassification",
        "EfficientNetForImageClassification", "ResNetForImageClassification",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["swin", "resnet"])  # names that change on the way into a file; BatchNorm
def test_a_resumed_run_is_the_uninterrupted_one(name, models, trained, tmp_path):
    folder = tmp_path / "resumed"
    words = f"--model {models / name} --output_dir {folder} --max_steps 4 --ema_decay 0.5 --do_predict {SHORT}".split()
    shutil.copytree(trained / name, folder)
    shutil.rmtree(folder / "checkpoint-4")
    finetune.main([*words, "--resume_from_checkpoint"])
    for file in ("model.safetensors", "history.jsonl"):
        assert (folder / file).read_bytes() == (trained / name / file).read_bytes()


def test_the_head_stays_where_the_classes_are_the_same_and_is_new_where_only_their_number_is(models, trained):
    names = AutoModelForImageClassification.from_pretrained(trained / "resnet").config.id2label
    weights = AutoModelForImageClassification.from_pretrained(trained / "resnet").state_dict()
    kept = load_other_classifier(str(trained / "resnet"), names).model.state_dict()
    assert all(torch.equal(kept[key], weights[key]) for key in weights)
    new = load_other_classifier(str(trained / "resnet"), {number: f"class {number}" for number in range(10)}).model
    head = head_names(new)
    changed = {key for key, value in new.state_dict().items() if not torch.equal(value, weights[key])}
    assert changed == set(head) and new.config.label2id["class 9"] == 9
    several = load_other_classifier(str(trained / "resnet"), names, problem_type="multi_label_classification").model
    assert any(not torch.equal(several.state_dict()[key], weights[key]) for key in head)


def test_a_probe_trains_the_head_alone(models, tmp_path):
    facts = finetune.main(
        f"--model {models / 'bit'} --output_dir {tmp_path / 'out'} --max_steps 2 --freeze_backbone {SHORT}".split()
    )
    before, after = (
        AutoModelForImageClassification.from_pretrained(folder) for folder in (models / "bit", tmp_path / "out")
    )
    head = head_names(after)
    assert facts["model"]["num_labels"] == 10
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items() if k not in head)


def test_another_size_for_what_reads_any(models, tmp_path):
    facts = finetune.main(
        f"--model {models / 'convnext'} --output_dir {tmp_path / 'out'} --max_steps 1 --image_size 40 48 {SHORT}"
        .split()
    )  # fmt: skip
    assert facts["model"]["image_size"] == [40, 48]
    size = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"]
    assert size["height"] == 40 / 0.875 // 1 and size["width"] == 48 / 0.875 // 1


def test_the_license_of_the_base_is_on_the_card(trained):
    facts = json.loads((trained / "swin" / "facts.json").read_text())
    assert facts["license"] == "cc-by-nc-4.0" and "license: cc-by-nc-4.0" in (trained / "swin/README.md").read_text()


def test_predict_embed_and_score_agree_with_the_trainer(trained, tmp_path, capsys):
    paths = files(tmp_path, 6)
    folder = trained / "efficientnet"
    assert main(["predict", *map(str, paths), "--model", str(folder), "--json", "--top-k", "10"]) == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    found = np.array(
        [[{hit["label"]: hit["score"] for hit in row["labels"]}[str(k)] for k in range(10)] for row in rows]
    )
    logits = torch.from_numpy(np.load(folder / "predictions.npz")["logits"][:6])
    np.testing.assert_allclose(found, logits.softmax(-1).numpy(), atol=1e-5)

    out = tmp_path / "features.npz"
    assert main(["embed", *map(str, paths), "--model", str(folder), "--out", str(out)]) == 0
    features = torch.from_numpy(np.load(out)["features"])
    model = AutoModelForImageClassification.from_pretrained(folder)
    torch.testing.assert_close(model.classifier(features), logits, rtol=0, atol=1e-4)
    with pytest.raises(HFViTError, match="has no mean features"):
        from hf_vit.cli.embed import embed

        embed(model, None, [], "mean", 1)
    facts = score.main(["--model", str(folder), "--dataset", "digits", "--split", "test", "--use_cpu", "--no_speed",
                        "--output_dir", str(tmp_path / "score")])  # fmt: skip
    trainers = json.loads((folder / "facts.json").read_text())["results"]
    for rows in (facts["results"], trainers):
        assert any(row["metric"] == "accuracy" and row["n"] == 360 for row in rows)
    values = [next(r["value"] for r in rows if r["metric"] == "accuracy") for rows in (facts["results"], trainers)]
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", "--layer_decay 0.7", "--layer_decay needs the layers of a ViT, and --model is a ResNetForImage"),
        ("swin", "--unfreeze_every 2", "--unfreeze_every needs"),
        ("swin", "--set drop_path_rate=0.1", "--set changes fields of HFViTConfig"),
        ("swin", "--keep_representation", "--keep_representation"),
        ("bit", "--card_examples 2", "--card_examples draws the attention"),
        ("bit", "--loss masked_patches", "--loss masked_patches masks"),
        ("convnext", "--image_size_schedule 0=16", "--image_size_schedule fits"),
        ("resnet", "--activation_checkpointing", "ResNetForImageClassification does not support it"),
        ("resnet", "--optim schedule_free_adamw --lr_scheduler_type constant", "BatchNorm has measured others"),
        ("swin", "--image_size 8", "SwinForImageClassification does not read images of 8 x 8 px"),
    ],
)  # fmt: skip
def test_what_only_a_vit_has_is_refused_by_name(name, options, message, models, tmp_path, capsys):
    words = f"--model {models / name} --output_dir {tmp_path / 'out'} --max_steps 2 {SHORT} {options}"
    with pytest.raises(SystemExit) as stopped:
        finetune.main(words.split())
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("opening ")
    ]  # if it took long
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect MODEL IMAGE --out OUT", "export MODEL OUT", "convert MODEL OUT",
                                     "info MODEL"])  # fmt: skip
def test_commands_for_vits_refuse_it_by_its_name(command, models, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    places = {"IMAGE": tmp_path / "a.png", "MODEL": models / "swin", "OUT": tmp_path / "out"}
    assert main([str(places.get(word, word)) for word in command.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "this is Swin (hierarchical), not a plain ViT" in error and not (tmp_path / "out").exists()


def test_it_is_pushed_without_the_page_of_the_demo(trained, tmp_path, capsys):
    check_model_folder(trained / "swin")
    with pytest.raises(HFViTError, match="is a model of type 'swin': the page shows the attention"):
        write_space(trained / "swin", tmp_path / "space", "swin")
    assert not (tmp_path / "space").exists()
    assert main(["demo", str(trained / "swin")]) == 2 and "not a plain ViT" in capsys.readouterr().err


def test_the_trainer_refuses_layers_that_it_does_not_know(models, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(models / "swin")
    data = open_dataset("digits", split="test").with_transform(EvalTransform((32, 32)), 0)
    arguments = {"output_dir": str(tmp_path), "max_steps": 2, "use_cpu": True}
    with pytest.raises(HFViTError, match="order of the layers of SwinForImageClassification is not known"):
        Trainer(model, TrainArguments(layer_decay=0.5, **arguments), data)
    with pytest.raises(HFViTError, match="--unfreeze_every"):
        Trainer(model, TrainArguments(unfreeze_every=1, **arguments), data)


def test_damaged_or_headless_folders_are_one_line(models, tmp_path, capsys):
    damaged = shutil.copytree(models / "resnet", tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    headless = tmp_path / "headless"
    ConvNextModel(KINDS["convnext"][0]).save_pretrained(headless)
    shutil.copy(models / "convnext" / "preprocessor_config.json", headless)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for folder, message in ((damaged, "cannot load --model"), (headless, "has no classifier: fine-tune it")):
        assert main(["predict", str(tmp_path / "a.png"), "--model", str(folder)]) == 2
        assert message in capsys.readouterr().err
    unknown = shutil.copytree(models / "resnet", tmp_path / "unknown")
    (unknown / "preprocessor_config.json").write_text('{"image_processor_type": "PerceiverImageProcessor"}')
    with pytest.raises(HFViTError, match="PerceiverImageProcessor, which hf_vit does not know"):
        load_other_classifier(str(unknown))
    assert load_other_classifier(str(headless), {0: "a", 1: "b"}).model.config.id2label == {0: "a", 1: "b"}


@pytest.mark.skipif(is_timm_available(), reason="what is said without timm")
def test_a_network_of_timm_that_is_no_plain_vit_needs_timm(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    stored = {"model_type": "timm_wrapper", "architecture": "resnet10t", "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit) as stopped:
        finetune.main(f"--model {tmp_path / 'in'} --output_dir {tmp_path / 'out'} --max_steps 2 {SHORT}".split())
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    assert error.endswith(
        "this is timm's resnet10t, not a plain ViT; its class in transformers, TimmWrapperForImageClassification, "
        "needs timm (pip install timm)"
    )
