"""How long card and report will take at the end of a run, tried before its first step.

For the Trainer, which sets that time aside where a run has a time limit. The page is made once of invented answers to
some real images; nothing of it stays.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_vit.problem_type import SINGLE_LABEL

from ..data.dataset import ImageDataset
from ..metrics.outcomes import TOP_CLASSES, Outcomes
from .facts import is_hf_vit
from .run_page import MAX_ATTENTION_SECONDS, REPORT_EXAMPLES, attention_sheets


IMAGES = 64  # of the invented answers: a page shows a bounded number of images, and of these as many
HISTORY = [{"step": step, "loss": 1.0, "eval_loss": 1.0, "learning_rate": 1e-3} for step in (1, 2)]


@dataclass(frozen=True)
class FinishSeconds:
    """What follows the last evaluation.

    Attributes:
        page: of report.html without what the model looks at, of the figures, and of the card. attention: of one image
            with what the model looks at.
    """

    page: float = 0.0
    attention: float = 0.0

    def total(self, card_examples: int, reports: bool) -> float:
        """Seconds of the card with so many examples, and of the report where there is one."""
        of_page = min(REPORT_EXAMPLES * self.attention, MAX_ATTENTION_SECONDS + self.attention) if reports else 0.0
        return self.page + card_examples * self.attention + of_page


def rehearse_finish(
    model: Any, dataset: Any, normalize: Any, processor: Any, problem_type: str, reports: bool, card_examples: int
) -> FinishSeconds:
    """Make figures and page as at the end of a run, in a temporary folder, and measure it.

    Args:
        model: in any state; the caller restores it. dataset: to evaluate on. reports: whether there will be a page.
    """
    from . import run_figures  # not above: with them comes matplotlib
    from .report_page import ReportInput, write_report_page

    images = dataset if isinstance(dataset, ImageDataset) else None
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        run_figures.draw_curve(HISTORY, Path(folder) / run_figures.CURVE_NAME)
        if is_hf_vit(model):
            run_figures.draw_positions(model, Path(folder) / run_figures.POSITIONS_NAME)
        if reports:
            config = model.config
            names = [config.id2label[number] for number in range(config.num_labels)]
            invented = invented_outcomes(images, problem_type, len(names))
            report = ReportInput("", [], [], HISTORY, invented, names, images, "")
            write_report_page(Path(folder), report, lambda text: None)
        page = time.monotonic() - began
    attention = 0.0
    if (reports or card_examples) and images is not None and processor is not None:
        seconds = []
        for _ in range(2):  # the first one also allocates
            began = time.monotonic()
            attention_sheets(model, images, normalize, processor, count=1)
            seconds.append(time.monotonic() - began)
            if seconds[0] > MAX_ATTENTION_SECONDS / REPORT_EXAMPLES:
                break
        attention = min(seconds)
    return FinishSeconds(page, attention)


def invented_outcomes(images: ImageDataset | None, problem_type: str, num_labels: int) -> Outcomes:
    """Answers that differ from the labels of some images, as a page takes them."""
    count = IMAGES if images is None else min(IMAGES, len(images))
    index, random = np.arange(count), np.random.default_rng(0)
    outputs, losses = random.standard_normal((count, num_labels)), random.random(count)
    if images is not None:
        labels = images.labels[:count]
    else:
        labels = index % num_labels if problem_type == SINGLE_LABEL else (outputs > 0).astype(np.float32)
    if problem_type != SINGLE_LABEL:
        return Outcomes(problem_type, index, losses, labels, outputs=outputs)
    probabilities = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    classes = np.argsort(-outputs, axis=1)[:, :TOP_CLASSES]
    own = probabilities[index, labels]
    return Outcomes(
        problem_type, index, losses, labels, classes, np.take_along_axis(probabilities, classes, axis=1), own
    )
