"""Which files of a folder are images: by suffix or first bytes, links followed once, what is left out named.

python -m pytest tests/hf_vit/test_image_files.py
"""

import os

import pytest
from PIL import Image

from hf_vit.cli.inputs import find_images, read_images
from hf_vit.image_files import AGAIN, CLOSED, DANGLING, HEIC, HIDDEN, NOT_IMAGES, RUN, SPECIAL, walk


@pytest.fixture
def folder(tmp_path):
    formats = {"a/1.png": "PNG", "a/b/2.JPG": "JPEG", "3.jfif": "JPEG", "a/4.tga": "TGA", "a/5.jp2": "JPEG2000"}
    for name, format in formats.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name, format)
    return tmp_path


def names(found):
    return [os.fsdecode(name) for name in found.images()]


IMAGES = ["3.jfif", "a/1.png", "a/4.tga", "a/5.jp2", "a/b/2.JPG"]


def test_suffix_or_first_bytes_decide_and_the_rest_is_counted(folder):
    (folder / "a/no_suffix").write_bytes((folder / "a/1.png").read_bytes())
    (folder / "a/renamed.heic").write_bytes((folder / "a/1.png").read_bytes())
    (folder / "a/photo.heic").write_bytes(b"\x00\x00\x00\x18ftypheic\0\0\0\0mif1heic")
    (folder / "a/download").write_bytes(b"\x00\x00\x00\x18ftypmif1\0\0\0\0mif1heic")
    (folder / "a/notes.txt").write_text("x")
    (folder / "a/._1.png").write_bytes(b"\0\5\26\7")
    (folder / "__MACOSX").mkdir()
    (folder / "a/gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "a/pipe.png")
    found = walk(folder)
    assert names(found) == sorted([*IMAGES, "a/no_suffix", "a/renamed.heic"])
    counts = dict(found.left_out.counts)
    assert counts == {HEIC: 2, NOT_IMAGES: 1, HIDDEN: 2, DANGLING: 1, SPECIAL: 1}
    assert "1 links to nothing (a/gone.png)" in str(found.left_out)


def test_names_need_not_be_utf8(folder, capsys):
    odd = os.fsencode(folder) + b"/a/\xff\xe9.png"
    os.link(folder / "a/1.png", odd)
    paths = find_images([str(folder)])
    assert len(paths) == len(IMAGES) + 1
    unreadable = []
    os.truncate(odd, 20)
    list(read_images(paths, 3, unreadable))
    assert [row["image"].encode() for row in unreadable]  # can be printed


def test_links_to_folders_are_followed_once(folder):
    (folder / "a/up").symlink_to(folder)
    (folder / "a/b/up").symlink_to("..")
    found = walk(folder)
    assert names(found) == IMAGES and found.left_out.counts[AGAIN] == 2
    (folder / "c").symlink_to(folder / "a/b")  # a class that shows the images of another folder
    assert names(walk(folder)) == sorted([*IMAGES, "c/2.JPG"])


def test_two_links_in_a_circle_end(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "x/1.png")
    (tmp_path / "x/y").symlink_to("../y")
    (tmp_path / "y/x").symlink_to("../x")
    assert "x/1.png" in names(walk(tmp_path))
    assert len(names(walk(tmp_path))) <= 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_closed_folder_is_named(folder):
    (folder / "a/b").chmod(0)
    try:
        assert walk(folder).left_out.counts[CLOSED] == 1
    finally:
        (folder / "a/b").chmod(0o755)


def test_predict_says_what_it_leaves_out(folder, capsys):
    (folder / "a/notes.txt").write_text("x")
    assert len(find_images([str(folder)])) == len(IMAGES)
    assert "left out" in (said := capsys.readouterr().err) and "1 not images (a/notes.txt)" in said


def test_outputs_of_a_training_run_are_no_images(folder):
    run = folder / "out"
    (run / "checkpoint-2").mkdir(parents=True)
    (run / "config_resolved.yaml").write_text("max_steps: 2\n")
    for place in (run, run / "checkpoint-2"):
        Image.new("RGB", (8, 8)).save(place / "training_curve.png")
    before = walk(folder).images()
    assert walk(folder).left_out.counts[RUN] == 1 and not any(b"out/" in name for name in before)
    (run / "config_resolved.yaml").unlink()
    assert any(b"out/" in name for name in walk(folder).images())
