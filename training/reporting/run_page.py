"""The report of a finished run: collects what report_page.py shows of it. Whatever fails here, model and card stay.

For train.py and folds.py.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.distributed.tensor import DTensor

from hf_vit.errors import error_in_one_line
from hf_vit.hub.model_card import REPORT, REPORT_FILE, write_card
from hf_vit.image_io import printable
from hf_vit.interpretability.attention import uncompiled

from ..data.dataset import ImageDataset, concatenate
from ..data.deduplication import Duplicate, sampled_duplicates
from ..metrics.outcomes import OUTCOMES_NAME, Outcomes, joined_outcomes
from .facts import is_hf_vit, write_facts
from .progress import format_number


REPORT_EXAMPLES = 6  # images with attention maps
MAX_ATTENTION_SECONDS = 5.0  # after which no further one is drawn: a large model on a CPU takes long


def write_run_page(trainer: Any, facts: dict[str, Any], log: Callable[[str], None] = print) -> None:
    """Write report.html into the folder of a run with `--report`; a failure is one line.

    The card links it where `--card_examples` shows images on it; `facts` then name it, and `hf-vit push` sends it.

    Args:
        trainer: `Trainer` after its last evaluation. facts: as they were written.
    """
    if not trainer.reports or not trainer.accelerator.is_main_process or trainer.outcomes is None:
        return
    try:
        from .report_page import write_report_page  # not above: with it comes matplotlib

        trainer.outcomes.save(trainer.output_dir / OUTCOMES_NAME)
        with trainer.averaged():
            path = write_report_page(trainer.output_dir, run_input(trainer, facts), log)
        log(f"report: {path}")
        if trainer.args.card_examples:
            facts[REPORT] = REPORT_FILE
            write_facts(trainer.output_dir, facts)
            write_card(trainer.output_dir)
    except Exception as error:  # the run is over and saved
        log(f"note: no report.html, the folder is complete without it: {error_in_one_line(error)}")


def write_folds_page(
    folder: Path, runs: Sequence[Path], parts: Callable[[], list[ImageDataset]], summary: dict[str, Any]
) -> None:
    """Write report.html of a cross-validation: every image by the model that did not train on it; as above.

    Args:
        runs: folders of the folds. parts: opens what each held out. summary: of the folds, as in folds.json.
    """
    try:
        from .report_page import ReportInput, write_report_page

        held_out = parts()
        outcomes = joined_outcomes(
            [Outcomes.load(run / OUTCOMES_NAME) for run in runs], [len(part) for part in held_out]
        )
        scores = [
            (name.replace("_", " "), f"{format_number(name, row['mean'])} ± {format_number(name, row['std'])}")
            for name, row in summary["metrics"].items()
        ]
        report = ReportInput(
            title=f"{folder.resolve().name}: {summary['folds']} folds",
            overview=[
                ("images", f"{summary['n']:,}, each held out once"),
                ("scores", "mean ± standard deviation"),
                *scores,
            ],
            scores=[],
            history=[],
            outcomes=outcomes,
            names=held_out[0].label_names,
            dataset=concatenate(held_out, "all folds"),
            unseen="images by the fold that held them out",
        )
        print(f"report: {write_report_page(folder, report)}")
    except Exception as error:  # the runs are over and saved
        print(f"note: no report.html of all folds: {error_in_one_line(error)}")


def run_input(trainer: Any, facts: dict[str, Any]) -> Any:
    """What the page of a run is made of."""
    from .report_page import ReportInput

    config, train, evaluation = trainer.model.config, trainer.train_dataset, trainer.eval_dataset
    images = evaluation if isinstance(evaluation, ImageDataset) else None

    def looked_at() -> list[tuple[str, Image.Image]] | str:
        if images is None:
            return "The images are not at hand."
        left = MAX_ATTENTION_SECONDS if trainer.time_plan is None else trainer.time_plan.left()
        return attention_sheets(
            trainer.model, images, trainer.normalize, trainer.image_processor,
            seconds=min(MAX_ATTENTION_SECONDS, left),
        )  # fmt: skip

    def duplicates() -> tuple[list[Duplicate], ImageDataset | None, str]:
        return duplicates_for_page(images, train)

    split = getattr(evaluation, "split", "evaluation")
    return ReportInput(
        title=facts["model"]["name"],
        overview=run_overview(facts),
        scores=facts["results"],
        history=trainer.state.log_history,
        outcomes=trainer.outcomes,
        names=[config.id2label[number] for number in range(config.num_labels)],
        dataset=images,
        unseen=f"held-out images ({split})",
        thresholds=getattr(config, "label_thresholds", None),
        looked_at=looked_at,
        duplicates=duplicates,
    )


def run_overview(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Model and data in a few rows, of facts.json."""
    model, data, training = facts["model"], facts["data"], facts.get("training", {})
    height, width = model["image_size"]
    base = f", from {model['base_model']}" if model.get("base_model") else ""
    rows = [
        ("model", f"{model.get('class') or model['model_type']}, {model['parameters']:,} parameters, "
                  f"{height} × {width} pixels{base}"),
    ]  # fmt: skip
    if "train_images" in data:
        rows.append(
            (
                "trained on",
                f"{data['train_images']:,} images ({data.get('name', 'data')}, {data.get('train_split', 'train')})",
            )
        )
    if "eval_images" in data:
        rows.append(("evaluated on", f"{data['eval_images']:,} images ({data['eval_split']})"))
    if "steps" in training:
        rows.append(
            ("steps", f"{training['steps']:,} of {training['global_batch_size']} images, seed {training['seed']}")
        )
    rows.append(("date", f"{facts['environment']['date'][:10]}, {facts['environment']['hardware']}"))
    return rows


def attention_sheets(
    model: Any,
    dataset: ImageDataset,
    normalize: Any,
    processor: Any,
    count: int = REPORT_EXAMPLES,
    seconds: float = MAX_ATTENTION_SECONDS,
) -> list[tuple[str, Image.Image]] | str:
    """(title, the image beside its maps) of some images; or why there are none.

    Args:
        count: images. seconds: after which no further one is drawn; the first one always is.
    """
    from .attention_examples import attention_columns, readable_examples
    from .report_page import beside

    network: Any = uncompiled(model) if is_hf_vit(model) else model
    if not is_hf_vit(network) or not network.config.num_hidden_layers:
        return f"{type(network).__name__} has no attention maps of a ViT: nothing to show here."
    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return "The weights are sharded over processes: `hf-vit inspect` shows what the saved model looks at."
    began, sheets = time.monotonic(), []
    for index in readable_examples(dataset, count):
        if sheets and time.monotonic() - began > seconds:
            break
        columns, guesses, _ = attention_columns([index], network, dataset, normalize, processor)
        title = printable(Path(dataset.image_name(index)).name)
        if dataset.labels.ndim == 1:
            label, guess = (dataset.label_names[number] for number in (dataset.labels[index], *guesses))
            title = label if label == guess else f"{label}, taken for {guess}"
        sheets.append((title, beside([Image.fromarray(part) for part in columns[0]])))
    return sheets


def duplicates_for_page(
    evaluation: ImageDataset | None, train: Any
) -> tuple[list[Duplicate], ImageDataset | None, str]:
    """Near-duplicates between the splits, the training images, and a sentence."""
    if evaluation is None or not isinstance(train, ImageDataset):
        return [], None, "The training images were streamed, and not compared."
    duplicates, among = sampled_duplicates(evaluation, train)
    if not duplicates:
        return [], train, f"None between {among}, by perceptual hash."
    advice = "--deduplicate_against eval trains without them"
    return (
        duplicates,
        train,
        f"{len(duplicates):,} between {among}, by perceptual hash: these scores flatter. {advice}.",
    )
