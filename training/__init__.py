"""How a ViT is made and measured: data, augmentation, optimization, the loop, and the scripts that run it.

Runs from a clone as `python -m training.finetune` and installed as `python -m hf_vit.training.finetune`.
"""

import importlib
import os
import sys
import threading


LOADING_SIGN = 8.0  # seconds, after which a command says that it loads: a log file should not stay empty

_loading = threading.Timer(
    LOADING_SIGN, print, ["loading torch and transformers"], {"file": sys.stderr, "flush": True}
)
if sys.argv[:1] == ["-m"] and os.environ.get("RANK", "0") == "0":  # so it is while `python -m` imports this package
    _loading.daemon = True
    _loading.start()

import hf_vit  # noqa: E402, F401  # before any other import: it reports a torchvision that would break them


_loading.cancel()


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
