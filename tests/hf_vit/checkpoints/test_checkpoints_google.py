"""Google's npz files: what is inferred, requested for and written. That the numbers agree is in `test_goldens.py`.

python -m pytest tests/hf_vit/checkpoints/test_checkpoints_google.py
"""

import numpy as np
import pytest
import torch

from hf_vit import HFViTError
from hf_vit.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from tests.helpers.checkpoints import ours, same
from tests.helpers.compare import same_outputs


pytestmark = pytest.mark.numerics


def arrays(path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def changed(tmp_path, path, change) -> str:
    """A copy of an npz whose arrays went through `change`."""
    content = change(arrays(path))
    np.savez(tmp_path / "changed.npz", **content)
    return tmp_path / "changed.npz"


@pytest.mark.parametrize(
    "name", ["vt_token", "vt_gap", "vt_token_prelogits", "vt_token_nonsquare", "vt_hybrid_3stage", "vt_hybrid_r_ti"]
)
def test_vision_transformer_round_trip_is_bit_exact(goldens, tmp_path, name):
    requested = {"image_size": (32, 48)} if "nonsquare" in name else {}
    model = load_checkpoint(goldens / f"{name}.npz", **requested)
    save_checkpoint(model, tmp_path / "back.npz", format="google-npz")
    before, after = arrays(goldens / f"{name}.npz"), arrays(tmp_path / "back.npz")
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype and np.array_equal(before[key], after[key]), key
    same(load_checkpoint(tmp_path / "back.npz", **requested), model)


@pytest.mark.parametrize("name", ["bv_tok", "bv_gap", "bv_map", "bv_scan", "bv_sincos", "bv_bf16", "bv_map_siglip"])
def test_big_vision_round_trip_is_bit_exact(goldens, tmp_path, name):
    model = load_checkpoint(
        goldens / f"{name}.npz", image_size=40 if name == "bv_sincos" else 48 if name == "bv_gap" else 32
    )
    save_checkpoint(model, tmp_path / "back.npz", format="big-vision-npz")
    same(load_checkpoint(tmp_path / "back.npz"), model)
    if name in ("bv_tok", "bv_gap"):
        before, after = arrays(goldens / f"{name}.npz"), arrays(tmp_path / "back.npz")
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("format", ["google-npz", "big-vision-npz"])
@pytest.mark.parametrize("has_position", [True, False])
def test_the_class_position_moves_without_a_change_of_logits(tmp_path, format, has_position):
    model = ours(class_token_has_position=has_position)
    save_checkpoint(model, tmp_path / "vit.npz", format=format)
    back = load_checkpoint(tmp_path / "vit.npz")
    assert back.config.class_token_has_position == (format == "google-npz")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert same_outputs(back(pixels).logits, model(pixels).logits)


def test_official_layout_of_the_written_file(tmp_path):
    save_checkpoint(
        ours(resnet_depths=(1,), resnet_width_factor=0.5, patch_size=1), tmp_path / "vit.npz", format="google-npz"
    )
    shapes = {name: array.shape for name, array in arrays(tmp_path / "vit.npz").items()}
    assert shapes["gn_root/scale"] == (1, 1, 1, 32) and shapes["block1/unit1/gn_proj/bias"] == (1, 1, 1, 128)
    assert shapes["Transformer/posembed_input/pos_embedding"] == (1, 65, 32)
    block = "Transformer/encoderblock_1/"
    assert shapes[f"{block}MultiHeadDotProductAttention_1/query/kernel"] == (32, 4, 8)
    assert shapes[f"{block}MultiHeadDotProductAttention_1/out/kernel"] == (4, 8, 32)
    assert shapes[f"{block}MlpBlock_3/Dense_0/kernel"] == (32, 48)
    assert {"cls", f"{block}LayerNorm_0/scale", f"{block}LayerNorm_2/bias", "head/kernel"} <= shapes.keys()


def test_linen_numbering_flat_norms_and_prefixes(goldens, tmp_path):
    reference = load_checkpoint(goldens / "vt_hybrid_3stage.npz")
    names = (("LayerNorm_2", "LayerNorm_1"), ("Attention_1/", "Attention_0/"), ("MlpBlock_3", "MlpBlock_0"))
    for prefix in ("", "params/", "opt/target/", "params/img/"):

        def rename(content, prefix=prefix):
            renamed = {}
            for key, array in content.items():
                for old, new in names:
                    key = key.replace(old, new)
                renamed[prefix + key] = (
                    array.reshape(-1) if array.shape[:3] == (1, 1, 1) and array.ndim == 4 and "gn" in key else array
                )
            return renamed | ({} if not prefix else {"opt/0/mu/embedding/kernel": np.zeros(1, np.float32)})

        same(load_checkpoint(changed(tmp_path, goldens / "vt_hybrid_3stage.npz", rename)), reference)


def test_prefixed_companions_are_left_aside_but_weights_are_not(goldens, tmp_path):
    def add(content):
        return content | {"params/Transformer/unknown": np.zeros((3, 2), np.float32)}

    with pytest.raises(HFViTError, match=r"not used \(1\): params/Transformer/unknown \(3, 2\)"):
        load_checkpoint(changed(tmp_path, goldens / "bv_map.npz", add))


def test_unknown_prefix_is_named(goldens, tmp_path):
    with pytest.raises(HFViTError, match="'model/encoder/', which is no known prefix"):
        load_checkpoint(
            changed(tmp_path, goldens / "vt_token.npz", lambda c: {f"model/encoder/{k}": v for k, v in c.items()})
        )


def test_class_row_follows_the_class_token_not_the_length(goldens):
    """25 rows of a 4x6 grid with a class token are a perfect square all the same."""
    with pytest.raises(HFViTError, match=r"24 cells, which is no square grid.*image_size=.*\(32, 48\)"):
        load_checkpoint(goldens / "vt_token_nonsquare.npz")
    model = load_checkpoint(goldens / "vt_token_nonsquare.npz", image_size=(32, 48))
    assert model.config.grid_size == (4, 6) and model.config.has_class_position
    refitted = load_checkpoint(goldens / "vt_token_nonsquare.npz", checkpoint_image_size=(32, 48), image_size=(64, 40))
    assert refitted.config.grid_size == (8, 5)
    with pytest.raises(HFViTError, match="makes a grid of 16 cells, the position table has 24"):
        load_checkpoint(goldens / "vt_token_nonsquare.npz", checkpoint_image_size=32)


def test_a_square_table_is_resampled_to_a_rectangle_of_as_many_cells(goldens):
    square = load_checkpoint(goldens / "vt_token.npz")
    loaded = read_checkpoint(goldens / "vt_token.npz", image_size=(16, 64))
    assert loaded.changed == ["position table refitted from 4x4 to 2x8"]
    name = "vit.embeddings.position_embeddings"
    assert not torch.equal(loaded.model.state_dict()[name], square.state_dict()[name])
    kept = load_checkpoint(goldens / "vt_token.npz", checkpoint_image_size=(16, 64))
    assert kept.config.grid_size == (2, 8) and torch.equal(kept.state_dict()[name], square.state_dict()[name])


def test_head_representation_and_labels(goldens):
    path = goldens / "vt_token_prelogits.npz"
    kept = load_checkpoint(path, num_labels=5, keep_representation=True)
    assert kept.config.representation_size == 24 and kept.classifier.weight.shape == (5, 24)
    loaded = read_checkpoint(path, num_labels=5)
    assert loaded.model.config.representation_size is None and loaded.model.classifier.weight.shape == (5, 32)
    assert any("representation layer of width 24 dropped" in line for line in loaded.changed)
    with pytest.raises(HFViTError, match="representation_size=None contradicts"):
        load_checkpoint(path, representation_size=None)
    named = load_checkpoint(path, id2label={i: f"c{i}" for i in range(11)})
    assert named.config.id2label[10] == "c10" and named.config.representation_size == 24
    assert load_checkpoint(path, num_labels=11).classifier.weight.any()


def test_first_token_pooling_and_positions_can_be_said(goldens):
    first = load_checkpoint(goldens / "bv_gap.npz", pooling="first")
    assert first.config.pooling == "first"
    assert (
        load_checkpoint(goldens / "bv_sincos.npz", position_embedding_type="none").config.position_embedding_type
        == "none"
    )
    with pytest.raises(HFViTError, match="class token"):
        load_checkpoint(goldens / "bv_gap.npz", pooling="token")
    with pytest.raises(HFViTError, match="num_attention_heads=8 contradicts the file, which says 4"):
        load_checkpoint(goldens / "vt_token.npz", num_attention_heads=8)


def test_patch_and_channels_can_be_refitted(goldens):
    loaded = read_checkpoint(goldens / "vt_token.npz", patch_size=4, num_channels=1, image_size=(32, 16))
    model = loaded.model
    assert model.vit.embeddings.patch_embeddings.projection.weight.shape == (32, 1, 4, 4)
    assert model.config.grid_size == (8, 4) and loaded.processor["image_mean"] == [0.5]
    assert len(loaded.changed) == 3
    with torch.no_grad():
        assert model(torch.randn(1, 1, 32, 16)).logits.shape == (1, 10)


def test_a_zero_head_is_kept_and_named(goldens, tmp_path):
    path = changed(tmp_path, goldens / "vt_token.npz", lambda c: c | {"head/kernel": np.zeros((32, 10), np.float32)})
    with pytest.warns(UserWarning, match=r"head of 10 classes .* all zeros"):
        assert load_checkpoint(path).config.num_labels == 10


def test_incomplete_and_flattened_patches(goldens, tmp_path):
    table = "Transformer/posembed_input/pos_embedding"
    path = changed(tmp_path, goldens / "vt_token.npz", lambda c: {k: v for k, v in c.items() if k != table})
    with pytest.raises(HFViTError, match=f"no position table '{table}'"):
        load_checkpoint(path)
    assert load_checkpoint(path, position_embedding_type="none").config.position_embedding_type == "none"
    path = changed(tmp_path, goldens / "bv_map.npz", lambda c: c | {"params/embedding/kernel": np.zeros((192, 32))})
    with pytest.raises(HFViTError, match="NaFlex"):
        load_checkpoint(path)


def test_heads_of_every_block_are_compared(goldens, tmp_path):
    """(D, heads, width) kernels with other heads hold as many numbers: a reshape would take them silently."""
    key = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"
    path = changed(tmp_path, goldens / "vt_token.npz", lambda c: c | {key: c[key].reshape(32, 8, 4)})
    with pytest.raises(
        HFViTError, match=r"of another shape \(1\): .*encoderblock_1.*query/kernel \(32, 8, 4\).*4 heads"
    ):
        load_checkpoint(path)


def test_out_refuses_by_name(tmp_path):
    cases = (
        ("google-npz", {"pooling": "map"}, "pooling"),
        ("google-npz", {"position_embedding_type": "sincos2d"}, "sine-cosine"),
        ("google-npz", {"num_register_tokens": 1}, "register"),
        ("big-vision-npz", {"resnet_depths": (), "patch_size": 8}, "ResNet"),
        ("big-vision-npz", {"qk_norm": True}, "QK-norm"),
        ("big-vision-npz", {"layer_scale_init": 0.1}, "LayerScale"),
        ("npz", {}, "google-npz, big-vision-npz, timm, transformers"),
    )
    for format, fields, named in cases:
        with pytest.raises(HFViTError, match=named):
            save_checkpoint(ours(**fields), tmp_path / "out.npz", format=format)
    assert not list(tmp_path.iterdir())


def test_other_numerics_are_said(tmp_path):
    with pytest.warns(
        UserWarning, match="vision_transformer computes with hidden_act='gelu_pytorch_tanh' instead of 'gelu'"
    ):
        save_checkpoint(ours(hidden_act="gelu"), tmp_path / "vit.npz", format="google-npz")
