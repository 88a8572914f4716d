"""Train a ViT or hybrid from scratch, on images with labels or on generated ones.

    python -m training.pretrain --preset vit-small-patch16 --dataset synthetic:atoms --output_dir out
    accelerate launch -m training.pretrain --set hidden_size=192 --dataset PATH_OR_HUB_ID --output_dir out
    torchrun --nproc_per_node 8 -m training.pretrain ...

Defaults follow the paper's Table 3. `--help` lists every option.
"""

import sys
from typing import Any

from .train import command


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run with these arguments (None: the command line's) and return the facts."""
    return command("pretrain", argv)


if __name__ == "__main__":
    main(sys.argv[1:])
