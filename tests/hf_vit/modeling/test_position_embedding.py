"""position_embedding.py: a table keeps what it means on another grid.

pytest tests/hf_vit/modeling/test_position_embedding.py
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hf_vit.modeling.position_embedding import (
    INTERPOLATIONS,
    resize_patch_kernel,
    resize_position_grid,
    resize_position_sequence,
    sincos2d,
)


pytestmark = pytest.mark.numerics
grids = st.tuples(st.integers(1, 12), st.integers(1, 12))


def scipy_zoom(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """`interpolate_posembed` of vit_jax/checkpoint.py, without its square-only assertions."""
    grid = table.reshape(*old, -1)
    return ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1).reshape(1, new[0] * new[1], -1)


def scipy_bug(old: int, new: int) -> bool:
    """Sizes for which rounding puts scipy's last sample outside the grid and it writes a zero edge."""
    return new > 1 and ((old - 1) / (new - 1)) * (new - 1) > old - 1


@settings(max_examples=80, deadline=None)
@given(old=st.tuples(st.integers(2, 20), st.integers(2, 20)), new=st.tuples(st.integers(2, 30), st.integers(2, 30)))
def test_equals_scipy_zoom_where_scipy_is_right(old, new):
    table = torch.from_numpy(np.random.default_rng(0).standard_normal((1, old[0] * old[1], 3)))
    ours = resize_position_grid(table.float(), old, new, "bilinear_align_corners")
    if scipy_bug(old[0], new[0]) or scipy_bug(old[1], new[1]):
        assert ours.reshape(*new, 3)[-1, -1].abs().sum() > 0
    else:
        np.testing.assert_allclose(ours.numpy(), scipy_zoom(table.numpy(), old, new), atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(28, 48), (28, 14), (32, 16), (48, 24)])
def test_no_zero_edge_where_scipy_has_one(old, new):
    table = torch.ones(1, old * old, 2)
    assert np.abs(scipy_zoom(table.numpy(), (old, old), (new, new)).reshape(new, new, 2)[-1]).max() == 0  # the bug
    resized = resize_position_grid(table, (old, old), (new, new), "bilinear_align_corners")
    torch.testing.assert_close(resized, torch.ones(1, new * new, 2))


@settings(max_examples=60, deadline=None)
@given(old=grids, new=grids, mode=st.sampled_from(sorted(INTERPOLATIONS)), value=st.floats(-3, 3, width=32))
def test_constants_stay_constant(old, new, mode, value):
    table = torch.full((1, old[0] * old[1], 2), value)
    torch.testing.assert_close(resize_position_grid(table, old, new, mode), torch.full((1, new[0] * new[1], 2), value))


@settings(max_examples=60, deadline=None)
@given(old=st.tuples(st.integers(2, 12), st.integers(2, 12)), new=st.tuples(st.integers(2, 20), st.integers(2, 20)))
def test_linear_ramps_stay_linear(old, new):
    def ramp(rows: int, columns: int) -> torch.Tensor:
        y, x = torch.linspace(0, 1, rows), torch.linspace(-1, 1, columns)
        return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(1, rows * columns, 2)

    torch.testing.assert_close(
        resize_position_grid(ramp(*old), old, new, "bilinear_align_corners"), ramp(*new), atol=1e-5, rtol=0
    )


def test_same_grid_is_the_same_table():
    table = torch.randn(1, 12, 4)
    assert resize_position_grid(table, (3, 4), (3, 4), "bicubic") is table


def test_equal_token_counts_are_still_resampled():
    table = torch.randn(1, 7 * 28, 4)
    assert not torch.allclose(resize_position_grid(table, (7, 28), (14, 14), "bilinear_align_corners"), table)


def test_half_precision_is_computed_in_float32():
    table = torch.randn(1, 49, 8).bfloat16()
    expected = resize_position_grid(table.float(), (7, 7), (12, 12), "bicubic_antialias").bfloat16()
    assert torch.equal(resize_position_grid(table, (7, 7), (12, 12), "bicubic_antialias"), expected)


def test_sequence_keeps_its_ends():
    table = torch.randn(1, 9, 4)
    longer = resize_position_sequence(table, 16)
    torch.testing.assert_close(longer[:, [0, -1]], table[:, [0, -1]])
    assert resize_position_sequence(table, 9) is table


def test_sincos2d_by_hand():
    table = sincos2d((2, 3), 8)[0]
    omega = np.array([1.0, 1e-4])
    for row in range(2):
        for column in range(3):
            expected = np.concatenate(
                [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
            )
            np.testing.assert_allclose(table[row * 3 + column].numpy(), expected, atol=1e-6)


def test_patch_kernel_keeps_tokens_of_enlarged_patches():
    """FlexiViT's defining property: <resize(x), kernel'> = <x, kernel> when the patch grows."""
    kernel, patch = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 4, 4)
    larger = torch.nn.functional.interpolate(patch, size=(8, 6), mode="bilinear", align_corners=False)
    resized = resize_patch_kernel(kernel, (8, 6))
    torch.testing.assert_close(
        torch.einsum("dchw,bchw->bd", resized, larger),
        torch.einsum("dchw,bchw->bd", kernel, patch),
        atol=1e-4,
        rtol=1e-4,
    )
    torch.testing.assert_close(resize_patch_kernel(kernel, (4, 4)), kernel)
