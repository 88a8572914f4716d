"""Optimisation: only kernels decay, and the schedule is Google's.

pytest tests/test_optimization.py
"""

import numpy as np
import pytest
import torch

from hf_vit import HFViTConfig, HFViTForImageClassification
from training.arguments import TrainArguments
from training.optimization import create_optimizer, create_scheduler, parameter_groups, rate_factor, warmup_updates


def tiny(**fields):
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
              "image_size": 8, "patch_size": 4, "num_labels": 3}  # fmt: skip
    return HFViTForImageClassification(HFViTConfig(**config | fields))


def test_norms_biases_positions_and_tokens_do_not_decay():
    model = tiny(num_register_tokens=2, resnet_depths=[1], patch_size=1, layer_scale_init=0.1, image_size=16)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[p] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert decayed | kept == set(names.values())
    for part in (
        "cls_token",
        "register_tokens",
        "position_embeddings",
        "layernorm",
        "bias",
        "gn1",
        "gn_root",
        "lambda1",
    ):
        assert any(part in name for name in kept) and not any(part in name for name in decayed), part
    for part in ("q_proj.weight", "fc1.weight", "projection.weight", "conv_root.weight", "classifier.weight"):
        assert any(part in name for name in decayed), part


def test_a_probe_does_not_decay_and_frozen_parameters_are_left_out():
    model = tiny(pooling="map")
    kept = {id(p) for p in parameter_groups(model, 0.1)[1]["params"]}
    assert id(model.vit.map_head.probe) in kept
    model.freeze_backbone()
    moved = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert moved == {id(model.classifier.weight), id(model.classifier.bias)}


def google(step, base, total, warmup, decay_type, linear_end=1e-5):
    """vit_jax/utils.py create_learning_rate_schedule at c6de1e5, in numpy."""
    progress = np.clip((step - warmup) / float(total - warmup), 0.0, 1.0)
    if decay_type == "linear":
        lr = linear_end + (base - linear_end) * (1.0 - progress)
    else:
        lr = base * 0.5 * (1.0 + np.cos(np.pi * progress))
    return lr * np.minimum(1.0, step / warmup) if warmup else lr


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_schedule_is_googles(kind):
    end = 1e-5 if kind == "linear" else 0.0
    ours = [0.03 * rate_factor(s, max_steps=50, warmup=10, kind=kind, end=end / 0.03) for s in range(50)]
    np.testing.assert_allclose(ours, [google(s, 0.03, 50, 10, kind) for s in range(50)], rtol=1e-12)
    assert ours[0] == 0.0


def test_the_scheduler_gives_the_first_update_rate_zero_and_ends_at_lr_end():
    args = TrainArguments(learning_rate=0.1, lr_end=0.01, warmup_steps=4, lr_scheduler_type="linear")
    optimizer = create_optimizer(tiny(), args)
    scheduler = create_scheduler(optimizer, args, max_steps=20)
    rates = []
    for _ in range(21):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0 and max(rates) == rates[4] == pytest.approx(0.1) and rates[20] == pytest.approx(0.01)


def test_warmup_below_one_is_a_share():
    assert warmup_updates(0.1, 55) == 6 and warmup_updates(10, 55) == 10 and warmup_updates(0, 55) == 0


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_every_optimizer_moves_the_weights_with_its_numbers(name):
    model = tiny()
    optimizer = create_optimizer(model, TrainArguments(optim=name, momentum=0.7, adam_beta2=0.95, weight_decay=0.2))
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == 0.2 and optimizer.param_groups[1]["weight_decay"] == 0
    assert group["momentum"] == 0.7 if name == "sgd" else group["betas"] == (0.9, 0.95)
    before = model.vit.layers[0].mlp.fc1.weight.clone()
    torch.nn.init.normal_(model.classifier.weight)  # a zero head passes no gradient on
    model(torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert not torch.equal(before, model.vit.layers[0].mlp.fc1.weight)
