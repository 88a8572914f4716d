"""Decode image files to upright RGB: the one decoder of training, scoring, predict, inspect, export and demo.

    pixel_values = processor(hf_vit.open_image("cat.jpg"), return_tensors="pt")["pixel_values"]

Gray, palettes, CMYK, 16 bits, floats, transparency (composited on white), EXIF orientation, damaged and oversized
files are handled here and nowhere else, so that a model sees the pixels that it was trained on. It needs only Pillow
and NumPy: a Space carries a copy (hf_vit/hub/space.py). Not transformers' `load_image`: it clips 16 bits at 255 and
shows the colors under transparent pixels.
"""

import io
import os
import threading
import warnings
from functools import cache
from math import ceil
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import LFS_POINTER, HFViTError
from .image_processing import ImageProcessing
from .tiff_check import OTHER_FRAMES, SEQUENTIAL_FRAMES, START_OF_SCAN, check_group4, check_tiff


# Pillow's own limit for "decompression bombs", twice Image.MAX_IMAGE_PIXELS: half a gigabyte of RGB in memory.
MAX_PIXELS = 178_956_970
# Of longer images only the part under the crop is resized: 1 x 65,500 px with a short side of 256 would need 41 GB.
MAX_ASPECT = 100

# Pillow's raster formats. Not EPS, PDF or WMF, which Pillow renders by running other programs.
FORMATS = (
    "JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "ICO", "TGA", "QOI", "DDS", "PSD",
    "SGI", "SUN",
)  # fmt: skip
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".jpf", ".jpx", ".avif", ".ico", ".tga", ".qoi",
    ".dds", ".psd", ".sgi", ".ras",
))  # fmt: skip
# Files with these suffixes are not opened to see whether they are images: there can be a caption for every image.
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

UNLIMITED = 1 << 30  # bytes

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
    """Silence Pillow's warnings while any thread is inside; `warnings.catch_warnings` alone is not thread-safe."""

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
    """Decode an image as training does: upright, 8 bits, transparency on white.

    Args:
        source: path of a file, its bytes, an open binary file, or a PIL image.
        num_channels: 3 for RGB, 1 for gray: `model.config.num_channels`.
        name: of the image in error messages; by default its path.

    Returns:
        a PIL image of mode "RGB" or "L", at full size.

    Raises:
        UnreadableImage: not an image, damaged, or more than `MAX_PIXELS` pixels.
        HFViTError: another number of channels.
    """
    check_channels(num_channels)
    path = isinstance(source, str | os.PathLike)
    name = name or (printable(os.fspath(source)) if path else "image")  # type: ignore[arg-type]
    image = decode(source if isinstance(source, Image.Image) else open_encoded(source, name), name)
    return image.convert("L") if num_channels == 1 else image


def check_channels(num_channels: int) -> None:
    """Raise HFViTError unless a model reads 1 or 3 channels."""
    if num_channels not in (1, 3):
        raise HFViTError(f"images are decoded to 1 or 3 channels; the model reads {num_channels}")


def printable(path: "str | bytes | os.PathLike") -> str:
    """A path as text that can be printed and encoded; bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# -- which files are images ------------------------------------------------------------------------------------------


@cache
def readable_formats() -> tuple[str, ...]:
    """The `FORMATS` that this Pillow reads (AVIF and JPEG 2000 are optional, HEIF needs an extension)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def format_of(head: bytes) -> str | None:
    """The image format of a file, also "HEIC", by its first `HEAD_BYTES` bytes; None: not an image."""
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS and "HEIF" not in readable_formats():
        return "HEIC"
    for name in readable_formats():
        accept = Image.OPEN[name][1]
        try:
            if accept is not None and accept(head[:16]) is True:  # a text instead of True: a library is missing
                return name
        except Exception:  # plugins index beyond the end of short files
            continue
    return None


def format_of_file(path: "str | bytes | os.PathLike") -> str | None:
    """`format_of` a regular file; None also if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return format_of(file.read(HEAD_BYTES))
    except OSError:
        return None


# -- decoding --------------------------------------------------------------------------------------------------------


def open_encoded(source: "bytes | str | os.PathLike | BinaryIO", name: str) -> Image.Image:
    """Open an image without decoding it: only its size and mode are read.

    Args:
        source: the encoded bytes, the path of the file, or an open file.
        name: of the image in error messages.

    Raises:
        UnreadableImage: not an image, missing, empty, or more than `MAX_PIXELS` pixels.
    """
    data = b""
    try:
        data = encoded_bytes(source)
        with warnings.catch_warnings():
            # decompression bombs are refused below, and libraries that Pillow lacks are named there
            warnings.simplefilter("ignore")
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
    """Why Pillow does not recognize these bytes."""
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


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def decode(image: Image.Image, name: str) -> Image.Image:
    """Decode an opened image to upright RGB at full size.

    Args:
        image: from `open_encoded`, or any other PIL image.
        name: of the image in error messages.

    Raises:
        UnreadableImage: truncated or damaged data.
    """
    try:
        with QUIET:  # warnings of damaged metadata, and of palettes with transparency in bytes
            if image.format == "TIFF" and isinstance(getattr(image, "fp", None), io.BytesIO):
                check_group4(image, MAX_PIXELS)
            image.load()  # for a TIFF, Pillow already rotates the image here and removes the tag
            method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
            # not ImageOps.exif_transpose: it also writes the metadata again, which fails if they are damaged
            return to_rgb(image if method is None else transposed(image, method))
    except Exception as error:  # plugins raise many kinds, as in `open_encoded`
        raise UnreadableImage(f"{name}: cannot be decoded ({one_line(error)})") from error


def transposed(image: Image.Image, method: Image.Transpose) -> Image.Image:
    """The rotated or mirrored image; of its metadata only what `to_rgb` reads, not the orientation."""
    result = image.transpose(method)
    result.info = {key: image.info[key] for key in ("transparency",) if key in image.info}
    return result


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: 16 bits scaled to 8, transparency composited on white, palettes and CMYK converted."""
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
    """Gray of more than 8 bits as uint8 (H, W). Pillow alone would clip it at 255: a white image.

    White is 65535 for integers if any pixel exceeds 255; for floats it is 1 if no pixel exceeds 1, else 255.
    """
    with np.errstate(invalid="ignore"):  # damaged files may hold signaling NaNs
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = pixels.max(initial=0.0)
    if image.mode == "F":
        scale = 255.0 if peak <= 1.0 else 1.0
    else:
        scale = 1.0 if image.mode == "I" and peak <= 255.0 else 255.0 / 65535.0
    return np.clip(np.rint(pixels * scale), 0, 255).astype(np.uint8)


# -- decoding a part of a JPEG, at a fraction of its size: for the crops of training ---------------------------------


def upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    """Width and height of a JPEG in pixels, after the EXIF rotation, without decoding it."""
    width, height = image.size
    return (height, width) if orientation(image, name) in ORIENTATIONS_THAT_SWAP_SIDES else (width, height)


def orientation(image: Image.Image, name: str) -> int:
    """The value of the EXIF tag, 1 (upright) by default. Raises UnreadableImage."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # as in `open_encoded`
        raise UnreadableImage(f"{name}: cannot be decoded ({one_line(error)})") from error


def scales(image: Image.Image) -> bool:
    """Whether `decode_window` can decode an opened image at a fraction of its size."""
    return image.format in ("JPEG", "MPO")


def decode_window(
    image: Image.Image, name: str, window: tuple[float, float, float, float], target: tuple[int, int]
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Decode the part of an opened JPEG that a window needs, to upright RGB.

    It is decoded at 1/2, 1/4 or 1/8 of its size (in the inverse DCT, where that saves most) as long as the window
    keeps `target` pixels, and only down to the lower edge of the window if its coding allows that.

    Args:
        window: left, upper, right, lower in pixels of the upright image. target: width and height in pixels.

    Returns:
        the image, and the window in its pixels.
    """
    turn = orientation(image, name)
    width, height = upright_size(image, name)
    left, upper, right, lower = window
    # the smallest size of the whole image at which the window has `target` pixels
    needed = (width * min(1.0, target[0] / (right - left)), height * min(1.0, target[1] / (lower - upper)))
    if turn in ORIENTATIONS_THAT_SWAP_SIDES:
        needed = needed[::-1]
    file = getattr(image, "fp", None)
    # 0.95: for the last few rows a copy of the bytes is not worth it
    if image.format == "JPEG" and turn == 1 and lower < 0.95 * height and isinstance(file, io.BytesIO):
        shorter = without_rows_below(file.getvalue(), ceil(lower))
        if shorter is not None:
            needed = (needed[0], needed[1] * shorter[1] / height)
            image = open_encoded(shorter[0], name)
    full_width, full_height = image.size
    # all bytes at once: near the end of each block of 64 KiB libjpeg decodes bit by bit
    setattr(image, "decodermaxblock", UNLIMITED)  # noqa: B010 - of JPEG files' own class
    try:
        drafted = image.draft(None, (max(1, ceil(needed[0])), max(1, ceil(needed[1]))))
    except Exception as error:  # as in `open_encoded`
        raise UnreadableImage(f"{name}: cannot be decoded ({one_line(error)})") from error
    scale = 1.0 if drafted is None else drafted[1][2] / full_width
    # At 1/2, the last of 2047 columns covers one pixel, not two. If the orientation puts it at the left, all others
    # are shifted to the right by the difference.
    right_rest = image.width - full_width * scale if turn in RIGHT_EDGE_FIRST else 0.0
    lower_rest = image.height - full_height * scale if turn in LOWER_EDGE_FIRST else 0.0
    across, down = (lower_rest, right_rest) if turn in ORIENTATIONS_THAT_SWAP_SIDES else (right_rest, lower_rest)
    decoded = decode(image, name)
    box = (left * scale + across, upper * scale + down, right * scale + across, lower * scale + down)
    return decoded, (box[0], box[1], min(box[2], decoded.width), min(box[3], decoded.height))


def without_rows_below(data: bytes, row: int) -> tuple[bytes, int] | None:
    """A JPEG cut a few rows below `row`, by writing a smaller height into its frame header.

    The rows above are decoded to the same pixels: a single sequential scan is coded from top to bottom (ITU-T T.81,
    B.2.2).

    Returns:
        the bytes and the new height; None for progressive or multi-scan files, or if nothing would be saved.
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
    if not 1 <= components <= 4 or data[offset + 4] != components or frame + 20 > len(data):  # or a scan for each
        return None
    block = 8 * max(1, *(data[frame + 11 + 3 * component] & 0x0F for component in range(components)))
    height = (row // block + 2) * block  # one more row of blocks: chroma upsampling reads across the border
    if height >= int.from_bytes(data[frame + 5 : frame + 7], "big"):
        return None
    return b"".join((data[: frame + 5], height.to_bytes(2, "big"), memoryview(data)[frame + 7 :])), height


def processor_pixels(processor: Any, image: Image.Image) -> Any:
    """Apply an image processor of transformers to an image of `open_image`: a torch tensor (1, C, H, W).

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
