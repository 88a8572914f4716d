"""Better starts: mimetic initialization and the k-Dyck warm-up.

python -m pytest tests/training/studies/test_mimetic.py
"""

import pytest
import torch

from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.errors import HFViTError
from training.studies.initialization.dyck import dyck_strings, warm_up
from training.studies.initialization.mimetic import mimetic_


def small(**fields):
    torch.manual_seed(0)
    fields = {"hidden_size": 64, "num_attention_heads": 2, "image_size": 16} | fields
    return HFViTForImageClassification(
        HFViTConfig(num_hidden_layers=2, intermediate_size=64, patch_size=4, num_labels=3, **fields)
    )


def test_attention_looks_trained():
    model = mimetic_(small(hidden_size=128), seed=1)
    for layer in model.vit.layers:
        q, k, v, o = (getattr(layer.attention, f"{name}_proj").weight.detach() for name in "qkvo")
        both = o @ v
        assert both.diagonal().mean() == pytest.approx(-0.4, abs=0.05)
        rest = both - both.diagonal().diag()
        assert rest.std() * 128**0.5 == pytest.approx(0.4, rel=0.1)
        for head in range(2):
            rows = slice(64 * head, 64 * head + 64)
            product = q[rows].T @ k[rows]
            assert torch.linalg.matrix_rank(product) == 64 and product.diagonal().mean() > 0.3
    table = model.vit.embeddings.position_embeddings[0, 1:]
    alike = torch.nn.functional.cosine_similarity(table[0], table)
    assert alike[1] > alike[3] and alike[4] > alike[12]  # neighbors in a row, and in a column


def test_the_noise_is_the_seeds():
    same = [mimetic_(small(), seed=3).vit.layers[1].attention.v_proj.weight for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], mimetic_(small(), seed=4).vit.layers[1].attention.v_proj.weight)


def test_a_width_that_positions_cannot_fill():
    with pytest.raises(HFViTError, match="hidden_size 66"):
        mimetic_(small(hidden_size=66), seed=0)


def test_strings_are_balanced():
    kinds = 5
    strings = dyck_strings(20, 16, kinds, torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in strings.tolist()}) == 20
    for row in strings.tolist():
        open_now = []
        for symbol in row:
            if symbol < kinds:
                open_now.append(symbol)
            else:
                assert open_now.pop() == symbol - kinds
        assert not open_now
    with pytest.raises(HFViTError, match="even number"):
        dyck_strings(1, 5, kinds, torch.Generator())


def test_warm_up_moves_the_blocks_alone_and_repeats():
    first, again, before = (small() for _ in range(3))
    for model in (first, again):
        warm_up(model, seed=0, steps=3, batch=4)
    start, one, two = (model.state_dict() for model in (before, first, again))
    for name in start:
        assert torch.equal(one[name], two[name])
        moved = not torch.equal(start[name], one[name])
        assert moved == name.startswith(("vit.layers.", "vit.layernorm.")), name
    with pytest.raises(HFViTError, match="even number"):
        warm_up(small(image_size=4), seed=0, steps=1, batch=1)


def test_brackets_can_be_learned():
    """After some steps the blocks name far more masked brackets than a guess among four."""
    model = small(hidden_size=32)
    losses = warm_up(model, seed=0, steps=150, batch=32, kinds=2)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
