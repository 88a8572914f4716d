"""Give any image classifier its numbers, exactly, on any number of processes.

    accelerate launch -m training.score --model PATH_OR_HUB_ID --dataset PATH_OR_HUB_ID --output_dir scores
    accelerate launch -m training.score --model PATH_OR_HUB_ID --dataset imagenet/val --real_labels real.json
    accelerate launch -m training.score --model PATH_OR_HUB_ID --dataset pictures --few_shot 1 5 10 25 --knn 20
    accelerate launch -m training.score --model PATH_OR_HUB_ID --suite paper --output_dir suite

The model is one of ours, of any dialect, or any AutoModelForImageClassification (ViT, BiT, EfficientNet, ...). On the
screen: a table; in --output_dir: facts.json, per_class.csv, confusion_matrix.png, model_index.yaml for a card's front
matter, and .eval_results/ for a repository whose data set is on the Hub. If --output_dir is the folder of the model
itself, its own facts.json and card gain the scores. `--help` lists every option.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from hf_vit.errors import HFViTError, Parser, report_error

from .data.dataset import ImageDataset, open_dataset, open_door
from .data.sources import Columns, listed
from .data.splits import EVAL_SPLITS
from .data.transforms import RESAMPLING
from .evaluation import report
from .evaluation.classifier import Classifier, open_classifier
from .evaluation.evaluate_classifier import TTA, Machine, Scored, create_machine, preprocessing, score_dataset
from .evaluation.features import compute_features
from .evaluation.few_shot import L2, NeighbourProbe, few_shot
from .evaluation.label_mapping import LabelMatch, check_real, match_labels, read_real_labels, real_rows
from .evaluation.throughput import measure_speed
from .metrics.calibration.calibration import METHOD, calibration


def build_parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    parser = Parser(
        prog="python -m training.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder, checkpoint file or Hub id of an image classifier")
    add("--dataset", help="Hub id, image folder, parquet file or folder, digits, or synthetic:NAME")
    add(
        "--suite", help="many data sets by a fixed protocol: imagenet, paper or vtab (training/evaluation/suites.yaml)"
    )
    add("--output_dir", help="where facts, tables and pictures go")
    data = parser.add_argument_group("which pictures")
    data.add_argument("--split", help="default: the first of validation, val, dev, test that the data has")
    data.add_argument("--train_split", default="train", help="what the probes learn from (train)")
    data.add_argument("--dataset_config_name", help="configuration of a Hub dataset")
    data.add_argument("--image_column", help="column with the pictures; default: found")
    data.add_argument("--label_column", help="column with the labels; default: found")
    data.add_argument("--cache_dir", help="where tables and features are kept; default: datasets' cache")
    data.add_argument("--on_unreadable", default="stop", choices=("stop", "skip"), help="unreadable pictures (stop)")
    labels = parser.add_argument_group("which output means which class")
    labels.add_argument(
        "--label_map", help="JSON or YAML file of data class: model class; number: class i is output i"
    )
    labels.add_argument(
        "--label_subset", help="outputs that compete: data (the data's classes), imagenet_a, imagenet_r, or a file"
    )
    labels.add_argument("--real_labels", help="ImageNet-ReaL: real.json, or the folder that holds it")
    view = parser.add_argument_group("how pictures are cut; default: as the model's image processor does")
    view.add_argument("--image_size", type=int, nargs="+", metavar="PX", help="one number, or height and width")
    view.add_argument("--crop_pct", type=float, help="resize the short side to size / crop_pct, crop the centre")
    view.add_argument("--squash", action="store_true", help="resize to height x width, as the ViT paper evaluates")
    view.add_argument("--resample", choices=tuple(RESAMPLING), help="filter of the resize")
    view.add_argument("--tta", default="none", choices=tuple(TTA), help="average over mirrored pictures, crops (none)")
    probes = parser.add_argument_group("probes on frozen features, in place of the head")
    probes.add_argument(
        "--few_shot", type=int, nargs="+", metavar="SHOTS", help="pictures per class, such as 1 5 10 25"
    )
    probes.add_argument("--knn", type=int, metavar="K", help="nearest neighbours, all of --train_split")
    probes.add_argument("--l2", type=float, default=L2, help="of the few-shot ridge regression (1024)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--per_device_eval_batch_size", type=int, default=32, help="pictures of one pass (32)")
    machine.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="processes that decode, per process (0)"
    )
    machine.add_argument("--bf16", action="store_true", help="mixed precision")
    machine.add_argument("--use_cpu", action="store_true", help="leave a GPU alone")
    machine.add_argument("--no_speed", action="store_true", help="do not measure throughput, latency and memory")
    suite = parser.add_argument_group("suites")
    suite.add_argument(
        "--data", nargs="+", default=[], metavar="TASK=PATH", help="local copies of a suite's data sets"
    )
    suite.add_argument(
        "--transfer", default="probe", choices=("probe", "finetune"), help="ridge probe on all labels, or the paper's "
        "fine-tuning with its grid of learning rates (probe)"
    )  # fmt: skip
    suite.add_argument(
        "--finetune_set", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of training.finetune to change"
    )
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked as far as that goes without opening anything.

    Raises:
        HFViTError: an unknown option, or options that contradict each other.
    """
    args = build_parser().parse_args(argv)
    if (args.dataset is None) == (args.suite is None):
        raise HFViTError("what to score on? Give --dataset (a folder, a Hub id, digits) or --suite NAME")
    if args.suite is not None and args.output_dir is None:
        raise HFViTError("a suite needs --output_dir FOLDER: it resumes from what it finds there")
    refuse_unused(args)
    if args.per_device_eval_batch_size < 1:
        raise HFViTError(f"--per_device_eval_batch_size must be 1 or more, got {args.per_device_eval_batch_size}")
    if args.image_size is not None and (len(args.image_size) > 2 or min(args.image_size) < 1):
        raise HFViTError("--image_size takes one number, or height and width")
    if args.real_labels is not None and args.label_subset is not None:
        raise HFViTError("ReaL labels name any of ImageNet's classes: leave out --label_subset")
    return args


def refuse_unused(args: argparse.Namespace) -> None:
    """Raise HFViTError for an option that would have no effect."""
    used_by = {
        "--suite": ("data", "transfer", "finetune_set") if args.suite is None else (),
        "--dataset": ("split", "train_split", "dataset_config_name", "few_shot", "knn", "label_subset")
        if args.suite is not None
        else (),
        "a head (leave out --few_shot and --knn)": ("tta", "label_map", "label_subset", "real_labels")
        if args.few_shot is not None or args.knn is not None
        else (),
        "--few_shot and --knn": ("train_split",) if args.few_shot is None and args.knn is None else (),
        "--few_shot, or a suite with --transfer probe": ("l2",)
        if (args.few_shot is None if args.suite is None else args.transfer != "probe")
        else (),
        "--transfer finetune": ("finetune_set",) if args.transfer != "finetune" else (),
    }
    parser = build_parser()
    for place, names in used_by.items():
        for name in names:
            if getattr(args, name) != parser.get_default(name):
                raise HFViTError(f"--{name} has no effect here: it belongs to {place}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Score and return the facts; bad input is one line on stderr and exit status 2."""
    try:
        args = parse(argv)
        machine = create_machine(
            args.use_cpu,
            batch_size=args.per_device_eval_batch_size,
            workers=args.dataloader_num_workers,
            bf16=args.bf16,
        )
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if args.suite is not None:
            from .evaluation.suites import run_suite  # which scores through this room

            facts = run_suite(args, machine)
        else:
            facts = score(args, machine)
        machine.accelerator.end_training()
        return facts
    except (HFViTError, OSError) as error:
        raise SystemExit(report_error(error)) from None


def score(args: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """One classifier on one data set, from options to facts."""
    if args.output_dir is not None:
        report.check_output(Path(args.output_dir), args.model)
    dataset = open_split(args, args.split or found_split(args))
    classifier = open_model(args)
    probing = args.few_shot is not None or args.knn is not None
    rows, scored, match = [], None, None
    if not probing:
        match = match_labels(dataset.label_names, headed(classifier), args.label_map, args.label_subset)
        real = None if args.real_labels is None else real_labels(args.real_labels, dataset, match)
        scored = score_dataset(classifier, dataset, match, machine, args.tta, real)
        rows = score_rows(scored, machine.accelerator.is_main_process)
    else:
        rows = probe_rows(args, classifier, dataset, machine)
    speed = {} if args.no_speed else measure_speed(classifier, machine)
    facts = report.facts_of(args, machine, classifier, dataset, rows, speed)
    facts["scoring"] = {"preprocessing": preprocessing(classifier, args.tta), "on_unreadable": args.on_unreadable}
    if match is not None and scored is not None:
        facts["scoring"]["labels"] = match.how
        facts["data"] |= {"unreadable_images": len(scored.unreadable)}
        if scored.logits is not None:
            facts["scoring"]["temperature"] = METHOD
    if machine.accelerator.is_main_process:
        finish(args, facts, scored, match)
    machine.accelerator.wait_for_everyone()
    return facts


def finish(args: argparse.Namespace, facts: dict[str, Any], scored: Scored | None, match: LabelMatch | None) -> None:
    """The table on the screen, and the files."""
    print(report.summary(facts))
    if scored is not None and match is not None:
        print(report.weakest(scored.totals, match.names))
        for name in scored.unreadable[:5]:
            print(f"unreadable: {name}")
    if args.output_dir is not None:
        report.write(Path(args.output_dir), facts, scored, match)
        print(f"written to {args.output_dir}")


# -- what is opened --------------------------------------------------------------------------------------------------


def found_split(args: argparse.Namespace) -> str:
    """The first of the usual evaluation splits that the data has."""
    columns = Columns(args.image_column, args.label_column, None)
    splits = open_door(args.dataset, args.dataset_config_name, columns, args.cache_dir).splits
    found = next((name for name in EVAL_SPLITS if name in splits), None)
    if found is None:
        raise HFViTError(f"'{args.dataset}' has no split to evaluate on; choose one with --split: {listed(splits)}")
    return found


def open_split(args: argparse.Namespace, split: str, label_names: list[str] | None = None) -> ImageDataset:
    return open_dataset(
        args.dataset,
        config_name=args.dataset_config_name,
        split=split,
        image_column=args.image_column,
        label_column=args.label_column,
        label_names=label_names,
        on_unreadable=args.on_unreadable,
        cache_dir=args.cache_dir,
    )


def open_model(args: argparse.Namespace) -> Classifier:
    size = args.image_size
    return open_classifier(
        args.model,
        image_size=None if size is None else size[0] if len(size) == 1 else (size[0], size[1]),
        crop_pct=args.crop_pct,
        squash=args.squash,
        resample=args.resample,
    )


def headed(classifier: Classifier) -> list[str]:
    """The names of the outputs; a model without any cannot be scored by its head."""
    names = classifier.label_names
    if not names:
        raise HFViTError(f"{classifier.name} has no head to score: probe its features with --few_shot or --knn")
    return names


def real_labels(path: str, dataset: ImageDataset, match: LabelMatch) -> np.ndarray:
    """The ReaL labels of a data set's pictures: by file name, else in the order of the whole validation set."""
    names = [dataset.picture_name(index) for index in range(len(dataset))]
    rows = real_rows(read_real_labels(path), names, dataset.rows.tolist(), len(dataset.source.labels))
    check_real(rows, match.places[dataset.labels])
    return rows


# -- what is measured ------------------------------------------------------------------------------------------------


def score_rows(scored: Scored, main: bool) -> list[dict[str, Any]]:
    """{"metric", "value", "n"} of every score; after a temperature where logits were kept, on the main process."""
    found = scored.totals.scores()
    if main and scored.logits is not None and scored.labels is not None and len(scored.labels) > 1:
        after = calibration(scored.logits, scored.labels)
        chosen = ("ece_after_temperature", "nll_after_temperature", "brier_after_temperature", "temperature")
        found |= {name: (after[name], len(scored.labels)) for name in chosen}
    return [{"metric": name, "value": value, "n": count} for name, (value, count) in found.items()]


def probe_rows(
    args: argparse.Namespace, classifier: Classifier, dataset: ImageDataset, machine: Machine
) -> list[dict[str, Any]]:
    """Few-shot and nearest-neighbour accuracy; features are computed once and kept."""
    train = open_split(args, args.train_split, dataset.label_names)
    known = compute_features(classifier, train, machine, args.cache_dir)
    asked = compute_features(classifier, dataset, machine, args.cache_dir)
    rows = []
    if args.few_shot is not None:
        for row in few_shot(known.features, known.labels, asked.features, asked.labels, args.few_shot, l2=args.l2):
            name = f"{row['shots']}_shot_accuracy"
            rows.append({"metric": name, "value": row["accuracy"], "n": row["n"], "seed": row["seed"]})
    if args.knn is not None:
        probe = NeighbourProbe(args.knn).fit(known.features, known.labels)
        value = probe.score(asked.features, asked.labels)
        rows.append({"metric": f"{args.knn}_nn_accuracy", "value": value, "n": len(asked.labels)})
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
