"""A file gives the same pixels in evaluation, score, predict, inspect, export, demo and the saved processor.

The files are drawn: every Pillow mode, EXIF orientations 1 to 8, long and small sizes, in the formats that hold them.

python -m pytest tests/hf_vit/test_one_image_one_tensor.py
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.vit import ViTImageProcessorPil

import hf_vit
from hf_vit import HFViTConfig, HFViTForImageClassification
from hf_vit.cli import inputs, inspect
from hf_vit.cli.main import main
from hf_vit.image_io import processor_pixels
from hf_vit.image_processing import ImageProcessing
from training.config.arguments import DataArguments
from training.data.dataset import open_dataset
from training.data.normalize import Normalize
from training.data.splits import transforms
from training.evaluation.classifier import open_classifier


SIZES = ((40, 31), (19, 64), (300, 17), (9, 9), (3, 700))
FORMATS_OF_MODE = {
    "1": ("PNG", "TIFF"), "L": ("PNG", "JPEG", "TIFF", "WEBP"), "LA": ("PNG", "TIFF"), "P": ("PNG", "GIF"),
    "P transparent": ("PNG", "GIF"), "RGB": ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "TGA"), "RGB transparent": ("PNG",),
    "RGBA": ("PNG", "TIFF", "WEBP"), "CMYK": ("JPEG", "TIFF"), "YCCK": ("JPEG",),
    "I;16": ("PNG", "TIFF"), "I": ("TIFF",), "F": ("TIFF",),
}  # fmt: skip
TURNED = ("PNG", "JPEG", "TIFF", "WEBP")  # formats with EXIF


def scene(height, width, mode, seed):
    """An image of noise on a ramp without symmetry."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, height * width).reshape(height, width)
    rgb = (np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=2) + rng.integers(0, 55, (height, width, 3))).astype("u1")
    image = Image.fromarray(rgb)
    if mode in ("I;16", "I", "F"):
        deep = ramp * 300 if mode != "F" else ramp / 255
        return Image.fromarray(deep.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(rng.integers(0, 2, (height, width), dtype=np.uint8) * 255))
        return image
    if mode.startswith("P"):
        image = image.quantize(32)
        if "transparent" in mode:
            image.info["transparency"] = 3
        return image
    if mode == "RGB transparent":
        image.info["transparency"] = tuple(int(value) for value in rgb[0, 0])
        return image
    return image.convert("CMYK" if mode == "YCCK" else mode)


def encoded(image, format, orientation=1):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} if format in TURNED and orientation != 1 else {}
    if format == "JPEG":
        options |= {"quality": 90}
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    image.save(buffer, format, **options)
    data = buffer.getvalue()
    return data


def as_ycck(data):
    """A CMYK JPEG whose Adobe marker says that its colors are YCCK: another file of the same bytes."""
    place = data.index(b"Adobe")
    return data[: place + 11] + b"\x02" + data[place + 12 :]


def write_all(folder):
    """Every mode in every format and size, and every orientation of each format that has them."""
    number = 0
    for mode, formats in FORMATS_OF_MODE.items():
        for format in formats:
            for height, width in SIZES:
                data = encoded(scene(height, width, mode, number), format)
                data = as_ycck(data) if mode == "YCCK" else data
                (folder / f"{number:03d}-{mode.replace(' ', '-').replace(';', '')}.{format.lower()}").write_bytes(data)
                number += 1
    for format in TURNED:
        for orientation in range(2, 9):
            data = encoded(scene(57, 38, "RGB", number), format, orientation)
            (folder / f"{number:03d}-orientation-{orientation}.{format.lower()}").write_bytes(data)
            number += 1
    return number


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        (folder / name).mkdir()
    Image.new("RGB", (8, 8)).save(folder / "b" / "b.png")
    assert write_all(folder / "a") >= 171
    return folder


PROCESSORS = {
    "squash": {"size": {"height": 16, "width": 24}},
    "crop": {"size": {"shortest_edge": 27}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24},
             "resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "gray": {"size": {"height": 16, "width": 16}, "image_mean": [0.4], "image_std": [0.3], "do_convert_rgb": False},
}  # fmt: skip


def model_folder(path, kind):
    channels = 1 if kind == "gray" else 3
    processing = ImageProcessing.from_transformers(PROCESSORS[kind])
    config = HFViTConfig(
        image_size=list(processing.output_size), patch_size=8, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, num_channels=channels, num_labels=2,
    )  # fmt: skip
    HFViTForImageClassification(config).save_pretrained(path)
    ViTImageProcessorPil(**processing.to_transformers(channels)).save_pretrained(path)
    return path, config, processing


@pytest.mark.parametrize("kind", PROCESSORS)
def test_everything_sees_the_same_pixels(images, tmp_path, kind, monkeypatch, capsys):
    folder, config, processing = model_folder(tmp_path / "model", kind)
    data = open_dataset(str(images), split="train")
    rows = [row for row in range(len(data)) if data.labels[row] == 0]
    files = [images / data.image_name(row) for row in rows]
    saved = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = [
        saved(hf_vit.open_image(file, num_channels=config.num_channels), return_tensors="pt")["pixel_values"][0]
        for file in files
    ]

    def compare(name, results):
        assert len(results) == len(expected), name
        apart = {file.name: (a - b).abs().max().item() for file, a, b in zip(files, results, expected)}
        worst = max(apart, key=apart.get)
        assert apart[worst] == 0, (name, worst, apart[worst])

    _, view = transforms(DataArguments(dataset="x"), config, processing)
    normalize = Normalize.of(saved, config.num_channels)
    seen = data.with_transform(view)
    compare("evaluation", [normalize(seen[row]["pixel_values"]) for row in rows])
    for row, file in zip(rows, files):
        pixels = processing.resize_and_crop(hf_vit.open_image(file, num_channels=config.num_channels))
        assert np.array_equal(np.atleast_3d(np.asarray(pixels)).transpose(2, 0, 1), seen[row]["pixel_values"])

    classifier = open_classifier(str(folder))
    seen = data.with_transform(classifier.transform)
    compare("score", [classifier.normalize(seen[row]["pixel_values"]) for row in rows])

    received = []

    def load(model, load=inputs.load_classifier, **changes):
        loaded = load(model, **changes)
        loaded.model.register_forward_pre_hook(lambda module, inputs: received.extend(inputs[0].detach().clone()))
        return loaded

    monkeypatch.setattr(inputs, "load_classifier", load)
    monkeypatch.setattr(inputs, "MIN_OPTIMIZED_IMAGES", 10**6)
    assert main(["predict", *map(str, files), "--model", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == len(files)
    compare("predict", received)

    read = inputs.read_images(files, config.num_channels, [])
    compare("inspect and export", [processor_pixels(saved, image)[0] for _, image in read])


def test_the_demo_sees_them_too(images, tmp_path):
    gradio = pytest.importorskip("gradio")
    from hf_vit.hub.space_app import SpaceClassifier, build_page

    folder, _, _ = model_folder(tmp_path / "model", "crop")
    model = HFViTForImageClassification.from_pretrained(folder).eval()
    saved = AutoImageProcessor.from_pretrained(folder, backend="pil")
    classifier = SpaceClassifier("model", model, saved)
    page = build_page([classifier])
    upload = next(block for block in page.blocks.values() if isinstance(block, gradio.Image) and block.sources)
    for file in sorted((images / "a").iterdir()):
        opened = upload.preprocess(gradio.data_classes.ImageData(path=str(file), orig_name=file.name))
        expected = saved(hf_vit.open_image(file), return_tensors="pt")["pixel_values"]
        assert torch.equal(classifier.pixels(opened), expected), file.name


def test_modes_are_what_they_should_be():
    """Not only equal everywhere: the values that a viewer shows."""
    deep = np.full((4, 4), 30000, np.uint16)
    assert np.asarray(hf_vit.open_image(encoded(Image.fromarray(deep), "PNG")))[0, 0].tolist() == [117] * 3
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.asarray(hf_vit.open_image(encoded(clear, "PNG")))[0, 0].tolist() == [255] * 3
    assert hf_vit.open_image(io.BytesIO(encoded(clear, "PNG")), num_channels=1).mode == "L"
    with pytest.raises(hf_vit.HFViTError, match="1 or 3 channels; the model reads 4"):
        hf_vit.open_image(encoded(clear, "PNG"), num_channels=4)


def test_one_pixel_high_images_take_no_gigabytes(tmp_path):
    """A short side of 256 would make it 256 x 5,120,000."""
    import tracemalloc

    settings = PROCESSORS["crop"] | {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    saved = ViTImageProcessorPil(**settings)
    view = inspect.processor_pixels
    path = tmp_path / "long.png"
    Image.linear_gradient("L").resize((20_000, 1)).save(path)
    tracemalloc.start()
    pixels = view(saved, hf_vit.open_image(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pixels.shape == (1, 3, 224, 224) and peak < 64e6
