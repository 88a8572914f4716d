"""Optimization: only kernels decay, and the schedule is Google's.

pytest tests/training/engine/test_optimizers.py
"""

import numpy as np
import pytest
import torch

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.errors import HFViTError
from training.config.arguments import TrainArguments
from training.engine.masked_patch_prediction import masked_model
from training.engine.optimizers import (
    GradualUnfreezing,
    averaged_by,
    create_optimizer,
    decays,
    layer_of_parameters,
    parameter_groups,
)
from training.engine.planning.lr_schedules import create_scheduler, rate_factor


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


def test_tokens_that_only_some_networks_have_do_not_decay():
    masked = masked_model(HFViTConfig(image_size=8, patch_size=4, hidden_size=8, num_attention_heads=2, num_labels=0))
    kept = {id(p) for p in parameter_groups(masked, 0.1)[1]["params"]}
    assert id(masked.mask_token) in kept
    assert not decays("deit.embeddings.distillation_token", torch.zeros(1, 1, 8))


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


def big_vision(step, total, warmup, cooldown, timescale):
    """big_vision utils.py create_learning_rate_schedule with decay_type="rsqrt", in numpy."""
    lr = np.where(warmup <= step, 1 / np.sqrt(1 + (step - warmup) / timescale), 1.0)
    return lr * np.minimum(1.0, step / warmup) * np.minimum(1.0, (total - step) / cooldown)


def test_rsqrt_and_cooldown_are_big_visions():
    settings = {"max_steps": 50, "warmup": 5, "cooldown": 8, "timescale": 12.0}
    ours = [rate_factor(s, kind="rsqrt", **settings) for s in range(51)]
    np.testing.assert_allclose(ours, [big_vision(s, 50, 5, 8, 12.0) for s in range(51)], rtol=1e-12)
    assert ours[50] == 0.0 and ours[0] == 0.0


def test_warmup_and_cooldown_must_fit_into_the_run():
    with pytest.raises(HFViTError, match="longer than the training of 20"):
        TrainArguments(max_steps=20, warmup_steps=21)
    with pytest.raises(HFViTError, match="cooldown of 10: longer than the training of 20"):
        TrainArguments(max_steps=20, warmup_steps=11, cooldown_steps="50%")
    args = TrainArguments(num_train_epochs=2, warmup_steps="3 epochs")
    with pytest.raises(HFViTError, match="warm-up of 15 steps: longer than the training of 10"):
        create_scheduler(create_optimizer(tiny(), args), args, max_steps=10, epoch=5.0)


def test_layers_of_a_hybrid_count_the_stages_of_its_resnet():
    model = tiny(resnet_depths=[1, 1], patch_size=1, image_size=16, num_hidden_layers=2, representation_size=8)
    numbers = layer_of_parameters(name for name, _ in model.named_parameters())
    expected = {
        "vit.embeddings.patch_embeddings.backbone.conv_root.weight": 0,
        "vit.embeddings.patch_embeddings.backbone.stages.0.units.0.conv1.weight": 1,
        "vit.embeddings.patch_embeddings.backbone.stages.1.units.0.gn1.weight": 2,
        "vit.embeddings.patch_embeddings.projection.weight": 3,
        "vit.embeddings.cls_token": 3,
        "vit.embeddings.position_embeddings": 3,
        "vit.layers.0.mlp.fc1.weight": 4,
        "vit.layers.1.layernorm_before.weight": 5,
        "vit.layernorm.weight": 6,
        "vit.pooler.dense.weight": 6,
        "classifier.weight": 6,
    }
    assert {name: numbers[name] for name in expected} == expected


def test_layer_decay_scales_every_rate_and_the_schedule_keeps_the_ratio():
    model = tiny(num_hidden_layers=3)
    args = TrainArguments(learning_rate=0.1, layer_decay=0.5, weight_decay=0.3, warmup_steps=0, max_steps=10)
    optimizer = create_optimizer(model, args)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(found) == set(names.values())
    assert found["classifier.bias"] == found["vit.layernorm.weight"] == 0.1
    assert found["vit.layers.2.mlp.fc1.bias"] == 0.05 and found["vit.layers.0.mlp.fc1.weight"] == 0.0125
    assert found["vit.embeddings.cls_token"] == 0.00625
    kept = {names[p] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert "vit.embeddings.cls_token" in kept and "vit.layers.1.layernorm_after.weight" in kept
    scheduler = create_scheduler(optimizer, args, max_steps=10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    rates = scheduler.get_last_lr()
    assert max(rates) == pytest.approx(0.05) and min(rates) == pytest.approx(0.003125)


def learn(model, optimizer, steps=1):
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(4, 3, 8, 8), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    # in float64: Muon makes rounding as large as the rest where a gradient is of few images, so of low rank
    model, plain = (tiny(num_register_tokens=1).double() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    args = TrainArguments(optim="muon", learning_rate=0.01, weight_decay=0.1, muon_momentum=0.9)
    optimizer = create_optimizer(model, args)
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon = {names[p] for group in optimizer.muon.param_groups for p in group["params"]}
    assert muon == {
        n for n in names.values() if n.startswith("vit.layers") and n.endswith(".weight") and "norm" not in n
    }
    reference = [
        torch.optim.Muon(
            [p for n, p in plain.named_parameters() if n in muon],
            lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        *(torch.optim.AdamW([p], lr=0.01, weight_decay=0.1 if p.ndim > 1 and n[-6:] == "weight" else 0.0)
          for n, p in plain.named_parameters() if n not in muon),
    ]  # fmt: skip
    learn(model, optimizer, 3)
    for step in range(3):
        torch.manual_seed(step)
        plain(torch.randn(4, 3, 8, 8), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        for one in reference:
            one.step()
            one.zero_grad()
    for name, weight in model.named_parameters():
        if "k_proj.bias" not in name:  # its gradient is rounding
            torch.testing.assert_close(weight, plain.get_parameter(name), atol=1e-5, rtol=1e-4, msg=name)


def test_muon_goes_on_from_its_state():
    torch.manual_seed(0)
    whole = tiny()
    first = tiny()
    first.load_state_dict(whole.state_dict())
    args = TrainArguments(optim="muon", learning_rate=0.01)
    one, two = create_optimizer(whole, args), create_optimizer(first, args)
    learn(whole, one, 1)
    learn(first, two, 1)
    again = create_optimizer(first, args)
    again.load_state_dict(two.state_dict())
    learn(whole, one, 1)
    learn(first, again, 1)
    for (name, ours), theirs in zip(whole.named_parameters(), first.parameters()):
        assert torch.equal(ours, theirs), name


def test_a_probe_under_muon_is_adamws():
    model = tiny()
    model.freeze_backbone()
    assert isinstance(create_optimizer(model, TrainArguments(optim="muon")), torch.optim.AdamW)


def test_schedule_free_is_evaluated_at_its_average_and_comes_back_bit_for_bit():
    pytest.importorskip("schedulefree")
    model = tiny()
    args = TrainArguments(optim="schedule_free_adamw", learning_rate=0.01, lr_scheduler_type="constant")
    optimizer = create_optimizer(model, args)
    learn(model, optimizer, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with averaged_by(optimizer):
        assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    learn(model, optimizer, 1)
    with averaged_by(create_optimizer(tiny(), TrainArguments())):
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type constant"),
        ({"lr_scheduler_type": "constant", "ema_decay": 0.9}, "leave out --ema_decay"),
        (
            {"lr_scheduler_type": "constant", "load_best_model_at_end": True, "eval_steps": 1},
            "leave out --load_best_model",
        ),
    ],
)
def test_schedule_free_refuses_what_it_replaces(words, message):
    with pytest.raises(HFViTError, match=message):
        TrainArguments(optim="schedule_free_adamw", **words)


def test_layers_begin_to_train_from_the_head_down():
    model = tiny(num_hidden_layers=2)
    torch.nn.init.normal_(model.classifier.weight)
    thaw, moving = GradualUnfreezing(model, every=2), []
    for step in range(8):
        model(torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss.backward()
        thaw.drop_gradients(step)
        parts = (
            "classifier.weight",
            "vit.layers.1.mlp.fc1.weight",
            "vit.layers.0.mlp.fc1.weight",
            "vit.embeddings.cls_token",
        )
        moving.append([model.get_parameter(name).grad is not None for name in parts].count(True))
        model.zero_grad()
    assert moving == [1, 1, 2, 2, 3, 3, 4, 4] and thaw.last == 6


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


def test_lamb_steps_have_the_length_of_the_weights():
    model = tiny()
    torch.nn.init.normal_(model.classifier.weight)
    optimizer = create_optimizer(model, TrainArguments(optim="lamb", learning_rate=0.1, weight_decay=0.05))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model, optimizer, 1)
    for name, weight in model.named_parameters():
        moved = (weight.detach() - before[name]).norm()
        if name == "vit.layers.0.mlp.fc1.weight":
            torch.testing.assert_close(moved, 0.1 * before[name].norm())
        if name == "classifier.bias":  # no decay: AdamW's first step, of one rate each
            torch.testing.assert_close(moved, torch.tensor(0.1 * 3**0.5), rtol=1e-4, atol=1e-6)


def test_step_divides_by_ten_as_bit_does():
    def bit(step, supports, base=0.003):
        """big_transfer's bit_hyperrule.get_lr."""
        if step < supports[0]:
            return base * step / supports[0]
        for support in supports[1:]:
            if support < step:
                base /= 10
        return base

    for supports, drops in (
        ([500, 3000, 6000, 9000, 10000], (0.3, 0.6, 0.9)),
        ([100, 200, 300, 400, 500], (0.4, 0.6, 0.8)),
    ):
        total, warmup = supports[-1], supports[0]
        for step in range(0, total, 7):
            ours = rate_factor(step, max_steps=total, warmup=warmup, kind="step", drops=drops)
            assert 0.003 * ours == pytest.approx(bit(step, supports))
