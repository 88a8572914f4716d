"""Open tensor files safely and read one tensor at a time: npz, safetensors, PyTorch's zip and pickle.

No code in a file is executed: npz members are read without pickle, `.pth` and `.bin` only by
`torch.load(weights_only=True)`. A damaged or foreign file is one `HFViTError` that names it. Not `numpy.load` for npz:
it must read a whole tensor to know its shape.

Tests: tests/hf_vit/checkpoints/test_checkpoints.py.
"""

import argparse
import math
import pathlib
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ..errors import LFS_POINTER, HFViTError
from ..image_processing import read_settings


WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar", ".npz")
# Keys of a state dict in files of training scripts; averages and teachers first, as timm and DINO load them.
STATE_DICT_KEYS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "teacher", "target_encoder"),
    *("model", "state_dict", "model_state_dict", "module", "student", "encoder", "network", "net", "weights"),
)
AVERAGES = STATE_DICT_KEYS[:5]
FLOATS = {str(kind)[6:]: kind for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
SAFETENSORS_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

# Objects that training scripts store next to weights, which run no code: timm's Namespace, paths, NumPy's numbers.
_NUMPY: Any = getattr(np, "_core", None) or np.core
SAFE_OBJECTS: list[Any] = [
    *(argparse.Namespace, np.dtype, np.ndarray),
    *(pathlib.PosixPath, pathlib.PurePosixPath),
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
    *((_NUMPY.multiarray.scalar, f"{package}.multiarray.scalar") for package in ("numpy.core", "numpy._core")),
    *(
        (_NUMPY.multiarray._reconstruct, f"{package}.multiarray._reconstruct")
        for package in ("numpy.core", "numpy._core")
    ),
]


class TensorFile:
    """Names, shapes and dtypes of a checkpoint; values are read by `read`.

    Attributes:
        path: of the file. kind: `"npz"`, `"safetensors"` or `"torch"`.
        shapes: name -> shape. dtypes: name -> dtype as text, such as `"float32"`.
        metadata: of a safetensors header. assumptions, notes: made while opening it.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, str],
        read: Callable[[str], torch.Tensor],
        metadata: dict[str, str] | None = None,
    ):
        self.path = path
        self.kind = kind
        self.shapes = shapes
        self.dtypes = dtypes
        self.metadata = metadata or {}
        self.assumptions: list[str] = []
        self.notes: list[str] = []
        self._read = read

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, in a floating dtype; arrays of an npz are converted to float32.

        Raises:
            HFViTError: damaged, or an unsupported dtype (integers, booleans, complex, 8-bit floats).
        """
        if self.dtypes[name] not in FLOATS:
            raise HFViTError(
                f"{self.path}: '{name}' holds {self.dtypes[name]} numbers: quantized weights, or none. hf_vit reads "
                "float32, float16, bfloat16 and float64: save it so"
            )
        try:
            return self._read(name)
        except HFViTError:
            raise
        except Exception as error:  # archives, headers and pickles fail in many ways
            raise HFViTError(
                f"{self.path}: '{name}' cannot be read, the file is truncated or corrupt ({_first_line(error)})"
            ) from error

    def renamed(self, names: dict[str, str]) -> "TensorFile":
        """A view of the file with other names: `names` maps new names to present ones."""
        view = TensorFile(
            self.path,
            self.kind,
            {new: self.shapes[old] for new, old in names.items()},
            {new: self.dtypes[old] for new, old in names.items()},
            lambda name: self._read(names[name]),
            self.metadata,
        )
        view.assumptions, view.notes = self.assumptions, self.notes
        return view


def open_tensors(path: Path, state_dict_key: str | None = None) -> TensorFile:
    """Open a checkpoint file by its content, whatever its suffix.

    Args:
        state_dict_key: the entry of a `.pth` file with the weights; dots separate nested keys. By default the usual
            keys are tried, averages first.

    Raises:
        HFViTError: no such file, truncated, corrupt, pickled objects, or not a checkpoint.
    """
    if not path.is_file():
        raise HFViTError(f"{path}: no such file" if not path.exists() else f"{path}: not a regular file")
    try:
        if path.name.endswith(".index.json"):
            return _open_shards(path)
        with path.open("rb") as file:
            head = file.read(9)
        if head == LFS_POINTER[:9]:
            raise HFViTError(f"{path}: a Git LFS pointer, not the weights themselves: run `git lfs pull` in its clone")
        if head[:2] == b"PK":
            if path.suffix == ".npz" or _is_npz(path):
                return _open_npz(path)
            return _open_torch(path, state_dict_key)
        if len(head) == 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 100_000_000:
            return _open_safetensors(path)
        if head[:1] == b"\x80" and path.suffix != ".npz":
            return _open_torch(path, state_dict_key)
    except HFViTError:
        raise
    except OSError as error:
        raise HFViTError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # zipfile raises many kinds for a damaged directory
        raise HFViTError(f"{path}: truncated or corrupt, it is not a complete zip archive ({error})") from error
    if path.suffix in WEIGHT_SUFFIXES:
        what = "empty" if not head else "truncated, corrupt or not what its suffix says"
        raise HFViTError(f"{path}: {what}; download or copy it again")
    raise HFViTError(
        f"{path}: not a checkpoint; hf_vit reads .npz, .safetensors, .pth and .bin files and folders of them"
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _is_npz(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(".npy") for name in archive.namelist())


# -- npz --------------------------------------------------------------------------------------------------------------


def _open_npz(path: Path) -> TensorFile:
    archive = zipfile.ZipFile(path)
    shapes, dtypes = {}, {}
    for member in archive.namelist():
        if not member.endswith(".npy"):
            raise HFViTError(f"{path}: holds '{member}', which is no array; this is not an npz of weights")
        name = member.removesuffix(".npy")
        try:
            with archive.open(member) as stream:
                shape, dtype = _npy_header(stream)
                size = archive.getinfo(member).file_size - stream.tell()
        except zipfile.BadZipFile:
            raise
        except Exception as error:  # a header is Python source: errors of the tokenizer, the parser and zip
            raise HFViTError(f"{path}: '{member}' is truncated or corrupt ({_first_line(error)})") from error
        if dtype.hasobject:
            raise HFViTError(
                f"{path}: '{name}' is a pickled object array, which is never loaded "
                "because it can run code; save the file again with plain arrays only"
            )
        if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != size:
            raise HFViTError(f"{path}: '{name}' is truncated or corrupt: its header and its {size} bytes disagree")
        # V2 is bfloat16, which numpy does not have; all floats are read as float32
        is_float = (dtype.kind == "f" and dtype.itemsize in (2, 4, 8)) or dtype == np.dtype("V2")
        shapes[name], dtypes[name] = shape, "float32" if is_float else str(dtype)
    return TensorFile(path, "npz", shapes, dtypes, lambda name: _read_npy(archive, name))


def _npy_header(stream) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    return shape, dtype


def _read_npy(archive: zipfile.ZipFile, name: str) -> torch.Tensor:
    with archive.open(name + ".npy") as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        stream.read(1)  # zipfile checks the CRC at the end of the member
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


# -- safetensors ------------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> TensorFile:
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except Exception as error:
        raise HFViTError(f"{path}: truncated or corrupt safetensors file ({_first_line(error)})") from error
    known = {name: str(SAFETENSORS_FLOATS.get(kind, kind)).removeprefix("torch.") for name, kind in dtypes.items()}
    return TensorFile(path, "safetensors", shapes, known, file.get_tensor, file.metadata())


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def _open_torch(path: Path, state_dict_key: str | None) -> TensorFile:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                raise HFViTError(
                    f"{path}: a TorchScript archive, as OpenAI publishes CLIP: it holds code. Where you trust it, "
                    "save torch.jit.load(path).state_dict() and give that file"
                )
    try:
        # an open file, since for a path torch.load goes by the suffix, such as .safetensors
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE_OBJECTS), path.open("rb") as stream:
            warnings.simplefilter("ignore")
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HFViTError(
            f"{path}: holds Python objects besides tensors, or is corrupt; such files are never unpickled because "
            "they can run code. Save its state_dict alone, best as safetensors"
        ) from error
    except Exception as error:  # damaged pickles raise any kind
        raise HFViTError(f"{path}: truncated or corrupt PyTorch file ({_first_line(error)})") from error
    _warn_of_checksums(path)
    state, assumptions = _state_dict(path, content, state_dict_key)
    tensors = {
        name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    for name, tensor in tensors.items():
        if (problem := _not_plain(tensor, path)) is not None:
            raise HFViTError(f"{path}: '{name}' is {problem}: save the checkpoint with plain, dense tensors")
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    file = TensorFile(path, "torch", {n: tuple(t.shape) for n, t in tensors.items()}, dtypes, tensors.__getitem__)
    file.assumptions += assumptions
    if others := [str(name) for name in state if name not in tensors]:
        file.notes.append(f"not tensors, not used: {', '.join(others[:10])}")
    return file


def _warn_of_checksums(path: Path) -> None:
    """Warn of wrong checksums in the zip archive, which torch.load does not compare: values may be damaged."""
    if not zipfile.is_zipfile(path):  # pickles of torch before 1.6 have none
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        warnings.warn(
            f"{path}: the checksum of '{damaged}' is wrong: the file is damaged, or was written without checksums "
            "(torch.serialization.set_crc32_options(False))",
            stacklevel=2,
        )


def _state_dict(path: Path, content: Any, state_dict_key: str | None) -> tuple[dict, list[str]]:
    """The state dict in unpickled content, and as text which one was chosen."""
    if state_dict_key is not None:
        for part in state_dict_key.split("."):
            content = content.get(part) if isinstance(content, dict) else None
        if not _has_tensors(content):
            raise HFViTError(f"{path}: '{state_dict_key}' holds no state dict")
        return content, []
    for _ in range(4):  # levels, such as {"model": {"state_dict": {...}}}
        if _has_tensors(content):
            return content, []
        if not isinstance(content, dict):
            break
        candidates = [key for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)]
        filled = [key for key in candidates if _has_tensors(content[key])] or candidates
        if not filled:
            break
        key, others = filled[0], filled[1:]
        if others:
            kind = "the averaged weights" if key in AVERAGES else "the weights"
            text = f"{kind} '{key}', next to {', '.join(repr(other) for other in others)} (state_dict_key=)"
            return _state_dict(path, content[key], None)[0], [text]
        content = content[key]
    raise HFViTError(
        f"{path}: holds no state dict (names with tensors); known keys of one: {', '.join(STATE_DICT_KEYS)}"
    )


def _has_tensors(content: Any) -> bool:
    return isinstance(content, dict) and any(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    )


def _not_plain(tensor: torch.Tensor, path: Path) -> str | None:
    """The kind of a tensor that is not dense with its own values; None for a plain tensor."""
    if tensor.is_meta:
        return "without values (on the meta device)"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"of layout {tensor.layout}"
    if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), path.stat().st_size):
        return f"one small tensor expanded to {tensor.numel()} numbers"
    return None


def _open_shards(path: Path) -> TensorFile:
    where = read_settings(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise HFViTError(f"{path}: not an index of shards: it has no weight_map, or an empty one")
    shards: dict[str, TensorFile] = {}
    for shard in dict.fromkeys(where.values()):
        if not isinstance(shard, str) or Path(shard).name != shard or shard.endswith(".index.json"):
            raise HFViTError(f"{path}: names {shard!r} as a shard, which is no weight file next to it")
        shards[shard] = open_tensors(path.parent / shard)
    for name, shard in where.items():
        if name not in shards[shard]:
            raise HFViTError(f"{path}: says that '{name}' lies in {shard}, where it is not")
    return TensorFile(
        path,
        next(iter(shards.values())).kind,
        {name: shards[shard].shapes[name] for name, shard in where.items()},
        {name: shards[shard].dtypes[name] for name, shard in where.items()},
        lambda name: shards[where[name]].read(name),
    )


# -- folders ----------------------------------------------------------------------------------------------------------


def find_weights(folder: Path) -> Path:
    """The weight file of a folder: transformers' names first, otherwise the only checkpoint in it."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / "adapter_config.json").is_file():
        adapter = read_settings(folder / "adapter_config.json")
        kind = adapter.get("peft_type", "of unknown type")
        base = adapter.get("base_model_name_or_path") or "its base model"
        raise HFViTError(
            f"{folder}: a PEFT adapter ({kind}) without the model: load {base}, "
            "put the adapter on it with peft.PeftModel.from_pretrained, and save what merge_and_unload() gives"
        )
    try:
        others = [p for p in sorted(folder.iterdir()) if p.suffix in WEIGHT_SUFFIXES and p.is_file()]
    except OSError as error:
        raise HFViTError(f"{folder}: cannot be read ({error.strerror})") from error
    if len(others) == 1:
        return others[0]
    if others:
        raise HFViTError(
            f"{folder}: holds {len(others)} checkpoints, name one of them: {', '.join(p.name for p in others[:20])}"
        )
    raise HFViTError(f"{folder}: holds no weights ({', '.join(WEIGHT_FILES)} or an .npz)")
