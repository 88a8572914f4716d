"""Every case of the golden files, against what Google's own Flax code computed.

The files were made by google-research/vision_transformer at c6de1e5 and big_vision at 0127fb6, run unmodified (JAX on
a CPU, float32, highest matmul precision) with random, non-trivial parameters; each `.json` says which and how. A case
put into the folder later is picked up. Tolerances are relative to the largest absolute value of the reference:
erf-GELU (2.5e-4), another LayerNorm eps (1.8e-4) or another GroupNorm eps (1.2e-3) would not pass them.

    python -m pytest tests/hf_vit/modeling/test_goldens.py
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_vit import HFViTConfig
from hf_vit.checkpoints import load_checkpoint
from hf_vit.modeling.position_embedding import resize_position_grid


pytestmark = pytest.mark.numerics
FOLDER = Path(__file__).parents[2] / "fixtures" / "goldens"
BESIDE = Path(__file__).parents[4] / "shared" / "goldens"  # the full set, where it lies beside the clone
OTHER_FILES = ("index", "official_shapes", "posemb_resize", "fewshot", "real")
PLAIN, HYBRID, HYBRID_INSIDE = 2e-5, 5e-5, 1e-4


def _cases() -> dict[str, Path]:
    found = {
        p.stem: p for folder in (BESIDE, FOLDER) for p in sorted(folder.glob("*.json")) if p.stem not in OTHER_FILES
    }
    return dict(sorted(found.items()))


CASES = _cases()


def _load(name: str):
    """(facts, recorded arrays, model) of a case; a `kind` is a load at another size with a new head."""
    path = CASES[name]
    facts = json.loads(path.read_text())
    arrays = np.load(path.with_name(name + ".io.npz"))
    wanted = facts["config"]
    asked = {"image_size": tuple(wanted["image_size"])}
    if wanted["classifier"] == "0":
        asked["pooling"] = "first"  # the file looks as one of "gap" does
    source = facts.get("source_config", wanted)["image_size"]
    if source[0] != source[1]:
        asked["checkpoint_image_size"] = tuple(source)
    if "kind" in facts:
        asked["num_labels"] = wanted["num_classes"]
    model = load_checkpoint(path.with_name(facts.get("checkpoint", name + ".npz")), **asked)
    return facts, {key: torch.from_numpy(arrays[key]) for key in arrays.files}, model


def _assert_near(name: str, ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == reference.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(reference.shape)}"
    worst = (ours - reference).abs().max().item()
    assert worst <= tolerance * reference.abs().max().item(), f"{name}: off by {worst:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_equals_google(name):
    facts, recorded, model = _load(name)
    hybrid = facts["config"]["resnet"] is not None
    inside, final = (HYBRID_INSIDE, HYBRID) if hybrid else (PLAIN, PLAIN)
    model.set_attn_implementation("eager")
    pixels = recorded["pixel_values"].permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        tokens = model.vit.embeddings(pixels)
        encoded = model.vit(pixels)
        out = model(pixels, output_attentions=True, output_hidden_states=True)

    prefix = model.config.num_prefix_tokens
    seen = {
        "embeddings_with_pos": (tokens, inside),
        "with_posemb": (tokens[:, prefix:], inside),
        "encoded": (encoded.last_hidden_state, inside),
        "pre_logits": (encoded.pooler_output, final),
        "logits": (out.logits, final),
    }
    if hybrid:
        with torch.no_grad():
            seen["patch_embed"] = (model.vit.embeddings.patch_embeddings(pixels).permute(0, 2, 3, 1), inside)
    seen |= {f"attn_{i}": (weights, inside) for i, weights in enumerate(out.attentions)}
    seen |= {f"hidden_{i}": (out.hidden_states[i + 1], inside) for i in range(model.config.num_hidden_layers - 1)}
    compared = [key for key in seen if key in recorded]
    for key in compared:
        ours, tolerance = seen[key]
        _assert_near(key, ours, recorded[key], tolerance)
    assert {"encoded", "pre_logits"} <= set(compared)
    assert ("logits" in compared) == bool(facts["config"]["num_classes"])


@pytest.mark.parametrize("name", [name for name in CASES if "_fullload" not in name])
def test_inferred_architecture(name):
    facts, _, model = _load(name)
    wanted, config = facts["config"], model.config
    for field in ("num_channels", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        assert getattr(config, field) == wanted[field], field
    assert config.patch_size_hw == (wanted["patch_size"], wanted["patch_size"])
    assert config.representation_size == wanted["representation_size"]
    assert config.num_labels == (wanted["num_classes"] or 0)
    assert config.grid_size == tuple(facts["grid"])
    assert {"token": "token", "tok": "token", "gap": "gap", "map": "map", "0": "first"}[
        wanted["classifier"]
    ] == config.pooling
    stem = wanted["resnet"]
    assert (config.resnet_depths is None) == (stem is None)
    if stem is not None:
        assert list(config.resnet_depths) == list(stem["num_layers"])
        assert config.resnet_width_factor == stem["width_factor"]
    assert sum(p.numel() for p in model.parameters()) == facts["num_params"]


@pytest.mark.parametrize("name", [name for name in CASES if "_fullload" in name])
def test_full_load_refits_the_position_table(name):
    facts, recorded, model = _load(name)
    table = model.vit.embeddings.position_embeddings.detach()
    if facts["family"] == "big_vision" and model.config.has_class_position:  # there it is added to the class token
        _assert_near("cls", model.vit.embeddings.cls_token + table[:, :1], recorded["cls"], PLAIN)
        table = table[:, 1:]
    assert (table - recorded["pos_embedding"]).abs().max() <= 1e-5
    assert not recorded["logits"].any()


def test_position_tables_move_as_google_moves_them(goldens):
    recorded = np.load(goldens / "posemb_resize.npz")
    pairs = sorted({key.rsplit("/", 1)[0] for key in recorded.files})
    assert len(pairs) >= 8
    for pair in pairs:
        kind, old, new = pair.rsplit("_", 2)
        table, wanted = (torch.from_numpy(recorded[f"{pair}/{side}"]) for side in ("in", "out"))
        prefix = 1 if kind == "vt_cls" else 0
        grids = (int(old), int(old)), (int(new), int(new))
        ours = resize_position_grid(table[:, prefix:], *grids, "bilinear_align_corners")
        ours = torch.cat([table[:, :prefix], ours], dim=1)
        assert ours.shape == wanted.shape
        assert (ours - wanted).abs().max() <= 1e-5, pair


def test_files_are_those_of_the_index(goldens):
    files = json.loads((goldens / "index.json").read_text())["files"]
    assert len(files) > 40
    for name, facts in files.items():
        assert hashlib.sha256((goldens / name).read_bytes()).hexdigest() == facts["sha256"], name


def _official(goldens: Path) -> dict:
    return json.loads((goldens / "official_shapes.json").read_text())["vision_transformer"]


def test_official_configs_have_our_names_and_shapes(goldens):
    """All 18 published configurations: the table names each of their tensors once and gives it our shape."""
    from hf_vit import HFViTForImageClassification
    from hf_vit.checkpoints.formats import google

    for name, official in _official(goldens).items():
        config = HFViTConfig.from_preset(name, num_labels=1000)
        with torch.device("meta"):
            ours = {key: tuple(t.shape) for key, t in HFViTForImageClassification(config).state_dict().items()}
            mappings = google.key_mappings(config, google.VISION_TRANSFORMER)
            theirs = {key: torch.empty(size) for key, size in official["shapes"].items()}
        assert sorted(n for mapping in mappings for n in mapping.theirs) == sorted(theirs), name
        assert sorted(n for mapping in mappings for n in mapping.ours) == sorted(ours), name
        for mapping in mappings:
            converted = mapping.transform.to_ours(*(theirs[n] for n in mapping.theirs))
            assert [tuple(t.shape) for t in converted] == [ours[n] for n in mapping.ours], mapping.theirs
            back = mapping.transform.to_theirs(*converted)
            assert [tuple(t.shape) for t in back] == [tuple(theirs[n].shape) for n in mapping.theirs], mapping.ours
        assert sum(int(np.prod(size)) for size in ours.values()) == official["num_params"], name
