"""A ViT in Flax and one step of it under `jax.jit`, as vit_jax trains: the baseline of the training step.

The layers are those of google-research/vision_transformer `vit_jax/models_vit.py`; AdamW is optax's.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hf_vit import HFViTConfig


class Block(nn.Module):
    heads: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, y)
        y = nn.Dense(self.hidden, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(nn.gelu(y))


class ViT(nn.Module):
    config: Any
    dtype: Any

    @nn.compact
    def __call__(self, x):
        config, size = self.config, self.config.patch_size_hw
        x = nn.Conv(config.hidden_size, size, strides=size, padding="VALID", dtype=self.dtype)(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("cls", nn.initializers.zeros, (1, 1, config.hidden_size))
        x = jnp.concatenate([jnp.tile(token, [x.shape[0], 1, 1]), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(config.num_hidden_layers):
            x = Block(config.num_attention_heads, config.intermediate_size, self.dtype)(x)
        return nn.Dense(config.num_labels, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)[:, 0])


def update(config: HFViTConfig, pixels: np.ndarray, labels: np.ndarray, low: bool) -> Callable[[], Any]:
    """A call that does one step: forward, backward and AdamW; images `(B, C, H, W)`."""
    model = ViT(config, jnp.bfloat16 if low else jnp.float32)
    images, targets = jnp.asarray(pixels.transpose(0, 2, 3, 1)), jnp.asarray(labels)
    optimizer = optax.adamw(1e-6)
    weights = jax.jit(model.init)(jax.random.key(0), images[:1])
    state = [weights, jax.jit(optimizer.init)(weights)]

    def loss(weights):
        logits = model.apply(weights, images).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def change(weights, memory):
        value, gradients = jax.value_and_grad(loss)(weights)
        updates, memory = optimizer.update(gradients, memory, weights)
        return optax.apply_updates(weights, updates), memory, value

    compiled = jax.jit(change, donate_argnums=(0, 1))

    def run() -> Any:
        state[0], state[1], value = compiled(*state)
        return value.block_until_ready()

    return run
