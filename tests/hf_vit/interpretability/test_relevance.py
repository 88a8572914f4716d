"""Explanations of a class, against whole-graph autograd, whatever the model's state, backend and image are.

python -m pytest tests/hf_vit/interpretability/test_relevance.py
"""

import gc
import os
import shutil

import pytest
import torch

from hf_vit import HFViTError
from hf_vit.inference.token_merging import merge_tokens
from hf_vit.interpretability.attention import (
    attention_distance,
    attention_maps,
    probe_attention,
    rollout,
    token_states,
)
from hf_vit.interpretability.relevance import METHODS, explain, gradient_rollout, relevance
from tests.helpers.inspected_models import KINDS, build, each_kind, eager, two_images


model, pixels = each_kind, two_images


def test_relevance_is_chefers_product(model, pixels):
    target = torch.tensor([3, 0])
    found, rolled = relevance(model, pixels, target), gradient_rollout(model, pixels, target)
    outputs = eager(model, pixels)
    score = outputs.logits[0, 3] + outputs.logits[1, 0]
    product = rollout_product = unit = torch.eye(found.shape[-1]).expand(2, -1, -1)
    for weights, gradient in zip(outputs.attentions, torch.autograd.grad(score, outputs.attentions)):
        weighted = (weights * gradient).clamp_min(0).mean(1).detach()
        product = product + weighted @ product
        mixed = weighted + unit
        rollout_product = mixed / mixed.sum(-1, keepdim=True) @ rollout_product
    torch.testing.assert_close(found, product, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rolled, rollout_product, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rolled.sum(-1), torch.ones_like(rolled.sum(-1)))


def test_explanations_read_the_matrices_as_the_pooling_does(model, pixels):
    config, grid = model.config, model.config.grid_size
    prefix = config.num_prefix_tokens
    for method, matrix in (("relevance", relevance), ("gradient_rollout", gradient_rollout)):
        rows, found = matrix(model, pixels, 2), explain(model, pixels, method, 2)
        assert found.shape == (2, *grid) and (found >= 0).all() and not found.requires_grad
        if config.pooling == "map":
            continue  # the probe's weights have a gradient of their own: test_probe_of_relevance
        read = rows[:, prefix:].mean(1) if config.pooling == "gap" else rows[:, 0]
        torch.testing.assert_close(found, read[:, prefix:].unflatten(1, grid))
    rolled = rollout(model, pixels)
    if config.pooling == "map":
        read = (probe_attention(model, pixels).mean(1).flatten(1)[:, None] @ rolled)[:, 0]
    else:
        read = rolled[:, prefix:].mean(1) if config.pooling == "gap" else rolled[:, 0]
    torch.testing.assert_close(explain(model, pixels, "rollout"), read[:, prefix:].unflatten(1, grid))
    for method in ("rollout", "attention"):
        found = explain(model, pixels, method)
        assert found.shape == (2, *grid) and (found >= 0).all() and not found.requires_grad


def test_an_encoder_alone_is_explained_where_no_class_is_needed(pixels):
    model = build()
    for method in ("attention", "rollout"):
        torch.testing.assert_close(explain(model.vit, pixels, method), explain(model, pixels, method))


def test_probe_of_relevance(pixels):
    """With attention pooling the first factor is the probe's own weights times their gradient."""
    model = build(pooling="map")
    head, kept = model.vit.map_head, []
    model.set_attn_implementation("eager")
    hook = head.attention.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"output_attentions": True}), with_kwargs=True
    )
    keep = head.attention.register_forward_hook(lambda _, args, output: kept.append(output[1]))
    logits = model(pixels).logits
    hook.remove(), keep.remove()
    gradient = torch.autograd.grad(logits[:, 2].sum(), kept)[0]
    first = (kept[0] * gradient).clamp_min(0).mean(1)
    expected = (first @ relevance(model, pixels, 2))[:, 0].unflatten(1, (4, 6))
    torch.testing.assert_close(explain(model, pixels, "relevance", 2), expected, rtol=1e-4, atol=1e-6)
    shares = first / first.sum(-1, keepdim=True)
    expected = (shares @ gradient_rollout(model, pixels, 2))[:, 0].unflatten(1, (4, 6))
    torch.testing.assert_close(explain(model, pixels, "gradient_rollout", 2), expected, rtol=1e-4, atol=1e-6)


# -- the state of the model does not matter, and stays


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_every_backend_shows_the_same_and_is_put_back(backend, pixels):
    model = build(hidden_dropout_prob=0.5, patch_dropout_rate=0.5)  # which would show in training mode
    expected = {method: explain(model, pixels, method) for method in METHODS}
    model.set_attn_implementation(backend)
    model.train()
    for method in METHODS:
        torch.testing.assert_close(explain(model, pixels, method), expected[method], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == backend
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.vit.layers.modules())


@pytest.mark.parametrize("how", ["wrapper", "in place", "encoder in place", "blocks in place", "prepared"])
def test_compiled_and_prepared_models(how, pixels):
    model, expected = build(), {}
    for method in METHODS:
        expected[method] = explain(model, pixels, method)
    maps = attention_maps(model, pixels)[-1]
    if how == "wrapper":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "prepared":
        model.optimize_for_inference()
    elif how == "encoder in place":
        model.vit.compile(backend="eager")
    else:
        for layer in model.vit.layers:
            layer.compile(backend="eager")
    with torch.no_grad():
        model(pixels)  # compiled before anybody looks
    torch.testing.assert_close(attention_maps(model, pixels)[-1], maps)
    for method in METHODS:
        torch.testing.assert_close(explain(model, pixels, method), expected[method], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 80), (41, 70)])
def test_any_size_and_shape_of_image(model, size):
    """Images of another size are explained as by a model whose positions were resized to it."""
    pixels, (rows, columns) = torch.randn(2, 3, *size), model.config.grid_for(size)
    maps = {method: explain(model, pixels, method, 1) for method in METHODS}
    rolled, distance, states = rollout(model, pixels), attention_distance(model, pixels), token_states(model, pixels)
    down, across = model.config.total_stride
    model.resize_position_embeddings((rows * down, columns * across))
    if model.config.resnet_depths is None:
        pixels = pixels[..., : rows * down, : columns * across]  # a ResNet sees the edge that patches would cut off
    for method, found in maps.items():
        assert found.shape == (2, rows, columns)
        torch.testing.assert_close(explain(model, pixels, method, 1), found, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rollout(model, pixels), rolled)
    torch.testing.assert_close(attention_distance(model, pixels), distance)
    torch.testing.assert_close(token_states(model, pixels)[-1], states[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapper", "in place"])
@pytest.mark.parametrize("kind", ["token", "gap", "map", "two-stage hybrid"])
def test_inductor(kind, how, pixels):
    """Compiled by inductor: the same maps and explanations, and the compiled graph is used again afterwards."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile writes C++ and there is no compiler for it here: install g++, or set CXX to one")
    model = build(**KINDS[kind])
    expected = {method: explain(model, pixels, method, 1) for method in METHODS}
    maps, rolled, distance = attention_maps(model, pixels), rollout(model, pixels), attention_distance(model, pixels)
    logits = model(pixels).logits.detach()
    torch._dynamo.reset()
    if how == "wrapper":
        model = torch.compile(model)
    else:
        model.compile()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, logits, rtol=1e-4, atol=1e-4)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    assert before > 0
    torch.testing.assert_close(attention_maps(model, pixels)[-1], maps[-1])
    torch.testing.assert_close(model.attention_maps(pixels)[-1], maps[-1])
    torch.testing.assert_close(rollout(model, pixels), rolled)
    torch.testing.assert_close(attention_distance(model, pixels), distance)
    for method in METHODS:
        torch.testing.assert_close(explain(model, pixels, method, 1), expected[method])
    with torch.no_grad():
        model(pixels)
    assert stats["unique_graphs"] == before


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_and_half_precision(method, pixels):
    model = build()
    expected = explain(model, pixels, method, 1)
    with torch.inference_mode():
        torch.testing.assert_close(explain(model, pixels.clone(), method, 1), expected)
    half = explain(build().to(torch.bfloat16), pixels, method, 1)
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.stack([half.flatten(), expected.flatten()]))[0, 1] > 0.95


def test_one_block_at_a_time_is_in_memory(pixels):
    """However deep the model is, no more than one block's weights live when the next block runs."""
    model = build(num_hidden_layers=5)
    tokens, most = 25, 0

    def count(*_):
        nonlocal most
        alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (2, 4, tokens, tokens)]
        most = max(most, len(alive))

    hooks = [layer.register_forward_pre_hook(count) for layer in model.vit.layers]
    gc.freeze()  # what was there before is not looked through again and again
    for look in (attention_distance, rollout, lambda *a: attention_maps(*a, layers=[0]), relevance, gradient_rollout):
        most = 0
        look(model, pixels)
        assert most <= 2, look  # of a block going backwards: its weights and their gradient
    most = 0
    attention_maps(model, pixels, layers=range(5))
    assert most == 4  # the count sees what is kept
    gc.unfreeze()
    for hook in hooks:
        hook.remove()


# -- bad input


def test_bad_input_is_named(pixels):
    model, merged = build(), merge_tokens(build(pooling="map"), r=4)
    resnet = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    cases = [
        (lambda: explain(resnet, pixels), "has no attention"),
        (lambda: explain(model, pixels, "lime"), "method='lime' is not one of attention, rollout"),
        (lambda: explain(model, pixels, "relevance", 5), "class .5. does not exist: the model has 5, 0 to 4"),
        (lambda: explain(model, pixels, "relevance", torch.tensor([1, 2, 3])), "one class number or 2"),
        (lambda: explain(model.vit, pixels, "relevance"), "HFViTModel without classifier"),
        (lambda: explain(build(num_hidden_layers=0), pixels), "no transformer blocks"),
        (lambda: explain(merged, pixels, "attention"), "12 of 4 x 6 patch tokens are left, the others were merged"),
        (lambda: explain(merged, pixels, "rollout"), "call merge_tokens.model, r=0. first"),
        (lambda: explain(merged, pixels, "relevance"), "call merge_tokens.model, r=0. first"),
        (lambda: token_states(merged, pixels), "call merge_tokens.model, r=0. first"),
    ]
    for call, message in cases:
        with pytest.raises(HFViTError, match=message):
            call()
