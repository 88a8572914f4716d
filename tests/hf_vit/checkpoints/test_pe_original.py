"""Perception Encoder's own files: against timm's port at its native size, against the equations at others.

pytest tests/hf_vit/checkpoints/test_pe_original.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hf_vit import load_checkpoint
from hf_vit.checkpoints import read_checkpoint
from hf_vit.errors import HFViTError
from hf_vit.inference.optimize import optimize_encoder


GOLDEN = Path(__file__).parents[2] / "fixtures" / "goldens_family" / "timm_pe_core"
HEADS, EPS = 2, 1e-5


def original_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A timm PE core under the names of PE's repository."""
    found = {
        "conv1.weight": tensors["patch_embed.proj.weight"],
        "class_embedding": tensors["cls_token"].flatten(),
        "positional_embedding": tensors["pos_embed"][0],
        "attn_pool.probe": tensors["attn_pool.latent"],
        "proj": tensors["head.weight"].T.contiguous(),
    }
    pool = {"proj": "attn.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    block = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj"}  # fmt: skip
    for kind in ("weight", "bias"):
        found[f"ln_pre.{kind}"], found[f"ln_post.{kind}"] = tensors[f"norm_pre.{kind}"], tensors[f"norm.{kind}"]
        joined = torch.cat([tensors[f"attn_pool.q.{kind}"], tensors[f"attn_pool.kv.{kind}"]])
        found[f"attn_pool.attn.in_proj_{kind}"] = joined
        for theirs, name in pool.items():
            found[f"attn_pool.{name}.{kind}"] = tensors[f"attn_pool.{theirs}.{kind}"]
        for number in range(3):
            ours, theirs = f"transformer.resblocks.{number}.", f"blocks.{number}."
            for part, name in block.items():
                found[f"{ours}{name}.{kind}"] = tensors[f"{theirs}{part}.{kind}"]
            if kind == "weight":
                fused = tensors.get(f"{theirs}attn.qkv.weight")
                parts = [tensors.get(f"{theirs}attn.{letter}_proj.weight") for letter in "qkv"]
                found[f"{ours}attn.in_proj_weight"] = torch.cat(parts) if fused is None else fused
            else:
                fused = tensors.get(f"{theirs}attn.qkv.bias")
                parts = [tensors.get(f"{theirs}attn.{letter}_proj.bias") for letter in "qkv"]
                found[f"{ours}attn.in_proj_bias"] = torch.cat(parts) if fused is None else fused
    return found


def encoder_of_the_paper(w: dict[str, torch.Tensor], pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens after the last norm, and the pooled vector, by the equations."""
    x = F.conv2d(pixels, w["conv1.weight"], stride=w["conv1.weight"].shape[-1])
    batch, width, rows, columns = x.shape
    x = torch.cat([w["class_embedding"].expand(batch, 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    table = w["positional_embedding"]
    side = round((len(table) - 1) ** 0.5)
    grid = table[1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=False)
    x = x + torch.cat([table[:1], grid[0].flatten(1).T])
    x = F.layer_norm(x, (width,), w["ln_pre.weight"], w["ln_pre.bias"], EPS)
    d = width // HEADS
    frequencies = 10_000.0 ** -(torch.arange(0, d // 2, 2) / (d // 2))
    across = (torch.arange(columns) + 1).repeat(rows)[:, None] * frequencies  # the class token is cell (0, 0)
    down = (torch.arange(rows) + 1).repeat_interleave(columns)[:, None] * frequencies
    angles = torch.cat([torch.zeros(1, d // 2), torch.cat([across, down], dim=1)])
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(t: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    for number in range(3):
        b = {key.partition(f"resblocks.{number}.")[2]: value for key, value in w.items() if f".{number}." in key}
        y = F.layer_norm(x, (width,), b["ln_1.weight"], b["ln_1.bias"], EPS)
        q, k, v = (
            part.unflatten(-1, (HEADS, d)).transpose(1, 2)
            for part in F.linear(y, b["attn.in_proj_weight"], b["attn.in_proj_bias"]).chunk(3, dim=-1)
        )
        weights = (rotated(q) @ rotated(k).transpose(-1, -2) / d**0.5).softmax(-1)
        x = x + F.linear((weights @ v).transpose(1, 2).flatten(2), b["attn.out_proj.weight"], b["attn.out_proj.bias"])
        y = F.layer_norm(x, (width,), b["ln_2.weight"], b["ln_2.bias"], EPS)
        y = F.gelu(F.linear(y, b["mlp.c_fc.weight"], b["mlp.c_fc.bias"]))
        x = x + F.linear(y, b["mlp.c_proj.weight"], b["mlp.c_proj.bias"])
    x = F.layer_norm(x, (width,), w["ln_post.weight"], w["ln_post.bias"], EPS)
    pool = torch.nn.MultiheadAttention(width, 8, batch_first=True)
    pool.load_state_dict(
        {key.removeprefix("attn_pool.attn."): v for key, v in w.items() if ".attn." in key and "pool" in key}
    )
    with torch.no_grad():
        y = pool(w["attn_pool.probe"].expand(batch, -1, -1), x, x, need_weights=False)[0]
    z = F.layer_norm(y, (width,), w["attn_pool.layernorm.weight"], w["attn_pool.layernorm.bias"], EPS)
    z = F.gelu(F.linear(z, w["attn_pool.mlp.c_fc.weight"], w["attn_pool.mlp.c_fc.bias"]))
    return x, (y + F.linear(z, w["attn_pool.mlp.c_proj.weight"], w["attn_pool.mlp.c_proj.bias"]))[:, 0]


@pytest.fixture(scope="module")
def tensors():
    return original_names(load_file(GOLDEN / "model.safetensors"))


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    """As published: both towers under one roof."""
    path = tmp_path_factory.mktemp("pe") / "PE-Core-B16-224.pt"
    both = {f"visual.{name}": value for name, value in tensors.items()}
    torch.save(
        both | {"text_projection": torch.ones(4, 4), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}, path
    )
    return path


def test_it_computes_what_timms_port_does_at_the_native_size(file):
    loaded = read_checkpoint(file, num_attention_heads=HEADS)
    assert loaded.notes == ["the vision tower is read; not used: visual.proj, the text tower"]
    assert loaded.image_processing.describe() == "squash to 32x32 (bilinear), mean 0.5 0.5 0.5 std 0.5 0.5 0.5"
    with np.load(GOLDEN / "io.npz") as recorded, torch.no_grad():
        found = loaded.model.vit(torch.from_numpy(recorded["pixels.native"])).last_hidden_state
        expected = torch.from_numpy(recorded["last_hidden_state.native"])
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (48, 64)])
def test_it_follows_the_equations_at_any_size(file, tensors, size):
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected, pooled = encoder_of_the_paper(tensors, pixels)
    model = load_checkpoint(file, num_attention_heads=HEADS)
    with torch.no_grad():
        found = model.vit(pixels)
        assert (found.last_hidden_state - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (found.pooler_output - pooled).abs().max() <= 1e-5 * pooled.abs().max()
        resized = load_checkpoint(file, num_attention_heads=HEADS, image_size=size).vit
        optimize_encoder(resized)
        assert (resized(pixels).last_hidden_state - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_pooling_and_last_norm_it_is_lang_or_spatial(tensors, tmp_path):
    spatial = {name: value for name, value in tensors.items() if not name.startswith(("attn_pool", "ln_post", "proj"))}
    for number in range(3):
        for part in (1, 2):
            spatial[f"transformer.resblocks.{number}.ls_{part}.gamma"] = torch.full((32,), 0.1)
    torch.save({"state_dict": spatial}, tmp_path / "PE-Spatial.pt")
    config = load_checkpoint(tmp_path / "PE-Spatial.pt", num_attention_heads=HEADS).config
    assert (config.final_norm, config.pooling, config.layer_scale_init) == ("none", "token", 1e-5)
    assert config.rope_reference_grid == "image" and config.rope_offset == 1.0
    with pytest.raises(HFViTError, match="num_attention_heads"):  # a toy width, which no published model has
        load_checkpoint(tmp_path / "PE-Spatial.pt")


def test_it_goes_through_our_own_folder(file, tmp_path):
    model = load_checkpoint(file, num_attention_heads=HEADS, num_labels=3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        torch.testing.assert_close(again.vit(pixels).pooler_output, model.vit(pixels).pooler_output)
