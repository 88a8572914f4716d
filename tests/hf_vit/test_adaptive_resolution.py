"""adaptive_resolution.py: each picture is answered at the first size that is sure enough.

pytest tests/hf_vit/test_adaptive_resolution.py
"""

import pytest
import torch
import torch.nn.functional as F

from hf_vit.adaptive_resolution import classify_at_sufficient_resolution
from hf_vit.errors import HFViTError
from tests.hf_vit.inference.test_inference import tiny


def test_each_picture_is_answered_by_the_first_sure_size():
    model = tiny()
    pixels = torch.randn(12, 3, 48, 48)
    sizes = (16, (32, 24), 48)
    with torch.inference_mode():
        each = [
            model(F.interpolate(pixels, size=s, mode="bilinear", antialias=True)).logits
            for s in ((16, 16), (32, 24), (48, 48))
        ]
    sure = torch.stack([logits.softmax(-1).amax(-1) for logits in each])  # (sizes, B)
    threshold = sure[0].median().item()
    logits, chosen = classify_at_sufficient_resolution(model, pixels, sizes, threshold)
    expected = [next((i for i in (0, 1) if sure[i, b] >= threshold), 2) for b in range(12)]
    assert chosen.tolist() == expected and len(set(expected)) > 1
    for b, index in enumerate(expected):
        torch.testing.assert_close(logits[b], each[index][b], atol=1e-4, rtol=1e-4)


def test_the_ends():
    model = tiny()
    pixels = torch.randn(3, 3, 32, 32)
    assert classify_at_sufficient_resolution(model, pixels, (16, 32), 0.0)[1].tolist() == [0, 0, 0]
    logits, chosen = classify_at_sufficient_resolution(model, pixels, (16, 32), 1.0)
    assert chosen.tolist() == [1, 1, 1]
    torch.testing.assert_close(logits, model(pixels).logits)
    for sizes, confidence in (((), 0.5), ((32, 16), 0.5), ((16, 32), 1.5)):
        with pytest.raises(HFViTError):
            classify_at_sufficient_resolution(model, pixels, sizes, confidence)
