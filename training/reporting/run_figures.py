"""The figures of a run: loss and accuracy over the steps, and the similarity of the position embeddings.

Imported only where they are drawn: `--help` need not wait for matplotlib.
"""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.distributed.tensor import DTensor

from hf_vit import HFViTForImageClassification
from hf_vit.atomic_file import atomic_path
from hf_vit.interpretability.attention import position_similarity
from hf_vit.interpretability.plots import draw_position_similarity


CURVE_NAME, POSITIONS_NAME = "training_curve.png", "position_embedding_similarity.png"


def draw_positions(model: HFViTForImageClassification, path: Path) -> bool:
    """Draw the similarity of the position embeddings (paper, Figure 7).

    Returns False for a model without a table of positions, or with a table sharded over processes.
    """
    table = model.base_model.embeddings.position_embeddings
    if table is None or isinstance(table, DTensor):
        return False
    figure = draw_position_similarity(position_similarity(model).cpu().numpy())
    with atomic_path(path) as temporary:
        figure.savefig(temporary, facecolor="white", metadata={"Software": None})
    return True


def draw_curve(history: list[dict[str, Any]], path: Path) -> bool:
    """Draw loss and accuracy over the steps, in training and evaluation; False if there is nothing to draw.

    For several labels mean average precision takes the place of accuracy, for a regression R2.
    """
    metrics = ("mean_average_precision", "r2")
    metric = next((name for name in metrics if any(f"eval_{name}" in line for line in history)), "accuracy")
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    drawn = False
    for axis, name in zip(figure.subplots(1, 2), ("loss", metric)):
        for key, label, style in ((name, "training", "-"), (f"eval_{name}", "evaluation", "o-")):
            points = [(line["step"], line[key]) for line in history if key in line]
            if points:
                axis.plot(*zip(*points), style, label=label, markersize=3, linewidth=1.4)
                drawn = True
        axis.set_xlabel("step")
        axis.set_ylabel(name.replace("_", " "))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    if drawn:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, metadata={"Software": None})
    return drawn
