"""Damaged and odd checkpoint files, from a seed, through `load_checkpoint`: what becomes of each.

    python -m tests.fuzz.checkpoint_files [--count 2000] [--seed 0]

A file may load with exactly the original's weights, load with a warning, or be refused by one `HFViTError` line. It
must never load other weights in silence, end in another exception, or take longer than `SECONDS` of processor time.
"""

import io
import json
import struct
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hf_vit import HFViTConfig, HFViTError, HFViTForImageClassification
from hf_vit.checkpoints import load_checkpoint, save_checkpoint
from tests.fuzz.command import report
from tests.fuzz.time_limit import Hang, start_clock, stop_clock


SECONDS = 20  # far above what a file of some kilobytes takes
Rng = np.random.Generator


def originals(folder: Path) -> HFViTForImageClassification:
    """A small model, as `x.npz`, `x.safetensors` and `x.pth` in a folder."""
    torch.manual_seed(0)
    config = HFViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, patch_size=4, image_size=8,
        num_labels=3, hidden_act="gelu", layer_norm_eps=1e-6,
    )  # fmt: skip
    model = HFViTForImageClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    save_checkpoint(model, folder / "x.npz", format="google-npz")
    save_checkpoint(model, folder / "timm.safetensors", format="timm")
    tensors = load_file(folder / "timm.safetensors")  # without the header that says all fields
    save_file(tensors, folder / "x.safetensors")
    torch.save({"model": tensors, "epoch": 3}, folder / "x.pth")
    torch.save(tensors, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return model


# -- mutations: (rng, content) -> content -----------------------------------------------------------------------------


def truncate(rng: Rng, content: bytes) -> bytes:
    return content[: int(rng.integers(0, len(content)))]


def flip_anywhere(rng: Rng, content: bytes) -> bytes:
    changed = bytearray(content)
    for position in rng.integers(0, len(content), int(rng.integers(1, 8))):
        changed[position] = int(rng.integers(0, 256))
    return bytes(changed)


def cut_out(rng: Rng, content: bytes) -> bytes:
    start = int(rng.integers(0, len(content)))
    return content[:start] + content[start + int(rng.integers(1, 64)) :]


def insert(rng: Rng, content: bytes) -> bytes:
    start = int(rng.integers(0, len(content)))
    return content[:start] + rng.bytes(int(rng.integers(1, 64))) + content[start:]


def few_bytes(rng: Rng, content: bytes) -> bytes:
    return rng.bytes(int(rng.integers(0, 16)))


def odd_array(rng: Rng) -> np.ndarray:
    kind = rng.choice(["int64", "bool", "uint8", "complex64", "U3", "float16", "float64", "S2", "datetime64[s]"])
    shape = tuple(int(side) for side in rng.integers(0, 5, int(rng.integers(0, 5))))
    return np.zeros(shape, kind)


def npz_members(rng: Rng, content: bytes) -> bytes:
    """Members dropped, renamed, doubled, of another kind, with a damaged header, compressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = str(rng.choice(sorted(members)))
    array = io.BytesIO()
    np.lib.format.write_array(array, odd_array(rng), allow_pickle=False)
    huge = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 7), }"
    structured = b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }"
    header = rng.choice([huge, huge[:40], structured, b"(" * 200])
    header = bytes(header) + b" " * 20 + b"\n"
    choices: list[Callable[[], object]] = [
        lambda: members.pop(name),
        lambda: members.update({name: array.getvalue()}),
        lambda: members.update({name + "x": members.pop(name)}),
        lambda: members.update({"extra.npy": array.getvalue()}),
        lambda: members.update({"notes.txt": b"x"}),
        lambda: members.update({name: b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)}),
        lambda: members.update({name: members[name][: int(rng.integers(0, len(members[name])))]}),
        lambda: members.update({name: members[name] + bytes(8)}),
    ]
    choices[int(rng.integers(len(choices)))]()
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.3 else zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return written.getvalue()


def safetensors_header(rng: Rng, content: bytes) -> bytes:
    """An entry of the JSON header dropped, renamed, of another dtype, shape or offsets; a header of another length."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = str(rng.choice(sorted(header.keys() - {"__metadata__"})))
    entry = header[name]
    choices: list[Callable[[], object]] = [
        lambda: header.pop(name),
        lambda: header.update({name + "x": header.pop(name)}),
        lambda: entry.update(dtype=str(rng.choice(["I8", "BOOL", "F8_E4M3", "C64", "F16", "F64", "I64", "XX", "F4"]))),
        lambda: entry.update(shape=[int(side) for side in rng.integers(-2, 60, int(rng.integers(0, 5)))]),
        lambda: entry.update(shape=[10**6, 10**6]),
        lambda: entry.update(shape="a"),
        lambda: entry.update(data_offsets=[0, int(rng.integers(0, 10**9))]),
        lambda: entry.update(data_offsets=[-1, 5]),
        lambda: header.update(
            {"__metadata__": {"hf_vit_config": str(rng.choice(["{}", "[]", "x", '{"fields": 3}']))}}
        ),
        lambda: header.update({"__metadata__": 3}),
        lambda: header.clear(),
    ]
    choices[int(rng.integers(len(choices)))]()
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.9 else int(rng.integers(0, 2**62))
    return struct.pack("<Q", length) + text + data


def pth_content(rng: Rng, content: bytes) -> bytes:
    """Tensors of other kinds, names that are no text, objects, other nesting."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    tensors = dict(state["model"])
    name = str(rng.choice(sorted(tensors)))
    value = tensors[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replacements: list[Callable[[], object]] = [
            lambda: value.to_sparse(),
            lambda: value.to("meta"),
            lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
            lambda: value.to(torch.int8),
            lambda: value.bool(),
            lambda: value.to(torch.complex64),
            lambda: value.to(torch.float8_e5m2),
            lambda: value.half(),
            lambda: value.double(),
            lambda: torch.ones(1).expand(10**6, 10**6),
            lambda: value[..., :-1],
            lambda: value[None],
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            lambda: value.flatten(),
            lambda: 3.5,
            lambda: None,
            lambda: np.float32(2),
            lambda: [value],
            lambda: value * float("nan"),
        ]
        tensors[name] = replacements[int(rng.integers(len(replacements)))]()  # type: ignore[assignment]
    wrappings: list[Callable[[], object]] = [
        lambda: tensors,
        lambda: {"state_dict": tensors},
        lambda: {0: tensors},
        lambda: {"model": {"model": {"model": {"model": {"model": tensors}}}}},
        lambda: dict(enumerate(tensors.values())),
        lambda: list(tensors.values()),
        lambda: {"module." + key: tensor for key, tensor in tensors.items()},
        lambda: {("student." if index % 2 else "teacher.") + key: t for index, (key, t) in enumerate(tensors.items())},
    ]
    written = io.BytesIO()
    torch.save(wrappings[int(rng.integers(len(wrappings))) if rng.random() < 0.5 else 0](), written)
    return written.getvalue()


BYTES = (truncate, flip_anywhere, cut_out, insert, few_bytes)
MUTATIONS: dict[str, tuple[Callable[[Rng, bytes], bytes], ...]] = {
    "x.npz": (*BYTES, npz_members, npz_members, npz_members),
    # a number changed in the data of a safetensors file or an old pickle shows nowhere: no bytes are flipped there
    "x.safetensors": (truncate, few_bytes, *(safetensors_header,) * 6),
    "x.pth": (*BYTES, *(pth_content,) * 5),
    "legacy.pth": (truncate, few_bytes),
}


# -- outcomes ---------------------------------------------------------------------------------------------------------


def outcome(path: Path, original: dict[str, torch.Tensor]) -> str:
    """`right`, `warned`, `refused`, or what must not be: `silently wrong`, `hang`, the name of another exception."""

    start_clock(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            known = {} if path.suffix == ".npz" else {"num_attention_heads": 2, "hidden_act": "gelu"}
            loaded = load_checkpoint(path, **known).state_dict()
    except HFViTError as error:
        return "refused" if "\n  " in str(error) or "\n" not in str(error) else "more than one line"
    except Hang:
        return "hang"
    except Exception as error:
        return type(error).__name__
    finally:
        stop_clock()
    if loaded.keys() == original.keys() and all(torch.equal(loaded[n].float(), original[n]) for n in original):
        return "right"
    if any("checksum" in str(w.message) or "NaN" in str(w.message) for w in caught):
        return "warned"
    # without a head, or with a tensor of lower precision, it is another model and shows it
    smaller = original.keys() - loaded.keys() <= {"classifier.weight", "classifier.bias"}
    close = smaller and all(torch.allclose(loaded[n].float(), original[n], rtol=1e-2, atol=1e-2) for n in loaded)
    return "right" if close else "silently wrong"


def run(count: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Outcomes of `count` files, and a line for each that must not be."""
    outcomes: Counter = Counter()
    bad = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = originals(folder).state_dict()
        contents = {file: (folder / file).read_bytes() for file in MUTATIONS}
        kinds = sorted(MUTATIONS)
        for index in range(count):
            rng = np.random.default_rng([seed, index])
            file = kinds[index % len(kinds)]
            mutate = MUTATIONS[file][int(rng.integers(len(MUTATIONS[file])))]
            path = folder / f"mutant{Path(file).suffix}"
            path.write_bytes(mutate(rng, contents[file]))
            result = outcome(path, original)
            outcomes[f"{Path(file).suffix} {result}"] += 1
            if result not in ("right", "warned", "refused"):
                bad.append(f"seed {seed}, file {index}: {file}, {mutate.__name__}: {result}")
    return outcomes, bad


if __name__ == "__main__":
    report(__doc__, run, count=2000, seed=0)
