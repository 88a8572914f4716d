"""The checkpoints of one run, over all its processes: writing, rotating and reading them.

With `background`, a thread of the main process writes a copy of the state while training goes on. Either way, a folder
`checkpoint-N` is complete or absent. The files of a checkpoint are checkpoint_io.py's. Not torch's `dcp.async_save`:
only torch can load its folders.
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
    """Writes and reads the checkpoints of a run. Every process has to call every method.

    Args:
        limit: checkpoints that are kept besides the best; None keeps all.
        background: write during the next steps, from a copy of the state in memory.
        log: called with lines for the user.
    """

    def __init__(self, limit: int | None, background: bool, log: Callable[[str], None]):
        self.limit, self.background, self.log = limit, background, log
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    # -- writing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait for the writing thread at exit, also if the run fails."""
        try:
            yield
        finally:
            if self._thread is not None:
                self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether the writing thread of this process has failed; `finish` raises its error."""
        return self._error is not None

    def write(
        self,
        folder: Path,
        state: TrainingState,
        identity: dict[str, Any],
        write_model: Callable[[Path, dict], None],
    ) -> None:
        """Write `checkpoint-N` and remove older ones beyond the limit, after the checkpoint before is finished.

        Args:
            identity: of the run, which a resumed one is compared with. write_model: `write_model(folder, weights)`.

        Raises:
            HFViTError: the disk is full, now or while the checkpoint before was written.
        """
        self.finish()
        content = state.state_dict(copies=self.background)
        content["counters"] = (
            copy.deepcopy(content["counters"]) | identity
        )  # the loop goes on counting in the original
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
        except Exception as error:  # `finish` raises it on all ranks
            self._error = error

    def finish(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            HFViTError: writing it failed.
        """
        with all_ranks():
            if self._thread is not None:
                self._thread.join()
            self._thread, error, self._error = None, self._error, None
            if error is not None:
                raise error

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, folder: Path, set_damaged_aside: bool) -> tuple[Path, dict[str, Any]] | None:
        """Folder and content of a checkpoint; None if no checkpoint is intact.

        Args:
            set_damaged_aside: rename a damaged checkpoint, and read the newest one before it instead.

        Raises:
            HFViTError: the checkpoint is damaged, and is not to be set aside.
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
            # Between two barriers: no rank may still read the folder, and all look for the newest one afterwards.
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
