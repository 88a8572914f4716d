"""What every test stands on: the network is off, seeds are fixed, and where the golden files are."""

import os


# Read by huggingface_hub, datasets and evaluate when they are imported: before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# `make test` runs one process a core: what a test starts takes one thread too. A number that is set already is kept.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings


ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = ("127.", "::1", "localhost")

settings.register_profile("same", derandomize=True)  # the same examples in every run, here and in CI
settings.load_profile("same")

SUITE_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
)


def pytest_configure(config):
    for marker in SUITE_MARKERS:
        config.addinivalue_line("markers", f"{marker}: used inside transformers' own test suite")
    torch.set_num_threads(1)  # tiny tensors: one thread is faster, and sums are in one order


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _kernel_table(tmp_path_factory):
    """Measured times of tiny tensors stay out of the user's table."""
    from hf_vit import kernel_table

    folder = tmp_path_factory.mktemp("kernel_table")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_table, "cache_folder", lambda: folder)
        patch.setattr(kernel_table, "COLD_BYTES", 0)  # time that says nothing about tiny tensors
        yield


@pytest.fixture(autouse=True)
def _no_compiled_code_left():
    """A test that compiles starts from nothing: all models of a process share one limit of recompilations."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        dynamo.reset()
        dynamo.utils.counters.clear()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of small classifiers of every kind, by name; for reading only."""
    from tests.helpers.tiny_classifiers import save_classifiers

    return save_classifiers(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A connection to anything but this machine is an error of the test that makes it."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
            raise OSError(f"tests do not use the network (tried {address[0]})")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with the checkpoints, inputs and outputs that Google's own code computed."""
    return ROOT / "tests" / "fixtures" / "goldens"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder beside the clone with photographs and further goldens; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("reads photographs that the repository may not hold: put the data sets into ../shared/data")
    return folder
