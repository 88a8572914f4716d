"""Other libraries' checkpoints, in and out: `load_checkpoint` and `save_checkpoint`.

`load.py` recognizes a file and asks a format of `formats/` what it holds (`spec.py` has the interface); `mapping.py`
exchanges the tensors. `save.py` goes the other way. None of this travels to the Hub; nothing that travels imports it.
"""

from .load import AssumptionWarning, Loaded, ZeroHeadWarning, load_checkpoint, read_checkpoint
from .save import FORMATS, save_checkpoint
from .spec import UnusableHeadError


__all__ = [
    "FORMATS",
    "AssumptionWarning",
    "Loaded",
    "UnusableHeadError",
    "ZeroHeadWarning",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]
