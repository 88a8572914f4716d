"""Every kind of image file comes out as the upright RGB image that a viewer shows."""

import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_vit.image_io import (
    MAX_PIXELS,
    UnreadableImage,
    decode,
    decode_window,
    format_of,
    open_encoded,
    open_image,
    upright_size,
    without_rows_below,
)
from hf_vit.tiff_check import END_OF_BLOCK


HEIGHT, WIDTH = 24, 40

# What a viewer does with the stored pixels for each value of the EXIF tag.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


def scene(height=HEIGHT, width=WIDTH):
    """A smooth image without symmetry, uint8 (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([240 * x / width, 210 * y / height, 120 * (x / width + y / height)], axis=2).astype(np.uint8)


def reopened(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return open_encoded(buffer.getvalue(), "image")


def pixels(opened, **options):
    image = decode(opened, "image", **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_exif_rotation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    opened = reopened(Image.fromarray(scene()), format, exif=exif, **options)
    expected = UPRIGHT[orientation](scene()).astype(int)
    assert upright_size(opened, "image") == (expected.shape[1], expected.shape[0])
    assert np.abs(pixels(opened) - expected).max() <= (6 if format == "JPEG" else 0)


def test_scaled_decoding_shows_the_same_image_never_too_small():
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        full = Image.fromarray(scene(480, 640))
        expected = Image.fromarray(UPRIGHT[orientation](scene(480, 640)))
        for target, factor in ((300, 1), (200, 1), (160, 2), (100, 2), (75, 4), (4, 8)):
            opened = reopened(full, "JPEG", quality=95, exif=exif)
            window = (10.0, expected.height - 320.0, 330.0, float(expected.height))
            small, box = decode_window(opened, "image", window, (target, target))
            assert box == tuple(side / factor for side in window)
            assert small.size == (expected.width // factor, expected.height // factor)
            difference = np.asarray(small).astype(int) - np.asarray(expected.resize(small.size, Image.Resampling.BOX))
            assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("restart", [0, 3])
def test_rows_below_a_window_are_not_decoded_and_the_others_are_unchanged(subsampling, restart):
    noise = np.random.default_rng(0).integers(0, 256, (203, 150, 3), dtype=np.uint8)
    options = {"quality": 80, "subsampling": subsampling, "restart_marker_blocks": restart}
    whole = pixels(reopened(Image.fromarray(noise), "JPEG", **options))
    for lower in (1, 15, 16, 17, 60, 100, 160):
        opened = reopened(Image.fromarray(noise), "JPEG", **options)
        part, box = decode_window(opened, "image", (0.0, 0.0, 150.0, float(lower)), (150, lower))
        assert box == (0.0, 0.0, 150.0, lower) and part.width == 150 and lower <= part.height < lower + 40
        np.testing.assert_array_equal(np.asarray(part)[:lower], whole[:lower])


def test_files_of_several_scans_are_decoded_whole():
    noise = np.random.default_rng(0).integers(0, 256, (203, 150, 3), dtype=np.uint8)
    opened = reopened(Image.fromarray(noise), "JPEG", progressive=True)
    assert decode_window(opened, "image", (0.0, 0.0, 150.0, 20.0), (150, 20))[0].size == (150, 203)
    for damaged in (b"", b"\xff\xd8", b"\xff\xd8\xff\xc0\x00\x04", b"\xff\xd8\xff\xda\x00\x04\x03\x00", bytes(100)):
        assert without_rows_below(damaged, 5) is None


@settings(max_examples=60, deadline=None)
@given(damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
       keep=st.floats(0.02, 1.0))  # fmt: skip
def test_damaged_files_are_decoded_or_named_and_nothing_else(damage, keep):
    buffer = io.BytesIO()
    Image.fromarray(scene(60, 80)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    header = 640  # most of the damage goes where lengths and sizes are
    for place, value in damage:
        data[int(place * header)] = value
    data = bytes(data[: int(keep * len(data))])
    try:
        opened = open_encoded(data, "cat")
        width, height = upright_size(opened, "cat")
        image, _ = decode_window(opened, "cat", (0.0, 0.0, width, max(1.0, height / 3)), (16, 16))
        assert image.mode == "RGB"
    except UnreadableImage as error:
        assert str(error).startswith("cat: ")


def test_gray_palette_cmyk_and_one_bit():
    rgb = Image.fromarray(scene())
    gray = pixels(reopened(rgb.convert("L"), "PNG"))
    assert (gray == np.asarray(rgb.convert("L"))[..., None]).all()
    palette = pixels(reopened(rgb.quantize(200), "PNG"))
    assert np.abs(palette - scene()).mean() < 6
    cmyk = pixels(reopened(rgb.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(cmyk - scene()).max() <= 6
    bits = pixels(reopened(rgb.convert("1"), "PNG"))
    assert set(np.unique(bits)) == {0, 255}


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    expected = np.rint(ramp / 257)
    for format in ("PNG", "TIFF"):
        opened = reopened(Image.fromarray(ramp.astype(np.uint16)), format)
        assert np.abs(pixels(opened)[..., 0] - expected).max() <= 1
    shares = pixels(reopened(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"))
    assert np.abs(shares[..., 0] - expected).max() <= 1


def test_transparency_is_laid_on_white():
    rgba = np.dstack([scene(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    rgba[:, : WIDTH // 2, 3] = 0
    result = pixels(reopened(Image.fromarray(rgba), "PNG"))
    assert (result[:, : WIDTH // 2] == 255).all()
    assert (result[:, WIDTH // 2 :] == scene()[:, WIDTH // 2 :]).all()
    half = np.dstack([np.zeros((2, 2), np.uint8), np.full((2, 2), 128, np.uint8)])
    assert np.abs(pixels(reopened(Image.fromarray(half, mode="LA"), "PNG")) - 127).max() <= 1
    clear = Image.new("P", (2, 2), 1)
    clear.putpalette([0, 0, 0, 10, 20, 30])
    assert (pixels(reopened(clear, "PNG", transparency=1)) == 255).all()


def test_one_pixel_is_an_image():
    assert pixels(reopened(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]
    opened = reopened(Image.new("RGB", (1, 1), (9, 9, 9)), "JPEG")
    image, box = decode_window(opened, "image", (0.0, 0.0, 1.0, 1.0), (224, 224))
    assert image.size == (1, 1) and box == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"not an image", b"\xff\xd8\xff\xe0\x00\x10JFIF", b"\x89PNG\r\n\x1a\n"]
)
def test_broken_files_are_named(data):
    with pytest.raises(UnreadableImage, match=r"^cat\.jpg: ") as error:
        decode(open_encoded(data, "cat.jpg"), "cat.jpg")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_files_are_named(format):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format)
    with pytest.raises(UnreadableImage, match=r"^cat: "):
        decode(open_encoded(buffer.getvalue()[: len(buffer.getvalue()) // 2], "cat"), "cat")


def tiff_of_parts(parts, tags):
    """A TIFF of strips or tiles that are encoded already; Pillow writes one strip size and no tiles."""
    data, offsets = bytearray(b"II*\0\0\0\0\0"), []
    for part in parts:
        offsets.append(len(data))
        data += part
    data += bytes(len(data) % 2)
    place, values = (324, 325) if 322 in tags else (273, 279)
    tags = sorted({**tags, place: offsets, values: [len(part) for part in parts]}.items())
    data[4:8] = len(data).to_bytes(4, "little")
    rest = len(data) + 2 + 12 * len(tags) + 4
    directory, lists = struct.pack("<H", len(tags)), b""
    for tag, value in tags:
        value = value if isinstance(value, list) else [value]
        packed = struct.pack(f"<{len(value)}I", *value)
        directory += struct.pack("<HHI", tag, 4, len(value))
        directory += packed if len(value) == 1 else struct.pack("<I", rest + len(lists))
        lists += packed if len(value) > 1 else b""
    return bytes(data) + directory + bytes(4) + lists


def jpeg(width, height):
    buffer = io.BytesIO()
    Image.fromarray(scene(height, width)).convert("L").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


GRAY_TIFF = {256: WIDTH, 257: HEIGHT, 258: 8, 262: 1, 277: 1}


@pytest.mark.parametrize(
    "size, tags, parts",
    [((16, 16), {322: 16, 323: 16}, 6), ((WIDTH, 8), {278: 8}, 3), ((WIDTH, HEIGHT), {278: 2**32 - 1}, 1)],
)
def test_parts_of_a_tiff_that_leave_pixels_without_a_value_are_named(size, tags, parts):
    """libtiff only warns of a JPEG that is smaller than its place, and shows memory that nobody has written."""
    tags = GRAY_TIFF | tags | {259: 7}
    good = [jpeg(*size)] * parts
    assert pixels(open_encoded(tiff_of_parts(good, tags), "image")).shape == (HEIGHT, WIDTH, 3)
    for small in (jpeg(size[0] // 2, size[1]), jpeg(size[0], size[1] // 2)):
        with pytest.raises(UnreadableImage, match=r"^image: .*a JPEG of"):
            open_image(tiff_of_parts([*good[:-1], small], tags), name="image")
    if parts > 1:
        with pytest.raises(UnreadableImage, match=rf"^image: .*{parts - 1} of the {parts} parts"):
            open_image(tiff_of_parts(good[:-1], tags), name="image")


def test_the_last_strip_of_a_tiff_may_be_shorter():
    parts = [jpeg(WIDTH, 16), jpeg(WIDTH, 8)]
    assert pixels(open_encoded(tiff_of_parts(parts, GRAY_TIFF | {259: 7, 278: 16}), "image")).std() > 30


def test_a_tiff_of_raw_strips_that_are_missing_is_named():
    strips = [bytes([200] * 8 * WIDTH)] * 3
    tags = GRAY_TIFF | {259: 1, 278: 8}
    assert pixels(open_encoded(tiff_of_parts(strips, tags), "image")).min() == 200
    with pytest.raises(UnreadableImage, match="2 of the 3 parts"):
        open_image(tiff_of_parts(strips[:2], tags), name="image")


@pytest.mark.parametrize("fill_order", [1, 2])
@pytest.mark.parametrize("rows_per_strip", [HEIGHT, 10])
@pytest.mark.parametrize("width", [1, WIDTH])
def test_a_fax_that_ends_before_its_last_row_is_named(width, rows_per_strip, fill_order):
    """libtiff says nothing, and the rows that are missing show memory that nobody has written."""
    image = Image.fromarray(np.random.default_rng(0).random((HEIGHT, width)) > 0.5)
    buffer = io.BytesIO()
    tags = {266: fill_order, 278: rows_per_strip}
    image.save(buffer, "TIFF", compression="group4", tiffinfo=tags)
    file = buffer.getvalue()
    assert np.array_equal(pixels(open_encoded(file, "image"))[..., 0] > 0, np.asarray(image))
    stored = Image.open(io.BytesIO(file)).tag_v2
    assert stored[266] == fill_order and len(stored[273]) == -(-HEIGHT // rows_per_strip)
    place, size = stored[273][-1], stored[279][-1]
    order = "little" if fill_order == 2 else "big"
    bits = np.unpackbits(np.frombuffer(file[place : place + size], np.uint8), bitorder=order)
    bits[bits.size // 2 :] = 0
    bits[bits.size // 2 : bits.size // 2 + 24] = list(map(int, END_OF_BLOCK))[: bits.size - bits.size // 2]
    cut = file[:place] + np.packbits(bits, bitorder=order).tobytes() + file[place + size :]
    if width == 1:  # a row of one pixel can be one bit
        return
    with pytest.raises(UnreadableImage, match=r"^image: cannot be decoded \(part . of . ends before its last row"):
        open_image(cut, name="image")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UnreadableImage, match=r"^cat: "):
        open_encoded(tmp_path / "cat.png", "cat")


def test_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(UnreadableImage, match=r"^bomb\.png: refused"):
        open_encoded(path, "bomb.png")
    assert 13_000**2 < MAX_PIXELS < 20_000**2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as programs do that read large images
    with pytest.raises(UnreadableImage, match=r"^bomb\.png: refused, 20000x20000 px"):
        open_encoded(path, "bomb.png")


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_scaled_decoding_is_not_shifted_by_the_orientation(orientation):
    """Sides that a half or a quarter does not divide: the partial pixel comes to the left in some orientations."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    y, x = np.mgrid[0:141, 0:223]
    waves = 128 + 60 * np.sin(x / 5) + 60 * np.cos(y / 4)
    gray = Image.fromarray(waves.astype(np.uint8)).convert("RGB")
    opened = reopened(gray, "JPEG", quality=95, exif=exif)
    whole = decode(reopened(gray, "JPEG", quality=95, exif=exif), "image")
    width, height = whole.size
    for window in ((0.0, 0.0, width, height), (10.0, 20.0, width - 30.0, height - 6.0)):
        opened = reopened(gray, "JPEG", quality=95, exif=exif)
        small, box = decode_window(opened, "image", window, (20, 20))
        assert small.width < whole.width / 2
        seen = np.asarray(small.resize((20, 20), Image.Resampling.BILINEAR, box=box)).astype(int)
        expected = np.asarray(whole.resize((20, 20), Image.Resampling.BILINEAR, box=window)).astype(int)
        assert np.abs(seen - expected).mean() < 2.5


@pytest.mark.parametrize("orientation", (5, 6, 7, 8))
def test_sides_of_a_tiff_are_exchanged_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "TIFF", exif=exif)
    image = open_image(buffer.getvalue())
    np.testing.assert_array_equal(np.asarray(image), UPRIGHT[orientation](scene()))
    assert np.array_equal(np.asarray(open_image(image)), np.asarray(image))  # decoding twice changes nothing


def test_first_bytes_tell_what_an_image_is():
    writes_qoi = ["QOI"] if "QOI" in Image.SAVE else []  # from Pillow 11.3
    for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM", *writes_qoi):
        buffer = io.BytesIO()
        Image.fromarray(scene()).save(buffer, format)
        assert format_of(buffer.getvalue()[:64]) == format
    heic = b"\x00\x00\x00\x18ftypheic\0\0\0\0mif1heic"
    assert format_of(heic) == "HEIC" and format_of(b"") is None and format_of(b"#include <stdio.h>") is None
    with pytest.raises(UnreadableImage, match=r"photo\.jpg: HEIC, which Pillow cannot read; convert it"):
        open_image(heic, name="photo.jpg")
    with pytest.raises(UnreadableImage, match="cat: the file is empty"):
        open_image(b"", name="cat")
    with pytest.raises(UnreadableImage):  # a program that another one would run
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", name="a")


def test_warnings_of_pillow_stay_off_for_one_thread_while_others_leave():
    from hf_vit.image_io import QUIET

    before = list(warnings.filters)
    with QUIET:
        with QUIET:
            pass
        assert len(warnings.filters) > len(before)
    assert warnings.filters == before
