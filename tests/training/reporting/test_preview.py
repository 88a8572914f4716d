"""The contact sheet: what the network gets, with labels, and nothing else happens.

pytest tests/training/reporting/test_preview.py
"""

import numpy as np
import torch
from PIL import Image

from training import finetune
from training.reporting.preview import as_image, caption, contact_sheet


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
    names = ["cat", "dog", "κ"]
    assert caption(torch.tensor(1), names, 20) == "dog"
    assert caption(torch.tensor([0.25, 0.75, 0.0]), names, 30) == "dog 75% + cat 25%"
    assert caption(torch.tensor([0.0, 0.0, 1.0]), names, 20) == "?"
