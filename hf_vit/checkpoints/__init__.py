"""Other people's checkpoints, in and out; this is the door: `load_checkpoint` and `save_checkpoint`.

One dialect is one file with one table: `google.py`, `transformers_vit.py`, `timm.py`, `torchvision.py`. None of this
travels to the Hub; nothing that travels imports it.
"""

from .load import Loaded, load_checkpoint, read_checkpoint
from .save import FORMATS, save_checkpoint


__all__ = ["FORMATS", "Loaded", "load_checkpoint", "read_checkpoint", "save_checkpoint"]
