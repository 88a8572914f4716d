"""Fine-tune a pre-trained ViT on images with labels, at any resolution, with a new head.

    python -m training.finetune --model PATH_OR_HUB_ID --dataset PATH_OR_HUB_ID --image_size 384 --output_dir out
    python -m training.finetune --config finetune_small --dataset my/images ...
    torchrun --nproc_per_node 8 -m training.finetune ...

With --preset or --set and without --model, the same training from scratch. `--help` lists every option.
"""

import sys
import types
from typing import Any

from .python_api import TrainingResult, train_from_python
from .train import command


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run with these arguments (None: the command line's) and return the facts."""
    return command("finetune", argv)


class FinetuneModule(types.ModuleType):
    """The command's module and the function of the same name are one: `from training import finetune` gives both."""

    def __call__(self, **options: Any) -> TrainingResult:
        """Run from Python, with the options of the command line; see `training.python_api.train_from_python`."""
        return train_from_python("finetune", options)


sys.modules[__name__].__class__ = FinetuneModule


if __name__ == "__main__":
    main()
