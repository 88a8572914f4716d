"""How a ViT is made and measured: data, augmentation, optimization, the loop, and the scripts that run it.

Runs from a clone as `python -m training.finetune` and installed as `python -m hf_vit.training.finetune`.
"""

import importlib

import hf_vit  # noqa: F401  # before any other import: it reports a torchvision that would break them


# The public names; everything else may move. Each is imported when it is first used.
_PUBLIC = {
    "finetune": "finetune",
    "pretrain": "pretrain",
    "Trainer": "engine.trainer",
    "TrainArguments": "config.arguments",
    "open_dataset": "data.dataset",
    "TrainTransform": "data.transforms",
    "EvalTransform": "data.transforms",
    "RidgeProbe": "evaluation.few_shot",
    "SyntheticImages": "data.synthetic.images",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_PUBLIC[name]}", __name__)
    return module if name in ("finetune", "pretrain") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
