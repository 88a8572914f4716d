"""How a ViT is made and measured: data, augmentation, optimisation, the loop, and the scripts that run it.

Runs from a clone as `python -m training.finetune` and installed as `python -m hf_vit.training.finetune`.
"""

import hf_vit  # noqa: F401  # before any other import: it tells of a torchvision that would break them
