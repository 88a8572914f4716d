"""k-Dyck warm-up: the blocks learn to match brackets before they see an image (arXiv:2511.13945).

For studies. A string has brackets of `k` kinds, closed in order. Some closing brackets are masked, and the blocks
learn to predict them. Symbols and positions have fixed random embeddings, so that only the blocks learn. They are
then used in a model for images with new embeddings and head.

Tests: tests/training/studies/test_mimetic.py.
"""

import torch
import torch.nn.functional as F

from hf_vit import HFViTForImageClassification
from hf_vit.errors import HFViTError


BRACKET_KINDS = 64  # k: 128 symbols
MASK_RATE = 0.5  # fraction of the closing brackets that are masked
OPEN_RATE = 0.5  # how often a bracket opens if it could also close
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 1e-3, 0.05, 0.1


def dyck_strings(count: int, length: int, kinds: int, rng: torch.Generator) -> torch.Tensor:
    """Draw balanced strings.

    Args:
        length: even number of symbols. kinds: of brackets; `b` opens kind b, `kinds + b` closes it.

    Returns:
        int64 (count, length).
    """
    if length < 2 or length % 2:
        raise HFViTError(f"brackets come in pairs: a string has an even number of symbols, not {length}")
    coins = torch.rand(count, length, generator=rng)
    drawn = torch.randint(kinds, (count, length), generator=rng)
    strings = torch.empty(count, length, dtype=torch.int64)
    for row in range(count):
        open_now: list[int] = []
        for position in range(length):
            must_close = len(open_now) == length - position
            if open_now and (must_close or coins[row, position] >= OPEN_RATE):
                strings[row, position] = kinds + open_now.pop()
            else:
                open_now.append(int(drawn[row, position]))
                strings[row, position] = open_now[-1]
    return strings


def warm_up(
    model: HFViTForImageClassification, seed: int, steps: int, batch: int, kinds: int = BRACKET_KINDS
) -> list[float]:
    """Train the blocks and the last LayerNorm of a model on brackets, in place; the loss of every step.

    Args:
        seed: of strings, masks and embeddings. steps: of AdamW (linear warm-up, cosine). batch: strings of each.

    Raises:
        HFViTError: the model has too few tokens for a pair of brackets.
    """
    rng = torch.Generator().manual_seed(seed)
    dim, rows_columns = model.config.hidden_size, model.config.grid_size
    length = rows_columns[0] * rows_columns[1] // 2 * 2
    symbols = torch.randn(2 * kinds + 1, dim, generator=rng)  # the last one is the mask
    positions = torch.randn(length, dim, generator=rng)
    readout = torch.nn.Linear(dim, 2 * kinds)
    torch.nn.init.normal_(readout.weight, std=dim**-0.5, generator=rng)
    torch.nn.init.zeros_(readout.bias)
    parameters = [*model.vit.layers.parameters(), *model.vit.layernorm.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    ramp = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / ramp, total_iters=ramp),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - ramp)),
        ],
        [ramp],
    )
    model.train()
    losses = []
    for _ in range(steps):
        strings = dyck_strings(batch, length, kinds, rng)
        hidden = (strings >= kinds) & (torch.rand(batch, length, generator=rng) < MASK_RATE)
        hidden[:, -1] = True  # always a closing bracket: every string has a masked one
        x = symbols[strings.masked_fill(hidden, 2 * kinds)] + positions  # (B, N, D)
        for layer in model.vit.layers:
            x = layer(x)
        logits = readout(model.vit.layernorm(x)[hidden])  # (masked, 2 k)
        loss = F.cross_entropy(logits, strings[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses
