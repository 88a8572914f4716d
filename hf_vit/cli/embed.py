"""`hf-vit embed IMAGES --model M --out FILE`: feature vectors of images, for search, clustering or a probe.

Tests: tests/hf_vit/cli/test_cli.py.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..atomic_file import atomic_path
from ..errors import HFViTError
from ..image_io import printable
from ..modeling.configuration_hf_vit import HFViTConfig
from ..transformers_classifiers import classifier_features, num_channels
from .inputs import add_table_arguments, find_images, open_model, positive
from .predict import counted, prepared_batches
from .scores_file import NEEDS_PYARROW


EXAMPLES = """\
  hf-vit embed images/ --model owner/name --out features.parquet
  hf-vit embed images/ --model path/to/model --out features.npz --features mean"""
FEATURES = ("pooled", "class", "mean")
SUFFIXES = (".parquet", ".npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, all but `--json`."""
    parser.add_argument(
        "images", nargs="+", help="files, folders (searched through), glob patterns, addresses, tables of these"
    )
    parser.add_argument("--model", required=True, help="folder, Hub id or checkpoint file; a head is not needed")
    add_table_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="features.parquet or features.npz")
    parser.add_argument(
        "--features", choices=FEATURES, default="pooled",
        help="what a classifier reads (pooled, the default), the class token, or the mean of the patch tokens",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="images at a time (default 16)")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="one number, or height and width")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Compute and write features, and list unreadable images; returns 1 if there are any."""
    if Path(arguments.out).suffix not in SUFFIXES:
        raise HFViTError(f"--out {arguments.out}: write to a file that ends in {' or '.join(SUFFIXES)}")
    paths = find_images(arguments.images, True, arguments.image_column, arguments.image_root)
    model, processor = open_model(arguments.model, arguments, len(paths), classes=False)
    weights = fingerprint(model, processor)
    embedded, features, unreadable = embed(model, processor, paths, arguments.features, arguments.batch_size)
    if not embedded:
        raise HFViTError(f"none of {counted(len(paths), 'image')} could be read: {unreadable[0]['reason']}")
    about = {"model": str(arguments.model), "features": arguments.features, "weights": weights}
    write_features(Path(arguments.out), embedded, features, about)
    if arguments.json:
        print(json.dumps({**about, "out": arguments.out, "images": len(embedded), "width": features.shape[1]}))
    else:
        print(f"{arguments.out}: {counted(len(embedded), 'image')}, {features.shape[1]} numbers each")
    for row in unreadable:
        print(f"could not be read: {row['image']}: {row['reason']}", file=sys.stderr)
    return 1 if unreadable else 0


def fingerprint(model: Any, processor: Any) -> str:
    """A hash of all that features depend on: weights and the image processor's settings, not their location."""
    digest = hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode())
    encoder = model.encoder if isinstance(model.config, HFViTConfig) else model
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def embed(
    model: Any, processor: Any, paths: Sequence[Any], kind: str, batch_size: int
) -> tuple[list[str], np.ndarray, list[dict[str, str]]]:
    """Names of the readable images, their features float32 (N, D), and the unreadable ones with the reason."""
    ours = isinstance(model.config, HFViTConfig)
    if not ours and kind != "pooled":
        raise HFViTError(f"{type(model).__name__} has no {kind} features of hf_vit's ViTs: take --features pooled")
    encoder = model.encoder if ours else model
    if kind == "class" and not encoder.config.use_class_token:
        raise HFViTError("this model has no class token: take --features pooled or mean")
    device = next(model.parameters()).device
    names: list[str] = []
    rows: list[np.ndarray] = []
    unreadable: list[dict[str, str]] = []
    with tqdm(total=len(paths), unit=" images", disable=None) as bar:
        for batch, pixels in prepared_batches(paths, processor, num_channels(encoder.config), batch_size, unreadable):
            with torch.inference_mode():
                rows.append(features_of(encoder, pixels.to(device, model.dtype), kind).float().cpu().numpy())
            names += [printable(path) for path in batch]
            bar.update(len(batch))
    return names, np.concatenate(rows) if rows else np.empty((0, 0), np.float32), unreadable


def features_of(encoder: PreTrainedModel, pixels: torch.Tensor, kind: str) -> torch.Tensor:
    """Features of one of `FEATURES`, `(B, C, H, W)` -> `(B, D)`; of other classifiers the input of the last layer."""
    if not isinstance(encoder.config, HFViTConfig):
        return classifier_features(encoder, pixels)
    outputs = encoder(pixels)
    if kind == "pooled":
        return outputs.pooler_output
    if kind == "class":
        return outputs.last_hidden_state[:, 0]
    return outputs.last_hidden_state[:, encoder.config.num_prefix_tokens :].mean(dim=1)


def write_features(path: Path, names: list[str], features: np.ndarray, about: dict[str, str]) -> None:
    """Write columns `image` and `features` (a vector per row); model and kind of features go into the metadata."""
    if path.suffix == ".npz":
        with atomic_path(path) as temporary:
            np.savez(temporary, image=np.array(names), features=features, about=np.array(json.dumps(about)))
        return
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise HFViTError(f"{NEEDS_PYARROW.split(',')[0]}, or write .npz") from None
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    table = pa.table({"image": pa.array(names), "features": vectors})
    with atomic_path(path) as temporary:
        parquet.write_table(table.replace_schema_metadata({"hf_vit": json.dumps(about)}), temporary)


def read_features(path: Path) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """Read a file of `write_features`: names, features (N, D) and metadata.

    Raises:
        HFViTError: no such file, or not one of `write_features`.
    """
    if not path.is_file():
        raise HFViTError(f"no file {path}: make it with hf-vit embed IMAGES --model MODEL --out {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path) as content:
                return content["image"].tolist(), content["features"], json.loads(str(content["about"]))
        from pyarrow import parquet

        table = parquet.read_table(path)
        about = json.loads((table.schema.metadata or {})[b"hf_vit"])
        vectors = table["features"].combine_chunks()
        return table["image"].to_pylist(), vectors.flatten().to_numpy().reshape(len(table), -1), about
    except ImportError:
        raise HFViTError(NEEDS_PYARROW.split(",")[0]) from None
    except (KeyError, ValueError, OSError):
        raise HFViTError(
            f"{path} is not a file of hf-vit embed: make it with hf-vit embed IMAGES --model MODEL --out {path}"
        ) from None
