"""Image preprocessing in one form: resize, crop, rescale and normalize, read from and written for each library.

`ImageProcessing` is read from the `preprocessor_config.json` of transformers (ViT, DeiT, BiT, CLIP, SigLIP, BEiT,
DINOv3, ..., also the feature extractors of version 4), from timm's `config.json` and from open_clip's. It is written
as a `ViTImageProcessor` with every setting explicit, and as timm's `pretrained_cfg`. Training, evaluation and the
saved processor all use it, so that a model sees the same pixels everywhere.

Sources: transformers 5.23 `image_processing_backends.py` and `models/*/image_processing_*.py`; timm 1.0.31
`data/config.py` and `data/transforms_factory.py`; open_clip 89fb801 `transform.py`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import HFViTError


RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # index: Pillow's number of the filter
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_RESIZED_PIXELS = 1 << 26  # of a larger image only the part under the crop is resized


# -- defaults of transformers' classes, for settings that a file leaves out -------------------------------------------

_SQUASH = {"size": {"height": 224, "width": 224}, "resample": 2, "image_mean": HALF, "image_std": HALF}
_SHORT_SIDE = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": 224,
    "resample": 3,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": _SQUASH,
    "DeiT": _SQUASH | {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3},
    "Beit": _SQUASH | {"resample": 3, "crop_size": 224},
    "Bit": _SHORT_SIDE,
    "CLIP": _SHORT_SIDE,
    "ViTHybrid": _SHORT_SIDE,
    "Siglip": _SQUASH | {"resample": 3, "default_to_square": False},
    "Siglip2": _SQUASH | {"size": None},
    "DINOv3ViT": _SQUASH | _IMAGENET,
    "Tipsv2": _SQUASH | {"size": 448, "do_normalize": False},
    "Blip": _SQUASH | {"size": 384, "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "ConvNext": _SQUASH | {"size": {"shortest_edge": 384}, "default_to_square": False, "resample": 3},
    "EfficientNet": _SQUASH | {"size": 346, "crop_size": 289, "resample": 3},
    "Pvt": _SQUASH | _IMAGENET,
    "MobileNetV1": _SHORT_SIDE
    | {"size": {"shortest_edge": 256}, "resample": 2, "image_mean": HALF, "image_std": HALF},
    "MobileNetV2": _SHORT_SIDE
    | {"size": {"shortest_edge": 256}, "resample": 2, "image_mean": HALF, "image_std": HALF},
}
# The class of a model type, for files too old to name one.
CLASS_OF_MODEL = {
    "deit": "DeiT",
    "beit": "Beit",
    "data2vec-vision": "Beit",
    "vit-hybrid": "ViTHybrid",
    "siglip": "Siglip",
    "siglip_vision_model": "Siglip",
    "siglip2": "Siglip2",
    "siglip2_vision_model": "Siglip2",
    "dinov3_vit": "DINOv3ViT",
    "tipsv2": "Tipsv2",
    "tipsv2_vision_model": "Tipsv2",
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "pixio", "bit"), "Bit"),
    **dict.fromkeys(("clip", "clip_vision_model", "metaclip_2", "metaclip_2_vision_model", "aimv2"), "CLIP"),
    **dict.fromkeys(("aimv2_vision_model", "mlcd_vision_model"), "CLIP"),
    **dict.fromkeys(("convnext", "convnextv2", "resnet", "regnet", "cvt"), "ConvNext"),
    "efficientnet": "EfficientNet",
}


@dataclass(frozen=True)
class ImageProcessing:
    """The steps from an image to `pixel_values`, in this order.

    Attributes:
        resize_to: (height, width) to which the whole image is squashed; or one number, the short side in pixels, with
            the aspect ratio kept; None: no resize.
        crop_to: (height, width) of the center crop, padded with zeros if the image is smaller; None: no crop.
        resample: Pillow's resize filter, one of `RESAMPLE` (antialiased when it shrinks).
        rescale_factor: factor of uint8 values; None: not rescaled.
        image_mean, image_std: subtracted and divided by after that, one number per channel (or one for all); None: not
            normalized.
    """

    resize_to: tuple[int, int] | int | None = (224, 224)
    crop_to: tuple[int, int] | None = None
    resample: str = "bilinear"
    rescale_factor: float | None = 1 / 255
    image_mean: tuple[float, ...] | None = HALF
    image_std: tuple[float, ...] | None = HALF

    def __post_init__(self):
        if self.resample not in RESAMPLE:
            raise HFViTError(f"resample is one of {', '.join(RESAMPLE)}, got {self.resample!r}")
        for name in ("resize_to", "crop_to"):
            size = getattr(self, name)
            sides = () if size is None else size if isinstance(size, tuple) else (size,)
            if not all(isinstance(side, int) and 1 <= side <= 1 << 16 for side in sides):
                raise HFViTError(f"{name} must be whole numbers of pixels from 1 to 65536, got {size!r}")
        if self.rescale_factor is not None and not (math.isfinite(self.rescale_factor) and self.rescale_factor > 0):
            raise HFViTError(f"rescale_factor must be above 0, got {self.rescale_factor!r}")
        if (self.image_mean is None) != (self.image_std is None):
            raise HFViTError("image_mean and image_std go together: give both, or none")
        if self.image_mean is not None and not all(map(math.isfinite, self.image_mean)):
            raise HFViTError(f"image_mean must be finite numbers, got {list(self.image_mean)}")
        if self.image_std is not None and not all(math.isfinite(std) and std > 0 for std in self.image_std):
            raise HFViTError(f"image_std must be numbers above 0, got {list(self.image_std)}")

    # -- sizes --------------------------------------------------------------------------------------------------------

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every result; None if it depends on the image."""
        if self.crop_to is not None:
            return self.crop_to
        return self.resize_to if isinstance(self.resize_to, tuple) else None

    def at_size(self, image_size: int | Sequence[int]) -> "ImageProcessing":
        """The same processing for another output size, pixels or (height, width), with the same fraction cropped.

        The short side is resized to floor(edge * new / old), as timm does. To a rectangle images are squashed, since
        a short side does not determine its aspect ratio.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else map(int, image_size)
        if (height, width) == self.output_size:
            return self
        if self.resize_to is None:
            return self if self.crop_to is None else replace(self, crop_to=(height, width))
        if isinstance(self.resize_to, tuple):
            if self.crop_to is None:
                return replace(self, resize_to=(height, width))
            down, across = self.resize_to[0] * height // self.crop_to[0], self.resize_to[1] * width // self.crop_to[1]
            return replace(self, resize_to=(max(1, down), max(1, across)), crop_to=(height, width))
        edge = self.resize_to
        old = edge if self.crop_to is None else max(self.crop_to)
        if height == width:
            return replace(self, resize_to=max(1, edge * height // old), crop_to=(height, width))
        rectangle = (max(1, edge * height // old), max(1, edge * width // old))
        if rectangle == (height, width):
            return replace(self, resize_to=rectangle, crop_to=None)
        return replace(self, resize_to=rectangle, crop_to=(height, width))

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image of that size after the resize, before the crop."""
        if self.resize_to is None:
            return height, width
        if isinstance(self.resize_to, tuple):
            return self.resize_to
        edge, short = self.resize_to, min(height, width)
        return (edge, int(edge * width / short)) if height <= width else (int(edge * height / short), edge)

    def crop_corner(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the center crop in a resized image; negative if it is padded with zeros."""
        if self.crop_to is None:
            return 0, 0
        return _corner(height, self.crop_to[0]), _corner(width, self.crop_to[1])

    # -- pixels -------------------------------------------------------------------------------------------------------

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image of mode `RGB` or `L` as `ViTImageProcessorPil` does, bit for bit.

        Of an image so long that its resized form would take gigabytes, only the part under the crop is resized.
        """
        height, width = self.resized_size(image.height, image.width)
        top, left = self.crop_corner(height, width)
        if self.resize_to is not None:
            filter = Image.Resampling[self.resample.upper()]
            if self.crop_to is not None and height * width > MAX_RESIZED_PIXELS:
                return self._resize_window(image, (height, width), (top, left), filter)
            image = image.resize((width, height), filter)
        if self.crop_to is None or self.crop_to == (height, width):
            return image
        return image.crop((left, top, left + self.crop_to[1], top + self.crop_to[0]))

    def _resize_window(self, image: Image.Image, size, corner, filter) -> Image.Image:
        assert self.crop_to is not None
        starts = [max(0, start) for start in corner]
        ends = [min(side, start + crop) for side, start, crop in zip(size, corner, self.crop_to)]
        down, across = image.height / size[0], image.width / size[1]
        box = (starts[1] * across, starts[0] * down, ends[1] * across, ends[0] * down)
        part = image.resize((ends[1] - starts[1], ends[0] - starts[0]), filter, box=box)
        if part.size == self.crop_to[::-1]:
            return part
        whole = Image.new(image.mode, self.crop_to[::-1])
        whole.paste(part, (starts[1] - corner[1], starts[0] - corner[0]))
        return whole

    def _statistics(self, num_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and std of each channel. For fewer channels than numbers, their mean; for more, they repeat in turn.

        `resize_patch_embeddings` adapts the first kernel in the same way.
        """
        if self.image_mean is None or self.image_std is None:
            return None

        def fitted(numbers: tuple[float, ...]) -> tuple[float, ...]:
            if num_channels < len(numbers):
                return (math.fsum(numbers) / len(numbers),) * num_channels
            return tuple(numbers[channel % len(numbers)] for channel in range(num_channels))

        return fitted(self.image_mean), fitted(self.image_std)

    # -- transformers -------------------------------------------------------------------------------------------------

    @classmethod
    def from_transformers(cls, settings: Mapping[str, Any], model_type: str | None = None) -> "ImageProcessing":
        """From a `preprocessor_config.json`; missing and null settings take the defaults of its class.

        Args:
            settings: the file's content. model_type: of the config.json next to it, for files that name no class.

        Raises:
            HFViTError: unsupported settings (the key is named), or settings of the wrong type.
        """
        name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
        if not isinstance(name, str):
            raise HFViTError(f"image_processor_type must be text, got {name!r}")
        auto_map = settings.get("auto_map")
        custom = auto_map.get("AutoImageProcessor") if isinstance(auto_map, Mapping) else None
        custom = next(filter(None, custom), None) if isinstance(custom, list | tuple) else custom
        if custom:  # transformers would run the repository's code, whatever the type is; here it is never run
            name = str(custom).rpartition(".")[2]
        kind = name.replace("FeatureExtractor", "ImageProcessor").partition("ImageProcessor")[0]
        if not kind:
            kind = CLASS_OF_MODEL.get(str(model_type), "ViT")
        if kind not in CLASS_DEFAULTS:
            raise HFViTError(
                f"its images are prepared by {name}, which hf_vit does not know; known are "
                f"{', '.join(f'{known}ImageProcessor' for known in CLASS_DEFAULTS)}"
            )
        switches = {"do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True}
        defaults = switches | {"rescale_factor": 1 / 255, "crop_size": None} | CLASS_DEFAULTS[kind]
        explicit = {key: value for key, value in settings.items() if value is not None}
        merged: dict[str, Any] = defaults | explicit
        for key in switches:
            if not isinstance(merged[key], bool):
                raise HFViTError(f"{key} must be true or false, got {merged[key]!r}")
        for key in ("do_pad", "do_flip_channel_order"):
            if explicit.get(key):
                raise HFViTError(f"{key} of its image processor has no counterpart in hf_vit")
        resize_to, crop_to = _geometry(kind, merged)
        mean = std = None
        if merged["do_normalize"]:
            mean, std = _numbers(merged["image_mean"], "image_mean"), _numbers(merged["image_std"], "image_std")
        rescale = _number(merged["rescale_factor"], "rescale_factor") if merged["do_rescale"] else None
        processing = cls(resize_to, crop_to, _resample(merged["resample"]), rescale, mean, std)
        return processing._as_efficientnet(explicit) if kind == "EfficientNet" else processing

    def _as_efficientnet(self, settings: Mapping[str, Any]) -> "ImageProcessing":
        """With EfficientNet's `rescale_offset` (subtract one) and `include_top` (divide by std twice)."""
        mean, std = self.image_mean or (0.0,), self.image_std or (1.0,)
        if settings.get("rescale_offset", False) and self.rescale_factor is not None:
            mean = tuple(value + 1 for value in mean)
        if settings.get("include_top", True):
            again = _numbers(settings.get("image_std", HALF), "image_std")
            std = tuple(value * again[channel % len(again)] for channel, value in enumerate(std * len(again)))[:3]
        return replace(self, image_mean=tuple(mean), image_std=tuple(std))

    def to_transformers(self, num_channels: int = 3) -> dict[str, Any]:
        """All settings of an equivalent `ViTImageProcessor`, for a model of that many channels.

        For three channels images are converted to RGB, also grayscale and palette images.
        """
        statistics = self._statistics(num_channels)
        settings: dict[str, Any] = {
            "do_convert_rgb": num_channels == 3,
            "do_resize": self.resize_to is not None,
            "resample": RESAMPLE.index(self.resample),
            "do_center_crop": self.crop_to is not None,
            "do_rescale": self.rescale_factor is not None,
            "rescale_factor": 1 / 255 if self.rescale_factor is None else self.rescale_factor,
            "do_normalize": statistics is not None,
            "image_mean": list(statistics[0]) if statistics else [0.0] * num_channels,
            "image_std": list(statistics[1]) if statistics else [1.0] * num_channels,
        }
        if isinstance(self.resize_to, tuple):
            settings["size"] = {"height": self.resize_to[0], "width": self.resize_to[1]}
        elif self.resize_to is not None:
            settings["size"] = {"shortest_edge": self.resize_to}
        if self.crop_to is not None:
            settings["crop_size"] = {"height": self.crop_to[0], "width": self.crop_to[1]}
        return settings

    # -- timm ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_timm(cls, pretrained_cfg: Mapping[str, Any]) -> "ImageProcessing":
        """From the `pretrained_cfg` of timm's config.json, as in `resolve_data_config` and its evaluation transform.

        `crop_mode="center"`, the default, resizes the short side to floor(size / crop_pct) and crops; `"squash"`
        squashes. For a rectangle timm resizes until it is covered; here images are squashed to it, see `at_size`.

        Raises:
            HFViTError: `crop_mode="border"`, or values of the wrong type.
        """
        size = pretrained_cfg.get("input_size") or (3, 224, 224)
        if not isinstance(size, (list, tuple)) or len(size) != 3:
            raise HFViTError(f"input_size is (channels, height, width), got {size!r}")
        height, width = (_whole(side, "input_size") for side in size[1:])
        crop_pct = _number(pretrained_cfg.get("crop_pct") or 0.875, "crop_pct")
        if not 0.01 <= crop_pct <= 1.0:
            raise HFViTError(f"crop_pct must lie in [0.01, 1], got {crop_pct}")
        mode = pretrained_cfg.get("crop_mode") or "center"
        if mode not in ("center", "squash"):
            raise HFViTError(f"crop_mode {mode!r} has no counterpart in hf_vit, which knows center and squash")
        scaled = math.floor(height / crop_pct), math.floor(width / crop_pct)
        resize_to: tuple[int, int] | int = scaled[0] if mode == "center" and height == width else scaled
        crop_to = None if resize_to == (height, width) else (height, width)
        resample = pretrained_cfg.get("interpolation") or "bicubic"
        mean = _numbers(pretrained_cfg.get("mean") or IMAGENET_MEAN, "mean")
        std = _numbers(pretrained_cfg.get("std") or IMAGENET_STD, "std")
        return cls(resize_to, crop_to, "bilinear" if resample == "random" else _resample(resample), 1 / 255, mean, std)

    def to_timm(self, num_channels: int, image_size: tuple[int, int]) -> dict[str, Any]:
        """Entries of a `pretrained_cfg`: input_size, interpolation, mean, std, crop_pct, crop_mode.

        timm always rescales by 1/255; another factor goes into mean and std.
        """
        height, width = self.output_size or image_size
        mean, std = self._statistics(num_channels) or ((0.0,) * num_channels, (1.0,) * num_channels)
        factor = 255 * (1.0 if self.rescale_factor is None else self.rescale_factor)
        squash = not isinstance(self.resize_to, int)
        scaled = self.resize_to if isinstance(self.resize_to, tuple) else (self.resize_to or height,)
        return {
            "input_size": [num_channels, height, width],
            "interpolation": self.resample,
            "mean": [value / factor for value in mean] if factor != 1.0 else list(mean),
            "std": [value / factor for value in std] if factor != 1.0 else list(std),
            "crop_pct": _crop_pct((height, width), scaled),
            "crop_mode": "squash" if squash else "center",
        }

    # -- open_clip ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> "ImageProcessing":
        """From an `open_clip_config.json`: `preprocess_cfg`, and the image size of `model_cfg.vision_cfg`.

        Raises:
            HFViTError: `resize_mode="longest"`, which pads, or values of the wrong type.
        """
        preprocess_cfg = config.get("preprocess_cfg") or {}
        vision = (config.get("model_cfg") or {}).get("vision_cfg") or {}
        size = preprocess_cfg.get("size") or vision.get("image_size") or 224
        sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
        if len(sides) != 2:
            raise HFViTError(f"size is one number or (height, width), got {size!r}")
        height, width = (_whole(side, "size") for side in sides)
        mode = preprocess_cfg.get("resize_mode") or "shortest"
        if mode not in ("shortest", "squash"):
            raise HFViTError(f"resize_mode {mode!r} has no counterpart in hf_vit, which knows shortest and squash")
        short = mode == "shortest" and height == width
        return cls(
            height if short else (height, width),
            (height, width) if short else None,
            _resample(preprocess_cfg.get("interpolation") or "bicubic"),
            1 / 255,
            _numbers(preprocess_cfg.get("mean") or CLIP_MEAN, "mean"),
            _numbers(preprocess_cfg.get("std") or CLIP_STD, "std"),
        )

    # -- a folder -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_files(cls, contents: Mapping[str, Mapping[str, Any]], where: str) -> "ImageProcessing | None":
        """From the contents of a folder's `FILES`, by name; None if none of them describes an image processor.

        Raises:
            HFViTError: unsupported settings; the message begins with `where` and the file's name.
        """
        config = contents.get("config.json") or {}
        settings, name = contents.get("preprocessor_config.json"), "preprocessor_config.json"
        processor = contents.get("processor_config.json") or {}
        if settings is None and isinstance(processor.get("image_processor"), dict):  # as transformers v5 saves CLIP's
            settings, name = processor["image_processor"], "processor_config.json"
        try:
            if settings is not None:
                return cls.from_transformers(settings, config.get("model_type"))
            if "open_clip_config.json" in contents:
                name = "open_clip_config.json"
                return cls.from_open_clip(contents[name])
            name = "config.json"
            if isinstance(pretrained_cfg := config.get("pretrained_cfg"), dict):
                return cls.from_timm(pretrained_cfg)
            if "architecture" in config and "mean" in config:  # timm before 0.9 had no nested pretrained_cfg
                return cls.from_timm(config)
        except HFViTError as error:
            raise HFViTError(f"{where}/{name}: {error}") from error
        except (AttributeError, TypeError, KeyError) as error:
            raise HFViTError(f"{where}/{name}: not the settings of an image processor ({error})") from error
        return None

    def describe(self) -> str:
        """The steps in one line, for messages."""
        steps = []
        if isinstance(self.resize_to, tuple):
            steps.append(f"squash to {self.resize_to[0]}x{self.resize_to[1]} ({self.resample})")
        elif self.resize_to is not None:
            steps.append(f"short side to {self.resize_to} ({self.resample})")
        if self.crop_to is not None:
            steps.append(f"center crop {self.crop_to[0]}x{self.crop_to[1]}")
        if self.rescale_factor is None:
            steps.append("not rescaled")
        elif not math.isclose(self.rescale_factor, 1 / 255, rel_tol=1e-6):
            steps.append(f"times {self.rescale_factor:g}")
        if self.image_mean is None or self.image_std is None:
            steps.append("not normalized")
        else:
            numbers = (" ".join(f"{value:.4g}" for value in values) for values in (self.image_mean, self.image_std))
            steps.append("mean {} std {}".format(*numbers))
        return ", ".join(steps)


def input_size(config: Any, processing: "ImageProcessing | None") -> tuple[int, int]:
    """(height, width) of the input of a model.

    For hf_vit's models the configuration's, to which their positions are resized. For others that of the image
    processor, or, if it has no fixed size, of their configuration.
    """
    ours = getattr(config, "image_size_hw", None)
    if ours is not None:
        return ours
    if processing is not None and processing.output_size is not None:
        return processing.output_size
    size = (processing and processing.resize_to) or getattr(config, "image_size", None) or 224
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


FILES = ("preprocessor_config.json", "processor_config.json", "open_clip_config.json", "config.json")

# Google's ViTs read the whole image in [-1, 1]; torchvision, DeiT, DINO and MAE are evaluated on a crop.
GOOGLE = ImageProcessing()
IMAGENET_CROP = ImageProcessing(256, (224, 224), "bicubic", 1 / 255, IMAGENET_MEAN, IMAGENET_STD)


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file; HFViTError, which names the file, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise HFViTError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise HFViTError(f"{path}: must hold a JSON object")
    return content


def _corner(side: int, crop: int) -> int:
    """First pixel of a center crop; for a side that is too short, the padding before it is rounded up as in
    transformers' `center_crop`."""
    return (side - crop) // 2


def _geometry(kind: str, merged: Mapping[str, Any]) -> tuple[tuple[int, int] | int | None, tuple[int, int] | None]:
    """`resize_to` and `crop_to` of transformers' settings."""
    crop_to = None
    if merged["do_center_crop"]:
        crop = _size(merged["crop_size"], "crop_size", square=True)
        if not isinstance(crop, tuple):
            raise HFViTError(f"crop_size must be height and width, got {merged['crop_size']!r}")
        crop_to = crop
    if not merged["do_resize"]:
        return None, crop_to
    if kind == "Siglip2":  # NaFlex: a square image of max_num_patches patches
        side = math.isqrt(_whole(merged.get("max_num_patches", 256), "max_num_patches"))
        side *= _whole(merged.get("patch_size", 16), "patch_size")
        return (side, side), crop_to
    resize_to = _size(merged["size"], "size", square=merged.get("default_to_square", True))
    if kind == "ConvNext" and isinstance(resize_to, int):
        if resize_to >= 384:
            return (resize_to, resize_to), crop_to
        crop_pct = _number(merged.get("crop_pct", 224 / 256), "crop_pct")
        if not 0.01 <= crop_pct <= 1.0:
            raise HFViTError(f"crop_pct must lie in [0.01, 1], got {crop_pct}")
        return int(resize_to / crop_pct), crop_to or (resize_to, resize_to)
    if crop_to == resize_to:
        return resize_to, None
    return resize_to, crop_to


def _size(value: Any, name: str, square: bool) -> tuple[int, int] | int:
    """transformers' size, a number, a pair or a dictionary, as (height, width) or the length of the short side."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return _whole(value[0], name), _whole(value[1], name)
    if isinstance(value, Mapping):
        keys = {key for key, side in value.items() if side is not None}
        if keys == {"height", "width"}:
            return _whole(value["height"], name), _whole(value["width"], name)
        if keys == {"shortest_edge"}:
            return _whole(value["shortest_edge"], name)
        raise HFViTError(
            f"{name} with {', '.join(sorted(map(str, keys))) or 'nothing'} has no counterpart in hf_vit, which knows "
            "height and width, or shortest_edge"
        )
    side = _whole(value, name)
    return (side, side) if square else side


def _resample(value: Any) -> str:
    if isinstance(value, str) and value.lower() in RESAMPLE:
        return value.lower()
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(RESAMPLE):
        return RESAMPLE[value]
    raise HFViTError(f"resample is one of {', '.join(RESAMPLE)} or their number, got {value!r}")


def _whole(value: Any, name: str) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value != value
        or value in (math.inf, -math.inf)
    ):
        raise HFViTError(f"{name} must be a whole number of pixels, got {value!r}")
    if int(value) != value or not 1 <= value <= 1 << 16:
        raise HFViTError(f"{name} must be a whole number from 1 to 65536, got {value!r}")
    return int(value)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise HFViTError(f"{name} must be a number, got {value!r}")
    return float(value)


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    """One number for each channel, or one for all."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise HFViTError(f"{name} must be a number for each channel, got nothing")
    return tuple(_number(item, name) for item in values)


def _crop_pct(crop: tuple[int, int], scaled: Sequence[int]) -> float:
    """A fraction with floor(crop / fraction) = scaled, in as few digits as possible."""
    exact = crop[0] / scaled[0]
    sides = list(zip(crop, scaled))
    for digits in range(3, 12):
        fraction = round(exact, digits)
        if fraction and all(math.floor(side / fraction) == target for side, target in sides):
            return fraction
    return crop[0] / (scaled[0] + 0.5)
