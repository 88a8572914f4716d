"""Every processor file becomes one description, whose pixels are those of the class that the file names.

python -m pytest tests/hf_vit/test_image_processing.py
"""

import json
import math

import numpy as np
import pytest
from PIL import Image
from transformers.models.beit import BeitImageProcessorPil
from transformers.models.bit import BitImageProcessorPil
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.convnext import ConvNextImageProcessorPil
from transformers.models.deit import DeiTImageProcessorPil
from transformers.models.efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip import SiglipImageProcessorPil
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTError
from hf_vit.image_processing import FILES, GOOGLE, IMAGENET_CROP, ImageProcessing, read_settings


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, shape, dtype=np.uint8), mode)


CASES = {
    "vit": (ViTImageProcessorPil, {"size": {"height": 24, "width": 32}, "resample": 3}),
    "vit, integer size": (ViTImageProcessorPil, {"size": 32}),
    "vit, no rescaling": (ViTImageProcessorPil, {"size": 32, "do_rescale": False, **IMAGENET}),
    "vit, another factor": (ViTImageProcessorPil, {"size": 32, "rescale_factor": 1 / 127.5}),
    "vit, not normalized": (ViTImageProcessorPil, {"size": 32, "do_normalize": False}),
    "vit, neither": (ViTImageProcessorPil, {"size": 32, "do_normalize": False, "do_rescale": False}),
    "vit, nothing stated": (ViTImageProcessorPil, {}),
    "deit": (DeiTImageProcessorPil, {"size": {"height": 48, "width": 48}, "crop_size": {"height": 32, "width": 32}}),
    "deit, integers": (DeiTImageProcessorPil, {"size": 48, "crop_size": 32, **IMAGENET}),
    "bit": (BitImageProcessorPil, {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
    "bit, integers": (BitImageProcessorPil, {"size": 36, "crop_size": 33}),
    "clip": (CLIPImageProcessorPil, {"size": 32, "crop_size": 32}),
    "clip, crop larger than the image": (
        CLIPImageProcessorPil,
        {"size": 32, "crop_size": {"height": 41, "width": 36}},
    ),
    "siglip": (SiglipImageProcessorPil, {"size": {"height": 32, "width": 32}}),
    "beit": (BeitImageProcessorPil, {"size": 32, "crop_size": 24, "do_center_crop": True}),
    "convnext": (ConvNextImageProcessorPil, {"size": {"shortest_edge": 32}, "crop_pct": 0.875}),
    "convnext, large": (ConvNextImageProcessorPil, {"size": {"shortest_edge": 384}}),
    "efficientnet": (EfficientNetImageProcessorPil, {"size": 40, "crop_size": 32, "do_center_crop": True}),
    "efficientnet, offset": (
        EfficientNetImageProcessorPil,
        {"size": 32, "rescale_offset": True, "include_top": False},
    ),
}


def scale_and_shift(processing):
    """Two arrays with which RGB's `pixel_values = uint8 * scale + shift`."""
    settings = processing.to_transformers(3)
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    mean, std = np.array(settings["image_mean"]), np.array(settings["image_std"])
    return factor / std, -mean / std


def of_folder(folder):
    contents = {name: read_settings(folder / name) for name in FILES if (folder / name).is_file()}
    return ImageProcessing.from_files(contents, str(folder))


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_those_of_the_class(name):
    """As its own class computes them, by the saved ViT processor, and from uint8 by scale and shift."""
    kind, settings = CASES[name]
    stored = settings | {"image_processor_type": kind.__name__.removesuffix("Pil")}
    theirs, processing = kind(**settings), ImageProcessing.from_transformers(stored)
    saved = ViTImageProcessorPil(**processing.to_transformers())
    again = ImageProcessing.from_transformers(json.loads(saved.to_json_string()))
    scale, shift = scale_and_shift(processing)
    for height, width in ((50, 70), (71, 40), (20, 20), (37, 90)):
        expected = theirs(image(height, width), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(
            saved(image(height, width), return_tensors="np")["pixel_values"][0], expected, atol=2e-6, rtol=2e-6
        )
        pixels = np.asarray(processing.resize_and_crop(image(height, width)), np.float64)
        computed = (pixels * scale + shift).transpose(2, 0, 1)
        np.testing.assert_allclose(computed, expected, atol=2e-6 * abs(expected).max())
        assert np.array_equal(pixels, np.asarray(again.resize_and_crop(image(height, width))))


def test_null_is_the_default_of_the_class():
    """As in transformers 4, whose saved files held nulls; version 5 stops at them."""
    nulls = {"size": 32, "image_mean": None, "image_std": None, "do_resize": None, "rescale_factor": None}
    assert ImageProcessing.from_transformers(nulls) == GOOGLE.at_size(32)
    assert ImageProcessing.from_transformers({"size": 32, "image_mean": 0.5, "image_std": 0.5}).to_transformers() == (
        GOOGLE.at_size(32).to_transformers()
    )


def test_files_of_every_age_name_their_class(tmp_path):
    """The feature extractors of version 4 are read as their class; without a name the model type tells."""
    old = {"size": 32, "crop_size": 24, "feature_extractor_type": "CLIPFeatureExtractor"}
    assert ImageProcessing.from_transformers(old).resize_to == 32
    assert (
        ImageProcessing.from_transformers({"size": 32, "image_processor_type": "CLIPImageProcessorFast"}).resize_to
        == 32
    )
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 36}}')
    found = of_folder(tmp_path)
    assert found is not None and (found.resize_to, found.crop_to, found.resample) == (36, (224, 224), "bicubic")
    (tmp_path / "preprocessor_config.json").unlink()
    assert of_folder(tmp_path) is None
    nested = {"image_processor": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 8, "width": 8}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    found = of_folder(tmp_path)
    assert found is not None and found.resize_to == (8, 8)


def test_timm():
    """crop_mode center, the default, is the short side and a center crop also where crop_pct is 1."""
    cfg = {"input_size": [3, 224, 224], "mean": [0.5], "std": [0.25], "interpolation": "bilinear"}
    found = ImageProcessing.from_timm(cfg | {"crop_pct": 1.0})
    assert (found.resize_to, found.crop_to, found.resample) == (224, (224, 224), "bilinear")
    assert found.to_transformers()["image_mean"] == [0.5] * 3
    assert ImageProcessing.from_timm(cfg | {"crop_pct": 0.9}).resize_to == 248
    assert ImageProcessing.from_timm(cfg).resize_to == 256  # timm's default crop_pct
    squash = ImageProcessing.from_timm(cfg | {"crop_pct": 1.0, "crop_mode": "squash"})
    assert (squash.resize_to, squash.crop_to) == ((224, 224), None)
    squash = ImageProcessing.from_timm(cfg | {"crop_pct": 0.9, "crop_mode": "squash"})
    assert (squash.resize_to, squash.crop_to) == ((248, 248), (224, 224))
    with pytest.raises(HFViTError, match="border"):
        ImageProcessing.from_timm(cfg | {"crop_mode": "border"})


def test_timm_there_and_back():
    """Every edge that a crop can have comes back to the pixel."""
    for size in range(16, 600, 7):
        for edge in range(size, 2 * size, 5):
            processing = ImageProcessing(edge, (size, size), "bicubic", 1 / 255, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
            assert ImageProcessing.from_timm(processing.to_timm(3, (size, size))) == processing
    odd = ImageProcessing((32, 32), None, "bilinear", 1 / 127.5, (1.0,) * 3, (1.0,) * 3)
    back = ImageProcessing.from_timm(odd.to_timm(3, (32, 32)))
    np.testing.assert_allclose(scale_and_shift(back), scale_and_shift(odd))


def test_open_clip():
    config = {"model_cfg": {"vision_cfg": {"image_size": 32}}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    found = ImageProcessing.from_open_clip(config)
    assert (found.resize_to, found.crop_to, found.resample, found.image_mean) == (32, (32, 32), "bicubic", (0.5,) * 3)
    config["preprocess_cfg"]["resize_mode"] = "squash"
    assert ImageProcessing.from_open_clip(config).resize_to == (32, 32)
    config["preprocess_cfg"]["resize_mode"] = "longest"
    with pytest.raises(HFViTError, match="longest"):
        ImageProcessing.from_open_clip(config)


def test_another_size():
    """The fraction that the crop keeps stays; the size of the file itself is not computed anew."""
    assert IMAGENET_CROP.at_size(224) is IMAGENET_CROP
    assert IMAGENET_CROP.at_size(384).resize_to == 438 and IMAGENET_CROP.at_size(384).crop_to == (384, 384)
    assert IMAGENET_CROP.at_size((224, 448)).resize_to == (256, 512)
    assert ImageProcessing(450, (384, 384)).at_size(384).resize_to == 450  # int(384 / (384 / 450)) is 449
    assert GOOGLE.at_size((20, 30)) == ImageProcessing((20, 30))
    squashed = ImageProcessing((256, 256), (224, 224)).at_size(448)
    assert (squashed.resize_to, squashed.crop_to) == ((512, 512), (448, 448))
    clip = ImageProcessing(224, (224, 224))
    assert clip.at_size((112, 336)) == ImageProcessing((112, 336))
    assert ImageProcessing(None, None).at_size(64).output_size is None


def test_channels():
    assert IMAGENET_CROP.to_transformers(1)["image_mean"] == [math.fsum((0.485, 0.456, 0.406)) / 3]
    assert IMAGENET_CROP.to_transformers(4)["image_mean"] == [0.485, 0.456, 0.406, 0.485]
    assert not IMAGENET_CROP.to_transformers(1)["do_convert_rgb"]
    gray = ViTImageProcessorPil(**GOOGLE.at_size(32).to_transformers(1))
    assert gray(image(40, 40, "L"), return_tensors="pt")["pixel_values"].shape == (1, 1, 32, 32)
    color = ViTImageProcessorPil(**GOOGLE.at_size(32).to_transformers(3))
    assert color(image(40, 40, "L"), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_a_very_long_image_is_resized_where_the_crop_looks():
    """1 x 20,000 pixels would be 256 x 5,120,000 before the crop."""
    long = Image.new("RGB", (20_000, 1), (10, 20, 30))
    assert np.array_equal(np.asarray(IMAGENET_CROP.resize_and_crop(long)), np.full((224, 224, 3), (10, 20, 30)))
    wide = image(40, 4000)
    whole, part = ImageProcessing(400, (300, 300), "bicubic"), ImageProcessing(400, (300, 300), "bicubic")
    expected = np.asarray(whole.resize_and_crop(wide), int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vit.image_processing.MAX_RESIZED_PIXELS", 1)
        found = np.asarray(part.resize_and_crop(wide), int)
    assert abs(found - expected).max() <= 1


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"size": {"longest_edge": 32}}, "longest_edge"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "longest_edge"),
        ({"size": "large"}, "size"),
        ({"size": -3}, "size"),
        ({"size": 1e9}, "size"),
        ({"size": float("nan")}, "size"),
        ({"size": {}}, "size"),
        ({"size": 32, "do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "crop_size"),
        ({"image_std": [0.0, 0.5, 0.5]}, "image_std"),
        ({"image_mean": ["a"]}, "image_mean"),
        ({"image_mean": []}, "image_mean"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"resample": 9}, "resample"),
        ({"resample": "soft"}, "resample"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"image_processor_type": "DonutImageProcessor"}, "DonutImageProcessor"),
        ({"image_processor_type": 3}, "image_processor_type"),
    ],
)
def test_what_it_cannot_say_is_refused_by_name(tmp_path, settings, what):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(HFViTError, match=f"preprocessor_config.json.*{what}"):
        of_folder(tmp_path)


@pytest.mark.parametrize("named", ["own.Own", [None, "owner/repository--own.Own"]])
@pytest.mark.parametrize("settings", [{}, {"image_processor_type": "ViTImageProcessor"}])
def test_a_class_of_the_repositorys_own_is_refused(named, settings):
    with pytest.raises(HFViTError, match="prepared by Own, which hf_vit does not know"):
        ImageProcessing.from_transformers(settings | {"auto_map": {"AutoImageProcessor": named}})


def test_a_known_class_that_was_saved_with_its_code_is_read():
    auto_map = {"AutoImageProcessor": "image_processing_clip.CLIPImageProcessor"}
    assert ImageProcessing.from_transformers({"auto_map": auto_map}) == ImageProcessing.from_transformers(
        {"image_processor_type": "CLIPImageProcessor"}
    )


def test_describe():
    assert IMAGENET_CROP.describe() == (
        "short side to 256 (bicubic), center crop 224x224, mean 0.485 0.456 0.406 std 0.229 0.224 0.225"
    )
