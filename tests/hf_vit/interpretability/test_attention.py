"""What a model attends to and is made of, against loops and recomputation.

python -m pytest tests/hf_vit/interpretability/test_attention.py
"""

import os
import subprocess
import sys

import pytest
import torch

from hf_vit import HFViTError, HFViTModel
from hf_vit.interpretability.attention import (
    attention_distance,
    attention_maps,
    class_attention,
    embedding_filters,
    feature_colors,
    position_similarity,
    probe_attention,
    rollout,
    rollout_map,
    token_norms,
    token_states,
)
from tests.conftest import ROOT
from tests.helpers.inspected_models import KINDS, build, each_kind, eager, two_images


model, pixels = each_kind, two_images


# -- attention


def test_maps_equal_those_of_the_attention_interface(model, pixels):
    maps = attention_maps(model, pixels, layers=[0, -1, 1], heads=[-1, 0])
    own = model.attention_maps(pixels, layers=[0, -1])
    published = eager(model, pixels).attentions
    assert list(own) == [0, -1]
    for index, found in own.items():
        torch.testing.assert_close(found, published[index])
    assert list(maps) == [0, -1, 1]
    for index, found in maps.items():
        torch.testing.assert_close(found, published[index][:, [3, 0]])
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)))


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (41, 70)])
def test_class_attention_is_a_row_or_a_mean_of_the_maps(model, size):
    pixels = torch.randn(2, 3, *size)
    config = model.config
    rows, columns = config.grid_for(size)
    full = attention_maps(model, pixels)[-1][..., config.num_prefix_tokens :]
    if config.use_class_token or config.pooling == "first":
        expected = full[:, :, 0]
    else:
        expected = full[:, :, config.num_prefix_tokens :].mean(dim=2)
    found = class_attention(model, pixels)[-1]
    assert found.shape == (2, 4, rows, columns)
    torch.testing.assert_close(found.flatten(2), expected)


def test_probe_attention_is_what_pooling_reads(pixels):
    model = build(pooling="map")
    head, tokens = model.vit.map_head, model.vit(pixels).last_hidden_state
    weights = probe_attention(model, pixels).flatten(2)  # (B, heads, N)
    value = head.attention.v_proj(tokens).unflatten(2, (4, 8)).transpose(1, 2)
    read = head.attention.o_proj((weights[:, :, None] @ value).transpose(1, 2).flatten(2))
    pooled = (read + head.mlp(head.layernorm(read)))[:, 0]
    torch.testing.assert_close(pooled, model.vit(pixels).pooler_output, rtol=1e-4, atol=1e-5)
    with pytest.raises(HFViTError, match='pooling="token" has no probe'):
        probe_attention(build(), pixels)


def test_rollout_is_the_product_of_row_stochastic_matrices(model, pixels):
    rolled = rollout(model, pixels)
    product = torch.eye(rolled.shape[-1]).expand(2, -1, -1)
    for weights in eager(model, pixels).attentions:
        product = (weights.mean(1) + torch.eye(rolled.shape[-1])) / 2 @ product
    torch.testing.assert_close(rolled, product)
    for fusion in ("mean", "max", "min"):
        sums = rollout(model, pixels, fusion).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_dividing_columns_is_not_rollout(pixels):
    """The widely copied normalization, `a / a.sum(-1)`, on the same matrices: its rows do not sum to one."""
    model = build(pooling="gap")
    fused = attention_maps(model, pixels)[-1].amax(1) + torch.eye(24)
    assert (fused / fused.sum(-1)[:, None, :] - fused / fused.sum(-1, keepdim=True)).abs().max() > 1e-3
    assert ((fused / fused.sum(-1)[:, None, :]).sum(-1) - 1).abs().max() > 1e-3


def test_attention_distance_equals_a_loop(model, pixels):
    config, found = model.config, attention_distance(model, pixels)
    rows, columns = config.grid_size
    down, across = config.total_stride
    maps = attention_maps(model, pixels, layers=range(3))
    for layer, head in ((0, 0), (2, 3)):
        total = count = 0
        for image in range(2):
            patches = maps[layer][image, head][config.num_prefix_tokens :, config.num_prefix_tokens :]
            for query in range(rows * columns):
                away = [
                    ((query // columns - key // columns) ** 2 * down**2
                     + (query % columns - key % columns) ** 2 * across**2) ** 0.5
                    for key in range(rows * columns)
                ]  # fmt: skip
                row = patches[query].tolist()
                total += sum(weight * distance for weight, distance in zip(row, away)) / sum(row)
                count += 1
        assert found[layer, head].item() == pytest.approx(total / count, rel=1e-4)


def test_a_hybrids_distance_is_in_pixels_of_the_image():
    """Uniform attention over a row of patches 8 pixels apart."""
    model = build(resnet_depths=(1, 1), patch_size=1, image_size=(8, 32))
    for layer in model.vit.layers:
        torch.nn.init.zeros_(layer.attention.q_proj.weight)
    places = 8.0 * torch.arange(4)
    expected = (places[:, None] - places).abs().mean()
    distance = attention_distance(model, torch.randn(1, 3, 8, 32))
    torch.testing.assert_close(distance, expected.expand(3, 4))


def test_an_encoder_alone_shows_its_attention(pixels):
    model = build()
    encoder: HFViTModel = model.vit
    torch.testing.assert_close(rollout_map(encoder, pixels), rollout_map(model, pixels))
    torch.testing.assert_close(class_attention(encoder, pixels), class_attention(model, pixels))


MEMORY = """
import gc
import torch
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.interpretability.attention import attention_maps, rollout_map

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
start = status("VmRSS")
with torch.device("meta"):
    config = HFViTConfig.from_preset("vit-large-patch16-384", image_size=512, num_labels=10)
    model = HFViTForImageClassification(config)
model = model.to_empty(device="cpu").eval().requires_grad_(False)
for parameter in model.parameters():
    parameter.uniform_(-0.02, 0.02)
pixels = torch.randn(1, 3, 512, 512)
for run in (model, model, lambda x: attention_maps(model, x), lambda x: rollout_map(model, x)):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    run(pixels)
    print(status("VmHWM") - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux",
    reason="only Linux lets a process set its peak memory back; elsewhere the peak of start-up would count",
)
def test_peak_memory_is_that_of_a_forward_pass():
    """ViT-L/16 at 512 px, without what Python and torch take: one block's maps within 1.2 times, rollout too."""
    words = [sys.executable, "-c", MEMORY]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    _, forward, maps, rolled = map(int, ran.stdout.split())
    assert forward > 1_200_000  # the weights alone, or nothing was measured
    assert maps < 1.2 * forward and rolled < 1.2 * forward


# -- parameters and tokens


def test_filters_are_principal_components(pixels):
    model = build()
    found = embedding_filters(model, 5)
    assert found.components.shape == (5, 3, 8, 8) and found.components.amin() == 0 and found.components.amax() == 1
    weight = model.vit.embeddings.patch_embeddings.projection.weight.detach().flatten(1)
    centered = (weight - weight.mean(0)).double()
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    torch.testing.assert_close(found.explained, (values.flip(0)[:5] / values.sum()).float())
    for place in range(5):
        vector = vectors[:, -1 - place].float()
        vector = vector * vector[vector.abs().argmax()].sign()  # its largest entry is positive
        assert torch.corrcoef(torch.stack([found.components[place].flatten(), vector]))[0, 1] > 0.999
    assert embedding_filters(model, 1000).components.shape[0] == 32


def test_a_hybrids_filters_are_those_that_it_uses():
    """Standardized: neither their scale nor their mean matters."""
    model = build(**KINDS["two-stage hybrid"])
    found = embedding_filters(model)
    assert found.components.shape == (28, 3, 7, 7)
    with torch.no_grad():
        weight = model.vit.embeddings.patch_embeddings.backbone.conv_root.weight
        weight.mul_(torch.linspace(1, 9, len(weight))[:, None, None, None]).add_(0.3)
    torch.testing.assert_close(embedding_filters(model).explained, found.explained, rtol=1e-3, atol=1e-5)


def test_position_similarity_is_one_with_itself():
    similarity = position_similarity(build(num_register_tokens=2))
    assert similarity.shape == (4, 6, 4, 6)
    flat = similarity.reshape(24, 24)
    torch.testing.assert_close(flat.diagonal(), torch.ones(24))
    torch.testing.assert_close(flat, flat.T)
    near = position_similarity(build(position_embedding_type="sincos2d"))[1, 2]
    assert near[1, 2] > near[1, 3] > near[1, 5]
    with pytest.raises(HFViTError, match="no position embeddings"):
        position_similarity(build(position_embedding_type="none"))


def test_states_norms_and_colors(model, pixels):
    states = token_states(model, pixels, [0, -1], normalized=True)
    last = model.vit(pixels).last_hidden_state[:, model.config.num_prefix_tokens :]
    torch.testing.assert_close(states[-1].flatten(1, 2), last)
    raw = model(pixels, output_hidden_states=True).hidden_states[1][:, model.config.num_prefix_tokens :]
    torch.testing.assert_close(token_norms(model, pixels, [0])[0].flatten(1), raw.norm(dim=-1))
    colors = feature_colors(states[-1])
    assert colors.shape == (2, *model.config.grid_size, 3) and colors.min() >= 0 and colors.max() <= 1


def test_an_outlier_token_stands_out(pixels):
    """What registers take up: one patch made many times longer is the largest of its map, at its place."""
    model = build()

    def stretch(block, args, output):
        output = output.clone()
        output[:, 1 + 13] *= 30  # the class token, then 4 x 6 patches
        return output

    hook = model.vit.layers[1].register_forward_hook(stretch)
    norms = token_norms(model, pixels, [0, 1])
    hook.remove()
    assert norms[1].flatten(1).argmax(1).tolist() == [13, 13]
    assert norms[1].amax() / norms[1].median() > 10 > 3 > norms[0].amax() / norms[0].median()


def test_equal_features_have_equal_colors():
    halves = torch.zeros(1, 4, 4, 8)
    halves[:, :, 2:] = torch.arange(8.0)
    colors = feature_colors(halves)[0]
    assert (colors[:, :2] == colors[0, 0]).all() and (colors[:, 2:] == colors[0, 2]).all()
    assert (colors[0, 0] != colors[0, 2]).any()


# -- bad input


def test_bad_input_is_named(pixels):
    model = build()
    resnet = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    cases = [
        (lambda: attention_maps(model, pixels, layers=[3]), "layer 3 does not exist: the model has 3, 0 to 2"),
        (lambda: class_attention(model, pixels, layers=[-4]), "layer -4 does not exist"),
        (lambda: attention_maps(model, pixels, layers=[]), "no layers asked for"),
        (lambda: attention_maps(model, pixels, heads=[4]), "head 4 does not exist: the model has 4, 0 to 3"),
        (lambda: attention_maps(model, pixels, heads=[]), "no heads asked for"),
        (lambda: attention_maps(model, pixels[0]), "expected .batch, channels, height, width."),
        (lambda: rollout_map(resnet, pixels), "Sequential has no attention that could be shown"),
        (lambda: rollout_map(build(num_hidden_layers=0), pixels), "no transformer blocks"),
        (lambda: rollout(model, pixels, "median"), "fusion='median' is not one of"),
    ]
    for call, message in cases:
        with pytest.raises(HFViTError, match=message):
            call()
