"""Score one classifier on one data set: open both, measure, report.

For score.py, and for suites.py, which opens models and data sets in the same way.

Tests: tests/training/test_score.py.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from hf_vit.errors import HFViTError, listed, warnings_as_notes
from hf_vit.problem_type import MULTI_LABEL, SINGLE_LABEL, problem_type_of

from ..data.dataset import ImageDataset, open_dataset, open_reader
from ..data.sources import Columns
from ..data.splits import EVAL_SPLITS
from ..metrics.accuracy.accuracy import wilson_interval
from ..metrics.calibration.calibration import METHOD, calibration
from ..metrics.outcomes import OutcomeState
from ..reporting.progress import discard
from . import report
from .classifier import Classifier, open_classifier
from .evaluate_classifier import EvalContext, Predictions, preprocessing, score_dataset
from .features import compute_features
from .few_shot import NeighborProbe, few_shot
from .label_mapping import LabelMatch, check_real, match_labels, read_real_labels, real_rows
from .score_page import write_score_page
from .score_targets import (
    PER_LABEL_NAME,
    TargetPredictions,
    refuse_options_of_classes,
    score_targets,
    write_per_label,
)
from .throughput import measure_speed


def score_model(args: argparse.Namespace, context: EvalContext) -> dict[str, Any]:
    """Score a classifier as the options say; returns the facts."""
    if args.output_dir is not None:
        report.check_output(Path(args.output_dir), args.model)
    split = args.split or find_split(args)
    classifier = open_scored_model(args, context)
    problem = problem_type_of(classifier.model.config)
    if problem != SINGLE_LABEL:
        refuse_options_of_classes(args, problem)
    names = None if problem == SINGLE_LABEL else classifier.label_names
    dataset = open_scored_split(args, split, names, problem)
    probing = args.few_shot is not None or args.knn is not None
    predictions, match, targets = None, None, None
    state = OutcomeState(problem) if args.report else None
    if problem != SINGLE_LABEL:
        targets = score_targets(classifier, dataset, context, args.tta, state)
        rows = targets.rows()
    elif not probing:
        match = match_labels(dataset.label_names, output_names(classifier), args.label_map, args.label_subset)
        real = None if args.real_labels is None else real_labels(args.real_labels, dataset, match)
        predictions = score_dataset(classifier, dataset, match, context, args.tta, real, state)
        rows = score_rows(predictions)
        predictions.logits = None  # frees memory for the figures
    else:
        rows = probe_rows(args, classifier, dataset, context)
    speed = {} if args.no_speed else measure_speed(classifier, context)
    facts = report.facts_of(args, context, classifier, dataset, rows, speed)
    facts["scoring"] = {"preprocessing": preprocessing(classifier, args.tta), "on_decode_error": args.on_decode_error}
    if match is not None and predictions is not None:
        facts["scoring"]["labels"] = match.how
        facts["data"] |= {"unreadable_images": len(predictions.unreadable)}
        if any(row["metric"] == "temperature" for row in rows):
            facts["scoring"]["temperature"] = METHOD
    if targets is not None:
        facts["data"] |= {"unreadable_images": len(targets.unreadable)}
    outcomes = None if state is None else state.gather(context.accelerator)
    if context.accelerator.is_main_process:
        write_score_outputs(args, facts, predictions, match, targets)
        if outcomes is not None:
            names = classifier.label_names if match is None else match.names
            write_score_page(args, facts, classifier, dataset, outcomes, list(names))
    context.accelerator.wait_for_everyone()
    return facts


def write_score_outputs(
    args: argparse.Namespace,
    facts: dict[str, Any],
    predictions: Predictions | None,
    match: LabelMatch | None,
    targets: TargetPredictions | None,
) -> None:
    """Print the table and write the files."""
    print(report.score_summary(facts))
    if predictions is not None and match is not None:
        print(report.weakest(predictions.metrics, match.names))
        for name in predictions.unreadable[:5]:
            print(f"unreadable: {name}")
    for name in targets.unreadable[:5] if targets is not None else ():
        print(f"unreadable: {name}")
    if args.output_dir is not None:
        report.write_report_files(Path(args.output_dir), facts, predictions, match)
        if targets is not None and targets.problem_type == MULTI_LABEL:
            write_per_label(Path(args.output_dir) / PER_LABEL_NAME, targets)
        print(f"written to {args.output_dir}")


def find_split(args: argparse.Namespace) -> str:
    """The first of the usual evaluation splits that the data has."""
    columns = Columns(args.image_column, args.label_column, image_root=args.image_root, split=args.split_column)
    splits = open_reader(args.dataset, args.dataset_config_name, columns, args.cache_dir).splits
    split = next((name for name in EVAL_SPLITS if name in splits), None)
    if split is None:
        raise HFViTError(f"'{args.dataset}' has no split to evaluate on; choose one with --split: {listed(splits)}")
    return split


def open_scored_split(
    args: argparse.Namespace, split: str, label_names: list[str] | None = None, problem_type: str = SINGLE_LABEL
) -> ImageDataset:
    return open_dataset(
        args.dataset,
        config_name=args.dataset_config_name,
        split=split,
        image_column=args.image_column,
        label_column=args.label_column,
        problem_type=problem_type,
        label_separator=args.label_separator,
        image_root=args.image_root,
        split_column=args.split_column,
        label_names=label_names,
        on_unreadable=args.on_decode_error,
        cache_dir=args.cache_dir,
    )


def open_scored_model(args: argparse.Namespace, context: EvalContext) -> Classifier:
    """Load the model; notes about its weights are printed."""
    size = args.image_size
    with warnings_as_notes(print if context.accelerator.is_main_process else discard):
        return open_classifier(
            args.model,
            image_size=None if size is None else size[0] if len(size) == 1 else (size[0], size[1]),
            crop_pct=args.crop_pct,
            squash=args.squash,
            resample=args.resample,
        )


def output_names(classifier: Classifier) -> list[str]:
    """The names of the outputs; an encoder has none, which is an error."""
    names = classifier.label_names
    if not names:
        raise HFViTError(f"{classifier.name} has no head to score: probe its features with --few_shot or --knn")
    return names


def real_labels(path: str, dataset: ImageDataset, match: LabelMatch) -> np.ndarray:
    """The ReaL labels of a data set's images, matched by file name or by position in the whole validation set."""
    names = [dataset.image_name(index) for index in range(len(dataset))]
    rows = real_rows(read_real_labels(path), names, dataset.rows.tolist(), len(dataset.source.labels))
    check_real(rows, match.places[dataset.labels])
    return rows


def score_rows(predictions: Predictions) -> list[dict[str, Any]]:
    """One row per score: {"metric", "value", "n"} and, if it has one, "interval"; on the main process.

    Includes calibration after temperature scaling if the logits were kept.
    """
    scores, intervals = predictions.metrics.scores(), predictions.metrics.intervals()
    if predictions.logits is not None and predictions.labels is not None and len(predictions.labels) > 1:
        after = calibration(predictions.logits, predictions.labels)
        names = ("ece_after_temperature", "nll_after_temperature", "brier_after_temperature", "temperature")
        scores |= {name: (after[name], len(predictions.labels)) for name in names}
    rows = [{"metric": name, "value": value, "n": count} for name, (value, count) in scores.items()]
    return [row | ({"interval": list(intervals[row["metric"]])} if row["metric"] in intervals else {}) for row in rows]


def probe_rows(
    args: argparse.Namespace, classifier: Classifier, dataset: ImageDataset, context: EvalContext
) -> list[dict[str, Any]]:
    """Few-shot and nearest-neighbor accuracy on frozen features, which are cached."""
    train = open_scored_split(args, args.train_split, dataset.label_names)
    learned = compute_features(classifier, train, context, args.cache_dir)
    test = compute_features(classifier, dataset, context, args.cache_dir)
    rows = []
    if args.few_shot is not None:
        for row in few_shot(learned.features, learned.labels, test.features, test.labels, args.few_shot, l2=args.l2):
            name = f"{row['shots']}_shot_accuracy"
            rows.append(accuracy_row(name, row["accuracy"], row["n"]) | {"seed": row["seed"]})
    if args.knn is not None:
        probe = NeighborProbe(args.knn).fit(learned.features, learned.labels)
        value = probe.score(test.features, test.labels)
        rows.append(accuracy_row(f"{args.knn}_nn_accuracy", value, len(test.labels)))
    return rows


def accuracy_row(metric: str, value: float, count: int) -> dict[str, Any]:
    """An accuracy on `count` images, with its interval."""
    return {"metric": metric, "value": value, "n": count, "interval": list(wilson_interval(value * count, count))}
