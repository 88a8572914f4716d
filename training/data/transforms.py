"""Image transforms for training and evaluation: crop, resize, flip and augmentations, in the data workers.

A crop is a window in the file's own pixels, drawn before decoding. A large JPEG is therefore decoded no larger than
its window needs, and the window is resampled once.

Not torchvision's transforms: they draw from a global generator, and need the whole image decoded.

Sources: Inception crop, TensorFlow's `sample_distorted_bounding_box` as google-research/vision_transformer calls it;
resize-small and random crop, google-research/big_vision `pp/ops_image.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import cos, radians, sin, sqrt, tan
from typing import Any

import numpy as np
from PIL import Image

from hf_vit.errors import HFViTError
from hf_vit.image_io import check_channels, decode, decode_window, scales, upright_size
from hf_vit.image_processing import ImageProcessing

from .auto_augment import color_jitter, policy, random_erasing


Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
CROPS = ("inception", "resize_small_random", "squash", "none")
MIN_CROP_PCT = 0.01  # resizing to a hundred times the side takes the memory of ten thousand images


@dataclass(frozen=True)
class ImageTransform:
    """A window of the image, resampled to `image_size`.

    Args:
        image_size: height and width of the result in pixels; one number for a square.
        resample: filter of the resize (Pillow's, so antialiased when it shrinks).
        num_channels: 3, or 1 for a grayscale model.
    """

    image_size: int | tuple[int, int]
    resample: str = field(default="bilinear", kw_only=True)
    num_channels: int = field(default=3, kw_only=True)

    def __post_init__(self):
        height, width = self.image_size_hw
        if height < 1 or width < 1:
            raise HFViTError(f"image_size must be positive, got {self.image_size}")
        if self.resample not in RESAMPLING:
            raise HFViTError(f"resample must be one of {', '.join(RESAMPLING)}, got '{self.resample}'")
        check_channels(self.num_channels)

    @property
    def image_size_hw(self) -> tuple[int, int]:
        """Height and width of the result."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def crop_fraction(self) -> float | None:
        """See `EvalTransform`."""
        return None

    def describe(self) -> dict[str, Any]:
        """The settings, ready for JSON."""
        described = {"transform": type(self).__name__, **asdict(self), "image_size": list(self.image_size_hw)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in described.items()}

    def window(self, width: int, height: int, rng: np.random.Generator) -> Box | None:
        """The part of an image of this size to keep; None keeps all pixels without resampling."""
        return (0.0, 0.0, float(width), float(height))

    def finish(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Augmentations after the resize."""
        return image

    def from_file(self, opened: Image.Image, name: str, rng: np.random.Generator) -> np.ndarray:
        """Decode what is needed of an opened image, and transform it to uint8 (H, W, num_channels).

        Raises:
            UnreadableImage: damaged data; the message begins with `name`.
        """
        target_height, target_width = self.image_size_hw
        whole = None if scales(opened) else decode(opened, name)  # other formats have to be decoded whole
        width, height = upright_size(opened, name) if whole is None else whole.size
        box = self.window(width, height, rng)
        if box is None:
            image = decode(opened, name) if whole is None else whole
            if image.size != (target_width, target_height):
                raise HFViTError(
                    f"{name}: crop 'none' needs images of {target_height}x{target_width} px (height x width), "
                    f"this one has {height}x{width}; choose another crop"
                )
        else:
            image, box = (
                decode_window(opened, name, box, (target_width, target_height)) if whole is None else (whole, box)
            )
            image = image.resize((target_width, target_height), RESAMPLING[self.resample], box=box)
        image = self.finish(image, rng)
        if self.num_channels == 1:
            return np.asarray(image.convert("L"))[:, :, None]
        return np.asarray(image)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Transform an image to uint8 (H, W, num_channels); all randomness comes from `rng`."""
        return self.from_file(image, "image", rng)


@dataclass(frozen=True)
class EvalTransform(ImageTransform):
    """The evaluation transform: pixel for pixel that of the saved image processor.

    Images are always decoded at full size.

    Args:
        crop_pct: None squashes the whole image to `image_size`, as Google evaluates; a fraction resizes the shorter
            side to `image_size / crop_pct`, rounded, and keeps the center (224 / 256 = 0.875).
        processing: resize and crop of an image processor, in place of `resample` and `crop_pct`.
    """

    crop_pct: float | None = None
    processing: ImageProcessing | None = field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.crop_pct is not None and not MIN_CROP_PCT <= self.crop_pct <= 1.0:
            raise HFViTError(f"crop_pct must lie in [{MIN_CROP_PCT}, 1], got {self.crop_pct}")

    @classmethod
    def of(cls, processing: ImageProcessing, image_size: int | Sequence[int], num_channels: int) -> "EvalTransform":
        """The transform of an image processor.

        Batches need one size: if the processor only resizes the shorter side, the center is cropped.

        Args:
            image_size: of the model, for a processor without a size.
        """
        if processing.output_size is None and processing.resize_to is not None:
            edge = int(processing.resize_to)  # type: ignore[arg-type]  # a pair would be the size
            processing = replace(processing, crop_to=(edge, edge))
        size = processing.output_size or image_size
        size = size if isinstance(size, int) else (int(size[0]), int(size[1]))
        return cls(size, resample=processing.resample, num_channels=num_channels, processing=processing)

    @property
    def steps(self) -> ImageProcessing:
        """Resize and crop: those of `processing`, or those of `crop_pct`."""
        return self.processing or evaluation_steps(self.image_size_hw, self.crop_pct, self.resample)

    @property
    def crop_fraction(self) -> float | None:
        """The equivalent `crop_pct`: side of the crop divided by that of the resize; None without a crop."""
        steps = self.steps
        if steps.crop_to is None or steps.resize_to is None:
            return None
        sides = steps.resize_to if isinstance(steps.resize_to, tuple) else (steps.resize_to,)
        return self.crop_pct or min(1.0, max(steps.crop_to) / min(sides))

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        described.pop("processing")
        return described | {"crop_pct": self.crop_fraction, "steps": self.steps.describe()}

    def from_file(self, opened: Image.Image, name: str, rng: np.random.Generator) -> np.ndarray:
        image = decode(opened, name)
        image = self.steps.resize_and_crop(image.convert("L") if self.num_channels == 1 else image)
        height, width = self.image_size_hw
        if image.size != (width, height):
            raise HFViTError(
                f"{name}: the image processor does not resize, and the model was opened for {height}x{width} px "
                f"(height x width); this image has {image.height}x{image.width}"
            )
        pixels = np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels


def evaluation_steps(size: tuple[int, int], crop_pct: float | None, resample: str) -> ImageProcessing:
    """Squash to (height, width), or resize to the size divided by `crop_pct` and crop the center."""
    if crop_pct is None:
        return ImageProcessing(size, None, resample)
    scaled = tuple(round(side / crop_pct) for side in size)
    return ImageProcessing(scaled[0] if size[0] == size[1] else (scaled[0], scaled[1]), size, resample)


@dataclass(frozen=True)
class ProcessorTransform(ImageTransform):
    """Calls an image processor, for those that do more than resize, crop and normalize.

    Args:
        processor: of transformers, on the PIL backend. Its results are normalized already, float32 (H, W, C).
    """

    processor: Any = field(default=None, kw_only=True)

    def describe(self) -> dict[str, Any]:
        return {"transform": type(self.processor).__name__, "image_size": list(self.image_size_hw)}

    def from_file(self, opened: Image.Image, name: str, rng: np.random.Generator) -> np.ndarray:
        image = decode(opened, name)
        image = image.convert("L") if self.num_channels == 1 else image
        pixels = self.processor(image, return_tensors="np")["pixel_values"][0]
        return np.moveaxis(pixels.astype(np.float32, copy=False), 0, -1)


@dataclass(frozen=True)
class TrainTransform(ImageTransform):
    """A random crop with augmentations.

    Args:
        crop: "inception" (a window of random area and aspect ratio), "resize_small_random" (resized until it covers
            `resize_small * image_size`, then a random window), "squash" (all of it), "none" (already that size).
        crop_area: smallest and largest fraction of the image's area, for "inception".
        crop_ratio: smallest and largest width / height of the window, for "inception".
        resize_small: ratio of the resized image to the window; 448 / 384 in big_vision's transfers.
        flip: mirror half of the images left to right. Wrong for letters and digits.
        degrees, shear: largest rotation and horizontal shear, in degrees, to either side.
        translate: largest shift, as a fraction of the side.
        scale: smallest and largest magnification of the content.
        auto_augment: `randaug(2,10)` as big_vision, `rand-m9-mstd0.5-inc1` as timm, `3a`; see auto_augment.py.
        color_jitter: brightness, contrast, saturation by up to this fraction; 0 is off.
        random_erasing: probability that a rectangle becomes noise.
    """

    crop: str = "inception"
    crop_area: tuple[float, float] = (0.05, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    resize_small: float = 448 / 384
    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    auto_augment: str | None = None
    color_jitter: float = 0.0
    random_erasing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.auto_augment is not None:
            policy(self.auto_augment)
        if self.color_jitter < 0 or not 0 <= self.random_erasing <= 1:
            raise HFViTError("color_jitter must be at least 0, random_erasing must lie in [0, 1]")
        if self.crop not in CROPS:
            raise HFViTError(f"crop must be one of {', '.join(CROPS)}, got '{self.crop}'")
        for name, (low, high), top in (("crop_area", self.crop_area, 1.0), ("crop_ratio", self.crop_ratio, 100.0),
                                       ("scale", self.scale, 100.0)):  # fmt: skip
            if not 0.0 < low <= high <= top:
                raise HFViTError(f"{name} must be two numbers, 0 < smallest <= largest <= {top:g}, got {low}, {high}")
        if self.resize_small < 1.0:
            raise HFViTError(f"resize_small is a factor of at least 1, got {self.resize_small}")
        if not (0 <= self.degrees <= 180 and 0 <= self.shear < 90 and 0 <= self.translate <= 1):
            raise HFViTError("degrees must lie in [0, 180], shear in [0, 90), translate in [0, 1]")

    def window(self, width: int, height: int, rng: np.random.Generator) -> Box | None:
        if self.crop == "none":
            return None
        if self.crop == "inception":
            return inception_window(width, height, self.crop_area, self.crop_ratio, rng)
        if self.crop == "resize_small_random":
            return covering_window(width, height, self.image_size_hw, self.resize_small, rng.random(), rng.random())
        return super().window(width, height, rng)

    def finish(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.degrees or self.translate or self.shear or self.scale != (1.0, 1.0):
            image = image.transform(image.size, Image.Transform.AFFINE, self._draw_affine(image.size, rng),
                                    resample=Image.Resampling.BILINEAR)  # fmt: skip
        if self.auto_augment is not None:
            image = policy(self.auto_augment)(image, rng)
        if self.color_jitter:
            image = color_jitter(image, self.color_jitter, rng)
        if self.random_erasing and rng.random() < self.random_erasing:
            image = random_erasing(image, rng)
        return image

    def _draw_affine(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[float, ...]:
        angle, shear, shift_x, shift_y, zoom = rng.random(5)
        low, high = self.scale
        return affine_coefficients(
            size,
            degrees=(2 * angle - 1) * self.degrees,
            shear=(2 * shear - 1) * self.shear,
            shift=((2 * shift_x - 1) * self.translate * size[0], (2 * shift_y - 1) * self.translate * size[1]),
            scale=low * (high / low) ** zoom,
        )


def inception_window(
    width: int, height: int, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """TensorFlow's `sample_distorted_bounding_box` without boxes.

    The aspect ratio is uniform; then the window's height is uniform between those of the smallest and largest allowed
    area, as far as the window fits. The whole image if none fits, as in very long images.
    """
    aspect, tallness, right, down = rng.random(4)
    aspect = ratio[0] + aspect * (ratio[1] - ratio[0])
    lowest = sqrt(area[0] * width * height / aspect)
    highest = min(sqrt(area[1] * width * height / aspect), width / aspect, height)
    if lowest > highest:
        return (0.0, 0.0, float(width), float(height))
    box_height = min(max(1, round(lowest + tallness * (highest - lowest))), height)
    box_width = min(max(1, round(box_height * aspect)), width)
    left, upper = int(right * (width - box_width + 1)), int(down * (height - box_height + 1))
    return (float(left), float(upper), float(left + box_width), float(upper + box_height))


def covering_window(
    width: int, height: int, target_hw: tuple[int, int], enlarge: float, right: float, down: float
) -> Box:
    """The window that remains when an image is resized to just cover `enlarge * target_hw` and cut to `target_hw`.

    Args:
        right, down: where the window lies, from 0 (left, top) to 1.
    """
    factor = max(target_hw[0] * enlarge / height, target_hw[1] * enlarge / width)
    box_width, box_height = target_hw[1] / factor, target_hw[0] / factor
    left, upper = right * (width - box_width), down * (height - box_height)
    return (left, upper, left + box_width, upper + box_height)


def affine_coefficients(
    size: tuple[float, float], degrees: float, shear: float, shift: tuple[float, float], scale: float
) -> tuple[float, ...]:
    """Pillow's six AFFINE numbers (output to input pixels) of a map around the center.

    Args:
        size: width and height in pixels.
        degrees: counter-clockwise rotation. shear: horizontal, in degrees.
        shift: right and down, in pixels. scale: above 1 enlarges the content.
    """
    angle, slant = radians(degrees), tan(radians(shear))
    a, b = cos(angle) / scale, -sin(angle) / scale
    c, d = sin(angle) / scale, cos(angle) / scale
    a, b, c, d = a + slant * c, b + slant * d, c, d
    center_x, center_y = size[0] / 2, size[1] / 2
    x0, y0 = center_x + shift[0], center_y + shift[1]
    return (a, b, center_x - a * x0 - b * y0, c, d, center_y - c * x0 - d * y0)
