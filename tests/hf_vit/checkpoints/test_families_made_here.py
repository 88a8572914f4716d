"""Variations of transformers' families that no golden has: their own class is built here, saved, read, written back.

python -m pytest tests/hf_vit/checkpoints/test_families_made_here.py
"""

import json
import zlib

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hf_vit.checkpoints import load_checkpoint, save_checkpoint
from hf_vit.image_processing import GOOGLE
from tests.helpers.checkpoints import same


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
WIDE = SIZES | {"intermediate_size": 40}
PLAIN_BEIT = {"use_relative_position_bias": False, "use_absolute_position_embeddings": True}
CASES = {  # class: of transformers, without "Model" and "Config"; fields of its configuration
    "DINOv3 without registers": ("DINOv3ViT", "Model", WIDE | {"num_register_tokens": 0}),
    "DINOv2 with no registers": ("Dinov2WithRegisters", "Model", SIZES | {"num_register_tokens": 0}),
    "TIPSv2, gated": ("Tipsv2Vision", "Model", SIZES | {"use_swiglu_ffn": True}),
    "TIPSv2 without registers": ("Tipsv2Vision", "Model", SIZES | {"num_register_tokens": 0}),
    "BEiT without LayerScale": ("Beit", "Model", WIDE | PLAIN_BEIT | {"layer_scale_init_value": 0.0}),
    "BEiT with a shared table": (
        "Beit",
        "ForImageClassification",
        WIDE | {"use_relative_position_bias": True, "use_shared_relative_position_bias": True, "num_labels": 3},
    ),
    "DeiT with a pooler": ("DeiT", "Model", WIDE),
    "MetaCLIP 2's tower": ("MetaClip2Vision", "Model", WIDE),
    "Pixio": ("Pixio", "Model", SIZES | {"n_cls_tokens": 3}),
    "data2vec": ("Data2VecVision", "Model", WIDE | {"use_relative_position_bias": True}),
}


@pytest.fixture(params=CASES)
def made(request, tmp_path):
    """(its model, the class, the folder that it was saved to)."""
    stem, kind, fields = CASES[request.param]
    torch.manual_seed(zlib.crc32(request.param.encode()))
    theirs = getattr(transformers, stem + kind)(getattr(transformers, stem + "Config")(**fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "in")
    return theirs, stem + kind, tmp_path / "in"


def test_it_computes_what_its_own_class_computes(made):
    theirs, _, folder = made
    ours, pixels = load_checkpoint(folder, dtype="float64"), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected, found = theirs.double()(pixels), ours(pixels) if ours.config.num_labels else ours.vit(pixels)
    for kind in ("last_hidden_state", "pooler_output", "logits"):
        if getattr(expected, kind, None) is not None:
            reference = getattr(expected, kind)
            assert (getattr(found, kind) - reference).abs().max() <= 1e-6 * reference.abs().max()


def test_it_is_read_from_the_names_that_transformers_has_in_memory_too(made, tmp_path):
    theirs, _, folder = made
    (tmp_path / "v5").mkdir()
    (tmp_path / "v5" / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(
        {key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "v5/model.safetensors"
    )
    same(load_checkpoint(tmp_path / "v5"), load_checkpoint(folder))


def test_it_goes_back_into_its_own_class(made, tmp_path):
    _, name, folder = made
    model = load_checkpoint(folder)
    save_checkpoint(model, tmp_path / "out", "transformers", GOOGLE.at_size(16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [name]
    _, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    same(load_checkpoint(tmp_path / "out"), model)


def test_numbers_of_a_config_that_transformers_before_v5_took(tmp_path):
    """1 for 1.0 and 4.0 for 4; a class of v5 refuses them."""
    config = transformers.Dinov2Config(**SIZES)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text()) | {"mlp_ratio": 4.0, "layerscale_value": 1}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert load_checkpoint(tmp_path).config.intermediate_size == 96
