"""The recipes of the families' authors on a tiny model of their own family, with the numbers that they published.

python -m pytest -m slow tests/training/test_family_recipes.py
"""

import json
from pathlib import Path

import pytest
import torch
import yaml

from hf_vit import HFViTForImageClassification, load_checkpoint
from training import finetune
from training.config.recipes import recipe_path


FOLDER = Path(__file__).parents[1] / "fixtures" / "goldens_family"
SHORT = (
    "--dataset digits --use_cpu --disable_tqdm --dataloader_num_workers 0 --bf16 false --no_flip --image_size 32 "
    "--per_device_train_batch_size 8 --per_device_eval_batch_size 64 --global_batch_size 16 --max_steps 2"
)
PER_256 = 1024 / 256  # MAE gives its rate for 256 images, and trains on 1,024


@pytest.mark.parametrize(
    ("recipe", "variant", "rate", "layer_decay", "epochs"),
    [
        ("finetune_mae", "base", 5e-4 * PER_256, 0.65, 100),
        ("finetune_mae", "large", 1e-3 * PER_256, 0.75, 50),
        ("finetune_mae", "huge", 1e-3 * PER_256, 0.75, 50),
        ("finetune_beit", "base", 4e-3, 0.65, 100),
        ("finetune_beit", "base_ft22k", 2e-5, 0.85, 30),
        ("finetune_beitv2", "base", 5e-4, 0.6, 100),
        ("finetune_beitv2", "base_ft21k", 5e-5, 0.75, 30),
        ("finetune_eva02", "tiny", 2e-4, 0.9, 100),
        ("finetune_eva02", "small", 1e-4, 0.8, 100),
        ("finetune_eva02", "base", 1e-4, 0.7, 30),
        ("finetune_eva02", "large", 5e-5, 0.8, 30),
        ("deit3_finetune", "base", 1e-5, None, 20),
    ],
)
def test_the_authors_numbers(recipe, variant, rate, layer_decay, epochs):
    """Source of each number: the header of the recipe."""
    written = yaml.safe_load(recipe_path(recipe).read_text())
    found = written | written["variants"][variant]
    assert found["learning_rate"] == pytest.approx(rate) and found["num_train_epochs"] == epochs
    assert found.get("layer_decay") == layer_decay
    assert found["weight_decay"] == {"base_ft22k": 1e-8}.get(variant, 0.1 if recipe == "deit3_finetune" else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "variant", "golden", "read"),
    [  # what the new head reads
        ("finetune_mae", "base", "vit_mae", ("gap", "pooled", "pooled")),
        ("finetune_beit", "base", "beit_classifier", ("gap", "pooled", "pooled")),
        ("finetune_beitv2", "base", "timm_beit", ("gap", "pooled", "pooled")),
        ("finetune_eva02", "base", "timm_eva02_base", ("gap", "pooled", "pooled")),
        ("linear_dino", None, "dinov2_classifier", ("token", "tokens", "token_and_mean")),
        ("linear_dino", None, "dinov3", ("token", "tokens", "token_and_mean")),
        ("finetune_foundation", None, "clip_two_towers", ("token", "pooled", "pooled")),
    ],
)
def test_it_trains_a_model_of_the_family(recipe, variant, golden, read, tmp_path):
    words = f"--config {recipe} --model {FOLDER / golden} --output_dir {tmp_path / 'out'} {SHORT}".split()
    words += ["--variant", variant, "--warmup_steps", "1"] if variant else []
    finetune.main(words)
    model = HFViTForImageClassification.from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.pooling, config.final_norm, config.head_input) == read and config.num_labels == 10
    before, after = load_checkpoint(FOLDER / golden).vit.state_dict(), model.vit.state_dict()
    same = [torch.equal(after[name], value) for name, value in before.items()]
    # two steps hardly beat the probe of finetune_foundation, whose encoder then stays
    assert recipe == "finetune_foundation" or all(same) == (recipe == "linear_dino")
    if recipe == "linear_dino":  # the grid of rates
        rates = yaml.safe_load(recipe_path(recipe).read_text())["sweep"]["learning_rate"]
        assert len(list((tmp_path / "out" / "sweep").iterdir())) == len(rates) == 13
        facts = json.loads((tmp_path / "out" / "facts.json").read_text())
        assert any(str(rate) in json.dumps(facts) for rate in rates)
