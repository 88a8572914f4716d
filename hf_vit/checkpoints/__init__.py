"""Load and save checkpoints of other libraries: `load_checkpoint` and `save_checkpoint`.

`load.py` recognizes the format of a file, a module of `formats/` infers the architecture (`spec.py` has the
interface), and `mapping.py` converts the tensors. `save.py` is the other direction. None of this travels to the Hub.
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
