"""Tensor files opened safely and read one tensor at a time: npz, safetensors, PyTorch's zip and pickle.

Nothing here executes what a file contains: npz members are read without pickle, `.pth` and `.bin` only through
`torch.load(weights_only=True)`. Every damaged or foreign file is one `HFViTError` that names it.
"""

import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import HFViTError


WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Under these a training script may have put the state dict.
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "model_ema", "state_dict_ema", "module")


class TensorFile:
    """Names, shapes and dtypes of a checkpoint, known at once; the values are read when asked for.

    Attributes:
        path: where it lies. kind: `"npz"`, `"safetensors"` or `"torch"`.
        shapes: name -> shape. metadata: the strings of a safetensors header.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        shapes: dict[str, tuple[int, ...]],
        read: Callable[[str], torch.Tensor],
        metadata: dict[str, str] | None = None,
    ):
        self.path = path
        self.kind = kind
        self.shapes = shapes
        self.metadata = metadata or {}
        self._read = read

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name; float64 and float16 arrays and raw bfloat16 of an npz come as float32."""
        try:
            return self._read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, SafetensorError, ValueError) as error:
            raise HFViTError(
                f"{self.path}: '{name}' cannot be read, the file is truncated or corrupt ({error})"
            ) from error

    def without_prefix(self, prefix: str) -> "TensorFile":
        """The same file seen without a prefix that every name carries."""
        shapes = {name.removeprefix(prefix): shape for name, shape in self.shapes.items()}
        return TensorFile(self.path, self.kind, shapes, lambda name: self._read(prefix + name), self.metadata)


def open_tensors(path: Path) -> TensorFile:
    """Open one checkpoint file by what it contains, whatever its suffix.

    Raises:
        HFViTError: no such file, truncated, corrupt, pickled objects, or not a checkpoint.
    """
    if not path.is_file():
        raise HFViTError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    with path.open("rb") as file:
        head = file.read(9)
    try:
        if head[:2] == b"PK":
            if path.suffix == ".npz" or _is_npz(path):
                return _open_npz(path)
            return _open_torch(path)
        if len(head) == 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 100_000_000:
            return _open_safetensors(path)
        if head[:1] == b"\x80" and path.suffix != ".npz":
            return _open_torch(path)
    except zipfile.BadZipFile as error:
        raise HFViTError(f"{path}: truncated or corrupt, it is not a complete zip archive ({error})") from error
    if path.suffix in (".npz", ".safetensors", ".pth", ".pt", ".bin"):
        what = "empty" if not head else "truncated, corrupt or not what its suffix says"
        raise HFViTError(f"{path}: {what}; download or copy it again")
    raise HFViTError(
        f"{path}: not a checkpoint; hf_vit reads .npz, .safetensors, .pth and .bin files and folders of them"
    )


def _is_npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(".npy") for name in archive.namelist())


# -- npz --------------------------------------------------------------------------------------------------------------


def _open_npz(path: Path) -> TensorFile:
    archive = zipfile.ZipFile(path)
    shapes = {}
    for member in archive.namelist():
        if not member.endswith(".npy"):
            raise HFViTError(f"{path}: holds '{member}', which is no array; this is not an npz of weights")
        try:
            with archive.open(member) as stream:
                shape, dtype = _npy_header(stream)
        except (ValueError, OSError, EOFError) as error:
            raise HFViTError(f"{path}: '{member}' is truncated or corrupt ({error})") from error
        if dtype.hasobject:
            raise HFViTError(
                f"{path}: '{member.removesuffix('.npy')}' is a pickled object array, which is never loaded "
                "because it can run code; save the file again with plain arrays only"
            )
        shapes[member.removesuffix(".npy")] = shape
    return TensorFile(path, "npz", shapes, lambda name: _read_npy(archive, name))


def _npy_header(stream) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    return shape, dtype


def _read_npy(archive: zipfile.ZipFile, name: str) -> torch.Tensor:
    with archive.open(name + ".npy") as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        stream.read(1)  # reaching the end is what checks the CRC
    if array.dtype == np.dtype("V2"):  # bfloat16, a type numpy does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
    if array.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.dtype.kind in "iub":
        return torch.from_numpy(array.astype(np.int64))
    raise ValueError(f"arrays of type {array.dtype} hold no weights")


# -- safetensors ------------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> TensorFile:
    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return TensorFile(path, "safetensors", shapes, file.get_tensor, file.metadata())
    except (SafetensorError, OSError, ValueError) as error:
        raise HFViTError(f"{path}: truncated or corrupt safetensors file ({error})") from error


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def _open_torch(path: Path) -> TensorFile:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HFViTError(
            f"{path}: holds Python objects besides tensors, or is corrupt; such files are never unpickled because "
            "they can run code. Save its state_dict alone, best as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise HFViTError(f"{path}: truncated or corrupt PyTorch file ({str(error).splitlines()[0]})") from error
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise HFViTError(
            f"{path}: holds no state dict (names with tensors); known keys of one: {', '.join(STATE_DICT_KEYS)}"
        )
    tensors = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return TensorFile(path, "torch", {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__)


def _open_shards(path: Path) -> TensorFile:
    try:
        where = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise HFViTError(f"{path}: not an index of shards ({error})") from error
    files = {name: open_tensors(path.parent / name) for name in sorted(set(where.values()))}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shard in where.items():
        if name not in files[shard]:
            raise HFViTError(f"{path}: says that '{name}' lies in {shard}, where it is not")
        shapes[name] = files[shard].shapes[name]
    kind = next(iter(files.values())).kind
    return TensorFile(path, kind, shapes, lambda name: files[where[name]].read(name))


# -- folders ----------------------------------------------------------------------------------------------------------


def find_weights(folder: Path) -> Path:
    """The weight file of a folder: transformers' names first, otherwise the only checkpoint in it."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    others = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".pth", ".pt", ".npz")]
    if len(others) == 1:
        return others[0]
    if others:
        raise HFViTError(
            f"{folder}: holds {len(others)} checkpoints, name one of them: {', '.join(p.name for p in others)}"
        )
    raise HFViTError(f"{folder}: holds no weights ({', '.join(WEIGHT_FILES)} or an .npz)")


def read_json(path: Path) -> dict:
    """A JSON object from a file; HFViTError where it is none."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise HFViTError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise HFViTError(f"{path}: must hold a JSON object")
    return content
