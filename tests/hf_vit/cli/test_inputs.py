"""inputs.py: images found and read ahead in order, upright, within bounds; what is no size, device or number.

pytest tests/hf_vit/cli/test_inputs.py
"""

import argparse

import pytest
import torch
from PIL import Image

from hf_vit.cli import inputs
from hf_vit.errors import HFViTError


@pytest.fixture
def folder(tmp_path):
    for number in range(9):
        Image.new("RGB", (4 + number, 3), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_text("no image")
    return tmp_path


def test_each_once_in_the_order_given(folder):
    found = inputs.find_images([str(folder / "3.png"), str(folder), str(folder / "[12].png")])
    assert [path.name for path in found] == ["3.png", *(f"{n}.png" for n in (0, 1, 2, 4, 5, 6, 7, 8))]
    assert inputs.find_images(["https://example.org/a.png"], addresses=True) == ["https://example.org/a.png"]
    with pytest.raises(HFViTError, match="download the image first"):
        inputs.find_images(["https://example.org/a.png"])
    with pytest.raises(HFViTError, match=r"no image at .*nothing\*"):
        inputs.find_images([str(folder / "nothing*")])


def test_read_in_order_with_a_bounded_number_ahead(folder, monkeypatch):
    begun, read = [], inputs.read_image
    monkeypatch.setattr(inputs, "read_image", lambda path, channels: (begun.append(path), read(path, channels))[1])
    unreadable: list[dict[str, str]] = []
    paths = inputs.find_images([str(folder)])
    images = inputs.read_images(paths, 1, unreadable, lambda image: (image.mode, image.width), in_memory=2)
    assert next(images) == (paths[0], ("L", 4)) and len(begun) <= 3
    assert [width for _, (_, width) in images] == [5, 6, 7, 9, 10, 11, 12]
    assert unreadable == [{"image": str(paths[4]), "reason": "not an image that Pillow can read"}]


def test_images_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert inputs.read_image(tmp_path / "a.jpg", 3).size == (2, 8)


def test_tables_list_images(folder):
    (folder / "deep").mkdir()
    table = folder / "deep" / "t.csv"
    table.write_text("file,note\n../1.png,a\nhttps://example.org/b.png,b\n../gone.png,c\n../1.png,d\n")
    found = inputs.find_images([str(table)], addresses=True)
    assert found == [folder / "deep/../1.png", "https://example.org/b.png", folder / "deep/../gone.png"]
    assert inputs.find_images([str(table)], True, "note", str(folder)) == [folder / name for name in "abcd"]
    for words, message in (
        ([[str(table)]], "'https://example.org/b.png' in .* is an address: download"),
        ([[str(table)], True, "where"], "has no column 'where'; its columns are file, note"),
        ([[str(folder / "1.png")], True, "file"], "--image-column file is for a table"),
        ([[str(folder / "1.png")], True, None, "x"], "--image-root x is for a table"),
    ):
        with pytest.raises(HFViTError, match=message):
            inputs.find_images(*words)
    table.write_text("file\n1.png\n\n \n")
    with pytest.raises(HFViTError, match=r"1 of 2 rows of .* have no path of an image in column 'file': row 2"):
        inputs.find_images([str(table)])


def test_an_accelerator_that_torch_was_built_for_and_the_machine_lacks_is_not_picked(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert inputs.pick_device(None) == torch.device("cpu")


def test_devices_sizes_and_numbers():
    assert inputs.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(HFViTError, match="no device 'nowhere'"):
        inputs.pick_device("nowhere")
    for given, size in ((None, None), ([24], 24), ([24, 16], (24, 16))):
        assert inputs.image_size(argparse.Namespace(image_size=given)) == size
    assert inputs.positive("3") == 3
    for text in ("0", "-1", "1.5", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
            inputs.positive(text)


def test_tables_are_padded_with_numbers_to_the_right(capsys):
    inputs.print_table([["name", "count"], ["a", "1,000"], ["bcdef", "7"], ["alone"]])
    assert capsys.readouterr().out.splitlines() == ["name   count", "a      1,000", "bcdef      7", "alone"]


def test_names_of_files_cannot_break_a_table(capsys):
    inputs.print_table([["a\nb.png", "cat"], ["\x1b[31mred.png", "dog"], ["é ü.png", "cow"]])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[line[0], line[-1].strip()] for line in lines] == [
        ["a\\nb.png", "cat"], ["\\x1b[31mred.png", "dog"], ["é ü.png", "cow"]
    ]  # fmt: skip
