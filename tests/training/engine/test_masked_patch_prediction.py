"""The paper's self-supervision through the scripts: what it asks, how it scores, and what becomes of its weights.

pytest tests/training/engine/test_masked_patch_prediction.py
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTConfig, HFViTForImageClassification, HFViTForMaskedPatchPrediction
from hf_vit.errors import HFViTError
from training import finetune, pretrain
from training.config.arguments import TrainArguments
from training.data.dataset import open_dataset
from training.engine.masked_patch_prediction import MaskedPatchLoss, masked_model, same_places
from training.engine.trainer import Trainer


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 16, "patch_size": 4}  # fmt: skip
SET = "--set " + " ".join(f"{name}={value}" for name, value in TINY.items() if name != "image_size")
RUN = (
    f"{SET} --image_size 16 --dataset digits --loss masked_patches --crop squash --flip false --use_cpu --disable_tqdm"
)


def words(*parts):
    return [word for part in parts for word in str(part).split()]


def loss_module(**fields):
    return MaskedPatchLoss(HFViTForMaskedPatchPrediction(HFViTConfig(**TINY | fields, num_labels=0)))


def test_the_loss_is_the_models_own_over_the_corrupted_patches():
    training, pixels = loss_module().train(), torch.rand(4, 3, 16, 16) * 2 - 1
    torch.manual_seed(3)
    losses, logits, colors = training(pixels, torch.zeros(4))
    torch.manual_seed(3)
    torch.testing.assert_close(training.model(pixels).loss, losses.mean())
    assert logits.shape == (4, 8, 512) and colors.shape == (4, 8)


def test_evaluation_masks_the_same_places_whatever_the_batch():
    asking = loss_module().eval()
    pixels = torch.rand(5, 3, 16, 16) * 2 - 1
    whole = asking(pixels, torch.zeros(5))
    parts = [asking(part, torch.zeros(len(part))) for part in (pixels[:1], pixels[1:])]
    for all_ranks, apart in zip(whole, zip(*parts)):
        torch.testing.assert_close(all_ranks, torch.cat(apart))
    assert same_places(16, 8).sum() == 8 and torch.equal(same_places(16, 8), same_places(16, 8))


def test_a_compiled_objective_is_one_graph_in_training():
    asking, pixels = loss_module().train(), torch.rand(4, 3, 16, 16) * 2 - 1
    torch.manual_seed(3)
    plain = asking(pixels, torch.zeros(4))[0]
    compiled = torch.compile(asking, backend="eager", fullgraph=True)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(pixels, torch.zeros(4))[0], plain)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked") / "out"
    facts = pretrain.main(words(RUN, "--max_steps 30 --learning_rate 3e-3 --save_strategy no --logging_steps 10 "
                                "--per_device_train_batch_size 32 --output_dir", folder))  # fmt: skip
    return folder, facts


def test_the_script_learns_colors_without_labels(pretrained):
    folder, facts = pretrained
    losses = [line["loss"] for line in map(json.loads, (folder / "history.jsonl").open()) if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert facts["task"] == "masked-image-modeling" and facts["model"]["num_labels"] == 0
    names = {row["metric"] for row in facts["results"]}
    assert names == {"masked_patch_loss", "masked_patch_accuracy", "masked_patch_top5_accuracy"}
    assert all(0 <= row["value"] <= 1 for row in facts["results"] if "accuracy" in row["metric"])
    card = (folder / "README.md").read_text()
    assert 'pipeline("image-classification"' not in card and "sorts an image" not in card
    assert (
        "pipeline_tag: image-feature-extraction" in card
        and "It has no classes yet" in card
        and "label" not in card.split("Intended for")[1].split("##")[0]
    )


def test_its_weights_become_a_classifier_at_another_size(pretrained, tmp_path):
    folder, _ = pretrained
    short = "--dataset digits --max_steps 2 --learning_rate 0 --use_cpu --disable_tqdm --save_strategy no --flip false"
    facts = finetune.main(words("--model", folder, "--image_size 24", short, "--output_dir", tmp_path / "out"))
    assert facts["model"]["num_labels"] == 10 and facts["task"] == "image-classification"
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name, value in before.items():
        if name.startswith("vit.") and "position" not in name:
            assert torch.equal(value, after[name]), name
    assert not any("colors" in name or "mask_token" in name for name in after)
    HFViTForImageClassification.from_pretrained(tmp_path / "out")


def test_it_goes_on_from_the_encoder_of_another_model(pretrained, tmp_path):
    folder, _ = pretrained
    rest = "--max_steps 1 --learning_rate 0 --save_strategy no --output_dir"
    facts = pretrain.main(words("--model", folder, RUN.removeprefix(SET), rest, tmp_path / "out"))
    assert facts["model"]["base_model"] == "out"
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(before["vit.layers.0.mlp.fc1.weight"], after["vit.layers.0.mlp.fc1.weight"])


def test_it_resumes_with_the_same_bytes(tmp_path):
    long = words(RUN, "--max_steps 6 --save_steps 3 --logging_steps 2 --per_device_train_batch_size 8")
    pretrain.main([*long, "--output_dir", str(tmp_path / "whole")])
    pretrain.main([*long, "--output_dir", str(tmp_path / "again")])
    for path in sorted((tmp_path / "again/checkpoint-6").iterdir()):
        path.unlink()
    (tmp_path / "again/checkpoint-6").rmdir()
    pretrain.main([*long, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", "true"])
    for name in ("model.safetensors", "history.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--mixup_alpha 0.2", "no labels for --mixup_alpha"),
        ("--label_smoothing_factor 0.1", "no labels for --label_smoothing_factor"),
        ("--sweep learning_rate=[0.1] --dev_fraction 0.1", "no labels for --sweep"),
        ("--freeze_backbone", "leave out --freeze_backbone"),
        ("--set pooling=map", "pooling=token"),
        ("--set representation_size=8", "no representation_size"),
        ("--set patch_dropout_rate=0.5", "patch_dropout_rate=0"),
        ("--set patch_size=16", "two patches or more"),
    ],
)
def test_what_contradicts_it_is_one_line_before_any_work(extra, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(words(RUN, extra, "--max_steps 2 --output_dir", tmp_path / "out"))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_trainer_refuses_a_classifier_and_other_pixels(tmp_path):
    data = open_dataset("digits", split="train")
    args = TrainArguments(output_dir=str(tmp_path / "out"), loss="masked_patches", use_cpu=True, max_steps=1)
    with pytest.raises(HFViTError, match="HFViTForMaskedPatchPrediction"):
        Trainer(HFViTForImageClassification(HFViTConfig(**TINY)), args, data)

    processor = ViTImageProcessorPil(image_mean=[0.4] * 3, image_std=[0.2] * 3)
    with pytest.raises(HFViTError, match=r"mean \[0.4, 0.4, 0.4\]"):
        Trainer(masked_model(HFViTConfig(**TINY, num_labels=0)), args, data, image_processor=processor)
