"""atomic_file.py: a final name holds the old content or the new one, and nothing else is replaced."""

import errno
import os
import stat

import pytest

from hf_vit.atomic_file import atomic_folder, atomic_path, atomic_write, check_folder
from hf_vit.errors import HFViTError


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_appears_whole_under_the_umask_or_its_own_mode(tmp_path):
    path = tmp_path / "scores.json"
    before = os.umask(0o027)
    try:
        with atomic_path(path) as temporary:
            temporary.write_text("{}")
            os.chmod(temporary, 0o600)  # as safetensors does
            assert not path.exists() and temporary.suffix == ".json"
    finally:
        os.umask(before)
    assert path.read_text() == "{}" and stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    atomic_write(path, "naïve")
    assert path.read_text(encoding="utf-8") == "naïve" and stat.S_IMODE(path.stat().st_mode) == 0o604
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


def test_a_failure_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    monkeypatch.setattr(os, "replace", _full)
    with pytest.raises(HFViTError, match=r"no space left for .*README.md \(.* MB free\): free some space"):
        atomic_write(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [RuntimeError("I/O error: No space left on device (os error 28)"), MemoryError()])
def test_a_library_that_finds_the_disk_full_in_its_own_words(tmp_path, error):
    full = isinstance(error, RuntimeError)
    with pytest.raises(HFViTError if full else MemoryError), atomic_path(tmp_path / "model.safetensors"):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    target = tmp_path / "model"
    for name in ("config.json", "weights"):
        with atomic_folder(target) as temporary:
            (temporary / name).write_text(name)
            os.chmod(temporary / name, 0o600)
        assert [file.name for file in target.iterdir()] == [name]
        assert stat.S_IMODE((target / name).stat().st_mode) == stat.S_IMODE(target.stat().st_mode) & 0o666
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(HFViTError, match=r"no space left for .*model \(0.0 MB written"), atomic_folder(target) as new:
        (new / "config.json").write_text("new")
    assert [file.name for file in target.iterdir()] == ["weights"] and len(list(tmp_path.iterdir())) == 1


def test_a_kill_between_the_renames_brings_the_old_folder_back(tmp_path):
    (tmp_path / ".replaced-model").mkdir()
    (tmp_path / ".replaced-model" / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "model"):
        raise ZeroDivisionError
    assert (tmp_path / "model" / "old").is_file()


def test_only_regular_files_and_folders_are_destinations(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    for name, kind in (("fifo", "a FIFO"), ("dangling", "a dangling link"), ("folder", "a folder")):
        with pytest.raises(HFViTError, match=f"{name} is {kind}, not a regular file"):
            atomic_write(tmp_path / name, "x")
    with pytest.raises(HFViTError, match="is a device"):
        atomic_write("/dev/null", "x")
    with pytest.raises(HFViTError, match="fifo is a FIFO, not a folder"), atomic_folder(tmp_path / "fifo"):
        pass
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_an_output_folder_has_no_other_things_name(tmp_path):
    check_folder(tmp_path)
    check_folder(tmp_path / "new")
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name, kind in (("file", "a file"), ("gone", "a dangling link")):
        with pytest.raises(HFViTError, match=f"{name} is {kind}, not a folder: give another path"):
            check_folder(tmp_path / name)
