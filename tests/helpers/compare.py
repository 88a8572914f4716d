"""When outputs of equal weights count as the same."""

import torch


ROUNDING = 2e-6  # of the largest value: matmul libraries round by the alignment of memory, which differs between loads


def same_outputs(first, second) -> bool:
    """Whether two outputs (tensors or nested lists of floats) agree to rounding; weights are compared bit for bit."""
    first, second = torch.as_tensor(first), torch.as_tensor(second)
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool((first.double() - second.double()).abs().max() <= ROUNDING * second.double().abs().max())
