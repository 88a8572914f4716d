"""token_merging.py: what merges with what, that merged tokens count as many, and that r = 0 is the plain model.

pytest tests/hf_vit/inference/test_token_merging.py
"""

import copy

import pytest
import torch

from hf_vit import HFViTBackbone
from hf_vit.errors import HFViTError
from hf_vit.inference import int8
from hf_vit.inference.layers import OptimizedLayer
from hf_vit.inference.token_merging import MergedPool, MergeState, merge, merge_tokens
from hf_vit.inference.wrapper import OptimizedModule
from tests.helpers.compare import same_outputs
from tests.hf_vit.inference.test_optimize import KINDS, tiny


def state_of(model) -> MergeState:
    return MergeState(model.config, True)


@pytest.mark.parametrize("kind", KINDS)
def test_r_0_is_the_plain_model_and_r_removes_r_tokens_a_block(kind):
    model = tiny(**KINDS[kind])
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain, x = model.vit(pixels), model.vit.embeddings(pixels)
        first = model.vit.layers[0](x)
        torch.testing.assert_close(merge_tokens(model, [0, 5]).vit.layers[0](x), first, atol=2e-5, rtol=2e-5)
        for layers, left in ((0, 0), (3, 6), ([0, 5], 5), (10**6, None)):
            merged = merge_tokens(model, layers).vit(pixels)
            tokens = merged.last_hidden_state.shape[1]
            if left is not None:
                assert tokens == plain.last_hidden_state.shape[1] - left
            assert merged.pooler_output.shape == plain.pooler_output.shape
            assert merged.pooler_output.isfinite().all()
        again = merge_tokens(model, 0).vit(pixels)
    assert same_outputs(again.last_hidden_state, plain.last_hidden_state)
    assert same_outputs(again.pooler_output, plain.pooler_output)
    assert not isinstance(model.vit.layers[0], OptimizedModule) and "pool" not in model.vit.__dict__


@pytest.mark.parametrize("pooling", ["token", "gap", "map"])
def test_equal_patches_merge_without_a_change(pooling):
    """An image of one color without positions: merged tokens that count as many give the same answer."""
    model = tiny(pooling=pooling, use_class_token=pooling == "token", position_embedding_type="none")
    pixels = torch.randn(1, 3, 1, 1).expand(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(pixels).logits
        torch.testing.assert_close(merge_tokens(model, 5)(pixels).logits, plain, atol=1e-4, rtol=1e-4)
        if pooling == "token":  # uncounted, the class token weighs more beside fewer patches
            assert (merge_tokens(model, 5, proportional=False)(pixels).logits - plain).abs().max() > 1e-3


def test_the_most_alike_pairs_merge_and_sizes_add_up():
    model = tiny(pooling="gap", use_class_token=False)
    state = state_of(model)
    x = torch.arange(6.0)[None, :, None].expand(1, 6, 2)
    keys = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.7], [-1.0, 0.0], [-1.0, 0.01]]])
    merged = merge(x, keys, 2, state)  # the pairs (0, 1) and (4, 5)
    assert merged[0, :, 0].tolist() == [2.0, 0.5, 3.0, 4.5]
    assert state.sizes.tolist() == [[1.0, 2.0, 1.0, 2.0]]
    merged = merge(merged, torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.5, -1.0], [0.5, -0.9]]]), 1, state)
    assert merged[0, :, 0].tolist() == [2.0, 0.5, pytest.approx(4.0)]  # (3 * 1 + 4.5 * 2) / 3
    assert state.sizes.tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("fields", "kept"), [({"num_register_tokens": 2}, 3), ({"pooling": "first"}, 1)], ids=["prefix", "first"]
)
def test_tokens_that_are_read_by_their_place_stay_first_and_unmerged(fields, kept):
    state = state_of(tiny(**fields))
    x = torch.randn(2, kept + 16, 64)
    assert torch.equal(merge(x, torch.randn(2, kept + 16, 16), 8, state)[:, :kept], x[:, :kept])
    assert state.sizes[:, :kept].eq(1).all() and state.sizes.sum().item() == 2 * (kept + 16)


@pytest.mark.parametrize("pooling", ["gap", "map"])
def test_pooling_counts_a_merged_token_as_often_as_it_has_patches(pooling):
    model = tiny(pooling=pooling, use_class_token=False)
    state, x = state_of(model), torch.randn(2, 3, 64)
    state.sizes = torch.tensor([[1.0, 3.0, 2.0]]).expand(2, -1)
    pooled = MergedPool(model.vit, state)(x)
    torch.testing.assert_close(pooled, model.vit.pool(x[:, [0, 1, 1, 1, 2, 2]]), atol=1e-5, rtol=1e-5)


def test_with_optimized_blocks_before_or_after():
    model = tiny()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = merge_tokens(copy.deepcopy(model), 3)(pixels).logits
        before = merge_tokens(copy.deepcopy(model).optimize_for_inference(), 3)
        after = merge_tokens(copy.deepcopy(model), 3).optimize_for_inference()
        for one in (before, after, copy.deepcopy(before)):
            torch.testing.assert_close(one(pixels).logits, expected, atol=2e-5, rtol=2e-5)
        plain = merge_tokens(before, 0)
        torch.testing.assert_close(plain(pixels).logits, model(pixels).logits, atol=2e-5, rtol=2e-5)
    assert isinstance(plain.vit.layers[0], OptimizedLayer) and plain.vit.optimized and not after.vit.optimized


def test_with_int8_blocks_before_or_after(monkeypatch):
    monkeypatch.setattr(int8, "speedup", lambda *args: 2.0)  # tiny layers may be slower
    model = tiny()
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = merge_tokens(copy.deepcopy(model), 3).vit(pixels).last_hidden_state
        before = merge_tokens(copy.deepcopy(model).optimize_for_inference(int8_calibration=pixels), 3)
        after = merge_tokens(copy.deepcopy(model), 3).optimize_for_inference(int8_calibration=pixels)
        for one in (before, after):
            answer = one.vit(pixels).last_hidden_state
            assert answer.shape == expected.shape and not torch.equal(answer, expected)
            torch.testing.assert_close(answer[:, 0], expected[:, 0], atol=0.25, rtol=0.25)


def test_gradients_training_and_compiled():
    model = merge_tokens(tiny(), 3)
    pixels = torch.randn(2, 3, 32, 32)
    model(pixels).logits.sum().backward()
    assert model.vit.layers[0].attention.q_proj.weight.grad is not None
    assert model.train().vit(pixels).last_hidden_state.shape[1] == 17
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits, atol=2e-5, rtol=2e-5)


def test_what_cannot_be_is_said():
    model = tiny()
    for wrong in (-1, [1, 2, 3], [1, -1], [1.5, 1]):
        with pytest.raises(HFViTError, match="one for each block"):
            merge_tokens(model, wrong)
    with pytest.raises(HFViTError, match="every patch"):
        merge_tokens(HFViTBackbone(model.config), 1)
    merge_tokens(model, 2)
    for ask in (lambda p: model(p, output_attentions=True), lambda p: model.attention_maps(p)):
        with pytest.raises(HFViTError, match="r=0"):
            ask(torch.randn(1, 3, 32, 32))
