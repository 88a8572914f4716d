"""Options that only hf_vit's own ViTs have, refused by name for transformers' other classifiers (BiT, Swin, ...).

Tests: tests/training/test_other_classifiers.py.
"""

from hf_vit.errors import HFViTError

from .arguments import Arguments


def check_vit_only(arguments: Arguments, class_name: str) -> None:
    """Raise HFViTError for the first option that a classifier of another class does not have.

    Args:
        class_name: such as `SwinForImageClassification`.
    """
    model, train = arguments.model, arguments.train
    options = {
        "--set": (model.set, "changes fields of HFViTConfig"),
        "--keep_representation": (model.keep_representation, "keeps the tanh layer of a ViT's head"),
        "--head_init probe": (model.head_init == "probe", "reads the features of a ViT"),
        "--layer_decay": (train.layer_decay < 1, "needs the layers of a ViT"),
        "--unfreeze_every": (train.unfreeze_every not in (0, "0"), "needs the layers of a ViT"),
        "--image_size_schedule": (train.image_size_schedule, "fits a ViT's positions to other sizes"),
        "--card_examples": (train.card_examples, "draws the attention of a ViT"),
        "--loss masked_patches": (train.loss == "masked_patches", "masks the patches of a ViT"),
    }
    for option, (requested, reason) in options.items():
        if requested:
            raise HFViTError(
                f"{option} {reason}, and --model is a {class_name} of transformers: leave it out, or take a ViT"
            )
