"""Every family through everything that works on a ViT: training's helpers, LoRA, sharding, export, demo, explanations.

Slow: 28 families. `FAMILIES=dinov3,clip_two_towers` takes these alone.

python -m pytest -m slow tests/hf_vit/test_families_everywhere.py
"""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.models.vit import ViTImageProcessorPil

from hf_vit import HFViTError, HFViTForImageClassification, HFViTForMaskedPatchPrediction
from hf_vit.checkpoints import Loaded, read_checkpoint
from hf_vit.export import check_any_size, export_model
from hf_vit.inference.token_merging import merge_tokens
from hf_vit.interpretability.attention import attention_maps, class_attention, rollout_map
from hf_vit.interpretability.perturbation import compare_explanations
from hf_vit.interpretability.relevance import METHODS, explain
from training.engine.losses import ClassificationLoss
from training.engine.masked_patch_prediction import MaskedPatchLoss, masked_model
from training.evaluation.few_shot import NeighborProbe, RidgeProbe


pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[1] / "fixtures" / "goldens_family"
ASKED = os.environ.get("FAMILIES", "").split(",")
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and path.name != "timm_post_norm_gap")
NAMES = [name for name in NAMES if ASKED == [""] or name in ASKED]
HEADS = {"dinov2_original": 2, "dinov2_registers_original": 2, "dinov3_original": 2}  # their files do not say


@pytest.fixture(scope="module", params=NAMES)
def loaded(request) -> Loaded:
    """A family with a head of four classes that is not zero."""
    name = request.param
    more = {"num_attention_heads": HEADS[name]} if name in HEADS else {}
    folder = FOLDER / name
    found = read_checkpoint(
        folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder, num_labels=4, **more
    )
    torch.manual_seed(0)
    torch.nn.init.normal_(found.model.classifier.weight, std=0.1)
    found.model.float().eval()
    return found


@pytest.fixture(scope="module")
def pixels(loaded) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, *loaded.model.config.image_size_hw, generator=generator)


def plain_copy(loaded: Loaded) -> HFViTForImageClassification:
    return copy.deepcopy(loaded.model)


def gradients(model: torch.nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """After one backward pass in training mode; drop path and DINOv3's random scale of positions are seeded."""
    loss = ClassificationLoss(model).train()
    torch.manual_seed(0)
    losses, _, _ = loss(pixels, torch.tensor([0, 1, 2, 3]))
    losses.mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= bound * max(1e-3, float(expected.abs().max()))


def test_activation_checkpointing_gives_the_same_gradients(loaded, pixels):
    expected = gradients(plain_copy(loaded), pixels)
    model = plain_copy(loaded)
    # gradient_checkpointing_enable: its name before transformers 5.23
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    found = gradients(model, pixels)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        agree(found[name], gradient)


def test_compiled_it_computes_the_same(loaded, pixels):
    model = plain_copy(loaded)
    with torch.no_grad():
        expected = model(pixels).logits
        agree(torch.compile(model, backend="aot_eager")(pixels).logits, expected)
    losses = []
    for wrap in (lambda module: module, lambda module: torch.compile(module, backend="aot_eager")):
        torch.manual_seed(0)
        losses.append(wrap(ClassificationLoss(plain_copy(loaded)).train())(pixels, torch.tensor([0, 1, 2, 3]))[0])
    if loaded.model.config.drop_path_rate == 0:  # compiled code computes what drop path discards, and draws otherwise
        agree(losses[1].detach(), losses[0].detach())


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_by_fsdp2_it_trains_the_same(loaded, pixels, mesh):
    plain, sharded = plain_copy(loaded), plain_copy(loaded)
    for layer in sharded.vit.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    expected, found = gradients(plain, pixels), gradients(sharded, pixels)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        agree(found[name].full_tensor(), gradient)
    for model in (plain, sharded):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.eval()
    with torch.no_grad():
        agree(sharded(pixels).logits, plain(pixels).logits)


def test_lora(loaded, pixels):
    peft = pytest.importorskip("peft", reason="LoRA adapters are those of peft: pip install peft")
    model = plain_copy(loaded)
    blocks = r".*layers\.\d+\.attention\.[qv]_proj"  # AIMv2's attention pooling has no query projection
    settings = peft.LoraConfig(r=2, target_modules=blocks, modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, settings)
    adapters = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum("lora_A" in name for name in adapters) >= 2 * model.config.num_hidden_layers
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # B begins at zero: A has a gradient from the second step on
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(adapted(pixels).logits, torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    adapted.eval()
    with torch.no_grad():
        expected = adapted(pixels).logits
        assert (expected - loaded.model(pixels).logits).abs().max() > 1e-3
        agree(adapted.merge_and_unload()(pixels).logits, expected, 1e-4)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_export_agrees_at_its_own_size(loaded, format, tmp_path):
    account = export_model(loaded, tmp_path, format, dynamic_size=False)
    assert all(check["largest_difference"] <= 1e-4 for check in account["checked"])


def test_onnx_of_any_size_or_a_refusal_by_name(loaded, tmp_path):
    try:
        check_any_size(loaded.model.config)
    except HFViTError as error:
        assert "cannot be exported for any image size" in str(error)
        with pytest.raises(HFViTError, match="cannot be exported for any image size"):
            export_model(loaded, tmp_path, "onnx", dynamic_size=True)
        return
    account = export_model(loaded, tmp_path, "onnx", dynamic_size=True)
    assert len(account["checked"]) == 4


def test_the_demo_shows_scores_and_attention(loaded):
    pytest.importorskip("gradio")
    from hf_vit.hub.space_app import MEAN, SpaceClassifier

    classifier = SpaceClassifier("tiny", loaded.model, ViTImageProcessorPil(**loaded.processor))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    assert sum(classifier.scores(image).values()) == pytest.approx(1, abs=1e-4)
    for head in (MEAN, "0"):
        assert classifier.overlay(image, 0, head).size == classifier.overlay(image, classifier.layers - 1, head).size


def test_masked_patches_train_or_are_refused_by_name(loaded, pixels):
    try:
        model = masked_model(plain_copy(loaded))
    except HFViTError as error:
        assert "map head" in str(error)
        return
    assert isinstance(model, HFViTForMaskedPatchPrediction)
    losses, logits, _ = MaskedPatchLoss(model).train()(pixels.clamp(-1, 1), torch.zeros(len(pixels), dtype=torch.long))
    losses.mean().backward()
    assert torch.isfinite(losses).all() and logits.shape[-1] == 512
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_probes_read_its_features(loaded, pixels):
    with torch.no_grad():
        features = loaded.model.vit(pixels).pooler_output.numpy()
    labels = np.array([0, 1, 0, 1])
    features = features + 10 * labels[:, None] * np.linspace(-1, 1, features.shape[1])  # apart by class
    assert RidgeProbe().fit(features, labels).score(features, labels) == 1
    assert (NeighborProbe(1).fit(features, labels).predict(features) == labels).all()


def test_attention_and_relevance_lie_on_the_patches(loaded, pixels):
    model, config = loaded.model, loaded.model.config
    weights = attention_maps(model, pixels, layers=[0, -1])
    tokens = int(np.prod(config.grid_size)) + config.num_prefix_tokens
    for found in weights.values():
        assert found.shape == (4, config.num_attention_heads, tokens, tokens)
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]), rtol=0, atol=1e-5)
    eager = HFViTForImageClassification._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():  # with rotary and relative positions: those that the network itself computes with
        own = eager(pixels, output_attentions=True).attentions
    agree(weights[-1], own[-1])
    agree(weights[0], own[0])
    if config.use_class_token:
        agree(
            class_attention(model, pixels)[-1],
            own[-1][:, :, 0, config.num_prefix_tokens :].unflatten(-1, config.grid_size),
        )
    assert rollout_map(model, pixels).shape == (4, *config.grid_size)
    for method in METHODS:
        heat = explain(model, pixels, method)
        assert heat.shape == (4, *config.grid_size) and torch.isfinite(heat).all() and (heat >= 0).all(), method
        assert float(heat.sum()) > 0, method
    scores = compare_explanations(model, pixels[:1], steps=2)
    assert scores


def test_optimized_it_computes_the_same_or_steps_aside(loaded, pixels):
    model = plain_copy(loaded)
    with torch.no_grad():
        expected = model(pixels).logits
        agree(model.optimize_for_inference()(pixels).logits, expected)


def test_int8_and_token_merging_work_or_are_refused_by_the_field(loaded, pixels):
    fields = set(loaded.model.config.family_fields)
    model = plain_copy(loaded)
    try:
        with torch.no_grad():
            merged = merge_tokens(model, r=1)(pixels).logits
        assert torch.isfinite(merged).all()
    except HFViTError as error:
        assert any(field in str(error) for field in fields)
    if not loaded.model.config.has_plain_blocks:
        with pytest.raises(HFViTError, match="int8 knows the plain ViT's block alone"):
            plain_copy(loaded).optimize_for_inference(int8_calibration=pixels)
