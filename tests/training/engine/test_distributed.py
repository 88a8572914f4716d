"""Two processes end as one: what only one of them cannot do, both say, and neither is left waiting.

pytest tests/training/engine/test_distributed.py
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_vit.errors import HFViTError
from tests.helpers.training_runs import arguments, tiny
from training.data.dataset import open_dataset
from training.data.transforms import EvalTransform
from training.engine.checkpoints import checkpoint_io
from training.engine.checkpoints.resume_check import raise_if_checkpoints_differ
from training.engine.dataloaders import all_batches
from training.engine.distributed import all_ranks, handle_peer_exit
from training.engine.trainer import Trainer


HERE = Path(__file__).parent


class Loader:
    """Three batches, of which the second cannot be read."""

    def __len__(self):
        return 3

    def __iter__(self):
        return self

    def __next__(self):
        self.number = getattr(self, "number", 0) + 1
        if self.number == 2:
            raise HFViTError("2.png: not a")
        return {"labels": torch.ones(4)}


def test_after_an_error_empty_batches_follow_where_others_wait_for_them():
    kept = []
    assert [len(batch["labels"]) for batch in all_batches(Loader(), kept.append)] == [4, 0, 0]
    assert [str(error) for error in kept] == ["2.png: not a"]
    with pytest.raises(HFViTError, match=r"^2.png: not a$"):
        list(all_batches(Loader(), None))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_says_what_happened_and_not_where(tmp_path, workers):
    data = images(tmp_path / "data", bad=("0.png",), on_unreadable="stop")
    args = arguments(tmp_path / "out", per_device_train_batch_size=8, dataloader_num_workers=workers)
    with pytest.raises(HFViTError, match=r"^a/0.png: not an image that Pillow can read$"):
        Trainer(tiny(num_labels=2), args, data).train()


def test_one_process_alone_raises_its_own_and_a_lost_connection_is_one_line():
    with pytest.raises(OSError, match="no such disk"), all_ranks():
        raise OSError("no such disk")
    with pytest.raises(HFViTError, match="another rank exited; see its log"), handle_peer_exit():
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1948.")
    with pytest.raises(RuntimeError, match="shapes"), handle_peer_exit():
        raise RuntimeError("shapes differ")


def images(folder, bad=(), **options):
    """Sixteen images of two classes, some of them damaged."""
    for number in range(16):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9 * number, 0, 255 * (number % 2))).save(path)
        if path.name in bad:
            path.write_bytes(b"not a")
    return open_dataset(str(folder), split="train", **options).with_transform(EvalTransform((8, 8)), 0)


def failures(folder, rank):
    """What each case says in this process, by its name."""
    whole = images(folder / f"whole-{rank}")
    one = images(folder / f"one-{rank}", ("5.png",), on_unreadable="stop")
    none = images(folder / f"none-{rank}", [f"{number}.png" for number in range(16)])
    cases = {"one": (one, whole), "none": (none, whole), "evaluation": (whole, one), "no evaluation": (whole, none)}
    cases |= {"disk": (whole, whole), "not shared": (whole, whole)}
    said = {}
    for name, (train, evaluation) in cases.items():
        values = {"max_steps": 20, "per_device_train_batch_size": 4, "logging_steps": 50, "save_steps": 0}
        values |= {"disk": {"save_steps": 4}, "none": {"logging_steps": 10}}.get(name, {})
        args = arguments(folder / name, **values)
        trainer = Trainer(tiny(num_labels=2), args, train, evaluation)
        try:
            if name == "not shared":
                raise_if_checkpoints_differ(Path("checkpoint-2") if rank else None, 2)
            elif "evaluation" in name:
                trainer.evaluate()
            else:
                trainer.train()
        except (HFViTError, OSError) as error:
            said[name] = str(error)
            assert trainer.state.global_step <= 10, name  # not long after it happened
    return said


def no_room(path, value):
    """write_json on a full disk."""
    raise OSError(28, "No space left on device")


def test_both_processes_say_what_one_of_them_met(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    done = [process.communicate(timeout=900) for process in running]
    assert [process.returncode for process in running] == [0, 0], done[0][1][-2000:] + done[1][1][-2000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in done)
    expected = {
        "one": "5.png: not an image",
        "none": "no image of step 1 can be read",
        "evaluation": "5.png: not an image",
        "no evaluation": "no image to evaluate on can be read",
        "disk": "no space left for",
        "not shared": "the processes see different checkpoints (checkpoint-2, none)",
    }
    assert list(first) == list(second) == list(expected)
    for name, words in expected.items():
        assert words in first[name] and words in second[name], name
    assert not list(tmp_path.glob("*/checkpoint-*"))


if __name__ == "__main__":
    own = int(os.environ["RANK"])
    if own == 0:
        checkpoint_io.write_json = no_room
    print(json.dumps(failures(Path(sys.argv[1]), own)))
    torch.distributed.destroy_process_group()
