"""At its end a process does not wait for data workers, which leave signals to the loop.

pytest tests/training/engine/test_preemption.py; what SIGTERM does to a run: test_trainer.py, test_distributed.py
"""

import subprocess
import sys


PROGRAM = """
import multiprocessing, time
from training.engine.preemption import ignore_signals

def work(ready):
    ignore_signals(0)
    ready.set()
    time.sleep(300)

fork = multiprocessing.get_context("fork")
ready = fork.Event()
fork.Process(target=work, args=(ready,), daemon=True).start()
ready.wait()
"""


def test_a_process_that_ends_takes_its_workers_with_it():
    assert subprocess.run([sys.executable, "-c", PROGRAM], timeout=100).returncode == 0
