"""Records of streams: encoded images, shards, and the features of a data set of the Hub."""

import io
import tarfile

import datasets
import numpy as np
from PIL import Image


CLASSES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"]), "note": datasets.Value("string")}


def encoded(seed):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_bytes(records):
    """A shard of [(key, {kind: bytes})]."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, members in records:
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
