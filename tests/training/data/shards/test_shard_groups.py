"""Shards that are indexed while they are read: each image once, the place restored exactly, few headers at a time."""

import itertools
import json
import pickle
import shutil

import fsspec
import pytest

from hf_vit.errors import HFViTError
from tests.helpers.streams import encoded, tar_bytes
from training.data.shards import shard_groups
from training.data.shards.shard_command import main as index_command
from training.data.shards.shard_files import expand_shards
from training.data.shards.streaming import open_stream
from training.data.transforms import EvalTransform


SHARDS, RECORDS = 12, 5
PNG = encoded(0)


@pytest.fixture
def folder(tmp_path):
    """Twelve shards of five records in three classes, and one of no bytes."""
    for shard in range(SHARDS):
        records = [(f"{n:03d}", {"cls": str(n % 3).encode(), "png": PNG}) for n in range(RECORDS)]
        (tmp_path / f"train-{shard:02d}.tar").write_bytes(tar_bytes(records))
    (tmp_path / f"train-{SHARDS}.tar").write_bytes(b"")
    (tmp_path / "label_names.json").write_text(json.dumps(["ant", "bee", "cat"]))
    return tmp_path


@pytest.fixture
def scanned(monkeypatch):
    """The shards whose headers are read."""
    urls = []
    scan = shard_groups.scan_shard
    monkeypatch.setattr(shard_groups, "scan_shard", lambda shard: urls.append(shard.url) or scan(shard))
    return urls


def stream_of(folder, cache="cache", size=3, **more):
    return open_stream(str(folder), split="train", cache_dir=folder / cache, group_size=size, buffer_size=7, **more)


def read(stream, count, position=0, rank=0, world_size=1):
    order = stream.order(1, seed=3, position=position, stop=10**9, rank=rank, world_size=world_size)
    return [(record.epoch, record.index) for record in itertools.islice(order.records(position // world_size), count)]


@pytest.mark.parametrize(("size", "world_size"), [(1, 1), (3, 2), (5, 3), (99, 1)])
def test_every_image_once_per_epoch_over_all_processes(folder, size, world_size):
    stream = stream_of(folder, size=size, run_length=2)
    epochs = {}
    for rank in range(world_size):
        for epoch, index in read(stream, 2 * SHARDS * RECORDS // world_size, rank=rank, world_size=world_size):
            epochs.setdefault(epoch, []).append(index)
    counts = [len(epochs[epoch]) for epoch in (0, 1)]
    images = sorted((shard << 32) + row for shard in range(SHARDS) for row in range(RECORDS))
    if world_size == 1:
        assert counts == [60, 60] and sorted(epochs[0]) == sorted(epochs[1]) == images and epochs[0] != epochs[1]
    else:  # one process may begin its next epoch earlier than another
        assert sorted(epochs[0]) == images and all(len(set(part)) == len(part) for part in epochs.values())


def test_the_position_alone_restores_it_with_and_without_an_index(folder, scanned):
    whole = read(stream_of(folder), 150)
    for position in (1, 14, 59, 60, 77, 130):
        assert read(stream_of(folder), 150 - position, position) == whole[position:]
    assert read(stream_of(folder, cache="of another machine"), 20, 130) == whole[130:]
    index_command(["index", str(folder)])
    scanned.clear()
    assert read(stream_of(folder, cache="a third"), 150) == whole
    assert not scanned  # the index beside the shards holds them


def test_it_starts_after_the_first_group_and_reads_no_header_twice(folder, scanned):
    stream = stream_of(folder, size=2)
    assert len(set(scanned)) == 1 and len(stream) == SHARDS * RECORDS and stream.label_names == ["ant", "bee", "cat"]
    read(stream, 1)
    assert len(set(scanned)) < SHARDS
    read(stream, 150)
    assert sorted(scanned) == sorted({str(file) for file in folder.glob("*.tar")})
    assert stream_of(folder, size=2).fingerprint == stream.fingerprint != stream_of(folder, size=3).fingerprint
    read(stream_of(folder, size=2), 150)
    assert len(scanned) == SHARDS + 1


def test_items_and_workers(folder):
    stream = stream_of(folder).with_transform(EvalTransform((8, 8)))
    (record,) = next(iter(stream.order(1, seed=0, position=0, stop=9)))
    item = pickle.loads(pickle.dumps(stream))[record]  # as a worker that is spawned gets it
    assert item["pixel_values"].shape == (3, 8, 8) and item["labels"] == (record.index & 0xFFFFFFFF) % 3


def test_damaged_records_are_named_once_or_end_the_run(folder):
    records = [("a", {"png": PNG}), *((f"{n}", {"cls": b"1", "png": PNG}) for n in range(4))]
    (folder / "train-07.tar").write_bytes(tar_bytes(records))
    log = []
    read(stream_of(folder, log=log.append), 170)
    assert len([line for line in log if "train-07.tar' has no label" in line]) == 1
    assert any("1 shards of 0 bytes" in line for line in log)
    with pytest.raises(HFViTError, match=r"has no label.*mend them"):
        read(stream_of(folder, on_unreadable="stop"), 60)


def test_shards_that_cannot_be_read_this_way(folder):
    with pytest.raises(HFViTError, match="--shuffle_shards is for all records of tar shards"):
        stream_of(folder, fraction=0.5)
    with pytest.raises(HFViTError, match="--shuffle_shards is at least 1, got 0"):
        stream_of(folder, size=0)
    with pytest.raises(HFViTError, match="is for tar shards, 'synthetic:glyphs@3,9' is none"):
        open_stream("synthetic:glyphs@3,9", split="train", group_size=2)
    with pytest.raises(HFViTError, match="for 30 processes"):
        read(stream_of(folder), 1, world_size=30)
    (folder / "train-03.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(HFViTError, match=r"cannot read the shard '.*train-03\.tar' as a plain tar file"):
        read(stream_of(folder), 60)
    (folder / "label_names.json").unlink()
    with pytest.raises(HFViTError, match=r"name the classes in a label_names\.json"):
        stream_of(folder)


def test_other_shards_of_the_same_names_are_not_taken_for_these(folder):
    read(stream_of(folder), 60)
    shutil.copy(folder / "train-00.tar", folder / "train-01.tar")
    records = [(f"{n}", {"cls": b"2", "png": PNG}) for n in range(9)]
    (folder / "train-02.tar").write_bytes(tar_bytes(records))
    assert len(set(read(stream_of(folder), 64))) == 64


def test_names_beside_shards_of_another_file_system(folder):
    files = fsspec.filesystem("memory")
    for file in (*folder.glob("*.tar"), folder / "label_names.json"):
        files.pipe(f"/groups/{file.name}", file.read_bytes())
    stream = open_stream("memory://groups/train-{00..11}.tar", split="train", cache_dir=folder / "c", group_size=4)
    assert stream.label_names == ["ant", "bee", "cat"] and len(set(read(stream, 60))) == 60
    assert expand_shards("memory://groups/train-{00..11}.tar")[0].startswith("memory://")
