"""Which explanation to trust: remove or insert patches in its order, and measure the probability of the class.

For a good explanation the probability falls fast when the most important patches are removed (deletion: a small area
under the curve is good) and rises fast when only they are present (insertion: a large area is good). An order that is
no better than a random one explains nothing. Works for every image classifier, also without attention.

Not captum: it has infidelity and sensitivity, but no such curves.

Source: Petsiuk, Das and Saenko, RISE (arXiv:1806.07421), section 4.3; here patch by patch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import HFViTError
from ..problem_type import output_scores
from .attention import evaluating
from .relevance import METHODS, Target, explain, target_classes


BASELINES = ("blur", "mean", "gray")


@dataclass
class Curves:
    """Probability of the class while patches are removed and inserted.

    Attributes:
        fractions: of the patches changed so far, `(S + 1,)` from 0 to 1.
        deletion, insertion: `(B, S + 1)`.
    """

    fractions: torch.Tensor
    deletion: torch.Tensor
    insertion: torch.Tensor

    @property
    def deletion_area(self) -> torch.Tensor:
        """Area under each deletion curve, `(B,)` in [0, 1]; smaller is better."""
        return torch.trapezoid(self.deletion, self.fractions)

    @property
    def insertion_area(self) -> torch.Tensor:
        """Area under each insertion curve, `(B,)` in [0, 1]; larger is better."""
        return torch.trapezoid(self.insertion, self.fractions)

    @property
    def score(self) -> torch.Tensor:
        """Insertion minus deletion area, `(B,)`; about 0 for a random order."""
        return self.insertion_area - self.deletion_area


def patch_numbers(model: nn.Module, image_size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """The patch number of every pixel, `(H, W)`, in raster order from 0.

    Pixels that a ViT drops at the right and the bottom belong to the nearest patch. For other models, or another grid
    than that of the model's patches, the image is divided into equal cells.
    """
    config: Any = getattr(model, "config", None)
    (height, width), (rows, columns) = image_size, grid
    if getattr(config, "model_type", None) == "hf_vit" and config.grid_for(image_size) == grid:
        down, across = config.total_stride
        row, column = torch.arange(height) // down, torch.arange(width) // across
    else:
        row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return row.clamp_max(rows - 1)[:, None] * columns + column.clamp_max(columns - 1)


def blurred(pixel_values: torch.Tensor) -> torch.Tensor:
    """A Gaussian blur of an eighth of the longer side, borders repeated; same shape."""
    height, width = pixel_values.shape[-2:]
    sigma = max(height, width) / 8
    reach = int(3 * sigma)  # pixels on either side; the tails beyond hold 0.3 %
    kernel = torch.exp(-torch.arange(-reach, reach + 1, device=pixel_values.device).float().square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(pixel_values.dtype)
    flat = F.pad(pixel_values.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")  # (B C, 1, H + .., W + ..)
    flat = F.conv2d(F.conv2d(flat, kernel[None, None, :, None]), kernel[None, None, None, :])
    return flat.view_as(pixel_values)


def _nothing(pixel_values: torch.Tensor, baseline: str) -> torch.Tensor:
    """The image without content, of which absent patches are taken."""
    if baseline == "blur":
        return blurred(pixel_values)
    if baseline == "mean":
        return pixel_values.mean(dim=(2, 3), keepdim=True).expand_as(pixel_values)
    if baseline == "gray":
        return torch.zeros_like(pixel_values)
    raise HFViTError(f"baseline='{baseline}' is not one of {', '.join(BASELINES)}")


def _logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    output = model(pixel_values)
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise HFViTError(f"{type(model).__name__} gives no logits: perturbation curves need a classifier")
    return logits.float()


@torch.no_grad()
def perturbation_curves(
    model: nn.Module,
    pixel_values: torch.Tensor,
    importance: torch.Tensor,
    target: Target = None,
    steps: int = 20,
    baseline: str = "blur",
) -> Curves:
    """Remove, and insert, patches from the most to the least important, and classify each image.

    Args:
        model: any classifier that returns logits, or an output with `.logits`.
        pixel_values: normalized images `(B, C, H, W)`. importance: `(B, rows, columns)`, larger first.
        target: class number, or one for each image; None for the most probable of the whole image.
        steps: changes from none to all patches; 2 (steps + 1) forward passes.
        baseline: content of absent patches: the blurred image, its mean color, or 0 (mid-gray after normalization
            with mean 0.5).

    Raises:
        HFViTError: shapes that do not match, no such class or baseline.
    """
    batch, grid = len(pixel_values), tuple(importance.shape[1:])
    if importance.ndim != 3 or len(importance) != batch:
        raise HFViTError(f"importance has shape {tuple(importance.shape)}: expected ({batch}, rows, columns)")
    if not importance.isfinite().all() or steps < 1:
        raise HFViTError("importance must be finite and steps at least 1")
    with evaluating(model):
        absent, count = _nothing(pixel_values, baseline), grid[0] * grid[1]
        classes = target_classes(_logits(model, pixel_values), target)[:, None]
        order = importance.flatten(1).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1).to(pixel_values.device)  # (B, patches)
        patch = patch_numbers(model, tuple(pixel_values.shape[-2:]), grid).to(pixel_values.device)  # type: ignore[arg-type]
        rank = rank[:, patch][:, None]  # (B, 1, H, W)
        fractions = torch.linspace(0, 1, steps + 1)
        deletion: list[torch.Tensor] = []
        insertion: list[torch.Tensor] = []
        for fraction in fractions.tolist():
            important = rank < round(fraction * count)
            for present, curve in ((~important, deletion), (important, insertion)):
                logits = _logits(model, torch.where(present, pixel_values, absent))
                curve.append(probabilities(model, logits).gather(1, classes)[:, 0].cpu())
    return Curves(fractions, torch.stack(deletion, dim=1), torch.stack(insertion, dim=1))


def probabilities(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of the classes `(B, K)`; they do not sum to one if `config.problem_type` is multi-label.

    The outputs of a regression are returned unchanged.
    """
    return output_scores(getattr(model, "config", None), logits)


def compare_explanations(
    model: nn.Module,
    pixel_values: torch.Tensor,
    methods: Sequence[str] | Mapping[str, torch.Tensor] = METHODS,
    target: Target = None,
    steps: int = 20,
    baseline: str = "blur",
    random_orders: int = 5,
    seed: int = 0,
) -> dict[str, Curves]:
    """Curves of each method, and of `"random"`, the mean over `random_orders` orders drawn with `seed`.

    Args:
        methods: names, or maps `(B, rows, columns)` by name, of any origin.
    """
    with torch.no_grad(), evaluating(model):
        classes = target_classes(_logits(model, pixel_values), target)  # the same for all methods
    maps = methods if isinstance(methods, Mapping) else {}
    curves, grid = {}, None
    for method in methods:
        importance = maps[method] if maps else explain(model, pixel_values, method, classes)
        grid = importance.shape
        curves[method] = perturbation_curves(model, pixel_values, importance, classes, steps, baseline)
    if random_orders and grid is not None:
        generator = torch.Generator().manual_seed(seed)
        runs = [
            perturbation_curves(model, pixel_values, torch.rand(grid, generator=generator), classes, steps, baseline)
            for _ in range(random_orders)
        ]
        deletion = torch.stack([run.deletion for run in runs]).mean(dim=0)
        curves["random"] = Curves(
            runs[0].fractions, deletion, torch.stack([run.insertion for run in runs]).mean(dim=0)
        )
    return curves
