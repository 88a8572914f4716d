"""From the bytes of a picture to upright RGB pixels.

The one place that knows about file formats: greyscale, palettes, CMYK, 16 bits, transparency, EXIF rotation, scaled
JPEG decoding, and pictures too large or too broken to decode. data.py opens with it, augmentation.py decodes with it.
"""

import io
import warnings
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_vit.errors import HFViTError


# Pillow's own limit for "decompression bombs", twice Image.MAX_IMAGE_PIXELS: half a gigabyte of RGB in memory.
MAX_PIXELS = 178_956_970

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "apng",
        "bmp",
        "gif",
        "webp",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "jp2",
        "j2k",
        "tga",
        "ico",
        "avif",
    )
)

# Second bytes of JPEG markers
SEQUENTIAL_FRAMES = (0xC0, 0xC1)
OTHER_FRAMES = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
START_OF_SCAN = 0xDA

ANY_LENGTH = 1 << 30

ORIENTATION = 0x0112  # the EXIF tag
ORIENTATIONS_THAT_SWAP_SIDES = (5, 6, 7, 8)


class UnreadableImage(HFViTError):
    """A picture that cannot be decoded; the message begins with its name."""


def open_picture(source: bytes | str | Path, name: str) -> Image.Image:
    """Open a picture without decoding it: its size and mode are known, its pixels are not.

    Args:
        source: the encoded bytes, or the path of the file.
        name: what error messages call the picture.

    Raises:
        UnreadableImage: not a picture, missing, empty, or more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is the one that counts
            image = Image.open(io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes()))
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{name}: refused, it would decode to too many pixels ({error})") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{name}: not a picture that Pillow can read") from error
    except Exception as error:  # Pillow's plugins raise struct.error, SyntaxError, KeyError, ... on damaged data
        raise UnreadableImage(f"{name}: cannot be read ({one_line(error)})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise UnreadableImage(
            f"{name}: refused, {width}x{height} px would decode to more than {MAX_PIXELS:,} pixels; "
            "shrink the file or remove it"
        )
    return image


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def orientation(image: Image.Image, name: str) -> int:
    """The value of the EXIF tag, 1 (upright) where there is none; raises UnreadableImage."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # as above; a PNG is read to its end for this
        raise UnreadableImage(f"{name}: cannot be decoded ({one_line(error)})") from error


def upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    """Width and height after the EXIF rotation, in pixels of the file."""
    width, height = image.size
    return (height, width) if orientation(image, name) in ORIENTATIONS_THAT_SWAP_SIDES else (width, height)


def decode(image: Image.Image, name: str) -> Image.Image:
    """Decode an opened picture to upright RGB at full size.

    Args:
        image: from `open_picture`; also any other PIL image.
        name: what error messages call the picture.

    Raises:
        UnreadableImage: truncated or damaged data.
    """
    return upright_rgb(image, name, orientation(image, name))


def decode_window(
    image: Image.Image, name: str, window: tuple[float, float, float, float], target: tuple[int, int]
) -> tuple[Image.Image, float]:
    """Decode an opened picture to upright RGB, as much of it as a window needs.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size (inside the inverse DCT, where it costs least) as long as the
    window is left with `target` pixels, and not below the window where its coding allows to stop.

    Args:
        window: left, upper, right, lower in pixels of the upright picture. target: width and height in pixels.

    Returns:
        the picture, and its pixels per pixel of the file.
    """
    turn = orientation(image, name)
    if image.format not in ("JPEG", "MPO"):
        return upright_rgb(image, name, turn), 1.0
    width, height = upright_size(image, name)
    left, upper, right, lower = window
    enough = (width * min(1.0, target[0] / (right - left)), height * min(1.0, target[1] / (lower - upper)))
    if turn in ORIENTATIONS_THAT_SWAP_SIDES:
        enough = enough[::-1]
    if image.format == "JPEG" and turn == 1 and lower < 0.95 * height and isinstance(image.fp, io.BytesIO):
        shorter = without_rows_below(image.fp.getvalue(), ceil(lower))
        if shorter is not None:
            enough = (enough[0], enough[1] * shorter[1] / height)
            image = open_picture(shorter[0], name)
    full = image.width
    image.decodermaxblock = ANY_LENGTH  # all bytes at once: at the end of each 64 KiB libjpeg reads a bit at a time
    try:
        drafted = image.draft(None, (max(1, ceil(enough[0])), max(1, ceil(enough[1]))))
    except Exception as error:  # as above
        raise UnreadableImage(f"{name}: cannot be decoded ({one_line(error)})") from error
    scale = 1.0 if drafted is None else drafted[1][2] / full
    return upright_rgb(image, name, turn), scale


def without_rows_below(data: bytes, row: int) -> tuple[bytes, int] | None:
    """A JPEG that ends some rows below `row`, by writing a smaller height into its frame header.

    The rows above come out the same: a single sequential scan is coded from top to bottom, and the decoder does not
    look at what follows (ITU-T T.81, B.2.2).

    Returns:
        the bytes and the new height; None for progressive or multi-scan files, or where nothing would be saved.
    """
    place, frame = 2, None
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != START_OF_SCAN:
        marker = data[place + 1]
        if marker in SEQUENTIAL_FRAMES:
            frame = place
        elif marker in OTHER_FRAMES:
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    if frame is None or place + 4 >= len(data) or data[place + 1] != START_OF_SCAN:
        return None
    components = data[frame + 9]
    if not 1 <= components <= 4 or data[place + 4] != components or frame + 20 > len(data):  # or a scan per component
        return None
    block = 8 * max(1, *(data[frame + 11 + 3 * component] & 0x0F for component in range(components)))
    height = (row // block + 2) * block  # one row of blocks to spare: smoothing of colours looks across the border
    if height >= int.from_bytes(data[frame + 5 : frame + 7], "big"):
        return None
    return b"".join((data[: frame + 5], height.to_bytes(2, "big"), memoryview(data)[frame + 7 :])), height


def upright_rgb(image: Image.Image, name: str, turn: int) -> Image.Image:
    """Decode, rotate as the EXIF value `turn` says, convert to RGB."""
    try:
        image.load()
        if turn != 1:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)
    except Exception as error:  # as above
        raise UnreadableImage(f"{name}: cannot be decoded ({one_line(error)})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: 16 bits scaled to 8, transparency laid on white, palettes and CMYK expanded."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(deep_grey_to_bytes(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def deep_grey_to_bytes(image: Image.Image) -> np.ndarray:
    """Greyscale of more than 8 bits as uint8 (H, W). Pillow alone would clip it at 255 and return a white picture.

    Integers count to 65535 when any pixel exceeds 255; floats count to 1 when none exceeds it, else to 255.
    """
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = pixels.max(initial=0.0)
    if image.mode == "F":
        scale = 255.0 if peak <= 1.0 else 1.0
    else:
        scale = 1.0 if image.mode == "I" and peak <= 255.0 else 255.0 / 65535.0
    return np.clip(np.rint(pixels * scale), 0, 255).astype(np.uint8)
