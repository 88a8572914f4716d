"""Checkpoints as compiled, distributed, Lightning, DINO, timm and MAE trainings leave them, and what they do not say.

python -m pytest tests/hf_vit/checkpoints/test_wrappers.py
"""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vit import HFViTError
from hf_vit.checkpoints import AssumptionWarning, load_checkpoint, read_checkpoint, save_checkpoint
from hf_vit.checkpoints.spec import heads_for_width
from tests.helpers.checkpoints import ours, same


pytestmark = pytest.mark.filterwarnings("ignore::hf_vit.checkpoints.AssumptionWarning")
KNOWN = {"num_attention_heads": 4, "hidden_act": "gelu"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model and its tensors under timm's names."""
    torch.manual_seed(0)
    model = ours(hidden_act="gelu", position_interpolation="bicubic_antialias")
    folder = tmp_path_factory.mktemp("plain")
    save_checkpoint(model, folder / "vit.safetensors", format="timm")
    return model, load_file(folder / "vit.safetensors")


def under(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def bare(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


CONTENTS = {
    "torch.compile": lambda t: under("_orig_mod.", t),
    "DDP of a compiled model": lambda t: {"state_dict": under("module._orig_mod.", t)},
    "Lightning": lambda t: {"epoch": 3, "state_dict": under("model.", t), "loops": {"fit_loop": {"state_dict": {}}}},
    "Lightning, compiled": lambda t: {"state_dict": under("model._orig_mod.", t)},
    "compiled blocks": lambda t: {name.replace("blocks.1.", "blocks.1._orig_mod."): v for name, v in t.items()},
    "head outside": lambda t: under("backbone.", bare(t)) | {n: v for n, v in t.items() if n.startswith("head.")},
    "timm with args": lambda t: {"state_dict": t, "args": argparse.Namespace(lr=0.1, out=Path("x"))},
    "NumPy numbers": lambda t: {"model": t, "best": np.float64(0.5), "epoch": np.int64(3), "curve": np.arange(3.0)},
    "counter": lambda t: {"state_dict": t | {"global_step": torch.tensor(5)}, "optimizer": {"state": {}}},
    "average": lambda t: under("module.", t) | {"n_averaged": torch.tensor(7)},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_wrapped(plain, tmp_path, name):
    model, tensors = plain
    torch.save(CONTENTS[name](tensors), tmp_path / "x.pth")
    same(load_checkpoint(tmp_path / "x.pth", **KNOWN), model)


@pytest.mark.parametrize(
    "content",
    [
        lambda t: under("backbone.", t),
        lambda t: under("encoder.", t),
        lambda t: {"teacher": under("backbone.", t) | {"head.mlp.0.weight": torch.ones(3, 3)}, "student": {}},
        lambda t: {
            "target_encoder": under("module.", t),
            "encoder": under("module.", {n: v + 1 for n, v in t.items()}),
        },
        lambda t: {"model": t | {"mask_token": torch.zeros(1, 1, 32), "decoder_norm.weight": torch.ones(32)}},
    ],
    ids=["backbone", "encoder", "DINO", "I-JEPA", "MAE"],
)
def test_encoders_without_a_head(plain, tmp_path, content):
    model, tensors = plain
    torch.save(content(bare(tensors)), tmp_path / "x.pth")
    loaded = load_checkpoint(tmp_path / "x.pth", **KNOWN)
    assert loaded.config.num_labels == 0
    same(loaded.vit, model.vit)


def test_averages_go_first_and_are_said(plain, tmp_path):
    model, tensors = plain
    torch.save({"state_dict": tensors, "state_dict_ema": {n: t + 1 for n, t in tensors.items()}}, tmp_path / "x.pth")
    with pytest.warns(AssumptionWarning, match="averaged weights 'state_dict_ema', next to 'state_dict'"):
        average = load_checkpoint(tmp_path / "x.pth", **KNOWN)
    assert torch.equal(average.vit.layernorm.bias, model.vit.layernorm.bias + 1)
    same(load_checkpoint(tmp_path / "x.pth", state_dict_key="state_dict", **KNOWN), model)
    with pytest.raises(HFViTError, match="'optimizer' holds no state dict"):
        load_checkpoint(tmp_path / "x.pth", state_dict_key="optimizer", **KNOWN)


def test_a_head_made_by_hand(plain, tmp_path):
    """Refused, unless a new one takes its place."""
    model, tensors = plain
    tensors = bare(tensors) | {"head.0.weight": torch.ones(8, 32), "head.2.weight": torch.ones(2, 8)}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(HFViTError, match=r"\(head.0.weight, head.2.weight\) is not one linear layer.*num_labels="):
        load_checkpoint(tmp_path / "x.pth", **KNOWN)
    loaded = read_checkpoint(tmp_path / "x.pth", num_labels=7, **KNOWN)
    assert loaded.model.config.num_labels == 7 and any("head.0.weight" in note for note in loaded.notes)
    same(loaded.model.vit, model.vit)


def test_chunked_blocks_and_torchscript(plain, tmp_path):
    """DINOv2 trains with blocks in chunks, whose numbers go on; OpenAI's CLIP is an archive of code."""
    model, tensors = plain
    renamed = {name: name.replace("blocks.", "blocks.0.").replace("blocks.0.1.", "blocks.1.1.") for name in tensors}
    chunked = {renamed[name]: tensor for name, tensor in tensors.items()}
    torch.save(chunked, tmp_path / "x.pth")
    same(load_checkpoint(tmp_path / "x.pth", **KNOWN), model)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "clip.pt")
    with pytest.raises(HFViTError, match=r"TorchScript archive.*state_dict\(\)"):
        load_checkpoint(tmp_path / "clip.pt")


def test_what_is_assumed_is_said(plain, tmp_path):
    """Heads of an unpublished width, the activation; not where the caller says them. 1536 is 16 or 24 heads: asked."""
    _, tensors = plain
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(HFViTError, match="num_attention_heads="):
        load_checkpoint(tmp_path / "x.safetensors")
    with pytest.warns(AssumptionWarning, match=r"does not say; assumed: erf GELU"):
        load_checkpoint(tmp_path / "x.safetensors", num_attention_heads=4)
    model = ours(hidden_act="gelu", hidden_size=64)
    save_checkpoint(model, tmp_path / "wide.safetensors", format="timm")
    save_file(load_file(tmp_path / "wide.safetensors"), tmp_path / "wide.safetensors")
    with pytest.warns(AssumptionWarning, match="1 heads, one for every 64 of width 64"):
        load_checkpoint(tmp_path / "wide.safetensors")


def test_published_with_several_numbers_of_heads(tmp_path):
    with pytest.raises(HFViTError, match=r"16 or 24.*num_attention_heads="):
        heads_for_width(tmp_path, 1536, {})
    assert heads_for_width(tmp_path, 1536, {"num_attention_heads": 24}) == (24, [])
    assert heads_for_width(tmp_path, 768, {})[0] == 12


def test_an_adapter_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    save_file({"base_model.model.vit.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(HFViTError, match=r"PEFT adapter \(LORA\).*a/b.*merge_and_unload"):
        load_checkpoint(tmp_path)
    with pytest.raises(HFViTError, match="adapter"):
        load_checkpoint(tmp_path / "adapter_model.safetensors")


def test_weights_of_several_dtypes(plain, tmp_path):
    """They become the widest; a network computes in one."""
    model, tensors = plain
    mixed = {name: tensor.bfloat16() if ".mlp." in name else tensor for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "x.safetensors")
    loaded = read_checkpoint(tmp_path / "x.safetensors", **KNOWN)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert any("bfloat16, float32 all become float32" in note for note in loaded.notes)
    assert torch.equal(
        loaded.model.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight.bfloat16().float()
    )


@pytest.mark.parametrize("kind", ["int8", "bool", "float8_e4m3fn", "complex64", "int64"])
def test_numbers_that_are_no_weights(plain, tmp_path, kind):
    _, tensors = plain
    damaged = tensors | {"blocks.0.mlp.fc1.weight": tensors["blocks.0.mlp.fc1.weight"].to(getattr(torch, kind))}
    torch.save(damaged, tmp_path / "x.pth")
    save_file(damaged, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        with pytest.raises(HFViTError, match=rf"{name}: 'blocks\.0\.mlp\.fc1\.weight' holds .* save it so"):
            load_checkpoint(tmp_path / name, **KNOWN)
    if kind in ("int8", "bool", "int64"):
        np.savez(tmp_path / "x.npz", **{name.replace(".", "/"): t.numpy() for name, t in damaged.items()})
        with pytest.raises(HFViTError, match="not a ViT of a known format"):
            load_checkpoint(tmp_path / "x.npz", **KNOWN)


def special(kind: str) -> torch.Tensor:
    values = torch.ones(128, 32)
    if kind == "expanded":
        return torch.ones(1).expand(10**6, 10**6)
    if kind == "sparse":
        return values.to_sparse()
    if kind == "quantized":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)
    return values.to("meta")


@pytest.mark.parametrize("kind", ["expanded", "sparse", "quantized", "meta"])
def test_tensors_without_plain_values(plain, tmp_path, kind):
    _, tensors = plain
    torch.save(tensors | {"blocks.0.mlp.fc1.weight": special(kind)}, tmp_path / "x.pth")
    with pytest.raises(HFViTError, match=r"'blocks\.0\.mlp\.fc1\.weight' is .*(expanded|sparse|quantized|meta)"):
        load_checkpoint(tmp_path / "x.pth", **KNOWN)


def test_odd_state_dicts(plain, tmp_path):
    _, tensors = plain
    ones = torch.ones(2)
    for content in ({0: ones}, {"model": {1: ones}}, [ones], ones, {"model": {}}, 3):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(HFViTError, match="holds no state dict"):
            load_checkpoint(tmp_path / "x.pth")
    torch.save(tensors, tmp_path / "pth.safetensors")
    same(load_checkpoint(tmp_path / "pth.safetensors", **KNOWN), plain[0])
    (tmp_path / "short.safetensors").write_bytes(b"\x00" * 8)
    with pytest.raises(HFViTError, match="truncated"):
        load_checkpoint(tmp_path / "short.safetensors")


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {}},
        {},
        {"weight_map": []},
        {"weight_map": {"a": "model.safetensors.index.json"}},
        {"weight_map": {"a": "../x.safetensors"}},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "gone.safetensors"}},
    ],
)
def test_bad_indices_of_shards(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HFViTError, match=r"index of shards|as a shard|gone\.safetensors: no such file"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000, the file holds 2"),
        ({"num_labels": 10**12, "id2label": None}, "num_labels"),
        ({"hidden_act": "nosuch"}, "nosuch"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"id2label": {"1": "a", "2": "b", "3": "c", "4": "d", "5": "e"}}, "classes 0 to 4"),
        ({"id2label": {"-1": "a"}}, "classes 0 to 4"),
        ({"id2label": ["a"]}, "classes 0 to 4"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"resnet_depths": [10**7]}, "resnet_depths"),
        ({"intermediate_size": 10**18}, "intermediate_size"),
        ({"num_register_tokens": 10**15}, "num_register_tokens"),
    ],
)
def test_configurations_that_are_not_the_files(tmp_path, change, what):
    """Refused before anything of that size is built."""
    model = ours()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(HFViTError, match=what):
        load_checkpoint(tmp_path)


def test_the_license_of_the_source(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path)
    assert read_checkpoint(tmp_path).license is None
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: x-nc-1\nlicense_link: http://x\n---\n# Card\n"
    )
    license = read_checkpoint(tmp_path).license
    assert license is not None and license.is_non_commercial()
    assert license.metadata() == {"license": "other", "license_name": "x-nc-1", "license_link": "http://x"}
    (tmp_path / "README.md").write_text("---\nlicense: [apache-2.0\n---\n")
    assert read_checkpoint(tmp_path).license is None
