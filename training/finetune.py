"""Fine-tune a pre-trained ViT on images with labels, at any resolution, with a new head.

    python -m training.finetune --model PATH_OR_HUB_ID --dataset PATH_OR_HUB_ID --image_size 384 --output_dir out
    accelerate launch -m training.finetune --config finetune_small --dataset my/images ...
    torchrun --nproc_per_node 8 -m training.finetune ...

With --preset or --set and without --model, the same training from scratch. `--help` lists every option.
"""

import sys
from typing import Any

from .train import command


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run with these arguments (None: the command line's) and return the facts."""
    return command("finetune", argv)


if __name__ == "__main__":
    main(sys.argv[1:])
