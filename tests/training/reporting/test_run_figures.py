"""The figures of a run are drawn where there is something to draw.

python -m pytest tests/training/reporting/test_run_figures.py
"""

from hf_vit import HFViTConfig, HFViTForImageClassification
from training.reporting import run_figures


def test_the_curve_is_drawn_where_there_is_something_to_draw(tmp_path):
    assert not run_figures.draw_curve([], tmp_path / "curve.png")
    history = [{"step": 1, "loss": 2.0, "accuracy": 0.1}, {"step": 1, "eval_loss": 2.1, "eval_accuracy": 0.2}]
    assert run_figures.draw_curve(history, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_positions_are_drawn_where_there_are_any(tmp_path):
    small = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    learned, fixed = (
        HFViTForImageClassification(HFViTConfig(**small, num_labels=2, position_embedding_type=kind))
        for kind in ("learned", "none")
    )
    assert run_figures.draw_positions(learned, tmp_path / "a.png") and not run_figures.draw_positions(
        fixed, tmp_path / "b.png"
    )
    run_figures.draw_positions(learned, tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert not (tmp_path / "b.png").exists()
