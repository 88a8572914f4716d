"""A page that classifies an image and shows the model's attention; one file, which also runs alone as a Space.

    python app.py                     serve the models in the folders next to this file
    hf-vit demo MODEL                 serve the same page for a model (hf_vit/cli/demo.py)

It imports gradio, numpy, pillow, torch and transformers: a Space has only these. Images are decoded by
hf_vit/image_io.py, of which a Space carries a copy. One column for each model: five labels, and the attention of one
block over the image.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification


try:
    from hf_vit.image_io import UnreadableImage, open_image, processor_pixels
except ImportError:  # in a Space, the same file lies beside this one
    from image_io import UnreadableImage, open_image, processor_pixels  # type: ignore[no-redef]


MEAN = "mean of all heads"
LARGEST_SIDE = 640  # pixels of the overlay
# matplotlib's inferno, dark to bright, at five positions: a Space has no matplotlib.
HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float64)


@dataclass
class Unreadable:
    """An upload that is not an image."""

    reason: str = "This file cannot be read as an image: try a JPEG, PNG, WebP, GIF, BMP or TIFF file."


@dataclass
class SpaceClassifier:
    """A model of hf_vit in eval mode, its image processor, and its name on the page."""

    name: str
    model: Any
    processor: Any

    def __post_init__(self):
        named = {number: str(label) for number, label in self.model.config.id2label.items()}
        repeated = {label for label, times in Counter(named.values()).items() if times > 1}  # ImageNet has two cranes
        self.labels = {number: f"{name} ({number})" if name in repeated else name for number, name in named.items()}

    @classmethod
    def load(cls, name: str, path: str | Path) -> "SpaceClassifier":
        """From a folder or a Hub repository, with the code next to the weights."""
        model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True).eval()
        return cls(name, model, AutoImageProcessor.from_pretrained(path, backend="pil"))

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def heads(self) -> int:
        return self.model.config.num_attention_heads

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """`(1, C, H, W)`, normalized."""
        decoded = open_image(image, num_channels=self.model.config.num_channels)
        return processor_pixels(self.processor, decoded).to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def scores(self, image: Image.Image) -> dict[str, float] | str:
        """{label: probability} of every class (their sum is one for single labels); a regression's numbers as text."""
        logits = self.model(self.pixels(image)).logits[0].float()
        if self.model.config.problem_type == "regression":
            return ", ".join(f"{self.labels[number]}: {value:.6g}" for number, value in enumerate(logits.tolist()))
        several = self.model.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if several else logits.softmax(dim=0)
        return {self.labels[number]: score for number, score in enumerate(probabilities.tolist())}

    @torch.inference_mode()
    def overlay(self, image: Image.Image, layer: int, head: str) -> Image.Image:
        """The attention of a block's class token (without one: of its mean patch) over the image.

        Args:
            layer: from 0, as `attention_maps` counts. head: its number from 0, or `MEAN`.
        """
        pixels = self.pixels(image)
        weights = self.model.attention_maps(pixels, layers=[int(layer)])[int(layer)][0].float()  # (heads, N, N)
        weights = weights.mean(dim=0) if head == MEAN else weights[int(head)]
        config = self.model.config
        row = weights[0] if config.use_class_token else weights[config.num_prefix_tokens :].mean(dim=0)  # (N,)
        heat = row[config.num_prefix_tokens :].reshape(config.grid_for(tuple(pixels.shape[-2:])))  # (rows, columns)
        return blend(self.window(image, pixels), heat.cpu().numpy())

    def window(self, image: Image.Image, pixels: torch.Tensor) -> Image.Image:
        """The part of the image that the model sees: all of it, or the center crop of its processor."""
        if getattr(self.processor, "do_center_crop", False):
            std, mean = (torch.tensor(numbers)[:, None, None] for numbers in (self.processor.image_std,
                                                                            self.processor.image_mean))  # fmt: skip
            view = ((pixels[0].float().cpu() * std + mean) * 255).round().clamp(0, 255).byte().numpy()
            shown = Image.fromarray(np.broadcast_to(view, (3, *view.shape[1:])).transpose(1, 2, 0).copy())
        else:
            shown = open_image(image)
        scale = LARGEST_SIDE / max(shown.size)
        return shown.resize((max(1, round(shown.width * scale)), max(1, round(shown.height * scale))))


def blend(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Blend a heat map `(rows, columns)` with an image: gray where it is low, colored where it is high."""
    level = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-12)
    large = np.asarray(Image.fromarray(level.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR))
    positions = large.clip(0, 1) * (len(HEAT) - 1)
    below = np.minimum(positions.astype(int), len(HEAT) - 2)
    fraction = (positions - below)[..., None]
    color = HEAT[below] * (1 - fraction) + HEAT[below + 1] * fraction  # (H, W, 3)
    gray = np.asarray(image.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=2)
    opacity = 0.35 + 0.45 * large[..., None]  # the image stays visible everywhere
    return Image.fromarray(((1 - opacity) * gray + opacity * color).round().clip(0, 255).astype(np.uint8))


def build_page(classifiers: Sequence[SpaceClassifier]) -> gr.Blocks:
    """The page: an image in, one column for each model out."""
    with gr.Blocks(title="What is in the image?", analytics_enabled=False) as page:
        gr.Markdown("# What is in the image?\nDrop an image: labels, and where the model looks.")
        # the original file: gradio's own PIL image has lost 16 bits and transparency
        upload = gr.Image(type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"], height=280)
        setattr(upload, "preprocess", _or_unreadable(upload.preprocess))  # noqa: B010 - a method replaced
        with gr.Row():
            columns = [_column(classifier, upload) for classifier in classifiers]

    def show(image: Image.Image | Unreadable | None, *settings: Any) -> list[Any]:
        """Labels and overlay of every column; `settings` are block and head of each."""
        if isinstance(image, Unreadable):
            gr.Warning(image.reason, title="Not an image", duration=None)
        if not isinstance(image, Image.Image):
            return [None] * (2 * len(classifiers))
        results: list[Any] = []
        for classifier, block, head in zip(classifiers, settings[::2], settings[1::2]):
            results += [classifier.scores(image), classifier.overlay(image, block, head)]
        return results

    with page:
        inputs = [control for _, controls in columns for control in controls]
        outputs = [output for shown, _ in columns for output in shown]
        # always_last: by default gradio drops an image that is uploaded while another is classified
        upload.input(show, [upload, *inputs], outputs, concurrency_id="model", trigger_mode="always_last")
    return page


def _column(classifier: SpaceClassifier, upload: gr.Image) -> tuple[list[Any], list[Any]]:
    """The components of one model: its outputs (labels, overlay) and its inputs (block, head)."""
    with gr.Column(min_width=300):
        gr.Markdown(f"### {classifier.name}")
        labels = gr.Label(num_top_classes=5, label="Labels")
        overlay = gr.Image(
            label="Attention", type="pil", interactive=False, format="png", buttons=["download", "fullscreen"]
        )
        if classifier.layers > 1:
            block: Any = gr.Slider(0, classifier.layers - 1, value=classifier.layers - 1, step=1, label="Block")
        else:  # a slider needs two different ends
            block = gr.Dropdown([0], value=0, label="Block")
        head = gr.Dropdown([MEAN, *map(str, range(classifier.heads))], value=MEAN, label="Head")

    def look(image: Image.Image | Unreadable | None, layer: int, number: str) -> Image.Image | None:
        return classifier.overlay(image, layer, number) if isinstance(image, Image.Image) else None

    # One request at a time: hooks on a model would also record the images of other requests.
    for control in (block, head):
        control.change(look, [upload, block, head], overlay, concurrency_id="model")
    return [labels, overlay], [block, head]


def _or_unreadable(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A component's `preprocess` that returns the decoded image, or `Unreadable`: its own error is not shown."""

    def preprocess(payload: Any) -> Any:
        try:
            path = read(payload)
        except Exception:  # PIL raises many kinds for damaged files
            return Unreadable()
        try:
            return None if path is None else open_image(path, name="This file")
        except UnreadableImage as error:
            return Unreadable(str(error))

    return preprocess


def serve(classifiers: Sequence[SpaceClassifier], **options: Any) -> None:
    """Serve the page until it is stopped; `options` are those of gradio's `launch`."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from the network
    build_page(classifiers).launch(theme=theme, **options)


if __name__ == "__main__":
    folders = sorted(path.parent for path in Path(__file__).parent.glob("*/config.json"))
    serve([SpaceClassifier.load(folder.name, folder) for folder in folders])
