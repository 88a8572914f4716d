"""Deletion and insertion curves, of a classifier whose answer is known and of ours.

python -m pytest tests/test_perturbation.py
"""

import pytest
import torch
from test_inspection import HEIGHT, KINDS, WIDTH, build

from hf_vit import HFViTError
from hf_vit.perturbation import Curves, cells, compare_explanations, perturbation_curves


def test_cells_are_the_patches_that_the_model_reads():
    where = cells(build(), (41, 50), (5, 6))
    assert where.shape == (41, 50) and where[0, 7] == 0 and where[0, 8] == 1 and where[8, 0] == 6
    assert where[40, 49] == 29  # cut off: counted with the last patch
    assert cells(torch.nn.Linear(1, 1), (4, 6), (2, 3)).tolist()[3] == [3, 3, 4, 4, 5, 5]


class Corner(torch.nn.Module):
    """A classifier without attention that looks at the upper left pixel only."""

    def forward(self, pixel_values):
        return torch.stack([pixel_values[:, 0, 0, 0] * 4, torch.zeros(len(pixel_values))], dim=1)


def test_curves_of_a_known_classifier():
    pixels = torch.ones(1, 3, 8, 8)
    right, wrong = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    right[0, 0, 0], wrong[0, 1, 1] = 1, 1
    present, absent = torch.tensor([4.0, 0]).softmax(0)[0].item(), 0.5
    curves = perturbation_curves(Corner(), pixels, right, steps=4, baseline="grey")
    assert curves.deletion[0].tolist() == pytest.approx([present, absent, absent, absent, absent])
    assert curves.insertion[0].tolist() == pytest.approx([absent, present, present, present, present])
    assert curves.deletion_area.item() == pytest.approx(absent + (present - absent) / 8)
    assert curves.insertion_area.item() == pytest.approx(present - (present - absent) / 8)
    assert curves.score.item() == pytest.approx(curves.insertion_area.item() - curves.deletion_area.item())
    assert perturbation_curves(Corner(), pixels, wrong, steps=4, baseline="grey").score < curves.score


@pytest.mark.parametrize("kind", KINDS)
def test_curves_end_where_the_picture_does(kind):
    model, pixels = build(**KINDS[kind]), torch.randn(2, 3, HEIGHT, WIDTH)
    found = compare_explanations(model, pixels, ["rollout", "relevance"], steps=3, random_orders=2)
    assert list(found) == ["rollout", "relevance", "random"] and isinstance(found["random"], Curves)
    whole = model(pixels).logits.softmax(1).amax(1).detach()
    for curves in found.values():
        torch.testing.assert_close(curves.deletion[:, 0], whole)
        torch.testing.assert_close(curves.insertion[:, -1], whole)
        torch.testing.assert_close(curves.deletion[:, -1], curves.insertion[:, 0])
    again = compare_explanations(model, pixels, ["rollout"], steps=3, random_orders=2)
    assert torch.equal(again["random"].deletion, found["random"].deletion)


def test_bad_input_is_named():
    model, pixels = build(), torch.randn(2, 3, HEIGHT, WIDTH)
    cases = [
        (lambda: perturbation_curves(model, pixels, torch.rand(1, 4, 6)), "expected .2, rows, columns."),
        (lambda: perturbation_curves(model, pixels, torch.full((2, 4, 6), torch.nan)), "must be finite"),
        (lambda: perturbation_curves(model, pixels, torch.rand(2, 4, 6), baseline="noise"), "baseline='noise'"),
        (lambda: perturbation_curves(model.vit, pixels, torch.rand(2, 4, 6)), "gives no logits"),
    ]
    for call, message in cases:
        with pytest.raises(HFViTError, match=message):
            call()
