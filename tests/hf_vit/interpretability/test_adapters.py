"""Our models in pytorch-grad-cam and captum: what these compute is what their methods say, computed by hand.

captum is in the development environment. pytorch-grad-cam needs torchvision, which is kept out of it: its tests run in
an environment of their own, `make grad-cam`, and are skipped elsewhere.

python -m pytest tests/hf_vit/interpretability/test_adapters.py
"""

import pytest
import torch

from hf_vit.interpretability.adapters import Logits, grad_cam_layers, patch_maps, patch_mask, token_grid
from hf_vit.interpretability.perturbation import blurred
from tests.helpers.inspected_models import HEIGHT, KINDS, WIDTH, build


NO_GRAD_CAM = "pytorch-grad-cam needs torchvision: make grad-cam runs this in an environment of its own"


@pytest.fixture
def pixels():
    return torch.randn(2, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["token", "gap", "map", "root hybrid"])
def test_captum(kind, pixels):
    """Integrated gradients add up to the change of the logit, an ablated patch is that change, and maps are grids."""
    captum = pytest.importorskip("captum.attr")
    model = build(**KINDS[kind])
    absent = blurred(pixels)
    method = captum.IntegratedGradients(Logits(model))
    found = method.attribute(pixels, absent, target=2, n_steps=200, internal_batch_size=50)
    change = (model(pixels).logits - model(absent).logits)[:, 2]
    torch.testing.assert_close(found.sum(dim=(1, 2, 3)).float(), change, rtol=0.02, atol=0.02)
    mask = patch_mask(model, pixels)
    assert mask.shape == (1, 1, 32, 48) and len(mask.unique()) == 24
    ablated = captum.FeatureAblation(Logits(model)).attribute(pixels[:1], target=2, feature_mask=mask)
    gone = pixels[:1].clone()
    gone[..., :8, 8:16] = 0  # the second patch
    change = (model(pixels[:1]).logits - model(gone).logits)[0, 2]
    torch.testing.assert_close(ablated[0, 0, 0, 8], change)
    assert captum.LayerGradCam(Logits(model), patch_maps(model)).attribute(pixels, target=2).shape == (2, 1, 4, 6)


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (48, 40)], ids=["own size", "another size"])
@pytest.mark.parametrize("kind", ["token", "gap", "map", "root hybrid"])
def test_grad_cam(kind, size):
    """pytorch-grad-cam's heat is Grad-CAM of the tokens computed by hand."""
    cams = pytest.importorskip("pytorch_grad_cam", reason=NO_GRAD_CAM, exc_type=ImportError)
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets", reason=NO_GRAD_CAM, exc_type=ImportError)
    model = build(**KINDS[kind])
    pixels, grid = torch.randn(2, 3, *size), token_grid(model, size)
    chosen = [targets.ClassifierOutputTarget(2)] * 2
    with cams.GradCAM(Logits(model), grad_cam_layers(model), reshape_transform=grid) as cam:
        heat = torch.as_tensor(cam(input_tensor=pixels, targets=chosen))
    assert heat.amax() > 0.9  # of either image, or there is nothing to compare
    torch.testing.assert_close(heat, by_hand(model, pixels, grid, 2), rtol=1e-3, atol=1e-3)


def by_hand(model, pixels, grid, target):
    """Grad-CAM of the tokens, at the size of the images, each in [0, 1] as pytorch-grad-cam scales them."""
    kept = []
    hook = grad_cam_layers(model)[0].register_forward_hook(lambda _, args, output: kept.append(output))
    logits = Logits(model)(pixels)
    hook.remove()
    maps, slopes = (grid(t) for t in (kept[0], *torch.autograd.grad(logits[:, target].sum(), kept)))
    heat = (slopes.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).clamp_min(0)  # (B, rows, columns)
    heat = heat - heat.amin(dim=(1, 2), keepdim=True)
    heat = heat / (heat.amax(dim=(1, 2), keepdim=True) + 1e-7)
    large = torch.nn.functional.interpolate(heat[:, None].detach(), size=pixels.shape[-2:], mode="bilinear")[:, 0]
    large = large - large.amin(dim=(1, 2), keepdim=True)
    return large / (large.amax(dim=(1, 2), keepdim=True) + 1e-7)


def test_token_grid_keeps_the_order_of_patches():
    model = build(num_register_tokens=2)
    tokens = torch.arange(27.0)[None, :, None].expand(1, 27, 32)
    assert token_grid(model)(tokens)[0, 5].tolist() == (torch.arange(24.0) + 3).view(4, 6).tolist()
    assert token_grid(model, (32, 16))(tokens[:, :11]).shape == (1, 32, 4, 2)
