"""The output folder of a run: used by one run at a time, and either empty or that of the resumed run.

For the Trainer.

Tests: tests/training/engine/test_trainer.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from hf_vit.atomic_file import full_disk_is_an_error
from hf_vit.errors import HFViTError

from ..distributed import all_ranks
from . import checkpoint_io
from .resume_check import raise_if_checkpoints_differ
from .run_lock import RunLock


@contextmanager
def locked(lock: RunLock) -> Iterator[None]:
    """Create the folder, and hold its lock on the main process; all processes have to enter.

    Raises:
        HFViTError: another run is at work in the folder; on all ranks.
    """
    folder, main = lock.path.parent, PartialState().is_main_process
    with all_ranks(), full_disk_is_an_error(folder, checkpoint_io.advice(folder)):
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    try:
        yield
    finally:
        if main:
            lock.release()


def checkpoint_to_resume(folder: Path, resume: str | bool | None) -> Path | None:
    """The checkpoint to resume from, None for a new run; leftovers of killed runs are removed.

    Raises:
        HFViTError: a new run in a folder that is not empty; no such checkpoint; ranks that see different ones.
    """
    process = PartialState()
    with all_ranks():
        checkpoint = checkpoint_io.find_checkpoint(folder, resume)
        if not resume and not checkpoint_io.is_unused(folder):
            raise HFViTError(
                f"{folder} is not empty: give another --output_dir, or --resume_from_checkpoint true to "
                "go on from its newest checkpoint"
            )
    raise_if_checkpoints_differ(checkpoint, process.num_processes)
    # Not before: up to here the folder might have been another run's.
    with all_ranks(), full_disk_is_an_error(folder, checkpoint_io.advice(folder)):
        if process.is_main_process:
            checkpoint_io.remove_leftovers(folder)
    return checkpoint
