"""Streams: every record once per epoch over all processes, the place restored exactly, workers without influence."""

import io
import itertools
from dataclasses import dataclass, replace

import datasets
import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_vit.errors import HFViTError
from tests.helpers.streams import CLASSES, encoded, tar_bytes
from training.data.dataset import collate, open_dataset
from training.data.shards.chunks import RUN_LENGTH, default_run_length
from training.data.shards.shard_files import expand_braces, expand_shards
from training.data.shards.streaming import BUFFER_SIZE, ImageStream, open_stream
from training.data.transforms import EvalTransform, TrainTransform


@dataclass(frozen=True)
class Numbers:
    """Chunks of which record n has label n; counts what is read."""

    sizes: np.ndarray
    label_names: tuple = ("a", "b")
    fingerprint: str = "numbers"

    def read(self, chunk):
        first = int(self.sizes[:chunk].sum())
        return [(b"", first + row, f"{chunk}/{row}") for row in range(self.sizes[chunk])]


def stream_of(sizes, window=7, fraction=1.0):
    return ImageStream(Numbers(np.array(sizes, dtype=np.int64)), "numbers", "train", fraction, buffer_size=window)


sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda sizes: sum(size > 0 for size in sizes) >= 4)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, world_size=st.integers(1, 4), seed=st.integers(0, 2**63), window=st.integers(1, 30))
def test_every_record_once_per_epoch_over_all_processes(sizes, world_size, seed, window):
    stream = stream_of(sizes, window)
    epochs = {}
    for rank in range(world_size):
        order = stream.order(1, seed=seed, position=0, stop=10**9, rank=rank, world_size=world_size)
        lane_sizes = [int(stream.sizes[order.lane(epoch)].sum()) for epoch in range(3)]
        for record in itertools.islice(order.records(0), sum(lane_sizes)):
            epochs.setdefault(record.epoch, []).append(record.index)
    assert sorted(epochs) == [0, 1, 2]
    for seen in epochs.values():
        assert sorted(seen) == list(range(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes, world_size=st.integers(1, 3), batch_size=st.integers(1, 5), done=st.integers(0, 30),
    fraction=st.sampled_from([1.0, 0.7]),
)  # fmt: skip
def test_the_position_alone_restores_the_stream(sizes, world_size, batch_size, done, fraction):
    stream = stream_of([size + 8 for size in sizes], fraction=fraction)
    stride = batch_size * world_size
    stop = 40 * stride
    for rank in range(world_size):
        common = {"batch_size": batch_size, "seed": 5, "stop": stop, "rank": rank, "world_size": world_size}
        whole = list(stream.order(position=0, **common))
        rest = list(stream.order(position=done * stride, **common))
        assert len(whole) == 40 and whole[done:] == rest


@settings(max_examples=30, deadline=None)
@given(sizes=sizes, shares=st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0)))
def test_fractions_of_a_stream_are_nested(sizes, shares):
    small, large = (stream_of(sizes, fraction=share) for share in sorted(shares))

    def records(stream):
        return {record.index for chunk in range(len(sizes)) for record in stream.read(chunk, 0)}

    assert records(small) <= records(large) <= set(range(sum(sizes)))
    assert len(records(large)) == len(large)


def neighbors(labels, run_length=None):
    """Classes and shards of 100 records among 1,024 that a stream of such labels draws one after another, mean."""
    run_length = run_length or default_run_length(labels)
    first = np.arange(0, len(labels), run_length)
    stream = stream_of(np.diff(first, append=len(labels)), window=BUFFER_SIZE)
    order = np.concatenate([first[chunk] + np.arange(run_length) for chunk in lane_of(stream)])
    return found_in(labels, order)


def lane_of(stream):
    return stream.order(1, seed=0, position=0, stop=1).lane(0)


def found_in(labels, order):
    parts = order[: 10 * 1024].reshape(10, 1024)
    return [
        np.mean([len(np.unique(values[part])) for part in parts]) for values in (labels, np.arange(len(labels)) // 100)
    ]


def test_neighbors_are_of_as_many_classes_and_shards_as_in_a_map_style_order():
    """1,000 classes, 100 images of each, in shards that are sorted by class, and in shards that are not."""
    in_turn = np.repeat(np.arange(1000), 100)
    mixed = np.random.default_rng(0).permutation(in_turn)
    drawn = np.random.default_rng(1).permutation(100_000)
    assert default_run_length(in_turn) == 1 and default_run_length(mixed) == RUN_LENGTH
    assert default_run_length(np.arange(100_000) % 1000) == RUN_LENGTH and default_run_length(np.zeros(1, int)) > 0
    classes, shards = neighbors(in_turn)
    best_classes, best_shards = found_in(in_turn, drawn)
    assert classes > 0.97 * best_classes and shards > 0.97 * best_shards
    assert neighbors(mixed)[0] > 0.97 * best_classes
    assert neighbors(in_turn, 256)[0] < 0.1 * best_classes  # what a long run makes of sorted shards


def loss_curve(inputs, labels, order):
    """The loss of a small network on a twentieth of the images, after every fifth of its steps."""
    inputs, labels, watched = torch.from_numpy(inputs), torch.from_numpy(labels), torch.arange(0, len(labels), 20)
    seeded = torch.Generator().manual_seed(0)
    first = (torch.randn(16, 64, generator=seeded) / 4).requires_grad_()
    second = (torch.randn(64, int(labels.max()) + 1, generator=seeded) / 20).requires_grad_()

    def loss(rows):
        return torch.nn.functional.cross_entropy(torch.relu(inputs[rows] @ first) @ second, labels[rows])

    optimizer, curve = torch.optim.AdamW([first, second], lr=5e-3), []
    for number, rows in enumerate(torch.from_numpy(order.reshape(-1, 64))):
        optimizer.zero_grad()
        loss(rows).backward()
        optimizer.step()
        if number % 5 == 4:
            with torch.no_grad():
                curve.append(float(loss(watched)))
    return np.array(curve)


def test_sorted_shards_train_as_a_folder_does():
    """50 sorted classes; the buffer holds as many images of each as the default does of a thousand classes."""
    labels = np.repeat(np.arange(50), 200)
    random = np.random.default_rng(0)
    inputs = (random.normal(size=(50, 16))[labels] + random.normal(size=(len(labels), 16))).astype(np.float32)
    count = 2 * 64 * 100

    def streamed(run_length):
        first = np.arange(0, len(labels), run_length)
        stream = stream_of(np.diff(first, append=len(labels)), window=BUFFER_SIZE * 50 // 1000)
        order = stream.order(1, seed=0, position=0, stop=10**9)
        return np.array([record.index for record in itertools.islice(order.records(0), count)])

    folder = np.concatenate([random.permutation(len(labels)) for _ in range(2)])[:count]
    expected = loss_curve(inputs, labels, folder)
    for half in (slice(None, 20), slice(20, None)):
        as_folder = expected[half].mean()
        assert loss_curve(inputs, labels, streamed(default_run_length(labels)))[half].mean() < 1.05 * as_folder
        assert loss_curve(inputs, labels, streamed(256))[half].mean() > 2 * as_folder


def test_sorted_shards_are_read_one_by_one_and_it_is_said(tmp_path):
    for shard in range(2):
        records = [(f"{n:03d}", {"cls": str(n // 10 + 2 * shard).encode(), "png": encoded(n)}) for n in range(20)]
        (tmp_path / f"train-{shard}.tar").write_bytes(tar_bytes(records))
    log = []
    stream = open_stream(str(tmp_path), split="train", cache_dir=tmp_path / "cache", log=log.append)
    assert len(stream.sizes) == 40 and len(log) == 1 and "sorted by class: images are read one by one" in log[0]
    stream = open_stream(str(tmp_path), split="train", cache_dir=tmp_path / "cache", log=log.append, run_length=5)
    assert len(stream.sizes) == 8 and len(log) == 1


def test_any_number_of_readers_reads_the_same():
    orders = []
    for threads in (1, 3, 16):
        stream = replace(stream_of([3, 1, 4, 1, 5, 9, 2, 6], window=12), read_threads=threads)
        orders.append(list(itertools.islice(stream.order(1, seed=1, position=0, stop=1).records(5), 60)))
    assert orders[0] == orders[1] == orders[2]


def test_epochs_and_seeds_have_their_own_order():
    stream = stream_of([10] * 20, window=50)

    def epoch(number, seed):
        records = itertools.islice(stream.order(1, seed=seed, position=0, stop=1).records(200 * number), 200)
        return [record.index for record in records]

    orders = [epoch(0, 0), epoch(1, 0), epoch(0, 1)]
    assert all(sorted(order) == list(range(200)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    neighbors = np.abs(np.diff(orders[0])) == 1
    assert neighbors.mean() < 0.2  # shuffled inside the windows too


def test_resuming_reads_no_more_than_the_open_window(monkeypatch):
    read = []
    original = Numbers.read
    monkeypatch.setattr(Numbers, "read", lambda self, chunk: read.append(chunk) or original(self, chunk))
    stream = stream_of([10] * 100, window=20)
    next(iter(stream.order(4, seed=0, position=904, stop=10**6)))
    assert len(read) <= 4  # this window and the next


def test_more_processes_than_chunks_are_refused():
    with pytest.raises(HFViTError, match=r"has 2 chunks .* for 3 processes"):
        stream_of([5, 0, 5]).order(1, seed=0, position=0, stop=9, rank=0, world_size=3)
    with pytest.raises(HFViTError, match="at image 3 cannot go on with 2"):
        stream_of([5, 5, 5]).order(1, seed=0, position=3, stop=9, rank=0, world_size=2)


# Files


@pytest.fixture
def shards(tmp_path):
    """Three shards of 5, 4 and 6 records in three classes; labels in .cls and .json."""
    number = 0
    for shard, count in enumerate((5, 4, 6)):
        records = []
        for _ in range(count):
            label = {"cls": str(number % 3).encode()} if number % 2 else {"json": b'{"label": %d}' % (number % 3)}
            records.append((f"set/{number:05d}", {**label, "png": encoded(number)}))
            number += 1
        (tmp_path / f"train-{shard:03d}.tar").write_bytes(tar_bytes(records))
    return tmp_path


def test_shards_as_a_data_set_and_as_a_stream(shards):
    for name in (str(shards), f"{shards}/train-{{000..002}}.tar", f"{shards}/train-*.tar"):
        dataset = open_dataset(name, split="train", cache_dir=shards / "cache")
        assert dataset.labels.tolist() == [number % 3 for number in range(15)]
        for index in (0, 7, 14):
            image, _, _ = dataset.read(index)
            np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(encoded(index)))))
        stream = open_stream(name, split="train", cache_dir=shards / "cache", run_length=2)
        assert len(stream.sizes) == 8
        assert len(stream) == 15 and stream.label_names == dataset.label_names == ["0", "1", "2"]
        records = [record for batch in stream.order(5, seed=0, position=0, stop=15) for record in batch]
        assert sorted(record.index for record in records) == list(range(15))
        for record in records:
            assert record.data == encoded(record.index) and record.label == record.index % 3


def test_workers_change_nothing_in_a_stream(shards):
    stream = open_stream(str(shards), split="train", cache_dir=shards / "cache", buffer_size=4)
    stream = stream.with_transform(TrainTransform(8), seed=3)
    runs = []
    for workers in (0, 1, 2):
        order = stream.order(4, seed=1, position=0, stop=48)
        loader = torch.utils.data.DataLoader(stream, batch_sampler=order, collate_fn=collate, num_workers=workers)
        runs.append([(batch["pixel_values"], batch["index"]) for batch in loader])
    assert len(runs[0]) == 12
    for run in runs[1:]:
        for (pixels, index), (other_pixels, other_index) in zip(runs[0], run):
            assert torch.equal(pixels, other_pixels) and torch.equal(index, other_index)


def test_a_stream_gives_the_items_of_the_data_set(shards):
    transform = TrainTransform(8)
    dataset = open_dataset(str(shards), split="train", cache_dir=shards / "cache").with_transform(transform, seed=3)
    stream = open_stream(str(shards), split="train", cache_dir=shards / "cache").with_transform(transform, seed=3)
    for batch in stream.order(5, seed=1, position=0, stop=30):
        for record in batch:
            item, twin = stream[record], dataset[record.epoch, record.index]
            assert torch.equal(item["pixel_values"], twin["pixel_values"]) and item["labels"] == twin["labels"]


def test_shards_in_another_file_system(shards):
    files = fsspec.filesystem("memory")
    for shard in range(3):
        files.pipe(f"/elsewhere/train-{shard:03d}.tar", (shards / f"train-{shard:03d}.tar").read_bytes())
    name = "memory://elsewhere/train-{000..002}.tar"
    stream = open_stream(name, split="train", cache_dir=shards / "cache")
    records = next(iter(stream.order(15, seed=0, position=0, stop=15)))
    assert {record.data for record in records} == {encoded(number) for number in range(15)}
    with pytest.raises(HFViTError, match="lies elsewhere; stream it"):
        open_dataset(name, split="train")
    with pytest.raises(HFViTError, match="cannot reach the shard 'memory://elsewhere/train-009"):
        open_stream("memory://elsewhere/train-009.tar", split="train", cache_dir=shards / "cache")


def test_replaced_shards_are_indexed_again(shards):
    assert len(open_dataset(str(shards), split="train", cache_dir=shards / "cache")) == 15
    record = {"cls": b"0", "png": encoded(0)}, {"cls": b"1", "png": encoded(1)}
    (shards / "train-000.tar").write_bytes(tar_bytes([("a", record[0]), ("b", record[1])]))
    assert len(open_dataset(str(shards), split="train", cache_dir=shards / "cache")) == 12


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([("a", {"png": b"x"})], r"record 'a' of the shard .* has no label"),
        ([("a", {"cls": b"1"})], r"record 'a' of the shard .* has no image"),
        ([("a", {"png": b"x", "cls": b"-1"})], r"no label \(-1"),
        ([("a", {"png": b"x", "json": b"{oh"})], r"the .json of record 'a' of the shard .* is not JSON"),
        ([("a", {"png": b"x", "json": b"[1]"})], r'holds no object with a "label"'),
        ([("a", {"png": b"x", "cls": b"caf\xe9"})], r"the .cls of record 'a' of the shard .* is not UTF-8"),
        ([], "no images in 1 shards"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, records, message):
    (tmp_path / "train.tar").write_bytes(tar_bytes(records))
    with pytest.raises(HFViTError, match=message):
        open_dataset(str(tmp_path / "train.tar"), split="train", cache_dir=tmp_path / "cache")


def test_files_that_are_no_shards(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"nonsense" * 200)
    with pytest.raises(HFViTError, match="as a plain tar file"):
        open_dataset(str(tmp_path / "train.tar"), split="train", cache_dir=tmp_path / "cache")
    with pytest.raises(HFViTError, match=r"no shard .*train-001"):
        open_stream(str(tmp_path / "train-{001..003}.tar"), split="train")
    with pytest.raises(HFViTError, match=r"neither \.tar nor \.parquet"):
        (tmp_path / "cat").mkdir()
        open_stream(str(tmp_path / "cat"), split="train")


def test_string_labels_of_shards(tmp_path):
    records = [(str(n), {"png": encoded(n), "cls": name}) for n, name in enumerate((b"owl", b"cat", b"owl"))]
    (tmp_path / "a.tar").write_bytes(tar_bytes(records))
    dataset = open_dataset(str(tmp_path / "a.tar"), split="train", cache_dir=tmp_path / "cache")
    assert dataset.label_names == ["cat", "owl"] and dataset.labels.tolist() == [1, 0, 1]


def test_names_beside_the_shards(shards):
    cache = {"split": "train", "cache_dir": shards / "cache"}
    names = shards / "label_names.json"
    names.write_text('["cat", "dog", "owl", "newt"]')
    for reader in (open_dataset, open_stream):
        assert reader(str(shards), **cache).label_names == ["cat", "dog", "owl", "newt"]
    turned = open_dataset(str(shards), **cache, label_names=["owl", "dog", "cat"])
    assert turned.labels.tolist() == [2 - number % 3 for number in range(15)]
    assert open_dataset(str(shards), **cache, label_column="cls//2").label_names == ["0", "1"]
    for content, message in (
        ('["cat", "dog"]', "label 2, but only 2 classes are known"),
        ('{"0": "cat"}', r"label_names\.json' must hold a list"),
        ('["cat", "cat", "dog"]', "must hold a list of the classes' names, each once"),
        ("cat", r"label_names\.json' is not JSON"),
    ):
        names.write_text(content)
        with pytest.raises(HFViTError, match=message):
            open_dataset(str(shards), **cache)


def test_columns_of_shards(shards):
    halved = open_dataset(str(shards), split="train", label_column="cls//2", cache_dir=shards / "cache")
    assert halved.labels.tolist() == [number % 3 // 2 for number in range(15)] and halved.label_names == ["0", "1"]
    for columns in ({"label_column": "fine_label"}, {"image_column": "jpg"}):
        with pytest.raises(HFViTError, match="tar shards, which have no columns"):
            open_dataset(str(shards), split="train", cache_dir=shards / "cache", **columns)


def test_patterns():
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{x,y}-{1..2}.tar") == ["x-1.tar", "x-2.tar", "y-1.tar", "y-2.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    assert expand_shards("https://host/{1..2}.tar?download=true") == [
        "https://host/1.tar?download=true",
        "https://host/2.tar?download=true",
    ]


# Parquet


def write_parquet(path, count, features, label=lambda number: number % 2):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": [{"bytes": encoded(n), "path": None} for n in range(count)],
        "label": [label(n) for n in range(count)],
        "note": ["unread"] * count,
    }
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=3)
    return path


def test_parquet_stream(tmp_path):
    write_parquet(tmp_path / "data" / "train-0.parquet", 10, datasets.Features(CLASSES))
    write_parquet(tmp_path / "data" / "test-0.parquet", 4, datasets.Features(CLASSES))
    stream = open_stream(str(tmp_path), split="train", buffer_size=5)
    assert stream.label_names == ["b", "a"] and len(stream) == 10 and len(stream.sizes) == 4
    records = [record for batch in stream.order(5, seed=0, position=0, stop=10) for record in batch]
    assert {(record.data, record.label) for record in records} == {(encoded(n), n % 2) for n in range(10)}
    turned = open_stream(str(tmp_path), split="test", label_names=["a", "b"])
    records = next(iter(turned.order(4, seed=0, position=0, stop=4)))
    assert {(record.data, record.label) for record in records} == {(encoded(n), 1 - n % 2) for n in range(4)}
    item = turned.with_transform(EvalTransform(8))[records[0]]
    assert item["pixel_values"].shape == (3, 8, 8)
    with pytest.raises(HFViTError, match=r"no split 'train\[:5%\]' to stream; available: .*slices need a copy"):
        open_stream(str(tmp_path), split="train[:5%]")


def test_parquet_stream_must_know_the_classes(tmp_path):
    features = datasets.Features({**CLASSES, "label": datasets.Value("string")})
    path = write_parquet(tmp_path / "train.parquet", 4, features, label=lambda n: "ab"[n % 2])
    with pytest.raises(HFViTError, match="do not name the classes of column 'label'"):
        open_stream(str(path), split="train")
    stream = open_stream(str(path), split="train", label_names=["b", "a"])
    records = next(iter(stream.order(4, seed=0, position=0, stop=4)))
    assert {(record.data, record.label) for record in records} == {(encoded(n), 1 - n % 2) for n in range(4)}


def test_rows_without_an_image_are_listed(tmp_path):
    columns = {"image": [None, {"bytes": encoded(0), "path": None}], "label": [0, 1], "note": ["", ""]}
    datasets.Dataset.from_dict(columns, features=datasets.Features(CLASSES)).to_parquet(tmp_path / "train.parquet")
    stream = open_stream(str(tmp_path), split="train").with_transform(EvalTransform(8))
    batch = collate([stream[record] for record in next(iter(stream.order(2, seed=0, position=0, stop=2)))])
    assert len(batch["labels"]) == 1 and batch["unreadable"] == ["train.parquet[0, 0]: the row holds no image"]


def test_a_share_that_holds_nothing_says_so():
    with pytest.raises(
        HFViTError, match=r"0.0001 selects no images of 'synthetic:glyphs@2,20' .split 'train'.; increase it"
    ):
        open_stream("synthetic:glyphs@2,20", split="train", fraction=0.0001)


def test_hub_ids_need_the_network():
    with pytest.raises(HFViTError, match="neither a local path nor a Hub dataset that can be reached"):
        open_stream("someone/some-data", split="train")


def test_real_parquet(shared):
    stream = open_stream(str(shared / "data" / "oxford_flowers12"), split="train")
    assert len(stream) == 720 and stream.label_names[0] == "bluebell"
