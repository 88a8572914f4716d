"""Deletion and insertion curves, of a classifier whose answer is known and of ours.

python -m pytest tests/hf_vit/interpretability/test_perturbation.py
"""

import pytest
import torch

from hf_vit import HFViTError
from hf_vit.interpretability.attention import rollout_map
from hf_vit.interpretability.perturbation import Curves, compare_explanations, patch_numbers, perturbation_curves
from hf_vit.interpretability.relevance import explain
from tests.helpers.inspected_models import HEIGHT, KINDS, WIDTH, build


def test_cells_are_the_patches_that_the_model_reads():
    where = patch_numbers(build(patch_size=(8, 12)), (41, 50), (5, 4))
    assert where.shape == (41, 50) and where[0, 11] == 0 and where[0, 12] == 1 and where[8, 0] == 4
    assert where[40, 49] == 19  # cut off: counted with the last patch
    assert patch_numbers(build(), (32, 48), (2, 3))[15:17, 16].tolist() == [
        1,
        4,
    ]  # a map of another grid than the patches'
    assert patch_numbers(torch.nn.Linear(1, 1), (4, 6), (2, 3)).tolist()[3] == [3, 3, 4, 4, 5, 5]


class Corner(torch.nn.Module):
    """A classifier without attention that looks at the upper left pixel only."""

    def forward(self, pixel_values):
        return torch.stack([pixel_values[:, 0, 0, 0] * 4, torch.zeros(len(pixel_values))], dim=1)


def test_curves_of_a_known_classifier():
    pixels = torch.ones(1, 3, 8, 8)
    right, wrong = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    right[0, 0, 0], wrong[0, 1, 1] = 1, 1
    present, absent = torch.tensor([4.0, 0]).softmax(0)[0].item(), 0.5
    curves = perturbation_curves(Corner(), pixels, right, steps=4, baseline="gray")
    assert curves.deletion[0].tolist() == pytest.approx([present, absent, absent, absent, absent])
    assert curves.insertion[0].tolist() == pytest.approx([absent, present, present, present, present])
    assert curves.deletion_area.item() == pytest.approx(absent + (present - absent) / 8)
    assert curves.insertion_area.item() == pytest.approx(present - (present - absent) / 8)
    assert curves.score.item() == pytest.approx(curves.insertion_area.item() - curves.deletion_area.item())
    assert perturbation_curves(Corner(), pixels, wrong, steps=4, baseline="gray").score < curves.score


@pytest.mark.parametrize("kind", KINDS)
def test_curves_end_where_the_image_does(kind):
    model, pixels = build(**KINDS[kind]), torch.randn(2, 3, HEIGHT, WIDTH)
    found = compare_explanations(model, pixels, ["rollout", "relevance"], steps=3, random_orders=2)
    assert list(found) == ["rollout", "relevance", "random"] and isinstance(found["random"], Curves)
    whole = model(pixels).logits.softmax(1).amax(1).detach()
    for curves in found.values():
        torch.testing.assert_close(curves.deletion[:, 0], whole)
        torch.testing.assert_close(curves.insertion[:, -1], whole)
        torch.testing.assert_close(curves.deletion[:, -1], curves.insertion[:, 0])
    again = compare_explanations(model, pixels, {"mine": rollout_map(model, pixels)}, steps=3, random_orders=2)
    assert torch.equal(again["random"].deletion, found["random"].deletion)
    assert torch.equal(again["mine"].insertion, found["rollout"].insertion)


def test_random_is_the_mean_of_orders_drawn_from_the_seed():
    """Of every classifier, where the maps are given."""
    pixels, maps = torch.rand(2, 3, 8, 8) + 1, {"mine": torch.rand(2, 2, 2)}
    generator = torch.Generator().manual_seed(7)
    orders = [torch.rand(2, 2, 2, generator=generator) for _ in range(3)]
    runs = [perturbation_curves(Corner(), pixels, order, 0, steps=4) for order in orders]
    found = compare_explanations(Corner(), pixels, maps, 0, steps=4, random_orders=3, seed=7)["random"]
    for which in ("deletion", "insertion"):
        mean = torch.stack([getattr(run, which) for run in runs]).mean(0)
        torch.testing.assert_close(getattr(found, which), mean)
        assert not torch.allclose(getattr(runs[0], which), mean)  # the orders differ


def test_all_methods_explain_the_class_asked_for():
    """Not what each finds most probable; a class of several labels has a probability of its own."""
    model, pixels = build(problem_type="multi_label_classification"), torch.randn(2, 3, HEIGHT, WIDTH)
    found = compare_explanations(model, pixels, ["relevance"], 3, steps=2, random_orders=0)["relevance"]
    expected = perturbation_curves(model, pixels, explain(model, pixels, "relevance", 3), 3, steps=2)
    assert torch.equal(found.deletion, expected.deletion)
    torch.testing.assert_close(found.deletion[:, 0], model(pixels).logits[:, 3].sigmoid().detach())


@pytest.mark.parametrize("baseline", ["blur", "mean", "gray"])
def test_what_an_absent_patch_shows(baseline):
    pixels = torch.rand(1, 3, 8, 8) + 1
    curves = perturbation_curves(Corner(), pixels, torch.rand(1, 2, 2), 0, steps=1, baseline=baseline)
    far = torch.arange(-3, 4.0)  # a blur of an eighth of 8 pixels, to three deviations
    kernel = (-far.square() / 2).exp() / (-far.square() / 2).exp().sum()
    beside = pixels[0, 0, far.int().clamp_min(0)[:, None], far.int().clamp_min(0)]  # borders repeated
    corner = {"blur": kernel @ beside @ kernel, "mean": pixels[0, 0].mean(), "gray": torch.zeros(())}[baseline]
    torch.testing.assert_close(curves.deletion[0, -1], (corner * 4).sigmoid())


def test_a_model_in_training_is_asked_as_it_evaluates_and_goes_on_training():
    pixels, heat = torch.randn(2, 3, HEIGHT, WIDTH), torch.rand(2, 4, 6)
    model = build(hidden_dropout_prob=0.5)
    expected = perturbation_curves(model, pixels, heat, steps=2)
    model.train()
    model.vit.layers[0].eval()
    for found in (
        perturbation_curves(model, pixels, heat, steps=2),
        compare_explanations(model, pixels, {"mine": heat}, steps=2, random_orders=0)["mine"],
    ):
        assert torch.equal(found.deletion, expected.deletion)
    assert [module.training for module in (model, model.vit.layers[0], model.vit.layers[1])] == [True, False, True]


def test_the_class_is_the_one_that_a_model_in_training_gives_in_evaluation():
    class Changeable(Corner):
        def forward(self, pixel_values):
            return super().forward(pixel_values) * (-1 if self.training else 1)

    pixels, maps = torch.ones(1, 3, 8, 8), {"mine": torch.rand(1, 2, 2)}
    found = compare_explanations(Changeable().train(), pixels, maps, steps=1, random_orders=0)["mine"]
    assert found.deletion[0, 0] > 0.9


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
