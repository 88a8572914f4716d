"""The plain ViT families: outputs of their own code at every size, and the way back into their own classes.

The folders in tests/fixtures/goldens_family are a part of a larger set, which is read from ../shared where it lies.

python -m pytest tests/hf_vit/checkpoints/test_families.py
"""

import json
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_vit import HFViTBackbone, HFViTError, HFViTForImageClassification, HFViTModel
from hf_vit.checkpoints import AssumptionWarning, Loaded, load_checkpoint, read_checkpoint, save_checkpoint
from hf_vit.cli.main import main
from tests.helpers.checkpoints import same


FOLDER = Path(__file__).parents[2] / "fixtures" / "goldens_family"
SHARED = Path(__file__).parents[3].parent / "shared" / "goldens_family"
POST_NORM, MIXED = "post-norm", "mixed learned rotary positions"
REFUSED = {"timm_post_norm_eva": POST_NORM, "timm_post_norm_gap": POST_NORM, "timm_rope_mixed": MIXED}
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name not in REFUSED)

# What they become in the two formats: the class or entry point, or why not.
TRANSFORMERS = {
    "dinov2_classifier": "Dinov2ForImageClassification",
    "dinov2_swiglu": "Dinov2Model",
    "dinov2_original": "Dinov2Model",
    "dinov2_registers_original": "Dinov2WithRegistersModel",
    "dinov3": "DINOv3ViTModel",
    "dinov3_original": "rope_bfloat16_periods=False",
    "clip_two_towers": "CLIPVisionModel",
    "clip_classifier": "CLIPForImageClassification",
    "clip_vision_open_clip": "CLIPVisionModel",
    "siglip_classifier": "SiglipForImageClassification",
    "siglip2_naflex_vision": "Siglip2VisionModel",
    "vit_mae": "ViTMAEModel",
    "vit_msn_classifier": "ViTMSNForImageClassification",
    "ijepa_classifier": "IJepaForImageClassification",
    "deit_distilled_two_heads": "DeiTForImageClassificationWithTeacher",
    "beit_classifier": "BeitForImageClassification",
    "data2vec_vision": "Data2VecVisionModel",
    "aimv2_vision_head": "Aimv2VisionModel",
    "pixio": "PixioModel",
    "tipsv2_vision": "Tipsv2VisionModel",
    "timm_beit": "BeitForImageClassification",
    "timm_dinov3_qkvb": "a classifier",
    "timm_eva02_base": "rope='axial'",
    "timm_pe_core": "rope='axial'",
    "timm_pathology_swiglu_reg": "an MLP of that width",
    "timm_gap_fc_norm": "a bias of the key",
    "timm_clip_quickgelu": "a classifier of the pooled vector",
    "timm_aimv2": "Aimv2VisionModel",
}
TIMM = {
    "dinov2_classifier": "a classifier that reads other than the pooled vector",
    "dinov2_swiglu": "vit_giant_patch14_dinov2",
    "dinov3": "vit_small_patch16_dinov3_qkvb",
    "clip_two_towers": "vit_base_patch16_clip_quickgelu_224",
    "pixio": "several class tokens",
    "aimv2_vision_head": "attention pooling without query projection or MLP",
    "data2vec_vision": "relative positions shared by blocks",
    "timm_beit": "beit_base_patch16_224",
    "timm_dinov3_qkvb": "vit_small_patch16_dinov3_qkvb",
    "timm_eva02_base": "eva02_base_patch14_224",
    "timm_pe_core": "vit_pe_core_base_patch16_224",
    "timm_pathology_swiglu_reg": "vit_giant_patch14_dinov2",
    "timm_gap_fc_norm": "vit_base_patch16_224",
    "timm_clip_quickgelu": "vit_base_patch16_clip_quickgelu_224",
    "timm_aimv2": "aimv2_large_patch14_224",
}


@cache
def case(folder: Path) -> dict:
    return json.loads((folder / "case.json").read_text())


def read(folder: Path, **requested) -> Loaded:
    """A golden folder; the original repositories' files do not say their heads."""
    if "num_attention_heads" in case(folder):
        requested["num_attention_heads"] = case(folder)["num_attention_heads"]
    return read_checkpoint(folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder, **requested)


@cache
def loaded(name: str) -> Loaded:
    return read(FOLDER / name)


def compare(folder: Path, model: HFViTForImageClassification, double: bool) -> None:
    """All outputs at all sizes: 1e-5 of the largest in float32, 1e-6 in double."""
    with np.load(folder / "io.npz") as recorded:
        for key in (key for key in recorded if key.startswith("pixels.")):
            size = key.removeprefix("pixels.")
            pixels = torch.from_numpy(recorded[key]).to(model.dtype)
            with torch.no_grad():
                encoded, answered = model.vit(pixels), model(pixels)
            found = {
                "last_hidden_state": encoded.last_hidden_state,
                "pooled": encoded.pooler_output,
                "logits": answered.logits,
            }
            for kind, ours in found.items():
                reference = f"{kind}.float64.{size}" if double else f"{kind}.{size}"
                if reference in recorded:
                    theirs = torch.from_numpy(recorded[reference])
                    bound = (1e-6 if double else 1e-5) * theirs.abs().max()
                    assert (ours - theirs).abs().max() <= bound, f"{folder.name} {reference}"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_familys_own_code(name):
    compare(FOLDER / name, loaded(name).model, double=False)
    compare(FOLDER / name, read(FOLDER / name, dtype="float64").model, double=True)


def test_outputs_of_the_whole_set():
    if not SHARED.is_dir():
        pytest.skip("reads the whole set of goldens: put it into ../shared/goldens_family")
    for folder in sorted(path for path in SHARED.iterdir() if path.is_dir()):
        if folder.name in REFUSED:
            with pytest.raises(HFViTError, match=REFUSED[folder.name]):
                read(folder)
            continue
        compare(folder, read(folder).model, double=False)
        compare(folder, read(folder, dtype="float64").model, double=True)


def test_those_that_stay_out_are_refused_by_name():
    with pytest.raises(HFViTError, match="vit_base_patch16_rpn_224 has its norms after attention and MLP"):
        read(FOLDER / "timm_post_norm_gap")


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_own_folder(tmp_path, name):
    """Ours and back, bit for bit, by `from_pretrained` and by `load_checkpoint`."""
    model = loaded(name).model
    model.save_pretrained(tmp_path)
    same(HFViTForImageClassification.from_pretrained(tmp_path), model)
    same(load_checkpoint(tmp_path), model)


def call(model, pixels: torch.Tensor, patch: int):
    """A model of transformers on images; NaFlex reads flattened patches, MAE shuffles by a noise."""
    if "siglip2" in model.config.model_type:
        batch, _, height, width = pixels.shape
        rows, columns = height // patch, width // patch
        patches = (
            pixels.reshape(batch, 3, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        )
        mask, shapes = torch.ones(batch, rows * columns, dtype=torch.int32), torch.tensor([[rows, columns]] * batch)
        return model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
        count = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
        return model(pixel_values=pixels, noise=torch.arange(count).expand(len(pixels), -1).float())
    return model(pixel_values=pixels)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_own_class(tmp_path, name):
    """No missing or unexpected keys, the same outputs, and the same weights when read back; or a refusal by name."""
    source, expected = loaded(name), TRANSFORMERS[name]
    model = source.model
    if not hasattr(transformers, expected):
        with pytest.raises(HFViTError, match=expected):
            save_checkpoint(model, tmp_path / "out", "transformers", source.image_processing)
        assert not list(tmp_path.iterdir())
        return
    save_checkpoint(model, tmp_path / "out", "transformers", source.image_processing)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [expected]
    theirs, info = getattr(transformers, expected).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    pixels = torch.from_numpy(np.load(FOLDER / name / "io.npz")["pixels.native"])
    with torch.no_grad():
        answer = call(theirs.eval(), pixels, model.config.patch_size_hw[0])
        ours = model(pixels).logits if model.config.num_labels else model.vit(pixels).last_hidden_state
    found = answer.logits if model.config.num_labels else answer.last_hidden_state
    assert (found - ours).abs().max() <= 1e-5 * ours.abs().max()
    back = read_checkpoint(tmp_path / "out")
    same(back.model, model)
    assert back.image_processing == source.image_processing


@pytest.mark.parametrize("name", TIMM)
def test_timm(tmp_path, name):
    """Its own names and values; read back by the header, and by the entry point's name alone; or a refusal."""
    source, expected = loaded(name), TIMM[name]
    if " " in expected:
        with pytest.raises(HFViTError, match=expected):
            save_checkpoint(source.model, tmp_path / "out", "timm", source.image_processing)
        return
    save_checkpoint(source.model, tmp_path / "out", "timm", source.image_processing)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == expected
    same(load_checkpoint(tmp_path / "out"), source.model)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    if name.startswith("timm_"):
        original = load_file(FOLDER / name / "model.safetensors")
        assert tensors.keys() == original.keys() and all(torch.equal(tensors[key], original[key]) for key in tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors")  # without our header
    back = read_checkpoint(tmp_path / "out")
    pixels = torch.from_numpy(np.load(FOLDER / name / "io.npz")["pixels.native"])
    with torch.no_grad():
        found, ours = back.model.vit(pixels).pooler_output, source.model.vit(pixels).pooler_output
    assert (found - ours).abs().max() <= 1e-6 * ours.abs().max()
    assert back.image_processing == source.image_processing


# -- what is said, asked and refused ----------------------------------------------------------------------------------


def test_two_towers_say_what_was_left():
    notes = " ".join(loaded("clip_two_towers").notes)
    assert "text_model (" in notes and "logit_scale" in notes
    assert "text tower" in " ".join(loaded("clip_vision_open_clip").notes)


def test_processors_come_along():
    assert (
        loaded("clip_two_towers")
        .image_processing.describe()
        .startswith("short side to 32 (bicubic), center crop 32x32")
    )
    assert loaded("dinov2_classifier").image_processing.resize_to == 36
    assert loaded("timm_clip_quickgelu").image_processing.resize_to == 35  # crop_pct 0.9
    assert loaded("clip_vision_open_clip").image_processing.resize_to == 32
    assert loaded("dinov3").image_processing.resize_to == (32, 32)


def test_a_new_head_follows_the_family(tmp_path):
    for name, head_input, width in (
        ("timm_dinov3_qkvb", "token_and_mean", 64),
        ("dinov3", "token_and_mean", 64),
        ("clip_two_towers", "pooled", 32),
        ("clip_classifier", "pooled", 32),
        ("dinov2_classifier", "token_and_mean", 64),
    ):
        model = read(FOLDER / name, num_labels=7).model
        assert model.config.head_input == head_input and model.classifier.weight.shape == (7, width)
    model = read(FOLDER / "vit_mae", num_labels=7).model  # MAE: the mean over patches, then the norm
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        encoded = model.vit(pixels)
        mean = model.vit.layernorm(encoded.last_hidden_state[:, 1:].mean(dim=1))
    assert torch.allclose(encoded.pooler_output, mean, atol=1e-6)


@pytest.mark.parametrize("name", ["timm_eva02_base", "timm_pe_core"])
def test_a_lone_file_with_rotary_positions_asks(tmp_path, name):
    save_file(load_file(FOLDER / name / "model.safetensors"), tmp_path / "x.safetensors")
    with pytest.raises(HFViTError, match=r"rotary positions are not in the file.*rope="):
        load_checkpoint(tmp_path / "x.safetensors", num_attention_heads=2)


def test_a_lone_clip_asks_for_its_activation(tmp_path):
    file = FOLDER / "clip_vision_open_clip" / "checkpoint" / "open_clip_model.safetensors"
    save_file(load_file(file), tmp_path / "clip.safetensors")
    with pytest.raises(HFViTError, match="hidden_act='quick_gelu'"):
        load_checkpoint(tmp_path / "clip.safetensors", num_attention_heads=2)
    model = load_checkpoint(tmp_path / "clip.safetensors", num_attention_heads=2, hidden_act="quick_gelu")
    same(model, loaded("clip_vision_open_clip").model)


def test_a_lone_msn_says_its_epsilon(tmp_path):
    save_file(load_file(FOLDER / "vit_msn_classifier" / "model.safetensors"), tmp_path / "msn.safetensors")
    with pytest.warns(AssumptionWarning, match="MSN has 1e-6"):
        load_checkpoint(tmp_path / "msn.safetensors", num_attention_heads=2)


def test_open_clip_around_a_model_of_timm(tmp_path):
    """`visual.trunk.` is read as timm reads it; open_clip_config.json says the name."""
    tensors = load_file(FOLDER / "timm_eva02_base" / "model.safetensors")
    tensors = {f"visual.trunk.{key}": tensor for key, tensor in tensors.items() if not key.startswith("head.")}
    tensors["text.token_embedding.weight"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    vision = {"timm_model_name": "eva02_base_patch14_448", "image_size": 32}
    described = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_checkpoint(tmp_path, num_attention_heads=2, rope_reference_grid=(4, 4))
    same(found.model.vit, loaded("timm_eva02_base").model.vit)
    assert found.image_processing.resize_to == (32, 32) and any("text.token_embedding" in note for note in found.notes)


@pytest.mark.parametrize("prefix", ["", "timm_model."])
@pytest.mark.parametrize("name", ["timm_beit", "timm_dinov3_qkvb", "timm_pe_core"])
def test_transformers_wrapper_of_a_plain_model_of_timm(tmp_path, name, prefix):
    """It saves timm's names, some releases with its own prefix; timm is not needed."""
    source = loaded(name).model
    tensors = {prefix + key: value for key, value in load_file(FOLDER / name / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = json.loads((FOLDER / name / "config.json").read_text())
    labels = [f"class {number}" for number in range(source.config.num_labels)]
    stored |= {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperForImageClassification"],
        "do_pooling": True,
    }
    if labels:
        stored["label_names"] = labels
    (tmp_path / "config.json").write_text(json.dumps(stored))
    back = load_checkpoint(tmp_path)
    assert list(back.config.id2label.values()) == labels
    back.config.id2label, back.config.label2id = source.config.id2label, source.config.label2id
    same(back, source)


def test_a_wrapper_that_says_the_architecture_alone_pools_as_timm_does(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((FOLDER / "timm_dinov3_qkvb" / "model.safetensors").read_bytes())
    stored = json.loads((FOLDER / "timm_dinov3_qkvb" / "config.json").read_text())
    stored = {name: stored[name] for name in ("architecture", "model_args")} | {"model_type": "timm_wrapper"}
    stored["model_args"].pop("global_pool", None)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert load_checkpoint(tmp_path).config.pooling == "gap"


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ("resnet50", r"this is timm's resnet50 \(a convolutional network\), not a plain ViT"),
        ("swin_tiny_patch4_window7_224", r"this is timm's swin_tiny\S+ \(hierarchical\), not a plain ViT"),
        ("vit_base_mci_224", r"this is timm's vit_base_mci_224, not a plain ViT"),
        ("mixer_b16_224", r"this is timm's mixer_b16_224, not a plain ViT"),
    ],
)
@pytest.mark.parametrize("model_type", ["timm_wrapper", None])
def test_other_models_of_timm_are_refused_by_their_own_name(tmp_path, architecture, what, model_type):
    stored = {"architecture": architecture, "pretrained_cfg": {}} | ({"model_type": model_type} if model_type else {})
    (tmp_path / "config.json").write_text(json.dumps(stored))
    save_file({"conv1.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(HFViTError, match=what):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        ("swin", r"this is Swin \(hierarchical\), not a plain ViT"),
        ("hiera", r"this is Hiera \(hierarchical\), not a plain ViT"),
        ("vjepa2", r"this is V-JEPA 2 \(a video model\), not a plain ViT"),
        ("sam", r"this is SAM \(.*windowed.*\), not a plain ViT"),
        ("convnext", r"this is ConvNeXt \(a convolutional network\), not a plain ViT"),
        ("radio", r"this is C-RADIO"),
        ("clip_text_model", r"this is CLIP's text tower"),
    ],
)
def test_others_are_refused_by_their_own_name(tmp_path, capsys, model_type, what):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"embeddings.weight": torch.ones(2, 2)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(HFViTError, match=what):
        load_checkpoint(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists() and len(capsys.readouterr().err.splitlines()) == 1


def test_an_unknown_model_type_is_named_with_those_that_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new_vit"}))
    save_file({"embeddings.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(HFViTError, match=r"model_type .new_vit. is no plain ViT that hf_vit reads; it reads .*dinov2"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"layers.0.blocks.0.attn.qkv.weight": (6, 2)}, r"Swin \(hierarchical\), not a plain ViT"),
        ({"patch_embed.proj.weight": (4, 3, 2, 8, 8), "blocks.0.attn.qkv.weight": (12, 4)}, "video or volume model"),
        ({"vision_encoder.layers.0.attn.rel_pos_h": (7, 2)}, "windowed"),
        ({"text_model.encoder.layers.0.self_attn.k_proj.weight": (2, 2)}, "text tower"),
    ],
)
def test_others_are_known_by_their_tensors(tmp_path, tensors, what):
    save_file({name: torch.ones(size) for name, size in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(HFViTError, match=what):
        load_checkpoint(tmp_path / "x.safetensors")


def test_a_config_that_is_not_the_files(tmp_path):
    """One line, before anything of that size is built."""
    for change, what in (
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"hidden_size": 64}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads|heads"),
        ({"hidden_act": "nosuch"}, "nosuch"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"id2label": {"3": "a"}}, "classes 0 to 4"),
        ({"image_size": 10**9}, "image_size"),
    ):
        stored = json.loads((FOLDER / "dinov2_classifier" / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(stored))
        (tmp_path / "model.safetensors").write_bytes((FOLDER / "dinov2_classifier" / "model.safetensors").read_bytes())
        with pytest.raises(HFViTError, match=what):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["dinov2_classifier", "clip_two_towers", "timm_eva02_base"])
def test_from_pretrained(name):
    """Where hf_vit is installed, `from_pretrained` reads what `load_checkpoint` reads."""
    model = HFViTForImageClassification.from_pretrained(FOLDER / name)
    same(model, loaded(name).model)
    bare = HFViTModel.from_pretrained(FOLDER / name, image_size=48)
    assert bare.config.grid_size == (6, 6)
    small, info = HFViTForImageClassification.from_pretrained(
        FOLDER / name, num_labels=3, dtype=torch.bfloat16, output_loading_info=True
    )
    assert small.config.num_labels == 3 and small.dtype == torch.bfloat16 and not info["missing_keys"]
    with pytest.raises(ValueError, match=r"load .* as HFViTModel"):
        HFViTBackbone.from_pretrained(FOLDER / name)
