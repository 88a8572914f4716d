"""Small models with weights that all count, and their comparison."""

import torch

from hf_vit import HFViTConfig, HFViTForImageClassification


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its trivial value, so that each counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def ours(**fields) -> HFViTForImageClassification:
    return shaken(HFViTForImageClassification(HFViTConfig(**(SMALL | {"num_labels": 5} | fields))))


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
