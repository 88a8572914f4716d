"""Normalizing on the device gives the image processor's numbers, bit for bit.

pytest tests/training/data/test_normalize.py
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTError
from training.data.normalize import Normalize


NUMBERS = st.floats(0.01, 2.0)
EVERY_VALUE = np.arange(256, dtype=np.uint8).reshape(16, 16)


@settings(max_examples=40, deadline=None)
@given(
    divisor=st.sampled_from([255, 127.5, 256, 128, 1]),
    mean=st.tuples(NUMBERS, NUMBERS, NUMBERS),
    std=st.tuples(NUMBERS, NUMBERS, NUMBERS),
)
def test_the_numbers_are_the_processors_bit_for_bit(divisor, mean, std):
    processor = ViTImageProcessorPil(
        do_resize=False, rescale_factor=1 / divisor, image_mean=list(mean), image_std=list(std)
    )
    image = np.stack([EVERY_VALUE] * 3)
    expected = processor(image, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    assert torch.equal(Normalize.of(processor, 3)(torch.from_numpy(image)[None]), expected)


def test_floats_pass_and_numbers_of_other_channels_are_refused():
    pixels = torch.rand(1, 3, 4, 4)
    assert Normalize.of(None, 3)(pixels) is pixels
    with pytest.raises(HFViTError, match="have 3 and 3 numbers, and the model reads 1 channels"):
        Normalize.of(ViTImageProcessorPil(), 1)
