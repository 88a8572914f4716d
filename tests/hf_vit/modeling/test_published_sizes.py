"""The published encoders of the family have their parameters in our network, to the last one (on the meta device).

The counts are those of timm 1.0.31 (`timm.create_model(name, num_classes=0)` on the meta device; pathology models as
their cards build them). Where a family's own layout holds other tensors than timm's, the difference is written out.

pytest tests/hf_vit/modeling/test_published_sizes.py
"""

import pytest
import torch

from hf_vit import HFViTConfig, HFViTModel


def sizes(width, depth, heads, mlp, patch, image):
    return {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": mlp,
        "patch_size": patch, "image_size": image,
    }  # fmt: skip


DINOV2 = {"layer_scale_init": 1e-5}
DINOV3 = {
    "rope": "dinov3", "position_embedding_type": "none", "num_register_tokens": 4, "key_bias": False,
    "layer_scale_init": 1e-5,
}  # fmt: skip
CLIP = {"pre_layernorm": True, "patch_bias": False, "final_norm": "pooled"}
SIGLIP = {"pooling": "map"}
EVA = {"pooling": "gap", "use_class_token": True, "final_norm": "pooled", "key_bias": False}
EVA02 = EVA | {"rope": "axial", "mlp_type": "swiglu"}
PE = {"rope": "axial", "rope_axes": "xy", "rope_offset": 1, "pre_layernorm": True, "patch_bias": False}
PE_CORE = PE | {"pooling": "map", "map_num_heads": 8, "use_class_token": True}
AIMV2 = {
    "norm_type": "rms", "patch_norm": True, "dense_bias": False, "qkv_bias": False, "mlp_type": "swiglu",
    "pooling": "gap",
}  # fmt: skip
BEIT = EVA | {"relative_position_bias": "layer", "position_embedding_type": "none", "layer_scale_init": 0.1}
GATED = {"mlp_type": "swiglu", "layer_scale_init": 1e-5}
NO_ROW = {"class_token_has_position": False}

# timm's name: (its count, what ours has more, sizes, fields)
PUBLISHED = {
    "vit_small_patch14_dinov2": (22_056_192, 0, sizes(384, 12, 6, 1536, 14, 518), DINOV2),
    "vit_base_patch14_dinov2": (86_579_712, 0, sizes(768, 12, 12, 3072, 14, 518), DINOV2),
    "vit_large_patch14_dinov2": (304_367_616, 0, sizes(1024, 24, 16, 4096, 14, 518), DINOV2),
    "vit_giant_patch14_dinov2": (1_136_479_232, 0, sizes(1536, 40, 24, 4096, 14, 518), GATED),
    "vit_giant_patch14_reg4_dinov2": (
        1_136_483_840, 0, sizes(1536, 40, 24, 4096, 14, 518), GATED | NO_ROW | {"num_register_tokens": 4},
    ),
    # timm's names without `qkvb` leave out the biases of q and v, which the published files have
    "vit_small_patch16_dinov3": (21_586_944, 2 * 384 * 12, sizes(384, 12, 6, 1536, 16, 256), DINOV3),
    "vit_small_plus_patch16_dinov3": (28_683_264, 2 * 384 * 12, sizes(384, 12, 6, 1536, 16, 256), DINOV3 | GATED),
    "vit_base_patch16_dinov3": (85_641_216, 2 * 768 * 12, sizes(768, 12, 12, 3072, 16, 256), DINOV3),
    "vit_large_patch16_dinov3": (303_079_424, 2 * 1024 * 24, sizes(1024, 24, 16, 4096, 16, 256), DINOV3),
    "vit_huge_plus_patch16_dinov3": (840_509_440, 2 * 1280 * 32, sizes(1280, 32, 20, 5120, 16, 256), DINOV3 | GATED),
    "vit_7b_patch16_dinov3": (
        6_716_030_976, 0, sizes(4096, 40, 32, 8192, 16, 256), DINOV3 | GATED | {"qkv_bias": False},
    ),
    "vit_base_patch16_clip_224": (85_799_424, 0, sizes(768, 12, 12, 3072, 16, 224), CLIP),
    "vit_base_patch32_clip_224": (87_456_000, 0, sizes(768, 12, 12, 3072, 32, 224), CLIP),
    "vit_large_patch14_clip_224": (303_179_776, 0, sizes(1024, 24, 16, 4096, 14, 224), CLIP),
    "vit_huge_patch14_clip_224": (630_766_080, 0, sizes(1280, 32, 16, 5120, 14, 224), CLIP),
    "vit_gigantic_patch14_clip_224": (1_842_777_344, 0, sizes(1664, 48, 16, 8192, 14, 224), CLIP),  # bigG
    "vit_base_patch16_siglip_224": (92_884_224, 0, sizes(768, 12, 12, 3072, 16, 224), SIGLIP),
    "vit_large_patch16_siglip_256": (315_956_224, 0, sizes(1024, 24, 16, 4096, 16, 256), SIGLIP),
    "vit_so400m_patch14_siglip_224": (427_680_704, 0, sizes(1152, 27, 16, 4304, 14, 224), SIGLIP),
    "vit_so400m_patch14_siglip_384": (428_225_600, 0, sizes(1152, 27, 16, 4304, 14, 384), SIGLIP),
    "vit_giantopt_patch16_siglip_256": (1_163_168_256, 0, sizes(1536, 40, 16, 6144, 16, 256), SIGLIP),
    "eva02_tiny_patch14_336": (5_563_584, 0, sizes(192, 12, 3, 512, 14, 336), EVA02),
    "eva02_small_patch14_336": (21_744_000, 0, sizes(384, 12, 6, 1024, 14, 336), EVA02),
    "eva02_base_patch14_448": (86_348_544, 0, sizes(768, 12, 12, 2048, 14, 448), EVA02 | {"mlp_norm": True}),
    "eva02_large_patch14_448": (304_055_232, 0, sizes(1024, 24, 16, 2730, 14, 448), EVA02 | {"mlp_norm": True}),
    "eva_giant_patch14_224": (1_011_146_112, 0, sizes(1408, 40, 16, 6144, 14, 224), EVA),
    "vit_pe_core_tiny_patch16_384": (6_042_240, 0, sizes(192, 12, 3, 768, 16, 384), PE_CORE),
    "vit_pe_core_small_patch16_384": (23_586_048, 0, sizes(384, 12, 6, 1536, 16, 384), PE_CORE),
    "vit_pe_core_base_patch16_224": (92_886_528, 0, sizes(768, 12, 12, 3072, 16, 224), PE_CORE),
    "vit_pe_core_large_patch14_336": (316_102_656, 0, sizes(1024, 24, 16, 4096, 14, 336), PE_CORE),
    "vit_pe_core_gigantic_patch14_448": (
        1_880_066_560, 0, sizes(1536, 50, 16, 8960, 14, 448),
        PE_CORE | {"use_class_token": False, "map_intermediate_size": 6144},
    ),
    "vit_pe_lang_large_patch14_448": (
        291_415_040, 0, sizes(1024, 23, 16, 4096, 14, 448), PE | {"final_norm": "none", "layer_scale_init": 0.1},
    ),
    "vit_pe_spatial_base_patch16_512": (86_433_792, 0, sizes(768, 12, 12, 3072, 16, 512), PE | {"final_norm": "none"}),
    "aimv2_large_patch14_224": (309_197_824, 0, sizes(1024, 24, 8, 2816, 14, 224), AIMV2),
    "aimv2_huge_patch14_224": (680_851_968, 0, sizes(1536, 24, 12, 4096, 14, 224), AIMV2),
    "aimv2_1b_patch14_224": (1_234_958_336, 0, sizes(2048, 24, 16, 5632, 14, 224), AIMV2),
    "aimv2_3b_patch14_224": (2_720_658_432, 0, sizes(3072, 24, 24, 8192, 14, 224), AIMV2),
    "beit_base_patch16_224": (85_761_984, 0, sizes(768, 12, 12, 3072, 16, 224), BEIT),
    "beit_large_patch16_224": (303_405_568, 0, sizes(1024, 24, 16, 4096, 16, 224), BEIT),
    "UNI2-h": (
        681_394_176, 0, sizes(1536, 24, 24, 4096, 14, 224), GATED | NO_ROW | {"num_register_tokens": 8},
    ),
    "Virchow": (631_229_184, 0, sizes(1280, 32, 16, 3416, 14, 224), GATED),
    # the rows of its registers in the position table are part of the registers here
    "Virchow2": (631_239_424, -4 * 1280, sizes(1280, 32, 16, 3416, 14, 224), GATED | {"num_register_tokens": 4}),
    "GigaPath": (1_134_953_984, 0, sizes(1536, 40, 24, 4096, 16, 224), GATED),
    "H-optimus-0": (
        1_134_774_272, 0, sizes(1536, 40, 24, 4096, 14, 224), GATED | NO_ROW | {"num_register_tokens": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size_has_its_parameters(name):
    count, more, size, fields = PUBLISHED[name]
    with torch.device("meta"):
        model = HFViTModel(HFViTConfig(**size, **fields, num_labels=0))
    assert sum(parameter.numel() for parameter in model.parameters()) == count + more
