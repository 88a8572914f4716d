"""report.html of a scored model (`training.score --report`), also for a model that was trained long ago.

Tests: tests/training/test_score.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_vit.errors import error_in_one_line
from hf_vit.hub.model_card import FACTS, REPORT, write_card
from hf_vit.problem_type import thresholds_of

from ..data.dataset import ImageDataset
from ..metrics.outcomes import Outcomes
from ..reporting.facts import write_facts
from ..reporting.progress import HISTORY_NAME
from ..reporting.report_page import ReportInput, write_report_page
from ..reporting.run_page import attention_sheets, run_overview
from .classifier import Classifier, load_processor


def write_score_page(
    args: argparse.Namespace,
    facts: dict[str, Any],
    classifier: Classifier,
    dataset: ImageDataset,
    outcomes: Outcomes,
    names: list[str],
) -> None:
    """Write the page into --output_dir; a failure is logged in one line. The card no longer links an earlier page.

    Args:
        facts: of the scoring. names: of the model's outputs, in the order of `outcomes`.
    """
    folder, config = Path(args.output_dir), classifier.model.config
    history = folder / HISTORY_NAME  # of a training run whose folder this is
    lines = history.read_text(encoding="utf-8").splitlines() if history.is_file() else []

    def attention() -> Any:
        processor = load_processor(args.model, config)
        return attention_sheets(
            classifier.model, dataset.with_transform(classifier.transform), classifier.normalize, processor
        )

    report = ReportInput(
        title=facts["model"]["name"],
        overview=run_overview(facts),
        scores=facts["results"],
        history=[json.loads(line) for line in lines],
        outcomes=outcomes,
        names=names,
        dataset=dataset,
        unseen=f"the scored images ({dataset.split}); it holds where the model was not trained on them",
        thresholds=thresholds_of(config) if getattr(config, "label_thresholds", None) is not None else None,
        looked_at=None if args.squash or args.crop_pct is not None else attention,
    )
    try:
        print(f"report: {write_report_page(folder, report)}")
        written = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if written.pop(REPORT, None):  # the user agreed to show other images than these on the card
            write_facts(folder, written)
            write_card(folder)
    except Exception as error:  # the scores are written
        print(f"note: no report.html: {error_in_one_line(error)}")
