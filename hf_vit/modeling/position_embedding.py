"""What belongs to one grid moved to another: position tables (paper section 3.2) and patch kernels.

This file travels to the Hub beside the weights: it imports only torch.

Sources: google-research/vision_transformer `vit_jax/checkpoint.py` `interpolate_posembed` at c6de1e5 (scipy's
`zoom(order=1)`, which is bilinear interpolation with aligned corners); google-research/big_vision `models/vit.py`
`posemb_sincos_2d` at 0127fb6.
"""

import torch
import torch.nn.functional as F


# config.position_interpolation -> arguments of torch.nn.functional.interpolate
INTERPOLATIONS: dict[str, dict] = {
    "bilinear_align_corners": {"mode": "bilinear", "align_corners": True},
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "bicubic_antialias": {"mode": "bicubic", "align_corners": False, "antialias": True},
}


def resize_position_grid(
    table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], interpolation: str
) -> torch.Tensor:
    """Refit the patch rows of a position table to another grid, in float32.

    Args:
        table: `(1, rows * columns, D)`, row-major, without class or register rows.
        old_grid: (rows, columns) the table was made for.
        new_grid: (rows, columns) wanted. Grids are compared by shape: 7x28 to 14x14 is resampled although both
            hold 196 tokens.
        interpolation: a key of `INTERPOLATIONS`.

    Returns:
        `(1, new rows * new columns, D)` in the table's dtype; the table itself where the grids are equal.
    """
    if old_grid == new_grid:
        return table
    dim = table.shape[-1]
    grid = table.float().reshape(1, *old_grid, dim).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid, size=new_grid, **INTERPOLATIONS[interpolation])  # (1, D, new rows, new columns)
    return grid.permute(0, 2, 3, 1).reshape(1, new_grid[0] * new_grid[1], dim).to(table.dtype)  # (1, new N, D)


def resize_position_sequence(table: torch.Tensor, length: int) -> torch.Tensor:
    """Refit a table over the raster sequence, linearly with aligned ends; `(1, N, D)` -> `(1, length, D)`."""
    if table.shape[1] == length:
        return table
    resized = F.interpolate(
        table.float().transpose(1, 2), size=length, mode="linear", align_corners=True
    )  # (1, D, N')
    return resized.transpose(1, 2).to(table.dtype)  # (1, N', D)


def sincos2d(
    grid: tuple[int, int], dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The fixed table of MoCo v3 as big_vision writes it: [sin x, cos x, sin y, cos y], temperature 10,000.

    Returns:
        `(1, rows * columns, dim)`; `dim` is a multiple of 4.
    """
    rows, columns = grid
    frequencies = torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4 - 1)
    frequencies = 1.0 / 10_000**frequencies  # (dim / 4,)
    y, x = torch.meshgrid(
        torch.arange(rows, device=device, dtype=torch.float32),
        torch.arange(columns, device=device, dtype=torch.float32),
        indexing="ij",
    )
    y, x = y.flatten()[:, None] * frequencies, x.flatten()[:, None] * frequencies  # (rows * columns, dim / 4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None].to(dtype)  # (1, rows * columns, dim)


def resize_patch_kernel(kernel: torch.Tensor, new_size: tuple[int, int]) -> torch.Tensor:
    """FlexiViT's resize of a patch projection (arXiv:2212.08013, section 3.4; big_vision `models/proj/flexi/vit.py`).

    With R the bilinear resize of a patch, the new kernel is pinv(R^T) w: tokens of enlarged patches stay the same.

    Args:
        kernel: `(D, C, P, P')`. new_size: (height, width) of the new patch.

    Returns:
        `(D, C, *new_size)`, in the kernel's dtype.
    """
    old_size = kernel.shape[-2:]
    basis = torch.eye(old_size[0] * old_size[1], dtype=torch.float64).reshape(-1, 1, *old_size)  # (old, 1, P, P')
    resize = F.interpolate(basis, size=new_size, mode="bilinear", align_corners=False).flatten(1).T  # R: (new, old)
    flat = kernel.double().cpu().flatten(2)  # (D, C, old)
    resized = flat @ torch.linalg.pinv(resize)  # (D, C, new): row by row pinv(R^T) w
    return resized.reshape(*kernel.shape[:2], *new_size).to(kernel)  # (D, C, *new_size)
