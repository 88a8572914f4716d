"""torchvision's vision transformers, against their network written with torch.nn.MultiheadAttention as theirs is.

python -m pytest tests/hf_vit/checkpoints/test_checkpoints_torchvision.py
"""

import pytest
import torch
from torch import nn

from hf_vit import HFViTError
from hf_vit.checkpoints import load_checkpoint, read_checkpoint


pytestmark = pytest.mark.numerics


class Block(nn.Module):
    """`EncoderBlock` of torchvision/models/vision_transformer.py, in eval mode."""

    def __init__(self, heads: int, width: int, mlp: int, named: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        layers = [nn.Linear(width, mlp), nn.GELU(), nn.Identity(), nn.Linear(mlp, width)]
        self.mlp = nn.Sequential(*layers)
        if named:
            self.mlp = nn.Sequential()
            for name, layer in zip(("linear_1", "act", "dropout_1", "linear_2"), layers):
                self.mlp.add_module(name, layer)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """`VisionTransformer` of torchvision, parameter names as there."""

    def __init__(self, named: bool = False, representation: int | None = None, width=192, heads=3, grid=(4, 4)):
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.conv_proj = nn.Conv2d(3, width, 8, stride=8)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.randn(1, 1 + grid[0] * grid[1], width))
        self.encoder.layers = nn.Sequential()
        for i in range(2):
            self.encoder.layers.add_module(f"encoder_layer_{i}", Block(heads, width, 64, named))
        self.encoder.ln = nn.LayerNorm(width, eps=1e-6)
        self.heads = nn.Sequential()
        if representation:
            self.heads.add_module("pre_logits", nn.Linear(width, representation))
            self.heads.add_module("act", nn.Tanh())
        self.heads.add_module("head", nn.Linear(representation or width, 7))

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.encoder.pos_embedding
        return self.heads(self.encoder.ln(self.encoder.layers(x))[:, 0])


@pytest.mark.parametrize("named", [False, True], ids=["mlp.0", "mlp.linear_1"])
@pytest.mark.parametrize("representation", [None, 16])
def test_equals_torchvision(tmp_path, named, representation):
    theirs = VisionTransformer(named, representation).eval()
    with torch.no_grad():  # norms that change nothing could stand in one another's place
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(theirs.state_dict(), tmp_path / "vit_b_16.pth")
    loaded = read_checkpoint(tmp_path / "vit_b_16.pth")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = theirs(pixels), loaded.model(pixels).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    config = loaded.model.config
    assert (config.num_attention_heads, config.hidden_act, config.position_interpolation) == (3, "gelu", "bicubic")
    assert config.representation_size == representation and config.num_labels == 7
    assert loaded.processor["image_mean"] == [0.485, 0.456, 0.406]


def test_what_the_file_does_not_say(tmp_path):
    torch.save(VisionTransformer(width=48, heads=4, grid=(4, 6)).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(HFViTError, match="num_attention_heads="):
        load_checkpoint(tmp_path / "vit.pth")
    with pytest.raises(HFViTError, match="24 cells"):
        load_checkpoint(tmp_path / "vit.pth", num_attention_heads=4)
    model = load_checkpoint(tmp_path / "vit.pth", num_attention_heads=4, image_size=(32, 48))
    assert model.config.grid_size == (4, 6)


def test_incomplete_file(tmp_path):
    state = VisionTransformer().state_dict()
    state.pop("class_token")
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(HFViTError, match="incomplete, it has no class_token"):
        load_checkpoint(tmp_path / "vit.pth")
