"""Mimetic initialization: attention that begins as that of trained ViTs looks (arXiv:2305.09828).

For studies. Trained query and key matrices multiply to about a positive identity, value and output matrices to about a
negative one: each product is drawn so, with noise, and factorised. Positions begin as sines and cosines.
"""

import torch

from hf_vit import HFViTForImageClassification
from hf_vit.errors import HFViTError
from hf_vit.modeling.position_embedding import sincos2d


QUERY_KEY = (0.7, 0.7)  # noise, identity: those of osiriszjq/structured_init's ViTs
VALUE_OUTPUT = (0.4, 0.4)


@torch.no_grad()
def mimetic_(model: HFViTForImageClassification, seed: int) -> HFViTForImageClassification:
    """Initialize the attention and the position embeddings of a model in place, and return it.

    Args:
        seed: of the noise.

    Raises:
        HFViTError: a model without blocks, or with a width that sines and cosines cannot fill.
    """
    config, rng = model.config, torch.Generator().manual_seed(seed)
    dim, heads = config.hidden_size, config.num_attention_heads
    if dim % 4:
        raise HFViTError(
            f"mimetic initialization fills positions with sines and cosines: hidden_size {dim} % 4 is not 0"
        )
    for layer in model.vit.layers:
        attention = layer.attention
        queries, keys = zip(*(query_key(dim, dim // heads, rng) for _ in range(heads)))
        attention.q_proj.weight.copy_(torch.cat(queries))
        attention.k_proj.weight.copy_(torch.cat(keys))
        value, output = value_output(dim, rng)
        attention.v_proj.weight.copy_(value)
        attention.o_proj.weight.copy_(output)
    table = model.vit.embeddings.position_embeddings
    if table is not None and config.position_embedding_type == "learned":
        rows, columns = config.grid_size
        table[:, -rows * columns :] = sincos2d((rows, columns), dim).to(table)
    return model


def query_key(dim: int, width: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (width, dim) of one head's queries and keys; `Wq^T Wk` is the best rank-`width` part of the target."""
    noise, identity = QUERY_KEY
    target = noise * torch.randn(dim, dim, generator=rng) / dim**0.5 + identity * torch.eye(dim)
    u, s, vh = torch.linalg.svd(target)
    root = s[:width].sqrt()[:, None]
    return root * u[:, :width].T, root * vh[:width]


def value_output(dim: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (dim, dim) of all heads' values and of the output projection; `Wo Wv` is noise minus identity."""
    noise, identity = VALUE_OUTPUT
    target = noise * torch.randn(dim, dim, generator=rng) / dim**0.5 - identity * torch.eye(dim)
    u, s, vh = torch.linalg.svd(target)
    root = s.sqrt()
    return root[:, None] * vh, u * root
