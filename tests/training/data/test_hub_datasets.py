"""Data sets by their Hub id, over HTTP: map-style and streamed, parquet and tar shards, with a cache that is empty.

One subprocess asks all questions of a Hub on this machine (hub_server.py), because huggingface_hub and `datasets` read
HF_ENDPOINT when they are imported.

pytest tests/training/data/test_hub_datasets.py
"""

import hashlib
import io
import json
import re
import subprocess
import sys

import datasets
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.helpers.hub_server import HubServer, Repository
from tests.helpers.streams import CLASSES, encoded, tar_bytes


QUESTIONS = """
import hashlib, json, os, sys
from pathlib import Path

from hf_vit.errors import HFViTError
from training.data.dataset import open_dataset
from training.data.shards.streaming import open_stream


def digest(data):
    return hashlib.sha256(data).hexdigest()


def told(data):
    rows = [data.read(index) for index in range(len(data))]
    return data.label_names, [(digest(image.tobytes()), label) for image, label, _ in rows]


def streamed(data):
    records = [record for batch in data.order(5, seed=0, position=0, stop=10) for record in batch]
    copies = [path.name for path in Path(os.environ["HF_HOME"]).rglob("*") if path.suffix in (".arrow", ".parquet")]
    return data.label_names, sorted((record.index, digest(record.data), record.label) for record in records), copies


for reader, tell, name, split, config_name in json.loads(sys.argv[1]):
    try:
        answer = globals()[tell](globals()[reader](name, split=split, config_name=config_name))
    except HFViTError as error:
        answer = str(error)
    print("answer", json.dumps(answer), flush=True)
"""

MAP, STREAM = ("open_dataset", "told"), ("open_stream", "streamed")
ASKED = {
    "stream": (*STREAM, "alice/images", "train", None),
    "stream of shards": (*STREAM, "alice/shards", "train", None),
    "map": (*MAP, "alice/images", "train", None),
    "test": (*MAP, "alice/images", "test[:50%]", None),
    "shards": (*MAP, "alice/shards", "train", None),
    "no split": (*MAP, "alice/images", "holdout", None),
    "configuration": (*MAP, "alice/two", "train", None),
    "another configuration": (*MAP, "alice/two", "train", "c"),
    "nothing": (*MAP, "alice/nothing", "train", None),
    "nothing to stream": (*STREAM, "alice/nothing", "train", None),
    "gated": (*MAP, "alice/gated", "train", None),
    "gated stream": (*STREAM, "alice/gated", "train", None),
    "empty": (*MAP, "alice/empty", "train", None),
}


def table(first, count):
    """A parquet file of images `first` on, three to a row group."""
    columns = {
        "image": [{"bytes": encoded(n), "path": None} for n in range(first, first + count)],
        "label": [n % 2 for n in range(first, first + count)],
        "note": ["unread"] * count,
    }
    data = io.BytesIO()
    datasets.Dataset.from_dict(columns, features=datasets.Features(CLASSES)).to_parquet(data, batch_size=3)
    return data.getvalue()


def repository(files, **options):
    return Repository(commits={"0" * 40: files}, **options)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the Hub's data sets gave, by name of the question."""
    home = tmp_path_factory.mktemp("home")
    shard = tar_bytes([(f"{n:03d}", {"png": encoded(n), "cls": str(n % 2).encode()}) for n in range(10)])
    two = b"---\nconfigs:\n- config_name: a\n  data_files: a/*\n- config_name: b\n  data_files: b/*\n---\n"
    with HubServer(users={}) as hub:
        hub.repositories = {
            "datasets/alice/images": repository(
                {"data/train-0.parquet": table(0, 6), "data/train-1.parquet": table(6, 4),
                 "data/test-0.parquet": table(10, 4)}
            ),
            "datasets/alice/shards": repository({"train-0.tar": shard}),
            "datasets/alice/two": repository({"README.md": two, "a/0.parquet": b"", "b/0.parquet": b""}),
            "datasets/alice/gated": repository({"data/train-0.parquet": table(0, 2)}, gated=True),
            "datasets/alice/empty": repository({}),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", QUESTIONS, json.dumps(list(ASKED.values()))],
            cwd=ROOT, env=hub.environment(home) | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        given = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("answer ")]
        return dict(zip(ASKED, given, strict=True))


def pixels(n):
    """Digest of an image's pixels."""
    return hashlib.sha256(Image.open(io.BytesIO(encoded(n))).tobytes()).hexdigest()


def test_a_hub_id_opens_as_a_data_set(answers):
    assert answers["map"] == [["b", "a"], [[pixels(n), n % 2] for n in range(10)]]
    assert answers["test"] == [["b", "a"], [[pixels(n), n % 2] for n in (10, 11)]]
    assert answers["shards"] == [["0", "1"], [[pixels(n), n % 2] for n in range(10)]]


@pytest.mark.parametrize("stored, names", [("stream", ["b", "a"]), ("stream of shards", ["0", "1"])])
def test_a_hub_id_streams_without_a_copy(answers, stored, names):
    rows = [[n, hashlib.sha256(encoded(n)).hexdigest(), n % 2] for n in range(10)]
    assert answers[stored] == [names, rows, []]


@pytest.mark.parametrize(
    "asked, words",
    [
        ("no split", "'alice/images' has no split 'holdout'; available: train, test"),
        ("configuration", r"available configs: \['a', 'b'\].*; choose one with --dataset_config_name"),
        ("another configuration", r"'c' not found. Available: \['a', 'b'\]\); choose one with --dataset_config_name"),
        ("nothing", "neither a local path nor a dataset on the Hub; check the name, or run `hf auth login`"),
        ("nothing to stream", "neither a local path nor a dataset on the Hub; check the name, or run `hf auth login`"),
        ("gated", "gated dataset on the Hub.*; accept its terms on its page and run `hf auth login`"),
        ("gated stream", "gated dataset on the Hub.*; accept its terms on its page and run `hf auth login`"),
        ("empty", "'alice/empty' is on the Hub, but holds no data .*; choose another"),
    ],
)
def test_ids_that_cannot_be_opened_are_one_line(answers, asked, words):
    assert re.search(words, answers[asked]) and "\n" not in answers[asked]
