"""Does a TIFF hold all of its pixels? Pillow and libtiff decode one that does not, with old memory in the gaps.

The same file then gives other pixels each time it is read. For `image_io.py`; a Space carries a copy of this file.

Tests: tests/hf_vit/test_image_io.py.
"""

import io
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import Any

import numpy as np
from PIL import Image
from PIL import TiffImagePlugin as tiff


# Second bytes of JPEG markers
SEQUENTIAL_FRAMES = (0xC0, 0xC1)
OTHER_FRAMES = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
START_OF_SCAN = 0xDA

# Values of TIFF tags
JPEG_IN_TIFF, GROUP4 = 7, 4
YCBCR = 6
LONG = 4
END_OF_BLOCK = 2 * "000000000001"  # of the fax code


@dataclass(frozen=True)
class TiffParts:
    """The parts of a TIFF: its strips or tiles."""

    offsets: tuple[int, ...]  # bytes from the beginning of the file
    sizes: tuple[int, ...]  # bytes
    width: int  # pixels
    height: int  # pixels, of all but the last strips, which end with the image
    columns: int  # parts side by side
    rows: int  # parts from top to bottom
    tiled: bool
    image_height: int

    @classmethod
    def from_tags(cls, tags: Any) -> "TiffParts":
        width, height = tags[tiff.IMAGEWIDTH], tags[tiff.IMAGELENGTH]
        if tiled := tiff.STRIPOFFSETS not in tags:
            offsets, sizes = tags[tiff.TILEOFFSETS], tags.get(tiff.TILEBYTECOUNTS, ())
            across, down = tags[tiff.TILEWIDTH], tags[tiff.TILELENGTH]
        else:
            offsets, sizes = tags[tiff.STRIPOFFSETS], tags.get(tiff.STRIPBYTECOUNTS, ())
            across, down = width, min(height, tags.get(tiff.ROWSPERSTRIP, height))
        return cls(offsets, sizes, across, down, ceil(width / across), ceil(height / down), tiled, height)

    def height_of(self, number: int) -> int:
        """Rows of pixels of a part, by its number."""
        return self.height if self.tiled else min(self.height, self.image_height - number % self.rows * self.height)


def check_tiff(image: Any, data: bytes) -> None:
    """Raise ValueError for a TIFF whose strips or tiles do not cover the image.

    Pillow leaves uncovered pixels black. For a JPEG that is smaller than its strip, libtiff only warns, and the other
    pixels hold whatever was in memory before (JPEGPreDecode in tif_jpeg.c).
    """
    tags = image.tag_v2
    parts = TiffParts.from_tags(tags)
    separate = tags.get(tiff.PLANAR_CONFIGURATION, 1) == 2
    plane = parts.columns * parts.rows
    needed = plane * (tags.get(tiff.SAMPLESPERPIXEL, 1) if separate else 1)
    if len(parts.offsets) < needed:
        raise ValueError(f"{len(parts.offsets)} of the {needed} parts that its {image.width}x{image.height} px need")
    if tags.get(tiff.COMPRESSION) != JPEG_IN_TIFF:
        return
    for number, offset in enumerate(parts.offsets[:needed]):
        size, width, height = jpeg_size(data, offset), parts.width, parts.height_of(number)
        if separate and number >= plane and tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == YCBCR:
            subsampling = tags.get(tiff.YCBCRSUBSAMPLING, (2, 2))
            width, height = ceil(width / subsampling[0]), ceil(height / subsampling[1])
        if size is not None and (size[0] < width or size[1] < height):
            raise ValueError(f"a JPEG of {size[0]}x{size[1]} px in place of {width}x{height}")


def check_group4(image: Any, max_pixels: int) -> None:
    """Raise ValueError for a TIFF in the fax code T.6 where a strip or tile ends before its last row.

    libtiff does not report it, and the missing rows hold whatever was in memory before (Fax4Decode in tif_fax3.c).
    Pillow decodes all strips of a file into the same memory: each strip is decoded after a strip of white rows, and
    after one of rows with a black pixel, and missing rows differ between the two.

    Args:
        max_pixels: of a file that Pillow opens. Strips of more than half of it are not checked: memory of that size
            comes from the system, and is zero.
    """
    tags = image.tag_v2
    if tags.get(tiff.COMPRESSION) != GROUP4:
        return
    parts, data = TiffParts.from_tags(tags), image.fp.getvalue()
    if 2 * parts.width * parts.height > max_pixels:
        return
    reverse = tags.get(tiff.FILLORDER, 1) == 2
    for number, (offset, size) in enumerate(zip(parts.offsets, parts.sizes, strict=False)):
        rows, decoded = parts.height_of(number), []
        first, more = "00100110101010" + "1" * (parts.width > 1), "11" + "1" * (parts.width > 1)
        for previous in ("1" * rows, first + more * (rows - 1)):  # white rows; rows that begin with a black pixel
            strips = [packed(previous + END_OF_BLOCK, reverse), data[offset : offset + size]]
            file = group4_tiff(parts.width, rows, strips, reverse)
            decoded.append(Image.open(io.BytesIO(file), formats=("TIFF",)).crop((0, rows, parts.width, 2 * rows)))
        if decoded[0].tobytes() != decoded[1].tobytes():
            raise ValueError(f"part {number + 1} of {len(parts.offsets)} ends before its last row")


def packed(bits: str, reverse: bool) -> bytes:
    """A string of 0 and 1 as bytes, the first bit highest, or lowest for TIFF's FillOrder 2."""
    return np.packbits(np.frombuffer(bits.encode(), np.uint8) & 1, bitorder="little" if reverse else "big").tobytes()


def group4_tiff(width: int, rows: int, strips: list[bytes], reverse: bool) -> bytes:
    """A TIFF in the fax code T.6, of strips of `rows` rows each."""
    directory = tiff.ImageFileDirectory_v2()
    for tag, value in (
        (tiff.IMAGEWIDTH, width), (tiff.IMAGELENGTH, rows * len(strips)), (tiff.ROWSPERSTRIP, rows),
        (tiff.BITSPERSAMPLE, 1), (tiff.SAMPLESPERPIXEL, 1), (tiff.PHOTOMETRIC_INTERPRETATION, 0),
        (tiff.COMPRESSION, GROUP4), (tiff.FILLORDER, 2 if reverse else 1),
        (tiff.STRIPOFFSETS, tuple(accumulate(map(len, strips[:-1]), initial=0))),
        (tiff.STRIPBYTECOUNTS, tuple(map(len, strips))),
    ):  # fmt: skip
        directory.tagtype[tag] = LONG
        directory[tag] = value
    file = io.BytesIO()
    directory.save(file)  # adds its own length to the offsets
    return file.getvalue() + b"".join(strips)


def jpeg_size(data: bytes, start: int) -> tuple[int, int] | None:
    """Width and height in the frame header of the JPEG that starts at `start`; None if it has none."""
    offset = start + 2
    while offset + 9 <= len(data) and data[offset] == 0xFF and data[offset + 1] != START_OF_SCAN:
        if data[offset + 1] in SEQUENTIAL_FRAMES + OTHER_FRAMES:
            return int.from_bytes(data[offset + 7 : offset + 9], "big"), int.from_bytes(
                data[offset + 5 : offset + 7], "big"
            )
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return None
