"""What is no checkpoint, or a broken one: one clear error each, and nothing written.

python -m pytest tests/hf_vit/checkpoints/test_checkpoints.py
"""

import errno
import json
import pickle
import warnings
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTError, open_image
from hf_vit.checkpoints import load_checkpoint, save_checkpoint
from tests.helpers.checkpoints import ours, same


pytestmark = pytest.mark.numerics


def npz(path, **arrays) -> str:
    np.savez(path, **{name.replace("__", "/"): array for name, array in arrays.items()})
    return path


def kernel(*size) -> np.ndarray:
    return np.zeros(size, np.float32)


@pytest.fixture
def good(tmp_path):
    save_checkpoint(ours(), tmp_path / "good.npz", format="google-npz")
    return tmp_path / "good.npz"


@pytest.mark.parametrize("left", [0, 1, 40, 1000, 0.5, 0.99])
def test_truncated_npz(tmp_path, good, left):
    content = good.read_bytes()
    good.write_bytes(content[: left if isinstance(left, int) else int(left * len(content))])
    with pytest.raises(HFViTError, match=r"good\.npz.*(truncated|corrupt|empty)"):
        load_checkpoint(good)


def test_flipped_bytes_in_npz(good):
    content = bytearray(good.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    good.write_bytes(content)
    with pytest.raises(HFViTError, match="truncated or corrupt"):
        load_checkpoint(good)


def test_pickled_objects_are_never_loaded(tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    np.savez(tmp_path / "bomb.npz", cls=np.array([Bomb()], dtype=object))
    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "bomb.bin").write_bytes(pickle.dumps(Bomb()))
    for name, reason in (
        ("bomb.npz", "pickled object array"),
        ("bomb.pth", "never unpickled"),
        ("bomb.bin", "never unpickled"),
    ):
        with pytest.raises(HFViTError, match=reason):
            load_checkpoint(tmp_path / name)
    assert not ran.exists()


@pytest.mark.parametrize("left", [0, 5, 100, 0.5, 0.99])
def test_truncated_safetensors_and_torch_files(tmp_path, left):
    state = ours().state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "vit.safetensors")
    torch.save(state, tmp_path / "vit.pth")
    for name in ("vit.safetensors", "vit.pth"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: left if isinstance(left, int) else int(left * len(content))])
        with pytest.raises(HFViTError, match=f"{name}.*(truncated|corrupt|empty)"):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ({"MixerBlock_0__token_mixing__Dense_0__kernel": (4, 4), "stem__kernel": (8, 8, 3, 4)}, "MLP-Mixer"),
        ({"resnet__root_block__conv2d__kernel": (7, 7, 3, 64)}, "BiT"),
        ({"text_model.embeddings.weight": (4, 4), "vision_model.embeddings.weight": (4, 4)}, "CLIP"),
        ({"visual.conv1.weight": (4, 3, 8, 8), "token_embedding.weight": (4, 4)}, "CLIP"),
        ({"layer1.0.conv1.weight": (4, 4, 3, 3), "fc.weight": (4, 4)}, "convolutional"),
        ({"something": (3,)}, "not a ViT of a known format.*something"),
    ],
)
def test_other_architectures_are_named(tmp_path, names, what):
    npz(tmp_path / "other.npz", **{name: kernel(*size) for name, size in names.items()})
    tensors = {name.replace("__", "/"): torch.zeros(size) for name, size in names.items()}
    save_file(tensors, tmp_path / "other.safetensors")
    for name in ("other.npz", "other.safetensors"):
        with pytest.raises(HFViTError, match=what):
            load_checkpoint(tmp_path / name)


def test_config_of_another_architecture(tmp_path):
    ours().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "beit"}))
    with pytest.raises(HFViTError, match="model_type 'beit'"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HFViTError, match="not readable as JSON"):
        load_checkpoint(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(HFViTError, match="no such file or folder"):
        load_checkpoint(tmp_path / "nothing.npz")
    with pytest.raises(HFViTError, match="holds no weights"):
        load_checkpoint(tmp_path)
    with pytest.raises(HFViTError, match="could not be downloaded from the Hub"):
        load_checkpoint("nobody/has-such-a-vit")
    with pytest.raises(HFViTError, match="download"):
        load_checkpoint("https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(HFViTError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_hub_id(tmp_path, monkeypatch, safe):
    """A repository is a folder that the Hub's client fetches: safetensors first, pickles where there are none."""
    model, requested = ours(), []
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil().save_pretrained(tmp_path)
    if not safe:
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()

    def snapshot(repo_id, revision, allow_patterns):
        requested.append((repo_id, revision, "*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("hf_vit.checkpoints.download.snapshot_download", snapshot)
    same(load_checkpoint("someone/some-vit", revision="v1"), model)
    assert requested == [("someone/some-vit", "v1", False)] + ([] if safe else [("someone/some-vit", "v1", True)])


def test_a_download_of_other_bytes_is_taken_out_of_the_cache(tmp_path, monkeypatch):
    """The Hub's cache keeps large files under their SHA-256."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    blob = tmp_path / "blobs" / ("0" * 64)

    def snapshot(*args, **kwargs):
        blob.write_bytes(b"damaged on the way")
        (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("hf_vit.checkpoints.download.snapshot_download", snapshot)
    with pytest.raises(HFViTError, match=r"model\.safetensors arrived with other bytes"):
        load_checkpoint("someone/some-vit")
    assert not blob.exists()


@pytest.mark.parametrize(
    ("error", "tries", "what"),
    [
        (ConnectionError("cut"), 3, "cut"),
        (httpx.TooManyRedirects("Exceeded maximum allowed redirects"), 3, "redirects"),
        (ValueError("odd"), 1, "odd"),
    ],
)
def test_a_hub_that_fails_is_one_line(monkeypatch, error, tries, what):
    """Connections are tried again; whatever the Hub's client lets through is one line."""
    calls = Mock(side_effect=error)
    monkeypatch.setattr("hf_vit.checkpoints.download.snapshot_download", calls)
    monkeypatch.setattr("hf_vit.checkpoints.download.FIRST_WAIT", 0.0)
    with pytest.raises(HFViTError, match=f"could not be downloaded from the Hub: .*{what}"):
        load_checkpoint("someone/some-vit")
    assert calls.call_count == tries


def test_a_damaged_description_in_the_cache_is_named(tmp_path, monkeypatch):
    ours().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    monkeypatch.setattr("hf_vit.checkpoints.download.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(HFViTError, match=r"config\.json: not readable.*delete that file"):
        load_checkpoint("someone/some-vit")


@pytest.mark.parametrize("name", ["model.safetensors", "x.npz", "x.pth"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 343261600\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(HFViTError, match=r"a Git LFS pointer, .* `git lfs pull`"):
        load_checkpoint(tmp_path / name)
    (tmp_path / "cat.jpg").write_text(pointer)
    with pytest.raises(HFViTError, match=r"cat\.jpg: a Git LFS pointer"):
        open_image(tmp_path / "cat.jpg")


def test_missing_and_left_over_are_listed_up_to_twenty(tmp_path, good):
    with np.load(good) as file:
        arrays = {name: file[name] for name in file.files if "encoderblock_1/" not in name or "LayerNorm_0" in name}
    arrays |= {f"extra_{i}/kernel": kernel(2, 3) for i in range(25)}
    np.savez(good, **arrays)
    with pytest.raises(HFViTError) as error:
        load_checkpoint(good)
    text = str(error.value)
    assert "missing (14): Transformer/encoderblock_1/" in text and "not used (25): extra_0/kernel (2, 3)" in text
    assert text.count("extra_") == 20 and "and 5 more" in text


def test_shapes_that_differ_are_listed(tmp_path, good):
    with np.load(good) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"] = kernel(32, 50)
    arrays["cls"] = kernel(1, 1, 16)
    np.savez(good, **arrays)
    with pytest.raises(HFViTError, match=r"of another shape \(2\): cls \(1, 1, 16\).*\(32, 50\)"):
        load_checkpoint(good)


def test_nan_weights_are_named(good):
    with np.load(good) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["head/bias"][2] = np.nan
    arrays["cls"][0, 0, 0] = np.inf
    np.savez(good, **arrays)
    with pytest.raises(HFViTError, match="NaN or infinite values in cls, head/bias: the training diverged"):
        load_checkpoint(good)


def test_a_good_file_gives_no_warning(good):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(good)


def test_sharded_folder(tmp_path):
    model = ours()
    state = model.state_dict()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name].contiguous() for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    same(load_checkpoint(tmp_path), model)
    index["weight_map"]["ghost"] = "a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HFViTError, match=r"'ghost' lies in a\.safetensors"):
        load_checkpoint(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    place = tmp_path / "vit.npz"
    place.write_bytes(b"before")
    monkeypatch.setattr(
        np.lib.format,
        "write_array",
        Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")),
    )
    with pytest.raises(HFViTError, match=r"no space left for .*vit\.npz"):
        save_checkpoint(ours(), place, format="google-npz")
    assert place.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["vit.npz"]


def test_weights_are_owned_and_trainable(good):
    model = load_checkpoint(good)
    assert all(p.requires_grad and p.is_contiguous() and not p.is_meta for p in model.parameters())
    assert not model.training
    model.train()
    model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    assert model.vit.embeddings.cls_token.grad is not None
    model.save_pretrained(good.parent / "folder")
    assert load_file(good.parent / "folder" / "model.safetensors")
