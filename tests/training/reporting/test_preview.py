"""The contact sheet: what the network gets, with labels, and nothing else happens.

pytest tests/training/reporting/test_preview.py
"""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from hf_vit import plot_text
from training import finetune, train
from training.reporting import preview
from training.reporting.preview import as_image, contact_sheet, preview_caption


LINE = (
    "--set hidden_size=16 num_hidden_layers=1 num_attention_heads=2 intermediate_size=16 patch_size=4 --image_size 8 "
    "--dataset digits --use_cpu --per_device_train_batch_size 9 --crop squash --no_flip"
)


def test_preview_draws_one_batch_and_stops(tmp_path, capsys):
    assert finetune.main([*LINE.split(), "--output_dir", str(tmp_path / "out"), "--preview"]) == {}
    path = tmp_path / "out_preview.png"
    assert str(path) in capsys.readouterr().out
    sheet = Image.open(path)
    assert sheet.size == (3 * (96 + 4), 3 * (96 + 14 + 4)) and len(np.unique(np.asarray(sheet))) > 8
    assert not (tmp_path / "out").exists()
    named = tmp_path / "sheets/mixed.png"
    finetune.main(
        [*LINE.split(), "--output_dir", str(tmp_path / "out"), "--preview", str(named), "--mixup_alpha", "0.5"]
    )
    assert (np.asarray(Image.open(named)) != np.asarray(sheet)).any()


def test_images_come_back_from_their_normalization():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    normal = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.25
    assert (np.asarray(as_image(normal, [0.4, 0.5, 0.6], [0.25] * 3)) == pixels).all()
    assert contact_sheet(normal[None, :1], torch.tensor([0]), ["a"], [0.4], [0.25]).size == (100, 114)


def test_captions_name_the_class_or_the_two_largest_shares():
    names = ["cat", "dog", "犬κ"]
    assert preview_caption(torch.tensor(1), names, 20) == "dog"
    assert preview_caption(torch.tensor([0.25, 0.75, 0.0]), names, 30) == "dog 75% + cat 25%"
    assert preview_caption(torch.tensor([0.0, 0.0, 1.0]), names, 20) == "犬κ"


def captioned(name):
    """The pixels under a gray image of this class."""
    sheet = contact_sheet(torch.zeros(1, 3, 8, 8), torch.tensor([0]), [name], [0.5] * 3, [0.5] * 3)
    return np.asarray(sheet)[98:]


def test_captions_are_drawn_in_every_script_that_a_font_has():
    accents = [captioned(name) for name in ("?", "é", "ü", "ж", "Ω")]
    assert len({pixels.tobytes() for pixels in accents}) == len(accents)
    whole, cut = captioned("W" * 6), captioned("W" * 60)
    assert (whole < 128).any() and (cut[:, -2:] == 255).all()  # a long name stays in its cell


def test_names_that_no_font_draws_are_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_text, "_installed", list)
    preview.font_for.cache_clear()
    said = []
    trainer = SimpleNamespace(
        args=SimpleNamespace(preview=True), normalize=SimpleNamespace(mean=[0.5], std=[0.5]),
        output_dir=tmp_path / "out", accelerator=SimpleNamespace(is_main_process=True),
        first_batch=lambda: (torch.zeros(3, 1, 8, 8), torch.arange(3)),
    )  # fmt: skip
    train.preview(trainer, ["犬", "猫", "Müller"], said.append)
    preview.font_for.cache_clear()
    notes = [line for line in said if line.startswith("note:")]
    assert len(notes) == 1 and "犬" in notes[0] and "猫" in notes[0] and "Müller" not in notes[0]
