"""From the bytes of a picture to upright RGB pixels.

The one place that knows about file formats: greyscale, palettes, CMYK, 16 bits, transparency, EXIF rotation, scaled
JPEG decoding, and pictures too large or too broken to decode. data.py opens with it, augmentation.py decodes with it.
"""

import io
import warnings
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
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
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


def decode(image: Image.Image, name: str, at_least: tuple[float, float] | None = None) -> Image.Image:
    """Decode an opened picture to upright RGB.

    Args:
        image: from `open_picture`; also any other PIL image.
        name: what error messages call the picture.
        at_least: (width, height) of the upright picture that are enough. A JPEG is then decoded at 1/2, 1/4 or 1/8 of
            its size (inside the inverse DCT, where it costs least), never below `at_least`. The caller reads the size.

    Raises:
        UnreadableImage: truncated or damaged data.
    """
    turn = orientation(image, name)
    try:
        if at_least is not None and image.format == "JPEG":
            width, height = at_least[::-1] if turn in ORIENTATIONS_THAT_SWAP_SIDES else at_least
            image.draft(None, (max(1, int(np.ceil(width))), max(1, int(np.ceil(height)))))
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
