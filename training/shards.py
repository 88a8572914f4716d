"""The index of tar shards, written beside them: `python -m training.shards index NAME` (`data/shard_command.py`).

Tests: tests/training/data/shards/test_shard_index.py.
"""

import sys

from .data.shards.shard_command import main


if __name__ == "__main__":
    sys.exit(main())
