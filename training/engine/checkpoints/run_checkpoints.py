"""The checkpoints of one run, for all its processes: when they are written, which of them stay, which one is read.

With `background`, the state is copied and a thread of the main process writes the copy while training goes on. A
folder `checkpoint-N` is the same in both cases, whole or not there; until it is there, the one before it serves.
checkpoint_io.py knows the files of a checkpoint. Not torch's `dcp.async_save`: its folders are loaded by torch alone.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_vit.errors import HFViTError

from ..distributed import all_ranks
from . import checkpoint_io
from .trainer_state import TrainingState


class RunCheckpoints:
    """Writes, counts and reads the checkpoints of a run. Every process has to call every method.

    Args:
        limit: checkpoints that are kept besides the best; None keeps all.
        background: write beside the next steps; takes the memory of a copy of the state.
        log: called with what the user should know.
    """

    def __init__(self, limit: int | None, background: bool, log: Callable[[str], None]):
        self.limit, self.background, self.log = limit, background, log
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    # -- writing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around a run: what is being written is finished also where the run fails."""
        try:
            yield
        finally:
            if self._thread is not None:
                self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether writing beside the steps has failed on this process; `finish` raises what happened."""
        return self._error is not None

    def write(
        self,
        folder: Path,
        state: TrainingState,
        identity: dict[str, Any],
        write_model: Callable[[Path, dict], None],
    ) -> None:
        """Write `checkpoint-N`; then older ones beyond the limit go. One at a time: waits for the one before.

        Args:
            identity: what the run has to be resumed with. write_model: `write_model(folder, weights)`.

        Raises:
            HFViTError: the disk is full, now or while the checkpoint before was written.
        """
        self.finish()
        content = state.state_dict(copies=self.background)
        content["counters"] = copy.deepcopy(content["counters"]) | identity
        best = state.trainer_state.best_model_checkpoint

        def write() -> None:
            checkpoint_io.write_checkpoint(folder, content, write_model)
            checkpoint_io.remove_old_checkpoints(folder.parent, self.limit, best)

        with all_ranks():
            if PartialState().is_main_process:
                if self.background:
                    self._thread = threading.Thread(target=self._catch, args=(write,), name=folder.name)
                    self._thread.start()
                else:
                    write()

    def _catch(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # raised by `finish`, where all processes hear of it
            self._error = error

    def finish(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            HFViTError: it could not be.
        """
        with all_ranks():
            if self._thread is not None:
                self._thread.join()
            self._thread, error, self._error = None, self._error, None
            if error is not None:
                raise error

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, folder: Path, set_damaged_aside: bool) -> tuple[Path, dict[str, Any]] | None:
        """A checkpoint's folder and content; where it is damaged and that was asked for, those of the one before it.

        None where no checkpoint is whole.

        Raises:
            HFViTError: the checkpoint is damaged.
        """
        process = PartialState()
        while True:
            error: HFViTError | None = None
            content: dict[str, Any] | None = None
            try:
                content = checkpoint_io.read_training_checkpoint(folder)
            except checkpoint_io.DamagedCheckpointError as damage:
                error = damage
            with all_ranks():
                if error is not None and not set_damaged_aside:
                    raise error
            if content is not None:
                return folder, content
            process.wait_for_everyone()
            if process.is_main_process:
                moved = checkpoint_io.set_aside(folder)
                self.log(f"{str(error).partition(': --resume')[0]}: set aside as {moved.name}")
            process.wait_for_everyone()
            newest = checkpoint_io.find_checkpoint(folder.parent, True)
            if newest is None:
                self.log("no checkpoint is whole: training begins anew")
                return None
            folder = newest
