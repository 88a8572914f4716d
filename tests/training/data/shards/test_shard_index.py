"""The index of shards: built once, kept in the cache or beside them, right again after any change."""

import contextlib
import io
import multiprocessing
import os
import shutil
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest

from hf_vit.errors import HFViTError
from tests.helpers.streams import encoded, tar_bytes
from training.data.dataset import open_dataset
from training.data.shards import shard_files, shard_index, shard_records
from training.data.shards.shard_command import main
from training.data.shards.shard_files import expand_shards
from training.data.shards.shard_index import SIDECAR, open_index
from training.data.shards.streaming import open_stream


SHARDS, RECORDS = 4, 6


def record(number, label=None):
    return f"{number:04d}", {"cls": str(number % 3 if label is None else label).encode(), "png": encoded(number)}


@pytest.fixture
def folder(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(SHARDS):
        numbers = range(shard * RECORDS, (shard + 1) * RECORDS)
        (shards / f"train-{shard}.tar").write_bytes(tar_bytes([record(number) for number in numbers]))
    return shards


@pytest.fixture
def scanned(monkeypatch):
    """Names of the shards whose headers are read."""
    names = []
    original = shard_records.scan_shard
    monkeypatch.setattr(
        shard_records, "scan_shard", lambda shard: names.append(os.path.basename(shard.url)) or original(shard)
    )
    return names


def opened(folder, cache, log=None):
    return open_index(sorted(map(str, folder.glob("*.tar"))), cache, (log if log is not None else []).append)


def labels_of(index):
    return [index.values[code] for code in index.code]


EXPECTED = [number % 3 for number in range(SHARDS * RECORDS)]


def test_an_index_is_built_once_and_only_what_changed_is_read_again(folder, tmp_path, scanned):
    cache = tmp_path / "cache"
    first = opened(folder, cache)
    assert labels_of(first) == EXPECTED and len(scanned) == SHARDS
    again = opened(folder, cache)
    assert len(scanned) == SHARDS and isinstance(again.offset.base, np.ndarray | object)
    for column in ("offset", "length", "code", "first"):
        np.testing.assert_array_equal(getattr(first, column), getattr(again, column))
    (folder / "train-2.tar").write_bytes(tar_bytes([record(0, label="owl"), record(1)]))
    changed = opened(folder, cache)
    assert scanned[SHARDS:] == ["train-2.tar"]
    assert labels_of(changed) == [*EXPECTED[:12], "owl", 1, *EXPECTED[18:]]
    (folder / "train-9.tar").write_bytes(tar_bytes([record(7)]))
    assert labels_of(opened(folder, cache))[-1] == 1
    assert scanned[-5:] == [f"train-{name}.tar" for name in (0, 1, 2, 3, 9)]  # another list of shards, another index


def test_the_columns_are_mapped_not_copied(folder, tmp_path):
    opened(folder, tmp_path / "cache")
    index = opened(folder, tmp_path / "cache")
    for column in (index.offset, index.length, index.code):
        assert not column.flags.owndata and not column.flags.writeable
    stream = open_stream(str(folder), split="train", cache_dir=tmp_path / "cache")
    assert not stream.chunks.shards.labels.flags.owndata  # labels that are numbers from 0 are the file's own, too


@pytest.mark.parametrize("damage", ["half", "byte", "other"])
def test_a_damaged_index_is_built_again_and_says_so(folder, tmp_path, scanned, damage):
    cache = tmp_path / "cache"
    first = opened(folder, cache)
    (kept,) = cache.glob("*.index")
    data = bytearray(kept.read_bytes())
    if damage == "half":
        data = data[: len(data) // 2]
    elif damage == "byte":
        data[data.index(first.offset.tobytes())] ^= 1
    else:
        data = b"something else"
    kept.write_bytes(data)
    log = []
    assert labels_of(opened(folder, cache, log)) == EXPECTED and len(scanned) == 2 * SHARDS
    assert len(log) == 1 and "is damaged" in log[0] and "built again" in log[0]
    opened(folder, cache, log)
    assert len(log) == 1


def test_an_index_beside_the_shards_is_used_wherever_they_are_copied(folder, tmp_path, scanned, capsys):
    assert main(["index", str(folder)]) == 0
    assert "24 records of 4 shards (4 read now), 3 labels; the index is in" in capsys.readouterr().out
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # with other dates
    os.utime(copy / SIDECAR)
    scanned.clear()
    for place in (folder, copy):
        log = []
        assert labels_of(opened(place, tmp_path / "cache", log)) == EXPECTED
        assert not scanned and not log
    files = fsspec.filesystem("memory")
    for file in folder.iterdir():
        files.pipe(f"/beside/{file.name}", file.read_bytes())
    log = []
    urls = expand_shards("memory://beside/train-{0..3}.tar")
    assert labels_of(open_index(urls, tmp_path / "cache", log.append)) == EXPECTED
    assert not scanned and not log
    assert len(list((tmp_path / "cache").glob("*.index"))) == 1  # fetched once


def test_an_index_beside_the_shards_that_does_not_fit(folder, tmp_path, scanned, capsys):
    main(["index", str(folder)])
    scanned.clear()
    (folder / "train-1.tar").write_bytes(tar_bytes([record(number, label=2) for number in range(RECORDS)]))
    later = os.stat(folder / SIDECAR).st_mtime_ns + 10**9
    os.utime(folder / "train-1.tar", ns=(later, later))
    (folder / "train-4.tar").write_bytes(tar_bytes([record(2)]))
    log = []
    index = opened(folder, tmp_path / "cache", log)
    assert sorted(scanned) == ["train-1.tar", "train-4.tar"]
    assert labels_of(index)[6:12] == [2] * RECORDS and len(index) == SHARDS * RECORDS + 1
    assert len(log) == 1 and "lacks 1 of 5 shards, and 1 have changed since" in log[0]
    capsys.readouterr()
    assert main(["index", str(folder)]) == 0
    assert "25 records of 5 shards (2 read now)" in capsys.readouterr().out
    other = tmp_path / "other"
    other.mkdir()
    (other / "photos.tar").write_bytes(tar_bytes([record(0), record(1)]))
    shutil.copy(folder / SIDECAR, other)
    assert len(opened(other, tmp_path / "cache", log)) == 2
    assert "is of other shards: it is not used" in log[-1]


@pytest.mark.skipif(os.geteuid() == 0 and not hasattr(os, "setresuid"), reason="root writes everywhere")
def test_an_index_that_cannot_be_kept(folder, tmp_path, monkeypatch, capsys):
    def refused(index, path):
        raise PermissionError(13, "Permission denied", str(path))

    original = shard_index.write_shard_index
    monkeypatch.setattr("training.data.shards.shard_command.write_shard_index", refused)
    assert main(["index", str(folder), "--cache_dir", str(tmp_path / "cache")]) == 0
    assert "the index is in the cache" in capsys.readouterr().out and not (folder / SIDECAR).exists()
    assert len(list((tmp_path / "cache").glob("*.index"))) == 1
    monkeypatch.setattr(shard_index, "write_shard_index", refused)
    log = []
    assert labels_of(opened(folder, tmp_path / "closed", log)) == EXPECTED
    assert len(log) == 1 and "cannot be kept" in log[0]
    monkeypatch.setattr(shard_index, "write_shard_index", original)
    closed = tmp_path / "file"
    closed.write_text("no folder")
    assert labels_of(opened(folder, closed, log)) == EXPECTED


def build_in_another_process(folder, cache, scans):
    original = shard_records.scan_shard
    shard_records.scan_shard = lambda shard: scans.put(shard.url) or original(shard)
    scans.put(labels_of(opened(folder, cache)))


def test_processes_that_open_the_same_shards_build_one_index(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    scans = context.SimpleQueue()
    processes = [
        context.Process(target=build_in_another_process, args=(folder, tmp_path / "cache", scans)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [scans.get() for _ in range(SHARDS + len(processes))]
    for process in processes:
        process.join()
    assert sum(isinstance(item, str) for item in found) == SHARDS
    assert all(item == EXPECTED for item in found if not isinstance(item, str)) and scans.empty()


def test_many_shards_are_read_by_processes(folder, tmp_path, monkeypatch):
    alone = opened(folder, tmp_path / "one")
    monkeypatch.setattr(shard_records, "IN_THIS_PROCESS", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    together = opened(folder, tmp_path / "two")
    for column in ("offset", "length", "code", "first"):
        np.testing.assert_array_equal(getattr(alone, column), getattr(together, column))


DAMAGED = [
    ("0007", {"png": encoded(7), "json": b"{oh"}, "the .json of record '0007' of the shard .* is not JSON"),
    ("0008", {"png": encoded(8), "cls": b"caf\xe9"}, "the .cls of record '0008' of the shard .* is not UTF-8"),
    ("0009", {"png": encoded(9)}, "record '0009' of the shard .* has no label"),
    ("0010", {"cls": b"1"}, "record '0010' of the shard .* has no image"),
]


@pytest.mark.parametrize(("key", "members", "message"), DAMAGED)
def test_a_damaged_record_is_left_out_and_named(folder, tmp_path, key, members, message):
    records = [record(6), (key, members), record(11)]
    (folder / "train-1.tar").write_bytes(tar_bytes(records))
    (folder / "train-2.tar").write_bytes(b"")
    for open_data in (open_dataset, open_stream):
        log = []
        data = open_data(str(folder), split="train", cache_dir=tmp_path / "cache", log=log.append)
        assert len(data) == SHARDS * RECORDS - 2 * RECORDS + 2
        (line,) = [line for line in log if line.startswith("left out")]
        assert "1 shards of 0 bytes" in line and "train-2.tar" in line and "1 damaged records" in line
        with pytest.raises(HFViTError, match=f"{message}.*--on_decode_error skip"):
            open_data(str(folder), split="train", cache_dir=tmp_path / "cache", on_unreadable="stop")


def test_records_of_one_name_in_a_row_are_all_read(tmp_path):
    twice = [("0001", {"png": encoded(n), "cls": str(n % 2).encode()}) for n in range(4)]
    (tmp_path / "train-0.tar").write_bytes(tar_bytes(twice))
    for open_data in (open_dataset, open_stream):
        data = open_data(str(tmp_path), split="train", cache_dir=tmp_path / "cache")
        assert len(data) == 4
    assert open_dataset(str(tmp_path), split="train", cache_dir=tmp_path / "cache").labels.tolist() == [0, 1, 0, 1]


def test_a_byte_order_mark_belongs_to_no_label(tmp_path):
    named = [(str(n), {"png": encoded(n), "cls": ["dog", "cat"][n % 2].encode("utf-8-sig")}) for n in range(4)]
    named += [("5", {"png": encoded(5), "cls": b"cat"})]
    (tmp_path / "train-0.tar").write_bytes(tar_bytes(named))
    assert open_dataset(str(tmp_path), split="train", cache_dir=tmp_path / "cache").label_names == ["cat", "dog"]


def test_shards_that_change_after_their_index_was_read(folder, tmp_path):
    common = {"split": "train", "cache_dir": tmp_path / "cache"}
    stream, dataset = open_stream(str(folder), **common), open_dataset(str(folder), **common)
    (folder / "train-1.tar").write_bytes(
        tar_bytes([record(100 + number, label="x" * 600) for number in range(RECORDS)])
    )
    os.utime(folder / "train-1.tar", (1e9, 1e9))
    (folder / "train-2.tar").unlink()
    (folder / "train-3.tar").write_bytes((folder / "train-3.tar").read_bytes()[:4000])
    items = [stream[record] for record in next(iter(stream.order(24, seed=0, position=0, stop=24)))]
    unreadable = sorted(item["unreadable"] for item in items if "unreadable" in item)
    assert len([text for text in unreadable if text.startswith("train-1.tar@")]) == RECORDS
    assert len([text for text in unreadable if text.startswith("train-2.tar@") and "is gone" in text]) == RECORDS
    changed = [text for text in unreadable if text.startswith("train-3.tar@")]
    assert len(changed) == RECORDS and all("has changed since its index was read" in text for text in changed)
    for index in range(24):
        same = {item["index"]: "unreadable" in item for item in items}
        assert ("unreadable" in dataset[index]) == same[index]
    (folder / "train-3.tar").unlink()
    stop = open_stream(str(folder), split="train", cache_dir=tmp_path / "other", on_unreadable="stop")
    (folder / "train-0.tar").unlink()
    with pytest.raises(HFViTError, match=r"train-0.tar@\d+: the shard is gone"):
        [stop[record] for batch in stop.order(6, seed=0, position=0, stop=24) for record in batch]


def test_bytes_of_another_shard_are_no_images(folder, tmp_path):
    """Of a remote shard that was replaced, headers tell: no date comes with a range of bytes."""
    files = fsspec.filesystem("memory")
    files.pipe("/replaced/train.tar", (folder / "train-0.tar").read_bytes())
    stream = open_stream("memory://replaced/train.tar", split="train", cache_dir=tmp_path / "cache")
    records = [record(number, label="x" * 600) for number in range(RECORDS)]
    files.pipe("/replaced/train.tar", tar_bytes(records))
    (batch,) = stream.order(RECORDS, seed=0, position=0, stop=RECORDS)
    assert sum(record.data == "the shard has changed since its index was read" for record in batch) == RECORDS - 1
    files.pipe("/replaced/train.tar", (folder / "train-0.tar").read_bytes()[:4000])
    (batch,) = stream.order(RECORDS, seed=0, position=0, stop=RECORDS)
    assert 0 < sum(isinstance(record.data, bytes) for record in batch) < RECORDS


def test_unusual_tar_files_are_read_too(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
        for number in range(3):
            for kind, data in record(number)[1].items():
                member = tarfile.TarInfo(f"{number}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    dataset = open_dataset(str(tmp_path), split="train", cache_dir=tmp_path / "cache")
    assert dataset.labels.tolist() == [0, 1, 2]
    assert all(dataset.read(index)[0].size == (14, 12) for index in range(3))


class Shards(BaseHTTPRequestHandler):
    """A web server of a folder, with or without range requests; counts the bytes that it sends."""

    folder: Path
    ranges: bool
    sent: list

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        size = len(data)
        begin, end = 0, size
        if self.ranges and (asked := self.headers.get("Range")):
            first, last = asked.removeprefix("bytes=").split("-")
            begin, end, status = int(first), min(int(last or size - 1) + 1, size), 206
        self.send_response(status)
        self.send_header("Content-Length", str(end - begin))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        if body:
            self.sent.append(end - begin)
            with contextlib.suppress(OSError):  # who asked has gone
                self.wfile.write(data[begin:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def web(folder):
    """Starts a server of the folder: web(ranges) is its address and the list of answers' bytes."""
    servers = []

    def start(ranges):
        handler = type("Handler", (Shards,), {"folder": folder, "ranges": ranges, "sent": []})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", handler.sent

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_shards_of_a_web_server(folder, tmp_path, web):
    large = {"png": encoded(0) + bytes(200_000)}
    records = [(f"{n:03d}", {"cls": str(n % 3).encode(), **large}) for n in range(10)]
    for shard in range(SHARDS):
        (folder / f"train-{shard}.tar").write_bytes(tar_bytes(records))
    size = sum(file.stat().st_size for file in folder.iterdir())
    host, sent = web(True)
    log = []
    name = f"{host}/train-{{0..3}}.tar"
    stream = open_stream(name, split="train", cache_dir=tmp_path / "cache", log=log.append)
    assert len(stream) == 40 and sum(sent) < 0.1 * size
    assert len(log) == 1 and "one request for each image" in log[0]
    records = next(iter(stream.order(40, seed=0, position=0, stop=40)))
    assert {record.data for record in records} == {large["png"]}
    host, sent = web(False)
    name = f"{host}/train-{{0..3}}.tar"
    stream = open_stream(name, split="train", cache_dir=tmp_path / "cache", log=log.append)
    assert "ignores range requests: 4 shards" in log[1] and "are copied to" in log[1] and len(log) == 2
    records = next(iter(stream.order(40, seed=0, position=0, stop=40)))
    assert {record.data for record in records} == {large["png"]}
    sent.clear()
    assert len(open_stream(name, split="train", cache_dir=tmp_path / "cache", log=log.append)) == 40
    assert sum(sent) <= size / SHARDS and len(log) == 2  # the copies serve; one answer tells that ranges are ignored


def test_each_server_is_asked_for_ranges(folder, tmp_path, web):
    (good, _), (bad, sent), log = web(True), web(False), []
    urls = [f"{host}/train-{shard}.tar" for shard, host in enumerate([good, bad, good, bad])]
    files = shard_files.with_local_copies(urls, tmp_path / "cache", log.append)
    assert files[::2] == urls[::2] and [os.path.basename(file) for file in files[1::2]] == [
        "train-1.tar",
        "train-3.tar",
    ]
    assert all((folder / os.path.basename(file)).read_bytes() == Path(file).read_bytes() for file in files[1::2])
    assert len(log) == 1 and f"{bad} ignores range requests: 2 shards" in log[0]
    sent.clear()
    assert shard_files.with_local_copies(urls, tmp_path / "cache", log.append) == files and len(log) == 1
    assert len(sent) == 1  # the question; the copies serve


def test_a_server_that_forgets_range_requests(monkeypatch):
    class Server:
        @staticmethod
        def cat_file(path, begin, end):
            return bytes(1000)

    monkeypatch.setattr(shard_files, "file_system", lambda url: (Server, url))
    with pytest.raises(HFViTError, match=r"ignored a request for 10 bytes and sent 1,000: .* the shards are copied"):
        shard_files.read_range(shard_files.TarShard("https://host/a.tar", 1000, ""), 5, 15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["index", "nowhere"], "neither a folder nor a pattern of .tar files"),
        (["index", "nowhere/{0..2}.tar"], "no shard 'nowhere/0.tar', nor 2 more"),
        (["index", "."], "holds no .tar files"),
        (["paint", "x"], "invalid choice"),
        ([], "required: command"),
    ],
)
def test_bad_commands_end_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1
