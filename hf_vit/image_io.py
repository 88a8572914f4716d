"""From the bytes of an image file to upright RGB: the one decoder, for training, scoring, predict, inspect and export.

    pixel_values = processor(hf_vit.open_image("cat.jpg"), return_tensors="pt")["pixel_values"]

Gray, palettes, CMYK, 16 bits, floats, transparency (laid on white), EXIF orientation, files that are damaged or too
large: each is settled here and nowhere else, so that a model is used on the pixels that it was trained on. Beside the
standard library it needs Pillow and NumPy alone: a Space carries a copy (hf_vit/hub/space.py). Not transformers'
`load_image`: it cuts 16 bits off at 255 and lets transparent pixels show what lies under them.
"""

import io
import os
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import ceil
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL import TiffImagePlugin as tiff

from .errors import LFS_POINTER, HFViTError
from .image_processing import ImageProcessing


# Pillow's own limit for "decompression bombs", twice Image.MAX_IMAGE_PIXELS: half a gigabyte of RGB in memory.
MAX_PIXELS = 178_956_970
# Longer images are resized where the crop looks alone: 1 x 65,500 px with the short side at 256 would need 41 GB.
MAX_ASPECT = 100

# Formats of Pillow that hold pixels. Not EPS, PDF or WMF, which are programs that another program would run.
FORMATS = (
    "JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "ICO", "TGA", "QOI", "DDS", "PSD",
    "SGI", "SUN",
)  # fmt: skip
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpf", ".jpx", ".avif", ".ico", ".tga", ".qoi",
    ".dds", ".psd", ".sgi", ".ras",
))  # fmt: skip
# Files of these suffixes are not opened to see whether they are images: captions can be as many as images.
OTHER_SUFFIXES = frozenset((
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".xml", ".yaml", ".yml", ".md", ".html",
    ".htm", ".pdf", ".py", ".ipynb", ".sh", ".npy", ".npz", ".pt", ".pth", ".bin", ".safetensors", ".onnx",
    ".h5", ".pkl", ".db", ".ini", ".log", ".lock", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z",
    ".rar", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".mp3", ".wav", ".svg", ".eps", ".doc", ".docx", ".xls",
    ".xlsx",
))  # fmt: skip
HEIC_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
HEAD_BYTES = 64  # enough to tell what a file is

# Second bytes of JPEG markers
SEQUENTIAL_FRAMES = (0xC0, 0xC1)
OTHER_FRAMES = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
START_OF_SCAN = 0xDA

# Values of TIFF tags
JPEG_IN_TIFF, GROUP4 = 7, 4
YCBCR = 6
LONG = 4
END_OF_BLOCK = 2 * "000000000001"  # of the fax code

ANY_LENGTH = 1 << 30

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATIONS_THAT_SWAP_SIDES = (5, 6, 7, 8)
# Orientations in which the file's right edge, or its lower edge, comes to the left or the top
RIGHT_EDGE_FIRST = (2, 3, 7, 8)
LOWER_EDGE_FIRST = (3, 4, 6, 7)


class UnreadableImage(HFViTError):
    """An image that cannot be decoded; the message begins with its name."""


class Quiet:
    """Pillow's warnings off while any thread is inside; `warnings.catch_warnings` alone mixes up several threads."""

    def __init__(self):
        self._lock, self._inside = threading.Lock(), 0
        self._filters: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(*error)


QUIET = Quiet()


def open_image(
    source: "str | os.PathLike | bytes | BinaryIO | Image.Image", *, num_channels: int = 3, name: str | None = None
) -> Image.Image:
    """Decode an image to the pixels that models here are trained on: upright, 8 bits, transparency on white.

    Args:
        source: path of a file, its bytes, an open binary file, or a PIL image.
        num_channels: 3 for RGB, 1 for gray: `model.config.num_channels`.
        name: what error messages call the image; by default its path.

    Returns:
        a PIL image of mode "RGB" or "L", at full size.

    Raises:
        UnreadableImage: not an image, damaged, or more than `MAX_PIXELS` pixels.
        HFViTError: another number of channels.
    """
    check_channels(num_channels)
    path = isinstance(source, str | os.PathLike)
    called = name or (printable(os.fspath(source)) if path else "image")  # type: ignore[arg-type]
    image = decode(source if isinstance(source, Image.Image) else open_encoded(source, called), called)
    return image.convert("L") if num_channels == 1 else image


def check_channels(num_channels: int) -> None:
    """Raise HFViTError for a model that images cannot be decoded for."""
    if num_channels not in (1, 3):
        raise HFViTError(f"images are decoded to 1 or 3 channels; the model reads {num_channels}")


def printable(path: "str | bytes | os.PathLike") -> str:
    """A path as text that can be printed and encoded; bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# -- which files are images ------------------------------------------------------------------------------------------


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow reads (AVIF and JPEG 2000 are optional, HEIF is an extension's)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def format_of(head: bytes) -> str | None:
    """The format that a file's first `HEAD_BYTES` bytes tell, "HEIC" included; None: not an image."""
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS and "HEIF" not in readable_formats():
        return "HEIC"
    for name in readable_formats():
        accept = Image.OPEN[name][1]
        try:
            if accept is not None and accept(head[:16]) is True:  # a text: Pillow lacks the library for it
                return name
        except Exception:  # plugins index into what may be shorter
            continue
    return None


def format_of_file(path: "str | bytes | os.PathLike") -> str | None:
    """`format_of` a regular file; None also where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return format_of(file.read(HEAD_BYTES))
    except OSError:
        return None


# -- decoding --------------------------------------------------------------------------------------------------------


def open_encoded(source: "bytes | str | os.PathLike | BinaryIO", name: str) -> Image.Image:
    """Open an image without decoding it: its size and mode are known, its pixels are not.

    Args:
        source: the encoded bytes, the path of the file, or an open file.
        name: what error messages call the image.

    Raises:
        UnreadableImage: not an image, missing, empty, or more than `MAX_PIXELS` pixels.
    """
    data = b""
    try:
        data = encoded_bytes(source)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # bombs are checked below; libraries that Pillow lacks are named there, too
            image = Image.open(io.BytesIO(data), formats=readable_formats())
            if image.format == "TIFF":
                check_tiff(image, data)
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{name}: refused, it would decode to too many pixels ({error})") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{name}: {not_an_image(data)}") from error
    except OSError as error:
        raise UnreadableImage(f"{name}: cannot be read ({error.strerror or one_line(error)})") from error
    except Exception as error:  # Pillow's plugins raise struct.error, SyntaxError, KeyError, ... on damaged data
        raise UnreadableImage(f"{name}: cannot be read ({one_line(error)})") from error
    check_size(image, name)
    return image


def encoded_bytes(source: "bytes | str | os.PathLike | BinaryIO") -> bytes:
    """All bytes of a file."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return file.read()
    return source.read()


def not_an_image(data: bytes) -> str:
    """Why Pillow did not know these bytes."""
    if not data:
        return "the file is empty"
    if format_of(data[:HEAD_BYTES]) == "HEIC":
        return "HEIC, which Pillow cannot read; convert it to JPEG or PNG"
    if data.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the image itself: run `git lfs pull` where it was cloned"
    return "not an image that Pillow can read"


def check_size(image: Image.Image, name: str) -> None:
    """Raise UnreadableImage for more than `MAX_PIXELS` pixels."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise UnreadableImage(
            f"{name}: refused, {width}x{height} px would decode to more than {MAX_PIXELS:,} pixels; "
            "shrink the file or remove it"
        )


@dataclass(frozen=True)
class TiffParts:
    """The strips or tiles of a TIFF: where they begin, how many bytes they have, and their pixels."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    width: int
    height: int  # of all but the last strips, which end with the image
    columns: int
    rows: int
    tiled: bool
    image_height: int

    @classmethod
    def of(cls, tags: Any) -> "TiffParts":
        width, height = tags[tiff.IMAGEWIDTH], tags[tiff.IMAGELENGTH]
        if tiled := tiff.STRIPOFFSETS not in tags:
            offsets, sizes = tags[tiff.TILEOFFSETS], tags.get(tiff.TILEBYTECOUNTS, ())
            across, down = tags[tiff.TILEWIDTH], tags[tiff.TILELENGTH]
        else:
            offsets, sizes = tags[tiff.STRIPOFFSETS], tags.get(tiff.STRIPBYTECOUNTS, ())
            across, down = width, min(height, tags.get(tiff.ROWSPERSTRIP, height))
        return cls(offsets, sizes, across, down, ceil(width / across), ceil(height / down), tiled, height)

    def height_of(self, number: int) -> int:
        """Rows of the part of that number."""
        return self.height if self.tiled else min(self.height, self.image_height - number % self.rows * self.height)


def check_tiff(image: Any, data: bytes) -> None:
    """Raise ValueError for a TIFF whose strips or tiles leave a part of the image without pixels.

    Pillow leaves what no strip covers black. Of a JPEG that is smaller than its strip, libtiff warns only, and the
    rest shows whatever was in memory before (JPEGPreDecode in tif_jpeg.c).
    """
    tags = image.tag_v2
    parts = TiffParts.of(tags)
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
            raise ValueError(f"a JPEG of {size[0]}x{size[1]} px in the place of {width}x{height}")


def check_group4(image: Any) -> None:
    """Raise ValueError for a TIFF in the fax code T.6 where a strip or tile ends before its last row.

    libtiff says nothing of it, and the rows that are missing show whatever was in memory before (Fax4Decode in
    tif_fax3.c). Pillow decodes all strips of a file into the same memory: so each is decoded behind a strip of white
    rows and behind one of rows with a black pixel, and what is missing shows these.
    """
    tags = image.tag_v2
    if tags.get(tiff.COMPRESSION) != GROUP4:
        return
    parts, data = TiffParts.of(tags), image.fp.getvalue()
    if 2 * parts.width * parts.height > MAX_PIXELS:
        return  # memory of that size comes from the system, and is zero
    reverse = tags.get(tiff.FILLORDER, 1) == 2
    for number, (offset, size) in enumerate(zip(parts.offsets, parts.sizes, strict=False)):
        rows, shown = parts.height_of(number), []
        first, more = "00100110101010" + "1" * (parts.width > 1), "11" + "1" * (parts.width > 1)
        for before in ("1" * rows, first + more * (rows - 1)):
            strips = [packed(before + END_OF_BLOCK, reverse), data[offset : offset + size]]
            file = group4_tiff(parts.width, rows, strips, reverse)
            shown.append(Image.open(io.BytesIO(file), formats=("TIFF",)).crop((0, rows, parts.width, 2 * rows)))
        if shown[0].tobytes() != shown[1].tobytes():
            raise ValueError(f"part {number + 1} of {len(parts.offsets)} ends before its last row")


def packed(bits: str, reverse: bool) -> bytes:
    """A string of 0 and 1 as bytes, the first bit highest, or lowest for TIFF's FillOrder 2."""
    return np.packbits(np.frombuffer(bits.encode(), np.uint8) & 1, bitorder="little" if reverse else "big").tobytes()


def group4_tiff(width: int, rows: int, strips: list[bytes], reverse: bool) -> bytes:
    """A TIFF of strips of so many rows in the fax code T.6."""
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
    directory.save(file)  # which moves the offsets behind itself
    return file.getvalue() + b"".join(strips)


def jpeg_size(data: bytes, start: int) -> tuple[int, int] | None:
    """Width and height in the frame header of the JPEG that starts there; None where there is none."""
    place = start + 2
    while place + 9 <= len(data) and data[place] == 0xFF and data[place + 1] != START_OF_SCAN:
        if data[place + 1] in SEQUENTIAL_FRAMES + OTHER_FRAMES:
            return int.from_bytes(data[place + 7 : place + 9], "big"), int.from_bytes(
                data[place + 5 : place + 7], "big"
            )
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def decode(image: Image.Image, name: str) -> Image.Image:
    """Decode an opened image to upright RGB at full size.

    Args:
        image: from `open_encoded`; also any other PIL image.
        name: what error messages call the image.

    Raises:
        UnreadableImage: truncated or damaged data.
    """
    try:
        with QUIET:  # of damaged metadata, of palettes whose transparency is in bytes
            if image.format == "TIFF" and isinstance(getattr(image, "fp", None), io.BytesIO):
                check_group4(image)
            image.load()  # of a TIFF, this turns the image already, and takes the tag away
            turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
            # By hand: ImageOps.exif_transpose also writes the metadata anew, which fails where they are damaged.
            return to_rgb(image if turn is None else transposed(image, turn))
    except Exception as error:  # as above
        raise UnreadableImage(f"{name}: cannot be decoded ({one_line(error)})") from error


def transposed(image: Image.Image, turn: Image.Transpose) -> Image.Image:
    """The image turned, without the metadata that would turn it again, with what `to_rgb` reads."""
    result = image.transpose(turn)
    result.info = {key: image.info[key] for key in ("transparency",) if key in image.info}
    return result


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: 16 bits scaled to 8, transparency laid on white, palettes and CMYK expanded."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(deep_gray_to_bytes(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def deep_gray_to_bytes(image: Image.Image) -> np.ndarray:
    """Gray of more than 8 bits as uint8 (H, W). Pillow alone would clip it at 255 and return a white image.

    Integers count to 65535 when any pixel exceeds 255; floats count to 1 when none exceeds it, else to 255.
    """
    with np.errstate(invalid="ignore"):  # of signaling NaNs, which damaged files hold
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = pixels.max(initial=0.0)
    if image.mode == "F":
        scale = 255.0 if peak <= 1.0 else 1.0
    else:
        scale = 1.0 if image.mode == "I" and peak <= 255.0 else 255.0 / 65535.0
    return np.clip(np.rint(pixels * scale), 0, 255).astype(np.uint8)


# -- decoding less than all: for training, which may look at a JPEG at half its size ---------------------------------


def upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    """Width and height of a JPEG after the EXIF rotation, in pixels of the file, without decoding it."""
    width, height = image.size
    return (height, width) if orientation(image, name) in ORIENTATIONS_THAT_SWAP_SIDES else (width, height)


def orientation(image: Image.Image, name: str) -> int:
    """The value of the EXIF tag, 1 (upright) where there is none; raises UnreadableImage."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # as above
        raise UnreadableImage(f"{name}: cannot be decoded ({one_line(error)})") from error


def scales(image: Image.Image) -> bool:
    """Whether `decode_window` can decode an opened image at a fraction of its size."""
    return image.format in ("JPEG", "MPO")


def decode_window(
    image: Image.Image, name: str, window: tuple[float, float, float, float], target: tuple[int, int]
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Decode an opened JPEG to upright RGB, as much of it as a window needs.

    It is decoded at 1/2, 1/4 or 1/8 of its size (inside the inverse DCT, where it costs least) as long as the window
    is left with `target` pixels, and not below the window where its coding allows to stop.

    Args:
        window: left, upper, right, lower in pixels of the upright image. target: width and height in pixels.

    Returns:
        the image, and the window in its pixels.
    """
    turn = orientation(image, name)
    width, height = upright_size(image, name)
    left, upper, right, lower = window
    enough = (width * min(1.0, target[0] / (right - left)), height * min(1.0, target[1] / (lower - upper)))
    if turn in ORIENTATIONS_THAT_SWAP_SIDES:
        enough = enough[::-1]
    file = getattr(image, "fp", None)
    if image.format == "JPEG" and turn == 1 and lower < 0.95 * height and isinstance(file, io.BytesIO):
        shorter = without_rows_below(file.getvalue(), ceil(lower))
        if shorter is not None:
            enough = (enough[0], enough[1] * shorter[1] / height)
            image = open_encoded(shorter[0], name)
    full_width, full_height = image.size
    # All bytes at once: at the end of each 64 KiB libjpeg reads a bit at a time
    setattr(image, "decodermaxblock", ANY_LENGTH)  # noqa: B010 - of JPEG files' own class
    try:
        drafted = image.draft(None, (max(1, ceil(enough[0])), max(1, ceil(enough[1]))))
    except Exception as error:  # as above
        raise UnreadableImage(f"{name}: cannot be decoded ({one_line(error)})") from error
    scale = 1.0 if drafted is None else drafted[1][2] / full_width
    # The last column of 2047 decoded at 1/2 covers one pixel, not two. Where the orientation brings it to the left,
    # all others lie that much further to the right.
    right_rest = image.width - full_width * scale if turn in RIGHT_EDGE_FIRST else 0.0
    lower_rest = image.height - full_height * scale if turn in LOWER_EDGE_FIRST else 0.0
    across, down = (lower_rest, right_rest) if turn in ORIENTATIONS_THAT_SWAP_SIDES else (right_rest, lower_rest)
    decoded = decode(image, name)
    box = (left * scale + across, upper * scale + down, right * scale + across, lower * scale + down)
    return decoded, (box[0], box[1], min(box[2], decoded.width), min(box[3], decoded.height))


def without_rows_below(data: bytes, row: int) -> tuple[bytes, int] | None:
    """A JPEG that ends some rows below `row`, by writing a smaller height into its frame header.

    The rows above come out the same: a single sequential scan is coded from top to bottom, and the decoder does not
    look at what follows (ITU-T T.81, B.2.2).

    Returns:
        the bytes and the new height; None for progressive or multi-scan files, or where nothing would be saved.
    """
    offset, frame = 2, None
    while offset + 4 <= len(data) and data[offset] == 0xFF and data[offset + 1] != START_OF_SCAN:
        marker = data[offset + 1]
        if marker in SEQUENTIAL_FRAMES:
            frame = offset
        elif marker in OTHER_FRAMES:
            return None
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    if frame is None or offset + 4 >= len(data) or data[offset + 1] != START_OF_SCAN:
        return None
    components = data[frame + 9]
    if not 1 <= components <= 4 or data[offset + 4] != components or frame + 20 > len(data):  # or a scan per component
        return None
    block = 8 * max(1, *(data[frame + 11 + 3 * component] & 0x0F for component in range(components)))
    height = (row // block + 2) * block  # one row of blocks to spare: smoothing of colors looks across the border
    if height >= int.from_bytes(data[frame + 5 : frame + 7], "big"):
        return None
    return b"".join((data[: frame + 5], height.to_bytes(2, "big"), memoryview(data)[frame + 7 :])), height


def processor_pixels(processor: Any, image: Image.Image) -> Any:
    """What an image processor of transformers makes of an image of `open_image`: a torch tensor (1, C, H, W).

    Raises:
        HFViTError: settings that do not fit the image, such as three means for one channel.
    """
    options = {}
    if max(image.size) > MAX_ASPECT * min(image.size):
        image = ImageProcessing.from_transformers(processor.to_dict()).resize_and_crop(image)
        options = {"do_resize": False, "do_center_crop": False}
    try:
        return processor([image], return_tensors="pt", **options)["pixel_values"]
    except (ValueError, TypeError, KeyError) as error:
        raise HFViTError(f"the image processor's settings do not fit {image.mode} images: {error}") from error
