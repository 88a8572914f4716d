"""Every recipe and variant: its full model without memory; two steps of a tiny one, else as written; its header.

pytest tests/training/test_recipes.py
"""

import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hf_vit import HFViTConfig, HFViTForImageClassification
from training.build_model import build_model, scratch_config
from training.config.parser import parse
from training.config.recipes import RECIPES, recipe_names, recipe_path
from training.data.splits import open_splits, transforms
from training.engine.masked_patch_prediction import masked_model
from training.engine.planning.schedule import TrainingSchedule
from training.engine.trainer import Trainer
from training.reporting.flops import train_flops


NAMES = recipe_names()
WRITTEN = {name: yaml.safe_load(recipe_path(name).read_text()) for name in NAMES}
CASES = [(name, str(variant)) for name in NAMES for variant in WRITTEN[name].get("variants", [""])]
FIRST = [*{name: (name, variant) for name, variant in reversed(CASES)}.values()][::-1]  # the first variant of each
TRAINED = [*FIRST, ("deit3_finetune", "base_in21k")]  # which has another optimizer than the recipe's others


def words_of(name, variant):
    return ["--config", name, *(["--variant", variant] if variant else [])]


def found(name, variant=""):
    return parse(words_of(name, variant), stage_of(name))


TINY = "hidden_size=16 num_hidden_layers=2 num_attention_heads=2 intermediate_size=16"
SMALL = (
    "--use_cpu --disable_tqdm --dataloader_num_workers 0 --bf16 false --per_device_train_batch_size 4 "
    "--per_device_eval_batch_size 8 --global_batch_size 8 --max_steps 2 --warmup_steps 1 --mixup_off_steps 0 "
    "--save_strategy no --label_column null --train_split train --eval_split test --image_size 16 "
    "--torch_compile_backend eager --load_best_model_at_end false"
)


def header(name):
    lines = [line for line in recipe_path(name).read_text().splitlines() if line.startswith("#")]
    return " ".join(line.removeprefix("#").strip() for line in lines)


def stage_of(name):
    return re.search(r"training\.(pretrain|finetune)", header(name))[1]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for label in ("one", "two"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (14, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    fields = yaml.safe_load("{" + TINY.replace("=", ": ").replace(" n", ", n").replace(" i", ", i") + "}")
    config = HFViTConfig(**fields, image_size=8, patch_size=4, num_labels=3)
    HFViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_full_model_is_built_on_the_meta_device(name, variant):
    arguments = found(name, variant)
    model = arguments.model
    size = {"image_size": model.image_size[0]} if model.image_size else {}
    preset = model.preset or (None if "hidden_size" in model.set else "vit-base-patch16-224")
    fields = dict(model.set) | size | {"num_labels": 10}
    config = HFViTConfig(**fields) if preset is None else HFViTConfig.from_preset(preset, **fields)
    masked = arguments.train.loss == "masked_patches"
    with torch.device("meta"):
        network = (masked_model if masked else HFViTForImageClassification)(config)
    assert all(parameter.is_meta for parameter in network.parameters())


@pytest.mark.parametrize(("name", "variant"), TRAINED)
def test_two_steps_of_a_tiny_one(name, variant, tmp_path, image_folder, pretrained):
    stage, written = stage_of(name), WRITTEN[name]
    words = [*words_of(name, variant), *SMALL.split(), "--dataset", str(image_folder)]
    words += ["--output_dir", str(tmp_path / "out")]
    if stage == "pretrain":
        words += ["--set", *TINY.split(), "patch_size=4"]
        words += ["representation_size=8"] if "representation_size" in written.get("set", {}) else []
        words += ["resnet_depths=[1]", "patch_size=1"] if name.startswith("hybrid") else []
    else:
        words += ["--model", str(pretrained)]
    words += ["--image_size_schedule", "0=8", "50%=16"] if "image_size_schedule" in written else []
    arguments = parse(words, stage)
    splits = open_splits(arguments.data, 0)
    model, processor, _ = build_model(arguments, splits.train.label_names)
    head = "colours" if arguments.train.loss == "masked_patches" else "classifier"
    torch.nn.init.normal_(model.get_parameter(f"{head}.weight"))  # a zero head passes nothing on; update 1 has rate 0
    views = transforms(arguments.data, model.config)
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    data = [part.with_transform(view, 0) for part, view in zip((splits.train, splits.evaluation), views)]
    trainer = Trainer(model, arguments.train, *data, processor)
    trainer.train()
    assert trainer.state.global_step == 2
    moved = [key for key, p in model.named_parameters() if key in before and not torch.equal(before[key], p)]
    assert f"{head}.weight" in moved and (len(moved) > 10 or arguments.model.freeze_backbone)


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_where_it_comes_from_and_whether_it_was_run(name):
    text = header(name)
    for word in ("source:", "expected:", "measured:", f"--config {name}"):
        assert word in text
    measured = text.partition("measured:")[2].partition("notes:")[0]
    if recipe_path(name).parent.name == "measured":
        assert re.search(r"\d %", measured) and re.search(r"core|GPU|H\d00", measured)  # a score, and the hardware
        assert re.search(r"seed|n = \d", measured)
    else:
        assert "not yet run" in measured
    for variant in WRITTEN[name].get("variants", {}):
        assert re.search(rf"variants:.*\b{variant}\b.*measured:", text), variant


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_grid_has_its_dev_split_and_a_batch_divides_over_devices(name, variant):
    arguments = found(name, variant)
    assert (arguments.recipe, arguments.variant or "") == (name, variant)
    assert not arguments.train.sweep or arguments.data.dev_fraction
    share = 16 if name == "finetune_small" else 32  # of a hundred images 32 are a third
    assert arguments.train.global_batch_size is None or arguments.train.global_batch_size % share == 0


def test_every_file_of_the_folder_is_found_by_its_name():
    assert sorted(path.stem for path in RECIPES.rglob("*.yaml")) == NAMES


@pytest.mark.parametrize("minutes", [5, 15])
def test_the_timed_recipe_of_cifar10_fits_its_time_on_one_h200(minutes):
    """At 40 % of the peak, and at what 15 cores bring; a minute is left for starting, compiling and evaluating."""
    recipe = found("cifar10_timed", f"{minutes}min")
    config = scratch_config(recipe.model, dict(enumerate("abcdefghij")))
    images, seconds = recipe.train.num_train_epochs * 50_000, 60 * (minutes - 1)
    assert images * train_flops(config, compiled=True) / (0.4 * 989e12) < seconds
    assert images / (recipe.train.dataloader_num_workers * 1_500) < seconds
    assert f"within {minutes} minutes" in header("cifar10_timed")


def test_variants_have_the_numbers_of_the_recipes_that_they_were():
    large = found("deit3", "large")
    assert (large.model.preset, large.model.set["drop_path_rate"]) == ("vit-large-patch16-192", 0.45)
    assert large.model.set["layer_scale_init"] == 1e-4 and large.train.learning_rate == 3e-3
    small = found("deit3", "small")
    assert (small.model.preset, small.train.learning_rate) == ("vit-small-patch16-224", 4e-3)
    rule = {size: found("bit_hyperrule", size).train for size in ("small", "medium", "large")}
    assert [rule[size].max_steps for size in rule] == [500, 10_000, 20_000]
    assert rule["small"].lr_steps == [0.4, 0.6, 0.8] and rule["small"].mixup_alpha == 0
    assert rule["large"].lr_steps == [0.3, 0.6, 0.9] and rule["large"].mixup_alpha == 0.1
    mae = found("finetune_mae", "huge")
    assert (mae.train.learning_rate, mae.train.layer_decay, mae.model.set) == (
        0.004, 0.75, {"pooling": "gap", "drop_path_rate": 0.3},
    )  # fmt: skip
    assert found("plain_vit_s16", "300").train.num_train_epochs == 300


def test_a_small_set_is_seen_a_sane_number_of_times():
    """Of 300 images the paper's 500 steps of 512 are 853 passes."""
    small, foundation = found("finetune_small"), found("finetune_foundation")
    for images, steps, epochs in ((80, 50, 10), (240, 150, 10), (8_000, 5_000, 10), (80_000, 5_000, 1)):
        schedule = TrainingSchedule(small.train, HFViTConfig(), images, 1)
        assert schedule.max_steps == steps and schedule.max_steps * 16 / images == pytest.approx(epochs, rel=0.01)
    for recipe in (small, foundation):  # a head first, then steps for as long as a dev split gains
        assert recipe.model.head_init == "probe" and recipe.data.dev_fraction == 0.2 and recipe.train.eval_on_start
        assert (recipe.train.patience, recipe.train.metric_for_best_model) == (5, "loss")
        assert recipe.train.load_best_model_at_end


def test_the_papers_recipes_have_the_papers_numbers():
    pre = parse(["--config", "vit_imagenet21k"], "pretrain")
    assert (pre.train.loss, pre.model.set["head_bias_init"], pre.train.learning_rate) == ("sigmoid", -10, 1e-3)
    assert (pre.train.weight_decay, pre.train.global_batch_size, pre.train.num_train_epochs) == (0.03, 4096, 90)
    fine = parse(["--config", "finetune_cifar10"], "finetune")
    assert fine.train.sweep == {"learning_rate": [0.001, 0.003, 0.01, 0.03]} and fine.data.dev_fraction == 0.02
    assert (fine.train.max_steps, fine.train.optim, fine.train.max_grad_norm) == (10_000, "sgd", 1.0)
