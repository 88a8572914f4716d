"""build.py: a kernel is built once; compilers and cached libraries that are broken, missing or not ours are one line.

python -m pytest tests/hf_vit/inference/test_build.py
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from hf_vit import private_cache
from hf_vit.inference import build


if build.compiler() is None and not os.environ.get("CXX"):
    pytest.skip("needs a C++ compiler", allow_module_level=True)
if build.sys.platform != "linux" or build.platform.machine() != "x86_64":
    pytest.skip("kernels are built on Linux on x86-64", allow_module_level=True)

FUNCTIONS = {"twice": [ctypes.c_int]}


@pytest.fixture
def source(monkeypatch, tmp_path):
    """A small kernel, an empty cache folder, and the machine's compiler."""
    monkeypatch.setattr(private_cache, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "FLAGS", ("-shared", "-fPIC", "-O0"))
    monkeypatch.setattr(build.logger, "propagate", True)
    private_cache._first_private_folder.cache_clear()
    file = tmp_path / "kernel.cpp"
    file.write_text('extern "C" int twice(int x) { return 2 * x; }\n')
    yield file
    private_cache._first_private_folder.cache_clear()


@pytest.fixture
def compilations(monkeypatch) -> list:
    """A list that grows by one command at every compilation."""
    commands, compile_ = [], build._compile
    monkeypatch.setattr(
        build, "_compile", lambda command, errors: (commands.append(command), compile_(command, errors))
    )
    return commands


def files(tmp_path: Path, suffix: str) -> list[Path]:
    return sorted((tmp_path / "home" / "hf_vit").glob(f"*{suffix}"))


def works(library) -> bool:
    return library is not None and library.twice(21) == 42


def test_a_kernel_is_built_once_and_kept_for_this_user_alone(source, compilations, tmp_path):
    assert works(build.library(source, FUNCTIONS)) and works(build.library(source, FUNCTIONS))
    assert len(compilations) == 1
    assert (tmp_path / "home" / "hf_vit").stat().st_mode & 0o777 == 0o700
    (library,), (digest,) = files(tmp_path, ".so"), files(tmp_path, ".sha256")
    assert library.stat().st_mode & 0o077 == digest.stat().st_mode & 0o077 == 0
    assert not files(tmp_path, ".build-*")
    source.write_text(source.read_text() + "// another version\n")
    assert works(build.library(source, FUNCTIONS)) and len(compilations) == 2


@pytest.mark.parametrize("damage", ["cut short", "empty", "another", "no digest", "without the function"])
def test_a_damaged_library_is_built_again_before_it_is_loaded(source, compilations, tmp_path, damage):
    assert works(build.library(source, FUNCTIONS))
    (library,), (digest,) = files(tmp_path, ".so"), files(tmp_path, ".sha256")
    content = library.read_bytes()
    library.unlink()  # it is mapped into this process: a new file, as a crash or a full disk leaves it
    if damage == "no digest":
        digest.unlink()
    broken = {"cut short": content[: len(content) // 2], "empty": b"", "another": content[:-1] + b"x"}
    library.write_bytes(broken.get(damage, content))
    if damage == "without the function":
        other = source.with_name("other.cpp")
        other.write_text('extern "C" int thrice(int x) { return 3 * x; }\n')
        subprocess.run([*build.compiler(), *build.FLAGS, str(other), "-o", str(library)], check=True)
        digest.write_text(build._digest(library))
    assert works(build.library(source, FUNCTIONS))
    assert len(compilations) == 2


@pytest.mark.parametrize("planted", ["writable by others", "of another owner"])
def test_a_library_that_another_user_could_have_written_is_not_loaded(
    source, compilations, tmp_path, planted, monkeypatch, caplog
):
    assert works(build.library(source, FUNCTIONS))
    (library,) = files(tmp_path, ".so")
    if planted == "writable by others":
        library.chmod(0o777)
        reason = "is writable by other users"
    else:
        foreign = private_cache._foreign_owner
        monkeypatch.setattr(
            private_cache, "_foreign_owner", lambda path: "user 4711" if path == library else foreign(path)
        )
        reason = "belongs to user 4711"
    loaded = []
    monkeypatch.setattr(build, "_load", lambda path, functions: loaded.append(path) or ctypes.CDLL(str(path)))
    assert works(build.library(source, FUNCTIONS))
    assert loaded and library not in loaded and len(compilations) == 2
    assert reason in caplog.text


def test_a_source_without_the_function_is_not_used(source, tmp_path, caplog):
    source.write_text('extern "C" int thrice(int x) { return 3 * x; }\n')
    assert build.library(source, FUNCTIONS) is None
    assert "has no function 'twice'" in caplog.text and not files(tmp_path, ".so")


def compiler_script(tmp_path: Path, body: str) -> str:
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o700)
    return str(script)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("/bin/false", "failed with exit status 1"),
        ("/bin/true", "built nothing"),
        ("/nowhere/c++", "No such file"),
        ("g++ 'unbalanced", "No closing quotation"),
        ("says", "a line that the compiler says"),
    ],
)
def test_what_is_no_compiler_is_said_in_one_line_and_leaves_nothing(
    source, tmp_path, monkeypatch, caplog, words, reason
):
    if words == "says":
        words = compiler_script(tmp_path, "echo 'a line that the compiler says' >&2; echo another >&2; exit 3")
    monkeypatch.setenv("CXX", words)
    assert build.library(source, FUNCTIONS) is None
    (record,) = [record for record in caplog.records if "kernel.cpp was not compiled" in record.message]
    assert reason in record.message and "PyTorch's own operations serve" in record.message
    assert "\n" not in record.message
    left = [path.name for path in (tmp_path / "home" / "hf_vit").glob("*") if path.suffix != ".lock"]
    assert not left


def test_a_compiler_of_several_words(source, tmp_path, monkeypatch):
    wrapper = compiler_script(tmp_path, 'exec "$@"')  # as ccache does
    monkeypatch.setenv("CXX", f"{wrapper} {shutil.which('g++') or shutil.which('clang++')}")
    assert works(build.library(source, FUNCTIONS))


def test_a_compiler_that_hangs_is_ended_with_its_children(source, tmp_path, monkeypatch, caplog):
    note = tmp_path / "child"
    monkeypatch.setenv("CXX", compiler_script(tmp_path, f"sleep 600 & echo $! > {note}; wait"))
    monkeypatch.setattr(build, "COMPILE_SECONDS", 1.0)
    assert build.library(source, FUNCTIONS) is None
    assert "took more than 1 s" in caplog.text and not files(tmp_path, ".so")
    child = Path("/proc", note.read_text().strip(), "stat")
    for _ in range(200):  # the system takes a moment to end it
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the compiler's child still runs")


def test_a_compiler_that_hangs_is_waited_for_once(source, tmp_path, monkeypatch, caplog):
    note = tmp_path / "runs"
    monkeypatch.setenv("CXX", compiler_script(tmp_path, f"echo run >> {note}; sleep 600"))
    monkeypatch.setattr(build, "COMPILE_SECONDS", 1.0)
    other = source.with_name("other.cpp")
    other.write_text(source.read_text())
    assert build.library(source, FUNCTIONS) is None and build.library(other, FUNCTIONS) is None
    assert note.read_text() == "run\n"
    assert "other.cpp was not compiled" in caplog.text and "took too long before" in caplog.text


def test_a_library_that_is_cut_short_is_not_loaded(source, tmp_path, monkeypatch, caplog):
    """Loading one would end the process with SIGBUS, so first what must notice it."""
    assert works(build.library(source, FUNCTIONS))
    (library,) = files(tmp_path, ".so")
    whole, cut = library.read_bytes(), tmp_path / "cut.so"
    assert build._is_whole(library)
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        assert not build._is_whole(cut)
    compiler = shutil.which("g++") or shutil.which("clang++")
    cutting = f'for last; do :; done; {compiler} "$@" && head -c 1000 "$last" > "$last.x" && mv "$last.x" "$last"'
    monkeypatch.setenv("CXX", compiler_script(tmp_path, cutting))
    assert build.library(source, FUNCTIONS) is None
    assert "is no whole library" in caplog.text and files(tmp_path, ".so") == [library]


@pytest.mark.parametrize(
    ("hidden", "architecture"),
    [
        (set(), "native"),
        ({"avx512_bf16"}, "native"),
        ({"avx512_bf16", "avx512f"}, "x86-64-v3"),
        ({"avx512_bf16", "avx512f", "avx2"}, "x86-64-v2"),
    ],
)
def test_kernels_obey_the_limits_of_the_environment(source, tmp_path, monkeypatch, compilations, hidden, architecture):
    hardware = frozenset({"sse4_2", "avx2", "avx512f", "avx512_bf16"})
    monkeypatch.setattr(build, "hardware_features", lambda: hardware)
    monkeypatch.setattr(build, "features", lambda: hardware)
    build.library(source, FUNCTIONS)
    monkeypatch.setattr(build, "features", lambda: hardware - hidden)
    build.library(source, FUNCTIONS)
    assert f"-march={architecture}" in compilations[-1]
    # kept apart: one for each set of flags
    assert len(files(tmp_path, ".so")) == len(compilations) == (1 if architecture == "native" else 2)


def test_what_a_killed_compilation_left_is_removed(source, tmp_path):
    assert works(build.library(source, FUNCTIONS))
    (library,) = files(tmp_path, ".so")
    left = library.with_name(f"{library.stem}.build-abcdef")
    left.mkdir()
    (left / "half.so").write_bytes(b"half")
    library.unlink()
    assert works(build.library(source, FUNCTIONS))
    assert not left.exists()


def test_a_home_that_cannot_be_written_has_a_private_folder_in_its_place(source, tmp_path, caplog, compilations):
    (tmp_path / "home").write_text("a file in the way")
    assert works(build.library(source, FUNCTIONS)) and works(build.library(source, FUNCTIONS))
    (folder,) = (tmp_path / "temporary").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and len(compilations) == 1


def test_without_any_folder_a_kernel_is_built_for_this_process(source, tmp_path, monkeypatch):
    monkeypatch.setattr(private_cache, "_make_private", lambda folder: f"{folder} is read-only")
    assert works(build.library(source, FUNCTIONS))
    assert not list((tmp_path / "temporary").iterdir())


def test_without_a_compiler_or_on_other_systems_there_is_none(source, monkeypatch, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert build.library(source, FUNCTIONS) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.sys, "platform", "darwin")
        assert build.library(source, FUNCTIONS) is None
    assert not (tmp_path / "home").exists()
