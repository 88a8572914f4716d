"""The largest micro-batch that fits: the same steps in other passes, on a machine with as much memory as a test says.

pytest tests/training/engine/planning/test_auto_batch_size.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vit.errors import HFViTError
from tests.helpers.training_runs import Images, arguments, history, tiny
from training.config.arguments import TrainArguments
from training.engine.planning import auto_batch_size
from training.engine.planning.auto_batch_size import available_memory, largest_tried, pass_sizes, with_passes_of
from training.engine.trainer import Trainer


class SmallDevice(torch.nn.Module):
    """Holds so many images in one pass, and says of more what PyTorch says."""

    def __init__(self, network, images):
        super().__init__()
        self.network, self.images, self.tried = network, images, []

    @property
    def config(self):
        return self.network.config

    def forward(self, pixel_values):
        self.tried.append(len(pixel_values))
        if len(pixel_values) > self.images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.network(pixel_values)


def limit_passes(monkeypatch, images):
    """A machine on which passes of more images do not fit."""
    monkeypatch.setattr(auto_batch_size, "fits_on_cpu", lambda passes, *rest: lambda size: size <= images)


def trained(folder, **values):
    trainer = Trainer(tiny(), arguments(folder, **values), Images(64), Images(10, seed=1))
    trainer.train()
    return trainer


def losses(folder):
    return [line["loss"] for line in history(folder) if "loss" in line]


@pytest.mark.parametrize(("most", "size"), [(100, 12), (5, 4), (1, 1)])
def test_steps_stay_and_their_passes_are_the_largest_that_fit(tmp_path, monkeypatch, most, size, capsys):
    limit_passes(monkeypatch, most)
    asked = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "optim": "sgd"}
    trainer = trained(tmp_path / "auto", auto_batch_size=True, **asked)
    assert trainer.args.per_device_train_batch_size == size and trainer.global_batch_size == 12
    assert trainer.args.gradient_accumulation_steps == 12 // size
    assert f"micro-batch: {size} images in each of {12 // size} passes of a step of 12" in capsys.readouterr().err
    facts = trainer.create_model_card()["training"]
    assert (facts["per_device_train_batch_size"], facts["gradient_accumulation_steps"]) == (size, 12 // size)
    assert facts["global_batch_size"] == 12 and trainer.args.per_device_eval_batch_size == min(5, size)
    plain = trained(tmp_path / "plain", **asked)
    torch.testing.assert_close(losses(tmp_path / "auto"), losses(tmp_path / "plain"))
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_a_resumed_run_keeps_the_choice_also_where_more_memory_is_free(tmp_path, monkeypatch):
    run = {"auto_batch_size": True, "per_device_train_batch_size": 8, "max_steps": 6}
    limit_passes(monkeypatch, 2)
    whole = trained(tmp_path / "whole", **run)
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole/checkpoint-3").rename(tmp_path / "killed/checkpoint-3")
    limit_passes(monkeypatch, 100)
    resumed = trained(tmp_path / "killed", resume_from_checkpoint=True, **run)
    assert resumed.args.per_device_train_batch_size == 2
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_search_on_an_accelerator_tries_passes_and_keeps_some_memory_back(monkeypatch, tmp_path):
    monkeypatch.setattr(auto_batch_size, "largest_that_fits", lambda *given: largest_tried(*given[:3]))
    trainer = Trainer(tiny(), arguments(tmp_path, auto_batch_size=True, per_device_train_batch_size=32), Images(64))
    small = trainer.loss_module.model = SmallDevice(trainer.loss_module.model, 10)
    trainer._find_batch_size()
    assert small.tried == [36, 18, 9] and trainer.args.per_device_train_batch_size == 8
    assert not any(p.grad is not None for p in trainer.model.parameters())


def test_an_error_that_is_not_of_memory_is_not_taken_for_one(monkeypatch, tmp_path):
    monkeypatch.setattr(auto_batch_size, "largest_that_fits", lambda *given: largest_tried(*given[:3]))
    trainer = Trainer(tiny(), arguments(tmp_path, auto_batch_size=True), Images(64))

    def broken(pixel_values):
        raise RuntimeError("shapes do not match")

    trainer.loss_module.model.forward = broken
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer._find_batch_size()


def test_too_little_memory_for_one_image_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(auto_batch_size, "available_memory", lambda: 1000)
    with pytest.raises(HFViTError, match="not even a pass of 1 images fits in memory: add --activation_checkpointing"):
        trained(tmp_path / "run", auto_batch_size=True)


class Measured:
    """Passes that take `image` bytes of an image; what Passes measures on a machine."""

    device = torch.device("cpu")
    pixel_values = torch.zeros(1, 100, dtype=torch.uint8)

    def __init__(self, image):
        self.image, self.tried = image, []

    def train(self, images, measured_kernels):
        self.tried.append(images)
        return 0.01, 10**9 + images * self.image


@pytest.mark.parametrize("state", [0, 400_000_000])
def test_on_a_cpu_memory_of_a_few_images_tells_that_of_many(monkeypatch, state):
    monkeypatch.setattr(auto_batch_size, "available_memory", lambda: 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    sizes, passes = [64, 45, 44, 25, 24, 23, 22], Measured(20_000_000)
    found = auto_batch_size.largest_that_fits(passes, sizes, state, 4)
    assert found == (24 if state else 44) and max(passes.tried) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # which share the machine
    assert auto_batch_size.largest_that_fits(passes, sizes, 0, 4) == 22


def test_what_the_graph_keeps_counts_where_the_process_does_not_grow(tmp_path):
    trainer = Trainer(tiny(), arguments(tmp_path), Images(8))
    pixels, labels = torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)
    passes = auto_batch_size.Passes(trainer.loss_module, trainer.accelerator, trainer.kernels, pixels, labels)
    kept = [auto_batch_size.train_and_count(passes, images)[2] for images in (2, 4, 6)]
    assert kept[2] - kept[1] == kept[1] - kept[0] > 2 * 5 * 16 * 4  # more than one activation of five tokens


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 4))
def test_every_size_makes_the_same_step(batch, passes, devices):
    args = TrainArguments(max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=passes)
    sizes = pass_sizes(args, None, devices, torch.nn.Identity())
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == batch * passes and sizes[-1] == 1
    for size in sizes:
        other = with_passes_of(args, size)
        assert other.per_device_train_batch_size * other.gradient_accumulation_steps == batch * passes
    assert pass_sizes(args, None, devices, torch.nn.BatchNorm2d(3))[-1] == min(
        (size for size in sizes if size > 1), default=1
    )


def test_batches_that_grow_are_shared_out_too():
    args = TrainArguments(max_steps=10, per_device_train_batch_size=8, batch_size_schedule={"50%": 20})
    sizes = pass_sizes(args, None, 1, torch.nn.Identity())
    assert sizes == [4, 2, 1]  # 20 images in passes of at most 8 would leave a remainder


def test_a_global_batch_needs_no_multiple_of_the_default(tmp_path, monkeypatch):
    limit_passes(monkeypatch, 7)
    trainer = trained(
        tmp_path / "run", auto_batch_size=True, global_batch_size=15, per_device_train_batch_size=8, max_steps=2
    )
    assert trainer.args.per_device_train_batch_size == 5 and trainer.global_batch_size == 15


def test_free_memory_is_what_a_container_leaves(tmp_path, monkeypatch):
    machine = available_memory()
    monkeypatch.setattr(auto_batch_size, "CGROUPS", tmp_path)
    monkeypatch.setattr(auto_batch_size, "OWN_CGROUPS", tmp_path / "own")
    group = tmp_path / "user/run"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/user/run\n")
    for name, text in {"max": "3000", "current": "1500", "stat": "anon 1\ninactive_file 500\n"}.items():
        (group / f"memory.{name}").write_text(text)
        (group.parent / f"memory.{name}").write_text("max" if name == "max" else text)
    assert available_memory() == 2000
    (tmp_path / "own").write_text("3:cpu:/\n4:memory:/\n")
    (tmp_path / "memory").mkdir()
    for name, text in {"limit_in_bytes": "900", "usage_in_bytes": "1000", "stat": "total_inactive_file 7\n"}.items():
        (tmp_path / "memory" / f"memory.{name}").write_text(text)
    assert available_memory() == 0
    (tmp_path / "own").unlink()
    assert math.isclose(available_memory(), machine, rel_tol=0.5)
