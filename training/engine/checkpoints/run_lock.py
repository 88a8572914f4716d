"""A lock on the output folder, so that only one run writes into it.

A POSIX record lock on OUTPUT_DIR/.lock: the kernel releases it when the process dies, however it dies, and data
workers do not inherit it. The file names the owner, for the message, and for network disks whose locks other machines
do not see. Not `filelock`, which does not tell who holds the lock.
"""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path

from hf_vit.errors import HFViTError


LOCK_NAME = ".lock"


class RunLock:
    """The lock of an output folder.

    Args:
        output_dir: folder of the run, which must exist.
    """

    def __init__(self, output_dir: Path):
        self.path = output_dir / LOCK_NAME
        self._handle: int | None = None
        self._depth = 0  # how often this process has taken it

    def acquire(self) -> None:
        """Take the lock, also from an owner that has died; the holder may take it again.

        Raises:
            HFViTError: another run is at work in the folder.
        """
        if self._handle is None:
            self._handle = self._take()
        self._depth += 1

    def _take(self) -> int:
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = self._owner(handle)
                os.close(handle)
                raise HFViTError(self._refusal(owner)) from None
            if os.path.exists(self.path) and os.path.samestat(os.fstat(handle), os.stat(self.path)):
                break
            os.close(handle)  # the owner removed the file between open and lock: we hold a lock on a deleted file
        # The lock is ours, but a network disk may not show the locks of other machines: the name in the file decides.
        owner = self._owner(handle)
        if owner and owner.get("host") != socket.gethostname():
            os.close(handle)
            raise HFViTError(self._refusal(owner) + f", or remove {self.path} if it has ended")
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return handle

    def release(self) -> None:
        """Release the lock, once for each `acquire`; the last release removes the file, and an empty folder."""
        self._depth -= 1
        if self._depth == 0 and self._handle is not None:
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                self.path.parent.rmdir()
            # last: whoever waits for the lock must find that its file is gone
            os.close(self._handle)
            self._handle = None

    def _owner(self, handle: int) -> dict:
        try:
            owner = json.loads(os.pread(handle, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _refusal(self, owner: dict) -> str:
        who = f"process {owner.get('process', '?')} on {owner.get('host', '?')}"
        return f"{self.path.parent} is in use by another run ({who}): wait for it, or give another --output_dir"
