"""Early choice of resolution: a picture is looked at as small as its answer is sure, and larger where it is not."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from .errors import HFViTError


@torch.inference_mode()
def classify_at_sufficient_resolution(
    model: nn.Module, pixel_values: torch.Tensor, image_sizes: Sequence[int | tuple[int, int]], confidence: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of each picture at the smallest resolution whose largest probability is at least `confidence`.

    Args:
        model: a classifier of ours in evaluation mode; it does best when trained or fine-tuned near these sizes.
        pixel_values: `(B, C, H, W)`, normalised, at the largest of the sizes or larger.
        image_sizes: pixels, one number or (height, width), from the smallest; the last one answers whatever is left.
        confidence: 0 to 1; choose it on pictures that are kept aside, by the accuracy that it costs there.

    Returns:
        logits `(B, K)` and, for each picture, the index into `image_sizes` that answered `(B,)`.

    Raises:
        HFViTError: no sizes, sizes that do not grow, or a confidence outside 0 to 1.
    """
    sizes = [(size, size) if isinstance(size, int) else (size[0], size[1]) for size in image_sizes]
    areas = [height * width for height, width in sizes]
    if not sizes or any(small >= large for small, large in pairwise(areas)):
        raise HFViTError(f"image_sizes={list(image_sizes)}: give at least one size, growing from the smallest")
    if not 0 <= confidence <= 1:
        raise HFViTError(f"confidence={confidence}: a probability, from 0 to 1")
    left = torch.arange(len(pixel_values), device=pixel_values.device)
    chosen = torch.full_like(left, len(sizes) - 1)
    logits: torch.Tensor | None = None
    for index, size in enumerate(sizes):
        pixels = pixel_values[left]
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        answers = model(pixels).logits
        if logits is None:
            logits = answers.new_empty(len(pixel_values), answers.shape[1])
        logits[left] = answers
        unsure = answers.float().softmax(dim=-1).amax(dim=-1) < confidence
        chosen[left] = index
        left = left[unsure]
        if not len(left):
            break
    assert logits is not None
    return logits, chosen
