"""What a model attends to, against loops, recomputation and a model whose answer is known.

python -m pytest tests/test_inspection.py
"""

import gc
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from hf_vit import HFViTConfig, HFViTError, HFViTForImageClassification, HFViTModel
from hf_vit.inspection import (
    attention_distance,
    attention_maps,
    class_attention,
    embedding_filters,
    feature_colours,
    position_similarity,
    probe_attention,
    rollout,
    rollout_map,
    token_norms,
    token_states,
)
from hf_vit.perturbation import Curves, cells, compare_explanations, perturbation_curves
from hf_vit.relevance import METHODS, explain, gradient_rollout, relevance


KINDS = {
    "token": {},
    "gap": {"pooling": "gap", "num_register_tokens": 2},
    "map": {"pooling": "map"},
    "first": {"pooling": "first"},
    "registers": {"num_register_tokens": 3, "representation_size": 8, "qk_norm": True, "layer_scale_init": 0.5},
    "root hybrid": {"resnet_depths": (), "patch_size": 2},
    "two-stage hybrid": {"resnet_depths": (1, 1), "patch_size": (1, 1), "pooling": "map"},
}
HEIGHT, WIDTH = 32, 48


def build(**changes):
    """A classifier of random weights, also those of the head, which starts at zero."""
    torch.manual_seed(0)
    sizes = {
        "image_size": (HEIGHT, WIDTH), "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 5, "resnet_width_factor": 0.5,
    }  # fmt: skip
    model = HFViTForImageClassification(HFViTConfig(**(sizes | changes))).eval()
    torch.nn.init.normal_(model.classifier.weight)
    return model


@pytest.fixture(params=KINDS, ids=lambda name: name.replace(" ", "-"))
def model(request):
    return build(**KINDS[request.param])


@pytest.fixture
def pixels():
    return torch.randn(2, 3, HEIGHT, WIDTH)


def eager(model, pixels):
    """What transformers' own interface returns."""
    model.set_attn_implementation("eager")
    return model(pixels, output_attentions=True)


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
    """The widely copied normalisation, `a / a.sum(-1)`, on the same matrices: its rows do not sum to one."""
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
        for picture in range(2):
            patches = maps[layer][picture, head][config.num_prefix_tokens :, config.num_prefix_tokens :]
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


# -- the state of the model does not matter, and stays


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_every_backend_shows_the_same_and_is_put_back(backend, pixels):
    model = build()
    expected = {method: explain(model, pixels, method) for method in METHODS}
    model.set_attn_implementation(backend)
    model.train()
    for method in METHODS:
        torch.testing.assert_close(explain(model, pixels, method), expected[method], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == backend
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.vit.layers.modules())


@pytest.mark.parametrize("how", ["wrapper", "in place", "encoder in place", "blocks in place"])
def test_compiled_models(how, pixels):
    model, expected = build(), {}
    for method in METHODS:
        expected[method] = explain(model, pixels, method)
    maps = attention_maps(model, pixels)[-1]
    if how == "wrapper":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
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
def test_any_size_and_shape_of_picture(model, size):
    """Pictures of another size are explained as by a model whose positions were resized to it."""
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
        pytest.skip("inductor compiles C++: install g++, or set CXX")
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


MEMORY = """
import gc
import torch
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.inspection import attention_maps, rollout_map

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
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak memory anew, in /proc")
def test_peak_memory_is_that_of_a_forward_pass():
    """ViT-L/16 at 512 px, without what Python and torch take: one block's maps within 1.2 times, rollout too."""
    words = [sys.executable, "-c", MEMORY]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    _, forward, maps, rolled = map(int, ran.stdout.split())
    assert forward > 1_200_000  # the weights alone, or nothing was measured
    assert maps < 1.2 * forward and rolled < 1.2 * forward


# -- relevance


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
    for method in ("rollout", "attention"):
        found = explain(model, pixels, method)
        assert found.shape == (2, *grid) and (found >= 0).all() and not found.requires_grad


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


# -- parameters and tokens


def test_filters_are_principal_components(pixels):
    model = build()
    found = embedding_filters(model, 5)
    assert found.components.shape == (5, 3, 8, 8) and found.components.amin() == 0 and found.components.amax() == 1
    weight = model.vit.embeddings.patch_embeddings.projection.weight.detach().flatten(1)
    centred = (weight - weight.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    torch.testing.assert_close(found.explained, (values.flip(0)[:5] / values.sum()).float())
    for place in range(5):
        vector = vectors[:, -1 - place].float()
        assert torch.corrcoef(torch.stack([found.components[place].flatten(), vector]))[0, 1].abs() > 0.999
    assert embedding_filters(model, 1000).components.shape[0] == 32
    assert embedding_filters(build(**KINDS["two-stage hybrid"])).components.shape == (28, 3, 7, 7)


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


def test_states_norms_and_colours(model, pixels):
    states = token_states(model, pixels, [0, -1], normalised=True)
    last = model.vit(pixels).last_hidden_state[:, model.config.num_prefix_tokens :]
    torch.testing.assert_close(states[-1].flatten(1, 2), last)
    raw = model(pixels, output_hidden_states=True).hidden_states[1][:, model.config.num_prefix_tokens :]
    torch.testing.assert_close(token_norms(model, pixels, [0])[0].flatten(1), raw.norm(dim=-1))
    colours = feature_colours(states[-1])
    assert colours.shape == (2, *model.config.grid_size, 3) and colours.min() >= 0 and colours.max() <= 1


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


def test_equal_features_have_equal_colours():
    halves = torch.zeros(1, 4, 4, 8)
    halves[:, :, 2:] = torch.arange(8.0)
    colours = feature_colours(halves)[0]
    assert (colours[:, :2] == colours[0, 0]).all() and (colours[:, 2:] == colours[0, 2]).all()
    assert (colours[0, 0] != colours[0, 2]).any()


# -- which explanation to trust


def test_cells_are_the_patches_that_the_model_reads():
    where = cells(build(), (41, 50), (5, 6))
    assert where.shape == (41, 50) and where[0, 7] == 0 and where[0, 8] == 1 and where[8, 0] == 6
    assert where[40, 49] == 29  # cut off: counted with the last patch
    assert cells(torch.nn.Linear(1, 1), (4, 6), (2, 3)).tolist()[3] == [3, 3, 4, 4, 5, 5]


class Corner(torch.nn.Module):
    """A classifier without attention that looks at the upper left pixel only."""

    def forward(self, pixel_values):
        return torch.stack([pixel_values[:, 0, 0, 0] * 4, torch.zeros(len(pixel_values))], dim=1)


def test_curves_of_a_known_classifier():
    pixels = torch.ones(1, 3, 8, 8)
    right, wrong = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    right[0, 0, 0], wrong[0, 1, 1] = 1, 1
    present, absent = torch.tensor([4.0, 0]).softmax(0)[0].item(), 0.5
    curves = perturbation_curves(Corner(), pixels, right, steps=4, baseline="grey")
    assert curves.deletion[0].tolist() == pytest.approx([present, absent, absent, absent, absent])
    assert curves.insertion[0].tolist() == pytest.approx([absent, present, present, present, present])
    assert curves.deletion_area.item() == pytest.approx(absent + (present - absent) / 8)
    assert curves.insertion_area.item() == pytest.approx(present - (present - absent) / 8)
    assert curves.score.item() == pytest.approx(curves.insertion_area.item() - curves.deletion_area.item())
    assert perturbation_curves(Corner(), pixels, wrong, steps=4, baseline="grey").score < curves.score


def test_curves_end_where_the_picture_does(model, pixels):
    found = compare_explanations(model, pixels, ["rollout", "relevance"], steps=3, random_orders=2)
    assert list(found) == ["rollout", "relevance", "random"] and isinstance(found["random"], Curves)
    whole = model(pixels).logits.softmax(1).amax(1).detach()
    for curves in found.values():
        torch.testing.assert_close(curves.deletion[:, 0], whole)
        torch.testing.assert_close(curves.insertion[:, -1], whole)
        torch.testing.assert_close(curves.deletion[:, -1], curves.insertion[:, 0])
    again = compare_explanations(model, pixels, ["rollout"], steps=3, random_orders=2)
    assert torch.equal(again["random"].deletion, found["random"].deletion)


# -- a model whose answer is known


def bright_patches(count, generator, grid=6, patch=4, classes=8, others=3):
    """Noise with a few bright patches: one has the pattern of its class, the others one that means nothing.

    In three of ten pictures the first is missing, which is a class of its own: to answer, the model must find it.

    Returns:
        pixels `(count, 1, side, side)`, the number of the patch `(count,)`, the class `(count,)`.
    """
    patterns = torch.randn(classes + 1, patch, patch, generator=torch.Generator().manual_seed(5)).sign()
    patterns = torch.cat([torch.zeros(1, patch, patch), patterns])  # 0: no bright patch
    pixels = torch.randn(count, 1, grid * patch, grid * patch, generator=generator) * 0.2
    order = torch.rand(count, grid * grid, generator=generator).argsort(1)
    label = torch.randint(0, classes, (count,), generator=generator)
    missing = torch.rand(count, generator=generator) < 0.3
    label = torch.where(missing, classes, label)
    shown = torch.zeros(count, grid * grid, dtype=torch.long)
    shown.scatter_(1, order[:, 1 : 1 + others], classes + 1)
    shown.scatter_(1, order[:, :1], torch.where(missing, 0, label + 1)[:, None])
    bright = patterns[shown].view(count, grid, grid, patch, patch).permute(0, 1, 3, 2, 4)  # (count, grid, p, grid, p)
    return pixels + bright.reshape(pixels.shape), order[:, 0], label


@pytest.fixture(scope="module", params=[("token", 2, 150), ("gap", 1, 100), ("map", 1, 150)], ids=lambda p: p[0])
def seeker(request):
    """A tiny ViT that tells which pattern the one bright patch of meaning has."""
    pooling, layers, steps = request.param
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    config = HFViTConfig(
        image_size=24, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=64, num_labels=9, pooling=pooling,
    )  # fmt: skip
    model = HFViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        pixels, _, label = bright_patches(64, generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels).logits, label, label_smoothing=0.1).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_seeks_a_bright_patch_looks_at_it(seeker, method):
    pixels, place, label = bright_patches(512, torch.Generator().manual_seed(2))
    pixels, place, label = pixels[label < 8], place[label < 8], label[label < 8]
    with torch.no_grad():
        assert (seeker(pixels).logits.argmax(1) == label).float().mean() > 0.95
    hits = explain(seeker, pixels, method).flatten(1).argmax(1) == place  # one patch of 36: chance is under 3 %
    assert hits.float().mean() > 0.95


def test_curves_tell_right_from_random(seeker):
    pixels, _, label = bright_patches(64, torch.Generator().manual_seed(3))
    found = compare_explanations(seeker, pixels[label < 8], steps=12, baseline="grey", random_orders=3)
    random = found.pop("random").score.mean()
    for method, curves in found.items():
        assert curves.score.mean() > random + 0.4, method


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
        (lambda: explain(resnet, pixels), "has no attention"),
        (lambda: explain(model, pixels, "lime"), "method='lime' is not one of attention, rollout"),
        (lambda: explain(model, pixels, "relevance", 5), "class .5. does not exist: the model has 5, 0 to 4"),
        (lambda: explain(model, pixels, "relevance", torch.tensor([1, 2, 3])), "one class number or 2"),
        (lambda: explain(model.vit, pixels, "relevance"), "HFViTModel without classifier"),
        (lambda: explain(build(num_hidden_layers=0), pixels), "no transformer blocks"),
        (lambda: rollout(model, pixels, "median"), "fusion='median' is not one of"),
        (lambda: perturbation_curves(model, pixels, torch.rand(1, 4, 6)), "expected .2, rows, columns."),
        (lambda: perturbation_curves(model, pixels, torch.full((2, 4, 6), torch.nan)), "must be finite"),
        (lambda: perturbation_curves(model, pixels, torch.rand(2, 4, 6), baseline="noise"), "baseline='noise'"),
        (lambda: perturbation_curves(model.vit, pixels, torch.rand(2, 4, 6)), "gives no logits"),
    ]
    for call, message in cases:
        with pytest.raises(HFViTError, match=message):
            call()


def test_an_encoder_alone_shows_its_attention(pixels):
    model = build()
    encoder: HFViTModel = model.vit
    torch.testing.assert_close(rollout_map(encoder, pixels), rollout_map(model, pixels))
    torch.testing.assert_close(explain(encoder, pixels, "attention"), explain(model, pixels, "attention"))
