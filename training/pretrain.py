"""Train a ViT or hybrid from scratch, on images with labels or on generated ones.

    python -m training.pretrain --preset vit-small-patch16 --dataset synthetic:atoms --output_dir out
    python -m training.pretrain --set hidden_size=192 --dataset PATH_OR_HUB_ID --output_dir out
    torchrun --nproc_per_node 8 -m training.pretrain ...

Defaults follow the paper's Table 3. `--help` lists every option.

Tests: tests/training/test_recipes.py.
"""

import sys
import types
from typing import Any

from .python_api import TrainingResult, train_from_python
from .train import command


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run with these arguments (None: the command line's) and return the facts."""
    return command("pretrain", argv)


class PretrainModule(types.ModuleType):
    """The command's module and the function of the same name are one: `from training import pretrain` gives both."""

    def __call__(self, **options: Any) -> TrainingResult:
        """Run from Python, with the options of the command line; see `training.python_api.train_from_python`."""
        return train_from_python("pretrain", options)


sys.modules[__name__].__class__ = PretrainModule


if __name__ == "__main__":
    main()
