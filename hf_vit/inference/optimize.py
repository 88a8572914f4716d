"""`model.optimize_for_inference()`: which modules are replaced, what is refused and what is warned of."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .. import capabilities
from ..errors import HFViTError
from ..kernel_table import speedup
from .int8 import Int8Layer, calibrate, check_int8, check_int8_speed
from .layers import OptimizedLayer, OptimizedPatches
from .resnet import OptimizedStem
from .wrapper import SHARDED, is_sharded, plain_module, wrap


logger = logging.get_logger(__name__)


def optimize_encoder(encoder: Any, int8_calibration: torch.Tensor | None = None) -> None:
    """Replace an encoder's patch projection, blocks and ResNet by optimized ones; replaced ones are made again.

    Args:
        encoder: `HFViTModel` in evaluation mode.
        int8_calibration: `(B, C, H, W)`; the blocks become int8.

    Raises:
        HFViTError: int8 that this model or processor does not support, or that would not be faster.
    """
    if is_sharded(encoder):
        if int8_calibration is not None:
            raise HFViTError(
                "int8 needs whole weights, and these are sharded (FSDP): load the saved model and optimize that"
            )
        logger.warning_once(SHARDED)
        return
    steps = None
    unsupported = not encoder.config.has_plain_blocks
    if unsupported and int8_calibration is not None:
        raise HFViTError(f"int8 knows the plain ViT's block alone, and this model has {_named(encoder.config)}")
    if int8_calibration is not None:
        check_int8(encoder, int8_calibration)
        int8_calibration = int8_calibration.to(encoder.layers[0].mlp.fc1.weight.dtype)
        steps = calibrate(encoder, int8_calibration)
        # after calibration, since the speed is measured with its steps, and before anything is replaced
        check_int8_speed(encoder, int8_calibration, steps[0])
    if unsupported:
        logger.warning_once(f"blocks stay as they are, optimized ones do not know {_named(encoder.config)}")
    for index, layer in enumerate(() if unsupported else encoder.layers):
        merging = layer.merging if isinstance(layer, OptimizedLayer) else None  # `merge_tokens` may come first
        plain = plain_module(layer)
        if steps is None:
            encoder.layers[index] = wrap(OptimizedLayer, plain, merging=merging)
        else:
            encoder.layers[index] = wrap(Int8Layer, plain, merging=merging, steps=steps[index])
    patches = encoder.embeddings.patch_embeddings
    patches.projection = wrap(OptimizedPatches, plain_module(patches.projection))
    if patches.backbone is not None:
        patches.backbone = wrap(OptimizedStem, plain_module(patches.backbone))
    # the last block may then compute only the token that a classifier reads, unless tokens merge, which needs all
    encoder.optimized = not unsupported and all(layer.merging is None for layer in encoder.layers)
    if not unsupported:
        warn_if_bfloat16_is_emulated(encoder)


def _named(config: Any) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in config.family_fields.items())


def warn_if_bfloat16_is_emulated(encoder: Any) -> None:
    """Warn once how much slower bfloat16 is than float32 on a processor without its instructions."""
    weight = encoder.layers[0].mlp.fc1.weight
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or capabilities.native_bfloat16():
        return
    x = torch.randn(math.prod(encoder.config.grid_size), weight.shape[1])  # the patches of one image
    float32, bfloat16 = weight.detach().float(), weight.detach()
    factor = speedup(
        ("bfloat16 against float32", *weight.shape, len(x)),
        lambda x: F.linear(x.bfloat16(), bfloat16),
        lambda x: F.linear(x, float32),
        x,
    )
    logger.warning_once(
        f"bfloat16 is emulated on this processor ({capabilities.processor_name()}): a linear layer of this model "
        f"takes {factor:.1f} times as long as in float32. It works; model.float() is the way to more speed."
    )
