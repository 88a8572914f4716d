"""Positions: fixed and learned tables, resized to other grids (paper section 3.2), rotary positions, relative position
biases; and patch kernels resized to other patch sizes.

This file travels to the Hub beside the weights: it imports only torch.

    d width of a head   k heads   N = rows * columns patches

Sources: google-research/vision_transformer `vit_jax/checkpoint.py` `interpolate_posembed` at c6de1e5 (scipy's
`zoom(order=1)`, which is bilinear interpolation with aligned corners); google-research/big_vision `models/vit.py`
`posemb_sincos_2d` at 0127fb6; transformers 5.23 `models/dinov3_vit`, `models/beit`; timm 1.0.31
`layers/pos_embed_sincos.py`.
"""

import math

import torch
import torch.nn.functional as F


# config.position_interpolation -> arguments of torch.nn.functional.interpolate
INTERPOLATIONS: dict[str, dict] = {
    "bilinear_align_corners": {"mode": "bilinear", "align_corners": True},
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "bicubic_antialias": {"mode": "bicubic", "align_corners": False, "antialias": True},
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "bilinear_antialias": {"mode": "bilinear", "align_corners": False, "antialias": True},
}


def resize_position_grid(
    table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], interpolation: str
) -> torch.Tensor:
    """Resize the patch rows of a position table to another grid, computed in float32 or wider.

    Args:
        table: `(1, rows * columns, D)`, row-major, without class or register rows.
        old_grid: (rows, columns) of the table.
        new_grid: (rows, columns) of the result. Grids are compared by shape: 7x28 to 14x14 is resampled although both
            have 196 patches.
        interpolation: a key of `INTERPOLATIONS`, or `"bicubic_offset"`.

    Returns:
        `(1, new rows * new columns, D)` in the table's dtype; the table itself if the grids are equal.
    """
    if old_grid == new_grid:
        return table
    dim = table.shape[-1]
    wide = table.to(torch.promote_types(table.dtype, torch.float32))  # bfloat16 would round the weights of neighbors
    grid = wide.reshape(1, *old_grid, dim).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    if interpolation == "bicubic_offset":
        # DINOv2 passes a scale factor, from which torch computes the size, rounded down; 0.1 keeps it from losing a
        # row. The sample points then differ from those of a resize to that size.
        scale = [(new + 0.1) / old for new, old in zip(new_grid, old_grid)]
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        grid = F.interpolate(grid, size=new_grid, **INTERPOLATIONS[interpolation])  # (1, D, new rows, new columns)
    return grid.permute(0, 2, 3, 1).reshape(1, new_grid[0] * new_grid[1], dim).to(table.dtype)  # (1, new N, D)


def resize_position_sequence(table: torch.Tensor, length: int) -> torch.Tensor:
    """Resize a table over the raster sequence, linearly with aligned ends; `(1, N, D)` -> `(1, length, D)`."""
    if table.shape[1] == length:
        return table
    resized = F.interpolate(
        table.float().transpose(1, 2), size=length, mode="linear", align_corners=True
    )  # (1, D, N')
    return resized.transpose(1, 2).to(table.dtype)  # (1, N', D)


def sincos2d(
    grid: tuple[int, int], dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The fixed table of MoCo v3 in big_vision's order: [sin x, cos x, sin y, cos y], temperature 10,000.

    Returns:
        `(1, rows * columns, dim)`; `dim` is a multiple of 4.
    """
    # dim / 4 - 1: big_vision's frequencies end at 1 / 10,000 exactly; those of `sincos_aim` stop one step before
    frequencies = 1.0 / 10_000 ** (torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4 - 1))
    return _sincos(grid, frequencies).to(dtype)


def sincos_aim(
    grid: tuple[int, int], dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The fixed table of AIMv2's native variant: [sin column, cos column, sin row, cos row], temperature 10,000.

    Returns:
        `(1, rows * columns, dim)`; `dim` is a multiple of 4.
    """
    frequencies = 1.0 / 10_000 ** (torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    return _sincos(grid, frequencies).to(dtype)


def _sincos(grid: tuple[int, int], frequencies: torch.Tensor) -> torch.Tensor:
    """[sin x, cos x, sin y, cos y] of every cell at `frequencies` `(dim / 4,)`; `(1, rows * columns, dim)`."""
    row, column = _cells(grid, frequencies.device)
    y, x = row[:, None] * frequencies, column[:, None] * frequencies  # (rows * columns, dim / 4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]  # (1, rows * columns, dim)


def _cells(grid: tuple[int, int], device: torch.device | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every patch in raster order, `(rows * columns,)` each, float32."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return row.flatten(), column.flatten()


# -- rotary positions (arXiv:2104.09864) on two axes -----------------------------------------------


def rotary_angles(
    config, grid: tuple[int, int], device: torch.device | None = None, training: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angles by which queries and keys of each patch are rotated, `(N, d)` each, float32.

    The frequencies are f_j = theta^(-j / (d / 4)), j = 0 ... d / 4 - 1, for rows and for columns. Angles are computed
    for each grid: nothing is interpolated.

    Args:
        config: `HFViTConfig` with `rope` set. grid: (rows, columns) of the patches.
        training: draw DINOv3's augmentation of the coordinates, once for all images and blocks.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    periods = config.rope_theta ** (torch.arange(head_dim // 4, device=device, dtype=torch.float32) / (head_dim // 4))
    if config.rope_bfloat16_periods:
        periods = periods.bfloat16().float()  # as DINOv3's checkpoints store them
    if config.rope == "dinov3":
        coordinates = 2 * math.pi * _dinov3_coordinates(config, grid, device, training)  # (N, 2)
    else:
        coordinates = _axial_coordinates(config, grid, device)
    if config.rope_axes == "xy":
        coordinates = coordinates.flip(1)
    angles = (coordinates[:, :, None] / periods).flatten(1)  # (N, d / 2), one axis after the other
    # each angle rotates two channels: j and j + d / 2, or 2 j and 2 j + 1; (N, d)
    angles = angles.repeat(1, 2) if config.rope_layout == "half" else angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def _dinov3_coordinates(config, grid: tuple[int, int], device: torch.device | None, training: bool) -> torch.Tensor:
    """Centers of the patches from -1 to 1, each axis scaled by its own length, `(N, 2)`."""
    row, column = _cells(grid, device)
    centers = torch.stack([(row + 0.5) / grid[0], (column + 0.5) / grid[1]], dim=1) * 2 - 1
    # shift, jitter, rescale: the order of DINOv3's code, and of its draws from the generator
    if training and config.rope_shift:
        centers = centers + torch.empty(2, device=device).uniform_(-config.rope_shift, config.rope_shift)
    for factor, axes in ((config.rope_jitter, 2), (config.rope_rescale, 1)):
        if training and factor and factor > 1:
            limit = math.log(factor)
            centers = centers * torch.empty(axes, device=device).uniform_(-limit, limit).exp()
    return centers


def _axial_coordinates(config, grid: tuple[int, int], device: torch.device | None) -> torch.Tensor:
    """Row and column of the patches, in cells of the reference grid, `(N, 2)`."""
    reference = grid if config.rope_reference_grid == "image" else config.rope_reference_grid
    reference = (reference, reference) if isinstance(reference, int) else reference
    coordinates = [
        (cell + config.rope_offset) / n * cells for cell, n, cells in zip(_cells(grid, device), grid, reference)
    ]
    return torch.stack(coordinates, dim=1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, prefix: int, layout: str) -> torch.Tensor:
    """Rotate the patch tokens of queries or keys `(B, k, prefix + N, d)`; the first `prefix` tokens stay unchanged.

    `cos` and `sin` are `(N, d)` in the dtype of x; if x has fewer patches, their first rows are used. `layout` is
    `config.rope_layout`.
    """
    patches = x[:, :, prefix:]
    count = patches.shape[2]
    # a pair (a, b) becomes (a cos - b sin, b cos + a sin)
    if layout == "half":
        first, second = patches.chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)  # (B, k, N, d)
    else:
        even, odd = patches[..., ::2], patches[..., 1::2]
        rotated = torch.stack([-odd, even], dim=-1).flatten(-2)  # (B, k, N, d)
    patches = patches * cos[:count] + rotated * sin[:count]
    return torch.cat([x[:, :, :prefix], patches], dim=2)  # (B, k, prefix + N, d)


# -- relative position biases (BEiT, arXiv:2106.08254) ---------------------------------------------


def relative_table_rows(grid: tuple[int, int]) -> int:
    """Rows of a table of relative biases: one for every offset in the grid, and three for the class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def resize_relative_table(table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resize a table of relative biases to another grid, bilinearly as transformers does; the last three rows stay."""
    if old_grid == new_grid:
        return table
    old, new = [2 * side - 1 for side in old_grid], [2 * side - 1 for side in new_grid]
    square = table[:-3].reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, k, 2 rows - 1, 2 columns - 1)
    square = F.interpolate(square, size=new, mode="bilinear", align_corners=False)
    return torch.cat([square.permute(0, 2, 3, 1).flatten(0, 2), table[-3:]])  # (relative_table_rows(new_grid), k)


def relative_bias(table: torch.Tensor, native: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Biases of the attention scores between class token and patches, `(1, k, 1 + N, 1 + N)`.

    Args:
        table: `(relative_table_rows(native), k)`; the last three rows are class to patch, patch to class, class to
            class.
        native: grid of the table. grid: of the image; the table is resized if it differs.
    """
    heads, (rows, columns) = table.shape[1], grid
    table = resize_relative_table(table, native, grid)
    row, column = (cells.long() for cells in _cells(grid, table.device))
    down = row[:, None] - row + rows - 1  # (N, N): row of the query minus row of the key, counted from 0
    across = column[:, None] - column + columns - 1
    between = table[down * (2 * columns - 1) + across]  # (N, N, k)
    patches = rows * columns
    to_patch = table[-3].expand(1, patches, heads)
    from_patch = table[-2].expand(patches, 1, heads)
    first = torch.cat([table[-1].expand(1, 1, heads), to_patch], dim=1)  # (1, 1 + N, k)
    bias = torch.cat([first, torch.cat([from_patch, between], dim=1)], dim=0)  # (1 + N, 1 + N, k)
    return bias.permute(2, 0, 1)[None]  # (1, k, 1 + N, 1 + N)


# -- patch kernels ---------------------------------------------------------------------------------


def resize_patch_kernel(kernel: torch.Tensor, new_size: tuple[int, int]) -> torch.Tensor:
    """FlexiViT's resize of a patch projection (arXiv:2212.08013, section 3.4; big_vision `models/proj/flexi/vit.py`).

    With R the bilinear resize of a patch, the new kernel is pinv(R^T) w, which leaves the tokens of enlarged patches
    unchanged.

    Args:
        kernel: `(D, C, P, P')`. new_size: (height, width) of the new patch.

    Returns:
        `(D, C, *new_size)`, in the kernel's dtype.
    """
    old_size = kernel.shape[-2:]
    # float64 on the CPU: the pseudo-inverse of an ill-conditioned R, computed once for a checkpoint
    basis = torch.eye(old_size[0] * old_size[1], dtype=torch.float64).reshape(-1, 1, *old_size)  # (old, 1, P, P')
    resize = F.interpolate(basis, size=new_size, mode="bilinear", align_corners=False).flatten(1).T  # R: (new, old)
    flat = kernel.double().cpu().flatten(2)  # (D, C, old)
    resized = flat @ torch.linalg.pinv(resize)  # (D, C, new): row by row pinv(R^T) w
    return resized.reshape(*kernel.shape[:2], *new_size).to(kernel)  # (D, C, *new_size)
