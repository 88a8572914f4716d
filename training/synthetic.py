"""Write generated images as files: `python -m training.synthetic NAME --out DIR` (`data/synthetic/export.py`)."""

import sys

from .data.synthetic.export import main


if __name__ == "__main__":
    sys.exit(main())
