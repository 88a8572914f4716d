"""kernel_table.py and private_cache.py: an implementation is measured once, the table is read only where it is safe.

pytest tests/hf_vit/test_kernel_table.py
"""

import contextlib
import json
import os
import tempfile
import time

import pytest
import torch
from filelock import FileLock

from hf_vit import kernel_table, private_cache


X = torch.zeros(1)
needs_owners = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no owners and modes")


class Clock:
    """A timer that moves only while an implementation runs."""

    def __init__(self):
        self.now = 0.0
        self.runs: list[str] = []

    def __call__(self) -> float:
        return self.now

    def implementation(self, name: str, takes: float, error: Exception | None = None):
        def run(x):
            self.now += takes
            self.runs.append(name)
            if error:
                raise error
            return name

        return run


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock under control and an empty cache folder."""
    clock = Clock()
    monkeypatch.setattr(kernel_table, "timer", clock)
    monkeypatch.setattr(kernel_table, "cache_folder", private_cache.cache_folder)
    monkeypatch.setattr(private_cache, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    start_anew()
    yield clock
    start_anew()


def start_anew() -> None:
    """As in a new process."""
    kernel_table.forget_table()
    kernel_table._warn_once.cache_clear()
    kernel_table._waited_in_vain = False
    private_cache._first_private_folder.cache_clear()


def served(clock: Clock, key: tuple = ("case",), **times: float) -> str:
    implementations = {name: clock.implementation(name, takes) for name, takes in times.items()}
    return kernel_table.choose(key, implementations, X)(X)


def test_another_implementation_serves_only_where_it_is_clearly_faster(clock):
    assert served(clock, ("one",), plain=1.0, packed=0.95) == "plain"
    assert served(clock, ("two",), plain=1.0, packed=0.85, other=0.8) == "other"
    assert served(clock, ("three",), plain=1.0) == "plain" and clock.runs[-1] == "plain"


def test_no_later_process_measures_what_one_has_measured(clock):
    assert served(clock, plain=1.0, packed=0.5) == "packed"
    start_anew()
    clock.runs.clear()
    assert served(clock, plain=0.1, packed=0.5) == "packed"  # although it would be slower now
    assert clock.runs == ["packed"]
    assert served(clock, ("other case",), plain=0.1, packed=0.5) == "plain"
    assert served(clock, plain=0.1, tiles=0.5) == "plain"  # other implementations are another case


def test_threads_are_measured_apart(clock):
    assert served(clock, plain=1.0, packed=0.5) == "packed"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert served(clock, plain=0.5, packed=1.0) == "plain"
    finally:
        torch.set_num_threads(threads)


def test_one_that_fails_is_left_out_and_a_plain_one_that_fails_raises(clock):
    failing = clock.implementation("packed", 0.1, RuntimeError("could not create a primitive descriptor"))
    plain = clock.implementation("plain", 1.0)
    assert kernel_table.choose(("case",), {"plain": plain, "packed": failing}, X) is plain
    assert kernel_table.seconds(("case",), {"plain": plain, "packed": failing}, X)["packed"] is None
    with pytest.raises(RuntimeError, match="descriptor"):
        kernel_table.choose(("other case",), {"plain": failing, "packed": plain}, X)


def test_one_that_is_hopelessly_slow_runs_once(clock):
    assert served(clock, plain=1.0, reference=100.0) == "plain"
    assert clock.runs.count("reference") == 1 and clock.runs.count("plain") > 2


def test_measuring_within_a_measurement_is_no_slowness_of_the_outer_one(clock):
    """Its first run takes seconds, of which it has to answer for a tenth."""

    def optimized(x):
        clock.now += 0.05
        for index in range(40):
            served(clock, ("inner", index), plain=0.02, packed=0.001)

    implementations = {"plain": clock.implementation("plain", 0.25), "optimized": optimized}
    assert kernel_table.choose(("outer",), implementations, X) is optimized
    (times,) = [times for key, times in kernel_table._measured.items() if key[0] == ("outer",)]
    assert times["optimized"] == pytest.approx(0.09) and clock.now > 20 * 0.25


def test_a_clock_that_stands_still_ends_a_measurement(clock):
    assert served(clock, plain=0.0, packed=0.0) == "plain"
    assert len(clock.runs) == 2 * (1 + kernel_table.MAX_ROUNDS_OF_SHORT_WORK) + 1


def test_a_measurement_may_choose_within_a_measurement(clock):
    def outer(x):
        clock.now += 0.1
        return served(clock, ("inner",), plain=1.0, packed=0.5)

    kernel_table.choose(("outer",), {"plain": clock.implementation("plain", 2.0), "outer": outer}, X)
    stored = json.loads(kernel_table.table_file().read_text())["seconds"]
    assert sorted(key[:9] for key in stored) == ["(('inner'", "(('outer'"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"machine": 1, "seconds": {}}', b"\xff\xfe", b"null"])
def test_a_damaged_table_is_made_anew(clock, content, caplog):
    served(clock, plain=1.0, packed=0.5)
    kernel_table.table_file().write_bytes(content)
    start_anew()
    assert served(clock, plain=0.1, packed=0.5) == "plain"
    start_anew()
    assert served(clock, plain=1.0, packed=0.5) == "plain"


def store(entry: str) -> None:
    """Put JSON in the place of the only entry of the table; start anew."""
    file = kernel_table.table_file()
    stored = json.loads(file.read_text())
    (key,) = stored["seconds"]
    file.write_text(json.dumps({**stored, "seconds": {key: "the entry"}}).replace('"the entry"', entry))
    start_anew()


@pytest.mark.parametrize(
    "entry",
    [
        "null",
        "[]",
        '{"plain": NaN, "packed": 1}',
        '{"plain": 1, "packed": Infinity}',
        '{"plain": -1, "packed": -2}',
        '{"plain": true, "packed": false}',
        '{"plain": "1", "packed": 0.1}',
        f'{{"plain": 1{"0" * 400}, "packed": 1}}',
    ],
)
def test_a_table_with_what_is_no_time_is_damaged(clock, entry, caplog, monkeypatch):
    monkeypatch.setattr(kernel_table.logger, "propagate", True)
    served(clock, plain=1.0, packed=0.5)
    store(entry)
    assert served(clock, plain=1.0, packed=0.5) == "packed" and "is damaged" in caplog.text
    start_anew()
    assert served(clock, plain=0.1, packed=0.5) == "packed"  # the file is whole again


@pytest.mark.parametrize(
    "entry",
    [
        "{}",
        '{"plain": 1}',
        '{"packed": 1}',
        '{"packed": 1, "plain": 9}',
        '{"plain": 1, "packed": 2, "third": 0.1}',
        '{"plain": null, "packed": 1}',
        '{"plain": null, "packed": null}',
    ],
)
def test_an_entry_of_other_implementations_or_without_a_plain_time_is_measured_anew(clock, entry):
    served(clock, plain=1.0, packed=2.0)
    store(entry)
    assert served(clock, plain=1.0, packed=0.5) == "packed"
    start_anew()
    assert kernel_table.speedup(("case",), *[clock.implementation(name, 1.0) for name in ("plain", "other")], X) == 1
    assert served(clock, plain=0.1, packed=0.5) == "packed"


def test_no_time_is_negative_where_the_clock_jumps_back(clock, monkeypatch):
    ticks = iter(range(10**9, 0, -1))
    monkeypatch.setattr(kernel_table, "timer", lambda: float(next(ticks)))
    assert served(clock, plain=1.0, packed=0.5) == "plain"
    start_anew()
    clock.runs.clear()
    assert served(clock, plain=1.0, packed=0.5) == "plain" and clock.runs == ["plain"]


def test_a_process_that_stopped_while_it_measured_is_waited_for_once(clock, monkeypatch, caplog):
    monkeypatch.setattr(kernel_table.logger, "propagate", True)
    monkeypatch.setattr(kernel_table, "LOCK_SECONDS", 0.5)
    assert served(clock, plain=1.0, packed=0.5) == "packed"
    start_anew()
    with FileLock(kernel_table.table_file().with_suffix(".lock")):
        began = time.monotonic()
        assert served(clock, plain=1.0, packed=0.5) == "packed" and not caplog.records  # read without the lock
        assert {served(clock, ("other", index), plain=1.0, packed=0.5) for index in range(10)} == {"plain"}
        assert 0.4 < time.monotonic() - began < 3
        assert len(caplog.records) == 1 and "the plain implementations serve" in caplog.text
    assert served(clock, ("later",), plain=1.0, packed=0.5) == "packed"  # it tries, and only does not wait


def test_what_another_process_measured_meanwhile_is_read_under_the_lock(clock, monkeypatch):
    served(clock, plain=1.0, packed=0.5)
    content, locked = kernel_table.table_file().read_text(), kernel_table._locked
    kernel_table.table_file().unlink()
    start_anew()

    @contextlib.contextmanager
    def waiting(path):
        with locked(path):
            path.write_text(content)
            path.chmod(0o600)
            yield

    monkeypatch.setattr(kernel_table, "_locked", waiting)
    clock.runs.clear()
    assert served(clock, plain=0.1, packed=0.5) == "packed" and clock.runs == ["packed"]


@pytest.mark.parametrize("error", [NotImplementedError("no such operator"), OSError("no such device")])
def test_an_error_of_the_plain_implementation_is_not_one_of_the_table(clock, error):
    implementations = {"plain": clock.implementation("plain", 1.0, error), "packed": clock.implementation("packed", 1)}
    with pytest.raises(type(error), match="no such"):
        kernel_table.choose(("case",), implementations, X)
    assert served(clock, ("other case",), plain=1.0, packed=0.5) == "packed"  # the lock is free


def test_a_file_system_without_locks_has_no_table(clock, monkeypatch, caplog):
    class NoLock:
        def acquire(self, timeout):
            raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(kernel_table.logger, "propagate", True)
    monkeypatch.setattr(kernel_table, "_file_lock", lambda path: NoLock())
    assert served(clock, plain=1.0, packed=0.5) == "plain" and clock.runs == ["plain"]
    assert "cannot be used (FileSystem does not appear to support flock)" in caplog.text


@needs_owners
def test_a_table_that_others_can_write_is_not_read(clock):
    served(clock, plain=1.0, packed=0.5)
    kernel_table.table_file().chmod(0o666)
    start_anew()
    assert served(clock, plain=0.1, packed=0.5) == "plain"
    assert kernel_table.table_file().stat().st_mode & 0o777 == 0o600


@needs_owners
def test_the_folder_is_private_and_another_users_is_not_used(clock, monkeypatch, tmp_path):
    (tmp_path / "hf_vit").mkdir()
    (tmp_path / "hf_vit").chmod(0o777)
    assert private_cache.cache_folder() == tmp_path / "hf_vit"
    assert (tmp_path / "hf_vit").stat().st_mode & 0o777 == 0o700
    start_anew()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    other = private_cache.cache_folder()
    assert other is None or other.parent != tmp_path  # folders made now belong to me, not to that user


def test_without_a_folder_the_plain_implementation_serves_and_nothing_is_measured(clock, monkeypatch, tmp_path):
    (tmp_path / "hf_vit").write_text("a file in the way")
    assert private_cache.cache_folder().parent == tmp_path / "temporary"
    start_anew()
    monkeypatch.setattr(private_cache, "_make_private", lambda folder: "it is read-only")
    assert private_cache.cache_folder() is None
    assert served(clock, plain=1.0, packed=0.1) == "plain"
    assert clock.runs == ["plain"]


def test_how_many_times_as_fast_one_is_than_the_other(clock, monkeypatch):
    plain, other = clock.implementation("plain", 3.0), clock.implementation("other", 2.0)
    failing = clock.implementation("other", 2.0, RuntimeError("no such instruction"))
    assert kernel_table.speedup(("case",), plain, other, X) == 1.5
    start_anew()
    clock.runs.clear()
    assert kernel_table.speedup(("case",), plain, other, X) == 1.5 and not clock.runs
    assert kernel_table.speedup(("other case",), plain, failing, X) == 0.0
    monkeypatch.setattr(kernel_table, "cache_folder", lambda: None)
    start_anew()
    assert kernel_table.speedup(("case",), plain, other, X) == 1.5  # once a process where nothing can be kept
    clock.runs.clear()
    assert kernel_table.speedup(("case",), plain, other, X) == 1.5 and not clock.runs


def test_keys_are_the_same_in_every_process(clock):
    with pytest.raises(TypeError, match="differs from process to process"):
        served(clock, (object(),), plain=1.0, packed=0.5)
