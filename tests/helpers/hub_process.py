"""Tokens of the local Hub, and Python that runs against it in a process of its own."""

import json
import subprocess
import sys
import textwrap


WRITER, READER, STRANGER = "hf_writer_secret", "hf_reader_secret", "hf_unknown_secret"
LABELS = {0: "circle", 1: "square", 2: "star"}
BLOCK_HF_VIT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_vit", "training"):
            raise ModuleNotFoundError(f"{name} is hidden from this process")
sys.meta_path.insert(0, Blocked())
"""


def run(hub, home, code, *arguments, token=None):
    """Run Python against the server, with fresh caches; the last line it prints, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=hub.environment(home=home, token=token),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
