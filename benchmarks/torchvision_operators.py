"""Lets `import torchvision` succeed where its compiled part does not load, beside a torch of another build.

timm and transformers import its Python part. Its operators are declared, without an implementation. Import this before
both, and before hf_vit.
"""

import importlib

import torch


DECLARED = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
library: list[torch.library.Library] = []  # operators live as long as it does

try:
    importlib.import_module("torchvision")
except ImportError:
    pass
except RuntimeError:  # operator torchvision::nms does not exist
    library.append(torch.library.Library("torchvision", "DEF"))
    for name in ("nms", "qnms"):
        library[0].define(f"{name}{DECLARED}")
    importlib.import_module("torchvision")
